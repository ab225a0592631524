"""The steps of a problem as a chain: which operand comes from which step, and what a change would mean.

Method:
1. An operand is the result of an earlier step, a number of the question, or a constant.
2. Where its value could come from several places, every assignment in which each step before the last is used is looked
   at: nobody writes a step that nothing uses. An operand is ambiguous if these assignments disagree about it.
3. With one result or operand replaced, every step that depends on it is computed anew: the problem's own equations.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction

from rim_probe.equations.reading import NUMBER, Equation, Number, number_text, number_value, read_equation
from rim_probe.problems import Problem, extract_answer

_MAX_ASSIGNMENTS = 512
NUMBER_IN_QUESTION = re.compile(rf"(?<![\w.])(?P<number>{NUMBER})(?P<percent>%?)(?!\w)")
_WORDS = {
    **dict(zip("one two three four five six seven eight nine ten eleven twelve".split(), range(1, 13), strict=True)),
    **{"half": Fraction(1, 2), "twice": 2, "double": 2, "triple": 3, "dozen": 12},
}
NUMBER_WORD = re.compile(r"\b(?:" + "|".join(_WORDS) + r")\b", re.IGNORECASE)


@dataclass(frozen=True)
class Source:
    """Where an operand comes from.

    Attributes:
        kind: "step" (the result of an earlier one), "question", "constant".
        step: 1-based number of that step.
        place: index into `Chain.numbers` of the question's number; None for a number written as a word, or where the
            question holds the value several times.
        ambiguous: it could as well come from elsewhere; what is given is then the likeliest.
    """

    kind: str
    step: int | None = None
    place: int | None = None
    ambiguous: bool = False


@dataclass(frozen=True)
class Chain:
    """The steps of a problem and what they depend on.

    Attributes:
        equations, sources: one entry per step; `sources[t][i]` tells where operand i of step t + 1 comes from.
        numbers: the numbers of the question, in digits, in order (25% stands as 25).
        answer_step: 1-based number of the last step whose result is the answer; None where none is.
    """

    problem: Problem
    equations: tuple[Equation, ...]
    sources: tuple[tuple[Source, ...], ...]
    numbers: tuple[Number, ...]
    answer_step: int | None

    @property
    def ambiguous(self) -> bool:
        """Whether any operand's source is."""
        return any(source.ambiguous for sources in self.sources for source in sources)

    def recomputed(
        self,
        results: Mapping[int, Fraction] | None = None,
        operands: Mapping[tuple[int, int], Fraction] | None = None,
    ) -> Recomputed | None:
        """What the problem's own equations give after a change.

        Args:
            results: step number (1-based) -> the result it is taken to have, whatever its operands say.
            operands: (step number, operand index) -> another number there.

        Returns:
            None where a division by zero comes up or no step gives the answer.
        """
        results, operands = results or {}, operands or {}
        values: list[Fraction] = []
        steps = []
        for t, (equation, sources) in enumerate(zip(self.equations, self.sources, strict=True), start=1):
            current = [number.value for number in equation.operands]
            for i, source in enumerate(sources):
                if source.kind == "step":
                    # A rounded result is used as it is written, unless something before it has changed.
                    current[i] = values[source.step - 1]
                current[i] = operands.get((t, i), current[i])
            changed = {i: v for i, v in enumerate(current) if v != equation.operands[i].value}
            value = equation.result.value if not changed else equation.value(current)
            value = results.get(t, value)
            if value is None:
                return None
            values.append(value)
            steps.append(equation.rewritten(changed, None, value if value != equation.result.value else None))
        if self.answer_step is None:
            return None
        answer = values[self.answer_step - 1]
        same = answer == self.equations[self.answer_step - 1].result.value
        text = self.problem.answer if same else number_text(answer, self.problem.answer)
        return Recomputed(tuple(steps), tuple(values), text)


@dataclass(frozen=True)
class Recomputed:
    """Steps, their results and the answer after a change."""

    steps: tuple[str, ...]
    values: tuple[Fraction, ...]
    answer: str


def question_numbers(question: str) -> tuple[Number, ...]:
    """The numbers written in digits, in order; 25% stands as 25, the span without the sign."""
    found = []
    for match in NUMBER_IN_QUESTION.finditer(question):
        text = match["number"]
        found.append(Number(number_value(text), text, match.start("number"), match.end("number")))
    return tuple(found)


def chain(problem: Problem) -> Chain | None:
    """The chain of a problem; None where it has no steps or one of them is no equation."""
    equations = [read_equation(step) for step in problem.steps]
    if not equations or None in equations:
        return None
    numbers = question_numbers(problem.question)
    words = {Fraction(_WORDS[match.group().lower()]) for match in NUMBER_WORD.finditer(problem.question)}
    results = [equation.result.value for equation in equations]

    def candidates(t: int, value: Fraction) -> list[Source]:
        # The latest result is the likeliest source, and what has been derived comes before what was given.
        found = [Source("step", step=s + 1) for s in reversed(range(t)) if results[s] == value]
        places = [i for i, number in enumerate(numbers) if value in _readings(problem.question, number)]
        if places or value in words:
            single = len(places) == 1 and value not in words
            found.append(Source("question", place=places[0] if single else None))
        return found or [Source("constant")]

    options = [[candidates(t, number.value) for number in e.operands] for t, e in enumerate(equations)]
    sources = _assign(options)
    answer = number_value(extract_answer(problem.answer) or "")
    steps = [t for t, result in enumerate(results, start=1) if result == answer]
    return Chain(problem, tuple(equations), sources, numbers, steps[-1] if steps else None)


def _readings(question: str, number: Number) -> tuple[Fraction, ...]:
    """What a number of the question can mean in a step: 25% is 25 or a quarter."""
    percent = question[number.end : number.end + 1] == "%"
    return (number.value, number.value / 100) if percent else (number.value,)


def _assign(options: list[list[list[Source]]]) -> tuple[tuple[Source, ...], ...]:
    """One source per operand, [step][operand][candidate] -> [step][operand]; ambiguous where several would do."""
    flat = [candidates for step in options for candidates in step]
    combinations = 1
    for candidates in flat:
        combinations *= len(candidates)
    if combinations > _MAX_ASSIGNMENTS:
        chosen = [replace(candidates[0], ambiguous=len(candidates) > 1) for candidates in flat]
    else:
        every = list(itertools.product(*flat))
        # A step that nothing uses would not have been written, the last one apart.
        needed = set(range(1, len(options)))
        fitting = [a for a in every if needed <= {source.step for source in a}] or every
        chosen = [
            replace(source, ambiguous=len({assignment[i] for assignment in fitting}) > 1)
            for i, source in enumerate(fitting[0])
        ]
    remaining = iter(chosen)
    return tuple(tuple(next(remaining) for _ in step) for step in options)
