"""The search for explicit steps in the cells of a study: which parts are read, what is fitted where, how it is scored.

Method, for `steps`, which tells what it is for:
1. The steps of "fit" and "choose" are read at several layers; the reading layer is that with the best cells among a few.
2. Every cell of a source (the memory, or a control) is fitted for every step index; cell and ridge are the best on
   "choose".
3. A fitted cell is scored on "report", with its own states or those of a control.

Knows studies, cells and tasks. Knows nothing of reports or the screen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from rim_probe.errors import RiMError
from rim_probe.probing.step_maps import Bank, LinearMap, Regression, Solution, bank_map
from rim_probe.probing.step_space import (
    FIT_DISTRACTORS,
    Candidates,
    Place,
    StepSpace,
    candidates_at,
    covering,
    distinct_steps,
    places_of,
    read_places,
    step_spaces,
    with_guests,
)

if TYPE_CHECKING:
    from rim_probe.probing.study import Study
    from rim_probe.problems import Problem

FIT_PROBLEMS = 8_000
CHOOSE_PROBLEMS = 600  # to choose by; more cost time and change little
FEWEST_FITTED, FEWEST_ASKED = 30, 10
MOST_LAYERS = 13  # searched, spread evenly over the depth
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
    """One cell and task: the best ridge on "choose", and where its nearest candidate is the right one there."""

    cell: Cell
    ridge: float
    hits: np.ndarray  # bool [places]

    @property
    def top1(self) -> float:
        return float(self.hits.mean())


def search_cell(regression: Regression, choose: np.ndarray, cell: Cell, tasks: list[Task]) -> list[Found]:
    """The best ridge for each task; `choose` are the cell's states on that split."""
    projected = regression.project(choose)
    found = []
    for task in tasks:
        asked = task.asked["choose"]
        solution = regression.solve(task.fit_rows, task.targets)
        scored = [
            Found(cell, ridge, asked.ranks(predicted) <= 0)
            for ridge, predicted in solution.predictions(projected[asked.rows])
        ]
        found.append(max(scored, key=lambda one: one.top1))
    return found


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
    cells: dict[int, str]
    scores: dict[int, Score]


@dataclass
class Fit:
    """What fitting leaves behind for the report (and not for the screen)."""

    tasks: list[Task]
    space: StepSpace
    searched: dict[str, list[list[Found]]]  # source -> [task][cell]
    reading: dict[int, float]  # reading layer -> mean top-1 on "choose" while it was chosen
    places_read: int
    alignment: dict[tuple[int, int], Score] = field(default_factory=dict)  # (block, step)


# --------------------------------------------------------------------------------------------------- one question

    def explain(self, observation: Observation, steps: Sequence[str] | None = None) -> dict[str, Any]:
        """Nearest explicit steps of every block.

        Args:
            steps: the question's gold steps, where they are known.

        Returns:
            `bank`: how many steps it was retrieved from; `blocks`, one dict per block: `block`; `step`, the index it is
            decoded for (the one that the block lies nearest to beside the other blocks); `cell`; `accuracy`, how often
            this was right on split "choose"; `nearest`, the `SHOWN` nearest steps with `step`, `cosine` and `gold`
            (the 1-based gold step it equals, 0 for none, None where no gold steps are known); `match`, whether the
            nearest one is the gold step of that index (None without it); `others`, the same for the other indices.
        """
        decodes: dict[int, list[dict[str, Any]]] = {}
        for (block, t), (cell, mapped, accuracy) in sorted(self.maps.items()):
            cosines = mapped.cosines(cell.read_from(observation.capture), self.bank.vectors)[0]
            nearest = [
                {"step": self.bank.texts[i], "cosine": float(cosines[i]), "gold": _gold(self.bank.texts[i], steps)}
                for i in np.argsort(-cosines, kind="stable")[:SHOWN]
            ]
            gold = steps[t - 1] if steps and t <= len(steps) else None
            match = None if gold is None else nearest[0]["step"] == gold
            decode = {"step": t, "cell": str(cell), "accuracy": accuracy, "nearest": nearest, "match": match}
            decodes.setdefault(block, []).append(decode)
        blocks = []
        for block, own in decodes.items():
            headline = own.pop(next(i for i, one in enumerate(own) if one["step"] == self.headline(block)))
            blocks.append({"block": block, **headline, "others": own})
        return {"bank": len(self.bank.texts), "reading_layer": self.reading_layer, "blocks": blocks}

    def headline(self, block: int) -> int:
        """The step that block lies nearest to: where it falls least short of the best block; ties: the earlier step."""
        steps = sorted(step for own, step in self.maps if own == block)

        def shortfall(step: int) -> float:
            return max(top1 for (_, t), top1 in self.alignment.items() if t == step) - self.alignment[block, step]

        return min(steps, key=shortfall)

    # ------------------------------------------------------------------------------------------------------- artifacts

    def tensors(self) -> dict[str, np.ndarray]:
        """What `restore` needs, in half precision: the bank's vectors, one map per block and step."""
        arrays = {"bank": self.bank.vectors}
        for (block, step), (_, mapped, _) in self.maps.items():
            for name in ("weights", "bias", "keys", "origin"):
                arrays[f"{block}.{step}.{name}"] = getattr(mapped, name)
        return {name: array.astype(np.float16) for name, array in arrays.items()}

    def settings(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "texts": list(self.bank.texts),
            "reading_layer": self.reading_layer,
            "claims": {str(step): blocks for step, blocks in self.claims.items()},
            "maps": [
                {
                    "block": block,
                    "step": step,
                    "layer": cell.layer,
                    "position": cell.position,
                    "accuracy": accuracy,
                    "alignment": self.alignment[block, step],
                }
                for (block, step), (cell, _, accuracy) in self.maps.items()
            ],
        }

    @classmethod
    def restore(cls, tensors: Mapping[str, np.ndarray], settings: Mapping[str, Any]) -> StepDecoder:
        """A decoder from `tensors` and `settings`; its decodes are those of the decoder as saved."""
        arrays = {name: np.asarray(array, dtype=np.float32) for name, array in tensors.items()}
        maps, alignment = {}, {}
        for one in settings["maps"]:
            at = (one["block"], one["step"])
            parts = (arrays[f"{at[0]}.{at[1]}.{name}"] for name in ("weights", "bias", "keys", "origin"))
            cell = Cell("memory", one["layer"], one["block"], one["position"])
            maps[at], alignment[at] = (cell, LinearMap(*parts), one["accuracy"]), one["alignment"]
        claims = {int(step): list(blocks) for step, blocks in settings["claims"].items()}
        bank = Bank(tuple(settings["texts"]), arrays["bank"])
        return cls(bank, maps, claims, alignment, settings["reading_layer"])


