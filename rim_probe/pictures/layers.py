"""The layers panel: what every layer holds at every memory position, and what one cell holds in full.

Draws `probes.depth` of a reading:
1. A grid of layers (rows, the input at the bottom) and memory positions (columns, by block): the best reading in the
   cell, its score as the fill. A ring marks a reading that is the result of a known step; how many rings the control
   has is counted beside, since small numbers come up by chance.
2. The chosen cell: its best readings beside the control's, and buttons that change this block at this layer.
3. The rank of a step's result over depth, beside its control.

The page is asked for one action: "operate_cell" with block, layer and action (blank, noise, swap).

Knows readings and scores. Does not know whether the model uses what is read: that is the surgery's to show.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rim_probe.pictures import chart as ch
from rim_probe.pictures.parts import Choice, Picture, Table, buttons, do, escape, missing, percent, plain_step, term

TITLE = "Layers"
NONE = "·"
MANY = 400  # cells; above it a cell's line of text names three readings instead of five, to keep the page light
ACTIONS = {
    "blank": ("Blank it", "Sets the block's states to zero at this layer."),
    "noise": ("Add noise", "Adds noise as strong as the states themselves."),
    "swap": ("Swap it", "Puts in what the same block holds for the second question."),
}


def _depth(reading: Mapping[str, Any]) -> Mapping[str, Any]:
    return reading.get("probes", {}).get("depth") or {}


def _modes(reading: Mapping[str, Any]) -> dict[str, str]:
    return {mode["name"]: mode["name"] for mode in _depth(reading).get("modes", ()) if mode["positions"]}


def _cells(reading: Mapping[str, Any]) -> dict[str, str]:
    """Every cell of every mode as "layer.block.position"; a mode without it shows its nearest one."""
    return {
        f"{layer}.{_key(place)}": ""
        for mode in _depth(reading).get("modes", ())
        for layer in mode["layers"]
        for place in mode["positions"]
    }


def _usual_cell(reading: Mapping[str, Any]) -> str:
    """The last block's first position in the last layer that later ones read: not picked for what is read there."""
    mode = next(mode for mode in _depth(reading)["modes"] if mode["positions"])
    last = mode["positions"][-1]["block"]
    place = next(place for place in mode["positions"] if place["block"] == last)
    return f"{mode['layers'][max(0, len(mode['layers']) - 2)]}.{_key(place)}"


def _values(reading: Mapping[str, Any]) -> dict[str, str]:
    return {str(rank["step"]): f"{rank['value']} (step {rank['step']})" for rank in _depth(reading).get("ranks", ())}


VIEW = (
    Choice("mode", "Read by", _modes, lambda reading: next(iter(_modes(reading)))),
    Choice("minus", "Score", lambda reading: {"off": "as read", "on": "minus control"}, lambda reading: "off"),
    Choice("cell", "Cell", _cells, _usual_cell),
    Choice("value", "Rank of", _values, lambda reading: next(iter(_values(reading)))),
)


