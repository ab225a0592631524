"""Every quantity of the steps probed in every cell; the method and its controls are told in `values`.

Knows labels, cells and ridge regression. Knows nothing of models, tokens or reports.
"""

from __future__ import annotations

import math
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np

from rim_probe.equations import number_text, number_value, read_equation
from rim_probe.errors import RiMError
from rim_probe.probing.hooks import spread_layers
from rim_probe.probing.linear import MOST_FEATURES, Inputs, LinearMap

if TYPE_CHECKING:
    from rim_probe.probing.study import Study
    from rim_probe.problems import Problem

SPLITS = ("fit", "choose", "report")
QUANTITIES = ("operand 1", "operator", "operand 2", "result")
PARTS = ("leading digit", "magnitude")  # of a quantity whose values are open-ended
MOST_DIGITS = 15  # after the first, of a magnitude; what has more is one class
OPEN = 0.5  # share of "fit" that classes must cover; a quantity with less is asked for its parts instead
POSITIONS = ("slots", "end")
FIT_PROBLEMS = 3_000
FEWEST_SEEN = 20
FEWEST_REPORTED = 30
RIDGES = (1e-3, 1e-2, 1e-1, 1.0)  # times the number of rows: features have variance 1
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
    functions = [
        _random_function(
            told["fit"], classes, np.random.default_rng([seed, zlib.crc32(f"{quantity} {step}".encode()), i])
        )
        for i in range(CONTROL_FUNCTIONS)
    ]
    control = {
        split: np.array([[-1 if value not in number else draw(text) for value, text in rows] for draw in functions])
        for split, rows in told.items()
    }
    asked = {split: sum(value is not None for value, _ in rows) for split, rows in told.items()}
    return Target(step, quantity, classes, labels, control, asked)


def _quantity(problem: Problem, step: int | None, quantity: str) -> tuple[str | None, str]:
    """The quantity's value (None where it is not asked for) and the step as one text."""
    steps = problem.steps
    equation = read_equation(steps[-1 if step is None else step - 1]) if len(steps) >= (step or 1) else None
    if equation is None or len(equation.operands) < 2:
        return None, ""
    first, second = equation.operands[:2]
    numbers = (first.value, None, second.value, equation.result.value)
    # By value, so that .5 and 0.50 are one class.
    values = [equation.operators[0].sign if number is None else number_text(number) for number in numbers]
    part, _, whole = quantity.rpartition(" of ")
    place = QUANTITIES.index(whole)
    if whole == "result" and step is not None and (len(steps) == step or numbers[-1] == number_value(problem.answer)):
        return None, ""
    return (_part(numbers[place], part) if part else values[place]), " ".join(values)


def _part(number: Fraction, part: str) -> str:
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


def _random_function(
    told: Sequence[tuple[str | None, str]], classes: tuple[str, ...], rng: np.random.Generator
) -> Callable[[str], int]:
    """A random map from steps to class indices that gives each class about as many problems as it has.

    Args:
        told: value and step of every problem of "fit".
    """
    scored = [(value, text) for value, text in told if value in classes]
    left = np.array([sum(value == own for value, _ in scored) for own in classes], dtype=float)
    shares = left / left.sum()
    steps = Counter(text for _, text in scored)
    labels = {}
    # Frequent steps first, so that the rare ones can even out the classes.
    for text, count in sorted(steps.items(), key=lambda item: (-item[1], item[0])):
        room = left.clip(min=0)
        labels[text] = int(rng.choice(len(classes), p=room / room.sum() if room.any() else shares))
        left[labels[text]] -= count

    def label(text: str) -> int:
        if text not in labels:  # a step that "fit" does not hold
            drawn = np.random.default_rng(zlib.crc32(text.encode())).random()
            labels[text] = int(np.searchsorted(np.cumsum(shares), drawn).clip(max=len(classes) - 1))
        return labels[text]

    return label


# ---------------------------------------------------------------------------------------------------------- the probes


@dataclass
class Outcome:
    """One cell, one target.

    Attributes:
        choose: accuracy on "choose".
        right: what was right on "report", bool [scored problems].
        control: of the control task, the share of the random functions that were right, [scored problems]; None where
            it was not asked for.
        fitted: the probe of untouched states: class scores, softmax(scores / temperature) the confidence.
    """

    choose: float
    right: np.ndarray
    control: np.ndarray | None
    fitted: LinearMap


