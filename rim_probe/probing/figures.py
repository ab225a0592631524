"""Figures of a report as plotly's JSON: one look for all, colours that colour-blind readers can tell apart.

Knows the four kinds of `Figure` and colours. Knows nothing of pages; plain dicts, so plotly itself is not needed here
(`plotly.graph_objects.Figure(**figure_json(figure))` takes them). Numbers follow `text.py`: values under a title that
says % are shares. Labels come from data and may hold what plotly reads as markup (the memory token `<b>`): they are
always escaped.
"""

import html
import textwrap
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from rim_probe.probing.captions import bounds, is_number, number_writer, with_interval
from rim_probe.probing.section import Figure
from rim_probe.probing.text import format_number, says_percent

# Six hues each, at least 25 CIE76 units apart as they are and with protan-, deuter- and tritanopia (Machado 2009), and
# 2.9:1 or more against the background; symbols and dashes say the same once more.
LIGHT = {
    "ink": "#1c1917",
    "soft": "#57534e",
    "grid": "#e7e3da",
    "sheet": "#ffffff",
    "control": ("#6f6a63", "#98928a"),
    "series": ("#4338ca", "#c9862b", "#35a0dc", "#7a1712", "#de3f7f", "#590165"),
    "sequential": ("#ebe8fa", "#c0baec", "#8f86dd", "#5448c0", "#231a66"),
    "diverging": ("#8a3f04", "#d79a5b", "#f5f3ee", "#8f86dd", "#352a9c"),
}
DARK = {
    "ink": "#ece9e3",
    "soft": "#b3afa8",
    "grid": "#34333b",
    "sheet": "#1c1c22",
    "control": ("#a39e97", "#7d7972"),
    "series": ("#a5b4fc", "#ffc65c", "#4ade9c", "#b0567f", "#e8552f", "#8a63e8"),
    "sequential": ("#24232f", "#3d3a73", "#5f59b8", "#9098ee", "#e2e7ff"),
    "diverging": ("#ffc98a", "#b5712f", "#26252c", "#6a64c4", "#c3ccff"),
}
BAND_OPACITY = 0.16
MAX_MARKERS = 16  # on one line
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "star")
DASHES = ("solid", "longdash")  # series 7 to 12 have the colours of 1 to 6
CONTROL_DASHES = ("dash", "dot", "dashdot", "longdashdot")
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Liberation Sans', sans-serif"
BAR = 18  # thickness of a bar in px
LABEL_WIDTH = 44  # characters of a bar's label in one line; fits a telephone


def dark_colours() -> dict[str, str]:
    """Each colour of the light theme with its counterpart in the dark one; `figure_json` uses light ones."""
    pairs: dict[str, str] = {}
    for name, light in LIGHT.items():
        many = isinstance(light, tuple)
        pairs |= dict(zip(light, DARK[name], strict=True)) if many else {light: DARK[name]}
    for light, dark in zip(LIGHT["series"] + LIGHT["control"], DARK["series"] + DARK["control"], strict=True):
        pairs[_faint(light)] = _faint(dark)
    return pairs


def figure_json(figure: Figure) -> dict[str, Any]:
    """`{"data": [...], "layout": {...}}` for plotly, in light colours on a transparent ground, with a height."""
    traces, layout = _KINDS[figure.kind](figure)
    for name in ("xaxis", "yaxis"):
        title = {"font": {"size": 13, "color": LIGHT["soft"]}} | layout[name].get("title", {})
        layout[name] = _AXIS | layout[name] | {"title": title}
    return {"data": traces, "layout": _BASE | layout}


def legend(figure: Figure) -> list[dict[str, Any]]:
    """What the series of a figure look like: name, colour (light), dash and symbol; none for a heat map or bars."""
    if figure.kind not in ("lines", "scatter"):
        return []
    many = figure.data["series" if figure.kind == "lines" else "groups"]
    return [{"name": one["name"], **look} for one, look in zip(many, _looks(many), strict=True)]


# ------------------------------------------------------------------------------------------------------ the four kinds


