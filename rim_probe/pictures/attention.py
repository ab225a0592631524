"""The attention panel: where the memory blocks look in the question, and where the answer looks in the memory.

Draws `probes.attention` of a reading:
1. The question as running text. Its words are shaded by how much one block looks at them: the chosen block (or the mean
   over blocks) at rest, another one while it is pointed at. Each shading is scaled to its own strongest word; where the
   first word takes most, as in many pretrained models (an attention sink: Xiao et al. 2023, arXiv:2309.17453, section
   3.1), to the strongest of the others.
2. The blocks as a row of buttons, filled by how much the answer looks at them.
3. Blocks x words as a heat map, all on one scale.
4. "Strongest memory heads": the heads through which the answer looks most at the blocks.

Knows weights and which aggregation made them. Does not know what a block holds, nor whether a head matters: that is the
report's knockout.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rim_probe.pictures.parts import (
    Choice,
    Picture,
    Table,
    buttons,
    escape,
    menu,
    missing,
    percent,
    set_view,
    term,
)

TITLE = "Attention"
POOLED = {"mean": "mean over heads", "max": "max over heads"}
STRONGEST = 5
NAMED_WORDS = 4
RESYNC = 40  # characters of the question that one unknown token may stand for
SINK = 0.3  # share of the blocks' attention that the first word takes, from which on it is left out of the scale
SIGNS = str.maketrans({" ": "␣", "\n": "↵", "\t": "⇥"})  # a token that is white space stays visible


def _probe(reading: Mapping[str, Any]) -> Mapping[str, Any]:
    return reading.get("probes", {}).get("attention") or {}


def _layers(reading: Mapping[str, Any]) -> dict[str, str]:
    return {str(layer): str(layer) for layer in range(1, _probe(reading).get("layers", 0) + 1)}


def _heads(reading: Mapping[str, Any]) -> dict[str, str]:
    found = _probe(reading)
    if not found:
        return {}
    return POOLED | {str(head): str(head) for head in range(1, found["heads"] + 1)}


def _blocks(reading: Mapping[str, Any]) -> dict[str, str]:
    count = len(_per_block(_probe(reading)))
    return {"all": "all blocks"} | {str(block): f"block {block}" for block in range(1, count + 1)} if count else {}


def _per_block(found: Mapping[str, Any]) -> Sequence[Any]:
    """The blocks' rows in the first layer; empty for a run without memory."""
    layers = found["slots_to_tokens"]["mean over heads"] if found else []
    return layers[0] if layers else []


def _telling_layer(reading: Mapping[str, Any]) -> str:
    """The layer in which the blocks look at the words most differently; where all rest on one word, that is a habit."""

    def difference(rows: Sequence[Sequence[float]]) -> float:
        return sum(abs(weight - sum(column) / len(column)) for column in zip(*rows, strict=True) for weight in column)

    found = [difference(layer) for layer in _probe(reading)["slots_to_tokens"]["mean over heads"]]
    return str(1 + found.index(max(found)))


VIEW = (
    Choice("layer", "Layer", _layers, _telling_layer),
    Choice("head", "Head", _heads, lambda reading: "mean"),
    Choice("block", "Block", _blocks, lambda reading: "all"),
)


def draw(reading: Mapping[str, Any], *, layer: str, head: str, block: str) -> Picture:
    """The panel for one layer and one head, or all heads pooled; `block` is the one that shades the words at rest."""
    view = {"layer": layer, "head": head, "block": block}
    found = _probe(reading)
    if not found:
        return missing("attention", TITLE, "The attention of this run was not recorded.", view)
    if not _per_block(found):
        return missing(
            "attention", TITLE, "This run had no memory blocks (K = 0), so there is nothing to look at.", view
        )
    weights = _Weights.of(found, int(layer) - 1, head)
    words = _running_text(reading["question"], found["tokens"])
    notes = []
    if weights.pooled_instead:
        notes.append(
            "This model is too large to keep the attention to every word head by head: the words show the "
            f"{weights.words_of}, the answer's bars show head {head}."
        )
    if weights.answer_to_words is None:
        notes.append("How the answer looks at the words was not kept for a model of this size.")
    return Picture(
        panel="attention",
        title=TITLE,
        lead=f"The stronger a word is shaded, the more a {term('memory block')} looks at it while the model reads. "
        "Point at a block to see where it looks, press it to keep it.",
        look_for="Do the blocks rest on the numbers, and do different blocks look at different parts? Attention shows "
        "where the model looks, not what it uses: a head that looks hard may not matter. The test is the knockout in "
        "the checkpoint's report (Evidence), which silences heads and counts what the answer loses.",
        body=_question(weights, words, view) + _block_row(weights, words, view) + _heat_map(weights, words),
        table=_table(weights, words),
        view=view,
        controls=_controls(reading, found, view),
        notes=notes,
    )


