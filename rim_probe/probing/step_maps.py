"""Linear maps from hidden states to the space of steps, fitted in closed form, and retrieval through them.

Method:
1. States of a cell are standardised; those wider than `MOST_FEATURES` are read through their leading principal
   components.
2. Ridge regression (Hoerl and Kennard 1970) to the vectors of step t, over the problems that have one. One
   eigendecomposition serves every strength in `RIDGES`. scikit-learn's estimators solve one problem at a time; here
   one decomposition has to serve hundreds.
3. The whole bank is searched by cosine with the ridge prediction, or with regularised canonical correlation (Hotelling
   1936): both sides in the leading `CANONICAL` pairs of directions, each weighted by sqrt(rho / (1 - rho^2)), which it
   has in the log-likelihood ratio of "the same step" against "any step" under a Gaussian.
4. Other candidates than the bank's are compared with the ridge prediction, or with what it recalls from the bank: the
   mean of the bank's steps weighted by softmax(sharpness * cosine), one update of a modern Hopfield network (Ramsauer
   et al. 2020, arXiv:2008.02217). That brings in what all steps of the bank share, as that equations hold.
Which of 3 and of 4 is used is chosen on "choose".

Knows states, vectors and ranks. Knows nothing of models, studies or reports.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from rim_probe.probing.step_space import Candidates, ranks_of, share_within, unit

RIDGES = (1e-3, 1e-2, 1e-1, 1.0)  # per problem: features have variance 1
MOST_FEATURES = 256
JOINT_FEATURES = 1024  # of all blocks side by side
CANONICAL = 32
SHARPNESSES = (16.0, 64.0)
_SHRINKAGE = 1e-3  # of the step side of the canonical correlation, of its greatest variance
_MOST_CERTAIN = 0.99


@dataclass(frozen=True)
class LinearMap:
    """`states @ weights + bias` [n, q] is compared by cosine with `(vectors - origin) @ keys` [steps, q]."""

    weights: np.ndarray  # [F, q]
    bias: np.ndarray  # [q]
    keys: np.ndarray  # [d, q]
    origin: np.ndarray  # [d]

    def predict(self, states: np.ndarray) -> np.ndarray:
        return states @ self.weights + self.bias

    def cosines(self, states: np.ndarray, vectors: np.ndarray) -> np.ndarray:
        """States [n, F] against steps [B, d] -> [n, B]."""
        return unit(self.predict(states)) @ unit((vectors - self.origin) @ self.keys).T


class Regression:
    """Ridge regression from one cell's states to any number of tasks.

    Args:
        states [n, F]: of all problems of "fit".
    """

    def __init__(self, states: np.ndarray, seed: int, features: int = MOST_FEATURES):
        self.mean, self.scale, self.basis = states.mean(0), states.std(0) + 1e-6, None
        held = (states - self.mean) / self.scale
        if held.shape[1] > features:
            from sklearn.utils.extmath import randomized_svd

            # Two iterations: the directions beyond the last wanted one need not be told apart from it.
            self.basis = randomized_svd(held, features, n_iter=2, random_state=seed)[2].T
            held = held @ self.basis
        self.held = held

    def project(self, states: np.ndarray) -> np.ndarray:
        held = (states - self.mean) / self.scale
        return held if self.basis is None else held @ self.basis

    def solve(self, rows: np.ndarray, targets: np.ndarray) -> Solution:
        return Solution(self, self.held[rows], targets)


class Solution:
    """All ridges of one task in one cell."""

    def __init__(self, regression: Regression, held: np.ndarray, targets: np.ndarray):
        self._regression = regression
        self._input_mean, self.target_mean = held.mean(0), targets.mean(0)
        centred, wanted = held - self._input_mean, targets - self.target_mean
        values, vectors = np.linalg.eigh((centred.T @ centred).astype(np.float64) / len(held))
        self._values, self._vectors = values.clip(min=0), vectors.astype(np.float32)
        self._crossed = self._vectors.T @ (centred.T @ wanted) / len(held)  # [features, d]
        self._wanted = wanted

    def coefficients(self, ridge: float) -> np.ndarray:
        """[features, d], of projected states less their mean."""
        return self._vectors @ (self._crossed / (self._values + ridge)[:, None]).astype(np.float32)

    def predictions(self, projected: np.ndarray) -> Iterator[tuple[float, np.ndarray]]:
        """For every ridge the predicted vectors of projected states, [n, d]."""
        for ridge in RIDGES:
            yield ridge, (projected - self._input_mean) @ self.coefficients(ridge) + self.target_mean

    def ridge_map(self, ridge: float) -> LinearMap:
        """The ridge prediction itself."""
        width = len(self.target_mean)
        return self._plain(
            self.coefficients(ridge), self.target_mean, np.eye(width, dtype=np.float32), np.zeros(width, np.float32)
        )

    def canonical_map(self, ridge: float) -> LinearMap:
        """Both sides in the leading canonical directions."""
        covariance = (self._wanted.T @ self._wanted).astype(np.float64) / len(self._wanted)
        values, vectors = np.linalg.eigh(covariance)
        root = vectors / np.sqrt(values.clip(min=0) + _SHRINKAGE * values[-1] + 1e-12)
        inputs = 1 / np.sqrt(self._values + ridge)
        left, correlations, right = np.linalg.svd(inputs[:, None] * (self._crossed @ root), full_matrices=False)
        count = min(CANONICAL, len(correlations))
        rho = correlations[:count].clip(max=_MOST_CERTAIN)
        weight = np.sqrt(rho / (1 - rho**2))
        coefficients = self._vectors @ (inputs[:, None] * left[:, :count] * weight)
        keys = root @ right[:count].T * weight
        return self._plain(coefficients, np.zeros(count), keys, self.target_mean)

    def _plain(self, coefficients, bias, keys, origin) -> LinearMap:
        """A map of projected states as one of untouched states."""
        bias = bias - self._input_mean @ coefficients
        weights = coefficients if self._regression.basis is None else self._regression.basis @ coefficients
        weights = weights / self._regression.scale[:, None]
        arrays = (weights, bias - self._regression.mean @ weights, keys, origin)
        return LinearMap(*(np.asarray(array, dtype=np.float32) for array in arrays))


@dataclass(frozen=True)
class Bank:
    """Distinct steps to retrieve from: texts and vectors [B, d]."""

    texts: tuple[str, ...]
    vectors: np.ndarray

    def ranks(self, mapped: LinearMap, states: np.ndarray, texts: Sequence[str]) -> np.ndarray:
        """The rank of each state's true step, [n]; NaN where the bank lacks it."""
        number = {text: i for i, text in enumerate(self.texts)}
        own = np.array([number.get(text, -1) for text in texts])
        ranks, known = np.full(len(texts), np.nan), own >= 0
        if known.any():
            cosines = mapped.cosines(states[known], self.vectors)
            ranks[known] = ranks_of(cosines, cosines[np.arange(len(cosines)), own[known]])
        return ranks

    def share_of(self, texts: Sequence[str]) -> float:
        """Which share of the texts it holds."""
        held = set(self.texts)
        return sum(text in held for text in texts) / max(len(texts), 1)

    def recalled(self, mapped: LinearMap, states: np.ndarray, sharpness: float) -> np.ndarray:
        """What states recall from the bank, [n, d]."""
        cosines = mapped.cosines(states, self.vectors)
        weights = np.exp(sharpness * (cosines - cosines.max(1, keepdims=True)))
        return weights / weights.sum(1, keepdims=True) @ self.vectors


