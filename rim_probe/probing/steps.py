"""Nearest explicit step: which step of the reasoning does a memory block lie nearest to?

Method:
1. Steps are read by the memory model from plain text, in their own place and as wrong alternatives elsewhere, and laid
   out in a whitened space (`step_space`). The bank is every distinct step of split "fit", or a list of the user's.
2. For each step index t and each cell (layer, block, position) a linear map from the cell's states to the vectors of
   step t is fitted on "fit" (`step_maps`). The reading layer, the cell, the strength and the kind of map are chosen on
   "choose", the first three by top-1 among the problem's own steps and 20 hard distractors.
3. "report" scores them: among own steps and distractors, read in the problem's own context, and in the whole bank.
   Block k is claimed to hold step t where its best cell is within noise of the best block on "choose" (the best one's
   95 % Wilson interval reaches it).
4. For one question each block is decoded with its maps: nearest steps of the bank with their cosines.

Controls, in the same table, each with cells and strength of its own choosing: a map fitted on shuffled problems; the
base model's untrained memory; the mean slot (every question gets the mean of the states, so that only what is common to
all questions is left); another question's memory; the last question token (was the step readable before any memory?);
the matched direct model.

Knows what is compared with what. Knows nothing of tokens, and of models only their roles.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from rim_probe.errors import RiMError
from rim_probe.evaluation import wilson_interval
from rim_probe.probing.section import Section
from rim_probe.probing.step_maps import (
    JOINT_FEATURES,
    MOST_FEATURES,
    Bank,
    Cell,
    Found,
    LinearMap,
    Regression,
    Task,
    bank_map,
    search_cell,
)
from rim_probe.probing.step_space import (
    FIT_DISTRACTORS,
    Candidates,
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
    from rim_probe.probing.study import Observation, Study

FIT_PROBLEMS = 6_000
CHOOSE_PROBLEMS = 600  # to choose by; more cost time and change little
FEWEST_FITTED, FEWEST_ASKED = 30, 10
MOST_LAYERS = 13  # searched, spread evenly over the depth
MOST_READING_LAYERS = 6
MOST_SINGLE_SLOTS = 4
SHOWN = 3  # nearest steps per block


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


class StepDecoder:
    """Maps from memory blocks to explicit steps; see the head of this module.

    Attributes:
        bank: the distinct steps it retrieves from, and their vectors.
        maps: (block, step) -> (the cell it is read at, the map for the whole bank, its top-1 there on "choose").
        claims: step t (1-based) -> the blocks claimed to hold it.
        alignment: (block, step) -> top-1 among own steps and distractors on "choose", at the block's best cell.
        reading_layer: where explicit steps are read.
    """

    def __init__(
        self,
        bank: Bank,
        maps: dict[tuple[int, int], tuple[Cell, LinearMap, float]],
        claims: dict[int, list[int]],
        alignment: dict[tuple[int, int], float],
        reading_layer: int,
    ):
        self.bank, self.maps, self.claims, self.alignment = bank, maps, claims, alignment
        self.reading_layer = reading_layer
        self._fit: Fit | None = None

    # --------------------------------------------------------------------------------------------------------- fitting

    @classmethod
    def fit(cls, study: Study, bank: Sequence[str] | None = None) -> StepDecoder:
        """Fits every cell and chooses by split "choose".

        Args:
            bank: steps to retrieve from instead of the distinct steps of "fit".

        Raises:
            RiMError: too few problems with steps.
        """
        rows = _drawn(study, "fit", FIT_PROBLEMS)
        chosen = _drawn(study, "choose", CHOOSE_PROBLEMS)
        layers = _spread(study.layers[1:], MOST_READING_LAYERS)
        spaces, choose, places_read = _read(study, rows, chosen, layers, bank)
        index, reading = _reading_layer(study, rows, spaces, choose)
        space = spaces[index]
        tasks = _tasks(study, rows, space, lambda step: candidates_at(step, *choose, index, space))
        searched = {"memory": _search(study, _memory_cells(study, "memory"), tasks, "memory")}

        best = {
            (block, task.step): max((f for f in found if f.cell.block == block), key=lambda f: f.top1)
            for task, found in zip(tasks, searched["memory"], strict=True)
            for block in range(1, study.K + 1)
        }
        alignment = {at: found.top1 for at, found in best.items()}
        texts = distinct_steps([study.problems("fit")[i] for i in rows]) if bank is None else list(dict.fromkeys(bank))
        held = Bank(tuple(texts), space.matrix(texts))
        by_step = {task.step: task for task in tasks}
        maps = {at: (found.cell, *_bank_map(study, found, by_step[at[1]], held)[1:]) for at, found in best.items()}
        decoder = cls(held, maps, _claims(alignment, tasks), alignment, space.layer)
        decoder._fit = Fit(tasks, space, searched, reading, places_read)
        return decoder

    def score(self, study: Study) -> Section:
        """The report; of a restored decoder everything is fitted anew first.

        Raises:
            RiMError: too few problems with steps in split "report".
        """
        from rim_probe.probing.step_report import report

        fitted = self._fit or StepDecoder.fit(study, self.bank.texts)._fit
        numbers = [i for i, problem in enumerate(study.problems("report")) if problem.steps]
        places = places_of(study.problems("report"), numbers, self.bank.texts, study.rng("steps report"))
        read = read_places(study.models["memory"], study.problems("report"), places, [fitted.space.layer])
        for task in fitted.tasks:
            task.asked["report"] = candidates_at(task.step, places, read, 0, fitted.space)
        fitted.tasks = [task for task in fitted.tasks if len(task.asked["report"].rows) >= FEWEST_ASKED]
        if not fitted.tasks:
            raise RiMError(
                f"Fewer than {FEWEST_ASKED} problems of the reported split have steps; give more problems with steps."
            )
        rows = self._rows(study, fitted)
        for (block, step), (cell, *_) in self.maps.items():
            task = next((task for task in fitted.tasks if task.step == step), None)
            if task is not None:
                ridge = next(f.ridge for f in fitted.searched["memory"][step - 1] if f.cell == cell)
                found = Found(cell, ridge, self.alignment[block, step])
                fitted.alignment[block, step] = _scored(study, found, task, self.bank)
        return report(study, self, fitted, rows)

    def _rows(self, study: Study, fitted: Fit) -> list[Row]:
        tasks, searched = fitted.tasks, fitted.searched
        best = {task.step: max(searched["memory"][task.step - 1], key=lambda f: f.top1) for task in tasks}
        joint = {task.step: _joint(study, best[task.step], task) for task in tasks}

        def row(name: str, found: Mapping[int, Found], control: bool = True, **how: Any) -> Row:
            scores = {task.step: _scored(study, found[task.step], task, self.bank, **how) for task in tasks}
            return Row(name, control, {step: str(one.cell) for step, one in found.items()}, scores)

        rows = [
            row("memory, best cell", best, control=False),
            row("memory, all blocks side by side", joint, control=False),
            row("shuffled pairing", best, shuffled=True),
        ]
        for name, role, cells in _other_sources(study):
            searched[name] = _search(study, cells, tasks, name)
            found = {task.step: max(one, key=lambda f: f.top1) for task, one in zip(tasks, searched[name], strict=True)}
            rows.append(row(name, found))
        return [*rows, row("mean slot", best, source="mean"), row("another question's memory", best, source="another")]

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


# --------------------------------------------------------------------------------------------------------------- reading


def _drawn(study: Study, split: str, count: int) -> np.ndarray:
    """At most `count` problems of a split that have steps, by number."""
    numbers = np.array([i for i, problem in enumerate(study.problems(split)) if problem.steps], dtype=int)
    return np.sort(study.rng(f"steps {split}").permutation(numbers)[:count])


def _spread(values: Sequence[int], most: int) -> list[int]:
    """At most `most` of the values, evenly spread, first and last among them."""
    places = np.linspace(0, len(values) - 1, min(most, len(values))).round().astype(int)
    return [values[i] for i in dict.fromkeys(places.tolist())]


def _read(study: Study, rows: np.ndarray, chosen: np.ndarray, layers: list[int], bank: Sequence[str] | None):
    """Spaces by reading layer, (places, readings) of "choose", and how many places of "fit" were read."""
    rim, problems = study.models["memory"], study.problems("fit")
    own = [problems[i] for i in rows]
    texts = distinct_steps(own)
    rng = study.rng("steps bank")
    places = places_of(own, covering(own, rng), texts, rng, FIT_DISTRACTORS)
    if bank:
        places = with_guests(places, bank, rng)
    spaces = step_spaces(places, read_places(rim, own, places, layers), layers)
    asked = places_of(study.problems("choose"), chosen.tolist(), texts, study.rng("steps choose"))
    return spaces, (asked, read_places(rim, study.problems("choose"), asked, layers)), len(places)


def _reading_layer(study: Study, rows: np.ndarray, spaces: Sequence[StepSpace], choose) -> tuple[int, dict[int, float]]:
    """The index of the reading layer, and for each the mean over steps of the best top-1 in a few cells: the slots of
    the first, the middle and the last block at every other layer."""
    blocks = sorted({1, (study.K + 1) // 2, study.K})
    layers = _spread(study.layers[1:], MOST_LAYERS)[::-2]
    cells = [cell for cell in _memory_cells(study, "memory") if cell.layer in layers and cell.block in blocks]
    wide = [cell for cell in cells if cell.position == "slots"] or cells
    by_layer = {}
    for i, space in enumerate(spaces):
        by_layer[i] = _tasks(study, rows, space, lambda step, i=i, space=space: candidates_at(step, *choose, i, space))
    flat = [task for tasks in by_layer.values() for task in tasks]
    found = _search(study, wide, flat, "reading layer")
    tops = iter(max(one.top1 for one in own) for own in found)
    means = {i: float(np.mean([next(tops) for _ in tasks])) for i, tasks in by_layer.items()}
    best = max(means, key=means.get)
    return best, {spaces[i].layer: mean for i, mean in means.items()}


def _tasks(study: Study, rows: np.ndarray, space: StepSpace, candidates) -> list[Task]:
    """A task for every step index that occurs often enough, up to the first that does not."""
    problems, tasks = study.problems("fit"), []
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


# -------------------------------------------------------------------------------------------------------------- searching


def _memory_cells(study: Study, role: str) -> list[Cell]:
    positions: list[int | str] = ["slots", "end"]
    if 1 < study.M <= MOST_SINGLE_SLOTS:
        positions += range(1, study.M + 1)
    return [
        Cell(role, layer, block, position)
        for layer in _spread(study.layers, MOST_LAYERS)
        for block in range(1, study.K + 1)
        for position in positions
    ]


def _other_sources(study: Study) -> list[tuple[str, str, list[Cell]]]:
    """Controls that have cells of their own: name, role, cells."""
    question = [Cell("memory", layer, 0, "question") for layer in study.layers]
    sources = [("last question token", "memory", question)]
    if "base" in study.models:
        sources.append(("base model, untrained memory", "base", _memory_cells(study, "base")))
    if "direct" in study.models:
        layers = study.capture("direct", "fit").layers
        cells = [Cell("direct", layer, 0, position) for layer in layers for position in ("question", "answer")]
        sources.append(("direct model, last tokens", "direct", cells))
    return sources


def _search(study: Study, cells: Sequence[Cell], tasks: list[Task], label: str) -> list[list[Found]]:
    """For every task what was found in every cell, [task][cell]."""
    found = [
        search_cell(Regression(cell.read(study, "fit"), study.seed), cell.read(study, "choose"), cell, tasks)
        for cell in study.progress(cells, f"steps {label}")
    ]
    return [list(one) for one in zip(*found, strict=True)]


def _claims(alignment: Mapping[tuple[int, int], float], tasks: Sequence[Task]) -> dict[int, list[int]]:
    claims = {}
    for task in tasks:
        own = {block: top1 for (block, step), top1 in alignment.items() if step == task.step}
        best, n = max(own.values()), len(task.asked["choose"].rows)
        low, _ = wilson_interval(round(best * n), n)
        claims[task.step] = sorted(block for block, top1 in own.items() if top1 >= low)
    return claims


def _joint(study: Study, best: Found, task: Task) -> Found:
    """All blocks' slots side by side at the layer of the best cell."""
    cell = Cell("memory", best.cell.layer, None, "slots")
    regression = Regression(cell.read(study, "fit"), study.seed, JOINT_FEATURES)
    return search_cell(regression, cell.read(study, "choose"), cell, [task])[0]


