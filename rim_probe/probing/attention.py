"""Attention to memory: where it goes, and whether heads that attend much are heads that matter.

Method:
1. From `capture` with attention, per problem, layer and head: the mass that slots and block ends send to the question's
   numbers, to its other tokens and to each block. Rows of one kind in one block are averaged; nothing else is.
2. Heads are ranked by knockout (`heads`): silenced where the answer is spoken ("reader") and at the slots ("writer"),
   by the fall of the gold answer's log probability on the choosing split. A silent head loses all that it reads there,
   be it from memory or from the question: knockout alone does not show that memory is read.
3. On the report split: the m heads at the top silenced together, against m heads at random; and the rank correlation of
   attention share (reader: mass on memory; writer: mass on the question's numbers) with the effect of knockout, head by
   head. Attention that explained the answer would correlate with it (cf. Jain & Wallace 2019).
4. What shows it: on the report split the answer's attention, in all heads and layers, is cut from memory alone, from
   the question alone (but for its first token, see `patching`), and from both.
5. Controls: the base model's attention before RiM training, and even attention over all visible tokens.

Knows attention weights and names every aggregation. Knows nothing of what blocks hold.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np

from rim_probe.errors import RiMError
from rim_probe.model import RiM
from rim_probe.probing.capture import Capture, capture
from rim_probe.probing.heads import GoldScorer, GoldScores, Head, Role, num_heads
from rim_probe.probing.hooks import num_layers
from rim_probe.probing.patching import Patcher
from rim_probe.probing.results import Cloud, Report, Result, bootstrap, mean_estimate, mean_results, proportion_estimate
from rim_probe.probing.study import Observation, Study
from rim_probe.problems import Problem

PROBLEMS = 200  # of choose to rank heads on, and of report to measure on
TOP = (1, 2, 4, 8)
RANDOM_SETS = 5
CAPTURE_BATCH = 32
DRAWS = 500
PER_HEAD_NUMBERS = 200_000  # above that many weights `explain` gives means over heads only
FALL, RIGHT = "fall of the gold answer's log probability, nats", "gold answer said"
SHARE = "share of the answer's attention, mean over layers and heads"
_AT: dict[Role, str] = {"reader": "heads at the answer", "writer": "heads at the slots"}
# What the answer may not attend to, and what that is: memory may only be said to be read beside what the question is.
_CUTS = {
    ("memory",): ("memory", "score"),
    ("question",): ("the question", "control"),
    ("memory", "question"): ("both", "positive control"),
}


@dataclass(frozen=True)
class Shares:
    """Attention mass of n problems, A = L layers, H heads, K blocks; each row over its targets sums to 1.

    Attributes:
        slots [n, A, H, K, 2 + K]: from the slots of each block (mean over its M slots) to: the question's numbers, its
            other tokens, blocks 1..K.
        ends [n, A, H, K, 2 + K]: the same from each block's end token; the last one is where the answer begins.
        even [n, 2 + K]: the mass that the last end token would send if it attended evenly to all it sees.
    """

    slots: np.ndarray
    ends: np.ndarray
    even: np.ndarray


def number_tokens(tokens: Sequence[str]) -> np.ndarray:
    """Which tokens hold a digit, bool [W]."""
    return np.array([bool(re.search(r"\d", token)) for token in tokens], dtype=bool)


def shares_of(held: Capture, numbers: Sequence[np.ndarray]) -> Shares:
    """Masses by target of a capture with attention; `numbers` marks each question's number tokens (bool [length])."""
    to_question, to_memory = _weights(held)
    n, layers, heads = to_question.shape[:3]
    blocks, slots = held.K, held.M
    width = to_question.shape[-1]
    marked = np.zeros((n, width), dtype=np.float32)
    for row, flags in enumerate(numbers):
        marked[row, : len(flags)] = flags
    on_numbers = np.einsum("nahqw,nw->nahq", to_question, marked)
    on_others = to_question.sum(axis=-1) - on_numbers
    on_blocks = to_memory.reshape(*to_memory.shape[:4], blocks, -1).sum(axis=-1)
    mass = np.concatenate([on_numbers[..., None], on_others[..., None], on_blocks], axis=-1)
    mass = mass.reshape(n, layers, heads, blocks, slots + 1, 2 + blocks)
    even = np.array([[flags.sum(), len(flags) - flags.sum(), *[slots + 2] * blocks] for flags in numbers], dtype=float)
    return Shares(mass[..., :slots, :].mean(axis=4), mass[..., slots, :], even / even.sum(axis=1, keepdims=True))


