"""The form of a run that comes from outside: a visitor's file, or one recorded by an older version.

Knows the entries of a run; what passes can be drawn without a further look. Does not know how it is drawn, nor models.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, NotRequired

from pydantic import Field

from app.runs import RUN_FORMAT
from rim_probe.errors import RiMError
from rim_probe.memory import MAX_BLOCKS
from rim_probe.probing.checks import Damage, Probability, Seed, adapter, checked, form
from rim_probe.probing.experiment_format import Block, Counterfactual, Readout, Surgery
from rim_probe.probing.reading_format import Reading

FORMATS = (RUN_FORMAT, "rim-probe-run/1")  # the older one knew no steps, seed, reading or experiments
LATER = {"steps": [], "outside": None, "seed": 0, "reading": None, "surgery": None, "counterfactual": None}
MOST_TOKENS = 4096

Seconds = Annotated[int | float, Field(ge=0, le=1e6)]
Count = Annotated[int, Field(ge=0, le=10**15)]
Short = Annotated[str, Field(max_length=300)]  # what is drawn in one line
TokenIds = Annotated[list[Count], Field(max_length=MOST_TOKENS)]
AnswerReadout = form(**Readout.__annotations__, token_ids=TokenIds)
Answer = form(
    method=Literal["memory", "cot", "direct"],
    question=str,
    text=str,
    value=str | None,
    token_ids=TokenIds,
    ttft_seconds=Seconds | None,
    total_seconds=Seconds,
    forward_passes=Count,
    generated_tokens=Count,
    prompt_tokens=Count,
    kv_cache_bytes=Count,
    readouts=Annotated[list[AnswerReadout], Field(max_length=MAX_BLOCKS)],
    cancelled=bool,
    truncated=bool,
)
TokenEvent = form(kind=Literal["prefill", "token"], seconds=Seconds, text=str)
ReadoutEvent = form(
    kind=Literal["readout"], seconds=Seconds, text=str, block=Block, value=str | None, probability=Probability
)


Event = Annotated[TokenEvent | ReadoutEvent, Field(discriminator="kind")]
LaneData = form(
    events=Annotated[list[Event], Field(max_length=MOST_TOKENS)],
    answer=Answer | None,
    correct=bool | None,
    repeats=NotRequired[Annotated[list[Seconds], Field(max_length=100)]],
)
RunData = form(
    checkpoint=Short,
    question=Annotated[str, Field(pattern=r"\S")],
    gold=Short | None,
    steps=Annotated[list[Short], Field(max_length=100)],
    outside=Annotated[str, Field(max_length=1000)] | None,
    num_blocks=Block,
    seed=Seed,
    machine=Short,
    date=Short,
    matched=bool,
    status=Literal["done", "stopped", "loaded"],
    surgery=Surgery | None,
    counterfactual=Counterfactual | None,
    memory=LaneData,
    cot=LaneData,
    direct=NotRequired[LaneData],
)


_RUN = adapter(RunData)


def checked_run(data: Any) -> dict[str, Any]:
    """The entries of a run, its reading among them; what is not known is left out.

    Raises:
        RiMError: another format, an entry that is missing or damaged.
    """
    if not isinstance(data, Mapping) or data.get("format") not in FORMATS:
        raise RiMError(f"This is not a run that this page has saved (format {RUN_FORMAT!r}); choose another file.")
    given = LATER | {key: value for key, value in data.items() if key != "direct" or value is not None}
    try:
        run = checked(_RUN, given)
    except Damage as damage:
        raise RiMError(f"This run is damaged ({damage}); save it again.") from None
    run["reading"] = None if given["reading"] is None else Reading.from_dict(given["reading"]).to_dict()
    whose = run["reading"] or run
    if (whose["question"], whose["num_blocks"]) != (run["question"], run["num_blocks"]):
        raise RiMError("This run is damaged (its reading is of another question or K); save it again.")
    return run
