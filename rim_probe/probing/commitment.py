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
from rim_probe.probing.results import Report, Result, mean_estimate, proportion_estimate
from rim_probe.problems import ANSWER_MARKER, STEP_SEPARATOR, is_correct

if TYPE_CHECKING:
    from rim_probe.probing.study import Observation, Study

MOST_LOGITS = 2**26  # numbers in one batch's logits: 256 MB
MOST_ROWS = 64
FEWEST_PROBLEMS = 30
MEMORY, CHAIN = "memory", "chain of thought"
P_FINAL, P_GOLD = "probability of the final answer", "probability of the gold answer"
ENTROPY = "entropy of the first token, nats"
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


# ------------------------------------------------------------------------------------------------------------ results


def score(study: Study) -> Report:
    """The courses of split "report"; nothing is fitted or chosen.

    Raises:
        RiMError: no answer of the memory model is complete.
    """
    rim, everything, given = study.models["memory"], study.problems("report"), study.answers("memory", "report")
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
    questions, answers = [problem.question for problem in problems], [problem.answer for problem in problems]
    donors = _donors(answers, study.rng("commitment donors"))
    final = memory_course(rim, questions, [given[i].token_ids for i in kept], study.K)
    gold = memory_course(rim, questions, [gold_ids[i] for i in kept], study.K)
    controls = {"another problem's answer": memory_course(rim, questions, [gold_ids[kept[d]] for d in donors], study.K)}
    if "base" in study.models:
        own = [study.models["base"].encoder.answer_ids(text) for text in answers]
        controls["base model"] = memory_course(study.models["base"], questions, own, study.K)
    right = np.array([is_correct(given[i].value, text) for i, text in zip(kept, answers, strict=True)])
    groups = _groups(np.array([len(problem.steps) for problem in problems]), right)
    results: list[Result] = []
    for group, rows in groups.items():
        said = final.greedy[rows]
        for metric, found in (
            ("block from which all say the final answer", stable_match(said)),
            ("first block that says the final answer", first_match(said)),
        ):
            results.append(Result(metric, MEMORY, mean_estimate(found + 1), share=False, group=group))
        results += [
            *_along("says the final answer", MEMORY, said, group),
            *_along(P_FINAL, MEMORY, final.probability[rows], group),
            *_along(P_GOLD, MEMORY, gold.probability[rows], group),
            *_along(ENTROPY, MEMORY, final.entropy[rows], group, share=False),
            *_along("KL from the last block, nats", MEMORY, final.divergence[rows], group, share=False),
        ]
    for name, course in controls.items():
        results += _along(P_GOLD, name, course.probability, role="control")
    if "base model" in controls:
        results += _along(ENTROPY, "base model", controls["base model"].entropy, role="control", share=False)
    verdict = f"After block 1 memory already says its final answer for {final.greedy[:, 0].mean():.0%} of problems."
    counts = {"report": len(kept)}
    if "cot" in study.models:
        told, counts[CHAIN], early = _chains(study, kept, groups)
        results += told
        verdict += f" The chain of thought says its own before its last step for {early:.0%}." if told else ""
    settings = {"probability": "whole answer with EOS, control tokens ruled out", "chosen": "nothing"}
    return Report("commitment", results, counts, settings, verdict)


def _fits(study: Study, question: str, tokens: int) -> bool:
    rims = [study.models[role] for role in ("memory", "base") if role in study.models]
    return all(len(rim.prompt_ids(question, "memory", study.K)) + tokens <= rim.max_length for rim in rims)


def _donors(answers: Sequence[str], rng: np.random.Generator) -> list[int]:
    """For every problem another one with a different answer, at random (itself where there is none)."""
    all_answers = np.array(answers)
    others = (np.flatnonzero(all_answers != own) for own in answers)
    return [int(rng.choice(found)) if len(found) else i for i, found in enumerate(others)]


def _groups(steps: np.ndarray, right: np.ndarray) -> dict[str, np.ndarray]:
    """Rows of the problems told apart: by their number of steps, where there are enough, and by their answer."""
    found = {"all": np.ones(len(steps), dtype=bool)}
    for count in np.unique(steps[steps > 0]):
        if (steps == count).sum() >= FEWEST_PROBLEMS:
            found[f"{count} step{'s' if count > 1 else ''}"] = steps == count
    found |= {"answered right": right, "answered wrong": ~right}
    return {name: rows for name, rows in found.items() if rows.any()}


def _along(
    metric: str,
    of: str,
    values: np.ndarray,
    group: str = "all",
    role: str = "score",
    axis: str = "block",
    share: bool = True,
) -> list[Result]:
    """The mean of every column of values [n, R]: over blocks 1..R, or steps 0..R - 1."""
    mean = proportion_estimate if values.dtype == bool else mean_estimate
    return [
        Result(metric, of, mean(column), role, share, group, place={axis: place})
        for place, column in enumerate(values.T, start=int(axis == "block"))
    ]


def _chains(study: Study, kept: Sequence[int], groups: Mapping[str, np.ndarray]) -> tuple[list[Result], int, float]:
    """The results of the chain of thought on the problems `kept`, how many have one that can be followed, and the share
    of those where the final answer is said before the last step."""
    rim, given = study.models["cot"], study.answers("cot", "report")
    gold = [rim.encoder.answer_ids(problem.answer) for problem in study.problems("report")]
    told = {
        row: (i, chain)
        for row, i in enumerate(kept)
        if (chain := chain_of(rim, given[i]))
        and given[i].prompt_tokens + given[i].generated_tokens + len(gold[i]) <= rim.max_length
    }
    if not told:
        return [], 0, math.nan
    questions, steps = [given[i].question for i, _ in told.values()], [chain[0] for _, chain in told.values()]
    courses = {
        P_FINAL: chain_course(rim, questions, steps, [chain[1] for _, chain in told.values()]),
        P_GOLD: chain_course(rim, questions, steps, [gold[i] for i, _ in told.values()]),
    }
    stable = np.array([stable_match(course.greedy)[0] for course in courses[P_FINAL]])
    length = np.array([len(chain) for chain in steps])
    early, results = stable < length, []
    for group, rows in groups.items():
        own = rows[list(told)]
        if not own.any():
            continue
        metric = "own step from which it says its final answer"
        results.append(Result(metric, CHAIN, mean_estimate(stable[own]), share=False, group=group))
        metric = "says its final answer before its last step"
        results.append(Result(metric, CHAIN, proportion_estimate(early[own]), group=group))
        for metric, found in courses.items():
            # After its last step a chain stays where it is.
            held = [
                [course.probability[0, min(step, last)] for step in range(int(np.median(length[own])) + 1)]
                for course, last in zip(found, length, strict=True)
            ]
            results += _along(f"{metric}, after steps of its own", CHAIN, np.array(held)[own], group, axis="step")
    return results, len(told), float(early.mean())
