"""Axes of charts: where a value lies between two ends, and which round values are written there.

Knows numbers. Does not know how anything is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Axis:
    """One axis.

    Attributes:
        title: what it shows, with its unit.
        low, high: its ends, low < high (both > 0 with `log`).
        ticks: (value, label).
        log: equal ratios are equally long.
        flipped: the low end is at the top (or right), as ranks want it.
    """

    title: str
    low: float
    high: float
    ticks: Sequence[tuple[float, str]]
    log: bool = False
    flipped: bool = False

    def holds(self, value: float) -> bool:
        """Does it lie between the ends?"""
        return self.low <= value <= self.high

    def share(self, value: float) -> float:
        """Where a value lies, 0 at the low end, 1 at the high end; what lies outside is kept at the end."""
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(max(value, low))
        place = min(max((value - low) / (high - low), 0.0), 1.0)
        return 1 - place if self.flipped else place


def axis(
    values: Sequence[float | None],
    title: str = "",
    *,
    low: float | None = None,
    high: float | None = None,
    ticks: int = 5,
    form: Callable[[float], str] | None = None,
    log: bool = False,
    flipped: bool = False,
) -> Axis:
    """An axis around values, with about `ticks` round ticks.

    Args:
        values: what has to fit; None and NaN are left out.
        low, high: fixed ends (0 and 1 of a probability); by default the values' own ends and a little room.
        form: how a tick is written; by default as short as it is exact.
    """
    real = [float(v) for v in values if v is not None and math.isfinite(v)] or [0.0, 1.0]
    if log:
        real = [v for v in real if v > 0] or [1.0, 10.0]
    least, most = min(real) if low is None else low, max(real) if high is None else high
    if most <= least:
        least, most = (least, least * 10) if log else (least - 0.5, least + 0.5)
    room = 0.0 if log else 0.05 * (most - least)
    start, end = least - room if low is None else low, most + room if high is None else high
    places = _log_ticks(start, end) if log else _multiples(start, end, _round_step(end - start, ticks))
    return Axis(title, start, end, [(place, (form or _short)(place)) for place in places], log, flipped)


def named_axis(names: Sequence[str], title: str = "") -> Axis:
    """An axis of places 0, 1, 2, ... with a name each: layers, blocks."""
    return Axis(title, -0.4, max(len(names), 1) - 0.6, list(enumerate(names)))


def _round_step(length: float, wanted: int) -> float:
    rough = length / max(wanted, 1)
    unit = 10.0 ** math.floor(math.log10(rough))
    return next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough * 0.999)


def _multiples(low: float, high: float, step: float) -> list[float]:
    first = math.ceil(low / step - 1e-9)
    return [round(n * step, 12) for n in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    tens = [10.0**n for n in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
    factors = (1,) if high / low > 300 else (1, 3) if high / low > 30 else (1, 2, 5)
    return [ten * factor for ten in tens for factor in factors if low * 0.999 <= ten * factor <= high * 1.001]


def _short(value: float) -> str:
    return f"{value:g}".replace("-", "−")


def same_units(x: Axis, y: Axis, ratio: float) -> tuple[Axis, Axis]:
    """The two axes with the ends of one moved out: in a box `ratio` times as wide as high, one unit is then as long
    across as up."""
    across, up = x.high - x.low, y.high - y.low
    wider, taller = max(across, up * ratio), max(up, across / ratio)
    step = _round_step(max(wider, taller), 7)

    def grown(one: Axis, length: float) -> Axis:
        extra = (length - (one.high - one.low)) / 2
        low, high = one.low - extra, one.high + extra
        return replace(one, low=low, high=high, ticks=[(tick, _short(tick)) for tick in _multiples(low, high, step)])

    return grown(x, wider), grown(y, taller)
