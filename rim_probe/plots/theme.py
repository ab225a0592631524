"""One look for every plotly figure: axes, lines with intervals, rows of values, heat maps.

Texts from data may hold what plotly reads as markup (the memory token `<b>`), so every helper escapes them.

Knows numbers and names. Does not know what they mean.
"""

from __future__ import annotations

import html
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from rim_probe.numbers import is_number, says_percent
from rim_probe.plots.colours import CONTROLS, DIVERGING, SEQUENTIAL, colour, faint

SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "star")
DASHES = ("dash", "dot", "dashdot", "longdashdot")  # of controls
FONT = 'ui-sans-serif, system-ui, -apple-system, "Segoe UI", "Helvetica Neue", Arial, sans-serif'
LABEL = 46  # characters of a row's label in one line; fits a phone


def plain(text: Any) -> Any:
    """A text that plotly shows as it is; numbers stay numbers."""
    return html.escape(text, quote=False) if isinstance(text, str) else text


def hover(*lines: str) -> str:
    """Lines of a label, wrapped."""
    return "<br>".join(plain(part) for line in lines if line for part in textwrap.wrap(str(line), 60))


def figure(traces: Sequence[Any], x: str | Mapping = "", y: str | Mapping = "", height: int = 340, **more: Any) -> Any:
    """A `plotly.graph_objects.Figure` on a transparent ground.

    Args:
        x, y: an axis: its title, or what it is besides its look (with "title"). Values under a title that says % are
            shares.
        more: the rest of plotly's layout.
    """
    axes = {}
    for name, given in (("xaxis", x), ("yaxis", y)):
        given = {"title": given} if isinstance(given, str) else dict(given)
        title = given.pop("title", "")
        look = {"gridcolor": colour("line"), "linecolor": colour("line"), "zeroline": False, "automargin": True}
        look |= {"title": {"text": plain(title), "font": {"size": 12.5, "color": colour("soft")}, "standoff": 8}}
        look |= {"tickfont": {"color": colour("soft"), "size": 12}}
        axes[name] = look | ({"tickformat": ".0%"} if says_percent(title) else {}) | given
    label = {"bgcolor": colour("ink"), "bordercolor": colour("ink"), "align": "left", "namelength": -1}
    layout = {
        "template": "none",
        "height": height,
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": FONT, "size": 12.5, "color": colour("ink")},
        "margin": {"l": 10, "r": 12, "t": 34, "b": 10},
        "hoverlabel": label | {"font": {"family": FONT, "color": colour("sheet"), "size": 12.5}},
        "legend": {"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom", "x": 0, "font": {"size": 12}}
        | {"itemsizing": "constant"},
        "hovermode": "closest",
        "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": colour("edge-line"), "activecolor": colour("ink")},
    }
    return go.Figure(data=list(traces), layout=layout | axes | more)


def line(
    name: str,
    x: Sequence,
    y: Sequence[float | None],
    low: Sequence | None,
    high: Sequence | None,
    tone: str,
    texts: Sequence[str],
    *,
    symbol: str = "circle",
    dash: str = "solid",
    control: bool = False,
    **more: Any,
) -> list[Any]:
    """A line with a mark at each point, and its interval as a band; [n] each. `texts`: what a point says."""
    ink, group, traces = colour(tone), "<br>".join(map(plain, textwrap.wrap(name, LABEL))), []
    bounded = [i for i in range(len(x)) if low and high and is_number(low[i]) and is_number(high[i])]
    if len(bounded) > 1:
        around = [*bounded, *bounded[::-1]]
        traces.append(
            go.Scatter(
                x=[x[i] for i in around],
                y=[low[i] for i in bounded] + [high[i] for i in bounded[::-1]],
                **{"fill": "toself", "fillcolor": faint(ink), "mode": "lines", "line": {"width": 0}},
                **{"hoverinfo": "skip", "showlegend": False, "legendgroup": group},
            )
        )
    traces.append(
        go.Scatter(
            x=[plain(value) for value in x],
            y=[value if is_number(value) else None for value in y],
            **{"name": group, "legendgroup": group, "mode": "lines+markers"},
            **{"hoverinfo": "text", "hovertext": list(texts)},
            line={"color": ink, "dash": dash, "width": 1.6 if control else 2.4},
            marker={"color": ink, "symbol": symbol, "size": 6 if control else 8, "maxdisplayed": 40},
            error_y=whisker(y, low, high, ink) if len(bounded) == 1 else None,
            **more,
        )
    )
    return traces


def whisker(values: Sequence, low: Sequence, high: Sequence, tone: str) -> dict[str, Any]:
    """Intervals for plotly's error bars, none where an end is missing."""
    whole = [all(map(is_number, three)) for three in zip(values, low, high, strict=True)]
    above = [h - v if there else None for v, h, there in zip(values, high, whole, strict=True)]
    below = [v - at if there else None for v, at, there in zip(values, low, whole, strict=True)]
    look = {"type": "data", "symmetric": False, "color": colour(tone), "thickness": 2, "width": 0}
    return look | {"array": above, "arrayminus": below}