@dataclass(frozen=True)
class _Weights:
    """The attention of one selection, K blocks and W words.

    Attributes:
        words [K][W]: from the slots of each block to the words.
        words_of: how heads were pooled for `words`, or which head it is.
        answer_to_blocks [K]: from where the answer begins.
        answer_to_words [W]: the same to the words, None where it was not kept.
        shares: whether a row is part of a whole (a maximum over heads is not).
        pooled_instead: one head was asked for, but only means over heads were kept for words.
        aggregation: what else was averaged, as the probe says it.
        sink: whether the first word takes so much that the others are shaded without it.
    """

    words: Sequence[Sequence[float]]
    words_of: str
    answer_to_blocks: Sequence[float]
    answer_to_words: Sequence[float] | None
    shares: bool
    pooled_instead: bool
    layer: int
    aggregation: str
    sink: bool

    @classmethod
    def of(cls, found: Mapping[str, Any], layer: int, head: str) -> _Weights:
        to_words, to_answer = found["slots_to_tokens"], found["answer_to_blocks"][layer]
        answer_words = found["answer_to_tokens"]
        answer_words = answer_words[layer] if answer_words is not None else None
        single = None if head in POOLED else int(head) - 1
        kept = to_words["per head"] if single is not None else None
        pooled_instead = single is not None and kept is None
        name = POOLED.get(head, POOLED["mean"] if pooled_instead else f"head {head}")
        words = kept[layer][single] if kept is not None else to_words[name][layer]

        def pick(rows: Sequence[Sequence[float]]) -> Sequence[float]:
            if single is not None:
                return rows[single]
            columns = zip(*rows, strict=True)
            return [max(column) if head == "max" else sum(column) / len(column) for column in columns]

        return cls(
            words,
            name,
            pick(to_answer),
            None if answer_words is None else pick(answer_words),
            head != "max",
            pooled_instead,
            layer + 1,
            found["aggregation"],
            len(words[0]) > 1 and all(row[0] == max(row) for row in words) and words[-1][0] >= SINK,
        )

    def top(self, row: Sequence[float]) -> float:
        """What is shaded most."""
        return max(row[1:] if self.sink else row, default=0) or 1

    def mean_over_blocks(self) -> list[float]:
        return [sum(column) / len(column) for column in zip(*self.words, strict=True)]

    def rows(self) -> dict[str, Sequence[float]]:
        """Every shading of the words, by the name of its mark."""
        rows: dict[str, Sequence[float]] = {"all": self.mean_over_blocks()}
        rows |= {str(block): row for block, row in enumerate(self.words, start=1)}
        return rows if self.answer_to_words is None else rows | {"answer": self.answer_to_words}


# ------------------------------------------------------------------------------------------------------------ choosing


def _controls(reading: Mapping[str, Any], found: Mapping[str, Any], view: Mapping[str, str]) -> str:
    layer, head, _ = VIEW
    rows = [(buttons if len(choice.options(reading)) <= 8 else menu)(choice, reading, view) for choice in (layer, head)]
    return "".join(rows) + _strongest(found, view)


def strongest_heads(found: Mapping[str, Any]) -> list[tuple[int, int, float]]:
    """(layer, head, mass on all blocks together) of the heads through which the answer looks most at memory."""
    heads = [
        (layer, head, sum(row))
        for layer, rows in enumerate(found["answer_to_blocks"], start=1)
        for head, row in enumerate(rows, start=1)
    ]
    return sorted(heads, key=lambda entry: -entry[2])[:STRONGEST]


def _strongest(found: Mapping[str, Any], view: Mapping[str, str]) -> str:
    row = []
    for layer, head, mass in strongest_heads(found):
        blocks = found["answer_to_blocks"][layer - 1][head - 1]
        tip = f"In layer {layer}, head {head}, {percent(min(mass, 1))} of the answer's attention is on the blocks"
        if len(blocks) > 1:
            # The answer begins at the last block's end token, so this part may be a token that looks at itself.
            tip += f", {percent(min(blocks[-1], 1))} of it on the last one, where the answer itself begins"
        pressed = "true" if (view["layer"], view["head"]) == (str(layer), str(head)) else "false"
        row.append(
            f'<button type="button" aria-pressed="{pressed}" {set_view({"layer": str(layer), "head": str(head)})} '
            f'data-tip="{escape(tip)}.">layer {layer} head {head}<small> {percent(min(mass, 1))}</small></button>'
        )
    name = "Strongest memory heads"
    return f'<div class="pic-choice" role="group" aria-label="{name}"><span>{name}</span>{"".join(row)}</div>'


