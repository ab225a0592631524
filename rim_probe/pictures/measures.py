"""The figures of a comparison as SVG files: accuracy by blocks and by steps, and what an answer costs.

Knows the report dict of `rim_probe.comparison.compare`; every number in a figure stands in it. Does not know files, nor
how anything is measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rim_probe.pictures.axes import Axis, axis, named_axis
from rim_probe.pictures.chart import Line
from rim_probe.pictures.svg import Plot, Row, Rows, Stop, svg_figure

_NAMES = {"direct": "direct", "memory": "RiM", "cot": "chain of thought"}
_TONES = {"direct": "ink", "memory": "memory", "cot": "cot"}
_SHAPES = {"direct": "triangle", "memory": "dot", "cot": "square"}
_TITLES = {
    "accuracy-by-blocks": "Accuracy by number of memory blocks",
    "accuracy-by-steps": "Accuracy by number of reasoning steps",
    "costs": "What an answer costs",
}


def draw_measures(report: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """(title, SVG text) by file name; only of figures for which there are numbers."""
    files = [entry for entry in report["files"] if entry["report"]["done"]]
    drawn = {
        "accuracy-by-blocks": _blocks(files),
        "accuracy-by-steps": _steps(files),
        "costs": _costs(report["costs"]),
    }
    return {f"{name}.svg": (_TITLES[name], text) for name, text in drawn.items() if text}


def _blocks(files: Sequence[Mapping[str, Any]]) -> str:
    shown = [entry for entry in files if entry["report"]["sweep"]]
    if not shown:
        return ""
    shares = [one for entry in shown for one in (*entry["report"]["sweep"], *_others(entry["report"]).values())]
    y = _share_axis(shares)
    panels = []
    for entry in shown:
        report = entry["report"]
        sweep = report["sweep"]
        counts = [one["num_blocks"] for one in sweep]
        tips = [f"{entry['name']}, RiM, {_blocks_of(k)}: {_share(one)}" for k, one in zip(counts, sweep, strict=True)]
        ends = [min(counts) - 0.5, max(counts) + 0.5]
        lines = [
            Line(
                ends,
                [one["accuracy"]] * 2,
                _TONES[method],
                low=[one["low"]] * 2,
                high=[one["high"]] * 2,
                tips=[f"{entry['name']}, {_NAMES[method]}: {_share(one)}"] * 2,
                shape="",
            )
            for method, one in _others(report).items()
        ]
        kept = [i for i, k in enumerate(counts) if k]
        lines.append(_line([sweep[i] for i in kept], [counts[i] for i in kept], [tips[i] for i in kept], "memory"))
        lines += [
            Line([k], [one["accuracy"]], low=[one["low"]], high=[one["high"]], tips=[tip], shape="ring")
            for k, one, tip in zip(counts, sweep, tips, strict=True)
            if not k
        ]
        x = axis([], "memory blocks after the question", low=ends[0], high=ends[1], ticks=8)
        used = report["settings"]["num_blocks"]
        panels.append(Plot(f"{entry['name']}, n = {report['done']:,}", x, y, lines, (used, f"K = {used}")))
    methods = [method for method in ("cot", "direct") if any(method in _others(entry["report"]) for entry in shown)]
    keys = [("dot", "memory", "RiM, readout after block k"), ("ring", "memory", "blocks removed")]
    keys += [("line", _TONES[method], _NAMES[method]) for method in methods]
    lead = "Share of right answers with 95 % intervals. K is the number of blocks used everywhere else."
    return svg_figure(panels, _TITLES["accuracy-by-blocks"], lead, keys)


def _others(report: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Final accuracy of the methods that memory is compared with."""
    accuracy = report["accuracy"]
    return {method: accuracy[method]["all"]["final"] for method in ("cot", "direct") if method in accuracy}


