"""The clock of a race as plain data: what every method did when, in percent of one axis that fits every width."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from app.words import NAMES, count, facts, format_time

if TYPE_CHECKING:
    from app.runs import Lane, Run

REPLAY_SECONDS = 4  # long enough to follow, short enough to wait for
TIMING_NOTE = (
    "All answers are computed for real, one after the other in the same process, so that none slows another "
    "down. Each clock starts with its own method, before the question is split into tokens, stands still while this "
    "page is drawn, and stops with the last token of the answer; here all are drawn from zero. "
    "RiM also reads what its other blocks would have said; what that takes after its answer is drawn pale and not "
    "counted. The headline compares medians of repeats of the same question, made after this run."
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


def ticks(end: float) -> list[tuple[str, str, str]]:
    """(place, label, class) of every tick; the unit stands once, at the end."""
    parts = next(n for n in (4, 5, 3, 6) if _is_round(end / n))
    scale, unit = (1000, "ms") if end < 1 else (1, "s")
    found = []
    for i in range(parts + 1):
        label = f"{end * i / parts * scale:.4g}" + (f" {unit}" if i == parts else "")
        found.append((percent(i, parts), label, "first" if i == 0 else "last" if i == parts else ""))
    return found


def _is_round(step: float) -> bool:
    figure = step / 10 ** math.floor(math.log10(step) + 1e-9)
    return any(math.isclose(figure, nice) for nice in (1, 1.5, 2, 2.5, 3, 4, 5, 6))


def percent(value: float, end: float) -> str:
    """A place on an axis that ends at `end`, for CSS."""
    return f"{100 * value / end:.3f}%"


def track(method: str, lane: Lane, run: Run, end: float) -> dict[str, Any]:
    """A method's marks on the clock: `marks` (kind, left, width, seconds, tip) and `summary`, both in words as well."""
    name, marks, before, number = NAMES[method], [], 0.0, 0

    def mark(kind: str, start: float, stop: float, tip: str) -> None:
        marks.append((kind, percent(start, end), percent(stop - start, end), stop, tip))

    for event in lane.events:
        at = event["seconds"]
        if event["kind"] == "prefill":
            blocks = f" and {count(run.num_blocks, 'memory block')}" if method == "memory" and run.num_blocks else ""
            mark("prefill", before, at, f"{name} reads the question{blocks} in one pass: {format_time(at)}.")
        elif event["kind"] == "token":
            number += 1
            said = f"“{event['text']}”" if event["text"].strip() else "the end mark" if not event["text"] else "a space"
            mark("token", before, at, f"{name} token {number}, {said}, at {format_time(at)}.")
        else:
            continue
        before = at
    if lane.answer is None:
        return {"marks": marks, "summary": f"{name}: no event yet."}
    total = lane.answer["total_seconds"]
    if method == "memory" and total > before and not lane.answer["cancelled"]:
        tip = f"{name} has answered; here it still reads what the other blocks would say, until {format_time(total)}."
        mark("rest", before, total, tip)
    return {"marks": marks, "summary": f"{name}: {', '.join(part for part in facts(lane).values() if part)}."}