# ------------------------------------------------------------------------------------------------------------- drawing


def _question(weights: _Weights, words: Sequence[tuple[bool, str]], view: Mapping[str, str]) -> str:
    """The question, shaded; the shades of all marks of this selection ride along for the script."""
    shades = {
        name: [round(min(weight / weights.top(row), 1), 2) for weight in row] for name, row in weights.rows().items()
    }
    spans = "".join(
        f"{' ' if spaced else ''}"
        f'<span class="{_kind(word)}" data-link="word-{place}" style="--w:{shade:g}">{escape(word)}</span>'
        for place, ((spaced, word), shade) in enumerate(zip(words, shades[view["block"]], strict=True))
    )
    what = "mean over the blocks" if view["block"] == "all" else f"block {view['block']}"
    row = weights.rows()[view["block"]]
    peak = max(row)
    most = f"the most, {percent(peak)}, goes to {escape(_quoted(words, row.index(peak)))}"
    if peak == min(row):
        most = f"every word gets the same, {percent(peak)}"
    elif weights.sink:
        second = weights.top(row)
        most += f", the first word, where attention rests in many pretrained models; of the others {percent(second)} "
        most += f"goes to {escape(_quoted(words, row.index(second, 1)))}, and to that the shades are scaled"
    return (
        f'<p class="attention-question" data-rest="{view["block"]}" '
        f'data-shades="{escape(json.dumps(shades, separators=(",", ":")))}">{spans}</p>'
        f'<p class="attention-legend"><i class="attention-ramp"></i> Shown: {what}, layer {weights.layer}, '
        f"{weights.words_of}; {most}. "
        f"Aggregation: {escape(weights.aggregation)}.</p>"
    )


def _block_row(weights: _Weights, words: Sequence[tuple[bool, str]], view: Mapping[str, str]) -> str:
    """The blocks as buttons, filled by how much the answer looks at them."""

    def mark(name: str, label: str, value: str, fill: float, tip: str, pressable: bool = True) -> str:
        pressed = f' aria-pressed="{"true" if view["block"] == name else "false"}"' if pressable else ""
        action = set_view({"block": name}) if pressable else 'tabindex="0" role="note"'
        tag, kind = ("button", ' type="button"') if pressable else ("span", "")
        look = "attention-block" if label.isdigit() else "attention-block attention-plain"
        return (
            f'<{tag}{kind} class="{look}" {action}{pressed} '
            f'data-shade="{name}" data-link="block-{name}" data-tip="{escape(tip)}" style="--p:{min(fill, 1):.3f}">'
            f"<small>{label}</small><b>{value}</b></{tag}>"
        )

    rows = weights.rows()
    marks = [mark("all", "mean of", "all", 0, f"Mean over the blocks: {_gaze(rows['all'], words, weights)}.")]
    for block, share in enumerate(weights.answer_to_blocks, start=1):
        tip = f"Block {block}: {_gaze(rows[str(block)], words, weights)}. The answer gives it {percent(share)}."
        marks.append(mark(str(block), str(block), percent(share), share, tip))
    if weights.answer_to_words is not None:
        total = sum(weights.answer_to_words)
        value = percent(min(total, 1)) if weights.shares else "…"
        tip = f"The answer itself: {_gaze(rows['answer'], words, weights)}."
        marks.append(mark("answer", "question", value, 0, tip, pressable=False))
    who = (
        "max over heads"
        if not weights.shares
        else weights.words_of
        if not weights.pooled_instead
        else f"head {view['head']}"
    )
    return (
        '<h3>From the answer to the blocks</h3><p class="attention-legend">The fill is how much the answer looks at '
        f"each block (layer {weights.layer}, {who}). It begins at the end of the last block, so part of that one's "
        "share can be a token looking at itself.</p>"
        '<div class="attention-scroll"><div class="attention-row" role="group" aria-label="Memory blocks: show where '
        f'one looks">{"".join(marks)}</div></div>'
    )


