"""Nearest explicit step: which step of the reasoning does a memory block lie nearest to?

Method:
1. Steps are read by the memory model from plain text, in their own place and as wrong alternatives elsewhere, and laid
   out in a whitened space (`step_space`). The bank is every distinct step of split "fit", or a list of the user's.
2. For each step index t and each cell (layer, block, position) a linear map from the cell's states to the vectors of
   step t is fitted on "fit" (`step_maps`). The reading layer, the cell, the strength and the kind of retrieval are
   chosen on "choose", by top-1 among the problem's own steps and 20 hard distractors (`step_search`). Splits
   `fit-heldout` and `choose-heldout`, where a study has them, serve for that as well.
3. "report" scores them: among own steps and distractors, read in the problem's own context, and in the whole bank.
   Block k is claimed to hold step t where its best cell is within noise of the best block's on "choose": the 95 %
   interval of the difference, place by place, holds zero.
4. For one question each block is decoded with its maps: nearest steps of the bank with their cosines. Maps too large
   to ship are stored in a smaller form (`step_store`), whose own accuracy goes with them.

Controls, in the same table: the last question token (was the step readable before any memory?), the base model's
untrained memory and the matched direct model, each at the best cell of its own; at the memory's best cell a map fitted
on shuffled problems, the mean slot (every question gets the mean of the states, so that only what all questions have in
common is left), and another question's memory.

Knows what is compared with what. Knows nothing of tokens, and of models only their roles.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from rim_probe.probing import step_store
from rim_probe.probing.compact import unpacked
from rim_probe.probing.section import Section
from rim_probe.probing.step_maps import Bank, LinearMap
from rim_probe.probing.step_search import (
    Cell,
    Chosen,
    Fit,
    Found,
    Row,
    Score,
    chosen,
    claimed,
    other_sources,
    problems_of,
    read_report,
    score_cell,
    search,
    search_memory,
    shortlist,
    side_by_side,
    splits_of,
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
        coverage: (block, step) -> the share of the problems of "choose" with that step whose step the bank holds: only
            these count in the map's top-1. Lacks what was not measured.
        stored: the form in which bank and maps are stored, where that is a smaller one; else None.
    """

    def __init__(
        self,
        bank: Bank,
        maps: dict[tuple[int, int], tuple[Cell, LinearMap, float]],
        claims: dict[int, list[int]],
        alignment: dict[tuple[int, int], float],
        reading_layer: int,
        coverage: dict[tuple[int, int], float] | None = None,
    ):
        self.bank, self.maps, self.claims, self.alignment = bank, maps, claims, alignment
        self.reading_layer, self.coverage = reading_layer, coverage or {}
        self.stored: step_store.Stored | None = None
        self._fit: Fit | None = None

    # --------------------------------------------------------------------------------------------------------- fitting

    @classmethod
    def fit(cls, study: Study, bank: Sequence[str] | None = None) -> StepDecoder:
        """Searches every cell and chooses by "choose".

        Args:
            bank: steps to retrieve from instead of the distinct steps of "fit".

        Raises:
            RiMError: too few problems with steps.
        """
        fit = search_memory(study, bank or ())
        for task, found in zip(fit.tasks, fit.searched["memory"], strict=True):
            for one in shortlist(found):
                fit.blocks[one.cell.block, task.step] = chosen(study, one, task, fit.bank)
        texts = fit.bank.texts if bank is None else tuple(dict.fromkeys(bank))
        held = Bank(texts, fit.space.matrix(texts))
        blocks = {at: fit.blocks[at] for at in sorted(fit.blocks)}
        maps = {at: (one.cell, one.retrieval.mapped, one.retrieval.bank_top1) for at, one in blocks.items()}
        alignment = {at: one.retrieval.top1 for at, one in blocks.items()}
        # In a bank of the user's nothing was measured on "choose".
        asked = {task.step: task.asked["choose"].texts for task in fit.tasks} if bank is None else {}
        coverage = {(block, step): held.share_of(asked[step]) for block, step in blocks if step in asked}
        decoder = cls(held, maps, claimed(fit.blocks), alignment, fit.space.layer, coverage)
        decoder._fit = fit
        plain = {at: mapped for at, (_, mapped, _) in maps.items()}
        if step_store.too_large(held, plain.values()):
            decoder.stored = small = step_store.compacted(held, plain, _asked(study, fit), _counts(study))
            stored = {step for _, step in small.maps}  # what no stored map decodes is not claimed either
            decoder.claims = {step: blocks for step, blocks in decoder.claims.items() if step in stored}
        return decoder

    def score(self, study: Study) -> Section:
        """The report; of a restored decoder everything is fitted anew first.

        Raises:
            RiMError: too few problems with steps in split "report".
        """
        from rim_probe.probing.step_report import report

        fit = self._fit or StepDecoder.fit(study, self.bank.texts)._fit
        read_report(study, fit, self.bank.texts)
        rows = self._rows(study, fit)
        by_step = {task.step: task for task in fit.tasks}
        for (block, step), one in fit.blocks.items():
            if step in by_step:
                fit.alignment[block, step] = score_cell(study, one, by_step[step], self.bank)
        return report(study, self, fit, rows, self._as_stored(study, fit, rows[0]))

    def _as_stored(self, study: Study, fit: Fit, memory: Row) -> list[tuple[Score, Score]]:
        """Of every stored step index the scores of the memory's best cell: by the whole map, by the stored one."""
        found = []
        for task in fit.tasks if self.stored else ():
            whole, cell = memory.scores[task.step], memory.cells[task.step].cell
            if (mapped := self.stored.maps.get((cell.block, task.step))) is not None:
                states = cell.read(study, "report")[whole.rows]
                ranks = self.stored.bank.ranks(mapped, states, task.asked["report"].texts)
                found.append((whole, replace(whole, bank_ranks=step_store.with_missed(ranks, whole.bank_ranks))))
        return found

    def _rows(self, study: Study, fit: Fit) -> list[Row]:
        tasks, bank = {task.step: task for task in fit.tasks}, self.bank
        best = {t: _best(one for (_, step), one in fit.blocks.items() if step == t) for t in tasks}

        def row(name: str, cells: Mapping[int, Chosen], control: bool = True, source: str = "own") -> Row:
            scores = {t: score_cell(study, cells[t], task, bank, source) for t, task in tasks.items()}
            return Row(name, control, dict(cells), scores)

        def again(name: str, fitted: str, control: bool) -> Row:
            found = {t: Found(one.cell, one.strength, one.retrieval.top1) for t, one in best.items()}
            return row(name, {t: chosen(study, found[t], task, fit.bank, fitted) for t, task in tasks.items()}, control)

        together = {
            t: chosen(study, side_by_side(study, best[t].cell.layer, task), task, fit.bank) for t, task in tasks.items()
        }
        rows = [
            row("memory, best cell", best, control=False),
            row("memory, all blocks side by side", together, control=False),
        ]
        if len(splits_of(study, "fit")) > 1:
            rows.append(again("memory, best cell, fitted on “fit” alone", "fit alone", control=False))
        rows.append(again("shuffled pairing", "shuffled", control=True))
        for name, cells in other_sources(study).items():
            fit.searched[name] = search(study, cells, fit.tasks, name)
            own = {
                task.step: _best(chosen(study, one, task, fit.bank) for one in shortlist(found))
                for task, found in zip(fit.tasks, fit.searched[name], strict=True)
            }
            rows.append(row(name, own))
        return [*rows, row("mean slot", best, source="mean"), row("another question's memory", best, source="another")]

    # --------------------------------------------------------------------------------------------------- one question

    def explain(self, observation: Observation, steps: Sequence[str] | None = None) -> dict[str, Any]:
        """Nearest explicit steps of every block.

        Args:
            steps: the question's gold steps, where they are known.

        Returns:
            `bank`: how many steps it was retrieved from; `blocks`, one dict per block: `block`; `step`, the index it is
            decoded for (the one that the block lies nearest to beside the other blocks); `cell`; `accuracy`, how often
            this was right on split "choose" for problems whose step is in the bank; `coverage`, the share of problems
            for which it is (left out where it is not known); `nearest`, the `SHOWN` nearest steps with `step`, `cosine`
            and `gold` (the 1-based gold step it equals, 0 for none, None where no gold steps are known); `match`,
            whether the nearest one is the gold step of that index (None without it); `others`, the same for the other
            indices.
        """
        decodes: dict[int, list[dict[str, Any]]] = {}
        for (block, t), (cell, mapped, accuracy) in self.maps.items():
            if block > observation.capture.K:
                continue
            cosines = mapped.cosines(cell.read_from(observation.capture), self.bank.vectors)[0]
            nearest = [
                {"step": self.bank.texts[i], "cosine": float(cosines[i]), "gold": _gold(self.bank.texts[i], steps)}
                for i in np.argsort(-cosines, kind="stable")[:SHOWN]
            ]
            gold = steps[t - 1] if steps and t <= len(steps) else None
            match = None if gold is None else nearest[0]["step"] == gold
            decode = {"step": t, "cell": str(cell), "accuracy": accuracy, "nearest": nearest, "match": match}
            if (block, t) in self.coverage:
                decode["coverage"] = self.coverage[block, t]
            decodes.setdefault(block, []).append(decode)
        blocks = []
        for block, own in decodes.items():
            headline = own.pop(next(i for i, one in enumerate(own) if one["step"] == self.headline(block)))
            blocks.append({"block": block, **headline, "others": own})
        return {"bank": len(self.bank.texts), "reading_layer": self.reading_layer, "blocks": blocks}

    def headline(self, block: int) -> int:
        """The step that a block lies nearest to: where it falls least short of the best block, then where it is nearest
        in itself, then the earlier one."""
        steps = sorted(step for own, step in self.maps if own == block)

        def shortfall(step: int) -> tuple[float, float]:
            own = self.alignment[block, step]
            return max(top1 for (_, t), top1 in self.alignment.items() if t == step) - own, -own

        return min(steps, key=shortfall)

    # ------------------------------------------------------------------------------------------------------- artifacts

    def tensors(self) -> dict[str, np.ndarray]:
        """What `restore` needs: the bank's vectors, one map per block and step."""
        if self.stored is not None:
            return step_store.tensors(self.stored.bank, self.stored.maps, small=True)
        return step_store.tensors(self.bank, {at: mapped for at, (_, mapped, _) in self.maps.items()}, small=False)

    def settings(self) -> dict[str, Any]:
        """JSON-ready."""
        small = self.stored
        covered = small.coverage if small and self.coverage else self.coverage
        return {
            "texts": list((small or self).bank.texts),
            "reading_layer": self.reading_layer,
            "claims": {str(step): blocks for step, blocks in self.claims.items()},
            "maps": [
                {
                    "block": block,
                    "step": step,
                    "layer": cell.layer,
                    "position": cell.position,
                    "accuracy": accuracy if small is None else small.top1[block, step],
                    "alignment": self.alignment[block, step],
                    **({"coverage": covered[block, step]} if (block, step) in covered else {}),
                }
                for (block, step), (cell, _, accuracy) in self.maps.items()
                if small is None or (block, step) in small.maps
            ],
        }

    @classmethod
    def restore(cls, tensors: Mapping[str, np.ndarray], settings: Mapping[str, Any]) -> StepDecoder:
        """A decoder from `tensors` and `settings`; its decodes are those of the decoder as saved."""
        maps, alignment, coverage = {}, {}, {}
        for one in settings["maps"]:
            at = (one["block"], one["step"])
            parts = (unpacked(tensors, f"{at[0]}.{at[1]}.{name}") for name in ("weights", "bias", "keys", "origin"))
            cell = Cell("memory", one["layer"], one["block"], one["position"])
            if "coverage" in one:
                coverage[at] = one["coverage"]
            maps[at], alignment[at] = (cell, LinearMap(*parts), one["accuracy"]), one["alignment"]
        claims = {int(step): list(blocks) for step, blocks in settings["claims"].items()}
        bank = Bank(tuple(settings["texts"]), unpacked(tensors, "bank"))
        return cls(bank, maps, claims, alignment, settings["reading_layer"], coverage)


def _best(cells: Iterable[Chosen]) -> Chosen:
    return max(cells, key=lambda one: one.retrieval.top1)


def _asked(study: Study, fit: Fit) -> dict[tuple[int, int], step_store.Asked]:
    """What each map is tried on while its stored form is chosen."""
    tasks = {task.step: task for task in fit.tasks}
    return {
        (block, step): step_store.Asked(
            one.cell.read(study, "fit")[tasks[step].fit_rows],
            one.cell.read(study, "choose")[tasks[step].asked["choose"].rows],
            tasks[step].asked["choose"].texts,
        )
        for (block, step), one in fit.blocks.items()
        if step <= step_store.MOST_STEPS
    }


def _counts(study: Study) -> Counter:
    """How often each step occurs in what is fitted on."""
    return Counter(step for problem in problems_of(study, "fit") for step in problem.steps)


def _gold(text: str, steps: Sequence[str] | None) -> int | None:
    """Which gold step (1-based) the text is, 0 for none, None where none are known."""
    if not steps:
        return None
    return next((t for t, step in enumerate(steps, start=1) if step == text), 0)
