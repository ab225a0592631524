"""The counterfactual try: a partner problem with one number changed, what the decode predicts, and what came.

Knows the decoded steps of a reading and the result of `try_counterfactual`. Acts: `try_counterfactual` (block).
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from rim_probe.pictures.matches import claims
from rim_probe.pictures.parts import do, escape, plain_step
from rim_probe.pictures.surgery_words import counterfactual_verdict, named


def draw_try(reading: Mapping[str, Any], result: Mapping[str, Any] | None) -> str:
    """The buttons, and the result if there is one."""
    found, steps = claims(reading), reading["steps"] or (reading.get("chain") or {}).get("steps", [])
    tried = set(result["blocks"]) if result else set()
    row = "".join(
        f'<button type="button" aria-pressed="{"true" if block in tried else "false"}" data-link="block-{block}" '
        f"{do('try_counterfactual', block=str(block))}>Block {block}: {escape(plain_step(steps[step - 1]))}"
        "</button>"
        for block, step in found.items()
    )
    if row:
        row = f'<div class="pic-choice" role="group" aria-label="Claim to test"><span>Test a claim</span>{row}</div>'
    elif not steps:
        row = '<p class="surgery-note">This needs a question whose steps are known: choose one of the examples.</p>'
    else:
        row = '<p class="surgery-note">No block is read as a step of this problem, so there is no claim to test.</p>'
    return (
        '<section class="surgery-part"><h3>Try the counterfactual</h3><p class="surgery-note">A decoded step is a '
        "claim. To test it, the block is taken from a partner problem that differs in one number. If the claim is true "
        f"and the model computes with it, the answer must become a certain other one.</p>{row}"
        f"{_result(result) if result else ''}</section>"
    )


def _result(result: Mapping[str, Any]) -> str:
    verdict, why = counterfactual_verdict(result)
    blocks = named(result["blocks"])
    verb = "hold" if len(result["blocks"]) > 1 else "holds"
    mine, theirs = result["problem"]["question"], result["partner"]["question"]
    good = result["came"] and bool(result["control"]) and result["control"]["outcome"] != "expected"
    control = result["control"]
    facts = [
        ("Without the swap", result["own"], ""),
        ("Expected if the claim is true", result["expected"], "expected"),
        ("What came", result["said"] or "no number", "came" if result["came"] else "missed"),
    ]
    if control:
        facts.append((f"Control: {control['what']}", control["said"] or "no number", "control"))
    cells = "".join(
        f'<div class="surgery-fact {kind}"><dt>{escape(name)}</dt><dd>{escape(value)}{_sign(kind)}</dd></div>'
        for name, value, kind in facts
    )
    return (
        f'<div class="surgery-result {"good" if good else "bad"}"><p class="surgery-verdict">'
        f'<span aria-hidden="true">{"✓" if good else "✗"}</span> {escape(verdict)}</p>'
        f'<div class="surgery-pair"><div><h4>This problem</h4><p>{marked(mine, theirs)}</p>'
        f"<p>{escape(blocks.capitalize())} {verb}, it is claimed, <b>{escape(plain_step(result['claimed']))}</b></p>"
        "</div>"
        f"<div><h4>Its partner: {escape(result['change'])}</h4><p>{marked(theirs, mine)}</p>"
        f"<p>There {escape(blocks)} {verb} <b>{escape(plain_step(result['brought']))}</b></p></div></div>"
        f'<dl class="surgery-facts">{cells}</dl><p class="surgery-note">{escape(why)}</p></div>'
    )


def _sign(kind: str) -> str:
    signs = {"came": ("✓", "as predicted"), "missed": ("✗", "not as predicted")}
    return f' <small><span aria-hidden="true">{signs[kind][0]}</span> {signs[kind][1]}</small>' if kind in signs else ""


def marked(text: str, other: str) -> str:
    """`text` as HTML, with the words that `other` does not have in the same place marked."""
    words, others = text.split(), other.split()
    blocks = difflib.SequenceMatcher(None, others, words, autojunk=False).get_opcodes()
    return " ".join(
        escape(" ".join(words[start:end])) if kind == "equal" else f"<mark>{escape(' '.join(words[start:end]))}</mark>"
        for kind, _, _, start, end in blocks
        if end > start
    )
