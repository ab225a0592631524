"""Hard distractors: steps that differ from a true one in a single place.

Method:
1. One digit of one operand is changed, or one operator. With the result computed anew this is another true equation
   (kinds `operand`, `operator`); with the old result kept it is a false one (kind `result`).
2. One digit of the result is changed: a false equation (kind `result`).
3. What says the same as the step or as another step of the problem (also with the summands in another order) is left
   out, as is a recomputed result that is not whole or not positive where the original is, or is out of bounds.
The kinds are drawn in turn, so that none of them crowds out the others.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from fractions import Fraction
from functools import lru_cache

import numpy as np

from rim_probe.equations.reading import Equation, Number, number_value, read_equation

KINDS = ("operand", "operator", "result")


class Distractor(str):
    """The text of a step, and which `kind` of change made it: `operand`, `operator` or `result`."""

    kind: str

    def __new__(cls, text: str, kind: str) -> Distractor:
        """The text, with its kind."""
        made = super().__new__(cls, text)
        made.kind = kind
        return made


def distractors(
    step: str,
    count: int,
    rng: np.random.Generator,
    *,
    own: Iterable[str] = (),
    low: Fraction | int | None = None,
    high: Fraction | int | None = None,
) -> list[Distractor]:
    """At most `count` different hard distractors of a step; see the head of this module.

    Args:
        own: the problem's own steps, none of which is returned.
        low, high: bounds of changed numbers and recomputed results. By default the numbers stay as long as the longest
            number of the step, and results that were positive stay so.

    Returns:
        Fewer than `count` where there are no more (a step of single digits has about 25); none for a step that is no
        equation.
    """
    equation = read_equation(step)
    if equation is None:
        return []
    taken = {meaning(step), *map(meaning, own)}
    pools: dict[str, list[str]] = {kind: [] for kind in KINDS}
    for kind, text in _variants(equation, *_bounds(equation, low, high)):
        if meaning(text) not in taken:
            taken.add(meaning(text))
            pools[kind].append(text)
    drawn = {kind: iter([pool[i] for i in rng.permutation(len(pool))]) for kind, pool in pools.items()}
    found: list[Distractor] = []
    while drawn and len(found) < count:
        for kind in list(drawn):
            text = next(drawn[kind], None)
            if text is None:
                del drawn[kind]
            elif len(found) < count:
                found.append(Distractor(text, kind))
    return found


@lru_cache(maxsize=2**14)  # the variants of one step come up again with the next
def meaning(step: str) -> tuple:
    """Equal for steps that say the same: numbers by value, summands and factors in any order, spaces aside."""
    equation = read_equation(step)
    if equation is None:
        return (step,)
    values = [number.value for number in equation.operands]
    signs = tuple(operator.sign for operator in equation.operators)
    plain = "(" not in equation.text and len(set(signs)) == 1 and signs[0] in "+*"
    return tuple(sorted(values) if plain else values), signs, equation.expression, equation.result.value


def _bounds(
    equation: Equation, low: Fraction | int | None, high: Fraction | int | None
) -> tuple[Fraction | int, Fraction | int]:
    numbers = (*equation.operands, equation.result)
    digits = max(len(str(abs(int(number.value)))) for number in numbers)
    smallest = min(number.value for number in numbers)
    default = 1 if smallest >= 1 else 0 if smallest >= 0 else -(10**digits) + 1
    return default if low is None else low, 10**digits - 1 if high is None else high


def _variants(equation: Equation, low: Fraction | int, high: Fraction | int) -> Iterator[tuple[str, str]]:
    """Every (kind, text) within the bounds, whether or not it says something new."""
    values = [number.value for number in equation.operands]
    for i, number in enumerate(equation.operands):
        for new in _one_digit_changed(number, low, high):
            changed = [*values[:i], new, *values[i + 1 :]]
            yield from _with_results("operand", equation, {i: new}, {}, equation.value(changed), low, high)
    signs = [operator.sign for operator in equation.operators]
    for i, sign in enumerate(signs):
        for new in "+-*/":
            if new != sign:
                value = equation.value(None, [*signs[:i], new, *signs[i + 1 :]])
                yield from _with_results("operator", equation, {}, {i: new}, value, low, high)
    for new in _one_digit_changed(equation.result, low, high):
        if new != equation.value():
            yield "result", equation.rewritten(result=new)


def _with_results(kind, equation, operands, signs, value, low, high) -> Iterator[tuple[str, str]]:
    """A changed left side with the result computed anew, if it is of the old kind, and with the old result."""
    old = equation.result.value
    kept = value is not None and (old.denominator != 1 or value.denominator == 1) and (old <= 0 or value > 0)
    if kept and low <= value <= high:
        yield kind, equation.rewritten(operands, signs, value)
    if value != old:
        yield "result", equation.rewritten(operands, signs)


def _one_digit_changed(number: Number, low: Fraction | int, high: Fraction | int) -> Iterator[Fraction]:
    """The numbers of the same length that differ in one digit; the first digit of several is never 0."""
    places = [i for i, char in enumerate(number.text) if char.isdigit()]
    for i in places:
        leading = i == places[0] and len(places) > 1 and number.text[i + 1 : i + 2] not in (".", "%")
        for digit in "123456789" if leading else "0123456789":
            if digit != number.text[i]:
                value = number_value(number.text[:i] + digit + number.text[i + 1 :])
                if value is not None and low <= value <= high:
                    yield value
