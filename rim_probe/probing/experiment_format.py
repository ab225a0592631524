"""The form of experiments on one question: the results of `surgery` and `trial`, checked when they come from outside.

Knows the entries. Knows nothing of models, nor whether an experiment fits the question it stands beside.
"""

from __future__ import annotations

from typing import Annotated, Literal, NotRequired

from pydantic import Field

from rim_probe.memory import MAX_BLOCKS
from rim_probe.probing.checks import Number, Probability, Seed, form, shaped

Block = Annotated[int, Field(ge=0, le=MAX_BLOCKS)]
Blocks = Annotated[list[Block], Field(max_length=MAX_BLOCKS)]
BlockName = Literal[tuple(str(block) for block in range(1, MAX_BLOCKS + 1))]  # type: ignore[valid-type]
Layers = Annotated[list[Annotated[int, Field(ge=0, le=512)]], shaped(2)]
Steps = Annotated[list[str], Field(max_length=100)]
Said = form(text=str, value=str | None, probability=Probability)
Readout = form(**Said.__annotations__, block=Block)
Told = form(**Said.__annotations__, right=bool | None, readouts=Annotated[list[Readout], Field(max_length=MAX_BLOCKS)])
Change = form(before=Number, after=Number)
SurgeryControl = form(what=str, value=str | None, answer_changed=bool, answer_log_probability=Number)
Surgery = form(
    format=Literal["rim-probe-surgery/1"],
    question=str,
    num_blocks=Block,
    actions=dict[BlockName, Literal["blank", "noise", "swap"]],
    layers=Layers,
    partner=str | None,
    unrelated=NotRequired[str | None],
    seed=Seed,
    gold=str | None,
    before=Told,
    after=Told,
    answer_changed=bool,
    changed_blocks=Blocks,
    answer_log_probability=Change,
    gold_probability=Change | None,
    control=SurgeryControl | None,
)
"""What `surgery.operate` gives."""
Worked = form(question=str, steps=Steps, answer=str)
"""A problem with its solution."""
TrialControl = form(what=str, said=str, outcome=str)
Outcome = Literal["expected", "own", "partner", "other"]
Route = form(cut=Literal["question", "memory"], outcome=Outcome, clean=Outcome)
Short = Annotated[str, Field(max_length=1000)]
Trial = form(
    format=Literal["rim-probe-counterfactual/1"],
    problem=Worked,
    partner=Worked,
    steps_from=NotRequired[Literal["gold", "chain of thought"]],
    change=str,
    step=Annotated[int, Field(ge=1, le=100)],
    blocks=Blocks,
    wrong=NotRequired[Blocks],
    claimed=str,
    brought=str,
    layers=Layers,
    expected=str,
    own=str,
    partner_answer=str,
    said=str,
    outcome=Outcome,
    came=bool,
    surgery=Surgery,
    control=TrialControl | None,
    routes=NotRequired[Annotated[list[Route], Field(max_length=2)]],
    sentence=str,
)
"""What `trial.try_counterfactual` gives."""
Beside = form(checkpoint=Short, found=Trial | None, why=Short | None, rate=Short | None)
"""The same on another checkpoint, or why there it could not be done."""
Counterfactual = form(
    **Trial.__annotations__,
    asked=NotRequired[Annotated[str, Field(max_length=3)]],
    checkpoint=NotRequired[Short],
    rate=NotRequired[Short | None],
    beside=NotRequired[Beside | None],
)
"""A trial of the page. `asked`: the block that was named, "all" where none was; `rate`: what came in many pairs."""