# ---------------------------------------------------------------------------------------------------------------- scoring


def _solution(study: Study, found: Found, task: Task, shuffled: bool = False):
    features = JOINT_FEATURES if found.cell.block is None else MOST_FEATURES
    regression = Regression(found.cell.read(study, "fit"), study.seed, features)
    targets = task.targets
    if shuffled:
        targets = study.rng(f"steps shuffled {task.step}").permutation(targets)
    return regression.solve(task.fit_rows, targets)


def _bank_map(study: Study, found: Found, task: Task, bank: Bank, shuffled: bool = False):
    """(kind, map, top-1 on "choose") for the whole bank, and before them the solution it comes from."""
    asked = task.asked["choose"]
    solution = _solution(study, found, task, shuffled)
    kind, mapped, top1 = bank_map(
        solution, found.ridge, found.cell.read(study, "choose")[asked.rows], asked.texts, bank
    )
    return solution, mapped, top1


def _scored(
    study: Study, found: Found, task: Task, bank: Bank, *, shuffled: bool = False, source: str = "own"
) -> Score:
    """Ranks on "report" of one cell and task.

    Args:
        source: whose states are read: the problem's own, the "mean" over all problems with that step, or those of
            "another" one.
    """
    solution, mapped, _ = _bank_map(study, found, task, bank, shuffled)
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


def _gold(text: str, steps: Sequence[str] | None) -> int | None:
    """Which gold step (1-based) the text is, 0 for none, None where none are known."""
    if not steps:
        return None
    return next((t for t, step in enumerate(steps, start=1) if step == text), 0)