def draw(reading: Mapping[str, Any], *, mode: str, minus: str, cell: str, value: str) -> Picture:
    """The panel for one way of reading; `cell` is described in full, `value` is the step whose result is ranked."""
    view = {"mode": mode, "minus": minus, "cell": cell, "value": value}
    found = _depth(reading)
    shown = next((one for one in found.get("modes", ()) if one["name"] == mode and one["positions"]), None)
    if shown is None:
        why = "This run had no memory blocks (K = 0), so there are no layers of them to read."
        return missing("layers", TITLE, why if found else "The layers of this run were not read.", view)
    grid = _Grid.of(reading, shown, minus == "on")
    chosen = grid.nearest(cell)
    notes = []
    if minus == "on" and grid.plain:
        why = (
            f"its control ({shown['control']}) has no scores to take away" if shown["control"] else "it has no control"
        )
        notes.append(f"Minus control is not shown: {why} in the mode “{mode}”.")
    rank = next((one for one in found.get("ranks", ()) if str(one["step"]) == value), None)
    if rank is None:
        notes.append("No step of this question is known, so there is no value to follow over depth.")
    return Picture(
        panel="layers",
        title=TITLE,
        lead=f"Every {term('layer')} of the model at every memory {term('slot')}: the likeliest reading of what it "
        "holds. Press a cell to see it in full and to change it.",
        look_for="Do results of steps (ringed) appear in some layer and stay? Compare with the control: what it "
        "shows, too, is not thought but habit. A reading is only a claim about what a state resembles; that the answer "
        "changes as predicted when the state is changed is the evidence. Press a cell and try.",
        body=_legend(grid) + _table_of(grid, chosen) + _detail(reading, grid, chosen) + _ranks(reading, rank, view),
        table=_data(grid, found.get("ranks", ())),
        view=view,
        controls=buttons(VIEW[0], reading, view) + buttons(VIEW[1], reading, view),
        notes=notes,
    )


@dataclass(frozen=True)
class _Grid:
    """One mode, ready to draw; L layers and P positions.

    Attributes:
        mode: as the reading has it.
        cells [L][P]: entries {"text", "score"}, best first; differences to the control unless `plain`.
        plain: scores as read.
        results: the text of a known step or its result -> what it is, "the result of step 2".
        whose: which steps these are, for the legend; empty where none are known.
    """

    mode: Mapping[str, Any]
    cells: Sequence[Sequence[Sequence[Mapping[str, Any]]]]
    plain: bool
    results: Mapping[str, str]
    whose: str

    @classmethod
    def of(cls, reading: Mapping[str, Any], mode: Mapping[str, Any], minus: bool) -> _Grid:
        steps, whose = reading.get("steps") or [], "of the right solution"
        if not steps and reading.get("chain"):
            steps = reading["chain"]["steps"]
            whose = "that the chain of thought wrote (the right ones are not known)"
        results: dict[str, str] = {}
        for number, step in enumerate(steps, start=1):
            text = plain_step(step)
            results.setdefault(text, f"step {number}")
            results.setdefault(text.rpartition("=")[2], f"the result of step {number}")
        results.pop("", None)
        difference = mode["minus"] if minus else None
        return cls(mode, difference or mode["cells"], not difference, results, whose if results else "")

    def best(self, entries: Sequence[Mapping[str, Any]]) -> str:
        """The best reading; a dot where several are equally good, since their order is no finding."""
        if not entries or _tied(entries, 0):
            return NONE
        return _shown(entries[0]["text"])

    def result(self, entries: Sequence[Mapping[str, Any]], place: int = 0) -> str:
        """What a reading is, where it stands out and is a known step or its result; else empty."""
        if place >= len(entries) or _tied(entries, place):
            return ""
        return self.results.get(plain_step(entries[place]["text"]), "")

    def score(self, score: float) -> str:
        if not self.plain:
            return f"{score:+.2f}".replace("-", "−")
        return percent(score) if self.mode["score_name"] == "probability" else f"{score:.2f}".replace("-", "−")

    def nearest(self, cell: str) -> tuple[int, int]:
        """Row and column of a cell, or of the nearest one that this mode has: same block, then same layer."""
        layer, block, place = cell.split(".", 2)
        layers, positions = self.mode["layers"], self.mode["positions"]
        row = min(range(len(layers)), key=lambda i: abs(layers[i] - int(layer)))
        column = min(
            range(len(positions)),
            key=lambda i: (abs(positions[i]["block"] - int(block)), str(positions[i]["position"]) != place),
        )
        return row, column

    def each(self) -> Iterator[tuple[int, int, Mapping[str, Any]]]:
        """(row, column, position) of all cells, the last layer first."""
        for row in reversed(range(len(self.mode["layers"]))):
            for column, place in enumerate(self.mode["positions"]):
                yield row, column, place