def _weights(held: Capture) -> tuple[np.ndarray, np.ndarray]:
    if held.to_question is None or held.to_memory is None:
        raise RiMError("Not every layer of this model tells its attention weights; other probes do without them.")
    return held.to_question.float().numpy(), held.to_memory.float().numpy()


def attention_shares(rim: RiM, questions: Sequence[str], num_blocks: int | None = None) -> Shares:
    """Masses by target of many questions; weights are held for a batch at a time."""
    parts = []
    for start in range(0, len(questions), CAPTURE_BATCH):
        held = capture(rim, questions[start : start + CAPTURE_BATCH], num_blocks=num_blocks)
        tokens = [[rim.tokenizer.decode([token]) for token in ids] for ids in held.question_ids]
        parts.append(shares_of(held, [number_tokens(own) for own in tokens]))
    return Shares(*(np.concatenate([getattr(part, name) for part in parts]) for name in ("slots", "ends", "even")))


def explain(observation: Observation) -> dict[str, Any]:
    """One question's attention for the screen, rounded to 3 digits; JSON-ready.

    Returns:
        {"tokens" [W], "numbers" [W] bool, "layers" A, "heads" H, "aggregation": what was averaged,
        "slots_to_tokens" {"mean over heads" [A][K][W], "max over heads" [A][K][W], "per head" [A][H][K][W], or None
        where that would be very many numbers}, "answer_to_blocks" [A][H][K], "answer_to_tokens" [A][H][W] or None,
        "slots_to_blocks" {"mean over heads" [A][K][K]} (to a block's begin, slots and end together), "slots_to_slots"
        the same to its slots alone}.
    """
    held = observation.capture
    to_question, to_memory = (weights[0] for weights in _weights(held))
    blocks, slots = held.K, held.M
    layers, heads, _, width = to_question.shape
    rows = to_question.reshape(layers, heads, blocks, slots + 1, width)
    by_token = to_memory.reshape(layers, heads, blocks, slots + 1, blocks, slots + 2)
    on_blocks, on_slots = by_token.sum(axis=-1), by_token[..., 1:-1].sum(axis=-1)
    from_slots = rows[..., :slots, :].mean(axis=3)  # [A, H, K, W]
    small = from_slots.size <= PER_HEAD_NUMBERS
    return {
        "tokens": observation.tokens,
        "numbers": number_tokens(observation.tokens).tolist(),
        "layers": layers,
        "heads": heads,
        "aggregation": f"mean over the {slots} slots of a block; over heads as named; a block is "
        "its begin, slots and end together",
        "slots_to_tokens": {
            "mean over heads": _rounded(from_slots.mean(axis=1)),
            "max over heads": _rounded(from_slots.max(axis=1)),
            "per head": _rounded(from_slots) if small else None,
        },
        "answer_to_blocks": _rounded(on_blocks[:, :, -1, -1]),
        "answer_to_tokens": _rounded(rows[:, :, -1, -1]) if small else None,
        "slots_to_blocks": {"mean over heads": _rounded(on_blocks[..., :slots, :].mean(axis=(1, 3)))},
        "slots_to_slots": {"mean over heads": _rounded(on_slots[..., :slots, :].mean(axis=(1, 3)))},
    }


# ------------------------------------------------------------------------------------------------------------- results


