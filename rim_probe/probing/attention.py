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
   the question alone, and from both.
5. Controls: the base model's attention before RiM training, and even attention over all visible tokens.

Knows attention weights and names every aggregation. Knows nothing of what blocks hold.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rim_probe.errors import RiMError
from rim_probe.model import RiM
from rim_probe.probing.capture import Capture, capture
from rim_probe.probing.curves import mean_estimate
from rim_probe.probing.heads import GoldScorer, GoldScores, Head, Part, Role, fitting, num_heads
from rim_probe.probing.hooks import num_layers
from rim_probe.probing.section import Estimate, Figure, Section, Table, bootstrap, proportion_estimate
from rim_probe.probing.study import Observation, Study
from rim_probe.problems import Problem

PROBLEMS = 200  # of choose to rank heads on, and of report to measure on
TOP = (1, 2, 4, 8)
RANDOM_SETS = 5
CAPTURE_BATCH = 32
DRAWS = 500
PER_HEAD_NUMBERS = 200_000  # above that many weights `explain` gives means over heads only
_AT: dict[Role, str] = {"reader": "heads at the answer", "writer": "heads at the slots"}
_NUMBER = re.compile(r"\d")


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
    return np.array([bool(_NUMBER.search(token)) for token in tokens], dtype=bool)


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
        numbers = [number_tokens(_tokens(rim, ids)) for ids in held.question_ids]
        parts.append(shares_of(held, numbers))
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


# ------------------------------------------------------------------------------------------------------------- report


def score(study: Study, *, problems: int = PROBLEMS) -> Section:
    """Shares, knockout and their relation on the report split; heads are ranked on the choosing split."""
    rim = study.models["memory"]
    drawn = {split: _some(study, split, problems) for split in ("choose", "report")}
    picked = {split: fitting(rim, some, study.K) for split, some in drawn.items()}
    questions = [problem.question for problem in picked["report"]]
    shares = {
        role: attention_shares(study.models[role], questions, study.K)
        for role in ("memory", "base")
        if role in study.models
    }
    heads: list[Head] = [
        (layer, head) for layer in range(1, num_layers(rim) + 1) for head in range(1, num_heads(rim) + 1)
    ]
    knockouts = {role: _Knockout.measure(study, picked, heads, role) for role in ("reader", "writer")}
    cuts = _cuts(GoldScorer(rim, picked["report"], study.K))
    attended = {
        "reader": shares["memory"].ends[:, :, :, -1, 2:].sum(axis=-1),
        "writer": shares["memory"].slots[..., 0].mean(axis=-1),
    }  # [n, A, H]
    relation = {
        role: _rank_correlation(attended[role].reshape(len(questions), -1), knockouts[role].effects, study.seed)
        for role in knockouts
    }
    return Section(
        name="attention",
        title="Attention to memory",
        question="Where do the memory slots and the answer attend, and do the heads that attend most to memory matter "
        "most for the answer?",
        summary=_summary(shares, cuts, knockouts, relation),
        n={"choose": len(picked["choose"]), "report": len(questions)},
        settings={
            "heads": len(heads),
            "knockout": "a head's whole output set to zero, whatever it reads; reader: at the last end token and the "
            "answer; writer: at all slots",
            "left out, too long": sum(len(drawn[split]) - len(picked[split]) for split in drawn),
            "ranked by": f"fall of the gold answer's log probability on choose (n = {len(picked['choose'])})",
            "searched": f"{2 * len(heads)} cells (heads x roles)",
            "random sets": RANDOM_SETS,
        },
        tables=[
            _share_table(shares, study.seed),
            _cut_table(cuts),
            *(_top_table(role, found, study.seed) for role, found in knockouts.items()),
            _relation_table(relation, heads, attended, knockouts),
        ],
        figures=[
            *_answer_figures(shares, len(questions)),
            *_slot_figures(shares, len(questions)),
            *(_knockout_figure(role, found, heads) for role, found in knockouts.items()),
            *(
                _scatter(role, attended[role].reshape(len(questions), -1), found, heads)
                for role, found in knockouts.items()
            ),
        ],
        data={
            role: [
                {
                    "layer": layer,
                    "head": head,
                    "share": float(attended[role][:, layer - 1, head - 1].mean()),
                    "effect": float(found.effects[:, place].mean()),
                }
                for place, (layer, head) in enumerate(heads)
            ]
            for role, found in knockouts.items()
        },
    )