def _heatmap(figure: Figure) -> tuple[list[dict], dict]:
    data, say = figure.data, number_writer(figure)
    z = [[value if is_number(value) else None for value in row] for row in data["z"]]
    name = data.get("z_title") or "value"
    hover = [
        [
            _join(
                _named(figure.y_title, data["y"][i]) + " · " + _named(figure.x_title, data["x"][j]),
                f"{name}: {say(value)}",
                (data["hover"][i][j] if data.get("hover") else ""),
            )
            for j, value in enumerate(row)
        ]
        for i, row in enumerate(z)
    ]
    low, high = _ends(data, z)
    colours = LIGHT["diverging" if data.get("diverging") else "sequential"]
    bar = {"thickness": 10, "outlinewidth": 0, "tickfont": {"size": 11}, "xpad": 6, "nticks": 6}
    if says_percent(name):
        bar["tickformat"] = ".0%"
    trace = {
        "type": "heatmap",
        # Places, not categories: labels may repeat (the words of a question do), and categories would fall together.
        "x": list(range(len(data["x"]))),
        "y": list(range(len(data["y"]))),
        "z": z,
        "zmin": low,
        "zmax": high,
        "colorscale": [[place / 4, colour] for place, colour in enumerate(colours)],
        "colorbar": bar | {"title": {"text": html.escape(name, quote=False), "side": "right", "font": {"size": 11}}},
        "xgap": 1.5,
        "ygap": 1.5,
        "hoverongaps": False,
        "hoverinfo": "text",
        "hovertext": hover,
    }
    layout = {
        "height": max(230, min(900, 27 * len(data["y"]) + 110)),
        "xaxis": _places(figure.x_title, data["x"]),
        "yaxis": _places(figure.y_title, data["y"]) | {"autorange": "reversed"},
    }
    return [trace, *_crosses(z)], layout


def _crosses(z: Sequence[Sequence[float | None]]) -> list[dict]:
    """A small cross in every cell without a value, which would otherwise look like a low one."""
    blank = [(j, i) for i, row in enumerate(z) for j, value in enumerate(row) if value is None]
    if not blank:
        return []
    x, y = zip(*blank, strict=True)
    marker = {"symbol": "x-thin", "size": 6, "line": {"width": 1, "color": LIGHT["control"][1]}}
    return [{"type": "scatter", "mode": "markers", "x": x, "y": y, "marker": marker, "hoverinfo": "skip"}]


def _lines(figure: Figure) -> tuple[list[dict], dict]:
    series, say = figure.data["series"], number_writer(figure)
    bands, lines = [], []
    for number, (one, look) in enumerate(zip(series, _looks(series), strict=True)):
        lows, highs = bounds(one)
        points = list(zip(one["x"], one["y"], lows, highs, strict=True))
        x = [_escaped(value) for value in one["x"]]
        bounded = [all(map(is_number, point[1:])) for point in points]
        group = {"legendgroup": str(number), "name": _escaped(one["name"])}
        trace = group | {
            "type": "scatter",
            "mode": "lines+markers",
            "x": x,
            "y": [y if is_number(y) else None for y in one["y"]],
            "line": {"color": look["colour"], "dash": look["dash"], "width": 1.8 if one.get("control") else 2.6},
            "marker": {
                "symbol": look["symbol"],
                "size": 6 if one.get("control") else 7.5,
                "color": look["colour"],
                "maxdisplayed": MAX_MARKERS,
            },
            "hoverinfo": "text",
            "hovertext": [
                _join(
                    f"{one['name']}: {with_interval({'value': y, 'low': low, 'high': high}, say)}",
                    _named(figure.x_title, value),
                )
                for value, y, low, high in points
            ],
        }
        if 0 < sum(bounded) <= 2:
            trace["error_y"] = _whiskers(one["y"], lows, highs, look["colour"])
        elif any(bounded):
            bands.append(group | _band(x, lows, highs, bounded, look["colour"]))
        lines.append(trace)
    y_axis = {"title": {"text": _escaped(figure.y_title)}, "zeroline": False}
    if says_percent(figure.y_title):
        y_axis["tickformat"] = ".0%"
    layout = {"height": 340, "xaxis": _along(figure.x_title, series), "yaxis": y_axis, "hovermode": "closest"}
    return bands + lines, layout


def _scatter(figure: Figure) -> tuple[list[dict], dict]:
    groups, traces = figure.data["groups"], []
    for one, look in zip(groups, _looks(groups), strict=True):
        texts = one.get("text") or [""] * len(one["x"])
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": _escaped(one["name"]),
                "x": list(one["x"]),
                "y": list(one["y"]),
                "marker": {
                    "color": look["colour"],
                    "symbol": look["symbol"],
                    "size": 9 if len(one["x"]) <= 60 else 6,
                    "opacity": 0.9 if len(one["x"]) <= 60 else 0.65,
                    "line": {"width": 0.8, "color": LIGHT["sheet"]},
                },
                "hoverinfo": "text",
                "hovertext": [
                    _join(text or "", one["name"], f"({format_number(x)}, {format_number(y)})")
                    for x, y, text in zip(one["x"], one["y"], texts, strict=True)
                ],
            }
        )
    axes = {
        axis: {"title": {"text": _escaped(title)}, "zeroline": False}
        for axis, title in (("xaxis", figure.x_title), ("yaxis", figure.y_title))
    }
    return traces, {"height": 400, **axes}