def score(study: Study, *, problems: int = PROBLEMS) -> Report:
    """Cuts, knockout, shares and their relation on the report split; heads are ranked on the choosing split."""
    rim = study.models["memory"]
    drawn = {split: _some(study, split, problems) for split in ("choose", "report")}
    scorers = {split: GoldScorer(rim, some, study.K) for split, some in drawn.items()}
    clean = {split: scorer.scores() for split, scorer in scorers.items()}
    questions = [problem.question for problem in scorers["report"].problems]
    roles = [role for role in ("memory", "base") if role in study.models]
    shares = {role: attention_shares(study.models[role], questions, study.K) for role in roles}
    layers, numbers = range(1, num_layers(rim) + 1), range(1, num_heads(rim) + 1)
    heads: list[Head] = list(product(layers, numbers))
    results, verdict = _cuts(study, scorers["report"], clean["report"])
    ranking, clouds = {}, {}
    for role, what, mass in (
        ("reader", "share of attention to all blocks", shares["memory"].ends[:, :, :, -1, 2:].sum(axis=-1)),
        ("writer", "share of attention to the question's numbers", shares["memory"].slots[..., 0].mean(axis=-1)),
    ):
        falls = {
            split: np.stack(
                [
                    clean[split].log_probability - scorer.scores([head], role).log_probability
                    for head in study.progress(heads, f"knockout {role} {split}")
                ],
                axis=1,
            )
            for split, scorer in scorers.items()
        }  # [n, heads]
        order = [heads[place] for place in np.argsort(-falls["choose"].mean(axis=0), kind="stable")]
        ranking[_AT[role]] = [f"{layer}.{head}" for layer, head in order[: max(TOP)]]
        results += _together(study, scorers["report"], clean["report"], order, heads, role)
        grid = {"layer": layers, "head": numbers}
        results += mean_results(FALL, _AT[role], falls["report"], grid, share=False)
        results += mean_results(what, _AT[role], mass, grid)
        by_head = mass.reshape(len(mass), -1), falls["report"]
        rho = bootstrap(by_head, _rank_correlation, seed=study.seed, draws=DRAWS)
        results.append(Result("Spearman's rho of attention share and effect of knockout", _AT[role], rho, share=False))
        verdict += (
            f" Over {_AT[role]}, attention share and effect of knockout have a rank correlation of {rho.value:.2f}."
        )
        points = tuple(_rounded(values.mean(axis=0)) for values in by_head)
        clouds[f"{_AT[role].capitalize()}: attention and knockout"] = Cloud(what, FALL, {_AT[role]: points})
    for role in roles:
        results += _share_results(
            shares[role], *{"memory": ("trained", "score"), "base": ("untrained", "control")}[role]
        )
    return Report(
        "attention",
        results,
        {split: scorer.n for split, scorer in scorers.items()},
        {
            "knockout": "a head's whole output set to zero, whatever it reads; at the answer: at the last end token "
            "and the answer itself; at the slots: at all slots",
            "left out, too long": sum(len(drawn[split]) - scorer.n for split, scorer in scorers.items()),
            "heads searched": len(heads),
            "largest effects on choose (layer.head)": ranking,
            "random sets": RANDOM_SETS,
        },
        verdict,
        clouds,
    )


def _cuts(study: Study, scorer: GoldScorer, clean: GoldScores) -> tuple[list[Result], str]:
    """Step 4, and what it says."""
    rim, lost, said = scorer.rim, {}, {}
    for cut in _CUTS:
        scores = []
        for one in study.progress(scorer.problems, f"cut {' and '.join(cut)}"):
            run = Patcher(rim, one.question, [rim.encoder.answer_ids(one.answer)], num_blocks=study.K, cut=cut)
            scores.append((float(run.log_probability[0]), bool(run.says[0])))
        logs, said[cut] = zip(*scores, strict=True)
        lost[cut] = clean.log_probability - logs
    apart = mean_estimate(lost["memory",] - lost["question",])
    results = [Result(FALL, f"{what} cut", mean_estimate(lost[cut]), role) for cut, (what, role) in _CUTS.items()]
    results.append(Result(FALL, "memory cut less the question cut", apart))
    results = [replace(result, share=False) for result in results]
    results += [
        Result(RIGHT, f"{what} cut", proportion_estimate(said[cut]), role) for cut, (what, role) in _CUTS.items()
    ]
    results.append(Result(RIGHT, "nothing cut", proportion_estimate(clean.says), "control"))
    than = "more than" if apart.low > 0 else "less than" if apart.high < 0 else "no more and no less than"
    told = f"{apart.value:+.2f} nats, {apart.low:+.2f} to {apart.high:+.2f}"
    return (
        results,
        f"An answer that may not attend to memory loses {than} one that may not attend to the question ({told}).",
    )


