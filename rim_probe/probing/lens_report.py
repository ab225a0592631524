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
from rim_probe.probing.lens_reading import LENSES, TARGETS, Item, Reading, items
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
    for column, item in enumerate(wanted):
        for which, name in enumerate(LENSES):
            cell = _best_cell(chosen_on.rank[which, ..., column, :, :])
            at = (which, *cell, column)
            gold = _mrr(found.rank[at][0])
            best[item.label, name] = (cell, gold)
            base = others["base"].rank[0][cell][column, 0] if "base" in others and name == "logit" else None
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
            "control: base model, MRR",
        ],
        rows,
        note=f"The cell is the best of {cells} (layers x blocks x positions) on split “choose”, by the lead of the "
        f"gold result over another problem's. MRR: mean reciprocal rank among {_vocabulary(lens.rim):,} tokens. "
        f"Results are looked for by their first token; {_single_share(lens.rim, study):.1%} of them are one token. A "
        "result equal to the answer counts only as the last step's. The base model is read by its logit lens alone.",
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
        summary=_summary(study, wanted, best, rows, found),
        n={"fit": study.capture("memory", "fit").num_questions, "choose": chosen_on.kl.shape[-1]}
        | {"report": found.kl.shape[-1]},
        settings={
            "cells searched": cells,
            "tuned lens": {
                "states per layer": lens.history.get("fit_rows"),
                "steps of Adam until the best on choose": lens.history.get("steps"),
                "learning rate": lens.history.get("rate"),
            },
        },
        tables=[content, faithful],
        figures=[_faithfulness(study, found), *_by_layer(study, wanted, best, found), *_heatmaps(study, wanted, found)],
        data={
            "mrr": {
                item.label: {
                    name: np.nanmean(1 / found.rank[which, ..., column, 0, :], axis=-1).tolist()
                    for which, name in enumerate(LENSES)
                }
                for column, item in enumerate(wanted)
            }
        },
    )


def _summary(study: Study, wanted: Sequence[Item], best: dict, rows: list, found: Reading) -> str:
    parts = []
    for index, item in enumerate(wanted):
        row = rows[2 * index + LENSES.index("tuned")]
        parts.append(
            f"the {item.label} at {row[1]}: MRR {row[2].value:.2f}, on top for {row[3].value:.0%} "
            f"(another problem's {row[5].value:.2f}, the step's operand {row[6].value:.2f}, "
            f"at the last question token {row[7].value:.2f})"
        )
    middle = len(study.layers) // 2
    logit, tuned = (found.kl[which, middle].mean() for which in range(len(LENSES)))
    return (
        f"The tuned lens reads {'; '.join(parts)}. At layer {study.layers[middle]} its KL to the model's own words is "
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


def _heatmaps(study: Study, wanted: Sequence[Item], found: Reading) -> list[Figure]:
    figures, P = [], study.M + 1
    x = [_position_name(block, place, study.M) for block in range(study.K) for place in range(P)]
    for column, item in enumerate(wanted):
        for which, name in enumerate(LENSES):
            reciprocal = 1 / found.rank[which, ..., column, :, :]  # [layers, K, P, targets, n]
            mean = np.nanmean(reciprocal, axis=-1).reshape(len(study.layers), -1, len(TARGETS))
            chance = np.nanmean(found.probability[which, ..., column, 0, :], axis=-1).reshape(mean.shape[:2])
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
                "y": [str(layer) for layer in study.layers],
                "z": mean[..., 0].round(4).tolist(),
                "hover": hover,
                "z_title": "MRR",
                "low": 0.0,
                "high": 1.0,
                "diverging": False,
            }
            control = float(np.nanmean(mean[..., 1]))
            note = f"n = {count} problems of “report”; another problem's result has {control:.2f} on the whole."
            figures.append(
                Figure("heatmap", f"{item.label.capitalize()}, {name} lens", "position", "layer", data, note)
            )
    return figures


def _best_cell(ranks: np.ndarray) -> tuple[int, int, int]:
    """(layer, block, position) indices in ranks [layers, K, P, targets, n] where the gold result leads another
    problem's by most, in mean reciprocal rank."""
    mean = np.nanmean(1 / ranks, axis=-1)
    lead = mean[..., TARGETS.index("gold")] - mean[..., TARGETS.index("shuffled")]
    return tuple(int(i) for i in np.unravel_index(np.argmax(lead), lead.shape))


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


def _single_share(rim: RiM, study: Study) -> float:
    steps = [read_equation(step) for problem in study.problems("report") for step in problem.steps]
    lengths = [len(rim.encode_text(step.result.text)) for step in steps if step is not None]
    return float(np.mean([length == 1 for length in lengths])) if lengths else float("nan")
