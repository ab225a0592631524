"""The report of the vocabulary lens: which words it reads at which layer, beside the controls.

Knows what `lens` has read and how a report is made of it. Knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from rim_probe.equations import read_equation
from rim_probe.model import RiM
from rim_probe.probing.curves import curve, mean_estimate
from rim_probe.probing.hooks import spread_layers
from rim_probe.probing.lens_reading import LENSES, TARGETS, Item, Reading, items
from rim_probe.probing.lens_store import TOLERATED
from rim_probe.probing.section import Estimate, Figure, Section, Table, proportion_estimate

if TYPE_CHECKING:
    from rim_probe.probing.lens import VocabularyLens
    from rim_probe.probing.study import Study


def report(
    lens: VocabularyLens, study: Study, chosen_on: Reading, found: Reading, others: dict[str, Reading]
) -> Section:
    wanted, layers = items(study), study.layers
    cells = len(layers) * study.K * (study.M + 1)
    rows, best = [], {}
    # Without such a step on either split there is no cell to choose, or nothing to read in it.
    defined = [
        not (np.isnan(chosen_on.rank[..., column, 0, :]).all() or np.isnan(found.rank[..., column, 0, :]).all())
        for column in range(len(wanted))
    ]
    for column, item in enumerate(wanted):
        for which, name in enumerate(LENSES):
            if not defined[column]:
                rows.append([f"{item.label}, {name} lens", "not defined", *[None] * 7])
                continue
            cell = _best_cell(chosen_on.rank[which, ..., column, :, :])
            at = (which, *cell, column)
            gold = _mrr(found.rank[at][0])
            best[item.label, name] = (cell, gold)
            base = others["base"].rank[0][cell][column, 0] if "base" in others else None
            rows.append(
                [
                    f"{item.label}, {name} lens",
                    _cell_name(layers, cell, study.M),
                    gold,
                    _share(found.rank[at][0] == 1, found.rank[at][0]),
                    mean_estimate(found.probability[at][0]),
                    _mrr(found.rank[at][1]),
                    _mrr(found.rank[at][2]),
                    _mrr(found.question_rank[which, cell[0], column]),
                    None if base is None else _mrr(base),
                ]
            )
    content = Table(
        "Gold results in the vocabulary",
        [
            "what is looked for",
            "cell",
            "MRR of the gold result",
            "gold on top",
            "its probability",
            "control: another problem's result, MRR",
            "control: the step's operand, MRR",
            "control: last question token, MRR",
            "control: base model (its logit lens), MRR",
        ],
        rows,
        note=f"The cell is the best of {cells} (layers x blocks x positions) on split “choose”, by the lead of the "
        f"gold result over another problem's. MRR: mean reciprocal rank among {_vocabulary(lens.rim):,} tokens. "
        f"Results are looked for by their first token; {_single_share(lens.rim, study)} of them are one token. A "
        "result equal to the answer counts only as the last step's. The base model is read by its logit lens "
        "alone, at the same cell: the tuned lens has no control of its own on the base model.",
    )
    faithful = Table(
        "KL to the model's own distribution at the same position, nats",
        ["layer", "logit lens", "tuned lens"],
        [
            [str(layer), *(mean_estimate(found.kl[which, place].mean((0, 1))) for which in range(len(LENSES)))]
            for place, layer in enumerate(layers)
        ],
        note="Mean over all memory positions. A lens that knows the position and nothing of the question has "
        f"{mean_estimate(found.cell_kl.mean((0, 1))).value:.3f}.",
    )
    return Section(
        name="lens",
        title="Vocabulary lens",
        question="Which words does the model's own head read in the memory slots, layer by layer, and is the result of "
        "an explicit step among them?",
        summary=_summary(study, wanted, rows, content.header, found),
        n={"fit": study.capture("memory", "fit").num_questions, "choose": chosen_on.kl.shape[-1]}
        | {"report": found.kl.shape[-1]},
        settings={
            "cells searched": cells,
            "tuned lens": {
                "states per layer": lens.history.get("fit_rows"),
                "steps of Adam until the best on choose": lens.history.get("steps"),
                "learning rate": lens.history.get("rate"),
                **_low_rank(lens.history),
            },
        },
        tables=[content, faithful],
        figures=[
            _faithfulness(study, found),
            *_by_layer(study, wanted, best, found),
            *_heatmaps(study, wanted, best, found),
        ],
        data={
            "mrr": {
                item.label: {
                    name: _nanmean(1 / found.rank[which, ..., column, 0, :]).round(4).tolist()
                    for which, name in enumerate(LENSES)
                }
                for column, item in enumerate(wanted)
            }
        },
    )


def _summary(study: Study, wanted: Sequence[Item], rows: list, header: list[str], found: Reading) -> str:
    parts, based = [], False
    for index, item in enumerate(wanted):
        pair = rows[len(LENSES) * index : len(LENSES) * (index + 1)]
        row = pair[LENSES.index("tuned")]
        gold = row[2]
        if gold is None:
            parts.append(f"The {item.label} is not defined: no problem states such a step.")
            continue
        controls = [
            (title.removeprefix("control: ").removesuffix(", MRR"), estimate)
            for title, estimate in zip(header[5:], row[5:], strict=True)
            if estimate is not None and estimate.n
        ]
        if (at_logit := pair[LENSES.index("logit")])[-1] is not None:
            based = True
            controls.append((f"base model (its logit lens) at {at_logit[1]}", at_logit[-1]))
        text = f"The tuned lens reads the {item.label} at {row[1]}: MRR {_told(gold)}, on top for {row[3].value:.0%}"
        if controls:
            name, strongest = max(controls, key=lambda control: control[1].value)
            highest = max(control.high for _, control in controls)
            verdict = "above every control" if gold.low > highest else "not surely above its controls"
            text += f"; strongest control: {name}, {_told(strongest)}; {verdict}"
        parts.append(text + ".")
    if based:
        parts.append("The tuned lens has no control of its own on the base model, which is read by its logit lens.")
    middle = len(study.layers) // 2
    logit, tuned = (found.kl[which, middle].mean() for which in range(len(LENSES)))
    return (
        f"{' '.join(parts)} At layer {study.layers[middle]} its KL to the model's own words is "
        f"{tuned:.2f} nats, that of the logit lens {logit:.2f}, of a lens blind to the question "
        f"{found.cell_kl.mean():.2f}."
    )


def _faithfulness(study: Study, found: Reading) -> Figure:
    x = list(study.layers)
    series = []
    for which, name in enumerate(LENSES):
        series.append(curve(f"{name} lens", x, [mean_estimate(layer.mean((0, 1))) for layer in found.kl[which]]))
    blind = mean_estimate(found.cell_kl.mean((0, 1)))
    series.append(curve("knows the position only", x, [blind] * len(x), control=True))
    return Figure("lines", "How far a layer's words are from the model's", "layer", "KL, nats", {"series": series})


def _by_layer(study: Study, wanted: Sequence[Item], best: dict, found: Reading) -> list[Figure]:
    """MRR of each item by layer, at the block and position of its best cell under the tuned lens."""
    figures, x = [], list(study.layers)
    for column, item in enumerate(wanted):
        if (item.label, "tuned") not in best:
            continue
        (_, block, place), _ = best[item.label, "tuned"]
        series = []
        for which, name in enumerate(LENSES):
            at = found.rank[which, :, block, place, column]
            series.append(curve(f"gold, {name} lens", x, [_mrr(ranks) for ranks in at[:, 0]]))
        for label, target in (("another problem's result", 1), ("the step's operand", 2)):
            series.append(curve(label, x, [_mrr(ranks) for ranks in at[:, target]], control=True))
        asked = [_mrr(ranks) for ranks in found.question_rank[LENSES.index("tuned"), :, column]]
        series.append(curve("gold at the last question token", x, asked, control=True))
        name = _position_name(block, place, study.M)
        title = f"{item.label.capitalize()} by layer, {name}"
        figures.append(Figure("lines", title, "layer", "mean reciprocal rank", {"series": series}))
    return figures


def _heatmaps(study: Study, wanted: Sequence[Item], best: dict, found: Reading) -> list[Figure]:
    figures, P = [], study.M + 1
    drawn = spread_layers(range(len(study.layers)))
    x = [_position_name(block, place, study.M) for block in range(study.K) for place in range(P)]
    for column, item in enumerate(wanted):
        for which, name in enumerate(LENSES):
            if (item.label, name) not in best:
                continue
            reciprocal = 1 / found.rank[which, ..., column, :, :]  # [layers, K, P, targets, n]
            mean = _nanmean(reciprocal).reshape(len(study.layers), -1, len(TARGETS))
            chance = _nanmean(found.probability[which, ..., column, 0, :]).reshape(mean.shape[:2])
            mean, chance = mean[drawn], chance[drawn]
            hover = [
                [
                    f"MRR {gold:.3f}, probability {p:.3f}; another problem's {shuffled:.3f}, operand {operand:.3f}"
                    for (gold, shuffled, operand), p in zip(cells, chances, strict=True)
                ]
                for cells, chances in zip(mean, chance, strict=True)
            ]
            count = int((~np.isnan(found.rank[which, 0, 0, 0, column, 0])).sum())
            data = {
                "x": x,
                "y": [str(study.layers[place]) for place in drawn],
                "z": mean[..., 0].round(4).tolist(),
                "hover": hover,
                "z_title": "MRR",
                "low": 0.0,
                "high": 1.0,
                "diverging": False,
            }
            control = float(_nanmean(mean[..., 1].ravel()))
            note = f"n = {count} problems of “report”; another problem's result has {control:.2f} on the whole."
            figures.append(
                Figure("heatmap", f"{item.label.capitalize()}, {name} lens", "position", "layer", data, note)
            )
    return figures


def _low_rank(history: dict) -> dict:
    """What translators of low rank cost beside the whole ones; empty where they are whole."""
    if "low rank" not in history:
        return {}
    told = history["low rank"]
    kept = told["mean KL on choose by rank"][str(told["rank"])]
    return {
        "translators": f"rank {told['rank']} in 8 bits a number, the smallest tried within {TOLERATED:.0%} of the mean "
        f"KL of the whole ones on choose, else the largest: {kept:.3f} nats against "
        f"{told['mean KL on choose, whole translators']:.3f}",
        "mean KL on choose by rank": told["mean KL on choose by rank"],
    }


def _best_cell(ranks: np.ndarray) -> tuple[int, int, int]:
    """(layer, block, position) indices in ranks [layers, K, P, targets, n] where the gold result leads another
    problem's by most, in mean reciprocal rank."""
    mean = _nanmean(1 / ranks)
    lead = mean[..., TARGETS.index("gold")] - np.nan_to_num(mean[..., TARGETS.index("shuffled")])
    return tuple(int(i) for i in np.unravel_index(np.argmax(lead), lead.shape))


