"""Nearest explicit step: where steps are looked for, what is fitted on which split, and which cell is chosen.

Method:
1. Steps of "fit" are read at one layer, `READING_DEPTH` of the model's; the bank is every distinct one of them.
2. A source is where steps are looked for. Each has the same cells and the same features: at every layer K places of M
   states side by side, reduced to `MOST_FEATURES` components where that is more. Sources:
   - the memory: the slots of block k;
   - question tokens: the last M - 1 and one of the K before them (k = 1 are the last M);
   - lone block ends: M end tokens at the positions of block k's slots, each seeing the question and itself alone;
   - the base model's untrained memory; the matched direct model's prompt, its tokens taken as those of the question.
   The last question token, and the last M at their own place alone, are told besides: they have fewer cells.
3. Every cell has a map (`formula.StepMap`) for every step index, fitted on "fit". The best cell of a block, and of a
   source, is chosen on "choose" by top-1 among the problem's own steps and 20 hard distractors. Splits `fit-heldout`
   and `choose-heldout`, where a study has them, serve as well.

Knows studies, cells and choices. Knows nothing of what is claimed or reported.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rim_probe.errors import RiMError
from rim_probe.probing.hooks import num_layers, spread_layers
from rim_probe.probing.linear import MOST_FEATURES, Inputs
from rim_probe.probing.nearest_step.formula import (
    REFERENCES,
    Bank,
    Candidates,
    StepMap,
    StepSpace,
    places_of,
    read_places,
    step_space,
)
from rim_probe.probing.rows import Row, read_rows

if TYPE_CHECKING:
    from rim_probe.model import RiM
    from rim_probe.probing.study import Study
    from rim_probe.problems import Problem

READING_DEPTH = 2 / 3
FIT_PROBLEMS = 8_000
CHOOSE_PROBLEMS = 600  # to choose by; more cost time and change little
FEWEST_FITTED, FEWEST_ASKED = 30, 10
FIT_DISTRACTORS = 10
CONTEXTS = 12  # readings of each distinct step in its true place, where the data has them
READ_AT_ONCE = 512  # questions
MEMORY = "memory"

# ------------------------------------------------------------------------------------------------------------- sources


def splits_of(study: Study, part: str) -> tuple[str, ...]:
    """The splits that serve as "fit", "choose" or "report": where a study has problems of the report's kind to fit and
    to choose on, they do. A map that fails on other phrasings tells nothing of what the memory holds."""
    if not {"fit-heldout", "choose-heldout"} <= set(study.splits):
        return (part,)
    return {"fit": ("fit", "fit-heldout"), "choose": ("choose-heldout",)}.get(part, (part,))


def problems_of(study: Study, part: str) -> list[Problem]:
    """The problems of a part, in the order of its states."""
    return [problem for split in splits_of(study, part) for problem in study.problems(split)]


@dataclass(frozen=True)
class Source:
    """Where steps are looked for: `places` at every layer, from 1; `read`: (part, layer, place) -> states [n, F]."""

    name: str
    places: int
    read: Callable[[str, int, int], np.ndarray]


def memory_source(study: Study, role: str = MEMORY) -> Source:
    """The slots of the blocks of a role."""

    def read(part: str, layer: int, place: int) -> np.ndarray:
        return np.concatenate([study.capture(role, s).cell(layer, place, "slots") for s in splits_of(study, part)])

    return Source(MEMORY if role == MEMORY else "untrained memory", study.K, read)


def control_sources(study: Study) -> list[Source]:
    """The controls that have cells of their own."""
    rim, K, M = study.models[MEMORY], study.K, study.M
    tail = range(1 - M - K, 0)  # the last M - 1 + K tokens
    end = rim.encoder.block_ids[-1:]

    def question_row(question: str) -> Row:
        ids = rim.encode_question(question)
        return Row(ids, tail, [(slot, end) for block in rim.layout.slot_positions(len(ids), K) for slot in block])

    def window(place: int) -> list[int]:
        """Which of the tail: the last M - 1 and the one that is `place` before them."""
        return [K - place, *range(K, K + M - 1)]

    def lone(place: int) -> range:
        return range(len(tail) + (place - 1) * M, len(tail) + place * M)

    def source(name: str, places: int, read: Callable, columns: Callable[[int], Sequence[int]]) -> Source:
        return Source(name, places, lambda part, layer, place: read(part, layer, columns(place)))

    question = _states(study, "question", rim, question_row)
    sources = [source("last question token", 1, question, lambda _: [K + M - 2])]
    sources += [source(f"last {M} question tokens", 1, question, window)] if M > 1 else []
    sources.append(source(f"best {M} of the last {K + M - 1} question tokens", K, question, window))
    sources.append(source(f"{M} lone end tokens at a block's place", K, question, lone))
    sources += [memory_source(study, "base")] if "base" in study.models else []
    if (direct := study.models.get("direct")) is not None:
        prompt = _states(study, "direct", direct, lambda text: Row(direct.prompt_ids(text, "direct"), tail))
        sources.append(source(f"direct model, best {M} of its prompt's last {K + M - 1} tokens", K, prompt, window))
    return sources


def _states(study: Study, name: str, rim: RiM, row_of: Callable[[str], Row]) -> Callable[..., np.ndarray]:
    """States read at all layers once, kept on disk: (part, layer, columns) -> [n, columns * d].

    Of a model of another depth than the memory's the layers are those as deep in proportion.
    """
    layers = spread_layers(study.layers)
    own = [round(layer * num_layers(rim) / study.layers[-1]) for layer in layers]

    @cache
    def held(part: str) -> np.ndarray:
        """[layers, n, columns, d]"""
        rows = [row_of(problem.question) for problem in problems_of(study, part)]
        file = None
        for start in study.progress(range(0, len(rows), READ_AT_ONCE), f"steps: {name}, {part}"):
            states = np.stack(read_rows(rim, rows[start : start + READ_AT_ONCE], own)).transpose(2, 0, 1, 3)
            if file is None:
                Path(study.folder).mkdir(parents=True, exist_ok=True)
                shape = (len(layers), len(rows), *states.shape[2:])
                file = np.lib.format.open_memmap(study.folder / f"steps-{name}-{part}.npy", "w+", "float32", shape)
            file[:, start : start + READ_AT_ONCE] = states
        return file

    def read(part: str, layer: int, columns: Sequence[int]) -> np.ndarray:
        states = held(part)[layers.index(layer)]
        return states[:, columns].reshape(len(states), -1)

    return read


# ------------------------------------------------------------------------------------------------------------- fitting


@dataclass(frozen=True)
class Task:
    """Step t (1-based) as a retrieval task: `rows` [n] of "fit" with that step, its vectors `targets` [n, d], and the
    places where it is `asked`, by part."""

    step: int
    rows: np.ndarray
    targets: np.ndarray
    asked: dict[str, Candidates]


@dataclass
class Fit:
    """What was read of the steps, and the memory's cells by (layer, block, step)."""

    tasks: list[Task]
    space: StepSpace
    references: tuple[str, ...]
    reading_layer: int
    bank: Bank
    memory: list[Cell]


