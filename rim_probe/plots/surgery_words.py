"""What an operation and a counterfactual swap came to, in plain sentences.

Knows the dictionaries of `rim_probe.probing.surgery` and `trial`. Knows no HTML.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from rim_probe.numbers import percent
from rim_probe.probing.matches import spelled

_LONGEST = 26  # characters of an answer
_DONE = {"blank": "blanking {}", "noise": "adding noise to {}", "swap": "taking {} from the second question"}


def named(blocks: Iterable[int | str]) -> str:
    """Blocks by name: "block 2", "blocks 2 and 3", "blocks 1 to 8"."""
    numbers = sorted(map(int, blocks))
    if len(numbers) > 2 and numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"blocks {numbers[0]} to {numbers[-1]}"
    *others, last = map(str, numbers)
    return f"blocks {', '.join(others)} and {last}" if others else f"block {last}"


def operation(actions: Mapping[int | str, str]) -> str:
    """Such as "blanking block 2 and taking block 5 from the second question"; empty where every block is kept."""
    parts = [
        said.format(named(block for block, done in actions.items() if done == action))
        for action, said in _DONE.items()
        if action in actions.values()
    ]
    return ", ".join(parts[:-1]) + " and " + parts[-1] if len(parts) > 1 else "".join(parts)


def shown(told: Mapping[str, Any]) -> str:
    """What an answer or a readout says: its number, or its words, cut short (a damaged model may say anything)."""
    text = " ".join(str(told.get("value") or told.get("text") or "").split()) or "no answer"
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def sentence(surgery: Mapping[str, Any]) -> str:
    """What was done, what became of the answer, and what the control did.

    Args:
        surgery: as `rim_probe.probing.surgery.operate` gives it.
    """
    before, after = surgery["before"], surgery["after"]
    was, sure = shown(before), percent(before["probability"])
    if not surgery["actions"]:
        return f"No block is touched: the answer is {was} ({sure})."
    what = operation(surgery["actions"])
    start = f"{what[:1].upper()}{what[1:]} ({layers_said(surgery['layers'])})"
    if surgery["answer_changed"]:
        left = percent(math.exp(surgery["answer_log_probability"]["after"]))
        text = (
            f"{start} changes the answer from {was} ({sure}) to {shown(after)} ({percent(after['probability'])}); the "
            f"probability of {was} becomes {left}."
        )
    else:
        chances = f"({sure} → {percent(after['probability'])})"
        others = surgery["changed_blocks"]
        text = (
            f"{start} leaves the answer at {was} {chances}, but {_readouts(others)} something else."
            if others
            else f"{start} changes nothing that is said: the answer stays {was} {chances}."
        )
    return f"{text} {_control(surgery)}".strip()


def layers_said(layers: Iterable[int]) -> str:
    """Such as "at layers 1 to 6"."""
    low, high = layers
    return f"at layer {low}" if low == high else f"at layers {low} to {high}"


def _readouts(blocks: list[int]) -> str:
    many = len(blocks) > 1
    return f"the readout{'s' if many else ''} of {named(blocks)} now say{'' if many else 's'}"


def _control(surgery: Mapping[str, Any]) -> str:
    control = surgery.get("control")
    if not control:
        return "There is no control for this operation."
    was, moved = surgery["answer_changed"], control["answer_changed"]
    came = shown({"value": control["value"] or "something that is no number"})
    text = f"The control, {control['what'].removesuffix(' instead')}, "
    text += f"changes it to {came}" if moved else "leaves the answer as it was" if was else "leaves it as it was, too"
    if surgery.get("unrelated") is None:  # the same done to other blocks
        meaning = {
            (True, False): "the answer depends on these blocks, not on any",
            (True, True): "the answer does not depend on these blocks in particular",
            (False, False): "the answer depends on neither",
            (False, True): "the answer depends on those rather than on these",
        }
    elif "swap" in surgery["actions"].values():
        same = came == shown(surgery["after"])
        meaning = {
            (True, False): "the content of the second question moved the answer",
            (True, True): "the disturbance moved the answer, not the second question"
            if same
            else "the answer depends on what these blocks hold",
            (False, False): "the answer is not made from these blocks alone",
            (False, True): "the answer depends on these blocks, but does not follow this second question",
        }
    else:
        meaning = {
            (True, False): "the damage moved the answer, not the missing content",
            (True, True): "the answer depends on what these blocks hold",
            (False, False): "the answer does not depend on what these blocks hold",
            (False, True): "wrong content moves the answer, this damage does not",
        }
    return f"{text}: {meaning[was, moved]}."


def outcome_said(result: Mapping[str, Any], outcome: str) -> str:
    """The answer that an outcome of a trial is: "expected", "own", "partner", "other"."""
    answers = {"expected": result["expected"], "own": result["own"], "partner": result.get("partner_answer", "")}
    return answers.get(outcome) or "another answer"


def counterfactual_verdict(result: Mapping[str, Any]) -> tuple[str, str]:
    """The verdict on one swap with a counterfactual partner (does the answer move as predicted?), and why.

    Args:
        result: as `rim_probe.probing.trial.try_counterfactual` gives it.
    """
    blocks, expected, own = named(result["blocks"]), result["expected"], result["own"]
    said = result["said"] or "something that is no number"
    hold = "hold" if len(result["blocks"]) > 1 else "holds"
    control = result.get("control")
    same = bool(control) and control["outcome"] == "expected"
    text = (
        f"If {blocks} {hold} {spelled(result['claimed'])}, putting in {spelled(result['brought'])} must turn the "
        f"answer from {own} into {expected}; the model said {said}."
    )
    if result.get("steps_from") == "chain of thought":
        text += " (The steps are those that chain of thought wrote.)"
    text += f" The control, {control['what'].removesuffix(' instead')}: {control['said']}." if control else ""
    if result["came"] and same:
        return "As predicted, but with the control as well: this pair shows nothing.", text
    if result["came"] and not control:
        return "As predicted, but there was no control: try another block before you believe it.", text
    if result["came"]:
        return "As predicted: in this trial the answer follows what is decoded here.", text
    if result["outcome"] == "own":
        return "The answer did not move: nothing here shows that it is made from what is decoded.", text
    if result["outcome"] == "partner":
        return "The partner's own answer came, not the predicted one: it was copied rather than computed.", text
    return "The answer moved, but not as the decode predicts.", text