def _cuts(scorer: GoldScorer) -> dict[tuple[Part, ...], GoldScores]:
    """Scores by what the answer may not attend to; () is the clean pass."""
    return {cut: scorer.scores(cut=cut) for cut in ((), ("memory",), ("question",), ("memory", "question"))}


@dataclass(frozen=True)
class _Knockout:
    """What silencing heads did on the report split.

    Attributes:
        effects [n, heads]: fall of the gold answer's log probability, each head alone.
        ranking: heads by effect on the choosing split, the largest first.
        clean: whether the gold answer is said without knockout, [n].
        top, random: by m, (fall of the log probability [n], gold answer said [n], mean over sets for random).
    """

    effects: np.ndarray
    ranking: list[Head]
    clean: np.ndarray
    top: Mapping[int, tuple[np.ndarray, np.ndarray]]
    random: Mapping[int, tuple[np.ndarray, np.ndarray]]

    @classmethod
    def measure(
        cls, study: Study, picked: Mapping[str, Sequence[Problem]], heads: Sequence[Head], role: Role
    ) -> "_Knockout":
        rim, rng = study.models["memory"], study.rng(f"attention/{role}")
        scorers = {split: GoldScorer(rim, problems, study.K) for split, problems in picked.items()}
        clean = {split: scorer.scores() for split, scorer in scorers.items()}
        falls = {
            split: np.stack(
                [
                    clean[split].log_probability - scorer.scores([head], role).log_probability
                    for head in study.progress(heads, f"knockout {role} {split}")
                ],
                axis=1,
            )
            for split, scorer in scorers.items()
        }
        order = np.argsort(-falls["choose"].mean(axis=0), kind="stable")
        ranking = [heads[place] for place in order]

        def fall(chosen: Sequence[Head]) -> tuple[np.ndarray, np.ndarray]:
            found = scorers["report"].scores(chosen, role)
            return clean["report"].log_probability - found.log_probability, found.says.astype(float)

        sizes = [size for size in TOP if size < len(heads)]
        random = {}
        for size in sizes:
            sets = [
                fall([heads[place] for place in rng.permutation(len(heads))[:size]])
                for _ in study.progress(range(RANDOM_SETS), f"random heads {role}")
            ]
            random[size] = tuple(np.mean([found[part] for found in sets], axis=0) for part in (0, 1))
        top = {size: fall(ranking[:size]) for size in sizes}
        return cls(falls["report"], ranking, clean["report"].says, top, random)


def _rank_correlation(shares: np.ndarray, effects: np.ndarray, seed: int) -> Estimate:
    """Spearman's rho over heads between mean share and mean effect ([n, heads] each); bootstrap over problems."""
    from scipy.stats import rankdata

    def rho(share: np.ndarray, effect: np.ndarray) -> float:
        first, second = rankdata(share.mean(axis=0)), rankdata(effect.mean(axis=0))
        if first.std() == 0 or second.std() == 0:
            return float("nan")
        return float(np.corrcoef(first, second)[0, 1])

    return bootstrap((shares, effects), rho, seed=seed, draws=DRAWS)


def _share_table(shares: Mapping[str, Shares], seed: int) -> Table:
    """Mean over layers and heads, trained, untrained and even."""
    even = shares["memory"].even

    def row(name: str, values: np.ndarray) -> list:
        parts = (values[:, 0], values[:, 1], values[:, 2:].sum(axis=1), values[:, -1])
        return [name, *(bootstrap(part, seed=seed, draws=DRAWS) for part in parts)]

    rows = []
    for role, label in (("memory", ""), ("base", "control: untrained, ")):
        if role in shares:
            rows.append(row(f"{label}the answer (last end token)", shares[role].ends[:, :, :, -1].mean(axis=(1, 2))))
            rows.append(row(f"{label}slots of the last block", shares[role].slots[:, :, :, -1].mean(axis=(1, 2))))
            rows.append(row(f"{label}slots of the first block", shares[role].slots[:, :, :, 0].mean(axis=(1, 2))))
    rows.append(row("control: even attention of the last end token", even))
    return Table(
        f"Share of attention, mean over all layers and heads (report, n = {len(even)})",
        ["from", "to numbers", "to other question tokens", "to all blocks", "to the last block"],
        rows,
        note="Numbers are tokens with a digit. A block sees only itself and what stands before it.",
    )


