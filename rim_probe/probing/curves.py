"""Means with intervals, and curves made of them; shared by the probes that report many.

Knows statistics of problems. Knows nothing of models or what is measured.
"""

from functools import lru_cache
from typing import Any

import numpy as np

from rim_probe.probing.section import BOOTSTRAP_DRAWS, Estimate


def mean_estimate(values: np.ndarray) -> Estimate:
    """The mean of one number per problem with its 95 % percentile bootstrap interval; problems with NaN are left out.

    The same as `section.bootstrap` of a mean, some hundred times faster: the draws are a matrix of how often each
    problem is drawn, made once for every n.
    """
    values = np.asarray(values, dtype=np.float64).ravel()
    values = values[~np.isnan(values)]
    n = len(values)
    if n == 0:
        return Estimate(float("nan"), float("nan"), float("nan"), 0)
    low, high = np.quantile(_draws(n) @ values / n, [0.025, 0.975])
    return Estimate(float(values.mean()), float(low), float(high), n)


def ratio_estimate(sums: np.ndarray, counts: np.ndarray) -> Estimate:
    """Sum over sum of two numbers per problem, with its 95 % percentile bootstrap interval; problems that count nothing
    are left out."""
    sums, counts = sums[counts > 0], counts[counts > 0]
    if not (n := len(counts)):
        return Estimate(float("nan"), float("nan"), float("nan"), 0)
    low, high = np.quantile((_draws(n) @ sums) / (_draws(n) @ counts), [0.025, 0.975])
    return Estimate(float(sums.sum() / counts.sum()), float(low), float(high), n)


@lru_cache(maxsize=4)
def _draws(n: int) -> np.ndarray:
    """How often each of n problems is drawn, [draws, n]."""
    return np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=BOOTSTRAP_DRAWS).astype(np.float64)


def curve(name: str, x: list, estimates: list[Estimate], control: bool = False) -> dict[str, Any]:
    """One series of a figure of kind "lines"."""
    return {
        "name": name,
        "x": x,
        "y": [estimate.value for estimate in estimates],
        "low": [estimate.low for estimate in estimates],
        "high": [estimate.high for estimate in estimates],
        "control": control,
    }
