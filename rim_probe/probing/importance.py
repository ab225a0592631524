"""Importance: what each block and layer is worth to the answer, by taking it away.

Method:
1. At one layer the slots of one block become zero, their mean over other questions, or the states of a random other
   question (`interventions`); the gold answer is teacher-forced, and its log probability and whether it is said exactly
   are compared with the clean run, problem by problem.
2. The noise floor of a cell is what N random donors do there: a cell whose removal (zero, mean) costs no more than
   another question's memory there holds nothing about *this* question that the answer needs. Compared problem by
   problem: the interval is that of the paired difference.
3. Everything at once: all slots, or all memory tokens but the one where the answer is read, at every layer; and that
   token alone at its place, with no memory block before it. If the answer survives this, no block mattered.
   Counted are gold answers, and answers that stay the same as the clean one, be it right or wrong.
States are read by later layers alone, so single layers go from 0 to L - 1; of a deep model `MOST_LAYERS` of them.
The token alone (`patching.CUTS`: the answer cut from memory) keeps its position and sees the question and itself.

Knows removals and what they cost. Knows nothing of what a block is claimed to hold (see `interchange`).
"""

from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
import torch

from rim_probe.model import RiM
from rim_probe.probing.heads import fitting
from rim_probe.probing.hooks import layers_told, spread_layers
from rim_probe.probing.interventions import Donors, Pool, Variant
from rim_probe.probing.patching import Edits, Patcher
from rim_probe.probing.results import Report, Result, mean_estimate, mean_results, proportion_estimate
from rim_probe.probing.study import Study

PROBLEMS = 300
MOST_VARIANTS = 110_000  # problems x cells x removals: of a deep model fewer problems are asked
POOL = 128
DONORS = 5
REMOVALS = {
    "mean": ("their mean over questions", "score"),
    "zero": ("set to zero", "score"),
    "resample": ("those of a random question", "control"),
}
FALL, SAID, SAME = "fall of the gold answer's log probability, nats", "gold answer said", "answer the same as clean"
SLOTS, ALL_BUT_ONE = "all slots", "all memory tokens but the one read"
ALONE = "every block; the token read stands alone at its place"