@dataclass(frozen=True)
class Cell:
    """A fitted cell: the map from the states of a source at a layer and a place to step t.

    Attributes:
        hits: bool [places of "choose"], whether the nearest candidate is the true step.
        bank_top1: top-1 in the bank on "choose", of the steps that it holds.
        features: that the map sees.
    """

    source: Source
    layer: int
    place: int
    step: int
    mapped: StepMap
    hits: np.ndarray
    bank_top1: float
    features: int

    def __str__(self) -> str:
        return f"layer {self.layer}, place {self.place}"

    def states(self, part: str) -> np.ndarray:
        return self.source.read(part, self.layer, self.place)


def best(cells: Iterable[Cell], step: int) -> Cell:
    """The cell of a step with most hits on "choose"; of equals the first place, then the first layer."""
    return max((cell for cell in cells if cell.step == step), key=lambda c: (c.hits.mean(), -c.place, -c.layer))


def read_fit(study: Study) -> Fit:
    """Reads the steps of "fit" and "choose".

    Raises:
        RiMError: too few problems with steps.
    """
    rim, rng = study.models[MEMORY], study.rng("steps")
    layer = round(READING_DEPTH * study.layers[-1])
    rows, to_choose = _drawn(study, "fit", FIT_PROBLEMS), _drawn(study, "choose", CHOOSE_PROBLEMS)
    if len(rows) < FEWEST_FITTED or len(to_choose) < FEWEST_ASKED:
        raise RiMError(
            f"The nearest step needs at least {FEWEST_FITTED} problems with steps to fit and {FEWEST_ASKED} to choose "
            f"by, but there are {len(rows)} and {len(to_choose)}; give more problems with steps."
        )
    problems = problems_of(study, "fit")
    texts = tuple(dict.fromkeys(step for i in rows for step in problems[i].steps))
    references = tuple(texts[i] for i in rng.permutation(len(texts))[:REFERENCES])
    places = places_of(problems, _covering(problems, rng.permutation(rows)), texts, rng, FIT_DISTRACTORS)
    space = step_space(places, read_places(rim, problems, places, references, layer))
    fit = Fit([], space, references, layer, Bank(texts, space.matrix(texts)), [])
    asked = _asked(study, fit, "choose", to_choose, rng)
    while True:
        step = len(fit.tasks) + 1
        own = np.array([i for i in rows if len(problems[i].steps) >= step], dtype=int)
        candidates = asked(step)
        if len(own) < FEWEST_FITTED or len(candidates.rows) < FEWEST_ASKED:
            return fit
        targets = space.matrix([problems[i].steps[step - 1] for i in own])
        fit.tasks.append(Task(step, own, targets, {"choose": candidates}))


