"""Nearest explicit step, the results: memory beside its controls on "report", each at its own best cell on "choose".

The same number of cells and features stand behind the memory and every control that has K places of its own (`search`),
so what is left between them is what they hold. Told apart are steps before the last (the last one's result is the
answer, which every readout is trained to say) and chains that neither "fit" nor "choose" holds. At the memory's best
cell stand two controls more: a map fitted on shuffled problems, and another question's memory.

Knows ranks and what is made of them. Knows nothing of how a step is read or a cell fitted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from rim_probe.probing.linear import MOST_FEATURES
from rim_probe.probing.nearest_step.formula import DIRECTIONS, DISTRACTORS, REFERENCES, RIDGE, SHARPNESS
from rim_probe.probing.nearest_step.search import (
    CONTEXTS,
    MEMORY,
    Cell,
    Fit,
    best,
    control_sources,
    fit_cells,
    problems_of,
    read_report,
    search,
)
from rim_probe.probing.results import Estimate, Goal, Report, Result, proportion_estimate, ratio_estimate

if TYPE_CHECKING:
    from rim_probe.probing.study import Study

GOAL, MARGIN = 0.9, 0.3
ALL, BEFORE, NEW = "all", "steps before the last", "chains unseen in the fit"
TOP1 = f"true step is the nearest of its problem's steps and {DISTRACTORS} hard distractors"
BANK = "true step is the nearest in the whole bank"
Hits = dict[str, np.ndarray]  # TOP1, BANK -> [steps, n] for every problem of "report", NaN where it is not asked


def report(study: Study, fit: Fit, claims: Mapping[int, Sequence[int]]) -> Report:
    """The results; `claims`: step -> the blocks that are claimed to hold it.

    Raises:
        RiMError: too few problems with steps.
    """
    read_report(study, fit)
    rows, read = _rows(study, fit)
    groups, steps = _groups(study, fit), [task.step for task in fit.tasks]

    def top1(name: str, group: str, less: str | None = None, metric: str = TOP1) -> Estimate:
        hits = rows[name][metric] - (rows[less][metric] if less else 0)
        return _share(np.where(groups[group], hits, np.nan))

    controls = [name for name in rows if name != MEMORY]
    strongest = {group: max(controls, key=lambda name: np.nan_to_num(top1(name, group).value)) for group in groups}
    results = []
    for metric in (TOP1, BANK):
        for name, group in ((name, group) for name in rows for group in groups):
            goal = Goal(">=", GOAL) if (metric, name, group) == (TOP1, MEMORY, ALL) else None
            results.append(Result(metric, name, top1(name, group, None, metric), _role(name), group=group, goal=goal))
        for name, group in ((name, group) for name in controls for group in groups):
            goal = Goal(">=", MARGIN) if (metric, name, group) == (TOP1, strongest[ALL], ALL) else None
            lead = top1(MEMORY, group, name, metric)
            results.append(Result(f"{metric}: memory less control", name, lead, group=group, goal=goal))
        results += [
            Result(metric, name, _share(hits[metric][[i]]), _role(name), place={"step": step})
            for i, step in enumerate(steps)
            for name, hits in rows.items()
        ]
    leads = {group: (name, top1(MEMORY, group, name)) for group, name in strongest.items()}
    return Report(
        "steps",
        results + _searched(study, fit, steps),
        {"fit": len(fit.tasks[0].rows)} | {part: len(fit.tasks[0].asked[part].rows) for part in ("choose", "report")},
        {
            "blocks claimed to hold each step": {str(step): list(blocks) for step, blocks in claims.items()},
            "reading layer of the steps": fit.reading_layer,
            "most features of a cell": MOST_FEATURES,
            "read from: cells, features, and the cell chosen on choose for each step": read,
            "ridge, directions, sharpness of the recall": [RIDGE, DIRECTIONS, SHARPNESS],
            "steps in the bank": len(fit.bank.texts),
            "contexts per step of the bank": f"up to {CONTEXTS}",
            "reference steps read in every place": REFERENCES,
            "seed": study.seed,
        },
        "Problem by problem, against the strongest control: " + "; ".join(map(_told, leads.items())) + ".",
    )


def _role(name: str) -> str:
    return "score" if name == MEMORY else "control"


def _share(hits: np.ndarray) -> Estimate:
    """The mean over places, hits [steps, n]; the interval is over problems, each with all of its steps."""
    return ratio_estimate(np.nansum(hits, axis=0), (~np.isnan(hits)).sum(axis=0))


def _rows(study: Study, fit: Fit) -> tuple[dict[str, Hits], dict[str, list]]:
    """Hits of the memory and of its controls by name, and what each was read from."""
    chosen = {MEMORY: {task.step: best(fit.memory, task.step) for task in fit.tasks}}
    counts = {MEMORY: sum(cell.step == fit.tasks[0].step for cell in fit.memory)}
    for source in control_sources(study):
        cells = search(study, source, fit)
        chosen[source.name] = {task.step: best(cells, task.step) for task in fit.tasks}
        counts[source.name] = len(cells) // len(fit.tasks)
    shuffled = {}
    for task in fit.tasks:
        other = replace(task, targets=study.rng(f"steps shuffled {task.step}").permutation(task.targets))
        cell = chosen[MEMORY][task.step]
        (shuffled[task.step],) = fit_cells(study, cell.source, cell.layer, cell.place, fit, [other])
    rows = {name: _hits(study, fit, cells) for name, cells in chosen.items()}
    rows["shuffled pairing"] = _hits(study, fit, shuffled)
    rows["another question's memory"] = _hits(study, fit, chosen[MEMORY], another=True)
    rows["guessing"] = _guesses(fit, rows[MEMORY])
    read = {
        name: [counts[name], cells[1].features, {str(step): str(cell) for step, cell in cells.items()}]
        for name, cells in chosen.items()
    }
    return rows, read


def _hits(study: Study, fit: Fit, cells: Mapping[int, Cell], another: bool = False) -> Hits:
    """What a cell for each step finds, of each problem's own states or of another one's."""
    hits = {metric: np.full((len(fit.tasks), len(study.problems("report"))), np.nan) for metric in (TOP1, BANK)}
    for i, task in enumerate(fit.tasks):
        cell, asked = cells[task.step], task.asked["report"]
        states = cell.states("report")[asked.rows]
        if another:  # a cycle through all of them in random order: nobody gets their own
            order = study.rng(f"steps another {task.step}").permutation(len(states))
            states[order] = states[np.roll(order, 1)]
        hits[TOP1][i, asked.rows] = asked.ranks(cell.mapped.recalled(states, fit.bank.vectors)) <= 0
        ranks = fit.bank.ranks(cell.mapped, states, asked.texts)
        hits[BANK][i, asked.rows] = np.where(np.isnan(ranks), np.nan, ranks <= 0)
    return hits


def _guesses(fit: Fit, asked: Hits) -> Hits:
    """The chance of a guess wherever the memory is asked."""
    top1 = np.full_like(asked[TOP1], np.nan)
    for i, task in enumerate(fit.tasks):
        top1[i, task.asked["report"].rows] = 1 / task.asked["report"].counts
    return {TOP1: top1, BANK: asked[BANK] * 0 + 1 / len(fit.bank.texts)}


def _groups(study: Study, fit: Fit) -> dict[str, np.ndarray]:
    """Which places count, bool [steps, n]."""
    problems, steps = study.problems("report"), np.array([task.step for task in fit.tasks])[:, None]
    known = {problem.steps for part in ("fit", "choose") for problem in problems_of(study, part)}
    return {
        ALL: np.full((len(steps), len(problems)), True),
        BEFORE: np.array([len(problem.steps) for problem in problems]) > steps,
        NEW: np.array([problem.steps not in known for problem in problems]) & (steps > 0),
    }


def _searched(study: Study, fit: Fit, steps: list[int]) -> list[Result]:
    """Which block lies nearest to which step, and at which layer: what cells were chosen by, and no result."""
    found = []
    for block in range(1, study.K + 1):
        of_block = [cell for cell in fit.memory if cell.place == block]
        found += [({"block": block, "step": step}, best(of_block, step)) for step in steps]
    where = [({"step": c.step, "layer": c.layer, "block": c.place}, c) for c in fit.memory if c.step in steps]
    return [
        Result(f"{TOP1} (split choose)", MEMORY, proportion_estimate(cell.hits), split="choose", place=place)
        for place, cell in found + where
    ]


def _told(lead: tuple[str, tuple[str, Estimate]]) -> str:
    """What the memory's lead in a group comes to."""
    group, (control, estimate) = lead
    if not estimate.n:
        return f"{group}: none are asked"
    than = "more than" if estimate.low > 0 else "less than" if estimate.high < 0 else "no more and no less than"
    low, value, high = (100 * x for x in (estimate.low, estimate.value, estimate.high))
    return f"{group}: {than} {control} ({value:+.1f} points, {low:+.1f} to {high:+.1f})"
