"""A run drawn as HTML: plain data in, a string out. Pure functions; every text of a visitor or a model is escaped here.

Knows the marks of the page. Does not know Gradio, models or sessions. Positions and sizes are percentages and CSS
variables, so the same string fits every width and both themes (`page.css`), and text keeps its size. The words come
from `app.words`, the time axis from `app.axis`, the examples from `app.gallery`.

Elements that appear at some time of a race carry `data-t` (seconds since the start of their own method), which
`stage.js` uses to play a finished race again in slow motion; elements with `data-tip` explain themselves on hover,
touch and by arrow keys.
"""

from __future__ import annotations

import base64
import json
import math
import re
from html import escape
from typing import TYPE_CHECKING, Any

from app.axis import REPLAY_SECONDS, axis, axis_end, longest
from app.gallery import example_button, gallery
from app.parts import at, shorten
from app.words import LONG_TEXT, NAMES, comparison_of, count, facts, format_time, settled_at, verdict, why
from rim_probe.plots.frame import Table, data_and_tools

if TYPE_CHECKING:
    from collections.abc import Sequence

    from app.runs import Run
    from rim_probe.problems import Problem

__all__ = ["count", "gallery", "model_state", "notice", "recorded_selector", "stage", "strip", "verdict"]

TITLES = {"memory": "Reasoning in memory", "cot": "Chain of thought", "direct": "Direct answer"}
LONG_QUESTION = 400  # characters; a longer one may scroll in its place


# ------------------------------------------------------------------------------------------------------------- stage


def stage(run: Run | None, recorded: bool = False, selector: str = "") -> str:
    """The whole race: whose run it is, the question, the verdict, all methods side by side, the time axis.

    Args:
        run: what to draw; it may be under way. None draws the empty stage.
        recorded: the run comes from a file, not from this server.
        selector: ready HTML that offers other recorded runs.
    """
    if run is None:
        words = "Ask a question, and both answers are drawn here as they happen."
        return f'<section class="stage empty"><p>{words}</p></section>'
    end, label = axis_end(run), f"Race. {verdict(run)}".strip()
    draw = {"memory": _memory_card, "cot": _cot_card, "direct": _direct_card}
    cards = "".join(draw[method](run) for method in run.lanes)
    scrolls = ' tabindex="0"' if len(run.question) > LONG_QUESTION else ""
    return (
        f'<section class="stage {run.status}" aria-label="{escape(label, quote=True)}" '
        f'data-panel="race" data-end="{longest(run):.6f}" data-axis="{end:.6f}" '
        f'data-replay="{REPLAY_SECONDS}">'
        f'<div class="top">{_provenance(run, recorded)}{selector}</div>'
        f'<blockquote class="asked"{scrolls}>{escape(run.question)}</blockquote>'
        f"{_outside_html(run)}"
        f"{_verdict_html(run)}"
        f'<div class="cards">{cards}</div>'
        f"{axis(run, end)}"
        f"{_why_html(run)}"
        f"{_footer(run)}"
        "</section>"
    )


def _provenance(run: Run, recorded: bool) -> str:
    if recorded:
        badge, words = "Recorded", f"{run.date[:10]} with {run.checkpoint} on {run.machine}. Press Run for a live one."
    else:
        words = f"{run.checkpoint} on {run.machine}" if run.machine else run.checkpoint
        badge = {
            "running": "Running",
            "stopped": "Stopped",
            "done": "Live",
            "loaded": "From a file",
        }[run.status]
    return f'<p class="provenance"><span class="badge">{badge}</span> {escape(words)}</p>'


def _outside_html(run: Run) -> str:
    return "" if run.outside is None else f'<p class="reason outside" role="note">{escape(run.outside)}</p>'


def _verdict_html(run: Run) -> str:
    parts = []
    for method, lane in run.lanes.items():
        if lane.answer is None:
            continue
        fact, comparison = facts(lane), comparison_of(run, method)
        mark = f", {_mark(lane.correct)}" if fact["mark"] else ""
        parts.append(
            f'<span class="says {method}"><b class="name">{NAMES[method]}:</b> '
            f"<b>{escape(shorten(fact['value'], 40))}</b>{mark}, {fact['time']}, {fact['work']}"
            + (f': <b class="factor">{comparison}</b>' if comparison else "")
            + ".</span>"
        )
    if not parts:
        line = "The clocks are at zero." if run.status == "running" else "Stopped before an answer."
        return f'<p class="verdict pending">{line}</p>'
    return f'<p class="verdict">{" ".join(parts)}</p>'


def _why_html(run: Run) -> str:
    told = why(run)
    return "" if told is None else f'<p class="reason"><b>{escape(told[0])}</b> {escape(told[1])}</p>'


