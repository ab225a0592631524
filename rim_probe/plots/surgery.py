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

import difflib
import math
import re
from collections.abc import Mapping
from typing import Any

from markupsafe import Markup, escape

from rim_probe.numbers import percent, signed
from rim_probe.plots.frame import Choice, Panel, Table
from rim_probe.plots.surgery_words import counterfactual_verdict, named, operation, outcome_said, sentence, shown
from rim_probe.probing.matches import claims, plain_step, spelled

ACTIONS = {"": "keep", "b": "blank", "n": "noise", "s": "swap"}
MOST_BLOCKS = 16
FULL = 1.0
"""Nats at which a cell of the map has its full colour, if no cell reaches further: a weak map must not look strong."""
_MOST_TEXT = 4000  # characters of a second question that an address may carry


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


def _any_ops(reading: Mapping[str, Any]) -> _Valid:
    return _Valid(lambda text: parse(text, reading["num_blocks"]) is not None)


def _any_text(reading: Mapping[str, Any]) -> _Valid:
    return _Valid(lambda text: len(text) <= _MOST_TEXT)


VIEW = (
    Choice("ops", "Operations", _any_ops, lambda reading: ""),
    Choice("layers", "Layers", _spans, _whole),
    Choice("partner", "Second question", _any_text, lambda reading: ""),
)


def draw(reading: Mapping[str, Any], ops: str = "", layers: str = "", partner: str = "") -> Panel:
    """The panel.

    Args:
        reading: the dictionary of a `Reading`, with `surgery` and `counterfactual` beside it where they were made.
        ops, layers, partner: a valid view (`rim_probe.plots.draw` sees to it).
    """
    layers, K = layers or _whole(reading), reading["num_blocks"]
    low, high = map(int, layers.split("-"))
    actions = parse(ops, K) or {}
    stored, tried = (_of_this(reading, reading.get(key)) for key in ("surgery", "counterfactual"))
    predicted = tried or reading.get("predicted")
    partner = partner or (stored["partner"] or "" if stored else "")
    done = stored if stored and _is_of(stored, actions, layers, partner) else None
    before = {one["block"]: one for one in (done["before"] if done else reading)["readouts"]}
    after = {one["block"]: one for one in done["after"]["readouts"]} if done else before
    waiting = bool(actions) and not done
    importance = reading["probes"].get("importance")
    data = {
        "K": K,
        "low": low,
        "high": high,
        "last": reading["num_layers"],
        "whole": _whole(reading),
        "most_blocks": MOST_BLOCKS,
        "untouched": not actions and layers == _whole(reading),
        "actions": actions,
        "names": ACTIONS,
        "said": _said(K, actions, partner, done),
        "cards": _cards(reading, actions, done),
        "across": {limit: math.ceil(K / math.ceil(K / limit)) for limit in (4, 8, 16)} if K else {},
        "blocks": [(k, before[k], None if waiting else after[k]) for k in range(1, K + 1)],
        "changed": set(done["changed_blocks"]) if done else set(),
        "done": done,
        "shown": shown,
        "partner": partner,
        "most_text": _MOST_TEXT,
        "map": _map(importance) if importance and rows(importance) else None,
        "claims": _claims(reading),
        "tested": set(predicted["blocks"]) if predicted else set(),
        "trial": _prediction(predicted) if predicted else None,
        "sides": _sides(tried) if tried else [],
    }
    notes = [] if importance else ["What matters was not measured for this reading."]
    view = {"ops": write(actions), "layers": layers, "partner": partner}
    return Panel("surgery", "Surgery", data, _table(reading, done, importance, tried), view, notes=notes)


