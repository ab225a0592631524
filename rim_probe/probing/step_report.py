"""The report of the nearest-step decoder: scores beside their controls, where each step lies, the targets.

Knows ranks and how a report is made of them. Knows nothing of models, maps or spaces.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from rim_probe.probing.hooks import layers_told
from rim_probe.probing.section import BOOTSTRAP_DRAWS, Estimate, Figure, Section, Table, Target
from rim_probe.probing.step_maps import CANONICAL, RIDGES, SHARPNESSES
from rim_probe.probing.step_space import CONTEXTS, DISTRACTORS, REFERENCES, SHRINKAGE, share_within

if TYPE_CHECKING:
    from rim_probe.probing.step_search import Fit, Row, Score
    from rim_probe.probing.steps import StepDecoder
    from rim_probe.probing.study import Study

GOAL, MARGIN = 0.9, 0.3
LARGE_BANK = 5_000
_WHOLE = "cells, claims, alignment, and every table but the last"
_SEVERAL_DIGITS = re.compile(r"\d{2}")


def report(
    study: Study, decoder: StepDecoder, fit: Fit, rows: Sequence[Row], shipped: Sequence[tuple[Score, Score]] = ()
) -> Section:
    """The section.

    Args:
        rows: they begin with the memory's best cell and all its blocks together.
        shipped: of every step index that is stored in few numbers, the best cell's score with its whole map and with
            the stored one, in the same bank.
    """
    n = len(study.problems("report"))
    memory, joint, controls = rows[0], rows[1], [row for row in rows if row.control]
    own = {row.name: _pooled(row.scores.values(), n) for row in rows}
    best = max(controls, key=lambda row: own[row.name].value)
    chance = float(np.mean(np.concatenate([task.asked["report"].chance for task in fit.tasks])))
    margin = _margin(memory, best, n)
    in_bank = np.concatenate([~np.isnan(score.bank_ranks) for score in memory.scores.values()])
    searched = {name: sum(map(len, found)) for name, found in fit.searched.items()}
    cells = len(fit.searched["memory"][0])
    looked = layers_told({one.cell.layer for one in fit.searched["memory"][0]}, study.layers)
    top, base = own[memory.name], own[best.name]
    return Section(
        name="steps",
        title="Nearest explicit step",
        question="Which step of an explicit reasoning does a memory block lie nearest to, read from plain text by the "
        "same model, and is it the step that the problem needs?",
        summary=(
            f"Among a problem's own steps and {DISTRACTORS} hard distractors the memory's nearest step is right "
            f"for {_say(top)} of the steps (all blocks together {_say(own[joint.name])}); the best control, "
            f"{best.name}, reaches {_say(base)}, guessing {chance:.1%}. In the whole bank of "
            f"{len(decoder.bank.texts):,} steps, which holds {in_bank.mean():.1%} of those asked, it is "
            f"{_say(_pooled(memory.scores.values(), n, bank=True))} of these. "
            + _verdict(top, margin)
            + (_say_stored(shipped, n) if shipped else "")
        ),
        n={
            "fit": len(fit.tasks[0].fit_rows),
            "choose": len(fit.tasks[0].asked["choose"].rows),
            "report": len(memory.scores[min(memory.scores)].rows),
        },
        settings={
            "reading layer of the steps": decoder.reading_layer,
            "top-1 on “choose” while the reading layer was chosen": {str(k): v for k, v in fit.reading.items()},
            "cells of the memory (layers x blocks x positions)": cells,
            **({} if looked == "all layers" else {"layers searched": looked}),
            "fits searched (cells x steps)": searched,
            "chosen for each step": {str(step): str(one) for step, one in memory.cells.items()},
            "ridges tried": list(RIDGES),
            "canonical pairs": CANONICAL,
            "sharpnesses tried": list(SHARPNESSES),
            "bank": len(decoder.bank.texts),
            **({"stored": decoder.stored.told | {"of the whole maps are": _WHOLE}} if decoder.stored else {}),
            "contexts per step of the bank": f"up to {CONTEXTS}, {fit.places_read:,} places in all",
            "reference steps read in every place": REFERENCES,
            "shrinkage of the whitening": SHRINKAGE,
            "steps of “report” that are in the bank": float(in_bank.mean()),
            "seed": study.seed,
        },
        tables=[
            _main_table(rows, n, chance, len(decoder.bank.texts), float(in_bank.mean())),
            _by_step(rows, fit, n),
            _by_answer(study, [memory, joint, best], n),
            *([_stored_table(decoder, shipped, n)] if shipped else []),
        ],
        figures=[_bars(rows, own, chance), _alignment(study, fit), *_layers(study, fit)],
        targets=[
            Target(f"top-1 among own steps and {DISTRACTORS} hard distractors", ">= 90 %", top, top.value >= GOAL),
            Target(f"top-1 above the best control ({best.name})", ">= 30 points", margin, margin.value >= MARGIN),
        ],
        data={
            "claims": {str(step): blocks for step, blocks in decoder.claims.items()},
            "alignment on “choose”": [
                {"block": block, "step": step, "top1": top1} for (block, step), top1 in decoder.alignment.items()
            ],
            "best control": best.name,
            "chance": chance,
        },
    )


# ------------------------------------------------------------------------------------------------------------- numbers


def _pooled(
    scores: Iterable[Score], n: int, top: int | None = 1, *, bank: bool = False, kept: np.ndarray | None = None
) -> Estimate:
    """All places pooled: top-`top`, or the mean reciprocal rank for None; the interval is over problems.

    Args:
        kept: bool [n], the problems that count; all by default. The estimate's n is a number of problems.
    """
    sums, counts = np.zeros(n), np.zeros(n)
    for score in scores:
        ranks = score.bank_ranks if bank else score.ranks
        known = ~np.isnan(ranks)
        values = 1 / (1 + ranks) if top is None else ranks <= top - 1
        np.add.at(sums, score.rows[known], values[known])
        np.add.at(counts, score.rows[known], 1)
    return _ratio(sums, counts, kept)


def _margin(memory: Row, control: Row, n: int) -> Estimate:
    """Top-1 of the memory minus that of a control, place by place."""
    sums, counts = np.zeros(n), np.zeros(n)
    for step, score in memory.scores.items():
        other = control.scores[step].ranks
        np.add.at(sums, score.rows, (score.ranks <= 0).astype(float) - (other <= 0))
        np.add.at(counts, score.rows, 1)
    return _ratio(sums, counts)


def _ratio(sums: np.ndarray, counts: np.ndarray, kept: np.ndarray | None = None) -> Estimate:
    """Sum over sum with its 95 % percentile bootstrap interval, problems (with all their steps) drawn with repeats."""
    asked = counts > 0 if kept is None else (counts > 0) & kept
    sums, counts = sums[asked], counts[asked]
    n = len(sums)
    if n == 0:
        return Estimate(float("nan"), float("nan"), float("nan"), 0)
    # How often each problem is drawn; a matrix product then is all the draws at once.
    draws = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=BOOTSTRAP_DRAWS).astype(np.float32)
    low, high = np.quantile((draws @ sums) / (draws @ counts), [0.025, 0.975])
    return Estimate(float(sums.sum() / counts.sum()), float(low), float(high), n)


def _say(estimate: Estimate) -> str:
    return f"{estimate.value:.1%}" if estimate.n else "unknown (it holds none of them)"


def _verdict(top: Estimate, margin: Estimate) -> str:
    missed = []
    if top.value < GOAL:
        missed.append(f"{100 * (GOAL - top.value):.1f} points short of {GOAL:.0%}")
    if margin.value < MARGIN:
        side = "only {:.1f} points above" if margin.value >= 0 else "{:.1f} points below"
        missed.append(side.format(abs(100 * margin.value)) + " the best control")
    return f"The target is missed: {' and '.join(missed)}." if missed else "Both targets are met."


# -------------------------------------------------------------------------------------------------------------- tables


def _main_table(rows: Sequence[Row], n: int, chance: float, bank: int, in_bank: float) -> Table:
    cells = []
    for row in rows:
        scores = list(row.scores.values())
        numbers = [_pooled(scores, n, top, bank=whole) for whole in (False, True) for top in (1, 5, None)]
        cells.append([f"control: {row.name}" if row.control else row.name, *numbers])
    small = (
        f" The data hold only {bank:,} distinct steps, fewer than the {LARGE_BANK:,} of a large bank."
        if bank < LARGE_BANK
        else ""
    )
    return Table(
        "Nearest step: all steps together",
        [
            "read from",
            "own + distractors: top-1, %",
            "top-5, %",
            "MRR",
            f"whole bank ({bank:,}): top-1, %",
            "top-5, %",
            "MRR",
        ],
        cells,
        note=f"Candidates: the problem's own steps and {DISTRACTORS} hard distractors, read in the problem's context. "
        f"Guessing is right for {chance:.1%}; a decode that knows nothing of the problem may be right less often (see "
        "another question's memory), as a true step is the middle of its distractors and seldom the farthest out in "
        f"any direction. Guessing in the bank is right for {1 / bank:.1%}; {in_bank:.1%} of the reported steps are in "
        f"the bank, and only these are asked.{small} Intervals are over problems. MRR: mean reciprocal rank. All "
        "blocks side by side: one map from the slots of all blocks at once, at the layer of the best cell.",
    )


def _by_step(rows: Sequence[Row], fit: Fit, n: int) -> Table:
    cells = []
    for task in fit.tasks:
        chance = float(task.asked["report"].chance.mean())
        for row in rows:
            score = [row.scores[task.step]]
            cells.append(
                [
                    f"step {task.step}: {'control: ' if row.control else ''}{row.name}",
                    str(row.cells[task.step].cell),
                    len(row.scores[task.step].rows),
                    _pooled(score, n),
                    _pooled(score, n, bank=True),
                ]
            )
        cells.append([f"step {task.step}: guessing", None, None, chance, None])
    return Table(
        "Nearest step by index of the step",
        ["step and source", "cell", "n", "own + distractors: top-1, %", "whole bank: top-1, %"],
        cells,
        note="Each cell is the best one on “choose”, of the memory and of each control that has its own cells.",
    )


def _by_answer(study: Study, rows: Sequence[Row], n: int) -> Table:
    right = study.right("report")[:, -1]
    several = np.array([any(map(_SEVERAL_DIGITS.search, p.steps)) for p in study.problems("report")])
    groups = [("answered right", right), ("answered wrong", ~right), ("with a number of several digits", several)]
    cells = []
    for name, kept in groups:
        for row in rows:
            own = _pooled(row.scores.values(), n, kept=kept)
            if own.n:
                label = f"{name}: {'control: ' if row.control else ''}{row.name}"
                cells.append([label, own.n, own, _pooled(row.scores.values(), n, bank=True, kept=kept)])
    return Table(
        "Nearest step, problems apart",
        ["problems and source", "problems", "own + distractors: top-1, %", "whole bank: top-1, %"],
        cells,
        note="Right and wrong: by the final readout of the memory model."
        + ("" if several.any() else " No problem holds a number of several digits."),
    )


def _stored_table(decoder: StepDecoder, shipped: Sequence[tuple[Score, Score]], n: int) -> Table:
    names = ("whole maps and bank", "as stored: what decodes a question")
    cells = []
    for name, scores in zip(names, zip(*shipped, strict=True), strict=True):
        cells.append([name, *(_pooled(scores, n, top, bank=True) for top in (1, 5, None))])
    told = decoder.stored.told
    return Table(
        "Nearest step in the form that is stored",
        ["memory, best cell", f"whole bank ({len(decoder.bank.texts):,}): top-1, %", "top-5, %", "MRR"],
        cells,
        note=f"The same cells and problems of “report”, steps 1 to {len(shipped)}. Stored are {told['form']}, "
        f"{told['steps of the bank']:,} steps of the bank and {told['maps']}; a step of the bank that is not stored "
        "counts as missed. Which block holds which step (alignment and claims) is measured with the whole maps.",
    )


def _say_stored(shipped: Sequence[tuple[Score, Score]], n: int) -> str:
    whole, stored = (_pooled(scores, n, bank=True) for scores in zip(*shipped, strict=True))
    return (
        f" Maps and bank are stored in fewer numbers: in the bank, steps 1 to {len(shipped)}, what is stored is right "
        f"for {_say(stored)}, the whole maps for {_say(whole)}."
    )


# ------------------------------------------------------------------------------------------------------------- figures


def _bars(rows: Sequence[Row], own: dict[str, Estimate], chance: float) -> Figure:
    bars = [
        {
            "name": row.name,
            "value": own[row.name].value,
            "low": own[row.name].low,
            "high": own[row.name].high,
            "control": row.control,
        }
        for row in rows
    ]
    bars.append({"name": "guessing", "value": chance, "low": None, "high": None, "control": True})
    note = f"Top-1 over all steps of n = {own[rows[0].name].n:,} problems of “report”, 95 % intervals over problems."
    return Figure("bars", "Own steps and distractors", "read from", "top-1, %", {"bars": bars}, note)


def _alignment(study: Study, fit: Fit) -> Figure:
    steps, blocks = [task.step for task in fit.tasks], range(1, study.K + 1)
    values = [[share_within(fit.alignment[block, step].ranks, 1) for step in steps] for block in blocks]
    counts = ", ".join(f"step {task.step}: n = {len(task.asked['report'].rows):,}" for task in fit.tasks)
    chance = float(np.mean([task.asked["report"].chance.mean() for task in fit.tasks]))
    return Figure(
        "heatmap",
        "Which block lies nearest to which step",
        "step",
        "block",
        {
            "x": [f"step {step}" for step in steps],
            "y": [f"block {block}" for block in blocks],
            "z": values,
            "hover": None,
            "z_title": "top-1, %",
            "low": chance,
            "high": 1.0,
            "diverging": False,
        },
        f"Among own steps and {DISTRACTORS} hard distractors, each block at its best cell on “choose”; {counts}; the "
        f"scale begins at guessing, {chance:.1%}.",
    )


def _layers(study: Study, fit: Fit) -> list[Figure]:
    """Per step the best position of every block and layer, on “choose”: where the search went."""
    figures = []
    for task, found in zip(fit.tasks, fit.searched["memory"], strict=False):
        layers = sorted({one.cell.layer for one in found})
        best: dict[tuple[int, int], float] = {}
        for one in found:
            at = (one.cell.layer, one.cell.block)
            best[at] = max(best.get(at, 0.0), one.top1)
        chance = float(task.asked["choose"].chance.mean())
        data = {
            "x": [f"block {block}" for block in range(1, study.K + 1)],
            "y": [str(layer) for layer in layers],
            "z": [[best[layer, block] for block in range(1, study.K + 1)] for layer in layers],
            "hover": None,
            "z_title": "top-1, %",
            "low": chance,
            "high": 1.0,
            "diverging": False,
        }
        note = (
            f"Split “choose”, n = {len(task.asked['choose'].rows):,}: this map chose the cells and is no result. The "
            f"scale begins at guessing, {chance:.1%}."
        )
        figures.append(Figure("heatmap", f"Where step {task.step} was looked for", "block", "layer", data, note))
    return figures
