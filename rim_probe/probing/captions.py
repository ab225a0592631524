"""A figure without its picture: its numbers as rows, what it shows in words, how its numbers are written.

Knows the four kinds of `Figure`. Knows nothing of plotly and pages. Every figure of the report has these beside the
picture, for spreadsheets and for those who do not see it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rim_probe.probing.section import Figure
from rim_probe.probing.text import NOTHING, format_number, says_percent


def figure_rows(figure: Figure) -> tuple[list[str], list[list[Any]], list[bool]]:
    """The data behind a figure as a table: header, rows (None where there is no value), which columns are shares."""
    data, x_title, y_title = figure.data, figure.x_title or "x", figure.y_title or "y"
    if figure.kind == "heatmap":
        hover, z_title = data.get("hover"), data.get("z_title") or "value"
        header = [y_title, x_title, z_title, *(["detail"] if hover else [])]
        rows = [
            [data["y"][i], data["x"][j], value, *([hover[i][j]] if hover else [])]
            for i, row in enumerate(data["z"])
            for j, value in enumerate(row)
        ]
        return header, rows, [False, False, says_percent(z_title), *([False] if hover else [])]
    if figure.kind == "lines":
        rows = [
            [one["name"], x, y, low, high]
            for one in data["series"]
            for x, y, low, high in zip(one["x"], one["y"], *bounds(one), strict=True)
        ]
        share = says_percent(y_title)
        return ["series", x_title, y_title, "low", "high"], rows, [False, says_percent(x_title), share, share, share]
    if figure.kind == "scatter":
        rows = [
            [one["name"], x, y, text]
            for one in data["groups"]
            for x, y, text in zip(one["x"], one["y"], one.get("text") or [None] * len(one["x"]), strict=True)
        ]
        return ["group", x_title, y_title, "text"], rows, [False, says_percent(x_title), says_percent(y_title), False]
    rows = [[bar["name"], bar["value"], bar.get("low"), bar.get("high")] for bar in data["bars"]]
    name, value = (x_title, y_title) if figure.y_title else ("bar", x_title)
    share = says_percent(value)
    return [name, value, "low", "high"], rows, [False, share, share, share]


def describe(figure: Figure) -> str:
    """The picture in words: what is on the axes, where it is high and low."""
    say = number_writer(figure)
    data = figure.data
    if figure.kind == "heatmap":
        cells = [
            (value, f"{figure.y_title} {data['y'][i]}, {figure.x_title} {data['x'][j]}")
            for i, row in enumerate(data["z"])
            for j, value in enumerate(row)
            if is_number(value)
        ]
        head = (
            f"Heat map of {data.get('z_title') or 'values'}: {len(data['y'])} rows ({figure.y_title}) by "
            f"{len(data['x'])} columns ({figure.x_title})"
        )
        if not cells:
            return f"{head}, without values."
        (low, at_low), (high, at_high) = min(cells), max(cells)
        return f"{head}. Highest {say(high)} at {at_high}; lowest {say(low)} at {at_low}."
    if figure.kind == "lines":
        parts = []
        for one in data["series"]:
            points = [(y, x) for x, y in zip(one["x"], one["y"], strict=True) if is_number(y)]
            role = " (control)" if one.get("control") else ""
            if points:
                top, at = max(points, key=lambda point: point[0])
                ends = f"{say(points[0][0])} at {points[0][1]} to {say(points[-1][0])} at {points[-1][1]}"
                parts.append(f"{one['name']}{role}: {ends}, highest {say(top)} at {at}")
        return f"Lines of {figure.y_title} over {figure.x_title}. " + "; ".join(parts) + "."
    if figure.kind == "scatter":
        groups = "; ".join(f"{one['name']}: {len(one['x'])} points" for one in data["groups"])
        return f"Points of {figure.y_title} against {figure.x_title}. {groups}."
    bars = "; ".join(
        f"{bar['name']}{' (control)' if bar.get('control') else ''} {with_interval(bar, say)}" for bar in data["bars"]
    )
    return f"Bars of {figure.y_title or figure.x_title}. {bars}."


def how_to_read(figure: Figure) -> str:
    """What a reader should look for, from what the figure holds."""
    data = figure.data
    if figure.kind == "heatmap":
        blank = any(not is_number(value) for row in data["z"] for value in row)
        ends = "Violet is above the middle of the scale, brown below" if data.get("diverging") else "Stronger is higher"
        return f"{ends}{'; a cross stands where there is no value' if blank else ''}."
    if figure.kind == "scatter":
        return "Each mark is one case; look for groups that lie apart."
    many = data["series" if figure.kind == "lines" else "bars"]
    thing, interval = ("lines", "bands") if figure.kind == "lines" else ("bars", "whiskers")
    bounded = any(is_number(low) for one in many for low in ([one.get("low")] if thing == "bars" else bounds(one)[0]))
    hints = []
    if any(one.get("control") for one in many) and not all(one.get("control") for one in many):
        style = "dashed grey" if thing == "lines" else "grey"
        hints.append(f"Look for coloured {thing} that stay clear of the {style} controls.")
    if bounded:
        hints.append(f"{interval.capitalize()} are intervals: what overlaps may be chance.")
    return " ".join(hints)


def number_writer(figure: Figure) -> Callable[[float | None], str]:
    """How a value of this figure is written."""
    title = figure.data.get("z_title") or "" if figure.kind == "heatmap" else figure.y_title
    if figure.kind == "bars":
        title = figure.y_title or figure.x_title
    percent = says_percent(title)

    def say(value: float | None) -> str:
        text = format_number(value if is_number(value) else None, percent)
        return f"{text} %" if percent and text != NOTHING else text

    return say


def with_interval(one: Mapping[str, Any], say: Callable[[float | None], str]) -> str:
    """`value (low to high)` of a bar or a point, as `say` writes numbers."""
    if not (is_number(one.get("low")) and is_number(one.get("high"))):
        return say(one["value"])
    return f"{say(one['value'])} ({say(one['low'])} to {say(one['high'])})"


def bounds(one: Mapping[str, Any]) -> tuple[Sequence, Sequence]:
    """Low and high of a series, None at every point where it has none."""
    nothing = [None] * len(one["x"])
    return one.get("low") or nothing, one.get("high") or nothing


def is_number(value: Any) -> bool:
    """Whether there is a value: neither None nor NaN."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
