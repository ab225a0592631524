"""Quantities of the steps as classes, and random functions of the step as control labels; see `values`.

Knows problems. Knows nothing of models, states or probes.
"""

from __future__ import annotations

import math
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from rim_probe.equations import Equation, number_text, number_value, read_equation
from rim_probe.problems import Problem

QUANTITIES = ("operand 1", "operator", "operand 2", "result")
PARTS = ("leading digit", "magnitude")  # of a quantity whose values are open-ended
MOST_DIGITS = 15  # after the first, of a magnitude; what has more is one class
OPEN = 0.5  # share of "fit" that classes must cover; a quantity with less is asked for its parts instead
FEWEST_SEEN = 20
FEWEST_REPORTED = 30
CONTROL_FUNCTIONS = 5  # one alone can be lucky by several points


@dataclass(frozen=True)
class Target:
    """One quantity of one step, on every split.

    Attributes:
        step: 1-based; None is the last one, whichever it is.
        classes: values, in order of frequency in "fit".
        labels: split -> class index per problem, -1 where it is not scored.
        control: split -> the same for `CONTROL_FUNCTIONS` random functions of the step, [functions, n].
        asked: split -> problems that have this quantity, scored or not.
    """

    step: int | None
    quantity: str
    classes: tuple[str, ...]
    labels: dict[str, np.ndarray]
    control: dict[str, np.ndarray]
    asked: dict[str, int]

    def covered(self, split: str) -> float:
        """Share of the problems with this quantity whose value is one of the classes, 0..1."""
        return int((self.labels[split] >= 0).sum()) / self.asked[split]

    @property
    def name(self) -> str:
        return f"{self.quantity} of {'the last step' if self.step is None else f'step {self.step}'}"

    @property
    def group(self) -> tuple:
        """Targets of one group are asked of the same problems."""
        return self.step, self.quantity.endswith("result")


def targets_of(splits: dict[str, Sequence[Problem]], most_steps: int, seed: int = 0) -> list[Target]:
    """The targets of steps 1..`most_steps` and of the last one, where "fit" and "report" hold enough problems."""
    wanted = [(step, quantity) for step in range(1, most_steps + 1) for quantity in QUANTITIES]
    found = [
        _target(splits, step, part, seed)
        for step, quantity in [*wanted, (None, "result")]
        for part in _askable(splits["fit"], step, quantity)
    ]
    return [target for target in found if target is not None]


def _askable(problems: Sequence[Problem], step: int | None, quantity: str) -> list[str]:
    """The quantity itself, or its parts where too few of its values come up again."""
    if quantity == "operator":
        return [quantity]
    values = [value for value, _ in (_quantity(problem, step, quantity) for problem in problems) if value is not None]
    covered = sum(count for count in Counter(values).values() if count >= FEWEST_SEEN)
    return [quantity] if covered >= OPEN * len(values) else [f"{part} of {quantity}" for part in PARTS]


def _target(splits: dict[str, Sequence[Problem]], step: int | None, quantity: str, seed: int) -> Target | None:
    told = {split: [_quantity(problem, step, quantity) for problem in problems] for split, problems in splits.items()}
    seen = Counter(value for value, _ in told["fit"] if value is not None)
    classes = tuple(value for value, count in seen.most_common() if count >= FEWEST_SEEN)
    number = {value: i for i, value in enumerate(classes)}
    labels = {split: np.array([number.get(value, -1) for value, _ in rows]) for split, rows in told.items()}
    counts = {split: int((own >= 0).sum()) for split, own in labels.items()}
    if len(classes) < 2 or counts["report"] < FEWEST_REPORTED or not counts["choose"]:
        return None
    fitted = Counter(text for value, text in told["fit"] if value in number)
    counted = {text: fitted[text] for rows in told.values() for value, text in rows if value in number}
    shares = np.bincount(labels["fit"][labels["fit"] >= 0]) / counts["fit"]
    control = {split: np.full((CONTROL_FUNCTIONS, len(rows)), -1) for split, rows in told.items()}
    for i in range(CONTROL_FUNCTIONS):
        drawn = _random_classes(
            counted, shares, np.random.default_rng([seed, zlib.crc32(f"{quantity} {step}".encode()), i])
        )
        for split, rows in told.items():
            control[split][i] = [drawn[text] if value in number else -1 for value, text in rows]
    asked = {split: sum(value is not None for value, _ in rows) for split, rows in told.items()}
    return Target(step, quantity, classes, labels, control, asked)


def _random_classes(counts: dict[str, int], shares: np.ndarray, rng: np.random.Generator) -> dict[str, int]:
    """A random class for every step, such that each class has about its share of the problems of "fit" (or the control
    task would be easier by its more uneven classes); `counts`: how many problems of "fit" have the step."""
    left, drawn = shares * sum(counts.values()), {}
    # Frequent steps first, so that the rare ones can even out the classes.
    for step, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        room = left.clip(min=0)
        drawn[step] = int(rng.choice(len(left), p=room / room.sum() if count and room.any() else shares))
        left[drawn[step]] -= count
    return drawn


def asked_step(problem: Problem, step: int | None, result: bool = True) -> Equation | None:
    """A step (from 1; None is the last one) as an equation; None where it is none.

    Args:
        result: its result is asked for. That of step t counts only where the problem goes on and its answer is another
            value: every readout is trained to say the answer, so finding the answer says nothing of the step.
    """
    steps = problem.steps
    equation = read_equation(steps[-1 if step is None else step - 1]) if len(steps) >= (step or 1) else None
    if equation is None or step is None or not result:
        return equation
    return None if len(steps) == step or equation.result.value == number_value(problem.answer) else equation


def _quantity(problem: Problem, step: int | None, quantity: str) -> tuple[str | None, str]:
    """The quantity's value (None where it is not asked for) and the step as one text."""
    part, _, whole = quantity.rpartition(" of ")
    equation = asked_step(problem, step, whole == "result")
    if equation is None or len(equation.operands) < 2:
        return None, ""
    first, second = equation.operands[:2]
    numbers = {"operand 1": first.value, "operand 2": second.value, "result": equation.result.value}
    # By value, so that .5 and 0.50 are one class.
    values = {name: number_text(number) for name, number in numbers.items()} | {"operator": equation.operators[0].sign}
    return part_of(numbers[whole], part) if part else values[whole], " ".join(values[name] for name in QUANTITIES)


def part_of(number: Fraction, part: str) -> str:
    """The leading digit of a number, or between which powers of ten it lies, sign aside."""
    value = abs(number)
    if value == 0:
        return "0"
    # Whole numbers all the way: a step may hold one that no float can. The logarithm may be one off.
    power = math.floor(math.log10(value.numerator) - math.log10(value.denominator))
    power += (value >= Fraction(10) ** (power + 1)) - (value < Fraction(10) ** power)
    if part == PARTS[0]:
        return str(value // Fraction(10) ** power)
    if power > MOST_DIGITS:
        return f"{10 ** (MOST_DIGITS + 1):,} or more"
    return f"{10**power:,} to {10 ** (power + 1) - 1:,}" if power >= 0 else "below 1"