def read_report(study: Study, fit: Fit) -> None:
    """Gives the tasks their places of "report"; those that are asked too seldom are dropped.

    Raises:
        RiMError: none is left.
    """
    numbers = [i for i, problem in enumerate(study.problems("report")) if problem.steps]
    asked = _asked(study, fit, "report", numbers, study.rng("steps report"))
    for task in fit.tasks:
        task.asked["report"] = asked(task.step)
    fit.tasks = [task for task in fit.tasks if len(task.asked["report"].rows) >= FEWEST_ASKED]
    if not fit.tasks:
        raise RiMError(
            f"Fewer than {FEWEST_ASKED} problems of the reported split have steps; give more problems with steps."
        )


def _drawn(study: Study, part: str, count: int) -> np.ndarray:
    """At most `count` problems of a part that have steps, by number."""
    numbers = np.array([i for i, problem in enumerate(problems_of(study, part)) if problem.steps], dtype=int)
    return np.sort(study.rng(f"steps {part}").permutation(numbers)[:count])


def _covering(problems: Sequence[Problem], order: Sequence[int]) -> list[int]:
    """Of the problems in this order those with which every step occurs `CONTEXTS` times, or as often as it can."""
    seen, chosen = Counter(), []
    for number in order:
        steps = problems[number].steps
        if any(seen[step] < CONTEXTS for step in steps):
            chosen.append(int(number))
            seen.update(steps)
    return chosen


def _asked(study: Study, fit: Fit, part: str, numbers: Sequence[int], rng) -> Callable[[int], Candidates]:
    """From a step index to the places of a part, read in the problems' own contexts."""
    problems = problems_of(study, part)
    places = places_of(problems, numbers, fit.bank.texts, rng)
    read = read_places(study.models[MEMORY], problems, places, fit.references, fit.reading_layer)
    return lambda step: Candidates.at(step, places, read, fit.space)


def search(study: Study, source: Source, fit: Fit) -> list[Cell]:
    """Fits every cell of a source for every task: the same function for the memory and its controls."""
    cells = product(spread_layers(study.layers), range(1, source.places + 1))
    return [
        cell
        for at in study.progress(list(cells), f"steps: {source.name}")
        for cell in fit_cells(study, source, *at, fit, fit.tasks)
    ]


def fit_cells(study: Study, source: Source, layer: int, place: int, fit: Fit, tasks: Iterable[Task]) -> list[Cell]:
    """One cell, for each task."""
    inputs = Inputs([source.read("fit", layer, place)], MOST_FEATURES, study.seed)
    states, cells = source.read("choose", layer, place), []
    for task in tasks:
        mapped, asked = StepMap.fit(inputs, task.rows, task.targets), task.asked["choose"]
        hits = asked.ranks(mapped.recalled(states[asked.rows], fit.bank.vectors)) <= 0
        in_bank = fit.bank.ranks(mapped, states[asked.rows], asked.texts)
        top1 = float((in_bank <= 0).sum() / max((in_bank >= 0).sum(), 1))
        cells.append(Cell(source, layer, place, task.step, mapped, hits, top1, inputs.fitted.shape[1]))
    return cells