def rows(entries: Sequence[Mapping[str, Any]], title: str = "", **axis: Any) -> Any:
    """Values on one axis, each under its name and number: long names then cost no width.

    Args:
        entries: `name`, `value`, `low`, `high`, `text` (the number as written); as far as there is one, `control` (is
            it one), `tone`, `tip` and `mark`: the value of its own control, drawn as a tick.
        axis: more of the x axis.
    """
    labels = [textwrap.wrap(one["name"], LABEL) or [""] for one in entries]
    for lines, one in zip(labels, entries, strict=True):
        if len(lines[-1]) + len(one["text"]) > LABEL:
            lines.append("")  # the number gets a line of its own
    heights = [16 * len(lines) + 28 for lines in labels]
    tops = [sum(heights[:i]) for i in range(len(entries))]
    middles = [top + height - 13 for top, height in zip(tops, heights, strict=True)]
    traces = []
    for tone in dict.fromkeys(_tone(one) for one in entries):
        of = [i for i, one in enumerate(entries) if _tone(one) == tone and is_number(one["value"])]
        values, low, high = ([entries[i].get(key) for i in of] for key in ("value", "low", "high"))
        texts = [hover(entries[i]["name"], entries[i]["text"], entries[i].get("tip", "")) for i in of]
        symbols = ["circle-open" if entries[i].get("control") else "circle" for i in of]
        look = {"color": colour(tone), "symbol": symbols, "size": 11, "line": {"width": 2, "color": colour(tone)}}
        y = [middles[i] for i in of]
        more = {"mode": "markers", "hoverinfo": "text", "hovertext": texts, "showlegend": False}
        traces.append(go.Scatter(x=values, y=y, marker=look, error_x=whisker(values, low, high, tone), **more))
    marked = [i for i, one in enumerate(entries) if is_number(one.get("mark"))]
    if marked:
        look = {"symbol": "line-ns", "size": 15, "line": {"width": 2.5, "color": colour("soft")}}
        more = {"mode": "markers", "marker": look, "hoverinfo": "text", "name": "best control"}
        texts = [hover(entries[i]["name"], entries[i].get("tip", "")) for i in marked]
        x, y = [entries[i]["mark"] for i in marked], [middles[i] for i in marked]
        traces.append(go.Scatter(x=x, y=y, hovertext=texts, showlegend=False, **more))
    notes = [
        {
            "text": "<br>".join(map(plain, lines)) + f"{'  ' if lines[-1] else ''}<b>{plain(one['text'])}</b>",
            **{"x": 0, "xref": "paper", "xanchor": "left", "align": "left", "showarrow": False, "borderpad": 0},
            **{"y": top + height - 24, "yanchor": "bottom"},
            "font": {"size": 12.5, "color": colour("soft" if one.get("control") else "ink")},
        }
        for one, lines, top, height in zip(entries, labels, tops, heights, strict=True)
    ]
    y_axis = {"visible": False, "range": [sum(heights), 0], "fixedrange": True}
    x_axis = {"title": title, "ticks": "outside", "tickcolor": colour("line")} | axis
    return figure(traces, x_axis, y_axis, sum(heights) + 84, annotations=notes)


def _tone(entry: Mapping[str, Any]) -> str:
    return "soft" if entry.get("control") else entry.get("tone", "memory")


def places(labels: Sequence[str], title: str = "", longest: int = 26) -> dict[str, Any]:
    """An axis of numbered places, each with its label: labels may repeat, as the words of a question do."""
    short = [plain(text if len(text) <= longest else text[: longest - 1] + "…") for text in map(str, labels)]
    return {"title": title, "tickvals": list(range(len(short))), "ticktext": short, "showgrid": False, "ticks": ""}


def heat_map(
    z: Sequence[Sequence[float | None]],
    x: Mapping[str, Any],
    y: Mapping[str, Any],
    texts: Sequence[Sequence[str]],
    *,
    low: float | None = None,
    high: float | None = None,
    title: str = "",
    diverging: bool = False,
) -> Any:
    """Cells on one scale, the first row on top; a cross stands where there is no value."""
    z = [[value if is_number(value) else None for value in row] for row in z]
    stops = [pair[0] for pair in (DIVERGING if diverging else SEQUENTIAL)]
    bar = {"thickness": 10, "outlinewidth": 0, "tickfont": {"size": 11}, "xpad": 6, "nticks": 6}
    bar |= {"title": {"text": plain(title), "side": "right", "font": {"size": 11}}}
    bar |= {"tickformat": ".0%"} if says_percent(title) else {}
    cells = go.Heatmap(
        **{"z": z, "zmin": low, "zmax": high, "colorscale": [[i / 4, stop] for i, stop in enumerate(stops)]},
        **{"xgap": 1.5, "ygap": 1.5, "hoverongaps": False, "hoverinfo": "text", "hovertext": texts, "colorbar": bar},
    )
    blank = [(j, i) for i, row in enumerate(z) for j, value in enumerate(row) if value is None]
    cross = {"symbol": "x-thin", "size": 6, "line": {"width": 1, "color": CONTROLS[1][0]}}
    none = [{"x": [b[0] for b in blank], "y": [b[1] for b in blank], "marker": cross, "showlegend": False}]
    crosses = [go.Scatter(mode="markers", hoverinfo="skip", **one) for one in none if blank]
    height = max(230, min(900, 27 * len(z) + 150))
    drawn = figure([cells, *crosses], dict(x), {"autorange": "reversed"} | dict(y), height)
    return drawn.update_layout(margin={"r": 34})
