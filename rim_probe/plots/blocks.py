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

from rim_probe.numbers import percent
from rim_probe.plots.frame import Choice, Panel, Table, buttons, missing
from rim_probe.probing.matches import Decode, Explicit, claims, decodes, explicit_steps, on_the_way, plain_step, thought
from rim_probe.problems import is_correct

TITLE = "Memory blocks beside explicit steps"
OWN = "own"


def _indices(reading: Mapping[str, Any]) -> dict[str, str]:
    decoded = reading["probes"].get("steps", {}).get("blocks", [])
    found = sorted({one["step"] for block in decoded for one in (block, *block.get("others", ()))})
    return {OWN: "nearest step", **{str(step): f"step {step}" for step in found}} if found else {}


VIEW = (Choice("step", "Read each block for its", _indices, lambda reading: OWN),)


def draw(reading: Mapping[str, Any], *, step: str = OWN) -> Panel:
    """The panel; `step` is one of the values of `VIEW`."""
    view = {"step": step}
    if not reading["readouts"]:
        return missing("blocks", TITLE, "This question was answered without memory blocks.", view)
    rows, read = explicit_steps(reading), decodes(reading, step)
    testable = claims(reading) if step == OWN else {}  # other readings of a block are looked at, not claimed
    singles = [_card(reading, told, read.get(told["block"]), testable) for told in reading["readouts"]]
    cards = _collapsed(singles)
    chain, gold = reading.get("chain") or {}, reading.get("gold")
    right = [round(100 * one.right) for one in read.values()]
    data = {
        "cards": cards,
        "steps": _steps(rows, cards, bool(reading.get("steps"))),
        "lines": _lines(cards, len(rows)) if rows else [],
        "chain": chain.get("value") or "nothing" if chain.get("steps") else None,
        "chain_right": is_correct(chain["value"], gold) if gold and chain.get("value") is not None else None,
        "decoded": bool(read),
        "span": f"{min(right)} %" if len(set(right)) == 1 else f"{min(right)} to {max(right)} %" if right else "",
        "known": {key for key in ("words", "value", "chance") if any(card[key] is not None for card in singles)},
    }
    return Panel(
        "blocks", TITLE, data, _table(singles), view, {}, [buttons(VIEW[0], reading, view)], _notes(reading, rows)
    )