def _bars(figure: Figure) -> tuple[list[dict], dict]:
    """Horizontal bars, each under its label and number: long labels then cost no width."""
    bars, say = figure.data["bars"], number_writer(figure)
    grey = LIGHT["control"][0]
    labels = [textwrap.wrap(bar["name"], LABEL_WIDTH) or [""] for bar in bars]
    # Places in px from the top: a row is as high as its label needs.
    bottoms = [16 * len(lines) + BAR + 16 for lines in labels]
    tops = [sum(bottoms[:place]) for place in range(len(bars))]
    middles = [top + 16 * len(lines) + 2 + BAR / 2 for top, lines in zip(tops, labels, strict=True)]
    trace = {
        "type": "bar",
        "orientation": "h",
        "y": middles,
        "x": [bar["value"] if is_number(bar["value"]) else None for bar in bars],
        "width": BAR,
        "marker": {
            "color": [_faint(grey) if bar.get("control") else LIGHT["series"][0] for bar in bars],
            "line": {"color": [grey if bar.get("control") else LIGHT["series"][0] for bar in bars], "width": 1},
        },
        "hoverinfo": "text",
        "hovertext": [_join(bar["name"], with_interval(bar, say)) for bar in bars],
        "error_x": _whiskers(
            [bar["value"] for bar in bars],
            [bar.get("low") for bar in bars],
            [bar.get("high") for bar in bars],
            LIGHT["ink"],
        )
        | {"width": 5, "thickness": 1.4},
    }
    annotations = [
        {
            "x": 0,
            "xref": "paper",
            "xanchor": "left",
            "y": middle - BAR / 2,
            "yanchor": "bottom",
            "borderpad": 1,
            "showarrow": False,
            "align": "left",
            "text": "<br>".join(map(_escaped, lines)) + f"  <b>{_escaped(say(bar['value']))}</b>",
            "font": {"size": 12.5, "color": LIGHT["soft" if bar.get("control") else "ink"]},
        }
        for middle, bar, lines in zip(middles, bars, labels, strict=True)
    ]
    title = figure.y_title or figure.x_title
    x_axis = {"title": {"text": _escaped(title)}, "rangemode": "tozero", "zerolinecolor": LIGHT["soft"]}
    if says_percent(title):
        x_axis["tickformat"] = ".0%"
    layout = {
        "height": sum(bottoms) + 54,
        "xaxis": x_axis,
        "yaxis": {"visible": False, "range": [sum(bottoms), 0]},
        "annotations": annotations,
        "margin": {"l": 14, "r": 20, "t": 4, "b": 50},
    }
    return [trace], layout


_KINDS = {"heatmap": _heatmap, "lines": _lines, "scatter": _scatter, "bars": _bars}

_BASE = {
    "paper_bgcolor": "rgba(0,0,0,0)",
    "plot_bgcolor": "rgba(0,0,0,0)",
    "font": {"family": FONT, "size": 12.5, "color": LIGHT["ink"]},
    "margin": {"l": 10, "r": 10, "t": 10, "b": 10},
    "showlegend": False,
    "hoverlabel": {
        "bgcolor": LIGHT["ink"],
        "bordercolor": LIGHT["ink"],
        "font": {"family": FONT, "color": LIGHT["sheet"], "size": 12.5},
        "align": "left",
        "namelength": -1,
    },
}
_AXIS = {
    "automargin": True,
    "gridcolor": LIGHT["grid"],
    "linecolor": LIGHT["grid"],
    "tickfont": {"color": LIGHT["soft"], "size": 12},
}


# ------------------------------------------------------------------------------------------------------------- helpers


