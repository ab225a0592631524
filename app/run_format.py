"""Checks the dictionary of a run that comes from outside: a visitor's file, or one recorded by an older version.

Knows the form of a run and what the page draws of it; what passes can be drawn without a further look. Built from the
checks of `rim_probe.probing`. Does not know how anything is drawn, nor models.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from app.runs import METHODS, RACERS, RUN_FORMAT
from rim_probe.errors import RiMError
from rim_probe.memory import MAX_BLOCKS
from rim_probe.probing.checks import Check, each, maybe, number, one_of, record, text, truth, whole
from rim_probe.probing.experiment_format import counterfactual, surgery
from rim_probe.probing.reading_format import Reading, probability

FORMATS = (RUN_FORMAT, "rim-probe-run/1")  # the older one knew no steps, seed, reading or experiments
FINISHED = ("done", "stopped", "loaded")
LATER = {"steps": [], "seed": 0, "reading": None, "surgery": None, "counterfactual": None}
MOST_TOKENS = 4096
LONGEST_NAME = 300  # characters of a name, a machine, a gold answer: what is drawn in one line

seconds = number(0, 1e6)
count = whole(0, 10**15)
block = whole(0, MAX_BLOCKS)


def checked(data: Any) -> dict[str, Any]:
    """The entries of a run, cleaned; what is not known is left out.

    Raises:
        RiMError: another format, an entry that is missing or damaged.
    """
    if not isinstance(data, Mapping) or data.get("format") not in FORMATS:
        raise RiMError(f"This is not a run that this page has saved (format {RUN_FORMAT!r}); choose another file.")
    try:
        run = record(
            {
                "checkpoint": short,
                "question": text,
                "gold": maybe(short),
                "steps": each(short, most=100),
                "num_blocks": block,
                "seed": whole(-(2**63), 2**63),
                "machine": short,
                "date": short,
                "matched": truth,
                "status": one_of(*FINISHED),
                "surgery": maybe(surgery),
                "counterfactual": maybe(counterfactual),
                **dict.fromkeys(RACERS, _lane),
            },
            optional={method: _lane for method in METHODS if method not in RACERS and data.get(method) is not None},
        )(LATER | dict(data), "the run")
        if not run["question"].strip():
            raise ValueError("the run.question should not be empty")
        reading = LATER | dict(data)
        run["reading"] = None if reading["reading"] is None else _reading(reading["reading"], run)
    except RiMError:
        raise
    except ValueError as damage:
        raise RiMError(f"This run is damaged: {damage}; save it again.") from None
    return run


def short(value: Any, at: str) -> str:
    if len(text(value, at)) > LONGEST_NAME:
        raise ValueError(f"{at} should be a text of at most {LONGEST_NAME} characters")
    return text(value, at)


def _reading(data: Any, run: Mapping[str, Any]) -> dict[str, Any]:
    reading = Reading.from_dict(data).to_dict()
    if (reading["question"], reading["num_blocks"]) != (run["question"], run["num_blocks"]):
        raise ValueError("the run.reading should be of the run's own question and number of blocks")
    return reading


_token_ids = each(count, most=MOST_TOKENS)
_readout = record(
    {"block": block, "text": text, "value": maybe(text), "token_ids": _token_ids, "probability": probability}
)
_answer = record(
    {
        "method": one_of(*METHODS),
        "question": text,
        "text": text,
        "value": maybe(text),
        "token_ids": _token_ids,
        "ttft_seconds": maybe(seconds),
        "total_seconds": seconds,
        "forward_passes": count,
        "generated_tokens": count,
        "prompt_tokens": count,
        "kv_cache_bytes": count,
        "readouts": each(_readout, most=MAX_BLOCKS),
        "cancelled": truth,
        "truncated": truth,
    }
)
_common = {"kind": one_of("prefill", "token", "readout"), "seconds": seconds, "text": text}
_read_out = {"block": block, "value": maybe(text), "probability": probability}


def _event(value: Any, at: str) -> dict[str, Any]:
    is_readout = isinstance(value, Mapping) and value.get("kind") == "readout"
    return record(_common | _read_out if is_readout else _common)(value, at)


_lane: Check = record(
    {"events": each(_event, most=MOST_TOKENS), "answer": maybe(_answer), "correct": maybe(truth)},
)
