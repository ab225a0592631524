"""Nearest explicit step, the decoder: what is kept of a search, which block is claimed to hold which step, and what one
question's blocks are read as.

Block k is claimed to hold step t where its best cell is within noise of the best block's on "choose": the 95 % interval
of the difference, place by place, holds zero.

Knows maps and claims. Knows nothing of splits, controls or files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from rim_probe.errors import RiMError
from rim_probe.probing.compact import is_large, packed, unpacked
from rim_probe.probing.linear import LinearMap
from rim_probe.probing.nearest_step.formula import Bank, StepMap
from rim_probe.probing.nearest_step.results import report
from rim_probe.probing.nearest_step.search import Cell, Fit, best, memory_source, read_fit, search
from rim_probe.probing.results import Report

if TYPE_CHECKING:
    from rim_probe.probing.study import Observation, Study

SHOWN = 3  # nearest steps per block


def claimed(cells: Mapping[tuple[int, int], Cell]) -> dict[int, list[int]]:
    """Step -> blocks that are as near as the nearest one, noise aside; `cells` by (block, step)."""
    claims = {}
    for step in sorted({step for _, step in cells}):
        own = {block: cell.hits.astype(float) for (block, t), cell in cells.items() if t == step}
        nearest = max(own.values(), key=np.mean)
        short = {block: nearest - hits for block, hits in own.items()}
        claims[step] = sorted(b for b, lost in short.items() if lost.mean() <= 1.96 * lost.std() / np.sqrt(len(lost)))
    return claims


@dataclass(frozen=True)
class BlockMap:
    """How step t is read in block k.

    Attributes:
        layer, mapped: where, and the map of its slots.
        accuracy: top-1 in the bank on "choose", of the problems whose step it holds.
        alignment: top-1 among own steps and distractors on "choose".
        coverage: the share of the problems of "choose" with that step whose step the bank holds.
    """

    layer: int
    mapped: StepMap
    accuracy: float
    alignment: float
    coverage: float


class StepDecoder:
    """Maps from memory blocks to explicit steps; see the head of this module.

    Attributes:
        bank: the distinct steps it retrieves from, and their vectors.
        maps: (block, step) -> how it is read.
        claims: step t (1-based) -> the blocks claimed to hold it.
        reading_layer: where explicit steps are read.
    """

    def __init__(
        self, bank: Bank, maps: Mapping[tuple[int, int], BlockMap], claims: Mapping[int, list[int]], reading_layer: int
    ):
        self.bank, self.maps, self.claims, self.reading_layer = bank, dict(maps), dict(claims), reading_layer
        self._fit: Fit | None = None

    @classmethod
    def fit(cls, study: Study) -> StepDecoder:
        """Searches the memory's cells and chooses by "choose".

        Raises:
            RiMError: too few problems with steps.
        """
        fit = read_fit(study)
        fit.memory = search(study, memory_source(study), fit)
        held = set(fit.bank.texts)
        coverage = {t.step: float(np.mean([text in held for text in t.asked["choose"].texts])) for t in fit.tasks}
        cells = {
            (block, step): best((cell for cell in fit.memory if cell.place == block), step)
            for block in range(1, study.K + 1)
            for step in coverage
        }
        maps = {
            (block, step): BlockMap(cell.layer, cell.mapped, cell.bank_top1, float(cell.hits.mean()), coverage[step])
            for (block, step), cell in cells.items()
        }
        decoder = cls(fit.bank, maps, claimed(cells), fit.reading_layer)
        decoder._fit = fit
        return decoder

    def score(self, study: Study) -> Report:
        """The results; of a restored decoder everything is fitted anew first.

        Raises:
            RiMError: too few problems with steps in split "report".
        """
        return report(study, self._fit or StepDecoder.fit(study)._fit, self.claims)

    def explain(self, observation: Observation, steps: Sequence[str] | None = None) -> dict[str, Any]:
        """Nearest explicit steps of every block.

        Args:
            steps: the question's gold steps, where they are known.

        Returns:
            `bank`: how many steps it was retrieved from; `reading_layer`; `blocks`, one dict per block: `block`;
            `step`, the index it is decoded for (the one that the block lies nearest to beside the other blocks);
            `cell`; `accuracy` and `coverage`, see `BlockMap`; `nearest`, the `SHOWN` nearest steps with `step`,
            `cosine` and `gold` (the 1-based gold step it equals, 0 for none, None where no gold steps are known);
            `match`, whether the nearest one is the gold step of that index (None without it); `others`, the same for
            the other indices.
        """
        blocks = []
        for block in sorted({block for block, _ in self.maps if block <= observation.capture.K}):
            decodes = {t: self._decode(observation, block, t, steps) for own, t in self.maps if own == block}
            headline = decodes.pop(self.headline(block))
            blocks.append({"block": block, **headline, "others": list(decodes.values())})
        return {"bank": len(self.bank.texts), "reading_layer": self.reading_layer, "blocks": blocks}

    def _decode(self, observation: Observation, block: int, t: int, steps: Sequence[str] | None) -> dict[str, Any]:
        one = self.maps[block, t]
        states = observation.capture.cell(one.layer, block, "slots")
        cosines = one.mapped.cosines(states, self.bank.vectors)[0]
        nearest = [
            {"step": self.bank.texts[i], "cosine": float(cosines[i]), "gold": _gold(self.bank.texts[i], steps)}
            for i in np.argsort(-cosines, kind="stable")[:SHOWN]
        ]
        return {
            "step": t,
            "cell": f"layer {one.layer}, block {block}, slots",
            "accuracy": one.accuracy,
            "coverage": one.coverage,
            "nearest": nearest,
            "match": nearest[0]["step"] == steps[t - 1] if steps and t <= len(steps) else None,
        }

    def headline(self, block: int) -> int:
        """The step that a block lies nearest to: where it falls least short of the best block, then where it is nearest
        in itself, then the earlier one."""

        def shortfall(step: int) -> tuple[float, float]:
            own = self.maps[block, step].alignment
            return max(one.alignment for (_, t), one in self.maps.items() if t == step) - own, -own

        return min(sorted(step for own, step in self.maps if own == block), key=shortfall)

    # ------------------------------------------------------------------------------------------------------- artifacts

    def tensors(self) -> dict[str, np.ndarray]:
        """What `restore` needs: the bank's vectors, one map per block and step; in 8 bits where they are large."""
        arrays = {"bank": self.bank.vectors}
        for (block, step), one in self.maps.items():
            to = one.mapped.to_directions
            arrays |= {f"{block}.{step}.weights": to.weights, f"{block}.{step}.keys": one.mapped.keys}
        large = is_large(arrays.values())
        stored = {}
        for name, array in arrays.items():
            stored |= packed(name, array) if large else {name: array}
        return stored | {f"{k}.{t}.bias": one.mapped.to_directions.bias for (k, t), one in self.maps.items()}

    def settings(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "texts": list(self.bank.texts),
            "reading_layer": self.reading_layer,
            "claims": {str(step): blocks for step, blocks in self.claims.items()},
            "maps": [
                {"block": block, "step": step}
                | {name: getattr(one, name) for name in ("layer", "accuracy", "alignment", "coverage")}
                for (block, step), one in self.maps.items()
            ],
        }

    @classmethod
    def restore(cls, tensors: Mapping[str, np.ndarray], settings: Mapping[str, Any]) -> StepDecoder:
        """A decoder from `tensors` and `settings`.

        Raises:
            RiMError: parts that are missing, or of another version.
        """
        try:
            maps = {}
            for one in settings["maps"]:
                at = (one["block"], one["step"])
                weights, bias, keys = (
                    unpacked(tensors, f"{at[0]}.{at[1]}.{part}") for part in ("weights", "bias", "keys")
                )
                told = [one[name] for name in ("accuracy", "alignment", "coverage")]
                maps[at] = BlockMap(one["layer"], StepMap(LinearMap(weights, bias), keys), *told)
            bank = Bank(tuple(settings["texts"]), unpacked(tensors, "bank"))
            claims = {int(step): list(blocks) for step, blocks in settings["claims"].items()}
            return cls(bank, maps, claims, settings["reading_layer"])
        except (KeyError, ValueError, TypeError) as error:
            raise RiMError(f"The nearest-step decoder cannot be restored ({error!r}); fit it anew.") from None


def _gold(text: str, steps: Sequence[str] | None) -> int | None:
    """Which gold step (1-based) the text is, 0 for none, None where none are known."""
    if not steps:
        return None
    return next((t for t, step in enumerate(steps, start=1) if step == text), 0)