@dataclass(frozen=True)
class Retrieval:
    """How one cell's states find steps.

    Attributes:
        ridge: the ridge prediction.
        mapped, kind: the map for the whole bank, "ridge" or "cca".
        bank: the steps it was chosen with.
        sharpness: of what is recalled from that bank for other candidates; None for the ridge prediction itself.
        hits: bool [places of "choose"], whether the nearest candidate is the true step.
        bank_top1: top-1 in the whole bank on "choose".
    """

    ridge: LinearMap
    mapped: LinearMap
    kind: str
    bank: Bank
    sharpness: float | None
    hits: np.ndarray
    bank_top1: float

    @property
    def top1(self) -> float:
        return float(self.hits.mean())

    def predicted(self, states: np.ndarray) -> np.ndarray:
        """What candidates are compared with, [n, d]."""
        if self.sharpness is None:
            return self.ridge.predict(states)
        return self.bank.recalled(self.mapped, states, self.sharpness)


def choose_retrieval(
    solution: Solution, strength: float, states: np.ndarray, asked: Candidates, bank: Bank
) -> Retrieval:
    """The best retrieval on "choose"; of equals the simpler one.

    Args:
        states, asked: of "choose", place by place.
    """
    ridge = solution.ridge_map(strength)
    maps = [ridge, solution.canonical_map(strength)]
    bank_top1 = [share_within(bank.ranks(mapped, states, asked.texts), 1) for mapped in maps]
    better = int(np.argmax(bank_top1))
    tried = [
        Retrieval(ridge, maps[better], ("ridge", "cca")[better], bank, sharpness, np.zeros(0), max(bank_top1))
        for sharpness in (None, *SHARPNESSES)
    ]
    scored = [replace(one, hits=asked.ranks(one.predicted(states)) <= 0) for one in tried]
    return max(scored, key=lambda one: one.top1)
