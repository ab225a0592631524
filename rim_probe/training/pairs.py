"""Pairs for interchange training: which problems take over each other's results, what follows, and the rows of that.

Knows tokenised problems and random numbers. Knows nothing about weights, recipes or where problems come from.
All pairs are drawn before the first step, by the seed and their places alone.
"""

import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence, Set
from functools import partial
from itertools import islice
from typing import NamedTuple, Protocol

import numpy as np

from rim_probe.equations import Variants, value_bounds
from rim_probe.model import RiM
from rim_probe.packing import Branch, Row, interchange_row, stage1_row
from rim_probe.problems import Problem
from rim_probe.training.rows import row_sizes
from rim_probe.training.tokens import Tokens, tokenise

_TRIED = 20  # partners, for a step


class Alike(Protocol):
    """Where partners come from: `datasets.partners.Partners` or `equations.Variants`."""

    def each(self, numbers: Set[int]) -> Iterator[tuple[int, Callable[[random.Random, bool], Iterator[Problem]]]]:
        """For every problem that has partners its number, and what draws them."""
        ...

    def interchanged(self, base: Problem, source: Problem, step: int) -> Problem | None:
        """The problem whose answer follows when `base` goes on with the source's result of a step."""
        ...


class Pair(NamedTuple):
    """A source for a base problem, and what follows in the worlds (0 source, 1 base) where step t is the other's."""

    source: Problem
    follows: tuple[tuple[int, int, Problem], ...]


def draw_pairs(
    problems: Sequence[Problem],
    numbers: Sequence[int],
    alike: Alike | None,
    share: float,
    one_number_share: float,
    seed: int,
) -> list[Pair | None]:
    """A pair for a share of the places, [rows]; None for the others, and where no pair was found.

    Args:
        numbers: the base of every place, as a number of `problems`.
        alike: where partners come from; None: they are numeric variants among `problems`.
        one_number_share: share of the pairs whose source is to differ from the base in one number only, where it can.
    """
    alike = alike or Variants(problems, value_bounds(problems[i] for i in np.unique(numbers)))
    chance = np.random.default_rng(seed).random((2, len(numbers)))
    paired, one_number = chance[0] < share, chance[1] < one_number_share
    places: dict[int, list[int]] = defaultdict(list)
    for place in np.flatnonzero(paired).tolist():
        places[int(numbers[place])].append(place)
    pairs: list[Pair | None] = [None] * len(numbers)
    for number, draw in alike.each(places.keys()):
        for place in places[number]:
            rng = random.Random(f"{seed}/{place}")
            sources = partial(draw, rng, bool(one_number[place]))
            pairs[place] = _pair(problems[number], sources, alike.interchanged, rng)
    return pairs


def _pair(base: Problem, sources: Callable, interchanged: Callable, rng: random.Random) -> Pair | None:
    """The step is drawn first and its source then, or early steps, which fewer sources allow, would be rare."""
    steps = range(1, len(base.steps) + 1)
    for step in rng.sample(steps, len(steps)):
        for source in islice(sources(), _TRIED):
            if follows := interchanged(base, source, step):
                back = ((0, t, interchanged(source, base, t)) for t in rng.sample(steps, len(steps)))
                return Pair(source, ((1, step, follows), *islice((b for b in back if b[2]), 1)))
    return None


class PairRows:
    """The rows of pairs, but for those that do not fit into the model's context.

    Args:
        tokens: of the problems that `numbers` number.
        numbers, pairs: the base and the pair of every place, see `draw_pairs`.
        num_blocks, label_slots: as in `packing.stage1_row`.

    Attributes:
        lengths: tokens of the row of each place, 0 where there is none, [rows].
    """

    def __init__(
        self,
        rim: RiM,
        tokens: Tokens,
        numbers: Sequence[int],
        pairs: Sequence[Pair | None],
        num_blocks: int,
        label_slots: bool,
        report: Callable[[str], None],
    ):
        self._bases, self._numbers, self._pairs = tokens, numbers, pairs
        self._make = partial(stage1_row, num_blocks=num_blocks, label_slots=label_slots)
        self._num_slots = rim.layout.slots_per_block
        told = [[pair.source, *(problem for _, _, problem in pair.follows)] if pair else [] for pair in pairs]
        self._ends = np.cumsum([len(problems) for problems in told])
        self._told = tokenise(rim.encoder, [problem for problems in told for problem in problems], report)
        self.lengths = self._lengths(num_blocks, rim.max_length)

    def row(self, place: int) -> Row | None:
        """The row of a place, or None where there is none."""
        if not self.lengths[place]:
            return None
        source, *follows = (self._make(self._told, self._told[i]) for i in self._told_at(place))
        base = self._make(self._bases, self._bases[int(self._numbers[place])])
        branches = [Branch(w, t, row) for (w, t, _), row in zip(self._pairs[place].follows, follows, strict=True)]
        return interchange_row((source, base), branches, self._num_slots)

    def _told_at(self, place: int) -> range:
        """Where the source of a pair and what follows stand among what was tokenised for pairs."""
        end = int(self._ends[place])
        return range(end - len(self._pairs[place].follows) - 1, end)

    def _lengths(self, num_blocks: int, max_length: int) -> np.ndarray:
        bases, told = (row_sizes(tokens, "stage1", num_blocks) for tokens in (self._bases, self._told))
        prefix, block = len(self._told.prefix_ids), len(self._told.block_ids)
        usable = self._told.known & self._told.askable
        lengths = np.zeros(len(self._pairs), dtype=np.int64)
        for place, pair in enumerate(self._pairs):
            if pair is None:
                continue
            source, *follows = self._told_at(place)
            base = int(self._numbers[place])
            questions = prefix + np.array([self._told.questions.lengths[source], self._bases.questions.lengths[base]])
            rest = np.array([told.ends[source], bases.ends[base], *told.ends[follows]])
            rest -= questions[[0, 1, *(w for w, _, _ in pair.follows)]]
            if not usable[source] or questions.max() + rest.max() > max_length:
                continue
            lengths[place] = told.lengths[source] + bases.lengths[base]
            for i, (w, t, _) in zip(follows, pair.follows, strict=True):
                before = self._told.steps.lengths[list(self._told[i].steps[1:t])].sum()  # readouts 1 to t - 1
                lengths[place] += told.lengths[i] - (questions[w] + t * block - 1 + before)
        return lengths