def probe_cell(held: dict[str, np.ndarray], targets: Sequence[Target], seed: int, control: bool) -> list[Outcome]:
    """Outcomes of one cell, split -> states [n, d], for targets of ONE group: one regression for all of their labels
    and control labels at every strength, which is then chosen for each."""
    from sklearn.linear_model import Ridge

    asked = {split: np.any([target.labels[split] >= 0 for target in targets], axis=0) for split in SPLITS}
    tasks, places, width = [], [], 0  # one set of labels after the other, and its columns
    for target in targets:
        controls = range(CONTROL_FUNCTIONS if control else 0)
        for labels in (target.labels, *({split: target.control[split][i] for split in SPLITS} for i in controls)):
            tasks.append({split: labels[split][asked[split]] for split in SPLITS})
            places.append(slice(width, width + len(target.classes)))
            width += len(target.classes)
    wanted = np.zeros((int(asked["fit"].sum()), width), np.float32)
    for labels, place in zip(tasks, places, strict=True):
        scored = labels["fit"] >= 0  # what is not scored is a row of zeros
        wanted[np.flatnonzero(scored), place.start + labels["fit"][scored]] = 1
    inputs = Inputs([held["fit"][asked["fit"]]], MOST_FEATURES, seed)
    models = [Ridge(alpha=ridge * len(wanted)).fit(inputs.fitted, wanted) for ridge in RIDGES]
    states = {split: inputs([held[split][asked[split]]]) for split in ("choose", "report")}
    scores = {split: [model.predict(states[split]) for model in models] for split in states}

    def right(split: str, task: int, model: int) -> np.ndarray:
        scored = tasks[task][split] >= 0
        return scores[split][model][scored, places[task]].argmax(1) == tasks[task][split][scored]

    def learnt(task: int) -> tuple[int, float]:
        """The best model on "choose", and its accuracy there."""
        accuracies = [float(right("choose", task, model).mean()) for model in range(len(models))]
        return int(np.argmax(accuracies)), max(accuracies)

    outcomes, per_target = [], len(tasks) // len(targets)
    for first in range(0, len(tasks), per_target):
        best, accuracy = learnt(first)
        others = range(first + 1, first + per_target)
        chance = np.mean([right("report", i, learnt(i)[0]) for i in others], axis=0) if control else None
        fitted = inputs.folded(models[best].coef_[places[first]].T, models[best].intercept_[places[first]])
        outcomes.append(Outcome(accuracy, right("report", first, best), chance, fitted))
    return outcomes


@dataclass
class Grid:
    """Every cell of a role: accuracy on "choose" and outcomes on "report" by target.

    Attributes:
        choose, report, control [targets, positions, layers, K]: accuracies; control is NaN where it was not asked for.
        right, control_right: (target, position, layer, block) indices -> [scored problems], see `Outcome`.
    """

    choose: np.ndarray
    report: np.ndarray
    control: np.ndarray
    right: dict[tuple[int, ...], np.ndarray]
    control_right: dict[tuple[int, ...], np.ndarray]

    def best(self, target: int) -> tuple[int, int, int]:
        """(position, layer, block) indices of the best cell on "choose"."""
        return tuple(int(i) for i in np.unravel_index(np.argmax(self.choose[target]), self.choose.shape[1:]))


def grid_of(
    study: Study, label: str, targets: Sequence[Target], rows: np.ndarray, cells: Sequence[tuple], read, control: bool
) -> Grid:
    """Probes every cell; `cells` are index triples and `read(split, cell)` gives their states, of all problems."""
    shape = (len(targets), *(max(cell[axis] for cell in cells) + 1 for axis in range(3)))
    grid = Grid(np.full(shape, np.nan), np.full(shape, np.nan), np.full(shape, np.nan), {}, {})
    groups = list(dict.fromkeys(target.group for target in targets))
    for cell in study.progress(cells, f"values {label}"):
        held = {split: read(split, cell) for split in SPLITS}
        held["fit"] = held["fit"][rows]
        for group in groups:
            numbers = [i for i, target in enumerate(targets) if target.group == group]
            outcomes = probe_cell(held, [targets[i] for i in numbers], study.seed, control)
            for i, found in zip(numbers, outcomes, strict=True):
                at = (i, *cell)
                grid.choose[at], grid.report[at], grid.right[at] = found.choose, found.right.mean(), found.right
                if found.control is not None:
                    grid.control[at], grid.control_right[at] = found.control.mean(), found.control
    return grid


def targets_and_rows(study: Study) -> tuple[list[Target], np.ndarray]:
    """What is probed, and the problems of "fit" it is fitted on: labels of "fit" are those of these problems alone."""
    n = len(study.problems("fit"))
    rows = np.sort(study.rng("values fit").permutation(n)[:FIT_PROBLEMS])
    splits = {split: study.problems(split) for split in SPLITS}
    splits["fit"] = [splits["fit"][row] for row in rows]
    targets = targets_of(splits, study.K, study.seed)
    if not targets:
        raise RiMError(
            f"Too few problems have steps that read as equations (at least {FEWEST_REPORTED} of one kind are needed in "
            "the reported split); give more problems with steps."
        )
    return targets, rows


def probed_layers(study: Study) -> list[int]:
    """The layers that are probed."""
    return spread_layers(study.layers)


def memory_grid(study: Study, targets: Sequence[Target], rows: np.ndarray) -> Grid:
    return role_grid(study, "memory", targets, rows, control=True)


def role_grid(study: Study, role: str, targets: Sequence[Target], rows: np.ndarray, control: bool) -> Grid:
    layers = probed_layers(study)
    cells = [
        (place, layer, block)
        for layer in range(len(layers))
        for block in range(study.K)
        for place in range(len(POSITIONS))
    ]

    def read(split: str, cell: tuple[int, int, int]) -> np.ndarray:
        place, layer, block = cell
        return study.capture(role, split).cell(layers[layer], block + 1, POSITIONS[place])

    return grid_of(study, role, targets, rows, cells, read, control)
