"""Layers: what every layer holds at every memory position, and what one cell holds in full.

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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rim_probe.numbers import percent, signed
from rim_probe.plots.frame import Choice, Panel, Table, buttons, missing
from rim_probe.probing.matches import plain_step

TITLE = "Layers"
NONE = "·"
MANY = 400  # cells; above it a cell's line of text names three readings instead of five, to keep the page light


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


def draw(reading: Mapping[str, Any], *, mode: str, minus: str, cell: str, value: str) -> Panel:
    """The panel for one way of reading; `cell` is described in full, `value` is the step whose result is ranked."""
    view = {"mode": mode, "minus": minus, "cell": cell, "value": value}
    found = _depth(reading)
    shown = next((one for one in found.get("modes", ()) if one["name"] == mode and one["positions"]), None)
    if shown is None:
        why = "This run had no memory blocks (K = 0), so there are no layers of them to read."
        return missing("layers", TITLE, why if found else "The layers of this run were not read.", view)
    grid = Grid.of(reading, shown, minus == "on")
    notes = []
    if minus == "on" and grid.plain:
        named = shown["control"]
        why = f"its control ({named}) has no scores to subtract" if named else "it has no control"
        notes.append(f"Minus control is not shown: {why} in the mode “{mode}”.")
    rank = next((one for one in found.get("ranks", ()) if str(one["step"]) == value), None)
    if rank is None:
        notes.append("No step of this question is known, so there is no value to follow over depth.")
    row, column = grid.nearest(cell)
    place, layer, control = shown["positions"][column], shown["layers"][row], shown["control_cells"]
    here = [("Read here" if grid.plain else "Read here, minus control", "memory", grid.bars(grid.cells[row][column]))]
    if control:
        as_read = Grid(shown, control, True, grid.results, grid.whose)
        here.append(("The control reads", "soft", as_read.bars(control[row][column])))
    data = {
        "mode": shown,
        "plain": grid.plain,
        "whose": grid.whose,
        "rings": grid.rings(grid.cells),
        "chance": grid.rings(control) if control and grid.plain else None,
        "number": sum(map(len, grid.cells)),
        "heads": _heads(shown["positions"]),
        "rows": [grid.row(i, (row, column)) for i in reversed(range(len(shown["layers"])))],
        "width": "3.9rem" if len(shown["positions"]) <= 12 or shown["score_name"] == "cosine" else "1.9rem",
        "chosen": {
            "layer": layer,
            "block": place["block"],
            "place": _place(place),
            "fitted": place.get("fitted_layer"),
        },
        "lists": here,
        "last": layer >= reading["num_layers"],
        "rank": rank,
        "ranked": buttons(VIEW[3], reading, view),
    }
    figures = {"rank": rank_figure(rank, int(view["cell"].split(".")[1]))} if rank else {}
    controls = [buttons(choice, reading, view) for choice in VIEW[:2]]
    return Panel("layers", TITLE, data, _data(grid, found.get("ranks", ())), view, figures, controls, notes)


@dataclass(frozen=True)
class Grid:
    """One mode, ready to draw; L layers and P positions.

    Attributes:
        mode: as the reading has it.
        cells [L][P]: entries {"text", "score"}, best first; differences to the control unless `plain`.
        plain: scores as read.
        results: the text of a known step or its result -> what it is, "the result of step 2".
        whose: which steps these are; empty where none are known.
    """

    mode: Mapping[str, Any]
    cells: Sequence[Sequence[Sequence[Mapping[str, Any]]]]
    plain: bool
    results: Mapping[str, str]
    whose: str

    @classmethod
    def of(cls, reading: Mapping[str, Any], mode: Mapping[str, Any], minus: bool) -> Grid:
        """The grid of one mode of a reading; `minus`: of its differences to the control, where it has them."""
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

    def result(self, entries: Sequence[Mapping[str, Any]], place: int = 0) -> str:
        """What a reading is, where it stands out and is a known step or its result; else empty."""
        if place >= len(entries) or _tied(entries, place):
            return ""
        return self.results.get(plain_step(entries[place]["text"]), "")

    def rings(self, cells: Sequence[Sequence[Sequence[Mapping[str, Any]]]]) -> int:
        """How many cells read a known step or its result."""
        return sum(bool(self.result(entries)) for row in cells for entries in row)

    def score(self, score: float) -> str:
        """A score as this mode writes it."""
        if not self.plain:
            return signed(score)
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

    def row(self, row: int, chosen: tuple[int, int]) -> tuple[int, list[dict[str, Any]]]:
        """A layer and its cells. A dot stands where several are equally good, since their order is no finding."""
        layer, few = self.mode["layers"][row], sum(map(len, self.cells)) <= MANY
        cells = []
        for column, (place, entries) in enumerate(zip(self.mode["positions"], self.cells[row], strict=True)):
            best = NONE if not entries or _tied(entries, 0) else _shown(entries[0]["text"])
            listed = [f"{_shown(one['text'])}: {self.score(one['score'])}" for one in entries[: 5 if few else 3]]
            tip = f"layer {layer}, block {place['block']}, {_place(place)} · "
            tip += "nothing stands out" if best == NONE else " · ".join(listed)
            result = self.result(entries)
            cells.append(
                {
                    "text": best,
                    "tip": tip + (f" ({result})" if result else ""),
                    "ring": bool(result),
                    "fill": f"{min(max(entries[0]['score'], 0), 1) if entries else 0:.2g}",
                    "view": {"cell": f"{layer}.{_key(place)}"},
                    "at": f"{len(self.cells) - 1 - row},{column}",
                    "on": (row, column) == chosen,
                    "first": not column or self.mode["positions"][column - 1]["block"] != place["block"],
                }
            )
        return layer, cells

    def bars(self, entries: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """One cell in full."""
        return [
            {
                "text": _shown(one["text"]),
                "result": self.result(entries, i),
                "share": min(max(one["score"], 0), 1),
                "score": self.score(one["score"]),
            }
            for i, one in enumerate(entries)
        ]


def _heads(positions: Sequence[Mapping[str, Any]]) -> list[tuple[int, list[str]]]:
    """Each block with the names of its positions."""
    heads: dict[int, list[str]] = {}
    for place in positions:
        step = f" · step {place['step']}" if "step" in place else ""
        heads.setdefault(place["block"], []).append(f"{place['position']}{step}")
    return list(heads.items())


def _tied(entries: Sequence[Mapping[str, Any]], place: int) -> bool:
    return sum(entry["score"] == entries[place]["score"] for entry in entries) > 1


def _key(place: Mapping[str, Any]) -> str:
    return f"{place['block']}.{place['position']}"


def _place(place: Mapping[str, Any]) -> str:
    return place["position"] if isinstance(place["position"], str) else f"slot {place['position']}"


def _shown(text: str) -> str:
    """A step without its marks; a token that is itself a mark, or only a space, stays visible."""
    return plain_step(text) or text.strip() or "␣"


def rank_figure(rank: Mapping[str, Any], block: int) -> Any:
    """The rank of a step's result over depth: best of all blocks, one block, and the control (a plotly Figure)."""
    from rim_probe.plots import theme

    lines: list[tuple[str, Sequence[float], str, dict[str, Any]]] = [("best of all blocks", rank["best"], "memory", {})]
    if block <= len(rank["by_block"]):
        lines.append((f"block {block}", rank["by_block"][block - 1], "ink", {"symbol": "square"}))
    if rank["control"]:
        control = {"control": True, "dash": "dot", "symbol": "circle-open"}
        lines.append((f"control: {rank['control_name']}", rank["control"], "soft", control))
    traces = []
    for name, ranks, tone, look in lines:
        texts = [
            theme.hover(f"layer {layer}: {name} has rank {at:g}")
            for layer, at in zip(rank["layers"], ranks, strict=True)
        ]
        traces += theme.line(name, rank["layers"], ranks, None, None, tone, texts, **look)
    y = {"title": f"rank of {rank['value']} (1 = top)", "type": "log", "autorange": "reversed", "dtick": 1}
    return theme.figure(traces, {"title": "layer", "dtick": 1 if len(rank["layers"]) <= 14 else 5}, y, 330)


def _data(grid: Grid, ranks: Sequence[Mapping[str, Any]]) -> Table:
    """The grid, best reading by best reading, then the ranks."""
    rows: list[list[Any]] = []
    for row in reversed(range(len(grid.cells))):
        for column, place in enumerate(grid.mode["positions"]):
            line: list[Any] = [grid.mode["layers"][row], place["block"], place["position"]]
            for cells in (grid.cells, grid.mode["control_cells"]):
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
