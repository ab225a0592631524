"""What probes measure: typed results, each one number with its interval, its n, its role and its place.

A probe returns a `Report`: a list of results and what was chosen to get them. `frame` gives them as a pandas frame;
`views` puts together what one table and one figure show. Knows no model, no probe and no drawing.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import product
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from rim_probe.evaluation import wilson_interval

if TYPE_CHECKING:
    import pandas

BOOTSTRAP_DRAWS = 2000
Role = Literal["score", "control", "positive control"]
_SIGNS: dict[str, Callable[[float, float], bool]] = {">=": operator.ge, "<=": operator.le}


@dataclass(frozen=True)
class Estimate:
    """A measured number with its 95 % interval over `n` problems; NaN where there is none."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Goal:
    """A target set before measuring, in the unit of the value; with `whole` the whole interval has to reach it."""

    sign: Literal[">=", "<="]
    value: float
    whole: bool = False

    def met(self, estimate: Estimate) -> bool:
        """Whether an estimate reaches it; NaN never does."""
        near = estimate.low if self.sign == ">=" else estimate.high
        return bool(_SIGNS[self.sign](near if self.whole else estimate.value, self.value))


@dataclass(frozen=True)
class Result:
    """One number.

    Attributes:
        metric: what was measured, with its unit where it has one: `says the predicted answer`, `entropy, nats`.
        of: what it was measured of; for a control its name.
        role: a `control` could refute the score; a `positive control` shows that the instrument can see an effect.
        share: a number from 0 to 1 (or a difference of two), written in percent.
        group: the problems it was measured on, such as `all`, `2 steps`, `answered right`.
        place: layer, block, slot, step, head, ..., the outermost first; the last two are the axes of a heat map.
        goal: the target, where there was one.
    """

    metric: str
    of: str
    estimate: Estimate
    role: Role = "score"
    share: bool = True
    group: str = "all"
    split: str = "report"
    place: Mapping[str, int | str] = field(default_factory=dict)
    goal: Goal | None = None

    @property
    def name(self) -> str:
        """What it is of, with its role and its group where these need saying."""
        role = "" if self.role == "score" else f"{self.role}: "
        return role + self.of + ("" if self.group == "all" else f", {self.group}")


@dataclass(frozen=True)
class Cloud:
    """Points of known questions, [n] each: `groups` maps a name to (x, y)."""

    x_title: str
    y_title: str
    groups: Mapping[str, tuple[Sequence[float], Sequence[float]]]