def _mark(correct: bool | None) -> str:
    """Right or wrong in words and sign, never by colour alone."""
    if correct is None:
        return ""
    return '<span class="mark right">✓ right</span>' if correct else '<span class="mark wrong">✗ wrong</span>'


def _card(run: Run, method: str, how: str, body: str) -> str:
    lane = run.lanes[method]
    answer = lane.answer
    name = f' <abbr title="{TITLES[method]}">{NAMES[method]}</abbr>' if NAMES[method] not in TITLES[method] else ""
    if answer is None:
        # While CoT writes, RiM has long finished: the empty places say what is going on.
        state = "…" if lane.events else "–"
        big, mark, numbers = f'<span class="big pending">{state}</span>', "", ""
    else:
        fact = facts(lane)
        words = answer["value"] is None or answer["cancelled"]
        size = " long" if words or len(fact["value"]) > LONG_TEXT else ""
        big = f'<span class="big{size}">{escape(shorten(fact["value"], 60))}</span>'
        mark = _mark(lane.correct)
        if lane.correct is False:
            mark += f' <span class="gold">it is {escape(run.gold or "")}</span>'
        held = "KV cache" + (f", {run.num_blocks} readouts" if method == "memory" and run.num_blocks > 1 else "")
        first = "–" if answer["ttft_seconds"] is None else format_time(answer["ttft_seconds"])
        numbers = (
            '<dl class="numbers">'
            f"{_meter(run, method, 'time', 'time to the answer')}{_meter(run, method, 'memory', held)}"
            f'<div class="first"><dt>first token of the answer</dt><dd>{first}</dd></div></dl>'
        )
    return (
        f'<article class="card {method}"><header>'
        f"<h2>{TITLES[method]}{name}</h2>"
        f'<p class="how">{how}</p></header>'
        f'<p class="result"{at(lane.answered_seconds)}>{big} {mark}</p>{body}{numbers}</article>'
    )


def _meter(run: Run, method: str, what: str, label: str) -> str:
    """A number with a bar, full for the method that has most of it."""
    measured = {
        "time": lambda lane: (lane.answered_seconds, format_time(lane.answered_seconds)),
        "memory": lambda lane: (lane.answer["kv_cache_bytes"], _bytes(lane.answer["kv_cache_bytes"])),
    }[what]
    most = max(measured(lane)[0] for lane in run.lanes.values() if lane.answer is not None)
    value, words = measured(run.lanes[method])
    share = 100 * value / most if most else 0
    return (
        f'<div class="meter"><dt>{label}</dt><dd>{words}'
        f'<span class="bar" aria-hidden="true"><i style="width:{share:.1f}%"></i></span></dd></div>'
    )


def _memory_card(run: Run) -> str:
    blocks = count(run.num_blocks, "memory block")
    how = f"Reads {blocks}, then answers." if run.num_blocks else "Answers at once, without memory blocks."
    return _card(run, "memory", how, strip(run))


def _cot_card(run: Run) -> str:
    lane = run.lanes["cot"]
    tokens = [event for event in lane.events if event["kind"] == "token"]
    spans = "".join(
        f'<span data-t="{event["seconds"]:.6f}">{escape(event["text"])}</span>' for event in tokens if event["text"]
    )
    caret = '<span class="caret"></span>' if lane.answer is None and lane.events else ""
    body = f'<p class="written" tabindex="0" role="group" aria-label="What chain of thought wrote">{spans}{caret}</p>'
    how = "Writes every step down, then the answer."
    if not run.matched:
        how += " <em>This checkpoint has no CoT model of its own; its memory model is asked.</em>"
    return _card(run, "cot", how, body)


def _direct_card(run: Run) -> str:
    return _card(
        run, "direct", "Answers at once, with neither blocks nor steps: what the other two are compared with.", ""
    )


# ------------------------------------------------------------------------------------------------------------- strip