def _nanmean(values: np.ndarray) -> np.ndarray:
    """The mean over the last axis of what is not NaN; NaN, without a warning, where nothing is."""
    there = ~np.isnan(values)
    count = there.sum(-1)
    return np.where(count, np.where(there, values, 0).sum(-1) / np.maximum(count, 1), np.nan)


def _told(estimate: Estimate) -> str:
    return f"{estimate.value:.2f} ({estimate.low:.2f} to {estimate.high:.2f})"


def _mrr(ranks: np.ndarray) -> Estimate:
    return mean_estimate(1 / ranks)


def _share(outcomes: np.ndarray, scored: np.ndarray) -> Estimate:
    return proportion_estimate(outcomes[~np.isnan(scored)])


def _position_name(block: int, place: int, slots: int) -> str:
    return f"block {block + 1} " + ("end" if place == slots else f"slot {place + 1}")


def _cell_name(layers: Sequence[int], cell: tuple[int, int, int], slots: int) -> str:
    return f"layer {layers[cell[0]]}, {_position_name(cell[1], cell[2], slots)}"


def _vocabulary(rim: RiM) -> int:
    return rim.model.get_output_embeddings().weight.shape[0]


def _single_share(rim: RiM, study: Study) -> str:
    steps = [read_equation(step) for problem in study.problems("report") for step in problem.steps]
    lengths = [len(rim.encode_text(step.result.text)) for step in steps if step is not None]
    return f"{np.mean([length == 1 for length in lengths]):.1%}" if lengths else "none"
