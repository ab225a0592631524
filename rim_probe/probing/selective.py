"""How good a score is at telling right answers from wrong ones: ranking, calibration, abstention, choosing.

1. AUROC: chance that a right answer scores above a wrong one, ties counting half (Mann-Whitney).
2. AUPRC: average precision, the mean precision at every right answer from the highest score down (scikit-learn).
3. Expected calibration error (Naeini et al. 2015): ten equal bins of probability, mean |accuracy - confidence|.
4. Risk and coverage (El-Yaniv & Wiener 2010): of the share c of answers with the highest scores, the share that is
   wrong; its mean over c is the area under the risk-coverage curve (smaller is better).
5. Choosing among the K readouts of a problem: highest score, majority vote.

Knows arrays alone.
"""

from collections.abc import Sequence

import numpy as np
from scipy.stats import rankdata

from rim_probe.probing.section import Estimate, bootstrap

CALIBRATION_BINS = 10
DRAWS = 500


def auroc(scores: np.ndarray, right: np.ndarray) -> float:
    """AUROC of scores for outcomes `right` (same shape, any); NaN where all outcomes are alike.

    From ranks: scikit-learn's `roc_auc_score` gives the same and takes ten times as long, in thousands of draws.
    """
    rank, right = rankdata(scores), np.ravel(right).astype(bool)
    hits, misses = int(right.sum()), int((~right).sum())
    return float((rank[right].sum() - hits * (hits + 1) / 2) / (hits * misses)) if hits and misses else float("nan")


def calibration_error(probability: np.ndarray, right: np.ndarray) -> float:
    """Expected calibration error of probabilities in 0..1, which scikit-learn lacks."""
    probability, right = np.ravel(probability), np.ravel(right)
    bins = np.minimum((probability * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    gaps = np.bincount(bins, weights=probability - right, minlength=CALIBRATION_BINS)
    return float(np.abs(gaps).sum() / len(right))


def risk_area(scores: np.ndarray, right: np.ndarray) -> float:
    """Area under the risk-coverage curve, 0 to 1; equal scores are taken in together."""
    _, place, taken = np.unique(-np.asarray(scores), return_inverse=True, return_counts=True)
    wrong = np.bincount(place.ravel(), weights=~np.asarray(right, dtype=bool).ravel())
    return float((wrong.cumsum() / taken.cumsum() * taken).sum() / taken.sum())


def risk_coverage(scores: np.ndarray, right: np.ndarray, points: int = 50) -> tuple[list[float], list[float]]:
    """Coverages 1/points .. 1 and the accuracy among the answers covered, highest scores first (scores, right: [n])."""
    order = np.argsort(-scores, kind="stable")
    accuracy = right[order].cumsum() / np.arange(1, len(right) + 1)
    coverage = np.arange(1, points + 1) / points
    index = np.maximum(np.ceil(coverage * len(right)).astype(int), 1) - 1
    return coverage.tolist(), accuracy[index].tolist()


def majority(values: Sequence[Sequence[str | None]]) -> np.ndarray:
    """For every problem the latest block whose value most readouts give, index [n]; no value is no vote."""
    chosen = []
    for row in values:
        votes = {value: row.count(value) for value in row if value is not None}
        most = max(votes.values(), default=0)
        chosen.append(
            max((k for k, value in enumerate(row) if value is not None and votes[value] == most), default=len(row) - 1)
        )
    return np.array(chosen)


def agreement(values: Sequence[Sequence[str | None]]) -> np.ndarray:
    """Share of a problem's readouts that give the same value as readout k, [n, K]; 0 where it gives none."""
    return np.array(
        [[0.0 if value is None else row.count(value) / len(row) for value in row] for row in values], dtype=float
    )


def auroc_estimate(scores: np.ndarray, right: np.ndarray, seed: int = 0) -> Estimate:
    """AUROC of scores [n] or [n, K] with its bootstrap interval over problems."""
    return bootstrap((scores, right), auroc, seed=seed, draws=DRAWS)


def auroc_difference(scores: np.ndarray, other: np.ndarray, right: np.ndarray, seed: int = 0) -> Estimate:
    """AUROC of `scores` minus that of `other` on the same problems, with a paired bootstrap interval."""
    return bootstrap(
        (scores, other, right),
        lambda first, second, outcome: auroc(first, outcome) - auroc(second, outcome),
        seed=seed,
        draws=DRAWS,
    )