def _looks(many: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Colour, dash and symbol of every series; controls share greys and have dashes of their own."""
    looks, coloured, grey = [], 0, 0
    for one in many:
        if one.get("control"):
            shades = LIGHT["control"]
            place, grey = grey, grey + 1
            dash = CONTROL_DASHES[place % len(CONTROL_DASHES)]
            symbol = SYMBOLS[place % len(SYMBOLS)] + "-open"
            looks.append({"colour": shades[place // len(CONTROL_DASHES) % len(shades)], "dash": dash, "symbol": symbol})
        else:
            place, coloured = coloured, coloured + 1
            colours = LIGHT["series"]
            dash = DASHES[place // len(colours) % len(DASHES)]
            looks.append(
                {"colour": colours[place % len(colours)], "dash": dash, "symbol": SYMBOLS[place % len(SYMBOLS)]}
            )
    return looks


def _band(x: Sequence, lows: Sequence, highs: Sequence, bounded: Sequence[bool], colour: str) -> dict[str, Any]:
    """The area between low and high; one outline for every run of points that have both."""
    outline_x, outline_y, start = [], [], None
    for place, inside in enumerate([*bounded, False]):
        if inside and start is None:
            start = place
        elif not inside and start is not None:
            run = slice(start, place)
            gap = [None] if outline_x else []
            outline_x += [*gap, *x[run], *reversed(x[run])]
            outline_y += [*gap, *lows[run], *reversed(highs[run])]
            start = None
    return {
        "type": "scatter",
        "mode": "lines",
        "x": outline_x,
        "y": outline_y,
        "fill": "toself",
        "fillcolor": _faint(colour),
        "line": {"width": 0, "color": _faint(colour)},
        "hoverinfo": "skip",
    }


def _whiskers(values: Sequence, lows: Sequence, highs: Sequence, colour: str) -> dict[str, Any]:
    bounded = [all(map(is_number, three)) for three in zip(values, lows, highs, strict=True)]
    return {
        "type": "data",
        "symmetric": False,
        "array": [high - value if there else None for value, high, there in zip(values, highs, bounded, strict=True)],
        "arrayminus": [value - low if there else None for value, low, there in zip(values, lows, bounded, strict=True)],
        "color": colour,
    }


def _places(title: str, labels: Sequence) -> dict[str, Any]:
    """An axis of numbered places, each with its label."""
    return {
        "title": {"text": _escaped(title)},
        "tickmode": "array",
        "tickvals": list(range(len(labels))),
        "ticktext": [_escaped(label) for label in labels],
        "showgrid": False,
        "zeroline": False,
        "ticks": "",
    }


def _along(title: str, series: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The x axis of lines: whole numbers (blocks, layers) are each marked, words stay in their order."""
    axis: dict[str, Any] = {
        "title": {"text": _escaped(title)},
        "zeroline": False,
        "showgrid": False,
        "ticks": "outside",
    }
    axis["tickcolor"] = LIGHT["grid"]
    values = [x for one in series for x in one["x"]]
    if not all(map(is_number, values)):
        return axis | {"type": "category"}
    distinct = sorted(set(values))
    if all(float(value).is_integer() for value in distinct) and distinct and distinct[-1] - distinct[0] <= 20:
        axis["dtick"] = 1
    elif says_percent(title):
        axis["tickformat"] = ".0%"
    steps = [after - before for before, after in pairwise(distinct)]
    edge = 0.35 * min(steps) if steps and len(distinct) <= 20 else 0
    return axis | ({"range": [distinct[0] - edge, distinct[-1] + edge]} if edge else {})


def _ends(data: Mapping[str, Any], z: Sequence[Sequence[float | None]]) -> tuple[float, float]:
    """Ends of the colour scale; a diverging one without given ends is as wide on both sides of zero."""
    values = [value for row in z for value in row if value is not None] or [0.0, 1.0]
    low, high = data.get("low"), data.get("high")
    if data.get("diverging") and low is None and high is None:
        high = max(map(abs, values)) or 1.0
        low = -high
    low, high = min(values) if low is None else low, max(values) if high is None else high
    return (low, high) if low < high else (low - 0.5, low + 0.5)


def _named(title: str, value: Any) -> str:
    """An axis' value with the axis' name, unless the value says it already."""
    text = str(value)
    return text if not title or text.lower().startswith(title.lower()) else f"{title} {text}"


def _join(*lines: str) -> str:
    """Lines of a hover label, wrapped, as plotly takes them."""
    wrapped = [part for line in lines if line for part in textwrap.wrap(str(line), 60)]
    return "<br>".join(_escaped(line) for line in wrapped)


def _escaped(label: Any) -> Any:
    """A label that plotly shows as it is; numbers stay numbers."""
    return html.escape(label, quote=False) if isinstance(label, str) else label


def _faint(colour: str) -> str:
    red, green, blue = (int(colour[place : place + 2], 16) for place in (1, 3, 5))
    return f"rgba({red},{green},{blue},{BAND_OPACITY})"
