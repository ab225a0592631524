"""Nearest explicit step, the report: the memory beside its controls on "report", each at its own best cell on "choose".

The same number of cells and features stand behind the memory and every control that has cells of its own (`fit`), so
what is left between them is what they hold. Told apart are steps before the last (the last one's result is the answer,
which every readout is trained to say) and chains that neither "fit" nor "choose" holds. At the memory's best cell stand
two controls more: a map fitted on shuffled problems, and another question's memory.

Knows ranks and how a report is made of them. Knows nothing of how a step is read or a cell fitted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from rim_probe.probing.curves import ratio_estimate
from rim_probe.probing.hooks import spread_layers
from rim_probe.probing.linear import MOST_FEATURES, Inputs
from rim_probe.probing.nearest_step.fit import (
    CONTEXTS,
    Cell,
    Fit,
    Searched,
    StepDecoder,
    Task,
    control_sources,
    fit_cell,
    problems_of,
    read_report,
    search,
)
from rim_probe.probing.nearest_step.formula import DIRECTIONS, DISTRACTORS, REFERENCES, RIDGE, SHARPNESS
from rim_probe.probing.section import Estimate, Figure, Section, Table, Target

if TYPE_CHECKING:
    from rim_probe.probing.study import Study

GOAL, MARGIN = 0.9, 0.3
OWN, BEFORE, NEW, BANK = "all steps", "steps before the last", "chains unseen in the fit", "whole bank"


@dataclass(frozen=True)
class Scores:
    """One row of the report: what was right in each problem of "report".

    Attributes:
        cells: step -> the cell read; searched: how many there were to choose from, features: that a map of one sees.
        right [kinds, steps, n]: whether the nearest step is the true one, NaN where it is not asked.
    """

    name: str
    control: bool
    cells: dict[int, Cell]
    searched: int
    features: int
    right: dict[str, np.ndarray]

    def share(self, kind: str = OWN, less: Scores | None = None, step: int | None = None) -> Estimate:
        """Top-1 over all places, or of one step index; less that of another row, place by place. The interval is over
        problems, each with all of its steps."""
        own = self.right[kind] - (less.right[kind] if less else 0)
        own = own if step is None else own[[step - 1]]
        return ratio_estimate(np.nansum(own, axis=0), (~np.isnan(own)).sum(0))


def report(study: Study, decoder: StepDecoder, fit: Fit) -> Section:
    """The section.

    Raises:
        RiMError: too few problems with steps.
    """
    read_report(study, fit)
    rows = _rows(study, fit)
    memory, controls = rows[0], rows[1:]
    own = {row.name: row.share() for row in rows}
    best = max(controls, key=lambda row: own[row.name].value)
    margin, top = memory.share(less=best), own[memory.name]
    chance = float(np.mean(np.concatenate([1 / task.asked["report"].counts for task in fit.tasks])))
    bank = len(decoder.bank.texts)
    return Section(
        name="steps",
        title="Nearest explicit step",
        question="Which step of an explicit reasoning does a memory block lie nearest to, read from plain text by the "
        "same model, and is it the step that the problem needs?",
        summary=f"Among a problem's own steps and {DISTRACTORS} hard distractors the memory's nearest step is right "
        f"for {top.value:.1%} of the steps, guessing for {chance:.1%}; in the whole bank of {bank:,} steps for "
        f"{memory.share(BANK).value:.1%} of those it holds. Against controls of as many cells and features, "
        + "; ".join(f"{kind}: {_compared(rows, kind)}" for kind in (OWN, BEFORE, NEW))
        + ".",
        n={part: len(fit.tasks[0].asked[part].rows) for part in ("choose", "report")} | {"fit": len(fit.tasks[0].rows)},
        settings={
            "reading layer of the steps": fit.reading_layer,
            "cells of the memory (layers x blocks)": memory.searched,
            "most features of a cell": MOST_FEATURES,
            "chosen for each step": {str(step): str(cell) for step, cell in memory.cells.items()},
            "ridge, directions, sharpness of the recall": [RIDGE, DIRECTIONS, SHARPNESS],
            "bank": bank,
            "contexts per step of the bank": f"up to {CONTEXTS}",
            "reference steps read in every place": REFERENCES,
            "seed": study.seed,
        },
        tables=[_main_table(rows, bank, chance), _by_step(rows, fit)],
        figures=[_bars(rows, own, chance), *_maps(study, fit, memory)],
        targets=[
            Target(f"top-1 among own steps and {DISTRACTORS} hard distractors", ">= 90 %", top, top.value >= GOAL),
            Target(f"top-1 above the best control ({best.name})", ">= 30 points", margin, margin.value >= MARGIN),
        ],
        data={
            "claims": {str(step): blocks for step, blocks in decoder.claims.items()},
            "alignment on “choose”": [
                {"block": block, "step": step, "top1": one.alignment} for (block, step), one in decoder.maps.items()
            ],
            "best control": best.name,
            "chance": chance,
        },
    )


# ------------------------------------------------------------------------------------------------------------- scoring


def _rows(study: Study, fit: Fit) -> list[Scores]:
    """The memory first, then its controls."""
    asked = _kinds(study)

    def row(name: str, searched: Searched, cells: dict[int, Cell], another: bool = False) -> Scores:
        shape = (len(fit.tasks), len(study.problems("report")))
        right = {kind: np.full(shape, np.nan) for kind in (*asked, BANK)}
        for i, task in enumerate(fit.tasks):
            rows, ranks, in_bank = _ranks(study, cells[task.step], task, fit, another)
            right[BANK][i, rows] = np.where(np.isnan(in_bank), np.nan, in_bank <= 0)
            for kind, counts in asked.items():
                right[kind][i, rows] = np.where(counts(task.step, rows), ranks <= 0, np.nan)
        width = cells[1].mapped.to_directions.weights.shape[0]
        count = sum(grid.size for grid in list(searched.top1.values())[:1])
        return Scores(name, name != "memory", cells, count, min(width, MOST_FEATURES), right)

    best = {task.step: fit.memory.best(task.step) for task in fit.tasks}
    rows = [row("memory", fit.memory, best)]
    for source in control_sources(study):
        found = search(study, source, fit)
        rows.append(row(source.name, found, {task.step: found.best(task.step) for task in fit.tasks}))
    shuffled = {}
    for task in fit.tasks:
        cell = best[task.step]
        inputs = Inputs([cell.source.read("fit", cell.layer, cell.place)], MOST_FEATURES, study.seed)
        other = replace(task, targets=study.rng(f"steps shuffled {task.step}").permutation(task.targets))
        states = cell.source.read("choose", cell.layer, cell.place)
        shuffled[task.step] = fit_cell(cell.source, cell.layer, cell.place, inputs, states, other, fit.bank)
    rows.append(row("shuffled pairing", fit.memory, shuffled))
    return [*rows, row("another question's memory", fit.memory, best, another=True)]


def _kinds(study: Study) -> dict[str, Callable[[int, np.ndarray], np.ndarray]]:
    """Which places count: from a step index and problem numbers to bool."""
    problems = study.problems("report")
    length = np.array([len(problem.steps) for problem in problems])
    known = {problem.steps for part in ("fit", "choose") for problem in problems_of(study, part)}
    new = np.array([problem.steps not in known for problem in problems])
    return {
        OWN: lambda step, rows: np.full(len(rows), True),
        BEFORE: lambda step, rows: length[rows] > step,
        NEW: lambda step, rows: new[rows],
    }


def _ranks(study: Study, cell: Cell, task: Task, fit: Fit, another: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Problem numbers of "report", the rank of their step among the candidates, and in the bank."""
    asked = task.asked["report"]
    states = cell.source.read("report", cell.layer, cell.place)[asked.rows]
    if another:  # a cycle through all of them in random order: nobody gets their own
        order = study.rng(f"steps another {task.step}").permutation(len(states))
        other = np.empty_like(order)
        other[order] = np.roll(order, 1)
        states = states[other]
    recalled = cell.mapped.recalled(states, fit.bank.vectors)
    return asked.rows, asked.ranks(recalled), fit.bank.ranks(cell.mapped, states, asked.texts)


