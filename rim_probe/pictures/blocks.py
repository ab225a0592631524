"""Blocks: what each memory block seems to hold, beside the explicit steps of the same question.

The left column has a card per block (answer so far, nearest explicit step, own words, chance of being right), the right
one the steps that the chain of thought wrote, or the known solution where there is no chain. A line ties a block to the
step that its decode equals. Both columns have rows of equal height, so lines are placed in percent and need no script.

Acts of its buttons: `operate_here` (block) blanks a block in Surgery; `try_counterfactual` (block) tests its decode.

Knows what `probing.steps`, `words`, `correctness` and `values` say of one question. Does not know whether it is true:
a match is a match of texts, and each decode stands beside how often it was right on other problems.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rim_probe.pictures.matches import Decode, Explicit, claims, decodes, explicit_steps
from rim_probe.pictures.parts import (
    Choice,
    Picture,
    Table,
    buttons,
    do,
    escape,
    missing,
    percent,
    plain_step,
    term,
)
from rim_probe.problems import is_correct

TITLE = "Memory blocks beside explicit steps"
OWN = "own"
LOOSE_END = 26  # percent of the way to the steps, where a line without a step stops


# ----------------------------------------------------------------------------------------------------------- the view


def _indices(reading: Mapping[str, Any]) -> dict[str, str]:
    decoded = reading["probes"].get("steps", {}).get("blocks", [])
    found = sorted({one["step"] for block in decoded for one in (block, *block.get("others", ()))})
    return {OWN: "nearest step", **{str(step): f"step {step}" for step in found}} if found else {}


VIEW = (Choice("step", "Read each block for its", _indices, lambda reading: OWN),)


# ------------------------------------------------------------------------------------------------------------- drawing


def draw(reading: Mapping[str, Any], *, step: str = OWN) -> Picture:
    """The panel; `step` is one of the values of `VIEW`."""
    view = {"step": step}
    if not reading["readouts"]:
        return missing("blocks", TITLE, "This question was answered without memory blocks.", view)
    rows, read = explicit_steps(reading), decodes(reading, step)
    testable = claims(reading) if step == OWN else {}  # other readings of a block are looked at, not claimed
    cards = [
        _Card(reading, readout, read.get(readout["block"]), readout["block"] in testable)
        for readout in reading["readouts"]
    ]
    body = (
        f'<div class="blocks-board{"" if rows else " alone"}">{_heads(reading, rows)}'
        f'<ol class="blocks-cards">{"".join(card.html() for card in cards)}</ol>'
        + (_links(cards, len(rows)) + _steps(rows, cards, bool(reading.get("steps"))) if rows else "")
        + "</div>"
        + _key(cards, bool(rows))
    )
    return Picture(
        "blocks",
        TITLE,
        _lead(bool(read), bool(rows)),
        _look_for(read),
        body,
        _table(cards),
        view,
        buttons(VIEW[0], reading, view),
        _notes(reading, rows),
    )


def _lead(decoded: bool, explicit: bool) -> str:
    said = f"One card for each {term('memory block')}: what the model would answer after it"
    if not decoded:
        return said + "."
    said += f", and which {term('explicit step')} its hidden state lies nearest to."
    return said + (" A line ties the block to that step where it stands beside." if explicit else "")


def _look_for(read: Mapping[int, Decode]) -> str:
    sentence = "Do the blocks meet the steps in order, and does the answer settle when the last step is met? "
    if not read:
        return sentence + "Here only the answers can be seen."
    least, most = (round(100 * pick(one.right for one in read.values())) for pick in (min, max))
    span = f"{least} %" if least == most else f"{least} to {most} %"
    return (
        f"{sentence}A decode is a claim, not a fact: on known problems these were right {span} of the time, and a "
        "block may hold a step that the answer never uses. Surgery is the test."
    )


def _key(cards: Sequence[_Card], lines: bool) -> str:
    """What lines and short names mean, as far as they occur."""
    said = []
    if lines and any(card.decode for card in cards):
        said.append(
            "Lines: solid, the step that the block was read for; dashed, another one; ○ a step that is not there."
        )
    if any(card.decode for card in cards):
        said.append(f"Bar: {term('cosine')} of block and step, in smaller print that of the two runners-up.")
    if any(card.words is not None for card in cards):
        said.append(
            "Own words: what the model in its first stage of training, when it still spoke, says at this block."
        )
    if any(card.value for card in cards):
        said.append(
            "Linear probe: the result of that step, read by another method, which only knows values that were frequent "
            "when it was fitted."
        )
    if any(card.chance is not None for card in cards):
        said.append("Chance right: what a probe of the memory gives the answer so far; “best” is where it is highest.")
    return f'<p class="blocks-key">{" ".join(said)}</p>' if said else ""


def _notes(reading: Mapping[str, Any], rows: Sequence[Explicit]) -> list[str]:
    lacking = {
        "steps": "No step decoder of this checkpoint fits, so blocks are not compared with explicit steps.",
        "words": "Own words are missing.",
        "correctness": "The chance of being right is missing.",
    }
    spoken = any(one.get("stage1") is not None for one in reading["probes"].get("words", {}).get("blocks", ()))
    there = {name: name in reading["probes"] for name in lacking} | {"words": spoken}
    notes = [sentence for name, sentence in lacking.items() if not there[name]]
    if not rows:
        notes.append("There is no chain of thought and no known solution to compare the blocks with.")
    return notes + (list(reading.get("complaints", ())) if notes else [])


def _heads(reading: Mapping[str, Any], rows: Sequence[Explicit]) -> str:
    left = (
        '<div class="blocks-head" aria-hidden="true"><span>Block</span><span>Answer so far</span>'
        "<span>Nearest explicit step</span><span>Other signs</span></div>"
    )
    if not rows:
        return left
    chain = reading.get("chain")
    if not chain or not chain.get("steps"):
        return left + '<div class="blocks-head blocks-head-steps"><b>Known solution</b></div>'
    gold, sign = reading.get("gold"), ""
    if gold is not None and chain.get("value") is not None:
        sign = _sign(is_correct(chain["value"], gold))
    return (
        f'{left}<div class="blocks-head blocks-head-steps"><b>Chain of thought</b> '
        f"<span>answers {escape(chain.get('value') or 'nothing')} {sign}</span></div>"
    )


def _sign(right: bool) -> str:
    return f'<span class="blocks-{"right" if right else "wrong"}">{"✓ right" if right else "✗ wrong"}</span>'


class _Card:
    """One block: its figures, its HTML and its row of the table."""

    def __init__(
        self, reading: Mapping[str, Any], readout: Mapping[str, Any], decode: Decode | None, testable: bool = False
    ):
        self.block, self.readout, self.decode, self.testable = readout["block"], readout, decode, testable
        self.known = reading["probes"].get("steps", {}).get("bank")
        self.words = _of(reading, "words", self.block).get("stage1")
        judged = _of(reading, "correctness", self.block)
        self.chance = judged.get("chance_right")
        self.chosen = reading["probes"].get("correctness", {}).get("chosen_block") == self.block
        results = {
            value["step"]: value
            for value in _of(reading, "values", self.block).get("values", ())
            if value["quantity"] == "result"
        }
        # The result of the last step is the answer, which has no index.
        self.value = results.get(decode.index, results.get(None)) if decode else None

    def html(self) -> str:
        return (
            f'<li><article class="blocks-card" data-link="block-{self.block}" tabindex="0" '
            f'data-tip="{escape(self.tip())}" aria-label="Memory block {self.block}">'
            f'<h3><span class="blocks-label">Block</span> {self.block}</h3>'
            f'{self._answer()}{self._nearest()}{self._signs()}<div class="blocks-acts">'
            f'<button type="button" {do("operate_here", block=str(self.block))}>Blank it'
            f'<span class="blocks-label"> (block {self.block})</span></button>'
            + (
                f'<button type="button" {do("try_counterfactual", block=str(self.block))}>Test this claim'
                f'<span class="blocks-label"> (block {self.block})</span></button>'
                if self.testable
                else ""
            )
            + "</div></article></li>"
        )

    def tip(self) -> str:
        said = [f"Block {self.block}: “{self.readout['text'].strip()}” at {percent(self.readout['probability'])}"]
        if self.decode:
            said += [f"{text} (cosine {cosine:.2f})" for text, cosine in self.decode.nearest]
            said.append(f"read for step {self.decode.index}, {self._accuracy()}")
        if self.chance is not None:
            said.append(f"a probe of the memory gives this answer a chance of {percent(self.chance)} to be right")
        if self.value:
            said.append(
                f"a linear probe reads {self.value['value']} as the result of step {self.decode.index} "
                f"({percent(self.value['confidence'])} sure, on known problems {percent(self.value['accuracy'])} right)"
            )
        return " · ".join(said)

    def _accuracy(self) -> str:
        """How often the decode was right elsewhere, and among which problems."""
        one = self.decode
        right = f"right for {percent(one.accuracy)} of known problems"
        if not self._partial:
            return right
        known = "known steps" if self.known is None else f"{self.known:,} known steps"
        return f"{right} whose step is among the {known} ({percent(one.right)} of all)"

    @property
    def _partial(self) -> bool:
        """Is it known to be unable to name the step of some problems?"""
        return self.decode.coverage is not None and percent(self.decode.coverage) != percent(1.0)

    def _answer(self) -> str:
        value, right = self.readout["value"], self.readout.get("right")
        shown = value if value is not None else "–"
        long = " long" if len(str(shown)) > 5 else ""
        mark = "" if right is None else _sign(right)
        return (
            f'<div class="blocks-answer" style="--p:{self.readout["probability"]:.3f}">'
            f'<span class="blocks-label">Answer so far</span><b class="blocks-value{long}">{escape(shown)}</b>'
            f"<small>{percent(self.readout['probability'])} sure</small>{mark}</div>"
        )

    def _nearest(self) -> str:
        if not self.decode:
            return '<div class="blocks-nearest"><small>not decoded</small></div>'
        (first, cosine), *others = self.decode.nearest
        kind, sentence = self.decode.mark
        apart = f", {percent(self.decode.accuracy)} where it knows the step" if self._partial else ""
        rest = "".join(f"<li>{escape(text)} <i>{cos:.2f}</i></li>" for text, cos in others)
        return (
            '<div class="blocks-nearest"><span class="blocks-label">Nearest explicit step</span>'
            f'<p><b class="blocks-step">{escape(first)}</b>{_bar(cosine)}'
            f'<span class="blocks-number">{cosine:.2f}</span></p>'
            f'<p class="blocks-mark"><b class="{kind}">{escape(sentence)}</b>'
            f"<small>on known problems {percent(self.decode.right)} right{apart}</small></p>"
            f'<ul class="blocks-others" aria-label="Runners-up">{rest}</ul></div>'
        )

    def _signs(self) -> str:
        rows = []
        if self.words is not None:
            rows.append(("own words", f"<b>{escape(plain_step(self.words))}</b>"))
        if self.value:
            rows.append(
                ("linear probe", f"<b>{escape(self.value['value'])}</b><i>{percent(self.value['confidence'])} sure</i>")
            )
        if self.chance is not None:
            chosen = '<i class="blocks-best">best</i>' if self.chosen else ""
            rows.append(("chance right", f"{_bar(self.chance)}{percent(self.chance)}{chosen}"))
        body = "".join(f"<dt>{name}</dt><dd>{said}</dd>" for name, said in rows)
        return f'<dl class="blocks-signs">{body}</dl>' if rows else ""

    def row(self) -> list[Any]:
        told, one = self.readout, self.decode
        near = [part for text, cosine in one.nearest for part in (text, f"{cosine:.3f}")] if one else []
        return [
            self.block,
            told["value"],
            f"{told['probability']:.3f}",
            {True: "right", False: "wrong", None: None}[told.get("right")],
            one and one.index,
            *near,
            *[None] * (6 - len(near)),
            one and one.mark[1],
            one and f"{one.right:.3f}",
            None if self.words is None else plain_step(self.words),
            None if self.chance is None else f"{self.chance:.3f}",
            self.value and self.value["value"],
            f"{one.accuracy:.3f}" if one and one.coverage is not None else None,
        ]


_HEADER = (
    "block",
    "answer so far",
    "probability",
    "right or wrong",
    "read for step",
    "nearest step",
    "cosine",
    "second",
    "cosine of the second",
    "third",
    "cosine of the third",
    "what it equals",
    "decode right on known problems",
    "own words",
    "chance that the answer is right",
    "result by a linear probe",
    "decode right where it knows the step",
)


def _table(cards: Sequence[_Card]) -> Table:
    return Table(_HEADER, [card.row()[: len(_HEADER)] for card in cards])


def _of(reading: Mapping[str, Any], probe: str, block: int) -> Mapping[str, Any]:
    """What a probe says of a block, empty where it says nothing."""
    told = reading["probes"].get(probe, {}).get("blocks", ())
    return next((one for one in told if one["block"] == block), {})


def _bar(share: float) -> str:
    return (
        f'<span class="blocks-bar" aria-hidden="true"><i style="width:{100 * min(max(share, 0), 1):.0f}%"></i></span>'
    )


def _steps(rows: Sequence[Explicit], cards: Sequence[_Card], known: bool) -> str:
    """The right column."""
    items, decoded = [], any(card.decode for card in cards)
    for i, row in enumerate(rows):
        met = [card.block for card in cards if card.decode and card.decode.row == i]
        if not row.written:
            place = f"Step {row.gold}" + (" · not written by CoT" if any(other.written for other in rows) else "")
        else:
            place = f"Step {i + 1}"
            if known:
                where = "✓ in the solution" if row.gold == i + 1 else f"≈ step {row.gold} of the solution"
                place += " · " + (where if row.gold else "✗ not in the solution")
        said = f"met by block{'s' * (len(met) > 1)} {_listed(met)}" if met else "met by no block" if decoded else ""
        links = " ".join([f"step-{i + 1}", *(f"block-{block}" for block in met)])
        looks = ("" if row.written else " unwritten") + (" unmet" if decoded and not met else "")
        items.append(
            f'<li><div class="blocks-explicit{looks}" tabindex="0" data-link="{links}" '
            f'data-tip="{escape(f"{row.text}: {said}" if said else row.text)}">'
            f"<small>{escape(place)}</small><b>{escape(row.text)}</b><small>{escape(said)}</small></div></li>"
        )
    return f'<ol class="blocks-steps" aria-label="Explicit steps">{"".join(items)}</ol>'


def _listed(blocks: Sequence[int]) -> str:
    """ "1, 4–8": runs of three and more are drawn together."""
    runs: list[list[int]] = []
    for block in blocks:
        if runs and block == runs[-1][-1] + 1:
            runs[-1].append(block)
        else:
            runs.append([block])
    return ", ".join(f"{run[0]}–{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)


def _links(cards: Sequence[_Card], steps: int) -> str:
    """The lines between the columns; both have rows of equal height, so places are shares of the height."""
    lines, ends = [], []
    for i, card in enumerate(cards):
        if not card.decode:
            continue
        y, kind = 100 * (i + 0.5) / len(cards), card.decode.mark[0]
        width = 1 + 3 * min(max(card.decode.nearest[0][1], 0), 1)
        links = f'data-link="block-{card.block}"'
        if card.decode.row is None:
            lines.append(f'<path class="{kind} loose" {links} d="M0 {y:.2f}H{LOOSE_END}" style="--width:{width:.1f}"/>')
            ends.append(f'<circle class="{kind}" {links} cx="{LOOSE_END}%" cy="{y:.2f}%" r="4.5"/>')
            continue
        mates = [k for k, other in enumerate(cards) if other.decode and other.decode.row == card.decode.row]
        # Lines that meet the same step arrive side by side, so that each can be followed.
        apart = min(0.9, 5 / len(mates)) * (mates.index(i) - (len(mates) - 1) / 2)
        end = 100 * (card.decode.row + 0.5) / steps + apart
        lines.append(
            f'<path class="{kind}" {links} style="--width:{width:.1f}" '
            f'd="M0 {y:.2f}C50 {y:.2f} 50 {end:.2f} 100 {end:.2f}"/>'
        )
    return (
        '<div class="blocks-links" aria-hidden="true"><svg viewBox="0 0 100 100" preserveAspectRatio="none">'
        f"{''.join(lines)}</svg><svg>{''.join(ends)}</svg></div>"
    )
