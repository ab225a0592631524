"""Values: which numbers and operators of the explicit steps a linear probe reads in the memory blocks.

Method:
1. Quantities of step t: operand 1, operator, operand 2 and result (of a step with more operands the first two). Classes
   are the distinct values seen at least `FEWEST_SEEN` times in split "fit"; other problems are left out, and the share
   covered is reported. Values of several digits are classes like any other. Where classes would cover less than half
   of "fit" the values are open-ended: asked for are the leading digit and the magnitude (1 to 9, 10 to 99, ...). The
   result of step t is asked of problems that go on after it and whose answer is another value: every block is trained
   to say the answer, so finding the answer says nothing of the step. The result of the last step, which is the answer,
   is a quantity of its own.
2. Per cell (layer, block, position "slots" or "end"; of a deep model `MOST_LAYERS` layers) and quantity: a linear
   classifier, ridge regression on one-hot labels, of standardised states (`linear`); its strength is chosen on
   "choose".
3. Accuracy of every cell on "report". The cell in the table is the best one on "choose".

Controls:
- Control task (Hewitt and Liang 2019, arXiv:1909.03368). It gives every input TYPE one random label, the same wherever
  the type occurs, so that only a probe that memorises types can learn it; selectivity is accuracy minus its accuracy
  on that. Their types are words. A question as type would be no control: none of "report" occurs in "fit", so any
  probe would fail, however able to memorise. Here the type is the step as a whole ("3+4=7"): each quantity is a
  function of it, steps recur across splits, and the control labels are other, random functions of the step with the
  same classes and about the same frequencies (several, and their mean: one alone can be lucky). What beats them is
  laid out along the value and not along the memorised step.
- Majority class; the last question token (was it readable before any memory?) at its best layer; the base model's
  untrained memory at its own best cell (both best on "choose", and fitted in the same way).

Knows labels, cells and ridge regression. Knows nothing of models, tokens or interventions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.special import log_softmax, softmax

from rim_probe.probing.compact import PLAIN_BYTES, is_large, packed, unpacked
from rim_probe.probing.linear import LinearMap
from rim_probe.probing.section import Section
from rim_probe.probing.value_grid import (
    POSITIONS,
    SPLITS,
    Grid,
    grid_of,
    memory_grid,
    probe_cell,
    probed_layers,
    role_grid,
    targets_and_rows,
)
from rim_probe.probing.value_report import report

if TYPE_CHECKING:
    from rim_probe.probing.study import Observation, Study

TEMPERATURES = np.geomspace(0.02, 2.0, 25)


class ValueProbes:
    """Linear probes of operands, operators and results; see the head of this module.

    Attributes:
        reads: one dict per target: `step`, `quantity`, `classes`, `covered` (share of "choose" whose value is one of
            them), `majority` (share of "choose" that the most frequent class there is right for, of what is covered),
            the `position` and `layer` it is read at, by block the accuracy on "choose" (of what is covered) and the
            temperature of its confidence.
        probes [targets][K]: classifiers at that position and layer, for the screen.
    """

    def __init__(self, reads: list[dict[str, Any]], probes: list[list[LinearMap]]):
        self.reads, self.probes = reads, probes
        self._memory: Grid | None = None

    @classmethod
    def fit(cls, study: Study) -> ValueProbes:
        """Fits every cell and keeps the probes of each target's best layer and position on "choose".

        Raises:
            RiMError: no problems with enough steps that read as equations.
        """
        targets, rows = targets_and_rows(study)
        grid, layers = memory_grid(study, targets, rows), probed_layers(study)
        reads, probes = [], []
        for i, target in enumerate(targets):
            place, layer, _ = grid.best(i)
            own, temperatures = [], []
            for block in range(study.K):
                cell = (POSITIONS[place], layers[layer])
                held = {split: study.capture("memory", split).cell(cell[1], block + 1, cell[0]) for split in SPLITS}
                held["fit"] = held["fit"][rows]
                (outcome,) = probe_cell(held, [target], study.seed, control=False)
                scored = target.labels["choose"] >= 0
                temperatures.append(
                    _temperature(outcome.fitted, held["choose"][scored], target.labels["choose"][scored])
                )
                own.append(outcome.fitted)
            probes.append(own)
            reads.append(
                {
                    "step": target.step,
                    "quantity": target.quantity,
                    "classes": list(target.classes),
                    "covered": target.covered("choose"),
                    "majority": _majority(target.labels["choose"]),
                    "position": POSITIONS[place],
                    "layer": layers[layer],
                    "choose_accuracy": grid.choose[i, place, layer].tolist(),
                    "temperature": temperatures,
                }
            )
        found = cls(reads, probes)
        found._memory = grid
        return found

    def score(self, study: Study) -> Section:
        """Accuracy of every cell on "report" beside its controls."""
        targets, rows = targets_and_rows(study)
        memory = self._memory or memory_grid(study, targets, rows)
        layers = probed_layers(study)
        controls = {
            "question": grid_of(
                study,
                "question",
                targets,
                rows,
                [(0, layer, 0) for layer in range(len(layers))],
                lambda split, cell: study.capture("memory", split).question_cell(layers[cell[1]]),
                control=False,
            )
        }
        if "base" in study.models:
            controls["base"] = role_grid(study, "base", targets, rows, control=False)
        return report(study, targets, len(rows), memory, controls)

    def explain(self, observation: Observation) -> dict[str, Any]:
        """For every block what each probe reads there.

        Returns:
            {"blocks": [{"block", "values": [{"step", "quantity", "value", "confidence", "accuracy"}]}]}; `accuracy` is
            that of this probe at this block on "choose", so that a confident but poor probe is known as one. A value
            that is no class cannot be named: both are shares of all problems with this quantity, so that neither goes
            beyond the share whose value is one.
        """
        held = observation.capture
        blocks = []
        for block in range(1, min(held.K, len(self.probes[0])) + 1):
            values = []
            for read, own in zip(self.reads, self.probes, strict=True):
                scores = own[block - 1](held.cell(read["layer"], block, read["position"]))
                covered = read.get("covered", 1.0)  # older probes do not tell
                confidence = covered * softmax(scores / read["temperature"][block - 1], axis=1)[0]
                best = int(confidence.argmax())
                values.append(
                    {
                        "step": read["step"],
                        "quantity": read["quantity"],
                        "value": read["classes"][best],
                        "confidence": float(confidence[best]),
                        "accuracy": covered * read["choose_accuracy"][block - 1],
                    }
                )
            blocks.append({"block": block, "values": values})
        return {"blocks": blocks}

    def tensors(self) -> dict[str, np.ndarray]:
        named, large = {}, self._large()
        for place, i in enumerate(self._stored()):
            weights = np.stack([fitted.weights for fitted in self.probes[i]])
            named |= packed(f"weights.{place}", weights) if large else {f"weights.{place}": weights}
            named[f"bias.{place}"] = np.stack([fitted.bias for fitted in self.probes[i]])
        return named

    def settings(self) -> dict[str, Any]:
        return {"reads": [self.reads[i] for i in self._stored()]}

    def _large(self) -> bool:
        return is_large(fitted.weights for own in self.probes for fitted in own)

    def _stored(self) -> list[int]:
        """The targets whose probes are stored: all of them, or of large ones those that lead the majority class by most
        on "choose", as many as fit into a quarter of `PLAIN_BYTES`."""
        if not self._large():
            return list(range(len(self.probes)))
        lead = [max(read["choose_accuracy"]) - read.get("majority", 0.0) for read in self.reads]
        kept, left = [], PLAIN_BYTES // 4
        for i in sorted(range(len(lead)), key=lambda i: -lead[i]):
            size = sum(fitted.weights.size for fitted in self.probes[i])
            if size <= left:
                kept.append(i)
                left -= size
        return sorted(kept)

    @classmethod
    def restore(cls, tensors: dict[str, np.ndarray], settings: dict[str, Any]) -> ValueProbes:
        """The probes that `tensors` and `settings` came from."""
        reads = settings["reads"]
        probes = [
            [LinearMap(w, b) for w, b in zip(unpacked(tensors, f"weights.{i}"), tensors[f"bias.{i}"], strict=True)]
            for i in range(len(reads))
        ]
        return cls(reads, probes)


def _majority(labels: np.ndarray) -> float:
    """The share of the most frequent class among labels that are scored."""
    counts = np.bincount(labels[labels >= 0])
    return float(counts.max() / counts.sum())


def _temperature(fitted: LinearMap, states: np.ndarray, labels: np.ndarray) -> float:
    """The temperature with the least cross entropy (Guo et al. 2017, section 4.2), on a grid."""
    scores = fitted(states)
    losses = [-log_softmax(scores / t, axis=1)[np.arange(len(labels)), labels].mean() for t in TEMPERATURES]
    return float(TEMPERATURES[int(np.argmin(losses))])