def _cut_table(cuts: Mapping[tuple[Part, ...], GoldScores]) -> Table:
    clean = cuts[()]
    rows: list[list] = []
    for cut, found in cuts.items():
        change = mean_estimate(found.log_probability - clean.log_probability) if cut else None
        rows.append([" and ".join(cut) or "nothing (clean)", proportion_estimate(found.says), change])
    paired = cuts["memory",].log_probability - cuts["question",].log_probability
    rows.append(["difference: memory less question", None, mean_estimate(paired)])
    return Table(
        f"The answer's attention cut, all heads and layers (report, n = {len(clean.says)})",
        ["cut from", "right", "change of log p(gold)"],
        rows,
        note="The last end token and the answer's own tokens may not attend to the question, or to the memory tokens "
        "before the last end token; all other rows are as before, so that memory still holds what it read of the "
        "question.",
    )


def _top_table(role: Role, found: _Knockout, seed: int) -> Table:
    rows: list[list] = []
    for size, (fall, says) in found.top.items():
        random_fall, random_says = found.random[size]
        names = ", ".join(f"{layer}.{head}" for layer, head in found.ranking[:size])
        rows.append(
            [
                f"{size}: {names}",
                bootstrap(fall, seed=seed),
                bootstrap(random_fall, seed=seed),
                bootstrap(fall - random_fall, seed=seed),
                bootstrap(says, seed=seed),
                bootstrap(random_says, seed=seed),
            ]
        )
    return Table(
        f"Top {_AT[role]} silenced together, against as many heads at random (report, n = {len(found.clean)})",
        [
            "heads (layer.head)",
            "fall of log p(gold)",
            "control: random heads",
            "difference",
            "right after",
            "control: right after, random heads",
        ],
        rows,
        note=f"Without knockout {found.clean.mean():.1%} are right. Random: mean of {RANDOM_SETS} sets of as many "
        "heads, drawn from all. A silent head's whole output there is gone, whatever it reads: memory or the question.",
    )


def _relation_table(
    relation: Mapping[str, Estimate],
    heads: Sequence[Head],
    attended: Mapping[str, np.ndarray],
    knockouts: Mapping[str, _Knockout],
) -> Table:
    rows = []
    for role, estimate in relation.items():
        most = attended[role].mean(axis=0).reshape(-1).argmax()
        layer, head = heads[most]
        place = 1 + knockouts[role].ranking.index(heads[most])
        rows.append([_AT[role], estimate, f"{layer}.{head}", place])
    return Table(
        f"Attention is not explanation: share against effect over {len(heads)} heads",
        ["silenced", "Spearman's rho (95 % over problems)", "head that attends most", "its rank by knockout"],
        rows,
        note="Share: mean attention to all blocks from the last end token (heads at the answer), to the question's "
        "numbers from the slots (heads at the slots). "
        "Heads are few, so the interval, which is over problems, says nothing about other models.",
    )


def _answer_figures(shares: Mapping[str, Shares], n: int) -> list[Figure]:
    """From the answer to each block by layer: mean and max over heads."""
    figures = []
    for role, label in (("memory", "trained"), ("base", "control: untrained")):
        if role not in shares:
            continue
        mass = shares[role].ends[:, :, :, -1].mean(axis=0)  # [A, H, 2 + K]
        for name, part in (("mean over heads", mass.mean(axis=1)), ("max over heads", mass.max(axis=1))):
            figures.append(
                _mass_figure(f"Attention from the answer (last end token), {name}, {label}", part, n, "layer")
            )
    return figures


def _slot_figures(shares: Mapping[str, Shares], n: int) -> list[Figure]:
    """From the slots of each block, mean over layers and heads."""
    figures = []
    for role, label in (("memory", "trained"), ("base", "control: untrained")):
        if role in shares:
            mass = shares[role].slots.mean(axis=(0, 1, 2))  # [K, 2 + K]
            title = f"Attention from the slots of each block, mean over layers, heads and slots, {label}"
            figures.append(_mass_figure(title, mass, n, "block"))
    return figures