# ------------------------------------------------------------------------------------------------------------- telling


def _compared(rows: list[Scores], kind: str) -> str:
    """What the memory's lead over the best control of equal capacity comes to."""
    memory = rows[0]
    equal = [row for row in rows[1:] if (row.searched, row.features) == (memory.searched, memory.features)]
    best = max(equal, key=lambda row: np.nan_to_num(row.share(kind).value))
    lead = memory.share(kind, less=best)
    if not lead.n:
        return "none are asked"
    verdict = "more than" if lead.low > 0 else "less than" if lead.high < 0 else "no more and no less than"
    return (
        f"{memory.share(kind).value:.1%}, {verdict} the best control, {best.name}, with {best.share(kind).value:.1%} "
        f"(difference {100 * lead.value:+.1f} points, {100 * lead.low:+.1f} to {100 * lead.high:+.1f})"
    )


def _main_table(rows: list[Scores], bank: int, chance: float) -> Table:
    memory = rows[0]
    cells: list[list[Any]] = []
    for row in rows:
        found: list[Any] = [_label(row), row.searched, row.features]
        for kind in (OWN, BEFORE, NEW, BANK):
            found += [row.share(kind), row.share(kind, less=memory) if row.control else None]
        cells.append(found)
    kinds = (OWN, BEFORE, NEW, f"{BANK} ({bank:,})")
    columns = [f"{kind}: {what}" for kind in kinds for what in ("top-1, %", "minus memory, points in %")]
    return Table(
        "Nearest step",
        ["read from", "cells", "features", *columns],
        cells,
        note=f"Candidates: the problem's own steps and {DISTRACTORS} hard distractors, read in the problem's context; "
        f"in the bank every distinct step of “fit”, and only steps that it holds are asked. Guessing is right for "
        f"{chance:.1%}, in the bank for {1 / bank:.1%}. Cells: how many the best one on “choose” was taken from. "
        "Intervals are over problems.",
    )


