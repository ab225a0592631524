"""Evidence: what was measured of a checkpoint, readable in a minute: accuracy and time, causes, probes, commands.

Knows the dictionary of `rim_probe.probing.evidence.load_evidence`; every number on the page stands in it. Does not know
files, and does not choose which number stands for a probe.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from rim_probe.numbers import format_interval, is_number
from rim_probe.plots.frame import Panel, Table

TONES = {"memory": "memory", "cot": "cot", "direct": "ink"}
SYMBOLS = {"memory": "circle", "cot": "square", "direct": "triangle-up"}
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
    return Panel("evidence", title, data, table, {}, figures, notes=evidence["complaints"])


# ------------------------------------------------------------------------------------------------- accuracy and time


def accuracy_figure(metrics: Mapping[str, Any]) -> Any:
    """Share of right answers by method, and RiM with its blocks removed as the control."""
    from rim_probe.plots import theme

    rows = [
        {
            "name": _name(one),
            "tone": TONES[one["method"]],
            "text": _share(one["all"]),
            "tip": _n(one["all"]),
            **one["all"],
        }
        for one in metrics["accuracy"]
    ]
    for entry in metrics["sweep"]:
        if entry["num_blocks"] == 0:
            tip = "the same weights, no memory block after the question"
            rows.append(
                {"name": "control: RiM, blocks removed", "control": True, "text": _share(entry), "tip": tip, **entry}
            )
    return theme.rows(rows, "right, % of problems", range=[0, 1])


def latency_figure(metrics: Mapping[str, Any]) -> Any:
    """Milliseconds of one answer by method: median and quartiles."""
    from rim_probe.plots import theme

    rows = []
    for one in metrics["latency"]:
        spread = one["total_ms"]
        value, low, high = (spread[key] for key in ("median", "q1", "q3"))
        row = {"name": _name(one), "tone": TONES[one["method"]], "value": value, "low": low, "high": high}
        rows.append(row | {"text": f"{value:.1f} ms ({low:.1f} to {high:.1f})", "tip": f"{_cost(one)}, n = {one['n']}"})
    return theme.rows(rows, "milliseconds for one answer: median and quartiles", rangemode="tozero")


def steps_figure(metrics: Mapping[str, Any]) -> Any:
    """Accuracy by the number of steps that a problem needs; None where there is one number alone."""
    from rim_probe.plots import theme

    steps, traces = list(metrics["accuracy"][0]["by_steps"]) if metrics["accuracy"] else [], []
    for one in metrics["accuracy"]:
        shares = [one["by_steps"].get(count) or {"value": None, "low": None, "high": None, "n": 0} for count in steps]
        name, look = _name(one), {"symbol": SYMBOLS[one["method"]]}
        texts = [f"{name}, steps: {c}<br>{_share(s)}, {_n(s)}" for c, s in zip(steps, shares, strict=True)]
        traces += theme.line(name, steps, *_columns(shares), TONES[one["method"]], texts, **look)
    x = {"title": "steps the problem needs", "type": "category"}
    return theme.figure(traces, x, {"title": "right, %", "range": [0, 1.02]}) if len(steps) > 1 else None


def sweep_figure(metrics: Mapping[str, Any]) -> Any:
    """Accuracy of RiM over the number of memory blocks at the time of asking."""
    from rim_probe.plots import theme

    sweep = metrics["sweep"]
    blocks = [entry["num_blocks"] for entry in sweep]
    used = ["", " (as used above)"]
    texts = [f"K = {e['num_blocks']}{used[e['num_blocks'] == metrics['num_blocks']]}<br>{_share(e)}" for e in sweep]
    traces = theme.line("RiM", blocks, *_columns(sweep), "memory", texts, showlegend=False)
    x = {"title": "memory blocks K at the time of asking", "dtick": 2}
    x["range"] = [min(blocks) - 0.4, max(blocks) + 0.4]
    return theme.figure(traces, x, {"title": "right, %", "range": [0, 1.02]})


def probe_figure(probe: Mapping[str, Any]) -> Any:
    """The rows of one probe, each with the best control of its own as a tick."""
    from rim_probe.plots import theme

    rows = []
    for row in probe["rows"]:
        control = row["against"]
        tip = f"best control, {control['name']}: {control['text']}" if control else ""
        rows.append({**row, "tip": tip, "mark": control["value"] if control else None})
    share = {"tickformat": ".0%"} if probe["percent"] else {}
    return theme.rows(rows, "", range=_ends(probe), **share)


def _columns(shares: Sequence[Mapping[str, Any]]) -> list[list[float | None]]:
    return [[share[key] for share in shares] for key in ("value", "low", "high")]


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


def _n(share: Mapping[str, Any]) -> str:
    return f"n = {share['n']:,}"


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