def _mass_figure(title: str, mass: np.ndarray, n: int, rows: str) -> Figure:
    blocks = mass.shape[1] - 2
    return Figure(
        "heatmap",
        f"{title} (report, n = {n})",
        "attended",
        rows,
        {
            "x": ["numbers", "other question tokens", *(f"block {block}" for block in range(1, blocks + 1))],
            "y": [f"{rows} {place}" for place in range(1, len(mass) + 1)],
            "z": _rounded(mass),
            "hover": None,
            "z_title": "share of attention",
            "low": 0.0,
            "high": None,
            "diverging": False,
        },
    )


def _knockout_figure(role: Role, found: _Knockout, heads: Sequence[Head]) -> Figure:
    layers, count = max(layer for layer, _ in heads), max(head for _, head in heads)
    effect = found.effects.mean(axis=0).reshape(layers, count)
    bound = float(np.abs(effect).max()) or 1.0
    return Figure(
        "heatmap",
        f"Fall of the gold answer's log probability, {_AT[role]} silenced one by one (report, n = {len(found.clean)})",
        "head",
        "layer",
        {
            "x": [f"head {head}" for head in range(1, count + 1)],
            "y": [f"layer {layer}" for layer in range(1, layers + 1)],
            "z": _rounded(effect),
            "hover": None,
            "z_title": "nats",
            "low": -bound,
            "high": bound,
            "diverging": True,
        },
    )


def _scatter(role: Role, attended: np.ndarray, found: _Knockout, heads: Sequence[Head]) -> Figure:
    what = "to all blocks, from the last end token" if role == "reader" else "to the question's numbers, from the slots"
    group = {
        "name": f"{len(heads)} heads",
        "x": _rounded(attended.mean(axis=0)),
        "y": _rounded(found.effects.mean(axis=0)),
        "text": [f"layer {layer}, head {head}" for layer, head in heads],
    }
    return Figure(
        "scatter",
        f"Attention share against the effect of knockout, {_AT[role]} (report, n = {len(found.clean)})",
        f"mean attention {what}",
        "fall of log p(gold), nats",
        {"groups": [group]},
    )


def _summary(
    shares: Mapping[str, Shares],
    cuts: Mapping[tuple[Part, ...], GoldScores],
    knockouts: Mapping[str, _Knockout],
    relation: Mapping[str, Estimate],
) -> str:
    def right(cut: tuple[Part, ...]) -> str:
        found = proportion_estimate(cuts[cut].says)
        return f"{found.value:.1%} ({found.low:.1%} to {found.high:.1%})"

    def on_memory(role: str) -> float:
        return float(shares[role].ends[:, :, :, -1, 2:].sum(axis=-1).mean())

    text = f"Where the answer begins, {on_memory('memory'):.0%} of attention goes to the blocks (mean over layers and "
    text += "heads"
    text += f"; untrained {on_memory('base'):.0%}" if "base" in shares else ""
    text += f"; even attention {float(shares['memory'].even[:, 2:].sum(axis=1).mean()):.0%}). "
    text += (
        f"With the answer's attention to memory cut {right(('memory',))} are right, with that to the question cut "
        f"{right(('question',))}, with both cut {right(('memory', 'question'))} (clean {right(())}). "
    )
    for role, found in knockouts.items():
        size = max(found.top, default=0)
        if size:
            text += (
                f"With the whole output of the top {size} {_AT[role]} silenced {found.top[size][1].mean():.1%} are "
                f"right, of {size} random heads {found.random[size][1].mean():.1%}. "
            )
    text += "A silenced head loses what it reads from the question, too. "
    said = ", ".join(f"{estimate.value:.2f} for {_AT[role]}" for role, estimate in relation.items())
    return text + f"Attention share and effect of knockout correlate over heads with Spearman's rho {said}."


def _some(study: Study, split: str, count: int) -> list[Problem]:
    problems = study.problems(split)
    rows = np.sort(study.rng(f"attention/{split}").permutation(len(problems))[:count])
    return [problems[i] for i in rows]


def _tokens(rim: RiM, ids: Sequence[int]) -> list[str]:
    return [rim.tokenizer.decode([token]) for token in ids]


def _rounded(values: np.ndarray) -> list:
    return np.round(np.asarray(values, dtype=float), 3).tolist()
