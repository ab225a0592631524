"""The interchange test told: tables, heat maps and targets made from its outcomes.

Knows how outcomes are summed up. Knows nothing of models and swaps (see `interchange`).
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from rim_probe.probing.curves import mean_estimate
from rim_probe.probing.section import Estimate, Figure, Section, Table, Target, proportion_estimate

if TYPE_CHECKING:
    from rim_probe.probing.interchange import Outcome, Results

GOAL_CLAIMED, GOAL_WRONG = 0.7, 0.1
INSTRUMENT_FLOOR = 0.5  # the positive control's lower bound from which a failed swap says something of the blocks
_OWN, _PREDICTED, _PARTNER = range(3)
_POSITIONS = {"slots": "slots", "block": "whole block but the token where the answer is read"}


def section(results: "Results", seed: int) -> Section:
    """The report of the interchange test."""
    chosen, joint, outcomes = results.chosen, results.joint, results.outcomes
    other = _POSITIONS["block" if chosen.positions == "slots" else "slots"]
    labels = {
        "claimed": f"the partner's, one number changed ({chosen})",
        "random": "control: the same of a random other problem",
        "strict": "strict: the partner differs in a later number, too",
        "wrong": "control, strict: as many blocks not claimed",
        "wrong, one number": "as many blocks not claimed, one number changed (later ones may hold what follows)",
        "other positions": f"the partner's, {other}",
        "all layers": "the partner's, all layers",
        "joint": f"best joint swap ({joint})",
        "read token": f"positive control: the token where the answer is read, layer {results.read.layer} alone",
        "read token, all layers": "by construction: the token where the answer is read, all layers (shows that the "
        "hook writes)",
    }
    said = {name: np.array([row.said for row in outcomes.get(name, [])], dtype=bool).reshape(-1, 3) for name in labels}
    gave = {name: proportion_estimate(rows[:, _PREDICTED]) for name, rows in said.items()}
    kept = {name: proportion_estimate(rows[:, _OWN]) for name, rows in said.items()}
    copied = {name: proportion_estimate(rows[:, _PARTNER]) for name, rows in said.items()}
    main, strict, wrong = gave["claimed"], gave["strict"], gave["wrong"]
    compared = {
        "one number changed": _paired(outcomes.get("claimed", []), outcomes.get("wrong, one number", [])),
        "strict: a second, later number changed": _paired(outcomes.get("strict", []), outcomes.get("wrong", [])),
    }
    by_step = [
        [
            f"step {t}, blocks {', '.join(map(str, blocks))}",
            proportion_estimate(bool(row.said[_PREDICTED]) for row in outcomes.get("claimed", []) if row.step == t),
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
        Table(
            "Claimed blocks against as many blocks not claimed, on the same pairs",
            ["pairs", "claimed: predicted answer, %", "not claimed, %", "difference, %", "n"],
            [[label, *found, found[0].n] for label, found in compared.items()],
            note="Pairs in which both were swapped. With one number changed blocks not claimed may succeed by right: "
            "what follows from the change is what they should hold. Difference: bootstrap over problems.",
        ),
        Table("Success by step", ["the changed number enters at", "the predicted answer, %"], by_step),
        Table(
            "Success on the split choose, the best cell of each kind",
            ["cell", "the predicted answer, %", "pairs"],
            [[str(cell), results.searched[cell], results.searched[cell].n] for cell in results.best_of_kinds]
            + [[f"stage-1 model: {cell}", estimate, estimate.n] for cell, estimate in results.stage1.items()],
            note=f"{len(results.searched)} cells of each model were searched.",
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
        if gave[name].n and name != "read token, all layers"
    ]
    figures = [
        Figure("bars", "Swaps that give the predicted answer", "swapped", "share of pairs", {"bars": bars}),
        *(_heatmap(results, t) for t in sorted(results.claims)),
    ]
    targets = [
        Target(
            "interchange success, claimed blocks at the best cell, pairs that differ in one number",
            f">= {GOAL_CLAIMED:.0%}".replace("%", " %"),
            main,
            bool(main.value >= GOAL_CLAIMED),
        ),
        Target(
            "interchange success, blocks not claimed, strict pairs (a second, later number differs)",
            f"<= {GOAL_WRONG:.0%}".replace("%", " %"),
            wrong,
            bool(wrong.value <= GOAL_WRONG),
        ),
    ]
    missed = {target.what: _missed_by(target) for target in targets if not target.met}
    return Section(
        name="interchange",
        title="Interchange test",
        question="If a block is taken from a problem that differs in one number, does the model then give the answer "
        "that the problem's own equations predict?",
        summary=" ".join(
            [*_summary(results, gave, kept, copied), *_against(compared), *_missed(results, gave["claimed"])]
        ),
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
            **({} if results.looked == "all layers" else {"single layers searched": results.looked}),
            "chosen on": "choose",
            "positive control": f"read token, layer {results.read.layer}",
            **({"targets missed by": missed, "tried": _tried(results)} if missed else {}),
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


def _summary(results: "Results", gave: Mapping[str, Estimate], kept: Mapping, copied: Mapping) -> list[str]:
    main, strict, read = gave["claimed"], gave["strict"], gave["read token"]
    text = [
        f"With the claimed blocks taken from a partner that differs in one number, the model gave the predicted answer "
        f"in {_told(main)} of {main.n} pairs and simply kept its own in {_share(kept['claimed'])}; with the blocks of "
        f"a random problem it gave it in {_share(gave['random'])}, at the best joint swap in {_share(gave['joint'])}.",
        f"Strict pairs (a second number differs, so that copying fails): {_told(strict)} of {strict.n}, its own answer "
        f"kept in {_share(kept['strict'])}, the partner's own answer copied in {_share(copied['strict'])}; blocks not "
        f"claimed {_told(gave['wrong'])}, copied {_share(copied['wrong'])}.",
    ]
    if main.n and main.high < 0.5 and not gave["joint"].high >= 0.5:
        control = f"The token where the answer is read, swapped at layer {results.read.layer} alone, gave it in "
        if read.n and read.low > INSTRUMENT_FLOOR:
            verdict = (
                "so the instrument can change an answer: the model does not compute it from what these blocks hold."
            )
        else:
            verdict = (
                f"not surely above {INSTRUMENT_FLOOR:.0%}, so the test is inconclusive: it may be too weak to see."
            )
        text.append(f"{control}{_told(read)}, {verdict}")
    return text


def _paired(claimed: Sequence["Outcome"], wrong: Sequence["Outcome"]) -> tuple[Estimate, Estimate, Estimate]:
    """Success of both swaps and their difference, over the pairs in which both were made."""
    success = [{row.index: bool(row.said[_PREDICTED]) for row in rows} for rows in (claimed, wrong)]
    both = [index for index in success[0] if index in success[1]]
    first, second = (np.array([found[index] for index in both], dtype=bool) for found in success)
    return proportion_estimate(first), proportion_estimate(second), mean_estimate(first.astype(float) - second)


def _against(compared: Mapping[str, tuple[Estimate, Estimate, Estimate]]) -> list[str]:
    told = [
        f"{100 * difference.value:+.1f} points ({100 * difference.low:+.1f} to {100 * difference.high:+.1f}, "
        f"{difference.n} pairs; {label})"
        if difference.low < difference.high
        else f"{100 * difference.value:+.1f} points in every one of {difference.n} pairs ({label})"
        for label, (*_, difference) in compared.items()
        if difference.n
    ]
    return [f"Claimed minus not claimed blocks on the same pairs: {', '.join(told)}."] if told else []


def _missed_by(target: Target) -> str:
    goal = GOAL_CLAIMED if target.goal.startswith(">") else GOAL_WRONG
    return f"{100 * abs(target.value.value - goal):.1f} points" if target.value.n else "not defined"


def _tried(results: "Results") -> str:
    one = "one layer" if results.looked == "all layers" else f"one layer ({results.looked})"
    text = (
        f"{len(results.searched)} cells: {one} or all layers; the claimed blocks, all from the first claimed on, "
        f"or all blocks; slots or whole block; readout after block 1 to {results.num_blocks}"
    )
    if results.stage1:
        cell, most = max(results.stage1.items(), key=lambda entry: entry[1].value)
        text += f"; the stage-1 model likewise (best on choose {_share(most)} of {most.n} pairs: {cell})"
    return text


def _missed(results: "Results", main: Estimate) -> list[str]:
    if not main.n or main.value >= GOAL_CLAIMED:
        return []
    by = 100 * (GOAL_CLAIMED - main.value)
    return [f"The target of {GOAL_CLAIMED:.0%} is missed by {by:.1f} points. Tried: {_tried(results)}."]


def _told(estimate: Estimate) -> str:
    return f"{_share(estimate)} (95 % interval {estimate.low:.1%} to {estimate.high:.1%})"


def _share(estimate: Estimate) -> str:
    return f"{estimate.value:.1%}" if estimate.n else "not defined"


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