def _tied(entries: Sequence[Mapping[str, Any]], place: int) -> bool:
    return sum(entry["score"] == entries[place]["score"] for entry in entries) > 1


def _key(place: Mapping[str, Any]) -> str:
    return f"{place['block']}.{place['position']}"


def _place(place: Mapping[str, Any]) -> str:
    position = place["position"]
    return position if isinstance(position, str) else f"slot {position}"


def _shown(text: str) -> str:
    """A step without its marks; a token that is itself a mark, or only a space, stays visible."""
    return plain_step(text) or text.strip() or "␣"


# ---------------------------------------------------------------------------------------------------------------- grid


def _legend(grid: _Grid) -> str:
    own = sum(bool(grid.result(entries)) for row in grid.cells for entries in row)
    total = sum(len(row) for row in grid.cells)
    ring = ""
    if grid.whose:
        control = grid.mode["control_cells"]
        chance = ""
        if control and grid.plain:
            rings = sum(bool(grid.result(entries)) for row in control for entries in row)
            chance = f", <b>{rings}</b> in the control"
        ring = (
            f'<span><i class="layers-ring"></i> a step {escape(grid.whose)}, or its result: '
            f"<b>{own}</b> of {total} cells{chance}</span>"
        )
    if any(grid.best(entries) == NONE for row in grid.cells for entries in row):
        ring += f"<span>{NONE} nothing stands out: several are equally good</span>"
    if grid.plain:
        kind = term("cosine") if grid.mode["score_name"] == "cosine" else escape(grid.mode["score_name"])
        fill = f"the fill is the {kind}, from 0 to 1"
    else:
        fill = "the fill is what is left of the score without the control's, from 0 to 1"
    named = grid.mode["control"]
    control = f"{term('control', 'Control')}: {escape(named)}." if named else "There is no control for this."
    name = escape(grid.mode["name"].capitalize())
    return (
        f'<p class="layers-what"><b>{name}.</b> {escape(grid.mode["what"])} {control}</p>'
        f'<p class="layers-legend"><span><i class="layers-ramp"></i> {fill}</span>{ring}</p>'
    )


def _table_of(grid: _Grid, chosen: tuple[int, int]) -> str:
    """The clickable grid: a table, so that a screen reader names layer and block with every cell."""
    layers, positions = grid.mode["layers"], grid.mode["positions"]
    firsts = [i for i, place in enumerate(positions) if i == 0 or positions[i - 1]["block"] != place["block"]]
    spans = [end - start for start, end in zip(firsts, [*firsts[1:], len(positions)], strict=True)]
    heads = "".join(
        f'<th colspan="{span}" scope="colgroup" class="s" data-link="block-{positions[start]["block"]}">'
        f"{'block ' if span > 1 or len(positions) <= 12 else ''}{positions[start]['block']}</th>"
        for start, span in zip(firsts, spans, strict=True)
    )
    slots = "".join(
        f'<th scope="col"{" class=s" if i in firsts else ""}>{escape(_head(place))}</th>'
        for i, place in enumerate(positions)
    )
    few = len(layers) * len(positions) <= MANY
    rows = []
    for row in reversed(range(len(layers))):
        cells = "".join(
            f"<td{' class=s' if column in firsts else ''}>{_cell(grid, row, column, (row, column) == chosen, few)}</td>"
            for column in range(len(positions))
        )
        rows.append(f'<tr><th scope="row">{layers[row]}</th>{cells}</tr>')
    width = "3.9rem" if len(positions) <= 12 or grid.mode["score_name"] == "cosine" else "1.9rem"
    return (
        '<div class="layers-scroll" tabindex="0" role="region" aria-label="Layers and memory positions">'
        f'<table class="layers-grid" data-grid style="--cell:{width};--columns:{len(positions)}"><thead>'
        f'<tr><th rowspan="2" scope="col" class="layers-corner">layer</th>{heads}</tr><tr>{slots}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
        f'<p class="layers-legend"><span>↑ the answer is read above layer {layers[-1]}</span>'
        f"<span>↓ layer {layers[0]}{': the memory tokens as they enter' if layers[0] == 0 else ''}</span>"
        "<span>arrow keys move, Enter chooses</span></p>"
    )


