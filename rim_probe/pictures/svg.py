"""Charts as SVG files of their own: for pages that show pictures but run nothing, such as a README on GitHub.

The same axes, lines, marks and colours as `chart`, but with a fixed size and words inside the drawing, since nothing
stretches such a file. It brings its own sheet of paper and follows the reader's light or dark scheme, so that it can be
read on any page. Every mark says its numbers in a `title`.

Knows numbers, places and shapes. Does not know what they mean.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rim_probe.pictures.axes import Axis
from rim_probe.pictures.chart import SHAPES, TONES, Line
from rim_probe.pictures.parts import HERE, escape

_MARGIN = 24
_GAP = 30  # between panels
_GUTTER = 46  # left of a plot, for its tick labels
_PLOT_HEIGHT = 220
_ROW_HEIGHT = 54
_WIDTHS = {1: 620, 2: 370, 3: 235}  # of a plot, by panels in a row
_COLUMNS = 3
_CHARACTER = 6.6  # px, a little more than the mean width of a letter at 12.5 px

_MARKS = {
    "dot": '<circle r="{0}"/>',
    "ring": '<circle r="{0}" class="hollow"/>',
    "cross": '<path d="M-{0}-{0}L{0} {0}M-{0} {0}L{0}-{0}" class="stroke"/>',
    "square": '<path d="M-{0}-{0}H{0}V{0}H-{0}Z"/>',
    "triangle": '<path d="M0-{0}L{0} {0}H-{0}Z"/>',
}


@dataclass(frozen=True)
class Plot:
    """Lines over two axes.

    Attributes:
        lines: one whose `shape` is "" has no marks.
        upright: (place on x, words) of a thin line.
        bars: intervals are drawn as bars at each mark, not as bands, so that those of many lines stay apart.
    """

    title: str
    x: Axis
    y: Axis
    lines: Sequence[Line]
    upright: tuple[float, str] | None = None
    bars: bool = False


@dataclass(frozen=True)
class Stop:
    """A value on a row, with its interval, its mark, and the words beside it and in its tip."""

    value: float
    low: float
    high: float
    shape: str
    text: str
    tip: str


@dataclass(frozen=True)
class Row:
    """One row: up to two stops from left to right, joined by a line; the words of the second stand below it."""

    name: str
    tone: str
    stops: Sequence[Stop]


@dataclass(frozen=True)
class Rows:
    """Rows of values on one axis."""

    title: str
    x: Axis
    rows: Sequence[Row]


def svg_figure(panels: Sequence[Plot | Rows], title: str, lead: str, keys: Sequence[tuple[str, str, str]]) -> str:
    """A whole SVG file.

    Args:
        panels: all of one kind, up to three in a row.
        lead: what is seen, a sentence or two under the title.
        keys: (shape or "line" or "dashes", tone, text) each, as for `chart.legend`.
    """
    columns = min(len(panels), _COLUMNS if isinstance(panels[0], Plot) else 2)
    plot_width = _WIDTHS[columns]
    gutter = _GUTTER if isinstance(panels[0], Plot) else _GUTTER + 66
    width = 2 * _MARGIN + columns * (gutter + plot_width) + (columns - 1) * _GAP
    pieces, top = [f'<text x="{_MARGIN}" y="40" class="title">{escape(title)}</text>'], 62
    for line in _wrapped(lead, (width - 2 * _MARGIN) / _CHARACTER):
        pieces.append(f'<text x="{_MARGIN}" y="{top}" class="lead">{escape(line)}</text>')
        top += 18
    drawn, top = _keys(keys, top + 4, width)
    pieces.append(drawn)
    for start in range(0, len(panels), columns):
        tallest = 0
        for i, panel in enumerate(panels[start : start + columns]):
            left = _MARGIN + gutter + i * (plot_width + gutter + _GAP)
            height = _PLOT_HEIGHT if isinstance(panel, Plot) else _ROW_HEIGHT * len(panel.rows)
            body = _plot(panel, plot_width) if isinstance(panel, Plot) else _rows(panel, plot_width, height)
            pieces.append(
                f'<g transform="translate({left} {top + 40})">'
                f'<text x="{-gutter}" y="-18" class="panel">{escape(panel.title)}</text>{body}</g>'
            )
            tallest = max(tallest, height)
        top += tallest + 100
    size = f'width="{width}" height="{top}" viewBox="0 0 {width} {top}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">'
        f"<title>{escape(title)}</title><desc>{escape(lead)}</desc><style>{_style()}</style>"
        f'<rect x="0.5" y="0.5" width="{width - 1}" height="{top - 1}" rx="10" class="sheet"/>{"".join(pieces)}</svg>\n'
    )


# ------------------------------------------------------------------------------------------------------------- pieces


def _wrapped(text: str, length: float) -> list[str]:
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) > length:
            lines.append("")
        lines[-1] += (" " if lines[-1] else "") + word
    return lines


def _keys(keys: Sequence[tuple[str, str, str]], top: float, width: float) -> tuple[str, float]:
    """The legend from `top` on, and where it ends."""
    pieces, left = [], float(_MARGIN)
    for shape, tone, text in keys:
        length = 34 + _CHARACTER * len(text)
        if left > _MARGIN and left + length > width - _MARGIN:
            left, top = _MARGIN, top + 20
        drawn = (
            f'<path d="M-10 0H10" class="line{" dashed" if shape == "dashes" else ""}"/>'
            if shape in ("line", "dashes")
            else _shape(shape)
        )
        pieces.append(
            f'<g transform="translate({left + 10:g} {top})" class="tone-{_tone(tone)}">{drawn}'
            f'<text x="16" y="4.5" class="key">{escape(text)}</text></g>'
        )
        left += length + 12
    return "".join(pieces), top + 14


def _plot(panel: Plot, width: float) -> str:
    x, y, height = panel.x, panel.y, _PLOT_HEIGHT

    def place(a: float, b: float) -> str:
        return f"{width * x.share(a):.1f} {height * (1 - y.share(b)):.1f}"

    pieces = []
    for value, text in y.ticks:
        down = height * (1 - y.share(value))
        pieces.append(
            f'<path class="grid" d="M0 {down:.1f}H{width}"/>'
            f'<text x="-8" y="{down + 4:.1f}" class="tick end">{escape(text)}</text>'
        )
    pieces.append(_bottom(x, width, height))
    if panel.upright:
        across = width * x.share(panel.upright[0])
        pieces.append(
            f'<path class="upright" d="M{across:.1f} 0V{height}"/>'
            f'<text x="{across + 5:.1f}" y="11" class="tick start">{escape(panel.upright[1])}</text>'
        )
    pieces += [f'<g class="tone-{_tone(line.tone)}">{_line(line, place, panel.bars)}</g>' for line in panel.lines]
    return "".join(pieces)


def _bottom(x: Axis, width: float, height: float) -> str:
    ticks = "".join(
        f'<path class="edge" d="M{width * x.share(value):.1f} {height}v5"/>'
        f'<text x="{width * x.share(value):.1f}" y="{height + 19}" class="tick middle">{escape(text)}</text>'
        for value, text in x.ticks
    )
    return (
        f'<path class="edge" d="M0 {height}H{width}"/>{ticks}'
        f'<text x="{width / 2:g}" y="{height + 38}" class="tick middle">{escape(x.title)}</text>'
    )


def _line(line: Line, place: Callable[[float, float], str], bars: bool) -> str:
    pieces = []
    known = [i for i, value in enumerate(line.y) if value is not None and math.isfinite(value)]
    if line.low is not None and line.high is not None and (bars or len(known) == 1):
        ends = [f"M{place(line.x[i], line.low[i])}L{place(line.x[i], line.high[i])}" for i in known]
        pieces.append(f'<path class="bar" d="{"".join(ends)}"/>')
    elif line.low is not None and line.high is not None and known:
        edge = [place(line.x[i], line.high[i]) for i in known] + [place(line.x[i], line.low[i]) for i in known[::-1]]
        pieces.append(f'<path class="band" d="M{"L".join(edge)}Z"/>')
    path = "L".join(place(line.x[i], line.y[i]) for i in known)
    tips = [line.tips[i] if i < len(line.tips) else "" for i in range(len(line.y))]
    told = f"<title>{escape(tips[known[0]])}</title>" if known and not line.shape and tips[known[0]] else ""
    if known:
        pieces.append(f'<path class="line{" dashed" if line.dashed else ""}" d="M{path}">{told}</path>')
    for i in known if line.shape else ():
        pieces.append(
            f'<g transform="translate({place(line.x[i], line.y[i])})">'
            f"<title>{escape(tips[i])}</title>{_shape(line.shape)}</g>"
        )
    return "".join(pieces)


def _rows(panel: Rows, width: float, height: float) -> str:
    pieces = [f'<path class="grid" d="M{width * panel.x.share(value):.1f} 0V{height}"/>' for value, _ in panel.x.ticks]
    pieces.append(_bottom(panel.x, width, height))
    for i, row in enumerate(panel.rows):
        down = _ROW_HEIGHT * (i + 0.5) - 2
        pieces.append(f'<text x="-10" y="{down + 4:g}" class="name end">{escape(row.name)}</text>')
        places = [width * panel.x.share(stop.value) for stop in row.stops]
        marks = "".join(
            f'<path class="line" d="M{width * panel.x.share(stop.low):.1f} {down:g}H'
            f'{width * panel.x.share(stop.high):.1f}"/><g transform="translate({across:.1f} {down:g})">'
            f"<title>{escape(stop.tip)}</title>{_shape(stop.shape, 5)}</g>"
            f'<text x="{across:.1f}" y="{down + side:g}" class="value middle">{escape(stop.text)}</text>'
            for stop, across, side in zip(row.stops, places, (-11, 20), strict=False)
        )
        joined = f'<path class="joint" d="M{places[0]:.1f} {down:g}H{places[-1]:.1f}"/>' if places else ""
        pieces.append(f'<g class="tone-{_tone(row.tone)}">{joined}{marks}</g>')
    return "".join(pieces)


def _shape(shape: str, radius: float = 3.8) -> str:
    if shape not in SHAPES:
        raise ValueError(f"a shape is one of {', '.join(SHAPES)}, not {shape!r}")
    return _MARKS[shape].format(f"{radius:g}")


def _tone(tone: str) -> str:
    if tone not in TONES:
        raise ValueError(f"a tone is one of {', '.join(TONES)}, not {tone!r}")
    return tone


@functools.cache
def _style() -> str:
    """The colours of all pictures, light and dark, and the rules of these."""
    css = (HERE / "picture.css").read_text(encoding="utf-8")
    light, dark = (re.search(start + r"[^{]*\{([^}]*)\}", css)[1] for start in (r":root", r"\.dark \.pic"))
    tones = "".join(f".tone-{tone}{{color:var(--{tone})}}" for tone in TONES)
    return " ".join(
        f"""
