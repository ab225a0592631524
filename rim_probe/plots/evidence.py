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

TONES = {"memory": "memory", "cot": "cot", "direct": "ink"}
OTHERS = {"cot": "chain of thought", "direct": "direct answer"}
RELATIONS = {"above": "above", "overlapping": "not clear of", "below": "below"}


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
    figures |= {f"probe {probe['name']}": probe_figure(probe) if probe["rows"] else None for probe in probes}
    data = {
        "told": _told(metrics) if metrics else "",
        "costs": [_cost(one) for one in metrics["latency"]] if metrics else [],
        "paired": _paired(metrics) if metrics else [],
        "elsewhere": _elsewhere(metrics) if metrics else [],
        "causes": evidence["causes"],
        "probes": [probe | {"rail": _rail(probe), "relations": RELATIONS} for probe in probes],
        "url": report_url if urlsplit(report_url).scheme in ("", "http", "https") else "",
        **_commands(evidence),
    }
    table = _table(metrics, probes) if metrics or probes else None
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
    bars = [{"name": _name(one), "tone": TONES[one["method"]], **one["all"]} for one in metrics["accuracy"]]
    removed = [one for one in metrics["sweep"] if one["num_blocks"] == 0]
    bars += [{"name": "control: RiM, blocks removed", "control": True, **one} for one in removed]
    return _figure("bars", "", "right, % of problems", {"bars": bars}).update_xaxes(range=[0, 1])


def latency_figure(metrics: Mapping[str, Any]) -> Any:
    """Milliseconds of one answer by method: median and quartiles."""
    spreads = [(one, one["total_ms"]) for one in metrics["latency"]]
    bars = [
        {"name": _name(one), "tone": TONES[one["method"]], "value": ms["median"], "low": ms["q1"], "high": ms["q3"]}
        for one, ms in spreads
    ]
    return _figure("bars", "", "milliseconds for one answer: median and quartiles", {"bars": bars})


def steps_figure(metrics: Mapping[str, Any]) -> Any:
    """Accuracy by the number of steps that a problem needs; None where there is one number alone."""
    steps = list(metrics["accuracy"][0]["by_steps"]) if metrics["accuracy"] else []
    none = {"value": None, "low": None, "high": None}
    series = [
        {"name": _name(one), "tone": TONES[one["method"]], "x": steps}
        | _columns([one["by_steps"].get(count) or none for count in steps])
        for one in metrics["accuracy"]
    ]
    return _figure("lines", "steps the problem needs", "right, %", {"series": series}) if len(steps) > 1 else None


def sweep_figure(metrics: Mapping[str, Any]) -> Any:
    """Accuracy of RiM over the number of memory blocks at the time of asking."""
    blocks = [entry["num_blocks"] for entry in metrics["sweep"]]
    series = [{"name": "RiM", "tone": "memory", "x": blocks} | _columns(metrics["sweep"])]
    figure = _figure("lines", "memory blocks K at the time of asking", "right, %", {"series": series})
    return figure.update_xaxes(dtick=2).update_layout(showlegend=False)


def probe_figure(probe: Mapping[str, Any]) -> Any:
    """The rows of one probe, each with the best control of its own as a tick."""
    bars = [
        row | {"mark": one["value"], "tip": f"best control, {one['name']}: {one['text']}"} if one else row
        for row in probe["rows"]
        for one in [row["against"]]
    ]
    figure = _figure("bars", "", "", {"bars": bars})
    return figure.update_xaxes(range=_ends(probe), tickformat=".0%" if probe["percent"] else "")


def _figure(kind: str, x: str, y: str, data: dict[str, Any]) -> Any:
    from rim_probe.plots.report import section_figure
    from rim_probe.probing.section import Figure

    figure = section_figure(Figure(kind, "", x, y, data))
    return figure.update_yaxes(range=[0, 1.02]) if kind == "lines" else figure


def _columns(shares: Sequence[Mapping[str, Any]]) -> dict[str, list[float | None]]:
    return {key: [share[name] for share in shares] for key, name in (("y", "value"), ("low", "low"), ("high", "high"))}


def _ends(probe: Mapping[str, Any]) -> list[float]:
    """From 0 (or below) to 1 for shares and scores, further where the values go further."""
    parts = [part for row in probe["rows"] for part in (row, row["against"] or {})]
    values = [part[key] for part in parts for key in ("value", "low", "high") if is_number(part.get(key))]
    low, high = min([0.0, *values]), max([1.0, *values])
    room = 0.04 * (high - low)
    return [low - (room if low < 0 else 0), high + (room if high > 1 else 0)]


def _rail(probe: Mapping[str, Any]) -> dict[str, float]:
    """Where the headline and its control lie on the probe's own axis, in percent."""
    row = probe["headline"]
    if row is None:
        return {}
    low, high = _ends(probe)
    found = {key: row[key] for key in ("value", "low", "high")} | {"control": (row["against"] or {}).get("value")}
    return {
        key: round(100 * min(max((value - low) / (high - low), 0), 1), 1)
        for key, value in found.items()
        if is_number(value)
    }


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


def _table(metrics: Mapping[str, Any] | None, probes: Sequence[Mapping[str, Any]]) -> Table:
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
        for row in probe["rows"]:
            rows.append([f"{probe['title']}: {probe['measure']}", row["name"], *_numbers(row), None])
            if control := row["against"]:
                name = f"best control of {row['name']}: {control['name']}"
                rows.append([probe["title"], name, *_numbers(control), None])
    return Table(["what", "of", "value", "low", "high", "n"], rows)


def _numbers(row: Mapping[str, Any]) -> list[float | None]:
    return [None if row[key] is None else round(row[key], 4) for key in ("value", "low", "high")]