def score(study: Study, *, problems: int = PROBLEMS, pool: int = POOL, donors: int = DONORS) -> Report:
    """The cost of removing each block at each layer, over the first `problems` of the split `report`.

    Args:
        pool: how many questions of `fit` give means and donors.
        donors: N, random donors per problem.
    """
    rim = study.models["memory"]
    layers, blocks = spread_layers(study.layers[:-1]), range(1, study.K + 1)
    grid = list(product(layers, blocks))
    problems = min(problems, max(1, MOST_VARIANTS // (len(grid) * (len(REMOVALS) - 1 + donors))))
    kept = [
        (problem, given)
        for problem, given in zip(study.problems("report"), study.answers("memory", "report"), strict=True)
        if fitting(rim, [problem], study.K)
    ][:problems]
    held = Pool.of([problem.question for problem in study.problems("fit")[:pool]], rim, study.K, limit=pool)
    cells, whole, clean = [], [], []
    for number, (problem, given) in enumerate(study.progress(kept, "importance")):
        targets = [rim.encoder.answer_ids(problem.answer), list(given.token_ids)]
        patcher = Patcher(rim, problem.question, targets, num_blocks=study.K)
        source, rng = Donors(patcher), np.random.default_rng([study.seed, number])
        strangers = [
            Pool(held.states[[i, i]], [held.question_ids[i]] * 2)
            for i in held.donors(rim.encode_question(problem.question), donors, rng)
        ]
        single = [
            source.edits(Variant([block], [layer], None, mode, origin), rng)
            for mode, origins in {"mean": [held], "zero": [None], "resample": strangers}.items()
            for origin in origins
            for layer, block in grid
        ]
        scores = patcher.score(single + _everything(source, patcher, held, strangers[0], rng))
        found = np.stack([(scores.clean - scores.log_probability)[:, 0].numpy(), *scores.says.numpy().T])
        by_origin = found[:, : len(single)].reshape(3, 2 + donors, len(layers), len(blocks))
        cells.append([by_origin[:, 0], by_origin[:, 1], by_origin[:, 2:].mean(axis=1)])
        alone = Patcher(rim, problem.question, targets, num_blocks=study.K, cut=["memory"])
        left = [float(patcher.log_probability[0] - alone.log_probability[0]), *alone.says.tolist()]
        whole.append(np.column_stack([found[:, len(single) :], left]))
        clean.append(bool(patcher.says[0]))
    return _report(study, layers, np.array(clean), np.array(cells), np.array(whole), donors, pool)


def _everything(source: Donors, clean: Patcher, held: Pool, stranger: Pool, rng) -> list[Edits]:
    """All blocks at once, at every layer 1..L, removal by removal: the slots; all but the token read."""
    slots, found = list(range(1, clean.block_length - 1)), []
    for mode, origin in {"mean": held, "zero": None, "resample": stranger}.items():
        found.append(source.edits(Variant(range(1, clean.K + 1), None, None, mode, origin), rng))
        edits = source.edits(Variant([clean.K], None, ["begin", *slots], mode, origin), rng)
        if clean.K > 1:
            edits += source.edits(Variant(range(1, clean.K), None, ["begin", *slots, "end"], mode, origin), rng)
        found.append(edits)
    return found


def _report(study: Study, layers, clean, cells, whole, donors: int, pool: int) -> Report:
    """Results of `clean` [n]; `cells` [n, removals, (fall, said), layers, blocks]; `whole` [n, (fall, said, same), what
    is removed how]."""
    removed = [(scope, how) for how, _ in REMOVALS.values() for scope in (SLOTS, ALL_BUT_ONE)] + [(ALONE, "left out")]
    results = []
    for metric, of_metric in zip((FALL, SAID, SAME), whole.transpose(1, 2, 0), strict=True):
        for (scope, how), values in zip(removed, of_metric, strict=True):
            estimate = mean_estimate(values) if metric == FALL else proportion_estimate(values)
            results.append(Result(metric, how, estimate, share=metric != FALL, place={"taken away": scope}))
    said = proportion_estimate(clean)
    results.append(Result(SAID, "clean", said, "control", place={"taken away": "nothing"}))
    grid = {"layer": layers, "block": range(1, study.K + 1)}
    for i, metric in enumerate((FALL, SAID)):
        for (how, role), values in zip(REMOVALS.values(), cells.swapaxes(0, 1), strict=True):
            results += mean_results(metric, f"slots {how}", values[:, i], grid, role=role, share=metric == SAID)
    beyond = mean_results(f"{FALL}: mean less random", "slots", cells[:, 0, 0] - cells[:, 2, 0], grid, share=False)
    more, less = sum(one.estimate.low > 0 for one in beyond), sum(one.estimate.high < 0 for one in beyond)
    alone, same = whole[:, 1:, -1].mean(axis=0)
    looked = layers_told(layers, study.layers[:-1])
    return Report(
        "importance",
        results + beyond,
        {"report": len(clean), "pool (fit)": min(pool, len(study.problems("fit")))},
        {"donors": donors, "layers searched": looked, "right": "exactly the gold answer is said"},
        verdict=f"The gold answer is said in {said.value:.1%} of the problems, and in {alone:.1%} by the token read "
        f"alone, which keeps {same:.1%} of the answers. Slots of one block at one layer set to their mean cost more "
        f"than another question's in {more} of {len(beyond)} cells, less in {less} (by chance about "
        f"{len(beyond) * 0.025:.1f} each).",
    )


def explain(
    rim: RiM, question: str, *, gold: str, layers: Sequence[int], num_blocks: int | None = None
) -> dict[str, Any]:
    """The heat map of one question: log probability of an answer when the slots of one block at one layer become zero.

    Args:
        gold: the answer followed.
        layers: of 0..L-1; after the last layer nobody reads a slot.

    Returns:
        JSON-ready: `answer`, `log_probability`, `layers`, `blocks`, and `change` and `says` as [layer][block].

    Raises:
        RiMError: a question that cannot be asked.
    """
    clean = Patcher(rim, question, [rim.encoder.answer_ids(gold)], num_blocks=num_blocks)
    blocks, nothing = range(1, clean.K + 1), torch.zeros_like(clean.memory)
    scores = clean.score([clean.edits(nothing, [block], [layer]) for layer in layers for block in blocks])
    change, says = (scores.log_probability - clean.log_probability).double(), scores.says
    return {
        "answer": gold,
        "log_probability": float(clean.log_probability[0]),
        "layers": list(layers),
        "blocks": list(blocks),
        "change": change.view(len(layers), clean.K).tolist(),
        "says": says.view(len(layers), clean.K).tolist(),
    }
