"""A run in words: times, counts, the verdict, and why one method was faster. Plain text; nothing is escaped here.

Knows what is compared with what. Does not know HTML, Gradio or models.
"""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from app.runs import Lane, Run

NAMES = {"memory": "RiM", "cot": "CoT", "direct": "Direct"}
LONG_TEXT = 12  # characters; longer values do not fit a cell of the strip or the large type of an answer


def format_time(seconds: float) -> str:
    """Two or three figures and the unit a person would choose: "8.4 ms", "31 ms", "1.2 s"."""
    ms = seconds * 1000
    if ms < 9.95:
        return f"{ms:.1f} ms"
    return f"{ms:.0f} ms" if ms < 999.5 else f"{seconds:.1f} s"


def count(number: int, thing: str, plural: str | None = None) -> str:
    return f"{number} {thing if number == 1 else plural or thing + 's'}"


def compare(memory_seconds: float, other_seconds: float) -> str:
    """How another method did against memory, in time: "13 times slower", "1.4 times faster", "as fast"."""
    return _factor(other_seconds / memory_seconds, "slower", "faster")


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
            comparison = comparison_of(run, method)
            said = f"{NAMES[method]}: {', '.join(part for part in facts(lane).values() if part)}"
            sentences.append(said + (f": {comparison}." if comparison else "."))
    return " ".join(sentences)


def comparison_of(run: Run, method: str) -> str:
    """A method against memory, where both came to their end; nothing for memory itself."""
    lanes = run.lanes["memory"], run.lanes[method]
    whole = all(_is_whole(lane) for lane in lanes)
    return compare(*(lane.answered_seconds for lane in lanes)) if method != "memory" and whole else ""


def _is_whole(lane: Lane) -> bool:
    """Whether a lane came to its own end, so that its time can be compared."""
    answer = lane.answer
    return answer is not None and not (answer["cancelled"] or answer["truncated"]) and bool(lane.answered_seconds)


def median(lane: Lane) -> float:
    """Seconds to the answer, the median of the repeats."""
    return statistics.median(lane.repeats)


def timing(lane: Lane) -> str:
    """The spread of the repeats: "30 ms to 34 ms"."""
    return f"{format_time(min(lane.repeats))} to {format_time(max(lane.repeats))}"


def told(run: Run) -> dict[str, Any] | None:
    """The headline, such as "Same answer: 42. Memory: 1 read. Chain of thought: 24 tokens, 3.9 times longer."

    Returns:
        `agree`: (text, mark) of each part of the first sentence; `memory`: what it took; `others`: name, method, work,
        comparison ("" where there is none) and its spread. None before memory has answered.
    """
    lanes = {method: lane for method, lane in run.lanes.items() if lane.answer is not None}
    if "memory" not in lanes or (lanes["memory"].answer["cancelled"] and not lanes["memory"].answer["value"]):
        return None
    said = {method: facts(lane)["value"] for method, lane in lanes.items() if not lane.answer["cancelled"]}
    marks = {method: facts(lane)["mark"] or "unknown" for method, lane in lanes.items()}
    rival = said.get("cot")
    if rival is None:
        agree = [(f"Memory answers {said.get('memory', 'nothing')}", marks["memory"])]
    elif rival == said["memory"]:
        agree = [(f"Same answer: {rival}", marks["memory"])]
    else:
        agree = [(f"Different answers: memory {said['memory']}", marks["memory"] if run.gold else "")]
        agree.append((f", chain of thought {rival}", marks["cot"]))
    others = []
    for method, name in (("cot", "Chain of thought"), ("direct", "Direct answer")):
        if method in lanes:
            answer, factor, spread = lanes[method].answer, "", ""
            work = count(answer["generated_tokens"], "token")
            work += ", stopped" if answer["cancelled"] else ", cut off at the limit" if answer["truncated"] else ""
            pair = lanes["memory"], lanes[method]
            if all(_is_whole(lane) and lane.repeats for lane in pair):
                factor = _factor(median(pair[1]) / median(pair[0]), "longer", "shorter").replace("as fast", "as long")
                spread = f"Medians of {len(pair[0].repeats)} repeats after a warm-up. "
                spread += "; ".join(
                    f"{NAMES[m]} {format_time(median(lane))} ({timing(lane)})"
                    for m, lane in zip(("memory", method), pair, strict=True)
                )
            others.append((name, method, work, factor, spread + "." if spread else ""))
    read = "1 read" if run.num_blocks else "1 read, without blocks"
    return {"agree": agree, "memory": read, "others": others}


def why(run: Run) -> tuple[str, str] | None:
    """Why memory was faster than chain of thought, or why not, from the passes this run counted: a question and its
    answer. None while one of them has not come to its end.
    """
    comparison = comparison_of(run, "cot")
    if not comparison:
        return None
    mine, theirs = (run.lanes[method].answer["generated_tokens"] for method in ("memory", "cot"))
    # The pass that reads the prompt gives the first token, so an answer takes as many passes as it has tokens.
    blocks = f" and {count(run.num_blocks, 'memory block')}" if run.num_blocks else ""
    work = f"RiM read the question{blocks} in 1 pass and wrote {count(mine, 'token')}"
    if comparison.endswith("slower"):
        question = "Why is RiM faster?"
        if theirs > mine:
            answer = (
                f"{work}; CoT wrote {count(theirs, 'token')}, and every token is one pass that has to wait for the one "
                "before."
            )
        else:
            answer = f"Not by fewer passes: {work}, CoT {theirs}. Times as short as these also vary by chance."
    else:
        question = "Why is RiM not faster here?"
        if theirs > mine:
            answer = (
                f"{work}, CoT wrote {theirs}: fewer passes for RiM, but its first one also reads the blocks, "
                "and times as short as these vary by chance."
            )
        else:
            answer = f"It saved no pass: {work}, CoT wrote {theirs}, and every token is one pass."
    direct = run.lanes.get("direct")
    if direct is not None and comparison_of(run, "direct"):
        tokens = count(direct.answer["generated_tokens"], "token")
        answer += f" The direct answer, with neither blocks nor steps, wrote {tokens}."
    return question, answer


def settled_at(readouts: Sequence[dict[str, Any]]) -> int | None:
    """The block from which on every readout gives the final value; None where there are no readouts."""
    settled = None
    for readout in reversed(readouts):
        if readout["value"] != readouts[-1]["value"]:
            break
        settled = readout["block"]
    return settled
