"""One question's memory blocks as a table for the terminal.

Knows what `probes.explain` gives and how a table is printed. Knows no model.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from rim_probe.probing.study import Observation
from rim_probe.report import format_answer, table


def format_question(seen: Observation, told: Mapping[str, Any], steps: Sequence[str]) -> str:
    """A row for every block: its readout, nearest explicit step, own words, values, the chance that it is right."""
    columns: dict[str, list[str]] = {"block": [str(readout.block) for readout in seen.answer.readouts]}
    columns["readout (probability)"] = [f"{r.text.strip()} ({r.probability:.2f})" for r in seen.answer.readouts]
    if "correctness" in told:
        columns["chance right"] = [f"{block['chance_right']:.2f}" for block in told["correctness"]["blocks"]]
    if "steps" in told:
        columns["nearest step (cosine)"] = [_nearest(block) for block in told["steps"]["blocks"]]
    words = told["words"]["blocks"]
    for key, title in (("stage1", "stage-1 model says"), ("carried", "stage-1 model with these slots says")):
        if any(block[key] is not None for block in words):
            columns[title] = [block[key] or "" for block in words]
    if "values" in told:
        columns["values read"] = [_values(block) for block in told["values"]["blocks"]]
    rows = [list(cells) for cells in zip(*columns.values(), strict=True)]
    known = f"\ngold steps: {' '.join(steps)}" if steps else ""
    return f"{seen.question}{known}\n\n{table(list(columns), rows)}\n\n{format_answer(seen.answer).splitlines()[-1]}"


def _nearest(block: Mapping[str, Any]) -> str:
    best = block["nearest"][0]
    mark = {None: "", 0: ", not a gold step"}.get(best["gold"], f", gold step {best['gold']}")
    return f"{best['step']} ({best['cosine']:.2f}{mark})"


def _values(block: Mapping[str, Any]) -> str:
    """The results alone, by step: the operands would crowd the line."""
    results = [value for value in block["values"] if value["quantity"] == "result"]
    return ", ".join(f"r{value['step']}={value['value']} ({value['confidence']:.2f})" for value in results)
