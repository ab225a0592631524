"""Nearest explicit step: which step of a reasoning does a memory block lie nearest to?

A step s is read by the memory model itself from plain text: h(s | c) is the residual stream, at one layer, at the last
token of s in the context c (a question and the true steps before). Then

    r(s | c) = h(s | c) - mean over references q of h(q | c)     what s adds to its context          `read_places`
    v(s)     = (mean over contexts c of r(s | c) - o) W          a step's vector: centred, whitened  `step_space`
    y        = x A + a                                           ridge from a block's states x       `StepMap.fit`
    D        : cov(y) D = cov(v - y) D L, the greatest L first   directions that the map tells well  `StepMap.fit`
    cos(x,s) = <y D, v(s) D> / |y D| |v(s) D|                    the nearest step of a bank          `StepMap.cosines`
    u        = sum over the bank of softmax(B cos(x, s)) v(s)    what x recalls from the bank        `StepMap.recalled`
    cos(u, (r(s | c) - o) W)                                     the nearest of any other steps      `Candidates.ranks`

Why each part is there, and what it adds, is measured in docs/nearest-step.md:
- References are the same steps everywhere. (Not the candidates themselves: hard distractors are made from the true
  step, which is the middle of them, so that who knows a part of it could tell it from the others.)
- A model that reads "3+4=8" knows that it is wrong, which is no knowledge of any memory; so v(s) is the mean over all
  places where s was read, as the true step or as a wrong one.
- D are the directions of canonical correlation (Hotelling 1936), weighted by what the map explains against what it
  misses. Recall is one update of a modern Hopfield network (Ramsauer et al. 2020, arXiv:2008.02217): it brings in what
  all steps of the bank share, as that equations hold.

Knows steps, states and linear algebra. Knows nothing of studies, splits or blocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from rim_probe.equations import distractors
from rim_probe.model import RiM
from rim_probe.probing.linear import Inputs, LinearMap
from rim_probe.probing.rows import Row, read_rows
from rim_probe.problems import STEP_SEPARATOR, Problem

DISTRACTORS = 20
REFERENCES = 8
RIDGE = 1e-3  # per problem: inputs have variance 1
DIRECTIONS = 32
SHARPNESS = 32.0  # B of the recall
_SHRINKAGE = 3e-4  # of the whitening and of cov(v - y), times their mean variance
_TINY = 1e-9


def read_steps(
    rim: RiM, asked: Sequence[tuple[str, Sequence[str], Sequence[str]]], layers: Sequence[int]
) -> list[np.ndarray]:
    """h(s | c) for every question, its true steps before and the texts s to be read there: float32 [texts, layers, d].

    Raises:
        QuestionError: one that goes beyond the model's context.
    """
    rows = []
    for question, before, texts in asked:
        # Every step is tokenised on its own, so that it has the same tokens whatever stands beside it.
        ids = rim.encode_question(question)
        for t, step in enumerate(before):
            ids = ids + rim.encode_text((STEP_SEPARATOR if t else "") + step)
        separator = STEP_SEPARATOR if before else ""
        rows.append(Row(ids, (), [(len(ids), rim.encode_text(separator + text)) for text in texts]))
    return read_rows(rim, rows, layers)


# -------------------------------------------------------------------------------------------------------------- places


@dataclass(frozen=True)
class Place:
    """Step `step` (1-based) of problem number `problem`, and the texts to be read there, all different: the true step,
    the problem's other steps, hard distractors."""

    problem: int
    step: int
    texts: tuple[str, ...]