def _collapsed(cards: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One card for blocks in a row that say the same and lie nearest to the same step; the blocks are its `group`."""
    groups: list[list[dict[str, Any]]] = []
    for card in cards:
        if groups and card["same"] == groups[-1][-1]["same"]:
            groups[-1].append(card)
        else:
            groups.append([card])
    return [group[-1] | {"group": group, "blocks": [card["block"] for card in group]} for group in groups]


def _card(
    reading: Mapping[str, Any], told: Mapping[str, Any], decode: Decode | None, testable: Mapping[int, int]
) -> dict[str, Any]:
    """One block, as the template shows it."""
    block = told["block"]
    judged = _of(reading, "correctness", block)
    values = {v["step"]: v for v in _of(reading, "values", block).get("values", ()) if v["quantity"] == "result"}
    words = _of(reading, "words", block).get("stage1")
    return {
        "block": block,
        "told": told,
        "sign": _sign(reading, told),
        "decode": decode,
        "mark": _mark(decode) if decode else ("", ""),
        "accuracy": _accuracy(decode, reading["probes"]["steps"].get("bank")) if decode else "",
        "words": None if words is None else plain_step(words),
        "chance": judged.get("chance_right"),
        "chosen": reading["probes"].get("correctness", {}).get("chosen_block") == block,
        "value": values.get(decode.index, values.get(None)) if decode else None,  # the answer has no index
        "testable": block in testable,
        "thought": thought(told),
        "same": (thought(told), decode and decode.nearest[0][0], decode and decode.row),
    }


def _sign(reading: Mapping[str, Any], told: Mapping[str, Any]) -> tuple[str, str]:
    """A class and a mark for an answer so far. Only the last block's can be wrong: the others are on the way."""
    last = told["block"] == reading["num_blocks"]
    if told.get("right"):
        return "right", "✓ right"
    if last:
        return ("", "not checked") if told.get("right") is None else ("wrong", "✗ wrong")
    step = on_the_way(told, reading.get("steps") or (reading.get("chain") or {}).get("steps") or ())
    return "soft", f"on the way: step {step}" if step else ""


def _mark(one: Decode) -> tuple[str, str]:
    """A class and a sentence on what a decode equals."""
    if one.gold is None:
        if one.row is None:
            return "none", "○ no step of the chain"
        return ("hit" if one.exact else "near"), f"→ step {one.row + 1} of the chain"
    if not one.gold:
        return "miss", "○ no step of the solution"
    if one.exact:
        return "hit", f"✓ step {one.gold} of the solution"
    return "near", f"≈ step {one.gold}, though read for step {one.index}"


def _accuracy(one: Decode, bank: int | None) -> str:
    """How often the decode was right elsewhere, and among which problems."""
    right = f"right for {percent(one.right)} of known problems"
    if one.coverage is None or percent(one.coverage) == percent(1.0):
        return right
    known = "known steps" if bank is None else f"{bank:,} known steps"
    return f"{right} ({percent(one.accuracy)} of those whose step is among the {known})"


def _of(reading: Mapping[str, Any], probe: str, block: int) -> Mapping[str, Any]:
    """What a probe says of a block, empty where it says nothing."""
    told = reading["probes"].get(probe, {}).get("blocks", ())
    return next((one for one in told if one["block"] == block), {})


def _steps(rows: Sequence[Explicit], cards: Sequence[Mapping[str, Any]], known: bool) -> list[dict[str, Any]]:
    """The right column."""
    items, decoded = [], any(card["decode"] for card in cards)
    for i, row in enumerate(rows):
        met = [block for card in cards if card["decode"] and card["decode"].row == i for block in card["blocks"]]
        place = f"Step {i + 1 if row.written else row.gold}"
        if not row.written and any(other.written for other in rows):
            place += " · not written by CoT"
        elif row.written and known:
            where = "✓ in the solution" if row.gold == i + 1 else f"≈ step {row.gold} of the solution"
            place += " · " + (where if row.gold else "not in the solution")
        said = (
            f"matches block{'s' * (len(met) > 1)} {', '.join(map(str, met))}"
            if met
            else "matches no block"
            if decoded
            else ""
        )
        looks = ("" if row.written else "unwritten ") + ("unmet" if decoded and not met else "")
        links = " ".join([f"step-{i + 1}", *(f"block-{block}" for block in met)])
        items.append({"text": row.text, "place": place, "said": said, "looks": looks, "links": links})
    return items


def _lines(cards: Sequence[Mapping[str, Any]], steps: int) -> list[dict[str, Any]]:
    """The lines between the columns: where each begins and ends in percent of the height, None for a loose end."""
    lines = []
    for i, card in enumerate(cards):
        if not card["decode"]:
            continue
        row = card["decode"].row
        mates = [k for k, other in enumerate(cards) if other["decode"] and other["decode"].row == row]
        # Lines that meet the same step arrive side by side, so that each can be followed.
        apart = min(0.9, 5 / len(mates)) * (mates.index(i) - (len(mates) - 1) / 2)
        end = None if row is None else round(100 * (row + 0.5) / steps + apart, 2)
        width = round(1 + 3 * min(max(card["decode"].nearest[0][1], 0), 1), 1)
        start = round(100 * (i + 0.5) / len(cards), 2)
        lines.append({"block": card["block"], "kind": card["mark"][0], "start": start, "end": end, "width": width})
    return lines


def _notes(reading: Mapping[str, Any], rows: Sequence[Explicit]) -> list[str]:
    spoken = any(one.get("stage1") is not None for one in reading["probes"].get("words", {}).get("blocks", ()))
    notes = []
    if "steps" not in reading["probes"]:
        notes.append("No step decoder of this checkpoint fits, so blocks are not compared with explicit steps.")
    if not spoken:
        notes.append("Own words are missing.")
    if "correctness" not in reading["probes"]:
        notes.append("The chance of being right is missing.")
    if not rows:
        notes.append("There is no chain of thought and no known solution to compare the blocks with.")
    return notes + (list(reading.get("complaints", ())) if notes else [])


def _table(cards: Sequence[Mapping[str, Any]]) -> Table:
    header = ["block", "answer so far", "probability", "right or wrong", "read for step", "nearest step", "cosine"]
    header += ["second", "cosine of the second", "third", "cosine of the third", "what it equals"]
    header += ["decode right on known problems", "own words", "chance that the answer is right"]
    header += ["result by a linear probe", "decode right where it knows the step"]
    rows = []
    for card in cards:
        told, one = card["told"], card["decode"]
        near = [part for text, cosine in one.nearest[:3] for part in (text, f"{cosine:.3f}")] if one else []
        right = {True: "right", False: "wrong", None: None}[told.get("right")]
        row = [card["block"], told["value"], f"{told['probability']:.3f}", right, one and one.index]
        row += [*near, *[None] * (6 - len(near)), one and card["mark"][1], one and f"{one.right:.3f}", card["words"]]
        row += [None if card["chance"] is None else f"{card['chance']:.3f}", card["value"] and card["value"]["value"]]
        rows.append([*row, f"{one.accuracy:.3f}" if one and one.coverage is not None else None])
    return Table(header, rows)