# ------------------------------------------------------------------------------------------------------------ reading


def drawn(study: Study, part: str, count: int) -> np.ndarray:
    """At most `count` problems of a part that have steps, by number."""
    numbers = np.array([i for i, problem in enumerate(problems_of(study, part)) if problem.steps], dtype=int)
    return np.sort(study.rng(f"steps {part}").permutation(numbers)[:count])


def spread(values: Sequence[int], most: int) -> list[int]:
    """At most `most` of the values, evenly spread, first and last among them."""
    places = np.linspace(0, len(values) - 1, min(most, len(values))).round().astype(int)
    return [values[i] for i in dict.fromkeys(places.tolist())]


def read(study: Study, rows: np.ndarray, chosen: np.ndarray, layers: list[int], bank: Sequence[str] | None):
    """Spaces by reading layer, (places, readings) of "choose", and how many places of "fit" were read."""
    rim, problems = study.models["memory"], problems_of(study, "fit")
    own = [problems[i] for i in rows]
    texts = distinct_steps(own)
    rng = study.rng("steps bank")
    places = places_of(own, covering(own, rng), texts, rng, FIT_DISTRACTORS)
    if bank:
        places = with_guests(places, bank, rng)
    spaces = step_spaces(places, read_places(rim, own, places, layers), layers)
    asked = places_of(problems_of(study, "choose"), chosen.tolist(), texts, study.rng("steps choose"))
    return spaces, (asked, read_places(rim, problems_of(study, "choose"), asked, layers)), len(places)


