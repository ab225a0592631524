"""Variants: problems told in the same words with other numbers, and what follows where one takes a result of another.

Method (interchange intervention, Geiger et al., arXiv:2112.00826):
1. Two problems are variants if their questions and steps are equal once every number is masked (in a question also
   number words, so that "three dogs" and "four dogs" are).
2. With base b, source s and a step t whose results differ, b goes on with the result of s: the steps up to t are those
   of s, every later step of b that depends on step t is computed anew.
3. That is kept if every result stays of its kind (whole, positive) and within the values a model has seen.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence, Set
from fractions import Fraction
from functools import lru_cache, partial

from rim_probe.equations.chains import NUMBER_IN_QUESTION, NUMBER_WORD, Chain
from rim_probe.equations.counterfactuals import exact_chain, plausible
from rim_probe.equations.reading import NUMBER
from rim_probe.problems import Problem

_MASK = "#"
_IN_QUESTION = re.compile(f"{NUMBER_IN_QUESTION.pattern}|{NUMBER_WORD.pattern}", re.IGNORECASE)
_IN_STEP = re.compile(NUMBER)


def masked(problem: Problem) -> tuple[str, ...]:
    """Question and steps with every number masked: equal for variants."""
    return _IN_QUESTION.sub(_MASK, problem.question), *(_IN_STEP.sub(_MASK, step) for step in problem.steps)


def differing(first: Problem, second: Problem) -> int:
    """In how many numbers of their questions two variants differ."""
    pairs = zip(_numbers(first.question), _numbers(second.question), strict=True)
    return sum(one != other for one, other in pairs)


class Variants:
    """Problems grouped by their masked text.

    Args:
        bounds: least and largest value of new results (`value_bounds`).
    """

    def __init__(self, problems: Sequence[Problem], bounds: tuple[Fraction, Fraction]):
        self._problems, self._bounds = problems, bounds
        self._groups: dict[tuple[str, ...], list[int]] = {}
        for number, problem in enumerate(problems):
            self._groups.setdefault(masked(problem), []).append(number)
        self._chain = lru_cache(maxsize=2**10)(exact_chain)  # a group is asked about in a row

    def each(self, numbers: Set[int]) -> Iterator[tuple[int, Callable[[random.Random, bool], Iterator[Problem]]]]:
        """For chosen problems (0 is the first) their number, and what draws their variants.

        The latter takes a random state, and whether variants shall differ in one number of the question only. It gives
        all there are: first those that differ as asked, then the others.
        """
        for number in sorted(numbers):
            yield number, partial(self._draw, number)

    def _draw(self, number: int, rng: random.Random, one_number: bool) -> Iterator[Problem]:
        problem, later = self._problems[number], []
        group = self._groups[masked(problem)]
        for other in rng.sample(group, len(group)):
            count = differing(problem, self._problems[other])
            if count and (count == 1) == one_number:
                yield self._problems[other]
            elif count:
                later.append(self._problems[other])
        yield from later

    def interchanged(self, base: Problem, source: Problem, step: int) -> Problem | None:
        """The question of `base` with the steps and the answer that follow where step t has the result of `source`.

        Returns:
            None where the results are equal, one of the problems is no chain of exact equations, or what follows is not
            plausible (see `counterfactuals.plausible`).
        """
        own, other = self._chain(base), self._chain(source)
        if own is None or other is None or _result(own, step) == _result(other, step):
            return None
        new = own.recomputed(results={step: _result(other, step)})
        if new is None or not plausible(own, new, self._bounds):
            return None
        return Problem(base.question, source.steps[:step] + new.steps[step:], new.answer)


def _result(steps: Chain, step: int) -> Fraction:
    return steps.equations[step - 1].result.value


def _numbers(question: str) -> list[str]:
    return [match.group() for match in _IN_QUESTION.finditer(question)]
