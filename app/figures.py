"""A run drawn as HTML: plain data in, a string out. Pure functions; every text of a visitor or a model is escaped here.

Knows the page's words and marks. Does not know Gradio, models or sessions. Positions and sizes are percentages and CSS
variables, so the same string fits every width and both themes (`page.css`), and text keeps its size.

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

if TYPE_CHECKING:
    from collections.abc import Sequence

    from app.session import Lane, Run
    from rim_probe.problems import Problem

NAMES = {"memory": "RiM", "cot": "CoT"}
TITLES = {"memory": "Reasoning in memory", "cot": "Chain of thought"}
LONG_QUESTION = 400  # characters; a longer one may scroll in its place
LONG_TEXT = 12  # characters; longer values do not fit a cell of the strip or the large type of an answer
REPLAY_SECONDS = 6  # long enough to follow the tokens, short enough to wait for
TIMING_NOTE = (
    "Both answers are computed for real, one after the other in the same process, so that neither slows the other "
    "down. Each clock starts with its own method, before the question is split into tokens, stands still while this "
    "page is drawn, and stops with the last token of the answer; here both are drawn from zero. "
    "RiM also reads what its other blocks would have said; what that takes after its answer is drawn pale and not "
    "counted."
)


# ------------------------------------------------------------------------------------------------------------- words


def format_time(seconds: float) -> str:
    """Two or three figures and the unit a person would choose: "8.4 ms", "31 ms", "1.2 s"."""
    ms = seconds * 1000
    if ms < 9.95:
        return f"{ms:.1f} ms"
    return f"{ms:.0f} ms" if ms < 999.5 else f"{seconds:.1f} s"


def count(number: int, thing: str, plural: str | None = None) -> str:
    return f"{number} {thing if number == 1 else plural or thing + 's'}"


def compare(memory_seconds: float, cot_seconds: float) -> str:
    """How chain of thought did against memory, in time: "13 times slower", "1.4 times faster", "as fast"."""
    return _factor(cot_seconds / memory_seconds, "slower", "faster")


def _factor(ratio: float, above: str, below: str) -> str:
    factor, word = (ratio, above) if ratio > 1 else (1 / ratio, below)
    if factor < 1.05:
        return "as fast"
    return f"{factor:.0f} times {word}" if factor >= 9.95 else f"{factor:.1f} times {word}"


def facts(lane: Lane) -> dict[str, str]:
    """The parts of a method's half sentence: value, mark ("right", "wrong", ""), time, work."""
    answer = lane.answer
    assert answer is not None
    passes = sum(event["kind"] == "prefill" for event in lane.events)
    work = f"{count(passes, 'pass', 'passes')} + {count(answer['generated_tokens'], 'token')}"
    value = answer["value"] if answer["value"] is not None else "no answer"
    if answer["cancelled"]:
        value = "stopped"
    elif answer["truncated"]:
        work += ", cut off at the limit"
    mark = {True: "right", False: "wrong", None: ""}[lane.correct]
    return {"value": value, "mark": mark, "time": format_time(lane.answered_seconds), "work": work}


def verdict(run: Run) -> str:
    """The race in one line of plain text, for example:
    "RiM: 42, right, 31 ms, 1 pass + 2 tokens. CoT: 42, right, 410 ms, 1 pass + 37 tokens: 13 times slower."
    """
    sentences = []
    for method, lane in run.lanes.items():
        if lane.answer is not None:
            sentences.append(f"{NAMES[method]}: {', '.join(part for part in facts(lane).values() if part)}")
    comparison = _comparison(run)
    return ". ".join(sentences) + (f": {comparison}." if comparison else "." if sentences else "")


def _comparison(run: Run) -> str:
    """CoT against RiM, where both came to their end."""
    lanes = list(run.lanes.values())
    if any(lane.answer is None or lane.answer["cancelled"] or not lane.answered_seconds for lane in lanes):
        return ""
    return compare(*(lane.answered_seconds for lane in lanes))


def settled_at(readouts: Sequence[dict[str, Any]]) -> int | None:
    """The block from which on every readout gives the final value; None where there are no readouts."""
    settled = None
    for readout in reversed(readouts):
        if readout["value"] != readouts[-1]["value"]:
            break
        settled = readout["block"]
    return settled


# ------------------------------------------------------------------------------------------------------------- stage