def strip(run: Run) -> str:
    """One cell per block: what its readout says, how sure it is, and whether that is right."""
    readouts = [event for event in run.lanes["memory"].events if event["kind"] == "readout"]
    if not run.num_blocks:
        return '<p class="strip-note">With no block there is nothing to refine.</p>'
    by_block = {readout["block"]: readout for readout in readouts}
    cells, previous = "", None
    for block in range(1, run.num_blocks + 1):
        readout = by_block.get(block)
        cells += _cell(block, readout, previous, run.gold)
        previous = readout
    note = ""
    if len(readouts) == run.num_blocks:
        readouts.sort(key=lambda readout: readout["block"])
        settled = settled_at(readouts)
        value = escape(shorten(readouts[-1]["value"] or "no answer", 24))
        if settled == 1:
            note = f"Every block gives {value}." if run.num_blocks > 1 else ""
        elif settled == run.num_blocks:
            note = f"The answer still changes at the last block, to {value}."
        else:
            note = f"The answer settles on {value} at block {settled} of {run.num_blocks}."
    across = run.num_blocks if run.num_blocks <= 8 else math.ceil(run.num_blocks / 2)
    return (
        f'<div class="strip-box"><ol class="strip" style="--across:{across};--across-narrow:{math.ceil(across / 2)}" '
        f'aria-label="What each memory block would answer, and how sure it is">{cells}</ol></div>'
        f'<p class="strip-note"{at(max((readout["seconds"] for readout in readouts), default=None))}>{note}</p>'
    )


def _cell(block: int, readout: dict[str, Any] | None, previous: dict[str, Any] | None, gold: str | None) -> str:
    if readout is None:
        return f'<li class="cell pending"><span class="k">{block}</span><span class="value">·</span></li>'
    value = readout["value"] or "–"
    percent = 100 * readout["probability"]
    sure = f"{percent:.0f} %" if percent >= 1 or not percent else "<1 %"
    classes, sign, said = "cell", "", ""
    if gold is not None:
        from rim_probe.problems import is_correct

        right = is_correct(readout["value"], gold)
        classes += " right" if right else " wrong"
        said = ", right" if right else ", wrong"
        sign = f'<span class="sign" aria-hidden="true">{"✓" if right else "✗"}</span>'
    if previous is not None and previous["value"] != readout["value"]:
        classes += " changed"
    size = " long" if len(value) > 4 else " mid" if len(value) > 2 else ""
    tip = escape(
        f"Block {block} says {shorten(readout['text'] or 'nothing', 80)}{said}, probability {sure}.", quote=True
    )
    return (
        f'<li class="{classes}" style="--p:{readout["probability"]:.4f}"{at(readout["seconds"])} data-tip="{tip}">'
        f'<span class="k"><span class="sr">Block </span>{block}</span>'
        f'<span class="value{size}">{escape(shorten(value, LONG_TEXT))}</span>'
        f'<span class="sure">{escape(sure)}</span>{sign}<span class="sr">{said}</span></li>'
    )


# ------------------------------------------------------------------------------------------------------- small parts


def _footer(run: Run) -> str:
    if run.status not in ("done", "stopped", "loaded"):
        return '<div class="actions"></div>'
    data = base64.b64encode(json.dumps(run.to_dict(whole=False), ensure_ascii=False, indent=1).encode()).decode()
    name = re.sub(r"[^\w.-]", "-", run.checkpoint)
    return (
        f'<div class="actions"><a class="download" download="rim-probe-race-{name}.json" '
        f'href="data:application/json;base64,{data}">Download this race (JSON)</a></div>'
        f"{data_and_tools(_moments(run), 'Race')}"
    )


def _moments(run: Run) -> Table:
    """Everything that happened in a race, with its time."""
    rows = [
        (
            NAMES[method],
            event["kind"],
            f"{event['seconds']:.6f}",
            event["text"],
            *map(event.get, ("block", "probability")),
        )
        for method, lane in run.lanes.items()
        for event in lane.events
    ]
    return Table(("method", "what", "seconds since its start", "text", "block", "probability"), rows)


def recorded_selector(runs: Sequence[Run], shown: int, labels: Sequence[str]) -> str:
    """Buttons that switch between recorded runs; nothing for a single one."""
    if len(runs) < 2:
        return ""
    buttons = "".join(
        f'<button type="button" data-recorded="{index}" aria-pressed="{"true" if index == shown else "false"}">'
        f"{escape(label)}</button>"
        for index, label in enumerate(labels)
    )
    return f'<p class="recordings"><span>Recorded runs:</span> {buttons}</p>'


def notice(sentence: str, example: Problem | None = None) -> str:
    """An error as a sentence in the page, with an example to go on with where one is known."""
    offer = f'<p class="offer">Try this one: {example_button(example)}</p>' if example is not None else ""
    return f'<div class="notice" role="alert"><p>{escape(sentence)}</p>{offer}</div>'


def model_state(sentence: str, state: str) -> str:
    """The line under the model picker; `state` is "ready" or "failed"."""
    role = "alert" if state == "failed" else "status"
    again = ' <button type="button" class="again" data-again>Try again</button>' if state == "failed" else ""
    return f'<p class="model-state {state}" role="{role}">{escape(sentence)}{again}</p>'


def _bytes(number: int) -> str:
    return f"{number / 1024:.0f} KB" if number < 1024**2 else f"{number / 1024**2:.1f} MB"