def _head(place: Mapping[str, Any]) -> str:
    return f"{place['position']} · step {place['step']}" if "step" in place else str(place["position"])


def _cell(grid: _Grid, row: int, column: int, chosen: bool, few: bool) -> str:
    """One cell in few characters, attributes without quotes where HTML allows it: a deep model has 700 of them."""
    place, entries = grid.mode["positions"][column], grid.cells[row][column]
    layer, rows = grid.mode["layers"][row], len(grid.mode["layers"])
    result, best = grid.result(entries), grid.best(entries)
    listed = "nothing stands out"
    if best != NONE:
        listed = " · ".join(f"{_shown(one['text'])}: {grid.score(one['score'])}" for one in entries[: 5 if few else 3])
    tip = f"layer {layer}, block {place['block']}, {_place(place)} · {listed}"
    if result:
        tip += f" ({result})"
    fill = min(max(entries[0]["score"], 0), 1) if entries else 0
    address = escape(json.dumps({"cell": f"{layer}.{_key(place)}"}, separators=(",", ":"))).replace("&quot;", '"')
    return (
        f"<button {'class=g ' if result else ''}data-cell={rows - 1 - row},{column} data-view='{address}' "
        f'data-tip="{escape(tip)}" style=--w:{fill:.2g} tabindex={0 if chosen else -1}'
        f"{' aria-current=true' if chosen else ''}>{escape(best)}</button>"
    )


# -------------------------------------------------------------------------------------------------------------- detail


def _detail(reading: Mapping[str, Any], grid: _Grid, chosen: tuple[int, int]) -> str:
    row, column = chosen
    place, layer = grid.mode["positions"][column], grid.mode["layers"][row]
    control = grid.mode["control_cells"]
    fitted = ""
    if place.get("fitted_layer") is not None:
        fitted = f" This block's map was fitted at layer {place['fitted_layer']}."
    lists = _bars(grid, grid.cells[row][column], "Read here" if grid.plain else "Read here, minus control", "memory")
    if control:
        as_read = _Grid(grid.mode, control, True, grid.results, grid.whose)
        lists += _bars(as_read, control[row][column], "The control reads", "soft")
    else:
        lists += '<div class="layers-list"><h4>The control reads</h4><p>There is no control for this mode.</p></div>'
    return (
        f'<section class="layers-detail" aria-label="The chosen cell"><h3>Layer {layer}, block {place["block"]}, '
        f"{escape(_place(place))}</h3><p>{escape(grid.mode['name'].capitalize())}.{fitted}</p>"
        f'<div class="layers-lists">{lists}{_operate(reading, layer, place["block"])}</div></section>'
    )


def _bars(grid: _Grid, entries: Sequence[Mapping[str, Any]], title: str, tone: str) -> str:
    rows = []
    for place, entry in enumerate(entries):
        result = grid.result(entries, place)
        share = min(max(entry["score"], 0), 1)
        rows.append(
            f'<li style="--w:{share:.3f}"><span{" class=g" if result else ""}>{escape(_shown(entry["text"]))}</span>'
            f"<i></i><b>{grid.score(entry['score'])}</b>{f'<small>{result}</small>' if result else ''}</li>"
        )
    return f'<div class="layers-list tone-{tone}"><h4>{title}</h4><ol>{"".join(rows)}</ol></div>'


