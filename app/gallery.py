"""The examples beside the question box as HTML: by number of steps, and by what came of them when they were recorded.

Pure functions; every text is escaped. Does not know where examples come from.
"""

from __future__ import annotations

import json
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rim_probe.outcomes import Outcomes
    from rim_probe.problems import Problem


def gallery(examples: Sequence[Problem], outcomes: Outcomes | None = None, shown_per_depth: int = 3) -> str:
    """A row of depths and one of outcomes to choose from, and the questions of the chosen one; `stage.js` switches."""
    if not examples:
        return ""
    depths: dict[int, list[Problem]] = {}
    for problem in examples:
        depths.setdefault(len(problem.steps), []).append(problem)
    chosen = sorted(depths)[len(depths) // 2]
    choices = lists = ""
    for depth in sorted(depths):
        more = f'<span class="sr"> step{"" if depth == 1 else "s"}</span>'
        choices += _choice(str(depth), f"{depth}{more}", depth == chosen)
        lists += _list(str(depth), depths[depth][:shown_per_depth], depth == chosen)
    if outcomes is not None:
        offered = [name for name in outcomes.examples if outcomes.examples[name]]
        if offered:
            row = "".join(_choice(name, escape(name), False) for name in offered)
            choices += f'</div><p class="or">or by outcome:</p><div class="depths">{row}'
        for name in offered:
            lists += _list(name, outcomes.examples[name], False) + _source(name, outcomes)
    return (
        '<section class="gallery" aria-label="Examples"><fieldset><legend>Examples, by number of steps</legend>'
        f'<div class="depths">{choices}</div></fieldset>{lists}<p class="hint">Picking one runs it.</p></section>'
    )


def example_button(problem: Problem) -> str:
    steps = json.dumps(problem.steps, ensure_ascii=False)
    return (
        f'<button type="button" class="example" data-question="{escape(problem.question, quote=True)}" '
        f'data-answer="{escape(problem.answer, quote=True)}" data-steps="{escape(steps, quote=True)}">'
        f"<span>{escape(problem.question)}</span></button>"
    )


def _choice(value: str, label: str, checked: bool) -> str:
    return (
        f'<label><input type="radio" name="depth" value="{escape(value, quote=True)}"{" checked" if checked else ""}>'
        f"<span>{label}</span></label>"
    )


def _list(value: str, problems: Sequence[Problem], shown: bool) -> str:
    items = "".join(f"<li>{example_button(problem)}</li>" for problem in problems)
    return f'<ul data-depth="{escape(value, quote=True)}"{"" if shown else " hidden"}>{items}</ul>'


def _source(outcome: str, outcomes: Outcomes) -> str:
    """What the outcome is, and of how many: it was so when it was recorded, and is asked anew when it is picked."""
    number = outcomes.counts[outcome]
    words = (
        f"When recorded ({outcomes.date}): {outcome}, as {number} of {outcomes.n} problems of {outcomes.data} "
        f"({100 * number / outcomes.n:.0f} %)."
    )
    return f'<p class="hint" data-depth="{escape(outcome, quote=True)}" hidden>{escape(words)}</p>'
