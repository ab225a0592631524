"""The figures of an evaluation: accuracy by blocks and by steps, and what an answer costs.

Knows the report dict of `rim_probe.comparison.compare`; every number in a figure stands in it. Does not know files, nor
how anything is measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rim_probe.plots.colours import colour

if TYPE_CHECKING:
    from plotly.graph_objects import Figure, Scatter

_NAMES = {"direct": "direct", "memory": "RiM", "cot": "chain of thought"}
_TONES = {"direct": "soft", "memory": "memory", "cot": "cot"}
_TITLES = {
    "accuracy-by-blocks": "Accuracy by number of memory blocks",
    "accuracy-by-steps": "Accuracy by number of reasoning steps",
    "costs": "What an answer costs",
}


def draw_measures(report: Mapping[str, Any]) -> dict[str, tuple[str, Figure]]:
    """(title, plotly figure) by name; only of figures for which there are numbers."""
    files = [entry for entry in report["files"] if entry["report"]["done"]]
    drawn = {"accuracy-by-blocks": _blocks(files), "accuracy-by-steps": _steps(files), "costs": _costs(report["costs"])}
    return {name: (_TITLES[name], figure) for name, figure in drawn.items() if figure is not None}


def _blocks(files: Sequence[Mapping[str, Any]]) -> Figure | None:
    """A panel per file: the readout after block k, and the other methods as level lines."""
    panels = []
    for entry in files:
        sweep, accuracy = entry["report"]["sweep"], entry["report"]["accuracy"]
        counts = [one["num_blocks"] for one in sweep]
        lines = [_shares("memory", counts, sweep)] if sweep else []
        for method in ("cot", "direct") if sweep else ():
            if method in accuracy:
                lines.append(_shares(method, counts, [accuracy[method]["all"]["final"]] * len(counts), mode="lines"))
        panels.append((entry["name"], lines))
    return _figure("accuracy-by-blocks", panels, "memory blocks after the question (0: removed)", "right")


def _steps(files: Sequence[Mapping[str, Any]]) -> Figure | None:
    """A panel per file that states steps: final answers of every method."""
    panels = []
    for entry in files:
        cells = {method: figures["by_steps"] for method, figures in entry["report"]["accuracy"].items()}
        counts = [steps for steps in next(iter(cells.values())) if steps != "0"]
        lines = [
            _shares(method, counts, [by_steps[steps]["final"] for steps in counts])
            for method, by_steps in cells.items()
        ]
        panels.append((entry["name"], lines if len(counts) > 1 else []))
    return _figure("accuracy-by-steps", panels, "steps of the gold solution", "right (final block)")


def _costs(costs: Sequence[Mapping[str, Any]]) -> Figure | None:
    """A panel per device and batch size: medians with quartiles."""
    panels = []
    for place in costs:
        for batch in place["batches"]:
            bars = [
                _points(method, [name for name, _ in times], [one for _, one in times], "median", "q1", "q3")
                for method, measured in batch["methods"].items()
                for times in [
                    [
                        (name, measured[key])
                        for name, key in (("first answer token", "ttft_ms"), ("full answer", "total_ms"))
                        if measured[key]
                    ]
                ]
            ]
            panels.append((f"{place['machine']['device']}, batch {batch['batch_size']}, {batch['n']} turns", bars))
    figure = _figure("costs", panels, "", "ms (median, quartiles)")
    return figure.update_yaxes(type="log") if figure else None


def _shares(method: str, x: list, shares: Sequence[Mapping[str, Any]], mode: str = "lines+markers") -> Scatter:
    return _points(method, x, shares, "accuracy", "low", "high", mode)


def _points(
    method: str, x: list, values: Sequence[Mapping[str, Any]], middle: str, low: str, high: str, mode: str = "markers"
) -> Scatter:
    """A method's values with intervals."""
    from plotly.graph_objects import Scatter

    ends = {
        "array": [value[high] - value[middle] for value in values],
        "arrayminus": [value[middle] - value[low] for value in values],
        "symmetric": False,
    }
    return Scatter(
        x=x,
        y=[value[middle] for value in values],
        error_y=ends,
        name=_NAMES[method],
        legendgroup=method,
        mode=mode,
        line={"color": colour(_TONES[method])},
    )


def _figure(name: str, panels: Sequence[tuple[str, list[Scatter]]], x: str, y: str) -> Figure | None:
    """Panels side by side on one axis; each method once in the legend."""
    from plotly.subplots import make_subplots

    from rim_probe.plots.theme import plain

    shown = [(title, lines) for title, lines in panels if lines]
    if not shown:
        return None
    figure = make_subplots(
        rows=1, cols=len(shown), subplot_titles=[plain(title) for title, _ in shown], shared_yaxes=True
    )
    for place, (_, lines) in enumerate(shown, start=1):
        for line in lines:
            figure.add_trace(line.update(showlegend=place == 1), row=1, col=place)
    figure.update_xaxes(title=x)
    figure.update_yaxes(title=y, col=1)
    return figure.update_layout(title=_TITLES[name], template="plotly_white")
