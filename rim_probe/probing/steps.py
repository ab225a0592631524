"""Nearest explicit step: which step of the reasoning does a memory block lie nearest to?

Method:
1. Steps are read by the memory model from plain text, in their own place and as wrong alternatives elsewhere, and laid
   out in a whitened space (`step_space`). The bank is every distinct step of split "fit", or a list of the user's.
2. For each step index t and each cell (layer, block, position) a linear map from the cell's states to the vectors of
   step t is fitted on "fit" (`step_maps`). The reading layer, the cell, the strength and the kind of map are chosen on
   "choose", the first three by top-1 among the problem's own steps and 20 hard distractors.
3. "report" scores them: among own steps and distractors, read in the problem's own context, and in the whole bank.
   Block k is claimed to hold step t where its best cell is within noise of the best block's on "choose": the 95 %
   interval of the difference, place by place, holds zero.
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
    problems_of,
    search_cell,
    splits_of,
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

SHOWN = 3  # nearest steps per block


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
        texts = distinct_steps([problems_of(study, "fit")[i] for i in rows]) if bank is None else list(dict.fromkeys(bank))
        held = Bank(tuple(texts), space.matrix(texts))
        by_step = {task.step: task for task in tasks}
        maps = {at: (found.cell, *_bank_map(study, found, by_step[at[1]], held)[1:]) for at, found in best.items()}
        decoder = cls(held, maps, _claims(best), alignment, space.layer)
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
        ]
        if len(splits_of(study, "fit")) > 1:
            rows.append(row("memory, best cell, fitted on “fit” alone", best, control=False, fitted="fit alone"))
        rows.append(row("shuffled pairing", best, fitted="shuffled"))
        for name, cells in _other_sources(study):
            searched[name] = _search(study, cells, tasks, name)
            found = {task.step: max(one, key=lambda f: f.top1) for task, one in zip(tasks, searched[name], strict=True)}
            rows.append(row(name, found))
        return [*rows, row("mean slot", best, source="mean"), row("another question's memory", best, source="another")]


def _gold(text: str, steps: Sequence[str] | None) -> int | None:
    """Which gold step (1-based) the text is, 0 for none, None where none are known."""
    if not steps:
        return None
    return next((t for t, step in enumerate(steps, start=1) if step == text), 0)
