"""How good a score is at telling right answers from wrong ones: ranking, calibration, abstention, choosing.

1. AUROC: chance that a right answer scores above a wrong one, ties counting half (Mann-Whitney).
2. AUPRC: average precision, the mean precision at every right answer from the highest score down.
3. Expected calibration error (Naeini et al. 2015): ten equal bins of probability, mean |accuracy - confidence|.
4. Risk and coverage (El-Yaniv & Wiener 2010): of the share c of answers with the highest scores, the share that is
   wrong; its mean over c is the area under the risk-coverage curve (smaller is better).
5. Choosing among the K readouts of a problem: highest score, majority vote.

Scores are turned into integer ranks once, so that a bootstrap draw costs counting and no sorting. Knows arrays alone.
"""

from collections.abc import Sequence

import numpy as np

from rim_probe.probing.section import Estimate, bootstrap

CALIBRATION_BINS = 10
DRAWS = 500


def ranks(scores: np.ndarray) -> np.ndarray:
    """Integer ranks of the scores (any shape), ties equal; order and ties are all the ranking measures need."""
    return np.unique(scores, return_inverse=True)[1].reshape(np.shape(scores))


def auroc(rank: np.ndarray, right: np.ndarray) -> float:
    """AUROC of integer ranks for outcomes `right` (same shape); NaN where all outcomes are alike."""
    hits, misses = _counts(rank, right)
    pairs = hits.sum() * misses.sum()
    return float((hits * (misses.cumsum() - misses / 2)).sum() / pairs) if pairs else float("nan")


def average_precision(rank: np.ndarray, right: np.ndarray) -> float:
    """AUPRC with `right` as the positive class; NaN where nothing is right."""
    hits, misses = (counts[::-1] for counts in _counts(rank, right))
    total = hits.sum()
    if not total:
        return float("nan")
    precision = hits.cumsum() / np.maximum(hits.cumsum() + misses.cumsum(), 1)
    return float((precision * hits).sum() / total)


def risk_area(rank: np.ndarray, right: np.ndarray) -> float:
    """Area under the risk-coverage curve, 0 to 1; equal scores are taken in together."""
    hits, misses = (counts[::-1] for counts in _counts(rank, right))
    taken = hits + misses
    risk = misses.cumsum() / np.maximum(taken.cumsum(), 1)
    return float((risk * taken).sum() / taken.sum())


def calibration_error(probability: np.ndarray, right: np.ndarray) -> float:
    """Expected calibration error of probabilities in 0..1."""
    probability, right = np.ravel(probability), np.ravel(right)
    bins = np.minimum((probability * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    gaps = np.bincount(bins, weights=probability - right, minlength=CALIBRATION_BINS)
    return float(np.abs(gaps).sum() / len(right))


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
    return bootstrap((ranks(scores), right), auroc, seed=seed, draws=DRAWS)


def auroc_difference(scores: np.ndarray, other: np.ndarray, right: np.ndarray, seed: int = 0) -> Estimate:
    """AUROC of `scores` minus that of `other` on the same problems, with a paired bootstrap interval."""
    return bootstrap(
        (ranks(scores), ranks(other), right),
        lambda first, second, outcome: auroc(first, outcome) - auroc(second, outcome),
        seed=seed,
        draws=DRAWS,
    )


def _counts(rank: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Right and wrong answers by rank."""
    rank, right = np.ravel(rank), np.ravel(right).astype(bool)
    size = int(rank.max()) + 1
    taken = np.bincount(rank, minlength=size)
    hits = np.bincount(rank[right], minlength=size)
    return hits, taken - hits
