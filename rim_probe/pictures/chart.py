"""Small charts in HTML and SVG: lines with bands, scatters with a path, rows of values with whiskers.

Knows numbers, places and shapes. Does not know what they mean: names, tips and colours come from the panel.

How the text keeps its size on a telephone: nothing is scaled. A plot is a box whose places are percentages of it.
Lines and bands lie in an SVG that is stretched to the box (its strokes are not); marks lie in one that is not
stretched, at places in percent; tick labels are HTML. So a chart is as wide as its column, and letters, dots and
strokes are as large as anywhere. With `equal` one unit is as long across as up, and the box keeps its shape.

Colours come from the page's variables through classes: a `tone` is one of `TONES`. A series is told apart by shape or
dashes as well as by its tone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

from rim_probe.pictures.axes import Axis, axis, named_axis, same_units
from rim_probe.pictures.parts import escape

__all__ = ["Axis", "Cloud", "Line", "Path", "Whisker", "axis", "chart", "legend", "named_axis", "whiskers"]

TONES = ("memory", "cot", "ink", "soft", "right", "wrong")
SHAPES = ("dot", "cross", "square", "triangle", "ring")
_SIZE = 1000  # side of the stretched drawings' own coordinates
_NARROW = 300  # px, the plot's width on a telephone: what does not overlap there overlaps nowhere


# ----------------------------------------------------------------------------------------------------- what is drawn


@dataclass(frozen=True)
class Line:
    """A curve with a mark at each point.

    Attributes:
        x, y: [n]; a None in y is a gap.
        tone: one of `TONES`.
        dashed: for a control. A control is drawn thinner and without marks; its points still carry their tips.
        low, high: [n], a band around it.
        tips: [n], what a point says when pointed at.
        label: written beside its last point.
        shape: of its marks.
        links: [n], names of what lights up together.
    """

    x: Sequence[float]
    y: Sequence[float | None]
    tone: str = "memory"
    dashed: bool = False
    low: Sequence[float | None] | None = None
    high: Sequence[float | None] | None = None
    tips: Sequence[str] = ()
    label: str = ""
    shape: str = "dot"
    links: Sequence[str] = ()


@dataclass(frozen=True)
class Cloud:
    """Many small marks without tips: what is known of others. `points` [n][2]; those outside the axes are left out."""

    points: Sequence[Sequence[float]]
    tone: str = "soft"
    shape: str = "dot"


@dataclass(frozen=True)
class Path:
    """A line from point to point with a numbered mark at each.

    Attributes:
        points: [n][2], in the order of travel.
        numbers: [n], written beside the marks, where they cover each other least; "" for none.
        tone, tips, links: as for `Line`.
        dashed: for a control.
    """

    points: Sequence[Sequence[float]]
    numbers: Sequence[str] = ()
    tone: str = "memory"
    dashed: bool = False
    tips: Sequence[str] = ()
    links: Sequence[str] = ()


Layer = Line | Cloud | Path


def chart(x: Axis, y: Axis, layers: Sequence[Layer], label: str, *, height: float = 15, equal: float = 0) -> str:
    """A plot of layers, the first one at the bottom, as HTML.

    Args:
        label: what a screen reader says it is.
        height: of the plot in rem.
        equal: instead of `height`, the plot's width over its height; one unit is then as long on both axes, for which
            the ends of one of them are moved out.

    Marks with tips can be reached with Tab (the first of the topmost line) and the arrow keys: left and right along a
    line, up and down between lines.
    """
    if equal:
        x, y = same_units(x, y, equal)
    pieces: list[tuple[bool, str]] = [(True, _grid(x, y))]
    places: list[str] = []
    row = sum(_reachable(layer) for layer in layers)
    for layer in layers:
        row -= _reachable(layer)  # what lies on top is reached first
        pieces += _drawn(layer, x, y, row, equal or 1.2)
        if isinstance(layer, Line) and layer.label:
            places.append(_end_label(layer, x, y))
    drawings = "".join(
        _STRETCHED.format("".join(piece for _, piece in group))
        if stretched
        else f'<svg class="chart-marks">{"".join(piece for _, piece in group)}</svg>'
        for stretched, group in groupby(pieces, key=lambda piece: piece[0])
    )
    ticks = "".join(
        f'<span class="chart-y" style="top:{_down(y, value)}%">{escape(text)}</span>' for value, text in y.ticks
    ) + "".join(
        f'<span class="chart-x" style="left:{_across(x, value)}%">{escape(text)}</span>' for value, text in x.ticks
    )
    gutter = max((len(text) for _, text in y.ticks), default=0)
    size = f"aspect-ratio:{equal:g}" if equal else f"height:{height:g}rem"
    return (
        f'<div class="chart" role="group" aria-label="{escape(label)}" style="--gutter:{gutter}ch">'
        f'<div class="chart-title">{escape(y.title)}</div>'
        f'<div class="chart-plot" data-grid style="{size}">{drawings}{ticks}{"".join(places)}</div>'
        f'<div class="chart-title chart-title-x">{escape(x.title)}</div></div>'
    )


def legend(entries: Sequence[tuple[str, str, str]]) -> str:
    """What marks mean: (shape or "line" or "dashes", tone, text) each."""
    items = "".join(
        f'<span class="chart-key"><svg width="22" height="14" aria-hidden="true" class="tone-{_tone(tone)}">'
        + (
            f'<line x1="1" y1="7" x2="21" y2="7" class="chart-line{" dashed" if shape == "dashes" else ""}"/>'
            if shape in ("line", "dashes")
            else f'<svg x="11" y="7" overflow="visible">{_shape(shape)}</svg>'
        )
        + f"</svg>{escape(text)}</span>"
        for shape, tone, text in entries
    )
    return f'<div class="chart-legend">{items}</div>'


# ---------------------------------------------------------------------------------------------------------- whiskers


@dataclass(frozen=True)
class Whisker:
    """One row: a value with its interval.

    Attributes:
        name: of the row.
        value, low, high: None where unknown.
        text: the value as it is to be read, such as "62 % (58 to 66)".
        tone: one of `TONES`.
        control: hollow and dashed.
        tip: said when the row is pointed at.
        mark: a second value on the same row (its control), drawn as an upright tick.
    """

    name: str
    value: float | None
    low: float | None = None
    high: float | None = None
    text: str = ""
    tone: str = "memory"
    control: bool = False
    tip: str = ""
    mark: float | None = None


def whiskers(rows: Sequence[Whisker], x: Axis, label: str) -> str:
    """Rows of values on one axis, as HTML: name, place with its interval, and the value in figures."""
    ticks = "".join(
        f'<span class="chart-x" style="left:{_across(x, value)}%">{escape(text)}</span>' for value, text in x.ticks
    )
    lines = "".join(f'<i class="whisker-grid" style="left:{_across(x, value)}%"></i>' for value, _ in x.ticks)
    body = "".join(_whisker(row, x, lines) for row in rows)
    return (
        f'<div class="whiskers" role="list" aria-label="{escape(label)}">{body}'
        f'<div class="whisker-axis" aria-hidden="true"><span></span><div class="whisker-rail">{ticks}</div>'
        f'<span></span></div><div class="chart-title whisker-title">{escape(x.title)}</div></div>'
    )


def _whisker(row: Whisker, x: Axis, lines: str) -> str:
    said = f"{row.name}: {row.text or 'not measured'}" + (f". {row.tip}" if row.tip else "")
    marks = ""
    if row.mark is not None:
        marks += f'<i class="whisker-mark" style="left:{_across(x, row.mark)}%"></i>'
    if row.value is not None:
        if row.low is not None and row.high is not None:
            start, end = sorted((_across(x, row.low), _across(x, row.high)))
            marks += f'<i class="whisker-line" style="left:{start}%;width:{end - start:.2f}%"></i>'
        marks += f'<i class="whisker-dot" style="left:{_across(x, row.value)}%"></i>'
    kind = f"tone-{_tone(row.tone)}" + (" control" if row.control else "")
    return (
        f'<div class="whisker {kind}" role="listitem" tabindex="0" data-tip="{escape(said)}">'
        f'<span class="whisker-name">{escape(row.name)}</span>'
        f'<div class="whisker-rail" aria-hidden="true">{lines}{marks}</div>'
        f'<span class="whisker-text">{escape(row.text)}</span></div>'
    )


# ------------------------------------------------------------------------------------------------------ single pieces

_STRETCHED = (
    f'<svg class="chart-lines" viewBox="0 0 {_SIZE} {_SIZE}" preserveAspectRatio="none" aria-hidden="true">{{}}</svg>'
)

_SHAPES = {
    "dot": '<circle r="{0}"/>',
    "ring": '<circle r="{0}" class="hollow"/>',
    "cross": '<path d="M-{0}-{0}L{0} {0}M-{0} {0}L{0}-{0}" class="stroke"/>',
    "square": '<path d="M-{0}-{0}H{0}V{0}H-{0}Z"/>',
    "triangle": '<path d="M0-{0}L{0} {0}H-{0}Z"/>',
}


def _shape(shape: str, radius: float = 4) -> str:
    return _SHAPES[shape].format(f"{radius:g}")


def _tone(tone: str) -> str:
    if tone not in TONES:
        raise ValueError(f"a tone is one of {', '.join(TONES)}, not {tone!r}")
    return tone


def _across(x: Axis, value: float) -> float:
    return round(100 * x.share(value), 2)


def _down(y: Axis, value: float) -> float:
    return round(100 * (1 - y.share(value)), 2)


def _grid(x: Axis, y: Axis) -> str:
    """Hair lines at the ticks of y, and where x begins."""
    flat = "".join(f"M0 {_down(y, value) * 10:g}H{_SIZE}" for value, _ in y.ticks)
    short = "".join(f"M{_across(x, value) * 10:g} {_SIZE}v-8" for value, _ in x.ticks)
    return f'<path class="chart-grid" d="{flat}"/><path class="chart-edge" d="M0 {_SIZE}H{_SIZE}{short}"/>'


def _reachable(layer: Layer) -> bool:
    return isinstance(layer, Line | Path) and bool(layer.tips)


def _drawn(layer: Layer, x: Axis, y: Axis, row: int, ratio: float) -> list[tuple[bool, str]]:
    """(is it stretched, SVG) of one layer."""
    kind = f"tone-{_tone(layer.tone)}"
    if isinstance(layer, Cloud):
        marks = "".join(
            f'<svg x="{_across(x, a)}%" y="{_down(y, b)}%" overflow="visible">{_shape(layer.shape, 2.4)}</svg>'
            for a, b in layer.points
            if x.holds(a) and y.holds(b)
        )
        return [(False, f'<g class="chart-cloud {kind}" aria-hidden="true">{marks}</g>')]
    dashes = " dashed" if layer.dashed else ""
    if isinstance(layer, Path):
        places = [(_across(x, a), _down(y, b)) for a, b in layer.points]
        line = "L".join(f"{a * 10:g} {b * 10:g}" for a, b in places)
        shifts = _label_shifts(places, ratio)
        marks = []
        for i, (a, b) in enumerate(places):
            number = layer.numbers[i] if i < len(layer.numbers) else ""
            words = (
                f'<text x="{shifts[i][0]}" y="{shifts[i][1]}" class="chart-number">{escape(number)}</text>'
                if number
                else ""
            )
            marks.append(_mark(layer, i, row, a, b, _shape("dot", 2.2 if layer.dashed else 4.5) + words))
        return [
            (True, f'<path class="chart-line {kind}{dashes}" d="M{line}"/>' if places else ""),
            (False, f'<g class="chart-points {kind}{dashes}">{"".join(marks)}</g>'),
        ]
    runs = _runs(layer.x, layer.y)
    line = "".join("M" + "L".join(f"{_across(x, a) * 10:g} {_down(y, b) * 10:g}" for a, b in run) for run in runs)
    band = ""
    if layer.low is not None and layer.high is not None:
        upper = [point for run in _runs(layer.x, layer.high) for point in run]
        lower = [point for run in _runs(layer.x, layer.low) for point in run]
        edge = "L".join(f"{_across(x, a) * 10:g} {_down(y, b) * 10:g}" for a, b in [*upper, *reversed(lower)])
        band = f'<path class="chart-band {kind}" d="M{edge}Z"/>' if edge else ""
    marks = [
        _mark(layer, i, row, _across(x, a), _down(y, b), "" if layer.dashed else _shape(layer.shape, 3.4))
        for i, (a, b) in enumerate(zip(layer.x, layer.y, strict=True))
        if b is not None and math.isfinite(b)
    ]
    return [
        (True, band + f'<path class="chart-line {kind}{dashes}" d="{line}"/>'),
        (False, f'<g class="chart-points {kind}{dashes}">{"".join(marks)}</g>'),
    ]


def _mark(layer: Line | Path, i: int, row: int, across: float, down: float, shape: str) -> str:
    """One mark; with a tip it is as large to a finger as a fingertip, and can be reached with the keyboard."""
    link = f' data-link="{escape(layer.links[i])}"' if i < len(layer.links) and layer.links[i] else ""
    if i >= len(layer.tips):
        return f'<svg x="{across}%" y="{down}%" overflow="visible"><g{link}>{shape}</g></svg>' if shape else ""
    tip, stop = escape(layer.tips[i]), 0 if (row, i) == (0, 0) else -1
    return (
        f'<svg x="{across}%" y="{down}%" overflow="visible"><g role="img" tabindex="{stop}" aria-label="{tip}" '
        f'data-tip="{tip}" data-cell="{row},{i}"{link}><circle r="11" class="chart-touch"/>{shape}</g></svg>'
    )


def _runs(x: Sequence[float], y: Sequence[float | None]) -> list[list[tuple[float, float]]]:
    """The points between gaps."""
    runs: list[list[tuple[float, float]]] = [[]]
    for a, b in zip(x, y, strict=True):
        if b is None or not math.isfinite(b):
            runs.append([])
        else:
            runs[-1].append((a, b))
    return [run for run in runs if run]


def _end_label(layer: Line, x: Axis, y: Axis) -> str:
    points = [point for run in _runs(layer.x, layer.y) for point in run]
    if not points:
        return ""
    a, b = points[-1]
    return (
        f'<span class="chart-end tone-{_tone(layer.tone)}" style="right:{100 - _across(x, a):.2f}%;'
        f'top:{_down(y, b)}%">{escape(layer.label)}</span>'
    )


def _label_shifts(places: Sequence[tuple[float, float]], ratio: float) -> list[tuple[int, int]]:
    """Where numbers stand beside their marks, px from the mark: of eight sides the one with most room.

    Measured on a telephone, where there is least.
    """
    spots = [(a / 100 * _NARROW, b / 100 * _NARROW / ratio) for a, b in places]
    taken, shifts = list(spots), []
    for one, other in pairwise(spots):  # the line leaves and arrives here
        taken += [_towards(one, other, 11), _towards(other, one, 11)]
    sides = [(0, -11), (10, -8), (11, 0), (10, 9), (0, 12), (-10, 9), (-11, 0), (-10, -8)]
    for a, b in spots:

        def room(side: tuple[int, int], a: float = a, b: float = b) -> float:
            others = [spot for spot in taken if spot != (a, b)]
            return min((math.hypot(a + side[0] - u, b + side[1] - v) for u, v in others), default=99)

        best = max(sides, key=lambda side: min(room(side), 16))  # more room than 16 px is no better
        shifts.append(best)
        taken.append((a + best[0], b + best[1]))
    return shifts


def _towards(one: tuple[float, float], other: tuple[float, float], distance: float) -> tuple[float, float]:
    length = math.hypot(other[0] - one[0], other[1] - one[1]) or 1.0
    share = min(distance / length, 1.0)
    return one[0] + share * (other[0] - one[0]), one[1] + share * (other[1] - one[1])
