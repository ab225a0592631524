"""One trial of a decode: the step that blocks are said to hold is exchanged; does the answer become what follows?

A decode is a claim; an answer that changes as the claim predicts is evidence. Method (interchange intervention for one
question; `interchange` is the same over many, with intervals):
1. A partner question differs in one number, which enters step t (`equations.counterfactual`). The problem's own
   equations say what the answer becomes if step t alone has the partner's result. They are the gold steps where these
   are known, else those that chain of thought wrote; the result says which.
2. The slots of the blocks said to hold step t are taken from the partner's run (`surgery`, with the swap of the
   interchange test), at all layers 1..L by default.
3. Only questions that the model answers right, both of them, can show anything: with other answers it does not follow
   the equations that the prediction is made of.
4. Control: as many wrong blocks (fewer where there are not so many) swapped the same way: blocks said to hold a step
   before the change, or none that it changes. Later steps follow from step t, so that their blocks may bring the
   predicted answer by right. Where no other block is left, a second number is changed in a later step: from there on
   blocks bring the partner's answer, which then is not the predicted one.
5. The routes: the same swap with the question, and with the blocks, cut from the answer's view (`patching.CUTS`), each
   beside the clean run under that cut. An answer that survives without the memory has another route.

`predict` does step 1 and 3 and writes the predicted answer down; `carry_out` does the rest.

Knows one question and one swap. Knows nothing of how claims are found, and cannot show what holds in general: one trial
may come out by chance; the report's interchange test counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from rim_probe.decoding import Answer, answer
from rim_probe.equations import Partner, chain, counterfactual, question_numbers, value_bounds
from rim_probe.errors import ProblemError, QuestionError, RiMError
from rim_probe.model import RiM
from rim_probe.probing.patching import Patcher
from rim_probe.probing.surgery import named, operate
from rim_probe.problems import ANSWER_MARKER, Problem, is_correct, parse_steps

FORMAT = "rim-probe-counterfactual/1"
PARTNERS_TRIED = 6  # per step; each costs one answer of the model
LARGEST = 10**15  # numbers beyond cannot be drawn in 64 bits


def try_counterfactual(
    rim: RiM,
    problem: Problem,
    claims: Mapping[int, int] | None,
    *,
    steps: Answer | Mapping[str, Any] | None = None,
    block: int | None = None,
    seed: int = 0,
    layers: tuple[int, int] | None = None,
    num_blocks: int | None = None,
    unrelated: str | None = None,
) -> dict[str, Any]:
    """Swaps what is said to hold a step and tells whether the answer became the one that follows.

    Args: those of `predict` and `carry_out`, and what `carry_out` gives.

    Raises:
        RiMError: as `predict` and `carry_out`.
    """
    predicted = predict(rim, problem, claims, steps=steps, block=block, seed=seed, num_blocks=num_blocks)
    return carry_out(rim, predicted, seed=seed, layers=layers, num_blocks=num_blocks, unrelated=unrelated)


def predict(
    rim: RiM,
    problem: Problem,
    claims: Mapping[int, int] | None,
    *,
    steps: Answer | Mapping[str, Any] | None = None,
    block: int | None = None,
    seed: int = 0,
    num_blocks: int | None = None,
) -> dict[str, Any]:
    """The partner, the blocks to swap, and the answer that follows if they hold what they are said to hold.

    Args:
        problem: the question with its gold steps and answer, as far as they are known (no steps; "" for the answer).
        steps: what chain of thought answered, or that as a reading's `chain` (`text`, `value`); its steps are taken
            where there are no gold ones.
        claims: block -> the step (1-based) that it is decoded as, for example `{b["block"]: b["step"]}` of the nearest
            steps' `blocks`; None for block k as step k. Steps beyond the problem's last are left out.
        block: the one block to swap; by default all blocks said to hold one step, which is the first one after step 1
            that a partner is found for (its control is the cleanest), else step 1.
        seed: of partner and control.

    Returns:
        JSON-ready: `format`; `problem` and `partner` (`question`, `steps`, `answer`); `steps_from` ("gold", "chain of
        thought"): what the prediction is made of; `change` in words; `step`; `blocks` to swap; `wrong`, those of the
        control; `claimed` and `brought`, that step of the problem and of the partner; `expected`, the answer if the
        decode is true; `own`, `partner_answer`.

    Raises:
        RiMError: one sentence why there is no test: no steps are known or they are no certain chain, the model answers
            the problem wrong, no block is said to hold a step of it, no partner was found.
    """
    K = rim.layout.check_blocks(num_blocks)
    steps_from = "gold" if problem.steps else "chain of thought"
    problem = _worked(problem, steps)
    claims = _checked_claims(claims, block, len(problem.steps), K)
    own = answer(rim, problem.question, "memory", num_blocks=K, readouts="final").value
    if not is_correct(own, problem.answer):
        raise RiMError(
            f"The model answers {own or 'nothing'} here and not {problem.answer}, so it does not follow these steps "
            "and there is nothing to predict; choose a question that it answers right."
        )
    partner, swapped, wrong = _partner(rim, problem, claims, block, seed, K)
    return {
        "format": FORMAT,
        "problem": _plain(problem),
        "partner": _plain(partner.problem),
        "steps_from": steps_from,
        "change": _change(problem, partner),
        "step": partner.step,
        "blocks": swapped,
        "wrong": wrong,
        "claimed": problem.steps[partner.step - 1],
        "brought": partner.problem.steps[partner.step - 1],
        "expected": partner.predicted,
        "own": problem.answer,
        "partner_answer": partner.problem.answer,
    }


def carry_out(
    rim: RiM,
    predicted: Mapping[str, Any],
    *,
    seed: int = 0,
    layers: tuple[int, int] | None = None,
    num_blocks: int | None = None,
    unrelated: str | None = None,
) -> dict[str, Any]:
    """What came of a prediction.

    Args:
        predicted: of `predict`, for the same `rim` and `num_blocks`.
        layers: (lo, hi); None for (1, L).
        unrelated: a question for the control of `surgery.operate`.

    Returns:
        JSON-ready: `predicted` with `layers`; `said`; `outcome` ("expected", "own", "partner", "other", the first that
        fits); `came`; `surgery`, the result of `operate`; `control` with `what`, `said`, `outcome`, or None without a
        wrong block; `routes`: for each `cut` ("question", "memory") the `outcome` of the swap and of the `clean` run
        under it; `sentence`.

    Raises:
        RiMError: as `operate`.
    """
    own, K = predicted["problem"], rim.layout.check_blocks(num_blocks)
    options = {"partner": predicted["partner"]["question"], "layers": layers, "num_blocks": K, "gold": own["answer"]}
    options["seed"] = seed
    swap, wrong = (dict.fromkeys(predicted[blocks], "swap") for blocks in ("blocks", "wrong"))
    surgery = operate(rim, own["question"], swap, unrelated=unrelated, **options)
    answers = {"expected": predicted["expected"], "own": own["answer"], "partner": predicted["partner_answer"]}
    said, outcome = _outcome(surgery, answers)
    control = None
    if wrong:
        instead = operate(rim, own["question"], wrong, **options)
        control = {"what": f"{named(wrong)} taken from the partner instead"}
        control |= dict(zip(("said", "outcome"), _outcome(instead, answers), strict=True))
    result = {
        **predicted,
        "layers": surgery["layers"],
        "said": said,
        "outcome": outcome,
        "came": outcome == "expected",
        "surgery": surgery,
        "control": control,
        "routes": _routes(rim, predicted, answers, surgery["layers"], K),
    }
    return result | {"sentence": _sentence(result)}


def _routes(
    rim: RiM, predicted: Mapping[str, Any], answers: Mapping[str, str], layers: list[int], K: int
) -> list[dict[str, str]]:
    """What is said with the question, and with the memory, cut from the answer, with the swap and without."""
    targets = [rim.encoder.answer_ids(text) for text in answers.values()]
    question, donor = predicted["problem"]["question"], Patcher(rim, predicted["partner"]["question"], num_blocks=K)
    found = []
    for cut in ("question", "memory"):
        clean = Patcher(rim, question, targets, num_blocks=K, cut=[cut])
        swap = clean.edits(donor.memory, predicted["blocks"], range(layers[0], layers[1] + 1))
        both = {"outcome": clean.score([swap]).says[0], "clean": clean.says}
        told = {
            what: next((name for name, hit in zip(answers, says.tolist(), strict=True) if hit), "other")
            for what, says in both.items()
        }
        found.append({"cut": cut, **told})
    return found


def _worked(problem: Problem, told: Answer | Mapping[str, Any] | None) -> Problem:
    """The problem with the steps that a prediction can be made of, gold ones or those that chain of thought wrote."""
    if problem.steps:
        answer = problem.answer or _bare(problem.steps[-1]).rpartition("=")[2]
        problem = Problem(problem.question, problem.steps, answer)
    else:
        problem = _from_chain(problem, told)
    if reason := _unusable(problem):
        raise RiMError(f"No counterfactual can be made for this question: {reason}.")
    return problem


def _from_chain(problem: Problem, told: Answer | Mapping[str, Any] | None) -> Problem:
    start = "No counterfactual can be made: the steps of this question are not known, and chain of thought"
    if told is None:
        raise RiMError(f"{start} was not asked.")
    text, value = (told["text"], told["value"]) if isinstance(told, Mapping) else (told.text, told.value)
    try:
        steps = parse_steps(text.partition(ANSWER_MARKER.strip())[0])
    except ProblemError:
        steps = ()
    if not steps or value is None:
        raise RiMError(f"{start} wrote none that can be read.")
    if problem.answer and not is_correct(value, problem.answer):
        raise RiMError(f"{start} answers it wrong.")
    return Problem(problem.question, steps, value)


def _unusable(problem: Problem) -> str | None:
    """Why nothing certain follows from a change of this problem; None where it does."""
    steps = chain(problem)
    if steps is None:
        return "its steps are not all equations"
    if wrong := next((s for s, e in zip(problem.steps, steps.equations, strict=True) if not e.exact), None):
        return f"its step {_bare(wrong)[:60]} does not hold exactly"
    if steps.answer_step != len(steps.equations):
        return "its answer is not the result of its last step"
    if steps.ambiguous:
        return "a number in its steps could come from several places, so what follows from changing it is not certain"
    return None


def _checked_claims(claims: Mapping[int, int] | None, block: int | None, steps: int, K: int) -> dict[int, int]:
    """Block -> step, those alone that this problem has."""
    claims = {k: k for k in range(1, K + 1)} if claims is None else claims
    for number, step in claims.items():
        if not all(isinstance(x, int) and not isinstance(x, bool) and x >= 1 for x in (number, step)):
            raise RiMError("Claims name for blocks, numbered from 1, the step that each is said to hold.")
    kept = {number: claims[number] for number in sorted(claims) if number <= K and claims[number] <= steps}
    if not kept:
        raise RiMError("No block is said to hold a step of this question, so there is nothing to try.")
    if block is not None and block not in kept:
        raise RiMError(
            f"Block {str(block)[:30]} is not said to hold a step of this question; choose one of {named(list(kept))}."
        )
    return kept


# ------------------------------------------------------------------------------------------------------- the partner


def _partner(
    rim: RiM, problem: Problem, claims: Mapping[int, int], block: int | None, seed: int, K: int
) -> tuple[Partner, list[int], list[int]]:
    """A partner that the model answers right, the blocks to swap, and wrong blocks for the control."""
    steps = [claims[block]] if block is not None else sorted(set(claims.values()), key=lambda t: (t == 1, t))
    tried, uncontrolled = 0, None
    for step in steps:
        swapped = [block] if block is not None else [b for b, t in claims.items() if t == step]
        for two_numbers in (False, True):
            for partner in _candidates(problem, step, two_numbers, seed):
                end = partner.second.step if partner.second else len(problem.steps) + 1
                innocent = [b for b in range(1, K + 1) if b not in swapped and not step <= claims.get(b, 0) < end]
                if uncontrolled and not innocent:
                    break
                tried += 1
                if not _answered(rim, partner.problem, K):
                    continue
                if innocent:
                    rng = np.random.default_rng([seed, step])
                    wrong = rng.choice(innocent, min(len(swapped), len(innocent)), replace=False)
                    return partner, swapped, sorted(wrong.tolist())
                uncontrolled = partner, swapped, []
    if uncontrolled:
        return uncontrolled
    if tried:
        raise RiMError(
            f"The model answers no question right that differs from this one in a number ({tried} tried); choose "
            "another question."
        )
    where = " or ".join(map(str, sorted(steps)))
    raise RiMError(
        f"No number of this question can be changed with a certain effect on step {where} (it must stand once in the "
        "question and enter one step alone); choose another question or block."
    )


def _candidates(problem: Problem, step: int, two_numbers: bool, seed: int) -> Iterator[Partner]:
    """Different partners; numbers have no more digits than the problem's own, which the model must know."""
    least, most = value_bounds([problem])
    bounds = max(min(least, 1), -LARGEST), min(max(most, 10 ** len(str(int(most))) - 1), LARGEST)
    seen = set()
    for number in range(PARTNERS_TRIED):
        rng = np.random.default_rng([seed, step, number])
        partner = counterfactual(problem, rng, bounds, step=step, two_numbers=two_numbers)
        if partner is None:
            return
        if partner.problem.question not in seen:
            seen.add(partner.problem.question)
            yield partner


def _answered(rim: RiM, problem: Problem, K: int) -> bool:
    """Whether the model can read the problem and answers it right."""
    try:
        told = answer(rim, problem.question, "memory", num_blocks=K, readouts="final")
    except QuestionError:
        return False
    return is_correct(told.value, problem.answer)


# ------------------------------------------------------------------------------------------------------ what is told


def _outcome(surgery: Mapping[str, Any], answers: Mapping[str, str]) -> tuple[str, str]:
    """What was said, and whose answer that is."""
    after = surgery["after"]
    return after["value"] or after["text"], next(
        (name for name, text in answers.items() if is_correct(after["value"], text)), "other"
    )


def _plain(problem: Problem) -> dict[str, Any]:
    return {"question": problem.question, "steps": list(problem.steps), "answer": problem.answer}


def _bare(step: str) -> str:
    return step.removeprefix("<<").removesuffix(">>")


def _change(problem: Problem, partner: Partner) -> str:
    """ "3 → 5 in step 1", numbers as the questions write them."""
    both = zip(question_numbers(problem.question), question_numbers(partner.problem.question), strict=True)
    changed = {place: f"{old.text} → {new.text}" for place, (old, new) in enumerate(both) if old.text != new.text}
    sources = chain(problem).sources
    made = [partner.change] + ([partner.second] if partner.second else [])
    return " and ".join(f"{changed[sources[c.step - 1][c.operand].place]} in step {c.step}" for c in made)


def _sentence(result: Mapping[str, Any]) -> str:
    blocks, control = named(result["blocks"]), result["control"]
    whose = "" if result["steps_from"] == "gold" else ", a step of chain of thought"
    claim = (
        f"{blocks[0].upper()}{blocks[1:]} {'are' if len(result['blocks']) > 1 else 'is'} said to hold "
        f"{_bare(result['claimed'])}{whose}; taken from a question where this step is {_bare(result['brought'])}, "
        f"the answer should become {result['expected']}"
    )
    if result["outcome"] == "own":
        return (
            f"{claim}, but it stayed {result['own']}: nothing here shows that the model computes with what was decoded."
        )
    if result["outcome"] == "partner":
        return f"{claim}, but it became {result['said']}, the partner's own: more than this one step came along."
    if result["outcome"] == "other":
        return f"{claim}, but the model said “{result['said'][:60]}”, the answer of neither question."
    if control is None:
        return f"{claim}, and it did; there was no wrong block to compare it with."
    if control["outcome"] == "expected":
        return f"{claim}, and it did; but so it did with {control['what']}, so that this shows little."
    what = "stayed" if control["outcome"] == "own" else "became"
    return f"{claim}, and it did; with {control['what']} it {what} {control['said'][:60]}."