def places_of(
    problems: Sequence[Problem],
    numbers: Sequence[int],
    others: Sequence[str],
    rng: np.random.Generator,
    count: int = DISTRACTORS,
) -> list[Place]:
    """Every place of the problems `numbers`, with `count` distractors beside the problem's own steps.

    Args:
        others: steps to fill up with, at random, where a step has too few hard distractors (or is no equation).
    """
    places = []
    for number in numbers:
        own = problems[number].steps
        for t, step in enumerate(own, start=1):
            texts = dict.fromkeys([step, *own])
            wanted = len(texts) + count
            texts |= dict.fromkeys(str(text) for text in distractors(step, count, rng, own=own))
            if len(texts) < wanted:
                texts |= dict.fromkeys(others[i] for i in rng.permutation(len(others))[: 2 * wanted])
            places.append(Place(number, t, tuple(texts)[:wanted]))
    return places


def read_places(
    rim: RiM, problems: Sequence[Problem], places: Sequence[Place], references: Sequence[str], layer: int
) -> list[np.ndarray]:
    """r(s | c) of each place's texts: their states less the mean of the references read there, float32 [texts, d]."""
    asked = []
    for place in places:
        problem = problems[place.problem]
        asked.append((problem.question, problem.steps[: place.step - 1], (*place.texts, *references)))
    states = (held[:, 0] for held in read_steps(rim, asked, [layer]))
    return [held[: -len(references)] - held[-len(references) :].mean(0) for held in states]


# ----------------------------------------------------------------------------------------------------------- the space


@dataclass(frozen=True)
class StepSpace:
    """Whitened step vectors.

    Attributes:
        origin [d], whitening [d, d]: o and W of the formula.
        vectors: text -> v(s) [d].
    """

    origin: np.ndarray
    whitening: np.ndarray
    vectors: Mapping[str, np.ndarray]

    def whitened(self, read: np.ndarray) -> np.ndarray:
        """(r - o) W."""
        return (read - self.origin) @ self.whitening

    def matrix(self, texts: Sequence[str]) -> np.ndarray:
        """v of `texts`, [n, d]."""
        return np.stack([self.vectors[text] for text in texts])


def step_space(places: Sequence[Place], read: Sequence[np.ndarray]) -> StepSpace:
    """The space of what `read_places` made of `places`: o is the mean of the true steps, W whitens all readings."""
    texts = {text: i for i, text in enumerate(dict.fromkeys(text for place in places for text in place.texts))}
    number = np.array([texts[text] for place in places for text in place.texts])
    states = np.concatenate(read)
    means = np.zeros((len(texts), states.shape[1]), np.float32)
    np.add.at(means, number, states)
    means /= np.bincount(number)[:, None]
    true = {place.texts[0] for place in places}
    origin = means[[text in true for text in texts]].mean(0)
    values, vectors = np.linalg.eigh(_covariance(states))
    whitening = (vectors / np.sqrt(values)).astype(np.float32)
    return StepSpace(origin, whitening, dict(zip(texts, (means - origin) @ whitening, strict=True)))


def _covariance(states: np.ndarray) -> np.ndarray:
    """Shrunk a little towards a multiple of the identity; a layer that knows nothing yet has no variance at all."""
    covariance = np.cov(states, rowvar=False).astype(np.float64)
    return covariance + (_SHRINKAGE * np.trace(covariance) / len(covariance) + _TINY) * np.eye(len(covariance))


# ------------------------------------------------------------------------------------------------------------- the map


