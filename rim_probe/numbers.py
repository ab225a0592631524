"""How numbers are written, in tables, figures and sentences alike.

A share is a number from 0 to 1 that is written in percent; every other number has three significant digits. A title
says by its "%" that its values are shares ("95 % interval" says nothing of the kind). Knows no report and no figure.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from numbers import Real
from typing import Any

NOTHING = "–"  # where there is no value: not zero, and not forgotten
_LEVEL = re.compile(r"\d+(\.\d+)?\s*%")


def is_number(value: Any) -> bool:
    """Whether there is a value: neither None nor NaN."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def says_percent(title: str) -> bool:
    """Whether values under this title are shares; a level such as "95 %" does not count."""
    return "%" in _LEVEL.sub("", title)


def percent(share: float) -> str:
    """A probability in a sentence: "98 %", "<1 %", ">99 %"."""
    if 0 < share < 0.01:
        return "<1 %"
    return ">99 %" if 0.99 < share < 1 else f"{100 * share:.0f} %"


def signed(value: float) -> str:
    """A difference: "−0.42", "+0.03", "0" where two digits show nothing."""
    text = f"{abs(value):.1f}" if abs(value) >= 9.95 else f"{abs(value):.2f}"
    return ("−" if value < 0 else "+") + text if text.strip("0.") else "0"


def format_number(value: float | None, share: bool = False) -> str:
    """Three significant digits, or percent with one decimal and without its sign."""
    return format_together([value], share)[0]


def format_interval(value: float | None, low: float | None, high: float | None, share: bool = False) -> str:
    """`value (low to high)`, all three with the same decimals; the value alone where an end is missing."""
    value, low, high = format_together([value, low, high], share)
    return value if NOTHING in (value, low, high) else f"{value} ({low} to {high})"


def format_together(values: Sequence[float | None], share: bool = False) -> list[str]:
    """Numbers that belong together, with as many decimals as the greatest needs for three significant digits."""
    scaled = [value * (100 if share else 1) if is_number(value) else None for value in values]
    greatest = max((abs(value) for value in scaled if value is not None), default=0.0)
    if share:
        decimals = 1
    elif greatest >= 1e-4:
        # Rounded first: 0.9996 is 1.00, not 1.000.
        decimals = max(0, 2 - math.floor(math.log10(float(f"{greatest:.2e}"))))
    else:
        return [NOTHING if value is None else f"{value:.1e}" if value else "0" for value in scaled]
    written = [NOTHING if value is None else f"{value:,.{decimals}f}" for value in scaled]
    return [text if text.strip("-0.,") else text.lstrip("-") for text in written]  # no sign before a zero
