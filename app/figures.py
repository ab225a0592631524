"""A run drawn as HTML: plain data in, a string out. Every text of a visitor or a model is escaped by Jinja2.

Knows the marks of the page (`app/templates`). Does not know Gradio, models or sessions. Positions and sizes are
percentages and CSS variables, so the same string fits every width and both themes (`page.css`). The words come from
`app.words`, the clock from `app.axis`.

Elements that appear at some time of a race carry `data-t` (seconds since the start of their own method), which
`stage.js` uses to play a finished race in slow motion; elements with `data-tip` explain themselves on hover, touch and
by arrow keys.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup

from app.axis import REPLAY_SECONDS, TIMING_NOTE, axis_end, longest, ticks, track
from app.words import LONG_TEXT, NAMES, count, facts, format_time, median, settled_at, timing, told, verdict, why
from rim_probe.plots.frame import Table, data_and_tools
from rim_probe.probing.matches import on_the_way, spelled, spelled_characters, thought
from rim_probe.problems import ANSWER_MARKER, is_correct

if TYPE_CHECKING:
    from app.runs import Lane, Run
    from rim_probe.problems import Problem

__all__ = ["count", "headline", "model_state", "notice", "recorded_selector", "render", "stage", "verdict"]

TITLES = {"memory": "Reasoning in memory", "cot": "Chain of thought", "direct": "Direct answer"}
BADGES = {"running": "Running", "stopped": "Stopped", "done": "Live", "loaded": "From a file"}
_drawn = itertools.count()  # by which the page's script tells another race from the same one drawn anew
_templates = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True, trim_blocks=True, lstrip_blocks=True
)
_templates.globals |= {"note": TIMING_NOTE, "count": count, "time": format_time}


def render(template: str, **data: Any) -> str:
    """A file of the folder `templates`, filled in."""
    return _templates.get_template(template).render(**data)


def shorten(text: str, length: int) -> str:
    """The text, cut to a length."""
    return text if len(text) <= length else text[: length - 1] + "…"


# ------------------------------------------------------------------------------------------------------------- stage


def stage(run: Run | None, recorded: bool = False, selector: str = "") -> str:
    """The race as one picture of the mechanism: the question, a lane for each method, one clock, the costs.

    Args:
        run: what to draw; it may be under way. None draws the empty stage.
        recorded: the run comes from a file, not from this server.
        selector: ready HTML that offers other recorded runs.
    """
    if run is None:
        return render("stage.html", run=None)
    end = axis_end(run)
    return render(
        "stage.html",
        run=run,
        number=next(_drawn),
        label=f"Race. {verdict(run)}".strip(),
        end=longest(run),
        axis=end,
        seconds=REPLAY_SECONDS,
        slower=REPLAY_SECONDS / longest(run) if longest(run) and run.status in ("done", "loaded") else 0,
        badge="Recorded" if recorded else BADGES[run.status],
        recorded=recorded,
        selector=selector,
        words=re.split(r"(\d[\d.,]*)", run.question),
        lanes=[_lane(run, method, end) for method in run.lanes],
        ticks=ticks(end),
        costs=_costs(run),
        why=why(run),
        data=data_and_tools(_moments(run), "Race", caption(run)) if run.status != "running" else "",
    )


def caption(run: Run) -> str:
    """What stands under a figure that is taken away."""
    from rim_probe.plots.frame import caption

    return caption(run.checkpoint, run.num_blocks, run.question)


def _lane(run: Run, method: str, end: float) -> dict[str, Any]:
    """A method as the template shows it: how it goes, what it read or wrote, its answer, its marks on the clock."""
    lane = run.lanes[method]
    own = {"memory": _memory, "cot": _written, "direct": lambda run, lane: {}}[method](run, lane)
    answer = None
    if lane.answer is not None:
        fact = facts(lane)
        plain = lane.answer["value"] is not None and not lane.answer["cancelled"] and len(fact["value"]) <= LONG_TEXT
        answer = {"value": shorten(fact["value"], 60), "size": "" if plain else "long", "time": fact["time"]}
    return {
        "method": method,
        "title": TITLES[method],
        "name": NAMES[method],
        "answer": answer,
        "correct": lane.correct,
        "finished": lane.answer is not None and not lane.answer["cancelled"],
        "at": lane.answered_seconds,
        **own,
        **track(method, lane, run, end),
    }


def _memory(run: Run, lane: Lane) -> dict[str, Any]:
    """The memory blocks: one cell each, with what its readout says."""
    readouts = {event["block"]: event for event in lane.events if event["kind"] == "readout"}
    steps = known_steps(run)
    cells = [_cell(run, block, readouts.get(block), steps) for block in range(1, run.num_blocks + 1)]
    note = ""
    if len(readouts) == run.num_blocks and run.num_blocks:
        ordered = [readouts[block] for block in sorted(readouts)]
        settled, value = settled_at(ordered), shorten(ordered[-1]["value"] or "no answer", 24)
        note = (
            f"Every block says {value}."
            if settled == 1
            else f"The answer changes until the last block, to {value}."
            if settled == run.num_blocks
            else f"The answer settles on {value} at block {settled} of {run.num_blocks}."
        )
    how = f"reads {count(run.num_blocks, 'memory block')} after the question" if run.num_blocks else "has no block here"
    return {"how": how, "cells": cells, "settled": note}


def known_steps(run: Run) -> list[str]:
    """The steps of the solution, where they are known, else those that chain of thought wrote."""
    return list(run.steps) or re.findall(r"<<.+?>>", (run.lanes["cot"].answer or {}).get("text", ""))


def _cell(run: Run, block: int, readout: dict[str, Any] | None, steps: Sequence[str]) -> dict[str, Any]:
    if readout is None:
        return {"block": block, "value": None}
    value, share = readout["value"], 100 * readout["probability"]
    sure = f"{share:.0f} %" if share >= 1 or not share else "<1 %"
    step = on_the_way(readout, steps)
    kind, sign, meaning = "", "", ""
    if run.gold is not None and is_correct(value, run.gold):
        kind, sign = "right", _sign("✓", " right")
    elif block == run.num_blocks:  # only the last block's is the answer
        kind, sign = ("wrong", _sign("✗", " wrong")) if run.gold is not None else ("", _sign("", "the answer"))
    elif step is not None and (step < len(steps) or value is None):
        kind, sign = "way", _sign(f"step {step}", before="on the way: ")
        meaning = f", the result of step {step} ({spelled(steps[step - 1])})"
    tip = f"Block {block} says {shorten(_read_aloud(readout['text']), 80)}{meaning}, probability {sure}."
    shown = thought(readout) or "–"
    size = "long" if len(shown) > 4 else "mid" if len(shown) > 2 else ""
    cell = {"block": block, "value": shorten(shown, LONG_TEXT), "size": size, "kind": kind, "sign": sign, "tip": tip}
    return cell | {"share": f"{readout['probability']:.4f}", "at": readout["seconds"]}


def _read_aloud(text: str) -> str:
    """What a model wrote, its steps as a reader writes them."""
    return re.sub(r"<<(.*?)>>", lambda step: spelled(step[1]), text.strip()) or "nothing"


def _sign(short: str, after: str = "", before: str = "") -> Markup:
    """A sign of which a narrow screen shows the short part alone."""
    wide = '<span class="wide">{}</span>'
    return Markup(wide + "{}" + wide).format(before, short, after)


def _written(run: Run, lane: Lane) -> dict[str, Any]:
    """What chain of thought wrote: its steps, a line each, in pieces that appear with their tokens; the raw text."""
    tokens = [event for event in lane.events if event["kind"] == "token"]
    text = "".join(event["text"] for event in tokens)
    times = [event["seconds"] for event in tokens for _ in event["text"]]
    spans = [match.span(1) for match in re.finditer(r"<<(.*?)(?:>>|\Z)", text, re.S)]
    if not spans:  # a chain in prose
        spans = [match.span() for match in re.finditer(r"[^\n]+", text.partition(ANSWER_MARKER.strip())[0])]
    steps = []
    for start, stop in spans:
        pieces = zip(spelled_characters(text[start:stop]), times[start:stop], strict=True)
        grouped = itertools.groupby(pieces, key=lambda piece: piece[1])
        steps.append([("".join(char for char, _ in group), at) for at, group in grouped])
    how = "writes every step, then the answer"
    if not run.matched:
        how += "; this checkpoint has no CoT model of its own, so its memory model is asked"
    return {"how": how, "steps": steps, "raw": text, "writing": lane.answer is None and bool(lane.events)}


def _costs(run: Run) -> list[dict[str, Any]]:
    """What each method took, a row each."""
    rows = []
    for method, lane in run.lanes.items():
        answer = lane.answer
        if answer is None:
            continue
        held = f"{answer['kv_cache_bytes'] / 1024:,.0f} KB"
        if method == "memory" and run.num_blocks > 1:
            held += f" (with the readouts of all {run.num_blocks} blocks)"
        first = "–" if answer["ttft_seconds"] is None else format_time(answer["ttft_seconds"])
        repeats = f"{format_time(median(lane))} ({timing(lane)})" if lane.repeats else "–"
        row = [NAMES[method], format_time(lane.answered_seconds), repeats, first, facts(lane)["work"], held]
        rows.append({"method": method, "cells": row})
    return rows


def _moments(run: Run) -> Table:
    """Everything that happened in a race, with its time."""
    rows = [
        (
            NAMES[method],
            event["kind"],
            f"{event['seconds']:.6f}",
            event["text"],
            event.get("block"),
            event.get("probability"),
        )
        for method, lane in run.lanes.items()
        for event in lane.events
    ]
    return Table(("method", "what", "seconds since its start", "text", "block", "probability"), rows)


# ---------------------------------------------------------------------------------------------------------- small parts


def headline(run: Run | None, timing: bool = False) -> str:
    """The result in plain words; `timing`: repeats are being timed, so the comparison of times is still to come."""
    return render("headline.html", run=run, said=told(run) if run else None, timing=timing)


def recorded_selector(runs: Sequence[Run], shown: int, labels: Sequence[str]) -> str:
    """Buttons that switch between recorded runs; nothing for a single one."""
    return render("recordings.html", labels=labels, shown=shown) if len(runs) > 1 else ""


def notice(sentence: str, examples: Iterable[Problem] = (), models: Iterable[str] = (), warning: bool = False) -> str:
    """A sentence in the page: an error, with questions and models to go on with, or a warning before an answer."""
    offered = [
        (json.dumps({"question": p.question, "answer": p.answer, "steps": p.steps}), p.question) for p in examples
    ]
    return render("notice.html", sentence=sentence, offered=offered, models=models, warning=warning)


def model_state(sentence: str, state: str, about: str = "", other: str = "") -> str:
    """The lines under the model picker; `state` is "ready", "loading" or "failed", `other` a model to take instead."""
    return render("model.html", sentence=sentence, state=state, about=about, other=other)
