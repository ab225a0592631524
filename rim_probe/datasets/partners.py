"""Interchange partners in the procedural world: other chains told in the same words, and what follows from them.

Knows chains and their splits. Knows nothing about models or memory blocks. A problem, its partner, and what follows
where one takes over a result of the other, are all of one split: training shows no chain that is kept for testing.
"""

import random
import re
from collections.abc import Callable, Iterator, Set
from functools import partial

from rim_probe.datasets.arithmetic import Chain, World, belongs, follow, operands, tell, tellings
from rim_probe.problems import Problem

_MAX_DRAWS = 200
_STEP = re.compile(r"<<(\d+)([-+*/])(\d+)=(\d+)>>")


class Partners:
    """Partners of the problems that `generate` yields for this world, split and seed."""

    def __init__(self, world: World, split: str, seed: int):
        self._world, self._split, self._seed = world, split, seed

    def each(self, numbers: Set[int]) -> Iterator[tuple[int, Callable[[random.Random, bool], Iterator[Problem]]]]:
        """For chosen problems (0 is the first) their number, and what draws their partners.

        The latter takes a random state, and whether partners shall differ in one number of the chain only. It draws
        without end, or gives up.
        """
        told = tellings(self._world, self._split, max(numbers, default=-1) + 1, self._seed)
        for number, (_, chain, state) in enumerate(told):
            if number in numbers:
                yield number, partial(self._draw, chain, state)

    def interchanged(self, base: Problem, source: Problem, step: int) -> Problem | None:
        """The question of `base` with what follows in it from the result that step t (1-based) has in `source`.

        The chain is that of `source` up to step t, and goes on with the operations of `base`.

        Returns:
            None where both have the same result there, or the chain leaves the world or belongs to another split.
        """
        own, other = _read(base), _read(source)
        if own.steps[step - 1][2] == other.steps[step - 1][2]:
            return None
        operations = [(op, b) for op, b, _ in (*other.steps[:step], *own.steps[step:])]
        chain = follow(other.start, operations, self._world)
        if chain is None or not belongs(chain, base.question, self._world, self._split):
            return None
        return Problem(base.question, chain.gold_steps(), str(chain.value))

    def _draw(self, chain: Chain, state: tuple, rng: random.Random, one_number: bool) -> Iterator[Problem]:
        teller, failures = random.Random(), 0
        while failures < _MAX_DRAWS:
            failures += 1
            other = (_one_number_changed if one_number else _other_numbers)(chain, self._world, rng)
            if other is None or other == chain:
                continue
            teller.setstate(state)  # the same words
            problem = tell(other, self._world, self._split, teller)
            if belongs(other, problem.question, self._world, self._split):
                failures = 0
                yield problem


def _one_number_changed(chain: Chain, world: World, rng: random.Random) -> Chain | None:
    numbers = [chain.start, *(b for _, b, _ in chain.steps)]
    numbers[rng.randrange(len(numbers))] = rng.randint(1, world.max_value)
    return follow(numbers[0], [(op, b) for (op, _, _), b in zip(chain.steps, numbers[1:], strict=True)], world)


def _other_numbers(chain: Chain, world: World, rng: random.Random) -> Chain | None:
    other = Chain(rng.randint(1, world.max_value))
    for op, _, _ in chain.steps:
        choices = operands(op, other.value, world.max_value)
        if not choices:
            return None
        other = other.then(op, rng.choice(choices))
    return other


def _read(problem: Problem) -> Chain:
    """The chain of a problem of the world, from its steps."""
    read = [_STEP.fullmatch(step) for step in problem.steps]
    return Chain(int(read[0][1]), tuple((step[2], int(step[3]), int(step[4])) for step in read))