def _by_step(rows: list[Scores], fit: Fit) -> Table:
    cells = []
    for task in fit.tasks:
        for row in rows:
            shares = (row.share(kind, step=task.step) for kind in (OWN, BANK))
            name = f"step {task.step}: {_label(row)}"
            cells.append([name, str(row.cells[task.step]), len(task.asked["report"].rows), *shares])
    return Table(
        "Nearest step by index of the step",
        ["step and source", "cell", "n", "own + distractors: top-1, %", "whole bank: top-1, %"],
        cells,
    )


def _label(row: Scores) -> str:
    return f"control: {row.name}" if row.control else row.name


def _bars(rows: list[Scores], own: dict[str, Estimate], chance: float) -> Figure:
    bars = [
        {
            "name": r.name,
            "value": own[r.name].value,
            "low": own[r.name].low,
            "high": own[r.name].high,
            "control": r.control,
        }
        for r in rows
    ]
    bars.append({"name": "guessing", "value": chance, "low": None, "high": None, "control": True})
    note = f"Top-1 over all steps of n = {own[rows[0].name].n:,} problems of “report”, 95 % intervals over problems."
    return Figure("bars", "Own steps and distractors", "read from", "top-1, %", {"bars": bars}, note)


def _maps(study: Study, fit: Fit, memory: Scores) -> list[Figure]:
    """Which block lies nearest to which step, and at which layer, on "choose"."""
    steps, blocks = [task.step for task in fit.tasks], range(1, study.K + 1)
    chance = float(np.mean([(1 / task.asked["choose"].counts).mean() for task in fit.tasks]))
    layers, names = [str(layer) for layer in spread_layers(study.layers)], [f"block {block}" for block in blocks]
    best = [[fit.memory.cells[block, step].top1 for step in steps] for block in blocks]
    found = [("Which block lies nearest to which step", "step", "block", [f"step {t}" for t in steps], names, best)]
    for step in steps:
        found.append(
            (f"Where step {step} was looked for", "block", "layer", names, layers, fit.memory.top1[step].tolist())
        )
    note = f"Split “choose”: this map chose the cells and is no result. The scale begins at guessing, {chance:.1%}."
    scale = {"hover": None, "z_title": "top-1, %", "low": chance, "high": 1.0, "diverging": False}
    return [
        Figure("heatmap", title, x_title, y_title, {"x": x, "y": y, "z": z} | scale, note)
        for title, x_title, y_title, x, y, z in found
    ]
