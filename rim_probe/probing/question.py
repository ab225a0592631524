"""One question's memory blocks as a table for the terminal.

Knows what `reading.explain_blocks` gives and how a table is printed. Knows no model.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rim_probe.decoding import format_answer
from rim_probe.probing.study import Observation
from rim_probe.report import table

LEGEND = {
    "chance right": "by the judge, fitted on problems like the report's; of other questions it knows nothing",
    "nearest step (cosine)": "of the explicit steps in the bank; the report says how far it is above its controls",
    "stage-1 model says": "the readout of the model that was trained to state steps, asked the same question",
    "with these slots it says": "the same with this model's slots carried in; no change: they do not matter",
    "results read (how often right)": "of each step, by linear probes, which always read something; in brackets how "
    "often each was right on other problems",
}


def format_question(seen: Observation, told: Mapping[str, Any], steps: Sequence[str]) -> str:
    """A row for every block: its readout, nearest explicit step, own words, values, the chance that it is right."""
    columns: dict[str, dict[int, str]] = {
        "readout (probability)": {r.block: f"{r.text.strip()} ({r.probability:.2f})" for r in seen.answer.readouts}
    }

    def add(title: str, probe: str, say: Callable[[Mapping[str, Any]], str | None]) -> None:
        cells = {block["block"]: say(block) for block in told.get(probe, {"blocks": []})["blocks"]}
        if any(cells.values()):
            columns[title] = {block: text or "" for block, text in cells.items()}

    add("chance right", "correctness", lambda block: f"{block['chance_right']:.2f}")
    add("nearest step (cosine)", "steps", _nearest)
    add("stage-1 model says", "words", lambda block: block["stage1"])
    add("with these slots it says", "words", lambda block: block["carried"])
    add("results read (how often right)", "values", lambda block: _values(block, len(steps)))
    # A probe may have been fitted for fewer blocks than were asked for.
    rows = [[str(k), *(cells.get(k, "") for cells in columns.values())] for k in range(1, seen.capture.K + 1)]
    known = f"\ngold steps: {' '.join(steps)}" if steps else ""
    legend = "\n".join(f"- {title}: {meaning}" for title, meaning in LEGEND.items() if title in columns)
    cost = format_answer(seen.answer).splitlines()[-1]
    return f"{seen.question}{known}\n\n{table(['block', *columns], rows)}\n\n{legend}\n\n{cost}"


def _nearest(block: Mapping[str, Any]) -> str:
    best = block["nearest"][0]
    mark = {None: "", 0: ", not a gold step"}.get(best["gold"], f", gold step {best['gold']}")
    return f"{best['step']} ({best['cosine']:.2f}{mark})"


def _values(block: Mapping[str, Any], steps: int) -> str:
    """The results alone, since the operands would crowd the line, and of the steps there are, where that is known."""
    results = [value for value in block["values"] if value["quantity"] == "result"]
    shown = [value for value in results if value["step"] is None or not steps or value["step"] < steps]
    return ", ".join(
        f"{'last' if value['step'] is None else value['step']}: {value['value']} ({value['accuracy']:.0%})"
        for value in shown
    )
