"""Values: which numbers and operators of the explicit steps a linear probe reads in the memory blocks.

Method:
1. Quantities of step t: operand 1, operator, operand 2 and result (of a step with more operands the first two). Classes
   are the distinct values seen at least `FEWEST_SEEN` times in split "fit"; other problems are left out, and the share
   covered is reported. Values of several digits are classes like any other. Where classes would cover less than half
   of "fit" the values are open-ended: asked for are the leading digit and the magnitude (1 to 9, 10 to 99, ...). The
   result of step t is asked of problems that go on after it and whose answer is another value: every block is trained
   to say the answer, so finding the answer says nothing of the step. The result of the last step, which is the answer,
   is a quantity of its own.
2. Per cell (position "slots" or "end", layer, block; of a deep model `MOST_LAYERS` layers) and quantity: a linear
   classifier, ridge regression on one-hot labels, of standardised states (`linear`); its strength is chosen on
   "choose".
3. Accuracy of every cell on "report". The cell that stands for a quantity is the best one on "choose".

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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.special import log_softmax, softmax

from rim_probe.errors import RiMError
from rim_probe.probing.compact import PLAIN_BYTES, is_large, packed, unpacked
from rim_probe.probing.hooks import layers_told, spread_layers
from rim_probe.probing.linear import MOST_FEATURES, Inputs, LinearMap
from rim_probe.probing.quantities import CONTROL_FUNCTIONS, FEWEST_REPORTED, FEWEST_SEEN, Target, targets_of
from rim_probe.probing.results import Report, Result, is_clear, mean_estimate, proportion_estimate

if TYPE_CHECKING:
    from rim_probe.probing.study import Observation, Study

SPLITS = ("fit", "choose", "report")
POSITIONS = ("slots", "end")
FIT_PROBLEMS = 3_000
RIDGES = (1e-3, 1e-2, 1e-1, 1.0)  # times the number of rows: features have variance 1
TEMPERATURES = np.geomspace(0.02, 2.0, 25)
MOST_HEAT_MAPS = 13  # all of four quantities of three steps, and the answer
RANDOM = "random function of the step"

Cell = tuple[str, int, int]  # position, layer, block; ("question", layer, 0) is the last question token


@dataclass(frozen=True)
class CellOutcome:
    """How one quantity is read in one cell.

    Attributes:
        choose: accuracy on "choose".
        right: what was right on "report", bool [scored problems].
        control: of the control task, the share of the random functions that were right, [scored problems]; None where
            it was not asked for.
    """

    choose: float
    right: np.ndarray
    control: np.ndarray | None


# ---------------------------------------------------------------------------------------------------------- the probes


def probe_cell(
    held: Mapping[str, np.ndarray], targets: Sequence[Target], seed: int, control: bool = False
) -> list[tuple[CellOutcome, LinearMap]]:
    """One cell, split -> states [n, d], for targets that are asked of the same problems: one regression for all of
    their labels and control labels at every strength, which is then chosen for each.

    Returns:
        outcomes, and the probes of untouched states: class scores, softmax(scores / temperature) the confidence.
    """
    from sklearn.linear_model import Ridge

    asked = {split: np.any([target.labels[split] >= 0 for target in targets], axis=0) for split in SPLITS}
    tasks, columns, width = [], [], 0  # one set of labels after the other, and its columns
    for target in targets:
        controls = range(CONTROL_FUNCTIONS if control else 0)
        for labels in (target.labels, *({split: target.control[split][i] for split in SPLITS} for i in controls)):
            tasks.append({split: labels[split][asked[split]] for split in SPLITS})
            columns.append(slice(width, width + len(target.classes)))
            width += len(target.classes)
    wanted = np.zeros((int(asked["fit"].sum()), width), np.float32)
    for labels, own in zip(tasks, columns, strict=True):
        scored = labels["fit"] >= 0  # what is not scored is a row of zeros
        wanted[np.flatnonzero(scored), own.start + labels["fit"][scored]] = 1
    inputs = Inputs([held["fit"][asked["fit"]]], MOST_FEATURES, seed)
    models = [Ridge(alpha=ridge * len(wanted)).fit(inputs.fitted, wanted) for ridge in RIDGES]
    states = {split: inputs([held[split][asked[split]]]) for split in ("choose", "report")}
    scores = {split: [model.predict(states[split]) for model in models] for split in states}

    def right(split: str, task: int, model: int) -> np.ndarray:
        scored = tasks[task][split] >= 0
        return scores[split][model][scored, columns[task]].argmax(1) == tasks[task][split][scored]

    def learnt(task: int) -> tuple[int, float]:
        """The best model on "choose", and its accuracy there."""
        accuracies = [float(right("choose", task, model).mean()) for model in range(len(models))]
        return int(np.argmax(accuracies)), max(accuracies)

    found, per_target = [], len(tasks) // len(targets)
    for first in range(0, len(tasks), per_target):
        best, accuracy = learnt(first)
        others = range(first + 1, first + per_target)
        chance = np.mean([right("report", i, learnt(i)[0]) for i in others], axis=0) if control else None
        fitted = inputs.folded(models[best].coef_[columns[first]].T, models[best].intercept_[columns[first]])
        found.append((CellOutcome(accuracy, right("report", first, best), chance), fitted))
    return found


def probe_cells(
    study: Study, role: str, targets: Sequence[Target], rows: np.ndarray, control: bool = False
) -> list[dict[Cell, CellOutcome]]:
    """For every target the outcomes of all cells of a role's memory; of role "question" those of the last question
    token."""
    layers, blocks = spread_layers(study.layers), range(1, study.K + 1)
    cells = list(product(["question"], layers, [0]) if role == "question" else product(POSITIONS, layers, blocks))
    groups = list(dict.fromkeys(target.group for target in targets))
    found: list[dict[Cell, CellOutcome]] = [{} for _ in targets]
    for cell in study.progress(cells, f"values {role}"):
        held = _states(study, role, cell, rows)
        for group in groups:
            numbers = [i for i, target in enumerate(targets) if target.group == group]
            outcomes = probe_cell(held, [targets[i] for i in numbers], study.seed, control)
            for i, (outcome, _) in zip(numbers, outcomes, strict=True):
                found[i][cell] = outcome
    return found


def _states(study: Study, role: str, cell: Cell, rows: np.ndarray) -> dict[str, np.ndarray]:
    """States [n, d] of one cell by split, of "fit" the problems `rows`."""
    position, layer, block = cell
    held = {split: study.capture("memory" if role == "question" else role, split) for split in SPLITS}
    states = {s: one.cell(layer, block, position) if block else one.question_cell(layer) for s, one in held.items()}
    return states | {"fit": states["fit"][rows]}


def best_cell(outcomes: Mapping[Cell, CellOutcome]) -> Cell:
    """The cell with the highest accuracy on "choose"."""
    return max(outcomes, key=lambda cell: outcomes[cell].choose)


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


# --------------------------------------------------------------------------------------------------------- the decoder


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
        self._memory: list[dict[Cell, CellOutcome]] | None = None

    @classmethod
    def fit(cls, study: Study) -> ValueProbes:
        """Fits every cell and keeps the probes of each target's best layer and position on "choose".

        Raises:
            RiMError: no problems with enough steps that read as equations.
        """
        targets, rows = targets_and_rows(study)
        memory = probe_cells(study, "memory", targets, rows, control=True)
        reads, probes = [], []
        for target, outcomes in zip(targets, memory, strict=True):
            position, layer, _ = best_cell(outcomes)
            cells = [(position, layer, block) for block in range(1, study.K + 1)]
            labels, own, temperatures = target.labels["choose"], [], []
            for cell in cells:
                held = _states(study, "memory", cell, rows)
                ((_, fitted),) = probe_cell(held, [target], study.seed)
                own.append(fitted)
                temperatures.append(_temperature(fitted, held["choose"][labels >= 0], labels[labels >= 0]))
            probes.append(own)
            reads.append(
                {
                    "step": target.step,
                    "quantity": target.quantity,
                    "classes": list(target.classes),
                    "covered": target.covered("choose"),
                    "majority": _majority(labels),
                    "position": position,
                    "layer": layer,
                    "choose_accuracy": [outcomes[cell].choose for cell in cells],
                    "temperature": temperatures,
                }
            )
        found = cls(reads, probes)
        found._memory = memory
        return found

    def score(self, study: Study) -> Report:
        """Accuracy of every cell on "report" beside its controls."""
        targets, rows = targets_and_rows(study)
        memory = self._memory or probe_cells(study, "memory", targets, rows, control=True)
        others = {"last question token": probe_cells(study, "question", targets, rows)}
        if "base" in study.models:
            others["base model's memory"] = probe_cells(study, "base", targets, rows)
        results, verdict = _results(targets, memory, others)
        layers = spread_layers(study.layers)
        return Report(
            "values",
            results,
            {"fit": len(rows)} | {split: len(study.problems(split)) for split in ("choose", "report")},
            {
                "classifier": "ridge regression on one-hot labels, standardised states",
                "strengths tried on choose, times n": list(RIDGES),
                "layers searched": layers_told(layers, study.layers),
                "cells searched per quantity": len(memory[0]),
                "cell, best on choose": {
                    target.name: f"layer {layer}, block {block} {position}"
                    for target, own in zip(targets, memory, strict=True)
                    for position, layer, block in [best_cell(own)]
                },
                "a class is a value seen in fit at least": FEWEST_SEEN,
            },
            verdict,
        )

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


# ---------------------------------------------------------------------------------------------------------- the results


def _results(
    targets: Sequence[Target],
    memory: Sequence[Mapping[Cell, CellOutcome]],
    others: Mapping[str, Sequence[Mapping[Cell, CellOutcome]]],
) -> tuple[list[Result], str]:
    """The results, those of the steps' results first, and what follows."""
    at_cell, selective, covered, by_block, maps = [], [], [], [], []
    above, unclear = [], []
    bests = [best_cell(outcomes) for outcomes in memory]
    lead = [float((own[best].right - own[best].control).mean()) for own, best in zip(memory, bests, strict=True)]
    shown = np.argsort(lead)[::-1][:MOST_HEAT_MAPS]
    for i, (target, outcomes, (position, layer, _)) in enumerate(zip(targets, memory, bests, strict=True)):
        best, quantity, step = outcomes[bests[i]], target.quantity, target.step or "last"
        labels = target.labels["report"][target.labels["report"] >= 0]
        metric, at, score = f"accuracy, {quantity}", {"step": step}, proportion_estimate(best.right)
        beside = {RANDOM: mean_estimate(best.control), "majority class": proportion_estimate(labels == 0)}
        for name, grid in others.items():
            beside[name] = proportion_estimate(grid[i][best_cell(grid[i])].right)
        at_cell.append(Result(metric, "memory", score, place=at))
        at_cell += [Result(metric, name, control, "control", place=at) for name, control in beside.items()]
        clear = all(is_clear(score, control) for control in beside.values())
        (above if clear else unclear).append(target.name)
        known = proportion_estimate(np.arange(target.asked["report"]) < len(labels))
        selectivity = mean_estimate(best.right - best.control)
        selective.append(Result(f"selectivity: accuracy less that of a {RANDOM}", quantity, selectivity, place=at))
        covered.append(Result("share of problems whose value is a class", quantity, known, place=at))
        for block in range(1, 1 + max(cell[2] for cell in outcomes)):
            one, metric = outcomes[position, layer, block], f"accuracy by block at the best layer, {quantity}"
            at, control = {"block": block}, mean_estimate(one.control)
            by_block.append(Result(metric, f"step {step}", proportion_estimate(one.right), place=at))
            by_block.append(Result(metric, f"{RANDOM}, step {step}", control, "control", place=at))
        if i in shown:
            for cell in sorted(outcomes, key=lambda cell: cell[1:]):
                at, right = {"layer": cell[1], "position": f"block {cell[2]} {cell[0]}"}, outcomes[cell].right
                maps.append(Result("accuracy", target.name, proportion_estimate(right), place=at))
    at_cell.sort(key=lambda result: not result.metric.endswith("result"))
    which = f", all but {', '.join(unclear)}" if len(unclear) < len(above) else f": {', '.join(above) or 'none'}"
    verdict = f"{len(above)} of {len(targets)} quantities are read above every control{which if unclear else ''}."
    return at_cell + selective + covered + by_block + maps, verdict