svg{{{light}}} @media (prefers-color-scheme: dark){{svg{{{dark}}}}}
text{{font:12.5px ui-sans-serif,system-ui,-apple-system,"Segoe UI","Helvetica Neue",Arial,sans-serif;fill:var(--ink)}}
.title{{font:600 20px var(--serif)}} .lead,.tick{{fill:var(--soft)}} .panel{{font-weight:600}}
.tick{{font-size:11.5px}} .value{{font-size:12px}} .middle{{text-anchor:middle}} .end{{text-anchor:end}}
.sheet{{fill:var(--sheet);stroke:var(--line)}} .grid{{stroke:var(--line)}} .edge{{stroke:var(--edge-line);fill:none}}
.upright{{stroke:var(--edge-line);stroke-dasharray:2 3}} .band{{fill:currentColor;opacity:.13}}
.line{{stroke:currentColor;stroke-width:2;fill:none}} .dashed{{stroke-width:1.5;stroke-dasharray:5 4}}
.joint{{stroke:currentColor;stroke-width:1;opacity:.5}} circle,path{{fill:currentColor}}
.hollow{{fill:var(--sheet);stroke:currentColor;stroke-width:2}} .stroke{{stroke:currentColor;stroke-width:2;fill:none}}
.bar{{stroke:currentColor;stroke-width:1.5;opacity:.55}} .edge,.grid,.line,.joint,.upright,.bar{{fill:none}}
{tones}""".split()
    )
