"""The tuned lens in few numbers: translators of low rank, for models whose whole ones would be too large to ship.

Method:
1. A translator A [d, d] of a layer becomes `A V V'`, V [d, r] being the leading right singular vectors of `X A` over
   the states X that it was fitted on: of all matrices of rank r the one that moves these states most nearly as A does.
   The factors `A V` and `V'` are rounded to 8 bits (`compact`).
2. One rank serves all layers: the smallest of `RANKS` whose mean KL on "choose" exceeds that of the whole translators
   by at most `TOLERATED` of it; else the largest. What is kept is used from then on, so that what is reported is what
   is stored.

Knows matrices. Knows nothing of models.
"""

import numpy as np

from rim_probe.probing.compact import packed, rounded, unpacked

RANKS = (8, 16, 24)
TOLERATED = 0.02
_NAMES = ("left", "right")


def factors(weight: np.ndarray, states: np.ndarray) -> np.ndarray:
    """The rounded factors of a translator [d, d] at the largest rank, [2, r, d]: `left[:k].T @ right[:k]` is the one
    of rank k."""
    moved = states.astype(np.float64) @ weight
    _, vectors = np.linalg.eigh(moved.T @ moved)
    right = vectors[:, ::-1][:, : RANKS[-1]].T.astype(np.float32)
    return np.stack([rounded(right @ weight.T), rounded(right)])


def of_rank(pair: np.ndarray, rank: int) -> np.ndarray:
    """The translator [d, d] of factors [2, r, d] at a rank."""
    left, right = pair[:, :rank]
    return left.T @ right


def choose_rank(whole: float, kl: dict[int, float]) -> int:
    """The rank by the rule of step 2, from the KL of the whole translators and that of every rank."""
    good = [rank for rank in RANKS if kl[rank] <= whole * (1 + TOLERATED)]
    return good[0] if good else RANKS[-1]


def stored(pairs: np.ndarray) -> dict[str, np.ndarray]:
    """Factors [layers, 2, r, d] as tensors."""
    return packed(_NAMES[0], pairs[:, 0]) | packed(_NAMES[1], pairs[:, 1])


def restored(tensors) -> np.ndarray | None:
    """The factors that `stored` was given; None where the translators were stored whole."""
    if _NAMES[0] not in tensors:
        return None
    return np.stack([unpacked(tensors, name) for name in _NAMES], axis=1)
