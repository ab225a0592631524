"""The figures of a comparison: accuracy by blocks and by steps, and what an answer costs.

Knows the report dict of `rim_probe.comparison.compare`; every number in a figure stands in it. Does not know how
anything is measured.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from plotly.subplots import make_subplots

from rim_probe.errors import RiMError
from rim_probe.plots import theme
from rim_probe.plots.colours import colour

NAMES = {"direct": "direct", "memory": "RiM", "cot": "chain of thought"}
TONES = {"direct": "ink", "memory": "memory", "cot": "cot"}
SYMBOLS = {"direct": "triangle-up", "memory": "circle", "cot": "square"}
WIDTH = 980
NO_SVG = "SVG figures need kaleido (`pip install kaleido`) and Chrome or Chromium"


def draw_measures(report: Mapping[str, Any]) -> dict[str, Any]:
    """`plotly.graph_objects.Figure` by file name without its ending; only those for which there are numbers."""
    files = [entry for entry in report["files"] if entry["report"]["done"]]
    drawn = {
        "accuracy-by-blocks": _by_blocks([entry for entry in files if entry["report"]["sweep"]]),
        "accuracy-by-steps": _by_steps([entry for entry in files if len(_stated(entry)) > 1]),
        "costs": _costs([(place, batch) for place in report["costs"] for batch in place["batches"]]),
    }
    return {name: figure for name, figure in drawn.items() if figure is not None}


def save_svg(figure: Any, path: str | Path) -> None:
    """Writes a figure as an SVG file on white paper.

    Raises:
        RiMError: kaleido or the browser that it draws with is missing.
    """
    check_svg()
    try:
        figure.write_image(path, format="svg")
    except Exception as error:  # kaleido and its browser each have exceptions of their own
        raise RiMError(f"{NO_SVG} ({type(error).__name__}).") from None


def check_svg() -> None:
    """
    Raises:
        RiMError: kaleido is missing.
    """
    if importlib.util.find_spec("kaleido") is None:
        raise RiMError(f"{NO_SVG}.")


def _by_blocks(files: Sequence[Mapping[str, Any]]) -> Any:
    """Accuracy after block k, beside the final accuracy of the other methods."""
    panels = []
    for entry in files:
        report = entry["report"]
        sweep, used = report["sweep"], report["settings"]["num_blocks"]
        counts = [one["num_blocks"] for one in sweep]
        traces = _line("RiM", counts, sweep, "memory", [f"K = {k}" if k else "blocks removed" for k in counts])
        for method in ("cot", "direct"):
            if method in report["accuracy"]:
                shares = [report["accuracy"][method]["all"]["final"]] * len(counts)
                look = {"dash": "dash", "mode": "lines"}
                traces += _line(NAMES[method], counts, shares, method, ["final answer"] * len(counts), **look)
        panels.append((f"{entry['name']}, n = {report['done']:,}, used with K = {used}", traces))
    return _panels(panels, "Accuracy by number of memory blocks", {"title": "memory blocks (0: removed)", "dtick": 2})


def _stated(entry: Mapping[str, Any]) -> list[str]:
    """The numbers of steps that the problems of a file state."""
    methods = list(entry["report"]["accuracy"].values())
    return [count for count in methods[0]["by_steps"] if count != "0"] if methods else []


def _by_steps(files: Sequence[Mapping[str, Any]]) -> Any:
    panels = []
    for entry in files:
        counts, traces = _stated(entry), []
        for method, figures in entry["report"]["accuracy"].items():
            shares = [figures["by_steps"][count]["final"] for count in counts]
            traces += _line(NAMES[method], counts, shares, method, [f"steps: {count}" for count in counts])
        panels.append((entry["name"], traces))
    x = {"title": "steps of the gold solution", "type": "category"}
    return _panels(panels, "Accuracy by number of reasoning steps", x)


def _costs(batches: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> Any:
    """Milliseconds to the first token of the answer and to its end: medians with quartiles."""
    import plotly.graph_objects as go

    panels = []
    for place, batch in batches:
        traces, names = [], [m for m in ("cot", "memory", "direct") if m in batch["methods"]]
        for key, what, symbol in (("ttft_ms", "first answer token", "-open"), ("total_ms", "full answer", "")):
            found = [(m, batch["methods"][m][key]) for m in names if batch["methods"][m][key] is not None]
            middle, low, high = ([spread[end] for _, spread in found] for end in ("median", "q1", "q3"))
            texts = [
                theme.hover(
                    f"{NAMES[m]}, {what}: {v['median']:.1f} ms ({v['q1']:.1f} to {v['q3']:.1f}), n = {batch['n']}"
                )
                for m, v in found
            ]
            marker = {"size": 10, "symbol": [SYMBOLS[m] + symbol for m, _ in found]}
            marker |= {"color": [colour(TONES[m]) for m, _ in found]}
            more = {"mode": "markers", "name": what, "legendgroup": what, "hoverinfo": "text", "hovertext": texts}
            y, error = [NAMES[m] for m, _ in found], theme.whisker(middle, low, high, "soft")
            traces.append(go.Scatter(x=middle, y=y, error_x=error, marker=marker, **more))
        asked = "one question alone" if batch["batch_size"] == 1 else f"a batch of {batch['batch_size']}"
        panels.append((f"{place['machine']['device'].upper()}, {asked}, n = {batch['n']}", traces))
    x = {"title": "milliseconds (logarithmic)", "type": "log"}
    return _panels(panels, "What an answer costs", x, {"type": "category"})


def _line(
    name: str, x: Sequence, shares: Sequence[Mapping[str, Any]], method: str, places: Sequence[str], **look: Any
) -> list[Any]:
    values, low, high = ([one[key] for one in shares] for key in ("accuracy", "low", "high"))
    texts = [
        theme.hover(f"{name}, {place}", "none" if v is None else f"{100 * v:.1f} % ({100 * a:.1f} to {100 * b:.1f})")
        for place, v, a, b in zip(places, values, low, high, strict=True)
    ]
    mode = look.pop("mode", "lines+markers")
    traces = theme.line(name, x, values, low, high, TONES[method], texts, symbol=SYMBOLS[method], **look)
    traces[-1].mode = mode
    return traces


def _panels(
    panels: Sequence[tuple[str, Sequence[Any]]], title: str, x: Mapping[str, Any], y: Mapping[str, Any] | None = None
) -> Any:
    """Panels side by side under one title, with one legend; None where there is no panel."""
    if not panels:
        return None
    grid = make_subplots(1, len(panels), subplot_titles=[theme.plain(name) for name, _ in panels], shared_yaxes=True)
    seen: set[str] = set()
    for column, (_, traces) in enumerate(panels, start=1):
        for trace in traces:
            trace.showlegend = trace.showlegend is not False and trace.name not in seen
            seen |= {trace.name} if trace.name else set()
            grid.add_trace(trace, 1, column)
    base = theme.figure([], x, y or {"title": "right, %", "rangemode": "tozero"}, 400).layout
    grid.update_layout({key: base[key] for key in ("font", "legend", "hoverlabel", "template", "height")})
    grid.update_layout(
        width=WIDTH, paper_bgcolor="#fff", plot_bgcolor="#fff", margin={"t": 84, "l": 60, "r": 20, "b": 90}
    )
    grid.update_layout(title={"text": title, "x": 0.01, "font": {"size": 18}})
    grid.update_xaxes(base.xaxis).update_yaxes(base.yaxis)
    return grid.update_yaxes(title_text="", col=2).update_yaxes(title_text="", col=3)