def stage(run: Run | None, recorded: bool = False, selector: str = "") -> str:
    """The whole race: whose run it is, the question, the verdict, both methods side by side, the time axis.

    Args:
        run: what to draw; it may be under way. None draws the empty stage.
        recorded: the run comes from a file, not from this server.
        selector: ready HTML that offers other recorded runs.
    """
    if run is None:
        words = "Ask a question, and both answers are drawn here as they happen."
        return f'<section class="stage empty"><p>{words}</p></section>'
    end = axis_end(run)
    scrolls = ' tabindex="0"' if len(run.question) > LONG_QUESTION else ""
    return (
        f'<section class="stage {run.status}" aria-label="Race" data-end="{_longest(run):.6f}" data-axis="{end:.6f}" '
        f'data-replay="{REPLAY_SECONDS}">'
        f'<div class="top">{_provenance(run, recorded)}{selector}</div>'
        f'<blockquote class="asked"{scrolls}>{escape(run.question)}</blockquote>'
        f"{_verdict_html(run)}"
        f'<div class="cards">{_memory_card(run)}{_cot_card(run)}</div>'
        f"{_axis(run, end)}"
        f"{_footer(run)}"
        "</section>"
    )


def _provenance(run: Run, recorded: bool) -> str:
    if recorded:
        badge, words = "Recorded", f"{run.date[:10]} with {run.checkpoint} on {run.machine}. Press Run for a live one."
    else:
        words = f"{run.checkpoint} on {run.machine}" if run.machine else run.checkpoint
        badge = {
            "waiting": f"Waiting for {count(run.ahead, 'other run')}",
            "running": "Running",
            "stopped": "Stopped",
            "done": "Live",
        }[run.status]
    return f'<p class="provenance"><span class="badge">{badge}</span> {escape(words)}</p>'


def _verdict_html(run: Run) -> str:
    parts = []
    for method, lane in run.lanes.items():
        if lane.answer is None:
            continue
        fact = facts(lane)
        mark = f", {_mark(lane.correct)}" if fact["mark"] else ""
        parts.append(
            f'<span class="says {method}"><b class="name">{NAMES[method]}:</b> '
            f"<b>{escape(_shorten(fact['value'], 40))}</b>{mark}, {fact['time']}, {fact['work']}"
        )
    comparison = _comparison(run)
    if not parts:
        line = {
            "waiting": "Another run is using the model; yours starts by itself.",
            "running": "Both clocks are at zero.",
        }
        return f'<p class="verdict pending">{line.get(run.status, "Stopped before an answer.")}</p>'
    ends = [".</span>"] * len(parts)
    if comparison:
        ends[-1] = f': <b class="factor">{comparison}</b>.</span>'
    return f'<p class="verdict">{" ".join(part + end for part, end in zip(parts, ends, strict=True))}</p>'


def _mark(correct: bool | None) -> str:
    """Right or wrong in words and sign, never by colour alone."""
    if correct is None:
        return ""
    return '<span class="mark right">✓ right</span>' if correct else '<span class="mark wrong">✗ wrong</span>'


def _card(run: Run, method: str, how: str, body: str) -> str:
    lane = run.lanes[method]
    answer = lane.answer
    if answer is None:
        # While CoT writes, RiM has long finished: the empty places say what is going on.
        state = "…" if lane.events else "–"
        big, mark, numbers = f'<span class="big pending">{state}</span>', "", ""
    else:
        fact = facts(lane)
        words = answer["value"] is None or answer["cancelled"]
        size = " long" if words or len(fact["value"]) > LONG_TEXT else ""
        big = f'<span class="big{size}">{escape(_shorten(fact["value"], 60))}</span>'
        mark = _mark(lane.correct)
        if lane.correct is False:
            mark += f' <span class="gold">it is {escape(run.gold or "")}</span>'
        first = "–" if answer["ttft_seconds"] is None else format_time(answer["ttft_seconds"])
        numbers = (
            '<dl class="numbers">'
            f"<div><dt>first token of the answer</dt><dd>{first}</dd></div>"
            f"<div><dt>KV cache</dt><dd>{_bytes(answer['kv_cache_bytes'])}</dd></div>"
            "</dl>"
        )
    return (
        f'<article class="card {method}"><header>'
        f'<h2>{TITLES[method]} <abbr title="{TITLES[method]}">{NAMES[method]}</abbr></h2>'
        f'<p class="how">{how}</p></header>'
        f'<p class="result"{_at(lane.answered_seconds)}>{big} {mark}</p>{body}{numbers}</article>'
    )


def _at(seconds: float | None) -> str:
    """The attribute of what appears at some time of the race."""
    return "" if seconds is None else f' data-t="{seconds:.6f}"'


