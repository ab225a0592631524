"""Surgery: an operating table of the memory blocks, the answer before and after, what matters, a claim put to the test.

Drawn from the view alone; results lie beside the reading, under `surgery` (of `operate`) and `counterfactual` (of
`try_counterfactual`), and are shown only if they belong to this question, K and view. View: `ops` such as "2b3n5s"
(block number, then b = blank, n = noise, s = taken from the second question; a block not named is kept), `layers`
("lo-hi", both written), `partner` (the second question). The page runs the operation again when one of them changes.
Acts: `set` (block, letter), `operate` (ops and layers, for a reset), `blocks` (k), `partner` (text of the field),
`operate_cell` (block, layer, action), `try_counterfactual` (block).

Knows what an operation is called and looks like. Does not know how it is done.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from rim_probe.pictures.parts import Choice, Picture, Table, do, escape, percent, term
from rim_probe.pictures.surgery_map import draw_map, rows
from rim_probe.pictures.surgery_try import draw_try
from rim_probe.pictures.surgery_words import counterfactual_sentence, operation, sentence, shown, unbroken

ACTIONS = {"": "keep", "b": "blank", "n": "noise", "s": "swap"}
MOST_BLOCKS = 16
_MOST_TEXT = 4000  # characters of a second question that an address may carry
_TIPS = {
    "": "Keep block {}: nothing is done to it.",
    "b": "Blank block {}: its states are set to zero.",
    "n": "Noise on block {}: random numbers are added, as wide as its own values.",
    "s": "Swap block {}: its states are taken from the second question.",
}


def parse(ops: str, num_blocks: int) -> dict[int, str] | None:
    """{block: letter} of "2b3n5s", in order of blocks; None where it makes no sense for K blocks."""
    if not re.fullmatch(r"([1-9]\d?[bns])*", ops):
        return None
    found = [(int(block), letter) for block, letter in re.findall(r"(\d+)([bns])", ops)]
    chosen = dict(sorted(found))
    return chosen if len(chosen) == len(found) and all(block <= num_blocks for block in chosen) else None


def write(actions: Mapping[int, str]) -> str:
    """The inverse of `parse`; a letter "" keeps the block."""
    return "".join(f"{block}{letter}" for block, letter in sorted(actions.items()) if letter)


class _Valid(dict):
    """The values of a choice that has too many to list: what passes a check is one of them."""

    def __init__(self, check: Any):
        super().__init__({"": ""})
        self.check = check

    def __contains__(self, value: object) -> bool:
        return isinstance(value, str) and self.check(value)


def _spans(reading: Mapping[str, Any]) -> dict[str, str]:
    last = reading["num_layers"]
    return {f"{low}-{high}": f"{low} to {high}" for low in range(last + 1) for high in range(low, last + 1)}


def _whole(reading: Mapping[str, Any]) -> str:
    return f"{min(1, reading['num_layers'])}-{reading['num_layers']}"


VIEW = (
    Choice(
        "ops",
        "Operations",
        lambda reading: _Valid(lambda text: parse(text, reading["num_blocks"]) is not None),
        lambda reading: "",
    ),
    Choice("layers", "Layers", _spans, _whole),
    Choice(
        "partner",
        "Second question",
        lambda reading: _Valid(lambda text: len(text) <= _MOST_TEXT),
        lambda reading: "",
    ),
)


def draw(reading: Mapping[str, Any], ops: str = "", layers: str = "", partner: str = "") -> Picture:
    """The panel.

    Args:
        reading: the dictionary of a `Reading`, with `surgery` and `counterfactual` beside it where they were made.
        ops, layers, partner: a valid view (`rim_probe.pictures.draw` sees to it).
    """
    layers = layers or _whole(reading)
    actions = parse(ops, reading["num_blocks"]) or {}
    partner = partner or _stored_partner(reading)
    done = _belonging(reading, actions, layers, partner)
    tried = reading.get("counterfactual")
    if tried and not _same_question(tried["surgery"], reading):
        tried = None
    importance = reading["probes"].get("importance")
    body = (
        (draw_try(reading, tried) if tried else "")  # what was just asked for comes first
        + _outcome(reading, actions, partner, done)
        + _operating_table(reading, actions, done)
        + _second_question(actions, partner)
        + (draw_map(importance) if importance else "")
        + ("" if tried else draw_try(reading, tried))
    )
    return Picture(
        "surgery",
        "Surgery",
        f"Take {term('memory block', 'memory blocks')} away, disturb them, or put in those of another question, and "
        f"see what becomes of the answer. This is {term('activation patching')} by hand.",
        f"An answer that changes needs the block; the {term('control')} shows whether any other content would have "
        "done the same. An answer that stays does not show that the block is empty: another block, or the question's "
        "own words, which every block can read, may stand in for it. A blanked block keeps its place, and the token "
        "where the answer is read is never touched; with K = 0 that token is gone, too, and the model answers from a "
        "place where it never learnt to.",
        body,
        _table(reading, done, importance, tried),
        {"ops": write(actions), "layers": layers, "partner": partner},
        _controls(reading, actions, layers),
        [] if importance else ["What matters was not measured for this reading."],
    )


# ------------------------------------------------------------------------------------------------- what belongs here


def _same_question(surgery: Mapping[str, Any], reading: Mapping[str, Any]) -> bool:
    return surgery["question"] == reading["question"] and surgery["num_blocks"] == reading["num_blocks"]


def _stored_partner(reading: Mapping[str, Any]) -> str:
    surgery = reading.get("surgery")
    return (surgery["partner"] or "") if surgery and _same_question(surgery, reading) else ""


def _belonging(
    reading: Mapping[str, Any], actions: Mapping[int, str], layers: str, partner: str
) -> Mapping[str, Any] | None:
    """The stored result, if it is that of this view."""
    surgery = reading.get("surgery")
    if not actions or not surgery or not _same_question(surgery, reading):
        return None
    wanted = {str(block): ACTIONS[letter] for block, letter in actions.items()}
    same = surgery["actions"] == wanted and "-".join(map(str, surgery["layers"])) == layers
    return surgery if same and ("s" not in actions.values() or surgery["partner"] == partner) else None


# ----------------------------------------------------------------------------------------------------------- controls


def _controls(reading: Mapping[str, Any], actions: Mapping[int, str], layers: str) -> str:
    K, last = reading["num_blocks"], reading["num_layers"]
    low, high = map(int, layers.split("-"))

    def step(sign: str, k: int, name: str) -> str:
        off = "" if 0 <= k <= MOST_BLOCKS else " disabled"
        return f'<button type="button" aria-label="{name}"{off} {do("blocks", k=str(k))}>{sign}</button>'

    def select(label: str, chosen: int, values: Mapping[int, str]) -> str:
        options = "".join(
            f'<option value="{span}"{" selected" if layer == chosen else ""}>{layer}</option>'
            for layer, span in values.items()
        )
        return f'<select data-view-key="layers" aria-label="{label}">{options}</select>'

    spans = select("First layer operated on", low, {layer: f"{layer}-{max(layer, high)}" for layer in range(last + 1)})
    spans += "<span>to</span>"
    spans += select("Last layer operated on", high, {layer: f"{min(low, layer)}-{layer}" for layer in range(last + 1)})
    untouched = not actions and layers == _whole(reading)
    return (
        '<div class="pic-choice" role="group" aria-label="Number of memory blocks K"><span>Memory blocks K</span>'
        f"{step('−', K - 1, 'One block fewer')}<output>{K}</output>{step('+', K + 1, 'One block more')}</div>"
        f'<div class="pic-choice" role="group" aria-label="Layers operated on"><span>Layers</span>{spans}</div>'
        '<div class="pic-choice"><button type="button"'
        f"{' disabled' if untouched else ''} {do('operate', ops='', layers=_whole(reading))}>Reset</button></div>"
    )


# ------------------------------------------------------------------------------------------------------------ outcome


def _outcome(
    reading: Mapping[str, Any], actions: Mapping[int, str], partner: str, done: Mapping[str, Any] | None
) -> str:
    before = done["before"] if done else reading["answer"]
    if done:
        said = sentence(done)
    elif not actions:
        said = "Nothing is changed yet. Press blank, noise or swap on a block." if reading["num_blocks"] else ""
    elif "s" in actions.values() and not partner:
        said = "Type a second question below: the swapped blocks are taken from it."
    else:
        what = operation({block: ACTIONS[letter] for block, letter in actions.items()})
        said = f"{what[:1].upper()}{what[1:]}: the result is not here yet."
    was = shown(before)
    cards = [_card("Before", before, "", "")]
    if done:
        logs, control = done["answer_log_probability"], done["control"]
        note = f"Probability of {was}, the answer before: {_chance(logs['after'])}" if done["answer_changed"] else ""
        sign = ("≠", "changed") if done["answer_changed"] else ("=", "unchanged")
        cards.append(_card("After", done["after"], note, "changed" if done["answer_changed"] else "same", sign))
        if control:
            told = {"value": control["value"] or "no number", "probability": None}
            sign = ("≠", "changed") if control["answer_changed"] else ("=", "unchanged")
            what = f"{control['what'][:1].upper()}{control['what'][1:]}."
            note = f"{what} Probability of {was}: {_chance(control['answer_log_probability'])}"
            cards.append(_card("Control", told, note, "control", sign))
        else:
            cards.append(_card("Control", None, "There is none for this operation.", "control"))
    else:
        cards.append(_card("After", None, "No block is touched." if not actions else "Waiting for the operation.", ""))
    return (
        f'<p class="surgery-sentence" aria-live="polite">{escape(unbroken(said))}</p>'
        f'<div class="surgery-cards">{"".join(cards)}</div>'
    )


def _chance(log_probability: float) -> str:
    return percent(math.exp(min(log_probability, 0.0)))


def _card(name: str, told: Mapping[str, Any] | None, note: str, kind: str, sign: tuple[str, str] | None = None) -> str:
    value = shown(told) if told else "–"
    length = " long" if len(value) > 6 else ""
    right = told.get("right") if told else None
    marks = "" if right is None else _right(right)
    if sign:
        marks += f'<span class="surgery-sign"><span aria-hidden="true">{sign[0]}</span> {sign[1]}</span>'
    chance = told.get("probability") if told else None
    bar = ""
    if chance is not None:
        bar = (
            f'<div class="surgery-sure"><i style="--p:{chance:.3f}" aria-hidden="true"></i>'
            f"<span>{percent(chance)} sure</span></div>"
        )
    return (
        f'<div class="surgery-card {kind}{"" if told else " pending"}"><h3>{name}</h3>'
        f'<p class="surgery-big{length}">{escape(value)}{marks}</p>{bar}'
        + (f'<p class="surgery-note">{escape(unbroken(note))}</p>' if note else "")
        + "</div>"
    )


def _right(right: bool) -> str:
    sign, word = ("✓", "right") if right else ("✗", "wrong")
    return f'<span class="surgery-{word}"><span aria-hidden="true">{sign}</span> {word}</span>'


# ---------------------------------------------------------------------------------------------------- operating table


def _operating_table(reading: Mapping[str, Any], actions: Mapping[int, str], done: Mapping[str, Any] | None) -> str:
    K = reading["num_blocks"]
    if not K:
        return '<p class="surgery-note">Without memory blocks there is nothing to operate on; press + above.</p>'
    before = {one["block"]: one for one in (done["before"] if done else reading)["readouts"]}
    after = {one["block"]: one for one in done["after"]["readouts"]} if done else before
    changed = set(done["changed_blocks"]) if done else set()
    columns = "".join(
        _column(k, actions, before[k], after[k] if done or not actions else None, k in changed) for k in range(1, K + 1)
    )
    across = {limit: math.ceil(K / math.ceil(K / limit)) for limit in (4, 8, 16)}
    style = ";".join(f"--across-{limit}:{count}" for limit, count in across.items())
    said = ""
    if done:
        many = len(changed)
        said = f" {many} of {K} readouts {'says' if many == 1 else 'say'} something else (marked ≠)."
    return (
        f'<section class="surgery-part"><h3>The operating table</h3><p class="surgery-note">Each block with its '
        f"{term('readout')} before, what is done to it, and its readout after.{said}</p>"
        f'<div class="surgery-table" style="{style}">{columns}</div></section>'
    )


def _column(
    block: int,
    actions: Mapping[int, str],
    before: Mapping[str, Any],
    after: Mapping[str, Any] | None,
    changed: bool,
) -> str:
    chosen = actions.get(block, "")
    switch = "".join(
        f'<button type="button" aria-pressed="{"true" if letter == chosen else "false"}" '
        f'aria-label="{name} block {block}" data-tip="{escape(_TIPS[letter].format(block))}" '
        f"{do('set', block=str(block), letter=letter)}>{name}</button>"
        for letter, name in ACTIONS.items()
    )
    return (
        f'<div class="surgery-block{" operated" if chosen else ""}" data-link="block-{block}">'
        f'<div class="surgery-k">block {block}</div>{_readout("before", block, before, "")}'
        f'<div class="surgery-switch" role="group" aria-label="Block {block}">{switch}</div>'
        f"{_readout('after', block, after, 'changed' if changed else 'same' if after else 'pending')}</div>"
    )


def _readout(when: str, block: int, told: Mapping[str, Any] | None, kind: str) -> str:
    if told is None:
        return f'<div class="surgery-read pending"><small>{when}</small><b>–</b><small>&nbsp;</small></div>'
    value = shown(told)
    tip = f"Readout of block {block} {when}: {str(told['text']).strip() or 'nothing'} ({percent(told['probability'])})"
    if kind == "changed":
        tip += ", changed"
    size = " long" if len(value) > 4 else ""
    sign = '<span class="surgery-sign" role="img" aria-label="changed">≠</span>' if kind == "changed" else ""
    return (
        f'<div class="surgery-read {kind}" style="--p:{told["probability"]:.3f}" data-tip="{escape(tip)}" tabindex="0">'
        f'<small>{when}</small><b class="{size.strip()}">{escape(value)}</b>'
        f"<small>{percent(told['probability'])}{sign}</small></div>"
    )


def _second_question(actions: Mapping[int, str], partner: str) -> str:
    swaps = "s" in actions.values()
    return (
        f'<label class="surgery-partner{" wanted" if swaps and not partner else ""}"><span>Second question, for '
        "<b>swap</b></span>"
        f'<textarea data-do-input="partner" rows="2" maxlength="{_MOST_TEXT}" placeholder="Another problem; swapped '
        f'blocks are taken from it">{escape(partner)}</textarea></label>'
    )


# -------------------------------------------------------------------------------------------------------------- table


def _table(
    reading: Mapping[str, Any],
    done: Mapping[str, Any] | None,
    importance: Mapping[str, Any] | None,
    tried: Mapping[str, Any] | None,
) -> Table:
    found: list[list[Any]] = []
    told = done or {"before": {**reading["answer"], "readouts": reading["readouts"]}}
    for when in ("before", "after"):
        if when in told:
            found += [
                [f"readout {when}", one["block"], None, one["value"] or one["text"], round(one["probability"], 4)]
                for one in told[when]["readouts"]
            ]
    if done:
        found += [
            ["operation", block, "-".join(map(str, done["layers"])), action, None]
            for block, action in done["actions"].items()
        ]
        if done["control"]:
            chance = round(math.exp(done["answer_log_probability"]["after"]), 4)
            found.append(["probability of the answer before, after", None, None, shown(done["before"]), chance])
            chance = round(math.exp(done["control"]["answer_log_probability"]), 4)
            found.append([f"control: {done['control']['what']}", None, None, done["control"]["value"], None])
            found.append(["probability of the answer before, control", None, None, shown(done["before"]), chance])
    if tried:
        found.append(["counterfactual: expected", None, None, tried["expected"], None])
        found.append(["counterfactual: came", None, None, tried["said"], None])
        if tried["control"]:
            found.append(
                [f"counterfactual control: {tried['control']['what']}", None, None, tried["control"]["said"], None]
            )
    if importance:
        found += [
            ["removal, change of log probability", block, layer, "same answer" if says else "another answer", change]
            for layer, block, change, says in rows(importance)
        ]
    return Table(["what", "block", "layer", "says", "number"], found)


__all__ = ["ACTIONS", "VIEW", "counterfactual_sentence", "draw", "parse", "sentence", "write"]
