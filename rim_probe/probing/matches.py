"""Matches: which explicit step the decode of each memory block equals, and which block claims which step.

A match is a match of texts. Knows what `probing.steps` says of one question, its chain and its known solution. Does not
know whether a decode is true, nor how it is drawn. Imports nothing heavy.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


def plain_step(step: str) -> str:
    """ "3+4=7" of "<<3+4=7>>": the marks of the data format mean nothing to a reader."""
    return step.replace("<<", "").replace(">>", "").strip()


_SIGNS = {"*": "×", "/": "÷", "-": "−"}
_OPERATOR = re.compile(r"(?<=[\w.)%])\s*([-+*/=])\s*(?=[\w.($-])")


def spelled_characters(step: str) -> list[str]:
    """What a reader sees for each character of a step (without `<<` and `>>`): `*` becomes " × "."""
    shown = list(step)
    for operator in _OPERATOR.finditer(step):
        shown[operator.start() : operator.end()] = [""] * len(operator[0])
        shown[operator.start(1)] = f" {_SIGNS.get(operator[1], operator[1])} "
    return shown


def spelled(step: str) -> str:
    """ "3 × 4 = 12" of "<<3*4=12>>"."""
    return "".join(spelled_characters(plain_step(step)))


def thought(readout: Mapping[str, Any]) -> str | None:
    """What a readout (`text`, `value`) came to: its answer, or the result of the step that it states instead."""
    if readout["value"] is not None:
        return readout["value"]
    stated = re.search(r"<<[^<>]*=([^<>=]+)>>", readout["text"])
    return stated[1].strip() if stated else None


def on_the_way(readout: Mapping[str, Any], steps: Sequence[str]) -> int | None:
    """The first step (1-based) whose result a readout came to; None where none is."""
    results = [plain_step(step).rpartition("=")[2].strip() for step in steps]
    value = thought(readout)
    return results.index(value) + 1 if value is not None and value in results else None


@dataclass(frozen=True)
class Explicit:
    """A step, whether CoT wrote it, and which step of the known solution it is (0: none, None: no solution known)."""

    text: str
    written: bool
    gold: int | None


@dataclass(frozen=True)
class Decode:
    """What one block is read as.

    Attributes:
        index: which step of a solution its map was fitted for; accuracy: how often that map was right elsewhere, for
            problems whose step is among those it knows; coverage: for which share of problems it is, where measured.
        nearest: (text, cosine), best first.
        row: the place in `explicit_steps` of the one that equals the nearest, None where none does.
        gold: which step of the known solution it equals: 0 for none, None where none is known.
    """

    index: int
    accuracy: float
    nearest: list[tuple[str, float]]
    row: int | None
    gold: int | None
    coverage: float | None = None

    @property
    def right(self) -> float:
        """How often its map was right elsewhere, steps that it does not know counted as missed where that is known."""
        return self.accuracy if self.coverage is None else self.accuracy * self.coverage

    @property
    def exact(self) -> bool:
        """Is it the step it was read for (of the solution; of the chain where no solution is known)?"""
        return self.row is not None and (self.row + 1 if self.gold is None else self.gold) == self.index


def explicit_steps(reading: Mapping[str, Any]) -> list[Explicit]:
    """The steps of the chain, then those of the known solution that it lacks."""
    gold = [plain_step(step) for step in reading.get("steps") or ()]
    written = [plain_step(step) for step in (reading.get("chain") or {}).get("steps") or ()]
    places = _places(written, gold)
    rows = [Explicit(text, True, place if gold else None) for text, place in zip(written, places, strict=True)]
    return rows + [Explicit(text, False, t) for t, text in enumerate(gold, start=1) if t not in places]


def decodes(reading: Mapping[str, Any], step: str = "own") -> dict[int, Decode]:
    """What each block is read as; `step` is its own nearest index or one index for all blocks."""
    rows, found = explicit_steps(reading), {}
    for block in reading["probes"].get("steps", {}).get("blocks", []):
        choices = [block, *block.get("others", ())]
        one = block if step == "own" else next((one for one in choices if str(one["step"]) == step), None)
        if one is None or not one["nearest"]:
            continue
        nearest = [(plain_step(near["step"]), near["cosine"]) for near in one["nearest"]]
        equal = [i for i, row in enumerate(rows) if row.text == nearest[0][0]]
        # Of two equal steps the one it was read for.
        row = min(equal, key=lambda i: (rows[i].gold or i + 1) != one["step"], default=None)
        gold = one["nearest"][0].get("gold")
        if gold and row is not None and rows[row].gold:
            gold = rows[row].gold
        found[block["block"]] = Decode(one["step"], one["accuracy"], nearest, row, gold, one.get("coverage"))
    return found


def claims(reading: Mapping[str, Any]) -> dict[int, int]:
    """Block -> the known step (1-based) that it was read for and is read as: what can be put to the test. A block that
    is read as something else claims nothing."""
    return {block: one.index for block, one in decodes(reading).items() if one.exact}


def _places(written: Sequence[str], gold: Sequence[str]) -> list[int]:
    """Which step of the solution (1-based) each written one is, 0 for none; each is taken once."""
    free, places = dict(enumerate(gold, start=1)), []
    for text in written:
        place = next((t for t, step in free.items() if step == text), 0)
        free.pop(place, None)
        places.append(place)
    return places
