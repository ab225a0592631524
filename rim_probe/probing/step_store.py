"""The nearest-step maps and their bank in few numbers, for models whose whole ones would be too large to ship.

Method:
1. A map compares `states @ weights + bias` with `(vectors - origin) @ keys` in q dimensions. Both are turned into the
   leading r right singular vectors of what the map predicts on "fit": of all r dimensions those that hold most of it.
2. The bank is turned into the leading R directions of all maps' keys together, which are all that a map looks at.
3. Weights and bank are rounded to 8 bits (`compact`). Kept are the maps of the first `MOST_STEPS` steps and the
   `MOST_TEXTS` most frequent steps of the bank.
4. (r, R) is the first of `FORMS` whose mean top-1 in the bank on "choose" falls short of that of the whole maps in the
   whole bank by at most `TOLERATED`; else the last one. A step of the whole bank that is not stored counts as missed.
   Both are told in the report.

Knows maps and banks. Knows nothing of models or of how a map was found.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rim_probe.probing.compact import is_large, packed, rounded
from rim_probe.probing.step_maps import Bank, LinearMap
from rim_probe.probing.step_space import share_within

FORMS = ((8, 64), (12, 96), (16, 96))
TOLERATED = 0.01
MOST_STEPS = 5
MOST_TEXTS = 8_000
Maps = Mapping[tuple[int, int], LinearMap]  # by (block, step)


@dataclass(frozen=True)
class Asked:
    """What a map is tried on: its cell's states on "fit" [n, F] and "choose" [m, F], and the true steps of "choose"."""

    fit: np.ndarray
    choose: np.ndarray
    texts: Sequence[str]


@dataclass(frozen=True)
class Stored:
    """Maps and a bank in few numbers.

    Attributes:
        top1: (block, step) -> top-1 in this bank on "choose", of the steps that it holds.
        coverage: (block, step) -> the share of the problems of "choose" with that step whose step it holds.
        told: the form and what it costs, for the report.
    """

    bank: Bank
    maps: dict[tuple[int, int], LinearMap]
    top1: dict[tuple[int, int], float]
    coverage: dict[tuple[int, int], float]
    told: dict[str, object]


def too_large(bank: Bank, maps: Iterable[LinearMap]) -> bool:
    """Whether they cannot be stored as they are."""
    return is_large([bank.vectors, *(array for one in maps for array in (one.weights, one.keys))])


def compacted(bank: Bank, maps: Maps, asked: Mapping[tuple[int, int], Asked], counts: Counter) -> Stored:
    """The stored form of maps and bank.

    Args:
        counts: how often each step occurs in "fit".
    """
    maps = {at: one for at, one in maps.items() if at[1] <= MOST_STEPS}
    whole = {at: bank.ranks(one, asked[at].choose, asked[at].texts) for at, one in maps.items()}
    order = sorted(range(len(bank.texts)), key=lambda i: -counts[bank.texts[i]])[:MOST_TEXTS]
    bank = Bank(tuple(bank.texts[i] for i in sorted(order)), bank.vectors[sorted(order)])
    for form in FORMS:
        small_bank, small = _in_form(bank, maps, asked, *form)
        ranks = {at: small_bank.ranks(one, asked[at].choose, asked[at].texts) for at, one in small.items()}
        reached, goal = _mean_top1(with_missed(ranks[at], whole[at]) for at in maps), _mean_top1(whole.values())
        if reached >= goal - TOLERATED:
            break
    top1 = {at: share_within(own, 1) for at, own in ranks.items()}
    coverage = {at: small_bank.share_of(asked[at].texts) for at in maps}
    told = {
        "form": f"{form[0]} dimensions a map, {form[1]} of the bank, 8 bits a number",
        "steps of the bank": len(bank.texts),
        "maps": f"{len(maps)}, of the first {MOST_STEPS} steps",
        "mean top-1 in the bank on choose, as stored": reached,
        "mean top-1 in the bank on choose, whole": goal,
    }
    return Stored(small_bank, small, top1, coverage, told)


def with_missed(ranks: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Ranks in the stored bank; a step that only the whole bank holds is ranked behind everything."""
    return np.where(np.isnan(ranks) & ~np.isnan(whole), np.inf, ranks)


def _mean_top1(ranks: Iterable[np.ndarray]) -> float:
    return float(np.mean([share_within(own, 1) for own in ranks]))


def _in_form(
    bank: Bank, maps: Maps, asked: Mapping[tuple[int, int], Asked], dimensions: int, bank_dimensions: int
) -> tuple[Bank, dict[tuple[int, int], LinearMap]]:
    turned = {at: _leading(one, asked[at].fit, dimensions) for at, one in maps.items()}
    keys = np.concatenate([one.keys / max(np.linalg.norm(one.keys), 1e-12) for one in turned.values()], axis=1)
    _, vectors = np.linalg.eigh((keys @ keys.T).astype(np.float64))
    basis = vectors[:, ::-1][:, :bank_dimensions].astype(np.float32)
    small = {
        at: LinearMap(rounded(one.weights), one.bias, rounded(basis.T @ one.keys), one.origin @ basis)
        for at, one in turned.items()
    }
    return Bank(bank.texts, rounded(bank.vectors @ basis)), small


def _leading(one: LinearMap, states: np.ndarray, dimensions: int) -> LinearMap:
    predicted = one.predict(states).astype(np.float64)
    _, vectors = np.linalg.eigh(predicted.T @ predicted)
    turn = vectors[:, ::-1][:, :dimensions].astype(np.float32)
    return LinearMap(one.weights @ turn, one.bias @ turn, one.keys @ turn, one.origin)


def tensors(bank: Bank, maps: Maps, small: bool) -> dict[str, np.ndarray]:
    """Bank and maps as arrays; those in few numbers in 8 bits."""
    arrays = packed("bank", bank.vectors) if small else {"bank": bank.vectors}
    for (block, step), one in maps.items():
        start = f"{block}.{step}."
        for name in ("weights", "keys"):
            array = getattr(one, name)
            arrays |= packed(start + name, array) if small else {start + name: array}
        arrays |= {start + name: getattr(one, name) for name in ("bias", "origin")}
    return arrays