@dataclass(frozen=True)
class Report:
    """The results of one probe.

    Attributes:
        name: the probe's name on the command line.
        results: the first one stands for the probe, unless another has a goal (see `headline`).
        n: how many problems stand behind what (`{"fit": 6000, "report": 1500}`).
        settings: every choice that was made, and on what; JSON-ready.
        verdict: what follows, in one sentence or two made from the numbers; empty where the headline says it all.
        clouds: points to draw, by title.
    """

    name: str
    results: Sequence[Result]
    n: Mapping[str, int]
    settings: Mapping[str, Any] = field(default_factory=dict)
    verdict: str = ""
    clouds: Mapping[str, Cloud] = field(default_factory=dict)

    def frame(self) -> pandas.DataFrame:
        """A row per result: metric, of, role, share, group, split, value, low, high, n, goal, met, and its place."""
        import pandas

        return pandas.DataFrame([_row(result) for result in self.results])

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, numbers and strings, NaN as None; `from_dict` gives an equal report back, also after JSON."""
        rows = [_row(result) for result in self.results]
        columns = list(dict.fromkeys(key for row in rows for key in row if key != "met"))
        return plain(
            {
                "name": self.name,
                "n": self.n,
                "settings": self.settings,
                "verdict": self.verdict,
                "clouds": {title: vars(cloud) for title, cloud in self.clouds.items()},
                "columns": columns,
                "results": [[row.get(column) for column in columns] for row in rows],
            }
        )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Report:
        """The report a dict of `to_dict` came from."""
        results = [_result(dict(zip(data["columns"], row, strict=True))) for row in data["results"]]
        clouds = {
            title: Cloud(**{**cloud, "groups": {name: tuple(ends) for name, ends in cloud["groups"].items()}})
            for title, cloud in data["clouds"].items()
        }
        return cls(data["name"], results, data["n"], data["settings"], data["verdict"], clouds)


def _row(result: Result) -> dict[str, Any]:
    goal = result.goal
    told = {"metric": result.metric, "of": result.of, "role": result.role, "share": result.share}
    told |= {"group": result.group, "split": result.split, **vars(result.estimate)}
    told |= {"goal": goal and f"{goal.sign} {goal.value!r}{' whole' * goal.whole}"}
    return told | {"met": goal and goal.met(result.estimate)} | {f"at {k}": v for k, v in result.place.items()}


def _result(row: dict[str, Any]) -> Result:
    numbers = [float("nan") if row[key] is None else float(row[key]) for key in ("value", "low", "high")]
    goal = None
    if row["goal"]:
        sign, value, *whole = row["goal"].split()
        goal = Goal(sign, float(value), bool(whole))
    place = {key.removeprefix("at "): at for key, at in row.items() if key.startswith("at ") and at is not None}
    rest = {key: row[key] for key in ("metric", "of", "role", "share", "group", "split")}
    return Result(estimate=Estimate(*numbers, int(row["n"])), place=place, goal=goal, **rest)


# -------------------------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class View:
    """Results of one metric over the same coordinates: what one table or one figure shows.

    Attributes:
        place: names of the coordinates that vary, at most two; `at`: those that are fixed (the outer ones).
    """

    metric: str
    share: bool
    place: tuple[str, ...]
    at: Mapping[str, int | str]
    results: Sequence[Result]

    @property
    def title(self) -> str:
        """The metric, its unit and the fixed coordinates."""
        where = "".join(f", {name} {value}" for name, value in self.at.items())
        return f"{self.metric}{', %' if self.share else ''}{where}"


def views(report: Report) -> list[View]:
    """The results put together by metric and coordinates, in their order."""
    groups: dict[tuple, list[Result]] = {}
    for result in report.results:
        names = tuple(result.place)
        outer = tuple((name, result.place[name]) for name in names[:-2])
        groups.setdefault((result.metric, result.share, names[-2:], outer), []).append(result)
    return [View(metric, share, names, dict(outer), rs) for (metric, share, names, outer), rs in groups.items()]


def headline(report: Report) -> tuple[Result, Result | None] | None:
    """The result that stands for a probe and the strongest control of the same metric, group and place.

    The first result with a goal that is no control, else the first score. None where there is no score. The strongest
    control is the highest one, or the lowest where the goal is to be below.
    """
    scores = [result for result in report.results if result.role == "score" and result.estimate.n]
    if not scores:
        return None
    score = next((result for result in scores if result.goal), scores[0])
    same = (score.metric, score.group, dict(score.place))
    controls = [r for r in report.results if r.role == "control" and (r.metric, r.group, dict(r.place)) == same]
    better = -1 if score.goal and score.goal.sign == "<=" else 1
    return score, max((r for r in controls if r.estimate.n), key=lambda r: better * r.estimate.value, default=None)


def is_clear(score: Estimate, control: Estimate) -> bool:
    """Whether the whole interval of a score lies above that of a control."""
    return score.low > control.high


def relation(score: Estimate, control: Estimate) -> Literal["above", "below", "not clear of"]:
    """Where the whole interval of a score lies beside that of a control."""
    return "above" if is_clear(score, control) else "below" if is_clear(control, score) else "not clear of"


# ------------------------------------------------------------------------------------------------------------ estimates

NONE = Estimate(float("nan"), float("nan"), float("nan"), 0)


def proportion_estimate(outcomes: Iterable[bool]) -> Estimate:
    """A share of problems with its 95 % Wilson interval; NaN with the interval 0 to 1 where there are none."""
    outcomes = np.asarray(list(outcomes), dtype=bool)
    right, n = int(outcomes.sum()), len(outcomes)
    return Estimate(right / n if n else float("nan"), *wilson_interval(right, n), n)


def mean_estimate(values: np.ndarray) -> Estimate:
    """The mean of one number per problem with its 95 % percentile bootstrap interval; problems with NaN are left out.

    The same as `bootstrap` of a mean, some hundred times faster: the draws are a matrix of how often each problem is
    drawn, made once for every n.
    """
    values = np.asarray(values, dtype=np.float64).ravel()
    values = values[~np.isnan(values)]
    if not (n := len(values)):
        return NONE
    low, high = np.quantile(_draws(n) @ values / n, [0.025, 0.975])
    return Estimate(float(values.mean()), float(low), float(high), n)


def mean_results(metric: str, of: str, values: np.ndarray, places: Mapping[str, Iterable] = {}, **more) -> list[Result]:
    """A result for every cell of `values` [n, *cells], a mean over problems; `places`: the labels of each axis of cells
    by the name of their coordinate; `more`: other attributes of the results."""
    cells = np.asarray(values, dtype=float).reshape(len(values), -1).T
    at = [dict(zip(places, labels, strict=True)) for labels in product(*places.values())]
    return [Result(metric, of, mean_estimate(cell), place=place, **more) for cell, place in zip(cells, at, strict=True)]


def ratio_estimate(sums: np.ndarray, counts: np.ndarray) -> Estimate:
    """Sum over sum of two numbers per problem, with its 95 % percentile bootstrap interval; problems that count nothing
    are left out."""
    sums, counts = sums[counts > 0], counts[counts > 0]
    if not (n := len(counts)):
        return NONE
    low, high = np.quantile((_draws(n) @ sums) / (_draws(n) @ counts), [0.025, 0.975])
    return Estimate(float(sums.sum() / counts.sum()), float(low), float(high), n)


@lru_cache(maxsize=4)
def _draws(n: int) -> np.ndarray:
    """How often each of n problems is drawn, [draws, n]."""
    return np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=BOOTSTRAP_DRAWS).astype(np.float64)


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
        return NONE
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(draws):
        chosen = rng.integers(0, n, n)
        found.append(float(statistic(*(array[chosen] for array in arrays))))
    kept = np.asarray(found)[~np.isnan(found)]
    low, high = np.quantile(kept, [0.025, 0.975]) if len(kept) else (float("nan"), float("nan"))
    return Estimate(float(statistic(*arrays)), float(low), float(high), n)


def plain(value: Any) -> Any:
    """`value` with numpy numbers and arrays as Python's own, and NaN as None, which JSON can hold."""
    if isinstance(value, Mapping):
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
