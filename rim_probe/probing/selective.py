"""How good a score is at telling right answers from wrong ones: ranking, calibration, abstention, choosing.

1. AUROC: chance that a right answer scores above a wrong one, ties counting half (Mann-Whitney); AUPRC. From ranks and
   sums: scikit-learn gives the same and takes ten times as long, in thousands of draws.
2. Expected calibration error (Naeini et al. 2015): ten equal bins of probability, mean |accuracy - confidence|.
3. Risk and coverage (El-Yaniv & Wiener 2010): of the share c of answers with the highest scores, the share that is
   wrong; its mean over c is the area under the risk-coverage curve (smaller is better).
4. Choosing among the K readouts of a problem: highest score, majority vote.

Knows arrays alone.
"""

from collections.abc import Sequence

import numpy as np
from scipy.stats import rankdata

CALIBRATION_BINS = 10


def auroc(scores: np.ndarray, right: np.ndarray) -> float:
    """AUROC of scores for outcomes `right` (same shape, any); NaN where all outcomes are alike."""
    rank, right = rankdata(scores), np.ravel(right).astype(bool)
    hits, misses = int(right.sum()), int((~right).sum())
    return float((rank[right].sum() - hits * (hits + 1) / 2) / (hits * misses)) if hits and misses else float("nan")


def average_precision(scores: np.ndarray, right: np.ndarray) -> float:
    """AUPRC: the mean precision at every right answer [n] from the highest score down; NaN where none is right."""
    hits, taken = _by_score(scores, right)
    return float((hits.cumsum() / taken.cumsum() * hits).sum() / hits.sum()) if hits.any() else float("nan")


def calibration_error(probability: np.ndarray, right: np.ndarray) -> float:
    """Expected calibration error of probabilities in 0..1, which scikit-learn lacks."""
    probability, right = np.ravel(probability), np.ravel(right)
    bins = np.minimum((probability * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    gaps = np.bincount(bins, weights=probability - right, minlength=CALIBRATION_BINS)
    return float(np.abs(gaps).sum() / len(right))


def risk_area(scores: np.ndarray, right: np.ndarray) -> float:
    """Area under the risk-coverage curve, 0 to 1; equal scores are taken in together."""
    hits, taken = _by_score(scores, right)
    return float((1 - hits.cumsum() / taken.cumsum()) @ taken / taken.sum())


def _by_score(scores: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Right answers, and answers, at every score that occurs, the highest first."""
    _, place, taken = np.unique(-np.asarray(scores), return_inverse=True, return_counts=True)
    return np.bincount(place.ravel(), weights=np.ravel(right)), taken


def agreement(values: Sequence[Sequence[str | None]]) -> np.ndarray:
    """Share of a problem's readouts that give the same value as readout k, [n, K]; 0 where it gives none."""
    return np.array([[0 if value is None else row.count(value) / len(row) for value in row] for row in values], float)


def majority(values: Sequence[Sequence[str | None]]) -> np.ndarray:
    """For every problem the latest block whose value most readouts give, index [n]; no value is no vote."""
    votes = agreement(values)
    return votes.shape[1] - 1 - votes[:, ::-1].argmax(axis=1)