def _steps(files: Sequence[Mapping[str, Any]]) -> str:
    stated = {
        entry["name"]: [count for count in _first(entry)["by_steps"] if count != "0"]
        for entry in files
        if entry["report"]["accuracy"]
    }
    shown = [entry for entry in files if len(stated.get(entry["name"], ())) > 1]
    if not shown:
        return ""
    y = _share_axis(
        [
            figures["by_steps"][count]["final"]
            for entry in shown
            for figures in entry["report"]["accuracy"].values()
            for count in stated[entry["name"]]
        ]
    )
    panels = []
    for entry in shown:
        counts = stated[entry["name"]]
        lines = []
        for shift, method in ((0.12, "direct"), (0.0, "cot"), (-0.12, "memory")):
            if method not in entry["report"]["accuracy"]:
                continue
            cells = [entry["report"]["accuracy"][method]["by_steps"][count]["final"] for count in counts]
            tips = [
                f"{entry['name']}, {_NAMES[method]}, {count} {'step' if count == '1' else 'steps'}: {_share(cell)}"
                for count, cell in zip(counts, cells, strict=True)
            ]
            lines.append(_line(cells, [place + shift for place in range(len(counts))], tips, method))
        panels.append(Plot(entry["name"], named_axis(counts, "steps of the gold solution"), y, lines, bars=True))
    methods = [method for method in ("memory", "cot", "direct") if method in shown[0]["report"]["accuracy"]]
    keys = [(_SHAPES[method], _TONES[method], _NAMES[method]) for method in methods]
    return svg_figure(
        panels, _TITLES["accuracy-by-steps"], "Share of right answers (final block) with 95 % intervals.", keys
    )


def _first(entry: Mapping[str, Any]) -> Mapping[str, Any]:
    return next(iter(entry["report"]["accuracy"].values()))


def _costs(costs: Sequence[Mapping[str, Any]]) -> str:
    batches = [(place, batch) for place in costs for batch in place["batches"]]
    if not batches:
        return ""
    panels = []
    for place, batch in batches:
        rows, values = [], []
        for method in ("direct", "memory", "cot"):
            if method not in batch["methods"]:
                continue
            stops = []
            for measure, shape, what in (("ttft_ms", "ring", "first answer token"), ("total_ms", "dot", "full answer")):
                times = batch["methods"][method][measure]
                if times is None:
                    continue
                values += [times["q1"], times["q3"]]
                tip = (
                    f"{_NAMES[method]}, {what}, batch {batch['batch_size']}: {_ms(times['median'])} "
                    f"(quartiles {_ms(times['q1'])} to {_ms(times['q3'])}), n = {batch['n']}"
                )
                stops.append(Stop(times["median"], times["q1"], times["q3"], shape, _ms(times["median"]), tip))
            rows.append(Row(_NAMES[method], _TONES[method], stops))
        x = axis([min(values) / 1.3, max(values) * 1.3], "milliseconds (logarithmic)", log=True, form=_plain)
        size = batch["batch_size"]
        asked = "one question alone" if size == 1 else f"a batch of {size}"
        panels.append(Rows(f"{place['machine']['device'].upper()}, {asked}, n = {batch['n']}", x, rows))
    keys = [("ring", "soft", "first answer token"), ("dot", "soft", "full answer")]
    lead = (
        "Medians with quartiles; the methods took turns in random order. Of a batch: until all its answers are there."
    )
    return svg_figure(panels, _TITLES["costs"], lead, keys)


def _line(shares: Sequence[Mapping[str, Any]], x: Sequence[float], tips: Sequence[str], method: str) -> Line:
    return Line(
        x,
        [share["accuracy"] for share in shares],
        _TONES[method],
        low=[share["low"] for share in shares],
        high=[share["high"] for share in shares],
        tips=tips,
        shape=_SHAPES[method],
    )


def _share_axis(shares: Sequence[Mapping[str, Any]]) -> Axis:
    """From 0 to what the intervals reach: these are low figures, which an axis up to 100 % would press flat."""
    highest = max([share["high"] for share in shares if share["n"]], default=1.0)
    return axis([], "right", low=0, high=min(1.0, 1.06 * highest), form=lambda share: f"{100 * share:g} %")


def _share(share: Mapping[str, Any]) -> str:
    if share["accuracy"] is None:
        return "none"
    low, high = (f"{100 * share[end]:.1f}" for end in ("low", "high"))
    return f"{100 * share['accuracy']:.1f} % ({low} to {high}), n = {share['n']:,}"


def _blocks_of(k: int) -> str:
    return "blocks removed" if not k else f"after block {k}"


def _ms(value: float) -> str:
    return f"{value:,.0f} ms" if value >= 100 else f"{value:.1f} ms"


def _plain(value: float) -> str:
    return f"{value:,.0f}" if value >= 1 else f"{value:g}"
