"""Counterfactual partners: the same problem with one number of its question changed, and what must follow.

Method:
1. A number may be changed if it occurs once in the question and enters exactly one operand of the chain, unambiguously.
2. The steps are computed anew with the new number; the partner is kept if every result stays of its kind (whole,
   positive) and within the values a model has seen, and the answer changes.
3. With a second number changed in a later step, the answer that follows from the first change alone is neither the
   original's nor the partner's: a model that merely copies the partner's answer is told from one that holds the step.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from rim_probe.equations.chains import Chain, Recomputed, chain, question_numbers
from rim_probe.equations.reading import number_text, read_equation, replace_spans
from rim_probe.problems import Problem

_MAX_PARTNERS_TRIED = 4000


@dataclass(frozen=True)
class Change:
    """One number of the question changed: the step (1-based) and operand it enters by, and both values."""

    step: int
    operand: int
    old: Fraction
    new: Fraction


@dataclass(frozen=True)
class Partner:
    """A problem that differs from another one in one number of its question, or in two.

    Attributes:
        problem: the partner: question, steps and answer with every change made.
        change: the number whose effect is followed.
        second: a further number changed in a later step, or None.
        predicted: the original's answer if its step `change.step` alone had the partner's result. Without a second
            change this is the partner's own answer; with one it is neither the original's nor the partner's.
    """

    problem: Problem
    change: Change
    second: Change | None
    predicted: str

    @property
    def step(self) -> int:
        """The step in which the changed number enters."""
        return self.change.step


def value_bounds(problems: Iterable[Problem]) -> tuple[Fraction, Fraction]:
    """The least and the largest number in the questions and steps of `problems`: what a model has seen.

    (0, 0) where there is no number.
    """
    values: set[Fraction] = set()
    for problem in problems:
        values |= {number.value for number in question_numbers(problem.question)}
        for equation in filter(None, map(read_equation, problem.steps)):
            values |= {number.value for number in (*equation.operands, equation.result)}
    return (min(values), max(values)) if values else (Fraction(0), Fraction(0))


def counterfactual(
    problem: Problem,
    rng: np.random.Generator,
    bounds: tuple[Fraction, Fraction],
    *,
    step: int | None = None,
    two_numbers: bool = False,
) -> Partner | None:
    """The same problem with one number of its question changed, drawn at random; steps and answer computed anew.

    The number is whole, written in digits, occurs once in the question and enters exactly one operand, unambiguously;
    the new one has as many digits. Neither is 1, which would change singular and plural. Results that were whole,
    positive or not negative stay so and lie within `bounds`; the answer changes.

    Args:
        bounds: least and largest value allowed for new numbers and results (`value_bounds`).
        step: the step the number must enter (1-based); None for any.
        two_numbers: change another number in a later step as well, so that the answer predicted from the first change
            alone is neither the original's nor the partner's.

    Returns:
        None where no such partner exists, the problem's steps are no unambiguous chain of exact equations, or the
        answer is not the last step's result.
    """
    steps = exact_chain(problem)
    if steps is None:
        return None
    changes = _changes(steps, rng, bounds)
    tried = 0
    for first in changes:
        if step is not None and first.step != step:
            continue
        alone = _valid(steps, [first], bounds)
        if alone is None or alone.answer == problem.answer:
            continue
        if not two_numbers:
            return Partner(_changed(steps, [first], alone), first, None, alone.answer)
        for second in changes:
            if second.step <= first.step:
                continue
            tried += 1
            if tried > _MAX_PARTNERS_TRIED:
                return None
            both = _valid(steps, [first, second], bounds)
            if both is not None and both.answer not in (problem.answer, alone.answer):
                return Partner(_changed(steps, [first, second], both), first, second, alone.answer)
    return None


def _changes(steps: Chain, rng: np.random.Generator, bounds: tuple[Fraction, Fraction]) -> list[Change]:
    """Every change of one number that the rules of `counterfactual` allow: operands at random, then values."""
    uses: dict[int, list[tuple[int, int]]] = {}
    for t, sources in enumerate(steps.sources, start=1):
        for i, source in enumerate(sources):
            if source.kind == "question" and source.place is not None:
                uses.setdefault(source.place, []).append((t, i))
    places = [place for place, users in uses.items() if len(users) == 1]
    found = []
    for place in rng.permutation(places).tolist():
        number, (t, i) = steps.numbers[place], uses[place][0]
        old = number.value
        if old.denominator != 1 or old == 1 or "." in number.text:
            continue
        digits = len(str(old.numerator))
        low = max(10 ** (digits - 1) if digits > 1 else 0, int(np.ceil(float(bounds[0]))))
        high = min(10**digits - 1, int(np.floor(float(bounds[1]))))
        if high < low:
            continue
        values = {int(v) for v in rng.integers(low, high + 1, 500)} if high - low > 500 else set(range(low, high + 1))
        values -= {1, int(old)}
        scale = steps.equations[t - 1].operands[i].value / old if old else Fraction(1)  # 1/100 for a percentage
        for new in rng.permutation(sorted(values)).tolist():
            found.append(Change(t, i, old * scale, new * scale))
    return found


def exact_chain(problem: Problem) -> Chain | None:
    """The chain of a problem if what follows from it is certain: unambiguous, exact, its last result the answer."""
    steps = chain(problem)
    if steps is None or steps.ambiguous or steps.answer_step != len(steps.equations):
        return None
    return steps if all(equation.exact for equation in steps.equations) else None


def plausible(steps: Chain, new: Recomputed, bounds: tuple[Fraction, Fraction]) -> bool:
    """Whether every result is of its old kind (whole, positive, not negative), and within bounds where it is new."""
    for equation, value in zip(steps.equations, new.values, strict=True):
        old = equation.result.value
        if old.denominator == 1 != value.denominator or (old > 0 >= value) or (old == 0 > value):
            return False
        if value != old and not bounds[0] <= value <= bounds[1]:
            return False
    return True


def _valid(steps: Chain, changes: Sequence[Change], bounds: tuple[Fraction, Fraction]) -> Recomputed | None:
    """The recomputed problem, if it is plausible."""
    new = steps.recomputed(operands={(change.step, change.operand): change.new for change in changes})
    return new if new is not None and plausible(steps, new, bounds) else None


def _changed(steps: Chain, changes: Sequence[Change], new: Recomputed) -> Problem:
    spans = []
    for change in changes:
        number = steps.numbers[steps.sources[change.step - 1][change.operand].place]
        scale = change.old / number.value if number.value else 1
        spans.append((number.start, number.end, number_text(Fraction(change.new / scale), number.text)))
    return Problem(replace_spans(steps.problem.question, spans), new.steps, new.answer)
