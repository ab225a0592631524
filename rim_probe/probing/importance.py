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

Knows removals and what they cost. Knows nothing of what a block is claimed to hold (see `interchange`).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from rim_probe.model import RiM
from rim_probe.packing import additive_mask
from rim_probe.probing.curves import mean_estimate
from rim_probe.probing.heads import fitting
from rim_probe.probing.hooks import layers_told, num_layers, spread_layers
from rim_probe.probing.interventions import Donors, Pool, Variant
from rim_probe.probing.patching import Edits, Patcher
from rim_probe.probing.section import Estimate, Figure, Section, Table, proportion_estimate
from rim_probe.probing.study import Study

PROBLEMS = 300
MOST_VARIANTS = 110_000  # problems x cells x removals: of a deep model fewer problems are asked
POOL = 128
DONORS = 5
REMOVALS = ("zero", "mean", "resample")
_LABELS = {"zero": "set to zero", "mean": "their mean over questions", "resample": "those of a random question"}


def score(study: Study, *, problems: int = PROBLEMS, pool: int = POOL, donors: int = DONORS) -> Section:
    """The cost of removing each block at each layer, over the first `problems` of the split `report`.

    Args:
        pool: how many questions of `fit` give means and donors.
        donors: N, random donors per problem.
    """
    rim = study.models["memory"]
    layers, blocks = spread_layers(study.layers[:-1]), list(range(1, study.K + 1))
    grid = [(layer, block) for layer in layers for block in blocks]
    problems = min(problems, max(1, MOST_VARIANTS // (len(grid) * (len(REMOVALS) - 1 + donors))))
    kept = [
        (problem, given)
        for problem, given in zip(study.problems("report"), study.answers("memory", "report"), strict=True)
        if fitting(rim, [problem], study.K)
    ][:problems]
    questions = [problem.question for problem in study.problems("fit")[:pool]]
    held = Pool.of(questions, rim, study.K, limit=pool)
    costs: dict[str, list[np.ndarray]] = {mode: [] for mode in REMOVALS}  # mode -> per problem [cells] log probability
    losses: dict[str, list[np.ndarray]] = {mode: [] for mode in REMOVALS}  # and whether the gold answer is still said
    whole: dict[str, list[tuple[float, float, float]]] = {}  # row -> (change, said, same) by problem
    clean_said = []
    for number, (problem, given) in enumerate(study.progress(kept, "importance")):
        targets = [rim.encoder.answer_ids(problem.answer), list(given.token_ids)]
        clean = Patcher(rim, problem.question, targets, num_blocks=study.K)
        source, rng = Donors(clean), np.random.default_rng([study.seed, number])
        strangers = [
            Pool(held.states[[i, i]], [held.question_ids[i]] * 2)
            for i in held.donors(rim.encode_question(problem.question), donors, rng)
        ]
        variants: list[tuple[str, Edits]] = []
        for mode in REMOVALS:
            for origin in {"zero": [None], "mean": [held], "resample": strangers}[mode]:
                for layer, block in grid:
                    variants.append((mode, source.edits(Variant([block], [layer], None, mode, origin), rng)))
        rows = _everything(source, clean, held, strangers[0], rng)
        scores = clean.score([edits for _, edits in variants] + list(rows.values()))
        change = (scores.log_probability - scores.clean)[:, 0].numpy().astype(np.float64)
        said, same = scores.says.numpy().astype(np.float64).T
        for mode in REMOVALS:
            of_mode = [i for i, (name, _) in enumerate(variants) if name == mode]
            costs[mode].append(change[of_mode].reshape(-1, len(grid)).mean(0))
            losses[mode].append(said[of_mode].reshape(-1, len(grid)).mean(0))
        for i, name in enumerate(rows, start=len(variants)):
            whole.setdefault(name, []).append((change[i], said[i], same[i]))
        (alone, says), (_, kept_answer) = (
            read_token_alone(rim, problem.question, target, study.K) for target in targets
        )
        clean_log = float(clean.log_probability[0])
        whole.setdefault("the token where the answer is read, alone at its place", []).append(
            (alone - clean_log, says, kept_answer)
        )
        clean_said.append(bool(clean.says[0]))
    return _section(study, layers, blocks, costs, losses, whole, clean_said, donors, pool)


def _everything(source: Donors, clean: Patcher, held: Pool, stranger: Pool, rng) -> dict[str, Edits]:
    """All blocks at once, at every layer 1..L: the slots, or all but the token where the answer is read."""
    slots = list(range(1, clean.block_length - 1))
    every = ["begin", *slots, "end"]
    found: dict[str, Edits] = {}
    for mode, origin in (("zero", None), ("mean", held), ("resample", stranger)):
        found[f"all slots: {_LABELS[mode]}"] = source.edits(
            Variant(range(1, clean.K + 1), None, None, mode, origin), rng
        )
        edits = source.edits(Variant([clean.K], None, ["begin", *slots], mode, origin), rng)
        if clean.K > 1:
            edits = edits + source.edits(Variant(range(1, clean.K), None, every, mode, origin), rng)
        found[f"all memory tokens but the one read: {_LABELS[mode]}"] = edits
    return found


@torch.inference_mode()
def read_token_alone(
    rim: RiM, question: str, answer: str | Sequence[int], num_blocks: int | None = None
) -> tuple[float, bool]:
    """Log probability of an answer (text or token ids), and whether it is said, when the last block's end
    token follows the question alone.

    It keeps its position, so that the model cannot tell where it stands; every other memory token is left out.
    """
    prompt = rim.encode_question(question)
    target = rim.encoder.answer_ids(answer) if isinstance(answer, str) else list(answer)
    place = len(prompt) + rim.layout.check_blocks(num_blocks) * rim.layout.block_length - 1
    ids = torch.tensor([prompt + [rim.memory_ids[2]] + target[:-1]], device=rim.device)
    positions = torch.tensor([[*range(len(prompt)), *range(place, place + len(target))]], device=rim.device)
    # Without a mask transformers would take the gap between positions for the border of two packed texts.
    causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool, device=rim.device).tril()
    mask = additive_mask(causal[None], rim.dtype)
    logits = rim.model(input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False).logits
    logits = logits[0, -len(target) :].float()
    logits[:, rim.banned_ids] = -torch.inf
    wanted = torch.tensor(target, device=rim.device)
    log = logits.log_softmax(-1).gather(-1, wanted[:, None]).sum()
    return log.item(), bool((logits.argmax(-1) == wanted).all())


def explain(
    rim: RiM,
    question: str,
    *,
    gold: str | None = None,
    source: str | None = None,
    layers: Sequence[int | str] | None = None,
    num_blocks: int | None = None,
) -> dict[str, Any]:
    """The heat map of one question: log probability of an answer when one block at one layer is removed or swapped.

    Args:
        gold: the answer followed; by default the one the model gives.
        source: a question whose blocks are put in; by default the slots become zero.
        layers: None for 0..L-1.

    Returns:
        JSON-ready: `answer`, `log_probability`, `layers`, `blocks`, and `change` and `says` as [layer][block].

    Raises:
        RiMError: a question that cannot be asked, or a layer that does not exist.
    """
    from rim_probe.decoding import answer as ask
    from rim_probe.probing.sweep import patching_sweep

    followed = gold if gold is not None else ask(rim, question, "memory", num_blocks=num_blocks).text
    chosen = range(num_layers(rim)) if layers is None else layers
    sweep = patching_sweep(rim, question, source, [followed], layers=chosen, num_blocks=num_blocks)
    return {
        "answer": followed,
        "log_probability": float(sweep.clean[0]),
        "layers": list(sweep.layers),
        "blocks": list(sweep.blocks),
        "change": (sweep.log_probability[..., 0] - sweep.clean[0]).astype(float).tolist(),
        "says": sweep.says[..., 0].tolist(),
    }


# -------------------------------------------------------------------------------------------------------------- section


def _section(study, layers, blocks, costs, losses, whole, clean_said, donors, pool) -> Section:
    n = len(clean_said)
    shape = len(layers), len(blocks)
    change = {mode: [mean_estimate(cell) for cell in np.array(costs[mode]).T] for mode in REMOVALS}
    said = {mode: [mean_estimate(cell) for cell in np.array(losses[mode]).T] for mode in REMOVALS}
    clean = proportion_estimate(clean_said)
    everything = [
        [name, mean_estimate(list(of_change)), proportion_estimate(of_said), proportion_estimate(of_same)]
        for name, (of_change, of_said, of_same) in ((name, zip(*rows, strict=True)) for name, rows in whole.items())
    ]
    worst = {mode: int(np.argmin([e.value for e in change[mode]])) for mode in REMOVALS}
    names = [f"block {block}, layer {layer}" for layer in layers for block in blocks]
    looked = layers_told(layers, study.layers[:-1])
    among = "" if looked == "all layers" else f", at {looked}"
    cells = [
        [f"{names[i]}: {_LABELS[mode]}", change[mode][i].value, change["resample"][i].value, said[mode][i].value]
        for mode, i in worst.items()
    ]
    against = [mean_estimate(cell) for cell in (np.array(costs["mean"]) - np.array(costs["resample"])).T]
    beyond, below = sum(e.high < 0 for e in against), sum(e.low > 0 for e in against)
    alone, same = everything[-1][2:]
    weakest = min(everything[:-1], key=lambda row: row[2].value)
    tables = [
        Table(
            "Everything at once",
            [
                "what becomes of the memory",
                "change of the gold answer's log probability",
                "gold answer said",
                "answer the same as clean",
            ],
            [["nothing (clean)", None, clean, None], *everything],
            note="At all layers 1 to L. The token where the answer is read is the end of the last block. Alone at its "
            "place, it sees the question and nothing else.",
        ),
        Table(
            "The most important cell of each removal (slots of one block at one layer)",
            [
                "cell",
                "change of log probability",
                f"the same by {donors} random donors (noise floor)",
                "answer said",
            ],
            cells,
            note=f"The largest of {len(names)} cells{among}, searched and shown on the same problems of report: its "
            "value is flattered, and no interval is given.",
        ),
    ]
    figures = [
        _heatmap(f"Slots {_LABELS[mode]}", layers, blocks, change[mode], change["resample"], said[mode], shape)
        for mode in REMOVALS
    ]
    figures.append(_lines(blocks, layers, change))
    return Section(
        name="importance",
        title="Importance of blocks and layers",
        question="What does the answer lose when a block is taken away, at one layer or everywhere?",
        summary=(
            f"The gold answer is said in {clean.value:.1%} of {n} problems; with {weakest[0]} in "
            f"{weakest[2].value:.1%} ({weakest[2].low:.1%} to {weakest[2].high:.1%}), and with the token where the "
            f"answer is read alone, no block before it, in {alone.value:.1%} ({alone.low:.1%} to {alone.high:.1%}). "
            f"The answer stays the same as the clean one in {weakest[3].value:.1%} ({weakest[3].low:.1%} to "
            f"{weakest[3].high:.1%}) and {same.value:.1%} ({same.low:.1%} to {same.high:.1%}). "
            "Problem by problem, a block's slots at one layer set to their mean cost more than those of random donors "
            f"in {beyond} of {len(names)} cells{among}, less in {below} (by chance about "
            f"{len(names) * 0.025:.1f} each)."
        ),
        n={"report": n, "pool (fit)": min(pool, len(study.problems("fit")))},
        settings={
            "donors": donors,
            "cells": len(names),
            **({} if looked == "all layers" else {"layers searched": looked}),
            "seed": study.seed,
            "right": "exactly the gold answer is said",
        },
        tables=tables,
        figures=figures,
        data={
            "layers": layers,
            "blocks": blocks,
            "mean less random donors": {
                part: np.reshape([getattr(e, part) for e in against], shape).tolist()
                for part in ("value", "low", "high")
            },
            "change": {mode: np.reshape([e.value for e in change[mode]], shape).tolist() for mode in REMOVALS},
            "said": {mode: np.reshape([e.value for e in said[mode]], shape).tolist() for mode in REMOVALS},
        },
    )


def _heatmap(
    title, layers, blocks, change: list[Estimate], floor: list[Estimate], said: list[Estimate], shape
) -> Figure:
    hover = [
        f"{e.value:.3f} ({e.low:.3f} to {e.high:.3f}); random donors {f.value:.3f} ({f.low:.3f} to {f.high:.3f}); "
        f"answer said {s.value:.1%}"
        for e, f, s in zip(change, floor, said, strict=True)
    ]
    values = np.reshape([e.value for e in change], shape)
    bound = float(np.abs(values).max()) or 1.0
    return Figure(
        "heatmap",
        f"{title}: change of the gold answer's log probability (n = {change[0].n})",
        "block",
        "layer",
        {
            "x": [str(block) for block in blocks],
            "y": [str(layer) for layer in layers],
            "z": values.tolist(),
            "hover": np.reshape(np.array(hover, dtype=object), shape).tolist(),
            "z_title": "change",
            "low": -bound,
            "high": bound,
            "diverging": True,
        },
    )


def _lines(blocks, layers, change: dict[str, list[Estimate]]) -> Figure:
    """The cost of each block at its most costly layer, removal by removal."""
    series = []
    for mode in REMOVALS:
        grid = np.array(change[mode], dtype=object).reshape(len(layers), len(blocks))
        least = [min(column, key=lambda e: e.value) for column in grid.T]
        series.append(
            {
                "name": f"slots {_LABELS[mode]}",
                "x": blocks,
                "y": [e.value for e in least],
                "low": None,
                "high": None,
                "control": mode == "resample",
            }
        )
    return Figure(
        "lines",
        "Each block at its most important layer",
        "block",
        "change of the gold answer's log probability",
        {"series": series},
        note="The layer is searched on the problems shown: values are flattered, and no intervals are given.",
    )