def reading_layer(study: Study, rows: np.ndarray, spaces: Sequence[StepSpace], choose) -> tuple[int, dict[int, float]]:
    """The index of the reading layer, and for each the mean over steps of the best top-1 in a few cells: the slots of
    the first, the middle and the last block at every other layer."""
    blocks = sorted({1, (study.K + 1) // 2, study.K})
    layers = spread(study.layers[1:], MOST_LAYERS)[::-2]
    cells = [cell for cell in memory_cells(study, "memory") if cell.layer in layers and cell.block in blocks]
    wide = [cell for cell in cells if cell.position == "slots"] or cells
    by_layer = {}
    for i, space in enumerate(spaces):
        by_layer[i] = tasks(study, rows, space, lambda step, i=i, space=space: candidates_at(step, *choose, i, space))
    flat = [task for tasks in by_layer.values() for task in tasks]
    found = search(study, wide, flat, "reading layer")
    tops = iter(max(one.top1 for one in own) for own in found)
    means = {i: float(np.mean([next(tops) for _ in tasks])) for i, tasks in by_layer.items()}
    best = max(means, key=means.get)
    return best, {spaces[i].layer: mean for i, mean in means.items()}


def tasks(study: Study, rows: np.ndarray, space: StepSpace, candidates) -> list[Task]:
    """A task for every step index that occurs often enough, up to the first that does not."""
    problems, tasks = problems_of(study, "fit"), []
    while True:
        t = len(tasks) + 1
        own = np.array([i for i in rows if len(problems[i].steps) >= t], dtype=int)
        if len(own) < FEWEST_FITTED:
            break
        asked: Candidates = candidates(t)
        if len(asked.rows) < FEWEST_ASKED:
            break
        tasks.append(Task(t, own, space.matrix([problems[i].steps[t - 1] for i in own]), {"choose": asked}))
    if not tasks:
        raise RiMError(
            f"The nearest step needs at least {FEWEST_FITTED} problems with steps to fit and {FEWEST_ASKED} to choose "
            "by; give more problems with steps."
        )
    return tasks


# ----------------------------------------------------------------------------------------------------------- searching


def memory_cells(study: Study, role: str) -> list[Cell]:
    positions: list[int | str] = ["slots", "end"]
    if 1 < study.M <= MOST_SINGLE_SLOTS:
        positions += range(1, study.M + 1)
    return [
        Cell(role, layer, block, position)
        for layer in spread(study.layers, MOST_LAYERS)
        for block in range(1, study.K + 1)
        for position in positions
    ]


def other_sources(study: Study) -> list[tuple[str, list[Cell]]]:
    """Controls that have cells of their own: name, cells."""
    question = [Cell("memory", layer, 0, "question") for layer in study.layers]
    sources = [("last question token", question)]
    if "base" in study.models:
        sources.append(("base model, untrained memory", memory_cells(study, "base")))
    if "direct" in study.models:
        layers = study.capture("direct", "fit").layers
        cells = [Cell("direct", layer, 0, position) for layer in layers for position in ("question", "answer")]
        sources.append(("direct model, last tokens", cells))
    return sources


def search(study: Study, cells: Sequence[Cell], tasks: list[Task], label: str) -> list[list[Found]]:
    """For every task what was found in every cell, [task][cell]."""
    found = [
        search_cell(Regression(cell.read(study, "fit"), study.seed), cell.read(study, "choose"), cell, tasks)
        for cell in study.progress(cells, f"steps {label}")
    ]
    return [list(one) for one in zip(*found, strict=True)]


def claims(best: Mapping[tuple[int, int], Found]) -> dict[int, list[int]]:
    """Step -> blocks that are as near as the nearest one, noise aside; `best` by (block, step)."""
    claims = {}
    for step in sorted({step for _, step in best}):
        own = {block: found.hits.astype(float) for (block, t), found in best.items() if t == step}
        nearest = max(own.values(), key=np.mean)
        short = {block: nearest - hits for block, hits in own.items()}
        claims[step] = sorted(b for b, lost in short.items() if lost.mean() <= 1.96 * lost.std() / np.sqrt(len(lost)))
    return claims


def joint(study: Study, best: Found, task: Task) -> Found:
    """All blocks' slots side by side at the layer of the best cell."""
    cell = Cell("memory", best.cell.layer, None, "slots")
    regression = Regression(cell.read(study, "fit"), study.seed, JOINT_FEATURES)
    return search_cell(regression, cell.read(study, "choose"), cell, [task])[0]


# ------------------------------------------------------------------------------------------------------------- scoring


def _solution(study: Study, found: Found, task: Task, fitted: str):
    """The regression of a cell and task.

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
    return regression.solve(rows, targets)


def bank_map(study: Study, found: Found, task: Task, bank: Bank, fitted: str = "all"):
    """(kind, map, top-1 on "choose") for the whole bank, and before them the solution it comes from."""
    asked = task.asked["choose"]
    solution = _solution(study, found, task, fitted)
    kind, mapped, top1 = bank_map(
        solution, found.ridge, found.cell.read(study, "choose")[asked.rows], asked.texts, bank
    )
    return solution, mapped, top1


def scored(
    study: Study, found: Found, task: Task, bank: Bank, *, fitted: str = "all", source: str = "own"
) -> Score:
    """Ranks on "report" of one cell and task.

    Args:
        fitted: see `_solution`.
        source: whose states are read: the problem's own, the "mean" over all problems with that step, or those of
            "another" one.
    """
    solution, mapped, _ = bank_map(study, found, task, bank, fitted)
    asked = task.asked["report"]
    states = found.cell.read(study, "report")[asked.rows]
    if source == "mean":
        states = np.broadcast_to(states.mean(0), states.shape)
    elif source == "another":
        # A cycle through all of them in random order: nobody gets their own.
        order = study.rng(f"steps another {task.step}").permutation(len(states))
        other = np.empty_like(order)
        other[order] = np.roll(order, 1)
        states = states[other]
    ranks = asked.ranks(solution.ridge_map(found.ridge).predict(states))
    return Score(asked.rows, ranks, bank.ranks(mapped, states, asked.texts))