def _operate(reading: Mapping[str, Any], layer: int, block: int) -> str:
    if layer >= reading["num_layers"]:
        return (
            '<div class="layers-operate"><h4>Does the answer depend on it?</h4><p>Nothing later reads the memory\'s '
            "states of the last layer, so to change them here changes no answer. Choose a lower layer.</p></div>"
        )
    row = "".join(
        f'<button type="button" {do("operate_cell", block=str(block), layer=str(layer), action=action)} '
        f'data-tip="{tip}">{label}</button>'
        for action, (label, tip) in ACTIONS.items()
    )
    return (
        '<div class="layers-operate"><h4>Does the answer depend on it?</h4>'
        f"<p>Change block {block} at layer {layer}, the whole of it, and see what the model answers then.</p>"
        '<div class="pic-choice" role="group" '
        f'aria-label="Change block {block} at layer {layer}">{row}</div></div>'
    )


# --------------------------------------------------------------------------------------------------------------- ranks


def _ranks(reading: Mapping[str, Any], rank: Mapping[str, Any] | None, view: Mapping[str, str]) -> str:
    """The rank of a step's result over depth: best of all blocks, the chosen cell's block, and the control."""
    if rank is None:
        return ""
    names = [str(layer) for layer in rank["layers"]]
    few = len(names) <= 14  # more do not fit beside each other on a telephone
    places = list(range(len(names)))
    block = int(view["cell"].split(".")[1])
    own = rank["by_block"][block - 1] if block <= len(rank["by_block"]) else None
    lines, keys = [], []
    if rank["control"]:
        tips = [f"layer {name}: the control has rank {at:g}" for name, at in zip(names, rank["control"], strict=True)]
        lines.append(ch.Line(places, rank["control"], "soft", dashed=True, tips=tips))
        keys.append(("dashes", "soft", f"control: {rank['control_name']}"))
    for at, tone, shape, name in (
        (own, "ink", "square", f"block {block}"),
        (rank["best"], "memory", "dot", "best of all blocks"),
    ):
        if at is not None:
            tips = [f"layer {layer}: {name} has rank {place:g}" for layer, place in zip(names, at, strict=True)]
            lines.append(ch.Line(places, at, tone, tips=tips, shape=shape))
            keys.insert(0, (shape, tone, name))
    every = [at for line in lines for at in line.y]
    title = f"Rank of {rank['value']} over depth"
    missing_control = "" if rank["control"] else f" Control: {escape(rank['control_name'])}."
    return (
        f'<h3>{escape(title)}</h3><p class="layers-legend">'
        f"<span>{escape(rank['value'])} is the {escape(rank['what'])}. "
        f"Rank 1: no other word is likelier there, by the {term('logit lens')}.{missing_control}</span></p>"
        f'<div class="pic-controls layers-values">{buttons(VIEW[3], reading, view)}</div>'
        + ch.chart(
            ch.named_axis([name if few or int(name) % 5 == 0 else "" for name in names], "layer"),
            ch.axis(every, f"rank of {rank['value']} (1 = top)", low=1, log=True, flipped=True),
            lines,
            f"{title}, beside its control",
        )
        + ch.legend(keys)
    )


def _data(grid: _Grid, ranks: Sequence[Mapping[str, Any]]) -> Table:
    """The grid, best reading by best reading, then the ranks."""
    rows: list[list[Any]] = []
    control = grid.mode["control_cells"]
    for row, column, place in grid.each():
        line: list[Any] = [grid.mode["layers"][row], place["block"], place["position"]]
        for cells in (grid.cells, control):
            best = cells[row][column][:1] if cells else []
            line += [_shown(best[0]["text"]), best[0]["score"]] if best else [None, None]
        rows.append(line)
    for rank in ranks:
        what = f"rank of {rank['value']} (step {rank['step']})"
        for at, layer in enumerate(rank["layers"]):
            against = rank["control"][at] if rank["control"] else None
            rows.append([layer, "best of all", what, rank["value"], rank["best"][at], rank["value"], against])
    score = grid.mode["score_name"] if grid.plain else f"{grid.mode['score_name']} minus control"
    return Table(["layer", "block", "position", "reading", score, "control's reading", "control's score"], rows)
