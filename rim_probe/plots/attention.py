"""Attention: where the memory blocks look in the question, and where the answer looks in the memory.

Draws `probes.attention` of a reading:
1. The question as running text, shaded by how much one block looks at each word: the chosen one (or the mean over
   blocks) at rest, another one while it is pointed at. Each shading is scaled to its own strongest word; where the
   first word takes most, as in many pretrained models (an attention sink: Xiao et al. 2023, arXiv:2309.17453, section
   3.1), to the strongest of the others.
2. The blocks as buttons, filled by how much the answer looks at them, and the heads through which it does so most.
3. Blocks x words as a heat map, all on one scale.

Knows weights and which aggregation made them. Does not know what a block holds, nor whether a head matters: that is the
report's knockout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rim_probe.numbers import percent
from rim_probe.plots.frame import Choice, Panel, Table, buttons, missing

TITLE = "Attention"
POOLED = {"mean": "mean over heads", "max": "max over heads"}
STRONGEST = 5
RESYNC = 40  # characters of the question that one unknown token may stand for
SINK = 0.3  # share of the blocks' attention that the first word takes, from which on it is left out of the scale
SIGNS = str.maketrans({" ": "␣", "\n": "↵", "\t": "⇥"})  # a token that is white space stays visible


def _probe(reading: Mapping[str, Any]) -> Mapping[str, Any]:
    return reading.get("probes", {}).get("attention") or {}


def _layers(reading: Mapping[str, Any]) -> dict[str, str]:
    return {str(layer): str(layer) for layer in range(1, _probe(reading).get("layers", 0) + 1)}


def _heads(reading: Mapping[str, Any]) -> dict[str, str]:
    found = _probe(reading)
    return POOLED | {str(head): str(head) for head in range(1, found["heads"] + 1)} if found else {}


def _blocks(reading: Mapping[str, Any]) -> dict[str, str]:
    count = len(_per_block(_probe(reading)))
    return {"all": "all blocks"} | {str(block): f"block {block}" for block in range(1, count + 1)} if count else {}


def _per_block(found: Mapping[str, Any]) -> Sequence[Any]:
    """The blocks' rows in the first layer; empty for a run without memory."""
    layers = found["slots_to_tokens"]["mean over heads"] if found else []
    return layers[0] if layers else []


def _telling_layer(reading: Mapping[str, Any]) -> str:
    """The layer in which the blocks look at the words most differently: where all rest on one word, that is a prior."""

    def difference(rows: Sequence[Sequence[float]]) -> float:
        return sum(abs(weight - sum(column) / len(column)) for column in zip(*rows, strict=True) for weight in column)

    found = [difference(layer) for layer in _probe(reading)["slots_to_tokens"]["mean over heads"]]
    return str(1 + found.index(max(found)))


VIEW = (
    Choice("layer", "Layer", _layers, _telling_layer),
    Choice("head", "Head", _heads, lambda reading: "mean"),
    Choice("block", "Block", _blocks, lambda reading: "all"),
)


def draw(reading: Mapping[str, Any], *, layer: str, head: str, block: str) -> Panel:
    """The panel for one layer and one head, or all heads pooled; `block` is the one that shades the words at rest."""
    view = {"layer": layer, "head": head, "block": block}
    found = _probe(reading)
    if not found:
        return missing("attention", TITLE, "The attention of this run was not recorded.", view)
    if not _per_block(found):
        why = "This run had no memory blocks (K = 0), so there is nothing to look at."
        return missing("attention", TITLE, why, view)
    rows, to_blocks, pooled = weights(found, int(layer), head)
    words = running_text(reading["question"], found["tokens"])
    per_block = [rows[str(k)] for k in range(1, len(to_blocks) + 1)]
    sink = len(words) > 1 and all(row[0] == max(row) for row in per_block) and per_block[-1][0] >= SINK
    tops = {name: max(row[1:] if sink else row, default=0) or 1 for name, row in rows.items()}
    notes = []
    if pooled != POOLED.get(head, f"head {head}"):
        notes.append(
            "This model is too large to keep the attention to every word head by head: the words show the "
            f"{pooled}, the answer's bars show head {head}."
        )
    if "answer" not in rows:
        notes.append("How the answer looks at the words was not kept for a model of this size.")
    shown, most = rows[block], max(rows[block])
    data = {
        "words": [(spaced, word, not word.strip("".join(SIGNS.values()))) for spaced, word in words],
        "shades": {name: [round(min(w / tops[name], 1), 2) for w in row] for name, row in rows.items()},
        "what": "mean over the blocks" if block == "all" else f"block {block}",
        "most": None if most == min(shown) else (words[shown.index(most)][1], most),
        "next": (words[shown.index(tops[block], 1)][1], tops[block]) if sink and tops[block] in shown[1:] else None,
        "marks": _marks(rows, to_blocks, words, head),
        "strongest": _strongest(found, view),
        "pooled": pooled,
        "who": pooled if head in POOLED else f"head {head}",
        "aggregation": found["aggregation"],
    }
    figures = {"map": heat_map({name: row for name, row in rows.items() if name != "all"}, words, sink)}
    controls = [buttons(choice, reading, view) for choice in VIEW[:2]]
    return Panel("attention", TITLE, data, _table(rows, words, to_blocks), view, figures, controls, notes)