def _together(
    study: Study, scorer: GoldScorer, clean: GoldScores, order: Sequence[Head], heads: Sequence[Head], role: Role
) -> list[Result]:
    """The m heads at the top of `order` silenced together, and the mean of `RANDOM_SETS` sets of m random ones."""
    rng, results = study.rng(f"attention/{role}"), []

    def effect(chosen: Sequence[Head]) -> np.ndarray:
        found = scorer.scores(chosen, role)
        return np.array([clean.log_probability - found.log_probability, found.says])

    for size in (size for size in TOP if size < len(heads)):
        sets = [[heads[place] for place in rng.permutation(len(heads))[:size]] for _ in range(RANDOM_SETS)]
        random = np.mean([effect(chosen) for chosen in study.progress(sets, f"random heads {role}")], axis=0)
        top, place = effect(order[:size]), {"heads silenced": [size]}
        for metric, own, other in zip((FALL, RIGHT), top, random, strict=True):
            more = {"places": place, "share": metric == RIGHT}
            results += mean_results(metric, f"top {_AT[role]}", own[:, None], **more)
            results += mean_results(metric, f"random {_AT[role]}", other[:, None], **more, role="control")
            results += mean_results(f"{metric}: top less random", _AT[role], (own - other)[:, None], **more)
    return results


def _rank_correlation(shares: np.ndarray, effects: np.ndarray) -> float:
    """Spearman's rho over heads between mean share and mean effect ([n, heads] each)."""
    from scipy.stats import spearmanr

    return float(spearmanr(shares.mean(axis=0), effects.mean(axis=0)).statistic)


def _share_results(shares: Shares, name: str, role: str) -> list[Result]:
    """Where the answer (the last end token) attends by layer, and the slots of each block."""
    answer, slots = shares.ends[:, :, :, -1], shares.slots.mean(axis=(1, 2))  # [n, A, H, 2 + K], [n, K, 2 + K]
    layers, blocks = range(1, answer.shape[1] + 1), range(1, slots.shape[1] + 1)
    to = {"attended": ["numbers", "other question tokens", *(f"block {block}" for block in blocks)]}
    largest = np.take_along_axis(answer, answer.mean(axis=0).argmax(axis=1)[None, :, None], axis=2)[:, :, 0]
    results = []
    sources = [(name, answer.mean(axis=(1, 2)), role)]
    sources += [("even attention", shares.even, "control")] if role == "score" else []
    for of, mass, what in sources:
        results += mean_results(f"{SHARE}, all blocks together", of, mass[:, 2:].sum(axis=1), role=what)
        results += mean_results(SHARE, of, mass, to, role=what)
    for of, mass, rows in (
        ("the answer, mean over heads", answer.mean(axis=2), {"layer": layers}),
        ("the answer, largest of the heads", largest, {"layer": layers}),
        ("the slots, mean over layers and heads", slots, {"block": blocks}),
    ):
        results += mean_results(f"share of attention from {of}", name, mass, rows | to, role=role)
    return results


def _some(study: Study, split: str, count: int) -> list[Problem]:
    problems = study.problems(split)
    rows = np.sort(study.rng(f"attention/{split}").permutation(len(problems))[:count])
    return [problems[i] for i in rows]


def _rounded(values: np.ndarray) -> list:
    return np.round(np.asarray(values, dtype=float), 3).tolist()