@dataclass(frozen=True)
class StepMap:
    """From a cell's states to steps.

    Attributes:
        to_directions: x -> y D, [F] -> [q].
        keys: D [d, q].
    """

    to_directions: LinearMap
    keys: np.ndarray

    @classmethod
    def fit(cls, inputs: Inputs, rows: np.ndarray, targets: np.ndarray) -> StepMap:
        """Ridge regression to the vectors of the true steps (Hoerl and Kennard 1970), and its best directions.

        Args:
            inputs: the cell's states; rows [n]: those to fit on; targets [n, d]: v of their steps.
        """
        from scipy.linalg import eigh
        from sklearn.linear_model import Ridge

        model = Ridge(alpha=RIDGE * len(rows))
        mapped = inputs.fit(model, targets, rows)
        predicted = model.predict(inputs.fitted[rows])
        explained, missed = np.cov(predicted, rowvar=False), _covariance(targets - predicted)
        keys = eigh(explained, missed)[1][:, ::-1][:, :DIRECTIONS].astype(np.float32)
        return cls(LinearMap(mapped.weights @ keys, mapped.bias @ keys), keys)

    def cosines(self, states: np.ndarray, vectors: np.ndarray) -> np.ndarray:
        """States [n, F] against steps [B, d] -> [n, B]."""
        return unit(self.to_directions(states)) @ unit(vectors @ self.keys).T

    def recalled(self, states: np.ndarray, vectors: np.ndarray) -> np.ndarray:
        """What states [n, F] recall from the steps of a bank [B, d] -> [n, d]."""
        cosines = self.cosines(states, vectors)
        weights = np.exp(SHARPNESS * (cosines - cosines.max(1, keepdims=True)))
        return weights / weights.sum(1, keepdims=True) @ vectors


def unit(vectors: np.ndarray) -> np.ndarray:
    """Vectors of length one along the last axis; zeros stay zeros."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), _TINY)


# ----------------------------------------------------------------------------------------------------------- retrieval


@dataclass(frozen=True)
class Bank:
    """Distinct steps to retrieve from: texts and their vectors [B, d]."""

    texts: tuple[str, ...]
    vectors: np.ndarray

    def ranks(self, mapped: StepMap, states: np.ndarray, texts: Sequence[str]) -> np.ndarray:
        """The rank of each state's true step, [n], 0 is the nearest; NaN where the bank lacks it."""
        number = {text: i for i, text in enumerate(self.texts)}
        own = np.array([number.get(text, -1) for text in texts])
        ranks, known = np.full(len(texts), np.nan), own >= 0
        if known.any():
            cosines = mapped.cosines(states[known], self.vectors)
            ranks[known] = ranks_of(cosines, cosines[np.arange(len(cosines)), own[known]])
        return ranks


@dataclass(frozen=True)
class Candidates:
    """Places of one step index, ready for retrieval.

    Attributes:
        rows [n]: problem numbers.
        vectors [n, C, d]: whitened readings of the candidates, the true one first, zeros beyond `counts`.
        counts [n]: candidates of each place.
        texts [n]: the true steps.
    """

    rows: np.ndarray
    vectors: np.ndarray
    counts: np.ndarray
    texts: list[str]

    @classmethod
    def at(cls, step: int, places: Sequence[Place], read: Sequence[np.ndarray], space: StepSpace) -> Candidates:
        """The places of step `step`; those without any other candidate are left out."""
        own = [(place, held) for place, held in zip(places, read, strict=True) if place.step == step and len(held) > 1]
        counts = np.array([len(held) for _, held in own], dtype=int)
        vectors = np.zeros((len(own), counts.max(initial=1), len(space.origin)), np.float32)
        for i, (_, held) in enumerate(own):
            vectors[i, : len(held)] = space.whitened(held)
        rows = np.array([place.problem for place, _ in own], dtype=int)
        return cls(rows, vectors, counts, [place.texts[0] for place, _ in own])

    @cached_property
    def _directions(self) -> np.ndarray:
        return unit(self.vectors)  # once for hundreds of cells

    def ranks(self, recalled: np.ndarray) -> np.ndarray:
        """How many candidates lie nearer to each [n, d] than the true one, [n]."""
        cosines = np.einsum("nd,ncd->nc", unit(recalled), self._directions)
        cosines[np.arange(cosines.shape[1]) >= self.counts[:, None]] = -np.inf
        return ranks_of(cosines, cosines[:, 0])


def ranks_of(scores: np.ndarray, own: np.ndarray) -> np.ndarray:
    """How many scores [n, C] exceed each row's own [n]; others that equal it count half, so that what says nothing is
    no better than chance."""
    above, equal = (scores > own[:, None]).sum(1), (scores == own[:, None]).sum(1)
    return above + (equal - 1) / 2