def _of_this(reading: Mapping[str, Any], result: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """A stored result, if it is of this question and as many blocks."""
    about = result and result.get("surgery", result)
    same = about and about["question"] == reading["question"] and about["num_blocks"] == reading["num_blocks"]
    return result if same else None


def _is_of(stored: Mapping[str, Any], actions: Mapping[int, str], layers: str, partner: str) -> bool:
    """Whether a stored operation is that of this view."""
    wanted = {str(block): ACTIONS[letter] for block, letter in actions.items()}
    same = bool(actions) and stored["actions"] == wanted and "-".join(map(str, stored["layers"])) == layers
    return same and ("s" not in actions.values() or stored["partner"] == partner)


def _said(K: int, actions: Mapping[int, str], partner: str, done: Mapping[str, Any] | None) -> str:
    if done:
        return sentence(done)
    if not actions:
        return "Nothing is changed yet. Press blank, noise or swap on a block." if K else ""
    if "s" in actions.values() and not partner:
        return "Type a second question below: the swapped blocks are taken from it."
    what = operation({block: ACTIONS[letter] for block, letter in actions.items()})
    return f"{what[:1].upper()}{what[1:]}: the result is not here yet."


def _cards(
    reading: Mapping[str, Any], actions: Mapping[int, str], done: Mapping[str, Any] | None
) -> list[dict[str, Any]]:
    """The answers before, after and with the control."""
    before = done["before"] if done else reading["answer"]
    cards = [{"name": "Before", "told": before, "note": "", "kind": "", "changed": None}]
    if not done:
        note = "Waiting for the operation." if actions else "No block is touched."
        return [*cards, {"name": "After", "told": None, "note": note, "kind": "", "changed": None}]
    changed, was = done["answer_changed"], shown(before)
    note = f"Probability of {was}, the answer before: {_chance(done['answer_log_probability']['after'])}"
    kind = "changed" if changed else "same"
    cards.append(
        {"name": "After", "told": done["after"], "note": note if changed else "", "kind": kind, "changed": changed}
    )
    if control := done["control"]:
        note = f"{control['what'][:1].upper()}{control['what'][1:]}. Probability of {was}: "
        note += _chance(control["answer_log_probability"])
        told = {"value": control["value"] or "no number"}
        changed = control["answer_changed"]
        cards.append({"name": "Control", "told": told, "note": note, "kind": "control", "changed": changed})
    else:
        note = "There is none for this operation."
        cards.append({"name": "Control", "told": None, "note": note, "kind": "control", "changed": None})
    return cards


def _chance(log_probability: float) -> str:
    return percent(math.exp(min(log_probability, 0.0)))


# ------------------------------------------------------------------------------------------------------ what matters


def rows(importance: Mapping[str, Any]) -> list[list[Any]]:
    """[layer, block, change in nats, is the answer still said] of every cell."""
    return [
        [layer, block, importance["change"][i][j], importance["says"][i][j]]
        for i, layer in enumerate(importance["layers"])
        for j, block in enumerate(importance["blocks"])
    ]


def _map(importance: Mapping[str, Any]) -> dict[str, Any]:
    """How far the answer's probability falls when one block is removed at one layer, the first layer on top."""
    cells, clean = rows(importance), math.exp(importance["log_probability"])
    answer = str(importance["answer"]).strip() or "an empty answer"
    most = max([FULL, *(abs(cell[2]) for cell in cells)])

    def told(change: float) -> str:
        now = percent(min(clean * math.exp(change), 1.0))
        return f"{answer} goes from {percent(clean)} to {now} ({signed(change)} nats)"

    flips, worst = sum(not cell[3] for cell in cells), min(cells, key=lambda cell: cell[2])
    text = f"changes the answer in {flips} of {len(cells)} cells" if flips else "changes no answer"
    drawn = []
    for layer, block, change, says in cells:
        tip = f"Slots of block {block} removed at layer {layer}: {told(change)}"
        kind = ("less" if change < 0 else "more") + ("" if says else " flips")
        act = {"act": "operate_cell", "block": str(block), "layer": str(layer), "action": "blank"}
        cell = {"kind": kind, "strength": round(100 * min(abs(change) / most, 1)), "text": signed(change), "act": act}
        drawn.append(cell | {"tip": tip + ("." if says else "; the answer becomes another one."), "says": says})
    across = len(importance["blocks"])
    return {
        "answer": answer,
        "blocks": importance["blocks"],
        "lines": [(n, drawn[i * across : (i + 1) * across]) for i, n in enumerate(importance["layers"])],
        "most": f"{most:.1f}",
        "text": f"Removing one block's slots at one layer {text}. The largest effect: block {worst[1]} at layer "
        f"{worst[0]}, {told(worst[2])}.",
    }


# ---------------------------------------------------------------------------------------------------- counterfactual


def _claims(reading: Mapping[str, Any]) -> list[tuple[int, str]] | None:
    """(block, step) of each claim that can be tested; None where no step is known."""
    steps = reading["steps"] or (reading.get("chain") or {}).get("steps", [])
    return [(block, plain_step(steps[step - 1])) for block, step in claims(reading).items()] if steps else None


SOURCES = {
    "gold": "It was computed from the known steps of this question before the model was asked",
    "chain of thought": "It was computed from the steps that chain of thought wrote, before the model was asked",
}


def _prediction(predicted: Mapping[str, Any]) -> dict[str, Any]:
    """The partner problem with one number changed, and what the decode predicts."""
    mine, theirs = predicted["problem"]["question"], predicted["partner"]["question"]
    return {
        "blocks": named(predicted["blocks"]),
        "verb": "hold" if len(predicted["blocks"]) > 1 else "holds",
        "mine": marked(mine, theirs),
        "theirs": marked(theirs, mine),
        "claimed": spelled(predicted["claimed"]),
        "brought": spelled(predicted["brought"]),
        "change": predicted["change"],
        "own": predicted["own"],
        "expected": predicted["expected"],
        "source": SOURCES.get(predicted.get("steps_from", ""), "It was computed before the model was asked"),
    }


def _sides(tried: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What came of the prediction, and of the same one on the checkpoint beside."""
    sides = [_side(tried.get("checkpoint"), tried, tried.get("rate"))]
    if beside := tried.get("beside"):
        sides.append(_side(beside["checkpoint"], beside["found"], beside["rate"], beside["why"]))
    return sides


def _side(
    checkpoint: str | None, result: Mapping[str, Any] | None, rate: str | None, why: str | None = None
) -> dict[str, Any]:
    side = {"checkpoint": checkpoint, "rate": rate, "no_test": why, "good": False}
    if result is None:
        return side
    verdict, explained = counterfactual_verdict(result)
    control = result["control"]
    facts = [
        ("Without the swap", result["own"], "", ""),
        ("Predicted", result["expected"], "expected", ""),
        ("The model said", result["said"] or "no number", "came" if result["came"] else "missed", ""),
    ]
    if control:
        facts.append((f"Wrong block: {control['what']}", control["said"] or "no number", "control", ""))
    for route in result.get("routes", ()):
        told, clean = outcome_said(result, route["outcome"]), outcome_said(result, route["clean"])
        facts.append((f"{route['cut'].capitalize()} cut from the answer", told, "cut", f"without the swap: {clean}"))
    good = result["came"] and bool(control) and control["outcome"] != "expected"
    return side | {"good": good, "verdict": verdict, "why": explained, "facts": facts}


def marked(text: str, other: str) -> Markup:
    """`text` as HTML, with the words that `other` does not have in the same place marked."""
    words, others = text.split(), other.split()
    blocks = difflib.SequenceMatcher(None, others, words, autojunk=False).get_opcodes()
    parts = [(kind, escape(" ".join(words[start:end]))) for kind, _, _, start, end in blocks if end > start]
    return Markup(" ").join(part if kind == "equal" else Markup("<mark>{}</mark>").format(part) for kind, part in parts)


def _table(
    reading: Mapping[str, Any],
    done: Mapping[str, Any] | None,
    importance: Mapping[str, Any] | None,
    tried: Mapping[str, Any] | None,
) -> Table:
    found: list[list[Any]] = []
    told = done or {"before": {**reading["answer"], "readouts": reading["readouts"]}}
    for when in ("before", "after"):
        for one in told[when]["readouts"] if when in told else ():
            said = one["value"] or one["text"]
            found.append([f"readout {when}", one["block"], None, said, round(one["probability"], 4)])
    if done:
        span, was, control = "-".join(map(str, done["layers"])), shown(done["before"]), done["control"]
        found += [["operation", block, span, action, None] for block, action in done["actions"].items()]
        if control:
            chance = round(math.exp(done["answer_log_probability"]["after"]), 4)
            found.append(["probability of the answer before, after", None, None, was, chance])
            found.append([f"control: {control['what']}", None, None, control["value"], None])
            chance = round(math.exp(control["answer_log_probability"]), 4)
            found.append(["probability of the answer before, control", None, None, was, chance])
    if tried:
        found.append(["counterfactual: predicted", None, None, tried["expected"], None])
        found.append(["counterfactual: said", None, None, tried["said"], None])
        if control := tried["control"]:
            found.append([f"counterfactual control: {control['what']}", None, None, control["said"], None])
    for layer, block, change, says in rows(importance) if importance else ():
        same = "same answer" if says else "another answer"
        found.append(["removal, change of log probability", block, layer, same, change])
    return Table(["what", "block", "layer", "says", "number"], found)
