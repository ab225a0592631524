"""The report of the value probes: accuracy beside the controls, heat maps of every cell.

Knows the outcomes of `value_grid` and how a report is made of them. Knows nothing of states or probes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from rim_probe.probing.curves import curve, mean_estimate
from rim_probe.probing.hooks import layers_told
from rim_probe.probing.section import Figure, Section, Table, proportion_estimate
from rim_probe.probing.value_grid import FEWEST_SEEN, POSITIONS, RIDGES, Grid, Target, probed_layers

MOST_HEATMAPS = 13  # all of four quantities of three steps, and the answer

if TYPE_CHECKING:
    from rim_probe.probing.study import Study


def report(
    study: Study, targets: Sequence[Target], fit_problems: int, memory: Grid, controls: Mapping[str, Grid]
) -> Section:
    table_rows, summaries = [], []
    for i, target in enumerate(targets):
        cell = memory.best(i)
        at = (i, *cell)
        right, chance = memory.right[at], memory.control_right[at]
        labels = target.labels["report"][target.labels["report"] >= 0]
        accuracy, selectivity = proportion_estimate(right), mean_estimate(right.astype(float) - chance)
        others = {name: proportion_estimate(grid.right[(i, *grid.best(i))]) for name, grid in controls.items()}
        table_rows.append(
            [
                target.name,
                _cell_name(study, cell),
                len(labels),
                target.covered("report"),
                accuracy,
                selectivity,
                mean_estimate(chance),
                proportion_estimate(labels == 0),
                others["question"],
                others.get("base"),
            ]
        )
        if target.quantity.endswith("result"):
            summaries.append(
                f"the {target.name} is read right for {accuracy.value:.0%} at {_cell_name(study, cell)} "
                f"(control task {chance.mean():.0%}, majority {float((labels == 0).mean()):.0%}, last question token "
                f"{others['question'].value:.0%}" + (f", base {others['base'].value:.0%})" if "base" in others else ")")
            )
    cells, looked = memory.choose[0].size, layers_told(probed_layers(study), study.layers)
    table = Table(
        "Values in the memory",
        [
            "quantity",
            "cell",
            "n",
            "covered, %",
            "accuracy, %",
            "selectivity, points in %",
            "control: random function of the step, %",
            "control: majority class, %",
            "control: last question token, %",
            "control: base model, %",
        ],
        table_rows,
        note=f"The cell is the best of {cells} (layers x blocks x {' or '.join(POSITIONS)}) on split “choose”; so are "
        "the layer of the question control and the cell of the base model. Selectivity: accuracy minus that of the "
        f"control task. Covered: problems with this step whose value occurs at least {FEWEST_SEEN} times in “fit”.",
    )
    return Section(
        name="values",
        title="Values",
        question="Can a linear probe read the operands, the operator and the result of each explicit step in the "
        "memory blocks, and where?",
        summary=_sentence(summaries) if summaries else "No step's result occurs often enough to be probed.",
        n={"fit": fit_problems, "choose": len(study.problems("choose")), "report": len(study.problems("report"))},
        settings={
            "cells searched per quantity": cells,
            **({} if looked == "all layers" else {"layers searched": looked}),
            "classifier": "ridge regression on one-hot labels, standardised states, strength chosen on choose from "
            + ", ".join(f"{ridge:g} n" for ridge in RIDGES),
        },
        tables=[table],
        figures=[_by_block(study, targets, memory), *(_heatmap(study, targets[i], i, memory) for i in _shown(memory))],
        data={
            target.name: {
                "accuracy": memory.report[i].round(4).tolist(),
                "control": memory.control[i].round(4).tolist(),
            }
            for i, target in enumerate(targets)
        }
        | {"axes": {"positions": list(POSITIONS), "layers": probed_layers(study), "blocks": study.K}},
    )


def _sentence(parts: list[str]) -> str:
    text = "; ".join(parts)
    return text[0].upper() + text[1:] + "."


def _cell_name(study: Study, cell: tuple[int, int, int]) -> str:
    place, layer, block = cell
    return f"layer {probed_layers(study)[layer]}, block {block + 1} {POSITIONS[place]}"


def _by_block(study: Study, targets: Sequence[Target], grid: Grid) -> Figure:
    """Results by block, each at its own best layer and position."""
    series = []
    x = list(range(1, study.K + 1))
    for i, target in enumerate(targets):
        if not target.quantity.endswith("result"):
            continue
        place, layer, _ = grid.best(i)
        where = f"layer {probed_layers(study)[layer]}, {POSITIONS[place]}"
        for name, outcomes in (("", grid.right), ("control task, ", grid.control_right)):
            found = [mean_estimate(outcomes[i, place, layer, block]) for block in range(study.K)]
            series.append(curve(f"{name}{target.name}, {where}", x, found, control=bool(name)))
    return Figure("lines", "Results of the steps by block", "block", "accuracy", {"series": series})


def _shown(memory: Grid) -> list[int]:
    """The targets that get a heat map: those whose best cell beats its control task by most, in their own order."""
    lead = [
        memory.report[(i, *memory.best(i))] - memory.control[(i, *memory.best(i))] for i in range(len(memory.report))
    ]
    return sorted(np.argsort(lead)[::-1][:MOST_HEATMAPS].tolist())


def _heatmap(study: Study, target: Target, i: int, grid: Grid) -> Figure:
    order = [(block, place) for block in range(study.K) for place in range(len(POSITIONS))]
    labels = target.labels["report"][target.labels["report"] >= 0]
    majority = float((labels == 0).mean())
    accuracy = [[float(grid.report[i, p, layer, b]) for b, p in order] for layer in range(len(probed_layers(study)))]
    control = [[float(grid.control[i, p, layer, b]) for b, p in order] for layer in range(len(probed_layers(study)))]
    hover = [
        [
            f"accuracy {a:.1%}, control task {c:.1%}, selectivity {100 * (a - c):+.1f} points"
            for a, c in zip(*both, strict=True)
        ]
        for both in zip(accuracy, control, strict=True)
    ]
    data = {
        "x": [f"block {block + 1} {POSITIONS[place]}" for block, place in order],
        "y": [str(layer) for layer in probed_layers(study)],
        "z": accuracy,
        "hover": hover,
        "z_title": "accuracy",
        "low": majority,
        "high": 1.0,
        "diverging": False,
    }
    note = (
        f"n = {len(labels)} problems of “report”; the scale begins at the majority class, {majority:.0%}; the control "
        f"task reaches {np.nanmax(control):.0%} in its best cell."
    )
    return Figure("heatmap", f"Accuracy: {target.name}", "position", "layer", data, note)
