"""The space of explicit steps: they lie by what they say, not by whether they are right or what the question was.

Method:
1. A place is a step of a problem; its candidates are the step itself, the problem's other steps and hard distractors
   (`equations.distractors`), all read in the same context: the question and the true steps before (`bank`).
2. What a model makes of a step also depends on the context. Therefore `REFERENCES` steps, the same everywhere, are read
   in every place, and each candidate is taken relative to their mean. (Not relative to the mean of the candidates:
   all hard distractors are made from the true step, which is the middle of them and would lie near zero; who knows any
   part of it could then tell it from the others.)
3. A model that reads "3+4=8", or a step that does not belong here, knows that it is wrong. That is no knowledge of any
   memory. Therefore a step is represented by the mean over all places it was read in, as the true step and as a wrong
   one alike.
4. The vectors are taken relative to the mean of all true steps and whitened with the covariance of the readings,
   slightly shrunk towards a multiple of the identity (for which `SHRINKAGE` of the mean variance suffices: there are
   many more readings than dimensions).

Knows steps, places and linear algebra. Knows nothing of memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from rim_probe.equations import distractors
from rim_probe.model import RiM
from rim_probe.probing.bank import Reading, read_steps
from rim_probe.problems import Problem

DISTRACTORS = 20
FIT_DISTRACTORS = 10
REFERENCES = 8
CONTEXTS = 12  # readings of each distinct step in its true place, where the data has them
SHRINKAGE = 3e-4
_TINY = 1e-9


@dataclass(frozen=True)
class Place:
    """Step `step` (1-based) of problem number `problem`.

    Attributes:
        candidates: different texts, the true one first.
        guests: other texts that are read here, too, because they have no place of their own.
    """

    problem: int
    step: int
    candidates: tuple[str, ...]
    guests: tuple[str, ...] = ()

    @property
    def texts(self) -> tuple[str, ...]:
        return self.candidates + self.guests


def distinct_steps(problems: Sequence[Problem]) -> list[str]:
    """Every step's text once, in order of appearance."""
    return list(dict.fromkeys(step for problem in problems for step in problem.steps))


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
    return [
        Place(number, t, _candidates(problems[number].steps, step, others, rng, count))
        for number in numbers
        for t, step in enumerate(problems[number].steps, start=1)
    ]


def _candidates(
    own: Sequence[str], step: str, others: Sequence[str], rng: np.random.Generator, count: int
) -> tuple[str, ...]:
    found = dict.fromkeys([step, *own])
    wanted = len(found) + count
    found |= dict.fromkeys(str(text) for text in distractors(step, count, rng, own=own))
    if len(found) < wanted:
        for i in rng.permutation(len(others)):
            found[others[i]] = None
            if len(found) == wanted:
                break
    return tuple(found)


def covering(problems: Sequence[Problem], contexts: int, rng: np.random.Generator) -> list[int]:
    """Problems, in random order, in which every distinct step occurs `contexts` times or as often as it can."""
    seen: dict[str, int] = {}
    chosen = []
    for number in rng.permutation(len(problems)):
        steps = problems[number].steps
        if any(seen.get(step, 0) < contexts for step in steps):
            chosen.append(int(number))
            for step in steps:
                seen[step] = seen.get(step, 0) + 1
    return chosen


def draw_references(texts: Sequence[str], rng: np.random.Generator) -> tuple[str, ...]:
    """The steps that are read in every place."""
    return tuple(texts[i] for i in rng.permutation(len(texts))[:REFERENCES])


def read_places(
    rim: RiM, problems: Sequence[Problem], places: Sequence[Place], references: Sequence[str], layers: Sequence[int]
) -> list[np.ndarray]:
    """Each place's texts relative to the mean of the references read there, float32 [texts, len(layers), d]."""
    by_problem: dict[int, list[Place]] = {}
    for place in places:
        by_problem.setdefault(place.problem, []).append(place)
    readings = []
    for number, own in by_problem.items():
        steps = problems[number].steps
        alternatives = {place.step: (*place.texts[1:], *references) for place in own}
        readings.append(
            Reading(problems[number].question, steps, tuple(alternatives.get(t + 1, ()) for t in range(len(steps))))
        )
    states = dict(zip(by_problem, read_steps(rim, readings, layers), strict=True))
    found = []
    for place in places:
        held, count = states[place.problem][place.step - 1], len(place.texts)
        found.append(held[:count] - held[count:].mean(0))
    return found


def with_guests(places: Sequence[Place], texts: Sequence[str], rng: np.random.Generator) -> list[Place]:
    """The places, each of `texts` that none of them has being read in `CONTEXTS` of them (or in all)."""
    known = {text for place in places for text in place.texts}
    guests = tuple(text for text in dict.fromkeys(texts) if text not in known)
    if not guests:
        return list(places)
    chosen = set(rng.permutation(len(places))[:CONTEXTS].tolist())
    return [replace(place, guests=guests) if i in chosen else place for i, place in enumerate(places)]


