"""The search for explicit steps in the cells of a study: which parts are read, what is fitted where, how it is scored.

Method, for `steps`, which tells what it is for:
1. The steps of "fit" and "choose" are read at several layers; the one that a few cells do best with is chosen.
2. Every cell of a source (the memory, or a control) is fitted for every step index. On "choose" the ridge predictions
   pick the best cell of every block (of the tokens before the memory: of every layer), and the best of these is the
   one that retrieves best (`step_maps.Retrieval`).
3. A fitted cell is scored on "report", with its own states or those of a control.

Knows studies, cells and tasks. Knows nothing of reports or the screen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from rim_probe.errors import RiMError
from rim_probe.probing.hooks import spread_layers
from rim_probe.probing.step_maps import (
    JOINT_FEATURES,
    MOST_FEATURES,
    Bank,
    Regression,
    Retrieval,
    choose_retrieval,
)
from rim_probe.probing.step_space import (
    CONTEXTS,
    FIT_DISTRACTORS,
    Candidates,
    StepSpace,
    candidates_at,
    covering,
    distinct_steps,
    draw_references,
    places_of,
    read_places,
    share_within,
    step_spaces,
    with_guests,
)

if TYPE_CHECKING:
    from rim_probe.probing.study import Study
    from rim_probe.problems import Problem

FIT_PROBLEMS = 8_000
CHOOSE_PROBLEMS = 600  # to choose by; more cost time and change little
FEWEST_FITTED, FEWEST_ASKED = 30, 10
MOST_READING_LAYERS = 6
MOST_SINGLE_SLOTS = 4


def splits_of(study: Study, part: str) -> tuple[str, ...]:
    """The splits that serve as "fit", "choose" or "report".

    Where a study has problems of the report's kind to fit and to choose on, they are used: a map that fails on other
    phrasings tells nothing of what the memory holds.
    """
    held_out = "fit-heldout" in study.splits and "choose-heldout" in study.splits
    if part == "fit":
        return ("fit", "fit-heldout") if held_out else ("fit",)
    return ("choose-heldout",) if part == "choose" and held_out else (part,)


def problems_of(study: Study, part: str) -> list[Problem]:
    """The problems of a part, in the order of its states."""
    return [problem for split in splits_of(study, part) for problem in study.problems(split)]


@dataclass(frozen=True)
class Cell:
    """Where a state is read.

    Attributes:
        role: the model (see `Study`).
        block: 1..K; 0 for the tokens before the memory, None for all blocks side by side.
        position: slot 1..M, "end" or "slots"; of block 0 "question" (its last token) or "answer" (the prompt's last).
    """

    role: str
    layer: int
    block: int | None
    position: int | str

    def read(self, study: Study, part: str) -> np.ndarray:
        """Its states in the problems of a part (see `splits_of`), float32 [n, F]."""
        return np.concatenate([self.read_from(study.capture(self.role, split)) for split in splits_of(study, part)])

    def read_from(self, held) -> np.ndarray:
        """Its states in a `Capture` or `CaptureSet`."""
        if self.block is None:
            blocks = range(1, held.K + 1)
            return np.concatenate([held.cell(self.layer, block, self.position) for block in blocks], axis=1)
        if self.block == 0:
            return held.question_cell(self.layer) if self.position == "question" else held.answer_cell(self.layer)
        return held.cell(self.layer, self.block, self.position)

    def __str__(self) -> str:
        if self.block == 0:
            token = {"question": "last question token", "answer": "last prompt token"}[self.position]
            return f"layer {self.layer}, {token}"
        block = "all blocks" if self.block is None else f"block {self.block}"
        position = self.position if isinstance(self.position, str) else f"slot {self.position}"
        return f"layer {self.layer}, {block}, {position}"


@dataclass(frozen=True)
class Task:
    """Step t as a retrieval task: what is fitted and what is asked.

    Attributes:
        step: t, 1-based.
        fit_rows [n], targets [n, d]: problems of "fit" with that step and its vectors.
        asked: split -> the candidates of its places.
    """

    step: int
    fit_rows: np.ndarray
    targets: np.ndarray
    asked: dict[str, Candidates]


@dataclass(frozen=True)
class Found:
    """One cell and task: the ridge whose prediction is best on "choose", and its top-1 there."""

    cell: Cell
    strength: float
    top1: float


@dataclass(frozen=True)
class Chosen:
    """A cell and how it retrieves."""

    cell: Cell
    strength: float
    retrieval: Retrieval

    def __str__(self) -> str:
        sharpness = self.retrieval.sharpness
        against = "the prediction" if sharpness is None else f"what it recalls, sharpness {sharpness:g}"
        return f"{self.cell}; {self.retrieval.kind}, ridge {self.strength:g}; candidates against {against}"


@dataclass(frozen=True)
class Score:
    """One row of the report for one step index: ranks of the true step at places of "report".

    Attributes:
        rows [n]: problem numbers.
        ranks [n]: among own steps and distractors, 0 is the nearest.
        bank_ranks [n]: in the whole bank, NaN where it lacks the step.
    """

    rows: np.ndarray
    ranks: np.ndarray
    bank_ranks: np.ndarray


@dataclass(frozen=True)
class Row:
    """What was read from where, by step index."""

    name: str
    control: bool
    cells: dict[int, Chosen]
    scores: dict[int, Score]


@dataclass
class Fit:
    """What was read and searched.

    Attributes:
        tasks: one per step index, from 1 on.
        space: the steps at the chosen reading layer.
        searched: source -> what was found, [task][cell].
        bank: the distinct steps of "fit".
        reading: reading layer -> mean top-1 on "choose" while it was chosen.
        places_read: places of "fit" whose steps were read.
        blocks: (block, step) -> the block's best cell for it and how it retrieves.
        alignment: (block, step) -> what that scores on "report"; filled in when it is scored.
    """

    tasks: list[Task]
    space: StepSpace
    searched: dict[str, list[list[Found]]]
    bank: Bank
    reading: dict[int, float]
    places_read: int
    blocks: dict[tuple[int, int], Chosen] = field(default_factory=dict)
    alignment: dict[tuple[int, int], Score] = field(default_factory=dict)


# ------------------------------------------------------------------------------------------------------------ reading


def search_memory(study: Study, guests: Sequence[str] = ()) -> Fit:
    """Reads the steps, chooses the reading layer, and searches the memory's cells for every step index.

    Args:
        guests: steps that need a vector besides those of "fit".

    Raises:
        RiMError: too few problems with steps.
    """
    rim, rng = study.models["memory"], study.rng("steps")
    layers = spread_layers(study.layers[1:], MOST_READING_LAYERS)
    rows, to_choose = _drawn(study, "fit", FIT_PROBLEMS), _drawn(study, "choose", CHOOSE_PROBLEMS)
    if len(rows) < FEWEST_FITTED or len(to_choose) < FEWEST_ASKED:
        raise RiMError(
            f"The nearest step needs at least {FEWEST_FITTED} problems with steps to fit and {FEWEST_ASKED} to choose "
            f"by, but there are {len(rows)} and {len(to_choose)}; give more problems with steps."
        )
    problems = problems_of(study, "fit")
    own = [problems[i] for i in rows]
    texts = distinct_steps(own)
    references = draw_references(texts, rng)
    places = with_guests(places_of(own, covering(own, CONTEXTS, rng), texts, rng, FIT_DISTRACTORS), guests, rng)
    spaces = step_spaces(places, read_places(rim, own, places, references, layers), references, layers)

    problems = problems_of(study, "choose")
    asked = places_of(problems, to_choose.tolist(), texts, rng)
    read = read_places(rim, problems, asked, references, layers)
    by_layer = [
        _tasks(study, rows, space, lambda step, i=i, space=space: candidates_at(step, asked, read, i, space))
        for i, space in enumerate(spaces)
    ]
    reading = _reading_layers(study, by_layer)
    index = int(np.argmax(reading))
    tasks = by_layer[index]
    searched = search(study, memory_cells(study, "memory"), tasks, "memory")
    told = dict(zip(layers, reading, strict=True))
    bank = Bank(tuple(texts), spaces[index].matrix(texts))
    return Fit(tasks, spaces[index], {"memory": searched}, bank, told, len(places))


def _drawn(study: Study, part: str, count: int) -> np.ndarray:
    """At most `count` problems of a part that have steps, by number."""
    numbers = np.array([i for i, problem in enumerate(problems_of(study, part)) if problem.steps], dtype=int)
    return np.sort(study.rng(f"steps {part}").permutation(numbers)[:count])


def _tasks(study: Study, rows: np.ndarray, space: StepSpace, candidates: Callable[[int], Candidates]) -> list[Task]:
    """A task for every step index that occurs often enough, up to the first that does not."""
    problems, tasks = problems_of(study, "fit"), []
    while True:
        step = len(tasks) + 1
        own = np.array([i for i in rows if len(problems[i].steps) >= step], dtype=int)
        asked = candidates(step)
        if len(own) < FEWEST_FITTED or len(asked.rows) < FEWEST_ASKED:
            return tasks
        targets = space.matrix([problems[i].steps[step - 1] for i in own])
        tasks.append(Task(step, own, targets, {"choose": asked}))


def _reading_layers(study: Study, by_layer: list[list[Task]]) -> list[float]:
    """For every reading layer the mean over steps of the best top-1 in a few cells: the slots of the first, the middle
    and the last block at every other layer."""
    layers = spread_layers(study.layers[1:])[::-2]
    blocks = sorted({1, (study.K + 1) // 2, study.K})
    cells = [Cell("memory", layer, block, "slots") for layer in layers for block in blocks]
    found = iter(search(study, cells, [task for tasks in by_layer for task in tasks], "reading layer"))
    return [float(np.mean([max(one.top1 for one in next(found)) for _ in tasks])) for tasks in by_layer]


# ---------------------------------------------------------------------------------------------------------- searching


def memory_cells(study: Study, role: str) -> list[Cell]:
    """Every cell of a role's memory that is searched."""
    positions: list[int | str] = ["slots", "end"]
    if 1 < study.M <= MOST_SINGLE_SLOTS:
        positions += range(1, study.M + 1)
    return [
        Cell(role, layer, block, position)
        for layer in spread_layers(study.layers)
        for block in range(1, study.K + 1)
        for position in positions
    ]


def other_sources(study: Study) -> dict[str, list[Cell]]:
    """Controls that have cells of their own, by name."""
    sources = {"last question token": [Cell("memory", layer, 0, "question") for layer in study.layers]}
    if "base" in study.models:
        sources["base model, untrained memory"] = memory_cells(study, "base")
    if "direct" in study.models:
        layers = study.capture("direct", "fit").layers
        sources["direct model, last tokens"] = [
            Cell("direct", layer, 0, position) for layer in layers for position in ("question", "answer")
        ]
    return sources


def search(study: Study, cells: Sequence[Cell], tasks: list[Task], label: str) -> list[list[Found]]:
    """For every task what was found in every cell, [task][cell]."""
    found = [_search_cell(study, cell, tasks, MOST_FEATURES) for cell in study.progress(cells, f"steps: {label}")]
    return [list(one) for one in zip(*found, strict=True)]


def side_by_side(study: Study, layer: int, task: Task) -> Found:
    """All blocks' slots at once."""
    return _search_cell(study, Cell("memory", layer, None, "slots"), [task], JOINT_FEATURES)[0]


def shortlist(found: Sequence[Found]) -> list[Found]:
    """The best cell of every block; of the tokens before the memory, the best of every layer."""
    best: dict[tuple[int, int], Found] = {}
    for one in found:
        group = (one.cell.block, 0 if one.cell.block else one.cell.layer)
        if group not in best or one.top1 > best[group].top1:
            best[group] = one
    return list(best.values())


def _search_cell(study: Study, cell: Cell, tasks: list[Task], features: int) -> list[Found]:
    regression = Regression(cell.read(study, "fit"), study.seed, features)
    projected = regression.project(cell.read(study, "choose"))
    found = []
    for task in tasks:
        asked = task.asked["choose"]
        solution = regression.solve(task.fit_rows, task.targets)
        scored = [
            Found(cell, ridge, share_within(asked.ranks(predicted), 1))
            for ridge, predicted in solution.predictions(projected[asked.rows])
        ]
        found.append(max(scored, key=lambda one: one.top1))
    return found


def claimed(blocks: Mapping[tuple[int, int], Chosen]) -> dict[int, list[int]]:
    """Step -> blocks that are as near as the nearest one, noise aside; `blocks` by (block, step)."""
    claims = {}
    for step in sorted({step for _, step in blocks}):
        own = {block: one.retrieval.hits.astype(float) for (block, t), one in blocks.items() if t == step}
        nearest = max(own.values(), key=np.mean)
        short = {block: nearest - hits for block, hits in own.items()}
        claims[step] = sorted(b for b, lost in short.items() if lost.mean() <= 1.96 * lost.std() / np.sqrt(len(lost)))
    return claims


# ------------------------------------------------------------------------------------------------------------ scoring


def read_report(study: Study, fit: Fit, texts: Sequence[str]) -> None:
    """Gives the tasks their places of "report"; those that are asked too seldom are dropped.

    Raises:
        RiMError: none is left.
    """
    problems = study.problems("report")
    numbers = [i for i, problem in enumerate(problems) if problem.steps]
    places = places_of(problems, numbers, texts, study.rng("steps report"))
    read = read_places(study.models["memory"], problems, places, fit.space.references, [fit.space.layer])
    for task in fit.tasks:
        task.asked["report"] = candidates_at(task.step, places, read, 0, fit.space)
    fit.tasks = [task for task in fit.tasks if len(task.asked["report"].rows) >= FEWEST_ASKED]
    if not fit.tasks:
        raise RiMError(
            f"Fewer than {FEWEST_ASKED} problems of the reported split have steps; give more problems with steps."
        )


def chosen(study: Study, found: Found, task: Task, bank: Bank, fitted: str = "all") -> Chosen:
    """A found cell fitted again, and the retrieval that is best for it on "choose".

    Args:
        fitted: on "all" problems, with their steps "shuffled" among them, or on those of split "fit alone".
    """
    features = JOINT_FEATURES if found.cell.block is None else MOST_FEATURES
    regression = Regression(found.cell.read(study, "fit"), study.seed, features)
    rows, targets = task.fit_rows, task.targets
    if fitted == "shuffled":
        targets = study.rng(f"steps shuffled {task.step}").permutation(targets)
    if fitted == "fit alone":
        own = rows < len(study.problems("fit"))
        rows, targets = rows[own], targets[own]
    asked = task.asked["choose"]
    states = found.cell.read(study, "choose")[asked.rows]
    retrieval = choose_retrieval(regression.solve(rows, targets), found.strength, states, asked, bank)
    return Chosen(found.cell, found.strength, retrieval)


def score_cell(study: Study, one: Chosen, task: Task, bank: Bank, source: str = "own") -> Score:
    """Ranks on "report".

    Args:
        bank: the whole bank, of the user's or of "fit".
        source: whose states are read: the problem's own, the "mean" over all problems with that step, or those of
            "another" one.
    """
    asked = task.asked["report"]
    states = one.cell.read(study, "report")[asked.rows]
    if source == "mean":
        states = np.broadcast_to(states.mean(0), states.shape)
    elif source == "another":
        # A cycle through all of them in random order: nobody gets their own.
        order = study.rng(f"steps another {task.step}").permutation(len(states))
        other = np.empty_like(order)
        other[order] = np.roll(order, 1)
        states = states[other]
    ranks = asked.ranks(one.retrieval.predicted(states))
    return Score(asked.rows, ranks, bank.ranks(one.retrieval.mapped, states, asked.texts))
