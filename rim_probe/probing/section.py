"""What every probe reports: figures, tables and targets as plain data, each number with its n and its interval.

Knows the shapes of a report and how an interval is made. Knows nothing of models, probes or how a report is drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from rim_probe.evaluation import wilson_interval

BOOTSTRAP_DRAWS = 2000


@dataclass(frozen=True)
class Estimate:
    """A measured number with its 95 % interval over `n` problems."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Table:
    """Rows under a header; the first cell of a row is its name, the others are text, numbers or estimates."""

    title: str
    header: list[str]
    rows: list[list[str | int | float | Estimate | None]]
    note: str = ""


@dataclass(frozen=True)
class Figure:
    """A picture as data.

    `data` by kind:
        heatmap: x, y (labels), z [y][x] (None where there is no value), hover [y][x] or None, z_title, low, high (ends
            of the colour scale or None), diverging (colours meet in the middle of low and high).
        lines: series, a list of {name, x, y, low or None, high or None, control}; a control is drawn as one.
        scatter: groups, a list of {name, x, y, text or None}.
        bars: bars, a list of {name, value, low, high, control}.
    """

    kind: Literal["heatmap", "lines", "scatter", "bars"]
    title: str
    x_title: str
    y_title: str
    data: dict[str, Any]
    note: str = ""


@dataclass(frozen=True)
class Target:
    """A goal set before measuring, and whether it was met."""

    what: str
    goal: str
    value: Estimate | float
    met: bool


@dataclass(frozen=True)
class Section:
    """The report of one probe.

    Attributes:
        name: the probe's name on the command line.
        question: what is asked, in plain words.
        summary: what came out, with its control; made from the numbers, never typed.
        n: how many problems stand behind what (`{"fit": 6000, "report": 1500}`).
        settings: every choice that was made, and on what.
        data: further results for machines, JSON-ready.
    """

    name: str
    title: str
    question: str
    summary: str
    n: dict[str, int]
    settings: dict[str, Any] = field(default_factory=dict)
    tables: list[Table] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    targets: list[Target] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, numbers and strings, NaN as None; `from_dict` gives an equal section back, also after JSON."""
        return plain(asdict(self))

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Section:
        """The section a dict of `to_dict` came from."""
        tables = [
            Table(**{**table, "rows": [[_cell(cell) for cell in row] for row in table["rows"]]})
            for table in data["tables"]
        ]
        targets = [Target(**{**target, "value": _cell(target["value"])}) for target in data["targets"]]
        figures = [Figure(**figure) for figure in data["figures"]]
        return cls(**{**data, "tables": tables, "figures": figures, "targets": targets})


def proportion_estimate(outcomes: Iterable[bool]) -> Estimate:
    """A share of problems with its 95 % Wilson interval; NaN with the interval 0 to 1 where there are none."""
    outcomes = np.asarray(list(outcomes), dtype=bool)
    right, n = int(outcomes.sum()), len(outcomes)
    return Estimate(right / n if n else float("nan"), *wilson_interval(right, n), n)


def bootstrap(
    values: Sequence | np.ndarray | tuple[np.ndarray, ...],
    statistic: Callable[..., float] = np.mean,
    *,
    seed: int = 0,
    draws: int = BOOTSTRAP_DRAWS,
) -> Estimate:
    """A statistic of problems with its 95 % percentile bootstrap interval (Efron 1979), problems drawn with repeats.

    Args:
        values: [n, ...], the first axis is the problem; or a tuple of such arrays, drawn together and given to
            `statistic` one by one.
        statistic: arrays to a number; draws for which it gives NaN (one class only, say) are left out.
    """
    arrays = tuple(np.asarray(array) for array in (values if isinstance(values, tuple) else (values,)))
    n = len(arrays[0])
    if n == 0:
        return Estimate(float("nan"), float("nan"), float("nan"), 0)
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(draws):
        chosen = rng.integers(0, n, n)
        found.append(float(statistic(*(array[chosen] for array in arrays))))
    kept = np.asarray(found)[~np.isnan(found)]
    low, high = np.quantile(kept, [0.025, 0.975]) if len(kept) else (float("nan"), float("nan"))
    return Estimate(float(statistic(*arrays)), float(low), float(high), n)


def _cell(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return Estimate(**{key: float("nan") if number is None else number for key, number in value.items()})


def plain(value: Any) -> Any:
    """`value` with numpy numbers and arrays as Python's own, and NaN as None, which JSON can hold."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value
