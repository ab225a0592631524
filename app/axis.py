"""The time axis of a race as HTML: what every method did when, on one clock.

Knows the marks of the axis. Does not know the rest of the stage (`app.figures`). Positions are percentages, so the same
string fits every width.
"""

from __future__ import annotations

import math
from html import escape
from typing import TYPE_CHECKING

from app.parts import at, shorten
from app.words import LONG_TEXT, NAMES, count, facts, format_time

if TYPE_CHECKING:
    from app.runs import Lane, Run

REPLAY_SECONDS = 6  # long enough to follow the tokens, short enough to wait for
TIMING_NOTE = (
    "All answers are computed for real, one after the other in the same process, so that none slows another "
    "down. Each clock starts with its own method, before the question is split into tokens, stands still while this "
    "page is drawn, and stops with the last token of the answer; here all are drawn from zero. "
    "RiM also reads what its other blocks would have said; what that takes after its answer is drawn pale and not "
    "counted. The KV cache is what a method holds in memory at its end; RiM's includes the readouts of all its blocks."
)


def axis_end(run: Run) -> float:
    """The last second of the time axis: the longest time so far, rounded up to a calm number."""
    least = max(longest(run) * 1.04, 0.01)
    unit = 10 ** math.floor(math.log10(least))
    return next(step * unit for step in (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10) if step * unit >= least)


def longest(run: Run) -> float:
    """The last second of a race, in its slowest lane."""
    times = [event["seconds"] for lane in run.lanes.values() for event in lane.events]
    times += [lane.answer["total_seconds"] for lane in run.lanes.values() if lane.answer is not None]
    return max(times, default=0.0)


def axis(run: Run, end: float) -> str:
    """One track per method over one clock, with the button that plays the race again."""
    lanes = "".join(_track(method, lane, run, end) for method, lane in run.lanes.items())
    step = end / next(n for n in (4, 5, 3, 6) if _is_round(end / n))
    rest = _key("rest", "only for the strip: what the other blocks would say") if 'class="rest"' in lanes else ""
    ticks, at = "", 0.0
    while at <= end * 1.0001:
        edge = " first" if at == 0 else " last" if at >= end * 0.9999 else ""
        ticks += f'<span class="tick{edge}" style="left:{_percent(at, end)}"><i></i>{format_tick(at, end)}</span>'
        at += step
    return (
        '<figure class="axis"><figcaption><h2>The same clock</h2>'
        f'<span class="why" tabindex="0" role="note" aria-label="{escape(TIMING_NOTE, quote=True)}">how it is timed'
        f'<span class="tooltip" aria-hidden="true">{escape(TIMING_NOTE)}</span></span>{_replay(run)}</figcaption>'
        f'<div class="tracks">{lanes}<div class="clock"><div class="playhead" hidden></div></div></div>'
        f'<div class="ticks" aria-hidden="true">{ticks}</div>'
        '<p class="legend" aria-hidden="true">'
        f"{_key('prefill', 'reads the prompt, one pass')}{_key('token', 'one token')}"
        f"{_key('start', 'the answer itself begins')}"
        f"{rest}</p>"
        '<p class="tip" aria-live="polite">Point at a mark, or use the arrow keys on a track, to read its time. '
        "One run is one measurement; Evidence has the medians of many.</p>"
        "</figure>"
    )


def _key(mark: str, meaning: str) -> str:
    return f'<span class="item"><span class="key {mark}"></span>{meaning}</span>'


def _track(method: str, lane: Lane, run: Run, end: float) -> str:
    name = NAMES[method]
    marks, flag, before, number = "", "", 0.0, 0
    for event in lane.events:
        if event["kind"] == "prefill":
            what = "the question" + (
                f" and {count(run.num_blocks, 'memory block')}" if method == "memory" and run.num_blocks else ""
            )
            tip = f"{name} reads {what} in one pass: {format_time(event['seconds'])}."
            marks += _segment("prefill", before, event["seconds"], end, tip)
            before = event["seconds"]
        elif event["kind"] == "token":
            number += 1
            said = f"“{event['text']}”" if event["text"].strip() else "the end mark" if not event["text"] else "a space"
            tip = f"{name} token {number}, {said}, at {format_time(event['seconds'])}."
            marks += _segment("token", before, event["seconds"], end, tip)
            before = event["seconds"]
    answer, summary = lane.answer, f"{name}: no event yet."
    if answer is not None:
        fact = facts(lane)
        summary = f"{name}: {', '.join(part for part in fact.values() if part)}."
        first = answer["ttft_seconds"]
        if first is not None:
            marks += (
                f'<span class="start" style="left:{_percent(first, end)}" data-t="{first:.6f}" '
                f'data-tip="{name}: the first token of the answer itself, at {format_time(first)}."></span>'
            )
        total = answer["total_seconds"]
        if method == "memory" and total > before and not answer["cancelled"]:
            tip = (
                f"{name} has answered; here it still reads what the other blocks would say, until {format_time(total)}."
            )
            marks += _segment("rest", before, total, end, tip)
        sign = {True: " ✓", False: " ✗", None: ""}[lane.correct]
        flag = (
            f'<span class="flag" aria-hidden="true"{at(lane.answered_seconds)}>'
            f"<b>{escape(shorten(fact['value'], LONG_TEXT))}{sign}</b> {fact['time']}</span>"
        )
    return (
        f'<div class="track {method}" tabindex="0" role="group" '
        f'aria-label="{escape(summary, quote=True)} Use the arrow keys to step through its marks.">'
        f'<span class="who" aria-hidden="true">{name}</span><div class="rail">{marks}</div>{flag}</div>'
    )


def _segment(kind: str, start: float, stop: float, end: float, tip: str) -> str:
    return (
        f'<span class="{kind}" style="left:{_percent(start, end)};width:{_percent(stop - start, end)}" '
        f'data-t="{stop:.6f}" data-tip="{escape(tip, quote=True)}"></span>'
    )


def format_tick(seconds: float, end: float) -> str:
    """A tick of an axis that ends at `end`: the unit stands once, at the end."""
    scale, unit = (1000, "ms") if end < 1 else (1, "s")
    label = f"{seconds * scale:.4g}"
    return f"{label} {unit}" if seconds >= end * 0.9999 else label


def _is_round(step: float) -> bool:
    figure = step / 10 ** math.floor(math.log10(step) + 1e-9)
    return any(math.isclose(figure, nice) for nice in (1, 1.5, 2, 2.5, 3, 4, 5, 6))


def _percent(value: float, end: float) -> str:
    return f"{100 * value / end:.3f}%"


def _replay(run: Run) -> str:
    """The button that plays a finished race again, all methods from zero, stretched or pressed into a few seconds."""
    if run.status not in ("done", "loaded") or not longest(run):
        return ""
    ratio = REPLAY_SECONDS / longest(run)
    label = f"Replay, slowed down {ratio:.0f} times" if ratio >= 1.5 else "Replay"
    return f'<button type="button" class="replay" data-idle="{label}" data-busy="Stop the replay">{label}</button>'