def _memory_card(run: Run) -> str:
    blocks = count(run.num_blocks, "silent memory block")
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
        value = escape(_shorten(readouts[-1]["value"] or "no answer", 24))
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
        f'<p class="strip-note"{_at(max((readout["seconds"] for readout in readouts), default=None))}>{note}</p>'
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
        f"Block {block} says {_shorten(readout['text'] or 'nothing', 80)}{said}, probability {sure}.", quote=True
    )
    return (
        f'<li class="{classes}" style="--p:{readout["probability"]:.4f}"{_at(readout["seconds"])} data-tip="{tip}">'
        f'<span class="k"><span class="sr">Block </span>{block}</span>'
        f'<span class="value{size}">{escape(_shorten(value, LONG_TEXT))}</span>'
        f'<span class="sure">{escape(sure)}</span>{sign}<span class="sr">{said}</span></li>'
    )


# -------------------------------------------------------------------------------------------------------------- axis


def axis_end(run: Run) -> float:
    """The last second of the time axis: the longest time so far, rounded up to a calm number."""
    longest = max(_longest(run) * 1.04, 0.01)
    unit = 10 ** math.floor(math.log10(longest))
    return next(step * unit for step in (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10) if step * unit >= longest)


def _longest(run: Run) -> float:
    times = [event["seconds"] for lane in run.lanes.values() for event in lane.events]
    times += [lane.answer["total_seconds"] for lane in run.lanes.values() if lane.answer is not None]
    return max(times, default=0.0)


def _axis(run: Run, end: float) -> str:
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
        '<p class="tip" aria-live="polite">Point at a mark, or use the arrow keys on a track, to read its time.</p>'
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
            f'<span class="flag" aria-hidden="true"{_at(lane.answered_seconds)}>'
            f"<b>{escape(_shorten(fact['value'], LONG_TEXT))}{sign}</b> {fact['time']}</span>"
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


# ------------------------------------------------------------------------------------------------------- small parts


def _replay(run: Run) -> str:
    """The button that plays a finished race again, both methods from zero, stretched or pressed into a few seconds."""
    if run.status != "done":
        return ""
    ratio = REPLAY_SECONDS / _longest(run)
    label = f"Replay, slowed down {ratio:.0f} times" if ratio >= 1.5 else "Replay"
    return f'<button type="button" class="replay" data-idle="{label}" data-busy="Stop the replay">{label}</button>'


def _footer(run: Run) -> str:
    if run.status not in ("done", "stopped"):
        return '<div class="actions"></div>'
    data = base64.b64encode(json.dumps(run.to_dict(), ensure_ascii=False, indent=1).encode()).decode()
    name = re.sub(r"[^\w.-]", "-", run.checkpoint)
    return (
        f'<div class="actions"><a class="download" download="rim-probe-run-{name}.json" '
        f'href="data:application/json;base64,{data}">Download this run (JSON)</a></div>'
    )


def gallery(examples: Sequence[Problem], shown_per_depth: int = 3) -> str:
    """Examples by their number of steps: a row of depths to choose from, and the questions of the chosen one."""
    if not examples:
        return ""
    depths: dict[int, list[Problem]] = {}
    for problem in examples:
        depths.setdefault(len(problem.steps), []).append(problem)
    chosen = sorted(depths)[len(depths) // 2]
    choices = lists = ""
    for depth in sorted(depths):
        checked = " checked" if depth == chosen else ""
        choices += (
            f'<label><input type="radio" name="depth" value="{depth}"{checked}><span>{depth}<span class="sr"> '
            f"step{'' if depth == 1 else 's'}</span></span></label>"
        )
        hidden = "" if depth == chosen else " hidden"
        items = "".join(f"<li>{example_button(problem)}</li>" for problem in depths[depth][:shown_per_depth])
        lists += f'<ul data-depth="{depth}"{hidden}>{items}</ul>'
    return (
        '<section class="gallery" aria-label="Examples"><fieldset><legend>Examples, by number of steps</legend>'
        f'<div class="depths">{choices}</div></fieldset>{lists}<p class="hint">Picking one runs it.</p></section>'
    )


def example_button(problem: Problem) -> str:
    return (
        f'<button type="button" class="example" data-question="{escape(problem.question, quote=True)}" '
        f'data-answer="{escape(problem.answer, quote=True)}"><span>{escape(problem.question)}</span></button>'
    )


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
    """The line under the model picker; `state` is "loading", "ready" or "failed"."""
    role = "alert" if state == "failed" else "status"
    return f'<p class="model-state {state}" role="{role}">{escape(sentence)}</p>'


def _bytes(number: int) -> str:
    return f"{number / 1024:.0f} KB" if number < 1024**2 else f"{number / 1024**2:.1f} MB"


def _shorten(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
