"""The heat map of what matters: how far the answer's probability falls when one block is taken away at one layer.

Knows the `importance` part of a reading. Does not know what is done with a cell that is pressed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rim_probe.pictures.parts import do, escape, percent, term
from rim_probe.pictures.surgery_words import unbroken

FULL = 1.0
"""Nats at which a cell has its full colour, if no cell reaches further: a weak map must not look like a strong one."""


def rows(importance: Mapping[str, Any]) -> list[list[Any]]:
    """[layer, block, change in nats, is the answer still said] of every cell."""
    return [
        [layer, block, importance["change"][i][j], importance["says"][i][j]]
        for i, layer in enumerate(importance["layers"])
        for j, block in enumerate(importance["blocks"])
    ]


def draw_map(importance: Mapping[str, Any]) -> str:
    """The map as HTML: a table of buttons, the first layer on top."""
    cells = rows(importance)
    if not cells:
        return ""
    blocks, layers = importance["blocks"], importance["layers"]
    answer = str(importance["answer"]).strip() or "an empty answer"
    clean = math.exp(importance["log_probability"])
    worst = min(cells, key=lambda cell: cell[2])
    most = max([FULL, *(abs(cell[2]) for cell in cells)])
    flips = sum(not cell[3] for cell in cells)
    head = "".join(f'<th scope="col"><span class="surgery-long">block </span>{block}</th>' for block in blocks)
    body = "".join(
        f'<tr><th scope="row"><span class="surgery-long">layer </span>{layer}</th>'
        + "".join(_cell(cells[i * len(blocks) + j], (i, j), answer, clean, most) for j in range(len(blocks)))
        + "</tr>"
        for i, layer in enumerate(layers)
    )
    told = (
        f"Removing one block's slots at one layer changes the answer in {flips} of {len(cells)} cells. "
        if flips
        else f"No single removal changes the answer ({len(cells)} cells). "
    ) + f"The hardest blow: block {worst[1]} at layer {worst[0]}, {_said(answer, clean, worst[2])}."
    return (
        '<section class="surgery-part"><h3>What matters for this answer</h3>'
        f'<p class="surgery-note">Change of the log probability of {escape(answer)} when one block is removed at one '
        f"{term('layer')}: its {term('slot', 'slots')}, and nothing else, are set to zero as they enter it. "
        f"{escape(unbroken(told))} Press a cell to blank the whole block there, its first and last token too, "
        "which can do more than the cell says.</p>"
        '<div class="surgery-map" data-grid><table><caption class="surgery-sr">Change of the log probability, layers '
        f"by blocks</caption><thead><tr><td></td>{head}</tr></thead><tbody>{body}</tbody></table></div>"
        f'<div class="surgery-scale" aria-hidden="true"><span>−{most:.1f}</span><i></i><span>+{most:.1f} nats</span>'
        "<b>≠</b><span>the answer is another one</span></div></section>"
    )


def _cell(cell: list[Any], place: tuple[int, int], answer: str, clean: float, most: float) -> str:
    layer, block, change, says = cell
    tip = f"Slots of block {block} removed at layer {layer}: {_said(answer, clean, change)}"
    tip += "." if says else "; the answer becomes another one."
    strength = round(100 * min(abs(change) / most, 1))
    kind = "less" if change < 0 else "more"
    return (
        f'<td><button type="button" class="surgery-cell {kind}{"" if says else " flips"}" style="--s:{strength}%" '
        f'data-cell="{place[0]},{place[1]}" tabindex="{0 if place == (0, 0) else -1}" data-tip="{escape(tip)}" '
        f'aria-label="{signed(change)}: {escape(tip)}" data-link="block-{block}" '
        f"{do('operate_cell', block=str(block), layer=str(layer), action='blank')}>{signed(change)}"
        + ("" if says else '<b aria-hidden="true">≠</b>')
        + "</button></td>"
    )


def _said(answer: str, clean: float, change: float) -> str:
    return (
        f"{answer} goes from {percent(clean)} to {percent(min(clean * math.exp(change), 1.0))} ({signed(change)} nats)"
    )


def signed(value: float) -> str:
    """ "−0.42", "+0.03", "0" where two digits show nothing."""
    text = f"{abs(value):.1f}" if abs(value) >= 9.95 else f"{abs(value):.2f}"
    if not text.strip("0."):
        return "0"
    return ("−" if value < 0 else "+") + text
