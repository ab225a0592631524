"""The interchange test told: tables, heat maps and targets made from its outcomes.

Knows how outcomes are summed up. Knows nothing of models and swaps (see `interchange`).
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from rim_probe.probing.section import Estimate, Figure, Section, Table, Target, proportion_estimate

if TYPE_CHECKING:
    from rim_probe.probing.interchange import Cell, Results

_OWN, _PREDICTED, _PARTNER = range(3)
_POSITIONS = {"slots": "slots", "block": "whole block but the token where the answer is read"}


def section(results: "Results", seed: int) -> Section:
    """The report of the interchange test."""
    chosen, joint, outcomes = results.chosen, results.joint, results.outcomes
    other = _POSITIONS["block" if chosen.positions == "slots" else "slots"]
    labels = {
        "claimed": f"the partner's ({chosen})",
        "random": "control: the same of a random other problem",
        "strict": "strict: the partner differs in a later number, too",
        "wrong": "control, strict: as many blocks not claimed",
        "wrong, one number": "as many blocks not claimed, one number changed (later ones may hold what follows)",
        "other positions": f"the partner's, {other}",
        "all layers": "the partner's, all layers",
        "joint": f"best joint swap ({joint})",
        "read token": "positive control: the token where the answer is read, all layers",
    }
    said = {name: np.array([row for _, row in outcomes.get(name, [])], dtype=bool).reshape(-1, 3) for name in labels}
    gave = {name: proportion_estimate(rows[:, _PREDICTED]) for name, rows in said.items()}
    kept = {name: proportion_estimate(rows[:, _OWN]) for name, rows in said.items()}
    copied = {name: proportion_estimate(rows[:, _PARTNER]) for name, rows in said.items()}
    main, strict, wrong = gave["claimed"], gave["strict"], gave["wrong"]
    by_step = [
        [
            f"step {t}, blocks {', '.join(map(str, blocks))}",
            proportion_estimate(bool(row[_PREDICTED]) for step, row in outcomes.get("claimed", []) if step == t),
        ]
        for t, blocks in sorted(results.claims.items())
    ]
    tables = [
        Table(
            "What the model says after the swap",
            ["swapped", "the predicted answer, %", "its own answer still, %", "the partner's answer, %", "pairs"],
            [[label, gave[name], kept[name], copied[name], gave[name].n] for name, label in labels.items()],
            note="Pairs whose problems are both answered right at that readout. The token where the answer is read is "
            "left alone, except in the positive control. With one number changed it is the partner's answer.",
        ),
        Table("Success by step", ["the changed number enters at", "the predicted answer, %"], by_step),
        Table(
            "Success on the split choose, the best cell of each kind",
            ["cell", "the predicted answer, %", "pairs"],
            [[str(cell), results.searched[cell], results.searched[cell].n] for cell in _best_of_kinds(results)],
            note=f"{len(results.searched)} cells were searched.",
        ),
    ]
    bars = [
        {
            "name": label.partition(" (")[0],
            "value": gave[name].value,
            "low": gave[name].low,
            "high": gave[name].high,
            "control": "control" in label,
        }
        for name, label in labels.items()
        if gave[name].n
    ]
    figures = [
        Figure("bars", "Swaps that give the predicted answer", "swapped", "share of pairs", {"bars": bars}),
        *(_heatmap(results, t) for t in sorted(results.claims)),
    ]
    targets = [
        Target("interchange success, claimed blocks at the best cell", ">= 70 %", main, bool(main.value >= 0.7)),
        Target("interchange success, blocks not claimed (strict)", "<= 10 %", wrong, bool(wrong.value <= 0.1)),
    ]
    return Section(
        name="interchange",
        title="Interchange test",
        question="If a block is taken from a problem that differs in one number, does the model then give the answer "
        "that the problem's own equations predict?",
        summary=_summary(gave, kept["claimed"]),
        n={
            **results.counts,
            "report pairs answered right": main.n,
            "strict pairs answered right": strict.n,
        },
        settings={
            "claims": {str(t): list(blocks) for t, blocks in results.claims.items()},
            "cell": str(chosen),
            "joint cell": str(joint),
            "cells searched": len(results.searched),
            "chosen on": "choose",
            "seed": seed,
        },
        tables=tables,
        figures=figures,
        targets=targets,
        data={
            "cell": chosen._asdict(),
            "joint": joint._asdict(),
            "choose": [{**cell._asdict(), "value": e.value, "n": e.n} for cell, e in results.searched.items()],
        },
    )


def _summary(gave: Mapping[str, Estimate], kept: Estimate) -> str:
    main = gave["claimed"]
    text = (
        f"With the claimed blocks taken from the partner, the model gave the predicted answer in {_share(main)} of "
        f"{main.n} pairs (95 % interval {main.low:.1%} to {main.high:.1%}) and kept its own in {_share(kept)}. "
        f"Strict test {_share(gave['strict'])}, against {_share(gave['wrong'])} for blocks not claimed and "
        f"{_share(gave['random'])} for the blocks of a random problem; best joint swap {_share(gave['joint'])}."
    )
    if main.n and main.high < 0.5 and not gave["joint"].high >= 0.5:
        text += (
            f" Swapping the token where the answer is read gave it in {_share(gave['read token'])}, so the instrument "
            "can change an answer: the model does not compute it from what these blocks hold."
        )
    return text


def _share(estimate: Estimate) -> str:
    return f"{estimate.value:.1%}" if estimate.n else "not defined"


def _best_of_kinds(results: "Results") -> list["Cell"]:
    """The best cell of every choice of blocks and positions, single layers and all layers apart."""
    from rim_probe.probing.interchange import best

    kinds: dict[tuple, list[Cell]] = {}
    for cell in results.searched:
        kinds.setdefault((cell.family, cell.layer is None, cell.positions), []).append(cell)
    return [best(results.searched, cells) for cells in kinds.values()]


def _heatmap(results: "Results", step: int) -> Figure:
    blocks: Sequence[int] = range(1, results.num_blocks + 1)
    estimates = [
        [proportion_estimate(results.heat.get((step, block, layer), [])) for block in blocks]
        for layer in results.layers
    ]
    n = max(e.n for row in estimates for e in row)
    return Figure(
        "heatmap",
        f"One block swapped, the changed number enters at step {step} (n = {n})",
        "block",
        "layer",
        {
            "x": [str(block) for block in blocks],
            "y": ["all" if layer is None else str(layer) for layer in results.layers],
            "z": [[e.value if e.n else None for e in row] for row in estimates],
            "hover": [[f"{_share(e)} ({e.low:.1%} to {e.high:.1%}), n = {e.n}" for e in row] for row in estimates],
            "z_title": "predicted answer",
            "low": 0.0,
            "high": 1.0,
            "diverging": False,
        },
        note=f"Share of pairs in which the predicted answer is said; {_POSITIONS[results.chosen.positions]}, readout "
        f"{results.chosen.readout}, which later blocks cannot reach.",
    )
