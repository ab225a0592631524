"""Linear probes on scikit-learn: one class for the nearest step, the values and "will it be right?".

Formula, for states x [F] of one cell (a view of several cells has them side by side):
    z = (x - mean) / deviation                 StandardScaler
    u = V z, where x is wider than wanted      PCA, V [components, F]
    y = W u + b                                Ridge or LogisticRegression
All three are affine, so a fitted probe is kept as one map of untouched states, `x @ weights + bias`: two arrays, which
safetensors hold.

Knows arrays. Knows nothing of models, cells or what is predicted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np

ROUNDING = 1e-5
MOST_FEATURES = 256  # that a probe sees of one cell; the same for a memory and for its controls


@dataclass(frozen=True)
class LinearMap:
    """`states @ weights + bias`: weights [F, q], bias [q]."""

    weights: np.ndarray
    bias: np.ndarray

    def __call__(self, states: np.ndarray) -> np.ndarray:
        """States [n, F] -> [n, q]."""
        return states @ self.weights + self.bias


class Inputs:
    """What linear models see of some states: standardised, and reduced to principal components where they are wide.

    Args:
        parts: states [n, F_i] to fit the standardisation and the components on, each part for itself.
        features: most components of a part.
        seed: of the randomised singular value decomposition.

    Attributes:
        fitted: `parts` as inputs, float [n, components of all parts].
    """

    def __init__(self, parts: Sequence[np.ndarray], features: int = MOST_FEATURES, seed: int = 0):
        from sklearn.decomposition import PCA
        from sklearn.preprocessing import StandardScaler

        self._steps: list[list[Any]] = []  # of every part: a scaler, and components where it is wide
        for part in parts:
            scaler = StandardScaler().fit(part)
            # What varies no more than float32 rounds is the same for every question and must not be blown up.
            scaler.scale_[np.sqrt(scaler.var_) < ROUNDING * (1 + np.abs(scaler.mean_))] = 1
            steps = [scaler]
            if part.shape[1] > features:
                count = min(features, len(part) - 1)
                components = PCA(count, svd_solver="randomized", iterated_power=2, random_state=seed)
                with np.errstate(invalid="ignore"):  # of states that are all the same
                    steps.append(components.fit(scaler.transform(part)))
            self._steps.append(steps)
        self.fitted = self(parts) if parts else np.empty((0, 0))

    def __call__(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        """States as inputs, float [n, components of all parts]."""
        pairs = zip(self._steps, parts, strict=True)
        return np.concatenate([reduce(lambda x, step: step.transform(x), steps, part) for steps, part in pairs], axis=1)

    def beside(self, other: Inputs) -> Inputs:
        """Both, side by side: for parts that several fits share."""
        both = Inputs((), 0)
        both._steps = self._steps + other._steps
        both.fitted = np.concatenate([self.fitted, other.fitted], axis=1)
        return both

    def fit(self, model: Any, targets: np.ndarray, rows: np.ndarray | slice = slice(None)) -> LinearMap:
        """Fits a scikit-learn linear model to `targets` on `rows` of the fitted states.

        Returns:
            the map from all parts' untouched states, side by side, float32; q is the number of targets (1 for a vector
            of them, or for a classifier of two classes).
        """
        model.fit(self.fitted[rows], targets)
        return self.folded(np.atleast_2d(model.coef_).T, np.atleast_1d(model.intercept_))

    def folded(self, coefficients: np.ndarray, bias: np.ndarray) -> LinearMap:
        """`inputs @ coefficients + bias` as a map of untouched states."""
        weights, start = [], 0
        for scaler, *reduced in self._steps:
            size = reduced[0].n_components_ if reduced else len(scaler.mean_)
            own = coefficients[start : start + size]
            if reduced:
                own = reduced[0].components_.T @ own
                bias = bias - reduced[0].mean_ @ own
            own = own / scaler.scale_[:, None]
            bias = bias - scaler.mean_ @ own
            weights.append(own)
            start += size
        return LinearMap(np.concatenate(weights).astype(np.float32), np.asarray(bias, np.float32))