def weights(found: Mapping[str, Any], layer: int, head: str) -> tuple[dict[str, Sequence[float]], Sequence[float], str]:
    """The attention of one layer, counted from 1, and one head, or heads pooled.

    Returns:
        rows to the W words: "all" (the mean over blocks), one per block, "answer" where it was kept; from where the
        answer begins to the K blocks; how heads were pooled for the words, or which head it is.
    """
    single = None if head in POOLED else int(head) - 1
    kept = found["slots_to_tokens"]["per head"] if single is not None else None
    pooled = POOLED.get(head, f"head {head}" if kept is not None else POOLED["mean"])
    words = kept[layer - 1][single] if kept is not None else found["slots_to_tokens"][pooled][layer - 1]

    def pick(rows: Sequence[Sequence[float]]) -> Sequence[float]:
        if single is not None:
            return rows[single]
        return [max(column) if head == "max" else sum(column) / len(column) for column in zip(*rows, strict=True)]

    rows = {"all": [sum(column) / len(column) for column in zip(*words, strict=True)]}
    rows |= {str(block): row for block, row in enumerate(words, start=1)}
    if found["answer_to_tokens"] is not None:
        rows["answer"] = pick(found["answer_to_tokens"][layer - 1])
    return rows, pick(found["answer_to_blocks"][layer - 1]), pooled


def strongest_heads(found: Mapping[str, Any]) -> list[tuple[int, int, float]]:
    """(layer, head, mass on all blocks together) of the heads through which the answer looks most at memory."""
    heads = [
        (layer, head, sum(row))
        for layer, rows in enumerate(found["answer_to_blocks"], start=1)
        for head, row in enumerate(rows, start=1)
    ]
    return sorted(heads, key=lambda entry: -entry[2])[:STRONGEST]


def _strongest(found: Mapping[str, Any], view: Mapping[str, str]) -> list[dict[str, Any]]:
    marks = []
    for layer, head, mass in strongest_heads(found):
        blocks = found["answer_to_blocks"][layer - 1][head - 1]
        tip = f"In layer {layer}, head {head}, {percent(min(mass, 1))} of the answer's attention is on the blocks"
        if len(blocks) > 1:
            # The answer begins at the last block's end token, so this part may be a token that looks at itself.
            tip += f", {percent(min(blocks[-1], 1))} of it on the last one, where the answer itself begins"
        change = {"layer": str(layer), "head": str(head)}
        marks.append({"change": change, "mass": min(mass, 1), "tip": tip + ".", "on": change.items() <= view.items()})
    return marks


def _marks(
    rows: Mapping[str, Sequence[float]], to_blocks: Sequence[float], words: Sequence[tuple[bool, str]], head: str
) -> list[dict[str, Any]]:
    """The blocks as buttons; the last one says what of the answer's attention is on the question."""
    marks = [{"name": "all", "value": "all", "fill": 0, "tip": f"Mean over the blocks: {_gaze(rows['all'], words)}."}]
    for block, share in enumerate(to_blocks, start=1):
        tip = f"Block {block}: {_gaze(rows[str(block)], words)}. The answer gives it {percent(share)}."
        marks.append({"name": str(block), "value": percent(share), "fill": min(share, 1), "tip": tip})
    if "answer" in rows:
        value = "…" if head == "max" else percent(min(sum(rows["answer"]), 1))  # a maximum is no part of a whole
        tip = f"The answer itself: {_gaze(rows['answer'], words)}."
        marks.append({"name": "answer", "value": value, "fill": 0, "tip": tip})
    return marks


def _gaze(row: Sequence[float], words: Sequence[tuple[bool, str]]) -> str:
    """Where a row looks most, in words."""
    best = sorted(range(len(row)), key=lambda place: -row[place])[:4]
    named = [f"“{words[place][1]}” {percent(row[place])}" for place in best if row[place] > min(row)]
    return "most on " + " · ".join(named) if named else "the same on every word"


def heat_map(rows: Mapping[str, Sequence[float]], words: Sequence[tuple[bool, str]], sink: bool = False) -> Any:
    """Rows ("1", "2", ..., "answer") x words on one scale, as a `plotly.graph_objects.Figure`."""
    from rim_probe.plots import theme

    names = [f"block {name}" if name != "answer" else "answer" for name in rows]
    z = [list(row) for row in rows.values()]
    top = max(max(row[1:] if sink else row, default=0) for row in z) or 1
    texts = [
        [f"{name} on “{theme.plain(words[place][1])}”: {percent(value)}" for place, value in enumerate(row)]
        for name, row in zip(names, z, strict=True)
    ]
    x = theme.places([word for _, word in words], "", 14) | {"tickangle": -90, "side": "top", "tickfont": {"size": 11}}
    figure = theme.heat_map(z, x, theme.places(names), texts, low=0, high=top, title="share of attention, %")
    return figure.update_layout(height=27 * len(names) + 130, margin={"t": 40, "b": 4})


def _table(rows: Mapping[str, Sequence[float]], words: Sequence[tuple[bool, str]], to_blocks: Sequence[float]) -> Table:
    shown = {name: row for name, row in rows.items() if name != "all"}
    header = ["word"] + [f"block {name}" if name != "answer" else "answer" for name in shown]
    lines = [[word, *(row[place] for row in shown.values())] for place, (_, word) in enumerate(words)]
    lines.append(["(from the answer to this block)", *(round(share, 3) for share in to_blocks)])
    return Table(header, lines)


def running_text(question: str, tokens: Sequence[str]) -> list[tuple[bool, str]]:
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
