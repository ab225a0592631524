"""Commitment: how sure of its final answer the model is after each block, beside each step of a chain of thought.

Method:
1. Memory: one packed row per question and answer (`packing.pack_memory`) holds the answer as readout after every block,
   so one pass gives its probability, EOS included, after 1..K blocks; exactly that of K separate passes.
2. Chain of thought: question, the first t of the model's own steps, the answer marker, then the answer ("early
   answering", Lanham et al. 2023, arXiv:2307.13702), for t = 0 to all. No training row is cut off early, so early
   probabilities say what the model would answer when cut off, not what it could already tell.
3. Two answers are followed: the final one the method gives itself, and the gold one. A block (a step) matches where
   greedy decoding gives exactly the final answer; told are the first match and the first from which all later match.
4. Of the answer's first token: entropy, and KL(p_K || p_k) from the last block's distribution, in nats.
Control tokens are ruled out as in decoding. Controls: another problem's answer (a different one) in the same place, and
the base model with untrained memory, by the gold answer.

Knows packed rows and probabilities. Knows nothing of hidden states, attention or how a value is graded.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from rim_probe.decoding import Answer, answer
from rim_probe.errors import RiMError
from rim_probe.model import RiM
from rim_probe.packing import Row, pack_memory, pack_text, pad_rows, row_mask
from rim_probe.probing.curves import curve, mean_estimate
from rim_probe.probing.section import Estimate, Figure, Section, Table, proportion_estimate
from rim_probe.problems import ANSWER_MARKER, STEP_SEPARATOR, is_correct

if TYPE_CHECKING:
    from rim_probe.probing.study import Observation, Study

MOST_LOGITS = 2**26  # numbers in one batch's logits: 256 MB
MOST_ROWS = 64
FEWEST_PROBLEMS = 30
MOST_GROUPS = 5  # numbers of steps that get a figure of their own
_STEP = re.compile(r"<<.*?>>")


@dataclass(frozen=True)
class Course:
    """An answer's course over R readouts (blocks, or steps of a chain) of n rows.

    Attributes:
        probability [n, R]: of the whole answer, EOS included.
        greedy [n, R]: whether greedy decoding would give exactly this answer.
        entropy [n, R]: of the first token, nats.
        divergence [n, R]: KL of the first token's distribution at the last readout to that at this one, nats; None for
            a chain of thought.
    """

    probability: np.ndarray
    greedy: np.ndarray
    entropy: np.ndarray
    divergence: np.ndarray | None = None


def memory_course(rim: RiM, questions: Sequence[str], answers: Sequence[Sequence[int]], num_blocks: int) -> Course:
    """The course of one answer per question over blocks 1..`num_blocks`; answers are token ids, EOS among them."""
    rows = [
        pack_memory(rim.encode_question(question), rim.encoder.block_ids, [list(ids)] * num_blocks)
        for question, ids in zip(questions, answers, strict=True)
    ]
    return _read(rim, rows, num_blocks)


def chain_course(
    rim: RiM, questions: Sequence[str], steps: Sequence[Sequence[str]], answers: Sequence[Sequence[int]]
) -> list[Course]:
    """The course of one answer per question over 0, 1, ... all of its steps: a `Course` of n = 1 for each question."""
    rows, counts = [], []
    for question, chain, ids in zip(questions, steps, answers, strict=True):
        for shown in range(len(chain) + 1):
            text = "".join(step + STEP_SEPARATOR for step in chain[:shown])
            told = rim.encode_text(text) if text else []
            rows.append(pack_text(rim.encode_question(question) + told + rim.encoder.marker_ids, list(ids)))
        counts.append(len(chain) + 1)
    single, ends = _read(rim, rows, 1), np.cumsum(counts)
    return [
        Course(*(values[end - count : end].T for values in (single.probability, single.greedy, single.entropy)))
        for end, count in zip(ends, counts, strict=True)
    ]


@torch.inference_mode()
def _read(rim: RiM, rows: Sequence[Row], readouts: int) -> Course:
    """The course of every row's R readouts; the divergence is that from the row's last one."""
    rim.model.eval()
    vocabulary = rim.model.get_output_embeddings().weight.shape[0]
    banned = torch.tensor(rim.banned_ids, dtype=torch.long, device=rim.device)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))  # like lengths together pad least
    size = max(1, min(MOST_ROWS, MOST_LOGITS // (vocabulary * max(map(len, rows)))))
    parts = []
    for start in range(0, len(order), size):
        padded = pad_rows([rows[i] for i in order[start : start + size]], rim.eos_id)
        batch = {name: tensor.to(rim.device) for name, tensor in padded.items()}
        logits = rim.model(
            input_ids=batch["input_ids"],
            position_ids=batch["position_ids"],
            attention_mask=row_mask(batch["readouts"], rim.dtype),
            use_cache=False,
        ).logits
        row, column = batch["label_readouts"].nonzero(as_tuple=True)
        wanted = batch["labels"][row, column]
        place = row * readouts + batch["label_readouts"][row, column] - 1  # rises: labels stand readout by readout
        own = logits[row, column].float().index_fill(-1, banned, -math.inf).log_softmax(-1)  # [labels, V]
        best, told = own.max(-1).indices, own.gather(1, wanted[:, None])[:, 0]
        zeros = torch.zeros(len(logits) * readouts, device=own.device)
        total, missed = zeros.index_add(0, place, told), zeros.index_add(0, place, (best != wanted).float())
        begins = torch.cat([place.new_ones(1), place.diff()]).nonzero()[:, 0]
        first = own[begins].unflatten(0, (-1, readouts))  # [B, R, V]
        p, last = first.exp(), first[:, -1:]
        entropy = torch.special.entr(p).sum(-1)
        divergence = torch.where(last.exp() > 0, last.exp() * (last - first), 0).sum(-1).clamp(min=0)
        found = (
            total.exp().unflatten(0, (-1, readouts)),
            missed.unflatten(0, (-1, readouts)) == 0,
            entropy,
            divergence,
        )
        parts.append([tensor.cpu().numpy() for tensor in found])
    back = np.argsort(order)
    return Course(*(np.concatenate(column)[back] for column in zip(*parts, strict=True)))


def first_match(matches: np.ndarray) -> np.ndarray:
    """Index of the first match in each row of bool [n, R]; NaN where there is none."""
    return np.where(matches.any(1), matches.argmax(1), np.nan)


def stable_match(matches: np.ndarray) -> np.ndarray:
    """Index from which every readout matches, in each row of bool [n, R]; NaN where the last does not."""
    from_end = (~matches[:, ::-1]).argmax(1)
    start = np.where(matches.all(1), 0, matches.shape[1] - from_end)
    return np.where(matches[:, -1], start, np.nan)


# ----------------------------------------------------------------------------------------------------- one question


def explain(models: Mapping[str, RiM], observation: Observation, cot_answer: Answer | None = None) -> dict[str, Any]:
    """The course of both methods' own final answers for one question.

    Args:
        models: `memory`, and `cot` where there is one.
        cot_answer: by the cot model, to save asking it again.

    Returns:
        {"answer", "blocks": [{"block", "probability", "matches", "entropy", "kl_to_last"}], "first_block",
        "stable_block", "cot": None or {"answer", "steps": [{"step", "text", "probability", "matches", "entropy"}]}}.
        Step 0 is the question alone. A truncated answer has no course: its lists are empty.
    """
    given = observation.answer
    told: dict[str, Any] = {"answer": given.value, "blocks": [], "first_block": None, "stable_block": None, "cot": None}
    if _complete(models["memory"], given):
        course = memory_course(models["memory"], [given.question], [given.token_ids], observation.capture.K)
        told["blocks"] = [
            {"block": k + 1, **_moment(course, k), "kl_to_last": float(course.divergence[0, k])}
            for k in range(course.greedy.shape[1])
        ]
        told["first_block"] = _number(first_match(course.greedy)[0])
        told["stable_block"] = _number(stable_match(course.greedy)[0])
    if "cot" in models:
        rim = models["cot"]
        cot_answer = cot_answer or answer(rim, given.question, "cot")
        chain = chain_of(rim, cot_answer)
        if chain is not None:
            steps, ids = chain
            (course,) = chain_course(rim, [given.question], [steps], [ids])
            told["cot"] = {
                "answer": cot_answer.value,
                "steps": [{"step": t, "text": ("", *steps)[t], **_moment(course, t)} for t in range(len(steps) + 1)],
            }
    return told


def _moment(course: Course, readout: int) -> dict[str, Any]:
    return {
        "probability": float(course.probability[0, readout]),
        "matches": bool(course.greedy[0, readout]),
        "entropy": float(course.entropy[0, readout]),
    }


def _number(index: float) -> int | None:
    return None if math.isnan(index) else int(index) + 1


def _complete(rim: RiM, given: Answer) -> bool:
    return not given.truncated and bool(given.token_ids) and given.token_ids[-1] == rim.eos_id


def chain_of(rim: RiM, given: Answer) -> tuple[tuple[str, ...], list[int]] | None:
    """Steps and final-answer ids of a chain of thought; None where it does not end in a marker and an answer."""
    before, marker, after = given.text.rpartition(ANSWER_MARKER.strip())
    if not marker or not after.strip() or not _complete(rim, given):
        return None
    return tuple(_STEP.findall(before)), rim.encoder.answer_ids(after.strip())


# --------------------------------------------------------------------------------------------------------- the section


def score(study: Study) -> Section:
    """The courses of split "report"; nothing is fitted or chosen.

    Raises:
        RiMError: no answer of the memory model is complete.
    """
    rim, everything = study.models["memory"], study.problems("report")
    given = study.answers("memory", "report")
    gold_ids = [rim.encoder.answer_ids(problem.answer) for problem in everything]
    kept = [
        i
        for i, problem in enumerate(everything)
        if _complete(rim, given[i]) and _fits(study, problem.question, max(len(gold_ids[i]), len(given[i].token_ids)))
    ]
    if not kept:
        raise RiMError(
            "No answer of this model ends by itself within its context, so there is none to follow; train the model, "
            "or give shorter questions."
        )
    problems = [everything[i] for i in kept]
    questions = [problem.question for problem in problems]
    gold = [gold_ids[i] for i in kept]
    donors = _donors([problem.answer for problem in problems], study.rng("commitment donors"))
    courses = {
        "final": memory_course(rim, questions, [given[i].token_ids for i in kept], study.K),
        "gold": memory_course(rim, questions, gold, study.K),
        "another": memory_course(rim, questions, [gold[d] for d in donors], study.K),
    }
    if "base" in study.models:
        base = study.models["base"]
        own = [base.encoder.answer_ids(problem.answer) for problem in problems]
        courses["base"] = memory_course(base, questions, own, study.K)
    right = np.array([is_correct(given[i].value, problem.answer) for i, problem in zip(kept, problems, strict=True)])
    steps = np.array([len(problem.steps) for problem in problems])
    chains = _chains(study, kept) if "cot" in study.models else None
    return _section(study, courses, chains, steps, right)


def _fits(study: Study, question: str, tokens: int) -> bool:
    rims = [study.models[role] for role in ("memory", "base") if role in study.models]
    return all(len(rim.prompt_ids(question, "memory", study.K)) + tokens <= rim.max_length for rim in rims)


def _donors(answers: Sequence[str], rng: np.random.Generator) -> list[int]:
    """For every problem another one with a different answer, at random (itself where there is none)."""
    order = rng.permutation(len(answers))
    place = np.argsort(order)
    found = []
    for i, own in enumerate(answers):
        turned = (int(order[(place[i] + shift) % len(order)]) for shift in range(1, len(order)))
        found.append(next((other for other in turned if answers[other] != own), i))
    return found


@dataclass(frozen=True)
class _Chains:
    """Courses of the chain of thought: `rows` are indices into the problems scored; one course each per row."""

    rows: np.ndarray
    final: list[Course]
    gold: list[Course]

    def after(self, which: str, step: int, chosen: np.ndarray) -> np.ndarray:
        """Probability of the `final` or `gold` answer after `step` of the model's own steps (all, where it has fewer),
        for the rows whose problem is chosen (bool over problems)."""
        return np.array(
            [
                course.probability[0, min(step, course.probability.shape[1] - 1)]
                for row, course in zip(self.rows, getattr(self, which), strict=True)
                if chosen[row]
            ]
        )


def _chains(study: Study, kept: Sequence[int]) -> _Chains:
    rim, problems, given = study.models["cot"], study.problems("report"), study.answers("cot", "report")
    rows, questions, steps, final, gold = [], [], [], [], []
    for row, i in enumerate(kept):
        chain = chain_of(rim, given[i])
        wanted = rim.encoder.answer_ids(problems[i].answer)
        if chain is not None and given[i].prompt_tokens + given[i].generated_tokens + len(wanted) <= rim.max_length:
            rows.append(row)
            questions.append(problems[i].question)
            steps.append(chain[0])
            final.append(chain[1])
            gold.append(wanted)
    if not rows:
        return _Chains(np.array([], dtype=int), [], [])
    return _Chains(
        np.array(rows), chain_course(rim, questions, steps, final), chain_course(rim, questions, steps, gold)
    )


def _section(
    study: Study, courses: dict[str, Course], chains: _Chains | None, steps: np.ndarray, right: np.ndarray
) -> Section:
    everyone = np.ones(len(steps), dtype=bool)
    sizes = {int(count): steps == count for count in np.unique(steps)}
    groups = {f"{count} step" + "s" * (count != 1): chosen for count, chosen in sizes.items() if count}
    groups = {name: chosen for name, chosen in groups.items() if chosen.sum() >= FEWEST_PROBLEMS}
    told_apart = {"all": everyone, **groups, "answered right": right, "answered wrong": ~right}
    commits = Table(
        "When memory has its final answer",
        [
            "problems",
            "n",
            "first block that says it (mean)",
            "block from which all say it (mean)",
            "said after block 1, %",
            "probability after block 1",
            f"probability after block {study.K}",
            "cot: own step from which it is said (mean)",
            "cot: said before its last step, %",
        ],
        [
            [
                name,
                int(chosen.sum()),
                mean_estimate(first_match(courses["final"].greedy[chosen]) + 1),
                mean_estimate(stable_match(courses["final"].greedy[chosen]) + 1),
                proportion_estimate(courses["final"].greedy[chosen, 0]),
                mean_estimate(courses["final"].probability[chosen, 0]),
                mean_estimate(courses["final"].probability[chosen, -1]),
                *_chain_cells(chains, chosen),
            ]
            for name, chosen in told_apart.items()
            if chosen.any()
        ],
        note="“Says it”: greedy decoding after that block gives exactly the text of the final answer. Steps of the "
        "chain of thought are its own, told and then cut off by the answer marker; 0 is the question alone.",
    )
    blocks = Table(
        "Block by block",
        ["block", "P(final answer)", "P(gold)", "says the final answer, %", "entropy, nats", "KL from the last block"]
        + ["control: another problem's answer"]
        + ["control: P(gold) of the base model"] * ("base" in courses),
        [
            [
                str(k + 1),
                mean_estimate(courses["final"].probability[:, k]),
                mean_estimate(courses["gold"].probability[:, k]),
                proportion_estimate(courses["final"].greedy[:, k]),
                mean_estimate(courses["final"].entropy[:, k]),
                mean_estimate(courses["final"].divergence[:, k]),
                *(mean_estimate(courses[name].probability[:, k]) for name in ("another", "base") if name in courses),
            ]
            for k in range(study.K)
        ],
    )
    return Section(
        name="commitment",
        title="Commitment",
        question="How early is the model sure of the answer it will give: after which block, and after which step of a "
        "chain of thought?",
        summary=_summary(study, courses, chains),
        n={"report": len(steps)} | ({"cot": len(chains.rows)} if chains else {}),
        settings={"probability": "whole answer with EOS, control tokens ruled out", "chosen": "nothing"},
        tables=[commits, blocks],
        figures=[
            *(
                _course_figure(study, name, chosen, courses, chains)
                for name, chosen in list(groups.items())[:MOST_GROUPS]
            ),
            _certainty(study, courses, groups),
        ],
        data={
            "probability": {name: course.probability.mean(0).tolist() for name, course in courses.items()},
            "entropy": courses["final"].entropy.mean(0).tolist(),
            "kl_to_last": courses["final"].divergence.mean(0).tolist(),
        },
    )


def _chain_cells(chains: _Chains | None, chosen: np.ndarray) -> list[Estimate | None]:
    courses = [c for row, c in zip(chains.rows, chains.final, strict=True) if chosen[row]] if chains else []
    if not courses:
        return [None, None]
    stable = np.array([stable_match(course.greedy)[0] for course in courses])
    length = np.array([course.greedy.shape[1] - 1 for course in courses])
    return [mean_estimate(stable), proportion_estimate(stable < length)]


def _summary(study: Study, courses: dict[str, Course], chains: _Chains | None) -> str:
    said = proportion_estimate(courses["final"].greedy[:, 0])
    stable = mean_estimate(stable_match(courses["final"].greedy) + 1)
    gold, another = courses["gold"].probability.mean(0), courses["another"].probability.mean(0)
    text = (
        f"After block 1 memory already says its final answer for {said.value:.0%} of problems; from block "
        f"{stable.value:.1f} on (mean) all blocks say it. The gold answer's probability goes from {gold[0]:.2f} after "
        f"block 1 to {gold[-1]:.2f} after block {study.K}, another problem's answer from {another[0]:.3f} to "
        f"{another[-1]:.3f}"
    )
    if "base" in courses:
        untrained = courses["base"].probability.mean()
        text += f", and with the base model's untrained memory the gold answer has {untrained:.2f}"
    text += "."
    if chains and len(chains.rows):
        early = _chain_cells(chains, np.ones(int(chains.rows.max()) + 1, dtype=bool))[1]
        text += f" The chain of thought already says its final answer before its last step for {early.value:.0%}."
    return text


def _course_figure(
    study: Study, name: str, chosen: np.ndarray, courses: dict[str, Course], chains: _Chains | None
) -> Figure:
    x = list(range(1, study.K + 1))
    named = {
        "final": ("memory: its final answer", False),
        "gold": ("memory: gold answer", False),
        "another": ("memory: another problem's answer", True),
        "base": ("base model: gold answer", True),
    }
    series = [
        curve(label, x, [mean_estimate(courses[key].probability[chosen, k]) for k in range(study.K)], control)
        for key, (label, control) in named.items()
        if key in courses
    ]
    lengths = (
        [c.probability.shape[1] for row, c in zip(chains.rows, chains.final, strict=True) if chosen[row]]
        if chains
        else []
    )
    if lengths:
        steps = list(range(int(np.median(lengths))))
        for key, label in (("final", "its final answer"), ("gold", "gold answer")):
            found = [mean_estimate(chains.after(key, step, chosen)) for step in steps]
            series.append(curve(f"chain of thought: {label}", steps, found))
    return Figure(
        "lines",
        f"Probability of the answer, problems of {name}",
        "after block k (memory) or step t (chain of thought)",
        "probability",
        {"series": series},
        note=f"n = {int(chosen.sum())}",
    )


def _certainty(study: Study, courses: dict[str, Course], groups: dict[str, np.ndarray]) -> Figure:
    x, series = list(range(1, study.K + 1)), []
    for name, chosen in groups.items():
        for label, values in (
            ("entropy", courses["final"].entropy),
            ("KL from the last block", courses["final"].divergence),
        ):
            series.append(curve(f"{label}, {name}", x, [mean_estimate(values[chosen, k]) for k in range(study.K)]))
    if "base" in courses:
        base = [mean_estimate(courses["base"].entropy[:, k]) for k in range(study.K)]
        series.append(curve("entropy, base model", x, base, control=True))
    return Figure("lines", "Certainty of the answer's first token", "block", "nats", {"series": series})