def _heat_map(weights: _Weights, words: Sequence[tuple[bool, str]]) -> str:
    """Blocks x words on one scale; the same numbers stand in the table, so screen readers are sent there."""
    rows = {name: row for name, row in weights.rows().items() if name != "all"}
    top = max(weights.top(row) for row in rows.values())
    heads = "".join(f'<span data-link="word-{place}">{escape(word)}</span>' for place, (_, word) in enumerate(words))
    lines = []
    for name, row in rows.items():
        label = f"block {name}" if name != "answer" else "answer"
        cells = "".join(_heat_cell(min(value / top, 1), label, words, place, value) for place, value in enumerate(row))
        lines.append(
            f'<div class="attention-line" data-shade="{name}"><b data-link="block-{name}">{label}</b>{cells}</div>'
        )
    return (
        f'<h3>All blocks, all words</h3><p class="attention-legend">One scale for the whole map: from nothing to '
        f'{percent(top)}{" and more" if weights.sink else ""} <i class="attention-ramp"></i>, layer {weights.layer}, '
        f"{weights.words_of}.</p>"
        '<div class="attention-scroll" tabindex="0" role="region" aria-label="Heat map of blocks and words">'
        f'<div class="attention-map" role="img" aria-label="Attention from {len(weights.words)} blocks to '
        f'{len(words)} words; the numbers are in the table below" style="--words:{len(words)}">'
        f'<div class="attention-line attention-heads"><b></b>{heads}</div>{"".join(lines)}</div></div>'
    )


def _heat_cell(shade: float, label: str, words: Sequence[tuple[bool, str]], place: int, value: float) -> str:
    """Cells under 1 % carry no text: a row has at most a hundred others, however long the question."""
    if value < 0.01:
        return f"<i style=--w:{shade:.2g}></i>" if shade >= 0.01 else "<i></i>"
    tip = escape(f"{label} on {_quoted(words, place)}: {percent(value)}")
    return f'<i style=--w:{shade:.2g} data-link=word-{place} data-tip="{tip}"></i>'


def _table(weights: _Weights, words: Sequence[tuple[bool, str]]) -> Table:
    rows = {name: row for name, row in weights.rows().items() if name != "all"}
    header = ["word"] + [f"block {name}" if name != "answer" else "answer" for name in rows]
    lines = [[word, *(row[place] for row in rows.values())] for place, (_, word) in enumerate(words)]
    lines.append(["(from the answer to this block)", *(round(share, 3) for share in weights.answer_to_blocks)])
    return Table(header, lines)


# --------------------------------------------------------------------------------------------------------------- words


def _running_text(question: str, tokens: Sequence[str]) -> list[tuple[bool, str]]:
    """Each token as it stands in the question, and whether a space goes before it.

    Tokenizers lower-case, drop spaces or give `<unk>`: tokens are found again in the question, one after the other, and
    a token that is not there stands as the model saw it. A token that is nothing but white space stands as its sign.
    """
    lowered = question.lower()
    if len(lowered) != len(question):  # some letters change their length; then cases cannot be told apart
        question = lowered
    pieces: list[tuple[bool, str]] = []
    cursor, lost, blank = 0, False, False
    for token in tokens:
        piece = token.strip().lower()
        if not piece:
            pieces.append((not blank, token.translate(SIGNS) or "␣"))
            blank = True
            continue
        at, (blank, after) = lowered.find(piece, cursor), (False, blank)
        skipped = lowered[cursor:at] if at >= 0 else ""
        if at < 0 or (skipped.strip() and not (lost and len(skipped) <= RESYNC)):
            pieces.append((True, token.strip()))
            lost = True
            continue
        pieces.append((bool(skipped) and bool(pieces) and not after, question[at : at + len(piece)]))
        cursor, lost = at + len(piece), False
    return pieces


def _kind(word: str) -> str:
    return "word" if word.strip("".join(SIGNS.values())) else "word blank"


def _quoted(words: Sequence[tuple[bool, str]], place: int) -> str:
    return f"“{words[place][1]}”"


def _gaze(row: Sequence[float], words: Sequence[tuple[bool, str]], weights: _Weights) -> str:
    """Where a row looks, in words."""
    best = sorted(range(len(row)), key=lambda place: -row[place])[:NAMED_WORDS]
    named = " · ".join(f"{_quoted(words, place)} {percent(row[place])}" for place in best if row[place] > min(row))
    if not weights.shares:
        return f"at most, in any head, {named}" if named else "on every word the same"
    total = percent(min(sum(row), 1))
    return f"{total} on the question, the rest on memory{'; most on ' + named if named else ', on every word the same'}"
