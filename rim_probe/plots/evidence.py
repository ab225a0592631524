"""Evidence: what was measured of a checkpoint, readable in a minute: accuracy and time, causes, probes, commands.

Knows the dictionary of `rim_probe.probing.evidence.load_evidence`; every number on the page stands in it. Does not know
files, and does not choose which number stands for a probe.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from rim_probe.numbers import format_interval, is_number
from rim_probe.plots.frame import Panel, Table, caption
from rim_probe.plots.report import bars, lines
from rim_probe.plots.report import figures as draw
from rim_probe.probing.results import Estimate, Report, Result, View, headline, plain, relation
from rim_probe.probing.tables import format_estimate

TONES = {"memory": "memory", "cot": "cot", "direct": "ink"}
OTHERS = {"cot": "chain of thought", "direct": "direct answer"}


def draw_evidence(evidence: Mapping[str, Any], *, report_url: str = "") -> Panel:
    """The panel of one checkpoint.

    Args:
        evidence: as `load_evidence` gives it.
        report_url: where the whole report page lies, if it is served: a path, or an http(s) address.
    """
    metrics, probes = evidence["metrics"], evidence["probes"]
    figures = {}
    if metrics:
        figures["accuracy"] = accuracy_figure(metrics)
        figures["latency"] = latency_figure(metrics) if metrics["latency"] else None
        figures["steps"] = steps_figure(metrics)
        figures["sweep"] = sweep_figure(metrics) if len(metrics["sweep"]) > 1 else None
    reports = {probe["name"]: Report.from_dict(probe["report"]) for probe in probes}
    figures |= {f"probe {name} {i}": one for name, of in reports.items() for i, (_, one, _) in enumerate(draw(of))}
    data = {
        "told": _told(metrics) if metrics else "",
        "costs": [_cost(one) for one in metrics["latency"]] if metrics else [],
        "paired": _paired(metrics) if metrics else [],
        "elsewhere": _elsewhere(metrics) if metrics else [],
        "causes": evidence["causes"],
        "probes": [probe | _rail(reports[probe["name"]]) for probe in probes],
        "url": report_url if urlsplit(report_url).scheme in ("", "http", "https") else "",
        **_commands(evidence),
    }
    table = _table(metrics, probes, reports) if metrics or probes else None
    title = f"Evidence: {evidence['checkpoint']}"
    return Panel(
        "evidence",
        title,
        data,
        table,
        {},
        figures,
        notes=evidence["complaints"],
        caption=caption(evidence["checkpoint"], None),
    )


# ------------------------------------------------------------------------------------------------- accuracy and time


def accuracy_figure(metrics: Mapping[str, Any]) -> Any:
    """Share of right answers by method, and RiM with its blocks removed as the control."""
    results = [_result(_name(one), one["all"]) for one in metrics["accuracy"]]
    results += [_result("RiM, blocks removed", one, "control") for one in metrics["sweep"] if one["num_blocks"] == 0]
    return bars(View("right", True, (), {}, results), _tones(metrics)).update_xaxes(range=[0, 1])


def latency_figure(metrics: Mapping[str, Any]) -> Any:
    """Milliseconds of one answer by method: median and quartiles."""
    results = [
        Result("ms", _name(one), Estimate(ms["median"], ms["q1"], ms["q3"], one["n"]), share=False)
        for one in metrics["latency"]
        for ms in [one["total_ms"]]
    ]
    return bars(View("milliseconds for one answer: median and quartiles", False, (), {}, results), _tones(metrics))


def steps_figure(metrics: Mapping[str, Any]) -> Any:
    """Accuracy by the number of steps that a problem needs; None where there is one number alone."""
    place = "steps the problem needs"
    results = [
        _result(_name(one), share, place={place: steps})
        for one in metrics["accuracy"]
        for steps, share in one["by_steps"].items()
    ]
    if len({one.place[place] for one in results}) < 2:
        return None
    return lines(View("right", True, (place,), {}, results), _tones(metrics)).update_yaxes(range=[0, 1.02])


def sweep_figure(metrics: Mapping[str, Any]) -> Any:
    """Accuracy of RiM over the number of memory blocks at the time of asking."""
    place = "memory blocks K at the time of asking"
    results = [_result("RiM", one, place={place: one["num_blocks"]}) for one in metrics["sweep"]]
    figure = lines(View("right", True, (place,), {}, results), {"RiM": "memory"})
    return figure.update_xaxes(dtick=2).update_yaxes(range=[0, 1.02]).update_layout(showlegend=False)


def _result(of: str, share: Mapping[str, Any], role: Any = "score", place: Mapping[str, Any] | None = None) -> Result:
    numbers = [float("nan") if share[key] is None else share[key] for key in ("value", "low", "high")]
    return Result("right", of, Estimate(*numbers, share["n"]), role, place=place or {})


def _tones(metrics: Mapping[str, Any]) -> dict[str, str]:
    return {_name(one): TONES[one["method"]] for one in metrics["accuracy"]}


def _rail(report: Report) -> dict[str, Any]:
    """The headline for one line: `score`, `of`, `beside` as text; `rail`: where they lie from 0 to 1, in percent; a
    headline that is no share has no rail."""
    found = headline(report)
    if found is None:
        return {"rail": {}}
    score, control = found
    unit = " %" if score.share else ""
    told = {"score": format_estimate(score.estimate, score.share, unit).partition(" (")[0], "of": score.of}
    rail = {key: getattr(score.estimate, key) for key in ("value", "low", "high")}
    if control:
        told |= {"beside": format_estimate(control.estimate, control.share, unit).partition(" (")[0]}
        told |= {"control": control.of, "relation": relation(score.estimate, control.estimate)}
        rail["control"] = control.estimate.value
    places = {key: round(100 * min(max(value, 0.0), 1.0), 1) for key, value in rail.items() if is_number(value)}
    return told | {"rail": places if score.share else {}}


# -------------------------------------------------------------------------------------------------------- sentences


def _told(metrics: Mapping[str, Any]) -> str:
    """The race in a sentence or two."""
    shares = {one["method"]: one["all"]["value"] for one in metrics["accuracy"] if one["all"]["value"] is not None}
    times = {one["method"]: one["total_ms"]["median"] for one in metrics["latency"]}
    text = ""
    if "memory" in shares:
        others = [f"{name} {100 * shares[key]:.1f} %" for key, name in OTHERS.items() if key in shares]
        named = f" of {metrics['data']}" if metrics["data"] else ""
        text = f"RiM is right in {100 * shares['memory']:.1f} % of {metrics['n']:,} problems{named}"
        text += f" ({', '.join(others)})." if others else "."
    if times.get("memory") and times.get("cot"):
        factor = times["cot"] / times["memory"]
        text += f" It answers in {times['memory']:.1f} ms, {factor:.1f} times as fast as chain of thought (medians)."
    return text


def _cost(one: Mapping[str, Any]) -> str:
    passes, cache = one["forward_passes"]["median"], one["kv_cache_bytes"]["median"] / 1024
    return f"{_name(one)} {passes:g} passes, {cache:,.0f} KiB"


def _paired(metrics: Mapping[str, Any]) -> list[str]:
    return [
        f"RiM against {OTHERS[pair['second']]}: only RiM right in {pair['only_first']:,}, only the other in "
        f"{pair['only_second']:,}, both in {pair['both_right']:,}, neither in {pair['both_wrong']:,} of "
        f"{pair['n']:,} (exact McNemar {_p(pair['p_value'])})."
        for pair in metrics["paired"]
        if pair["first"] == "memory" and pair["second"] in OTHERS
    ]


def _elsewhere(metrics: Mapping[str, Any]) -> list[str]:
    """The other files of problems, in a line each."""
    return [
        f"{other['name']}, n = {other['n']:,}: "
        + "; ".join(f"{_name(one)} {_share(one['all'])}" for one in other["accuracy"])
        for other in metrics["others"]
    ]


def _p(value: float) -> str:
    return f"p = {value:.2f}" if value >= 0.01 else f"p = {value:.3f}" if value >= 0.001 else "p < 0.001"


def _name(one: Mapping[str, Any]) -> str:
    return "direct answer" if one["method"] == "direct" else one["name"]


def _share(share: Mapping[str, Any]) -> str:
    """`49.2 % (47.2 to 51.1)`."""
    if share["value"] is None:
        return "none"
    value, space, interval = format_interval(share["value"], share["low"], share["high"], True).partition(" ")
    return f"{value} %{space}{interval}"


def _commands(evidence: Mapping[str, Any]) -> dict[str, Any]:
    """Each command once, with what it made, and the machines."""
    sources = [("accuracy and time", evidence["metrics"]["made"])] if evidence["metrics"] else []
    sources += [(probe["title"], probe["made"]) for probe in evidence["probes"]]
    commands: dict[str, list[str]] = {}
    for what, made in sources:
        if made["command"]:
            commands.setdefault(made["command"], []).append(f"{what} ({made['date']}, seed {made['seed']})")
    return {"commands": commands, "machines": list(dict.fromkeys(m["machine"] for _, m in sources if m["machine"]))}


def _table(
    metrics: Mapping[str, Any] | None, probes: Sequence[Mapping[str, Any]], reports: Mapping[str, Report]
) -> Table:
    rows: list[list[Any]] = []
    if metrics:
        for one in metrics["accuracy"]:
            for what, share in (("all", one["all"]), *one["by_steps"].items()):
                problems = "all problems" if what == "all" else f"problems of steps: {what}"
                rows.append([f"right, {_name(one)}", problems, *_numbers(share), share["n"]])
        rows += [["right, RiM", f"K = {one['num_blocks']}", *_numbers(one), one["n"]] for one in metrics["sweep"]]
        for one in metrics["latency"]:
            numbers = [round(one["total_ms"][key], 2) for key in ("median", "q1", "q3")]
            rows.append([f"ms for one answer, {_name(one)}", "median, quartiles", *numbers, one["n"]])
    for probe in probes:
        for one in reports[probe["name"]].results:
            where = "".join(f", {name} {value}" for name, value in one.place.items())
            numbers = _numbers(plain(vars(one.estimate)))
            rows.append([f"{probe['title']}: {one.metric}", f"{one.name}{where}", *numbers, one.estimate.n])
    return Table(["what", "of", "value", "low", "high", "n"], rows)


def _numbers(row: Mapping[str, Any]) -> list[float | None]:
    return [None if row[key] is None else round(row[key], 4) for key in ("value", "low", "high")]