@dataclass(frozen=True)
class StepSpace:
    """Whitened step vectors at one reading layer.

    Attributes:
        layer: where steps are read.
        references: the steps that every reading is relative to.
        origin [d], whitening [d, d]: `(reading - origin) @ whitening` is a reading in the space.
        vectors: text -> its vector [d].
    """

    layer: int
    references: tuple[str, ...]
    origin: np.ndarray
    whitening: np.ndarray
    vectors: Mapping[str, np.ndarray]

    def matrix(self, texts: Sequence[str]) -> np.ndarray:
        """The vectors of `texts`, [n, d]."""
        return np.stack([self.vectors[text] for text in texts])


def step_spaces(
    places: Sequence[Place], read: Sequence[np.ndarray], references: tuple[str, ...], layers: Sequence[int]
) -> list[StepSpace]:
    """One space per layer, from places and what `read_places` made of them at these layers."""
    true = {place.candidates[0] for place in places}
    texts = {text: i for i, text in enumerate(dict.fromkeys(text for place in places for text in place.texts))}
    labels = np.array([texts[text] for place in places for text in place.texts])
    states = np.concatenate(read)
    counts = np.bincount(labels)[:, None]
    spaces = []
    for i, layer in enumerate(layers):
        own = states[:, i]
        means = np.zeros((len(texts), own.shape[1]), np.float32)
        np.add.at(means, labels, own)
        means /= counts
        origin, whitening = means[[text in true for text in texts]].mean(0), _whitening(own)
        vectors = dict(zip(texts, (means - origin) @ whitening, strict=True))
        spaces.append(StepSpace(layer, references, origin, whitening, vectors))
    return spaces


def _whitening(states: np.ndarray) -> np.ndarray:
    centred = states - states.mean(0)
    covariance = (centred.T @ centred).astype(np.float64) / len(states)
    # A layer where the last token knows nothing yet has no variance at all.
    covariance += (SHRINKAGE * np.trace(covariance) / len(covariance) + _TINY) * np.eye(len(covariance))
    values, vectors = np.linalg.eigh(covariance)
    return (vectors / np.sqrt(values)).astype(np.float32)


@dataclass(frozen=True)
class Candidates:
    """Places with as many steps before them, ready for retrieval.

    Attributes:
        rows [n]: problem numbers.
        vectors [n, C, d]: whitened candidates, the true one first, zeros beyond `counts`.
        counts [n]: candidates of each place.
        texts [n]: the true steps.
    """

    rows: np.ndarray
    vectors: np.ndarray
    counts: np.ndarray
    texts: list[str]

    @property
    def chance(self) -> np.ndarray:
        """The share of guesses that are right, [n]."""
        return 1 / self.counts

    @cached_property
    def _directions(self) -> np.ndarray:
        return unit(self.vectors)  # once for hundreds of cells

    def ranks(self, predicted: np.ndarray) -> np.ndarray:
        """How many candidates lie nearer (by cosine) to each prediction [n, d] than the true one, [n]; ties count
        half, so that a prediction that says nothing is no better than chance."""
        cosines = np.einsum("nd,ncd->nc", unit(predicted), self._directions)
        cosines[np.arange(cosines.shape[1]) >= self.counts[:, None]] = -np.inf
        return ranks_of(cosines, cosines[:, 0])


def candidates_at(
    step: int, places: Sequence[Place], read: Sequence[np.ndarray], layer_index: int, space: StepSpace
) -> Candidates:
    """The places of step `step` in the space; places without any other candidate are left out."""
    own = [(place, held) for place, held in zip(places, read, strict=True) if place.step == step and len(held) > 1]
    counts = np.array([len(held) for _, held in own], dtype=int)
    vectors = np.zeros((len(own), counts.max(initial=1), len(space.whitening)), np.float32)
    for i, (_, held) in enumerate(own):
        vectors[i, : len(held)] = (held[:, layer_index] - space.origin) @ space.whitening
    rows = np.array([place.problem for place, _ in own], dtype=int)
    return Candidates(rows, vectors, counts, [place.candidates[0] for place, _ in own])


def unit(vectors: np.ndarray) -> np.ndarray:
    """Vectors of length one along the last axis; zeros stay zeros."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), _TINY)


def ranks_of(scores: np.ndarray, own: np.ndarray) -> np.ndarray:
    """How many scores [n, C] exceed each row's own [n]; others that equal it count half."""
    above, equal = (scores > own[:, None]).sum(1), (scores == own[:, None]).sum(1)
    return above + (equal - 1) / 2


def share_within(ranks: np.ndarray, count: int) -> float:
    """Top-`count`: the share of known ranks (0 is the nearest) among the first `count`; 0 where none is known."""
    known = ranks[~np.isnan(ranks)]
    return float((known <= count - 1).mean()) if len(known) else 0.0
