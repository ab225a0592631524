"""The form of a reading: plain data of fixed shape, checked entry by entry when it comes from outside.

Every list has the length that follows from the sizes at the reading's head (K blocks, M slots, L layers, W tokens),
every number is finite and bounded, every text can be written as UTF-8: what passes can be drawn. See `checks`.

Knows shapes. Knows nothing of models, of what the numbers mean, or of how they are drawn.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

from pydantic import AfterValidator, Field, ValidationInfo
from typing_extensions import TypedDict

from rim_probe.errors import RiMError
from rim_probe.files import write_atomic
from rim_probe.memory import MAX_BLOCKS, MAX_SLOTS
from rim_probe.probing.checks import (
    BY_BLOCK,
    LARGEST,
    MAX_ITEMS,
    RISING,
    Cosine,
    Damage,
    Number,
    Probability,
    Seed,
    Texts,
    adapter,
    checked,
    form,
    named,
    shaped,
    upto,
    wrong,
)
from rim_probe.probing.experiment_format import Counterfactual, Said, Steps, Surgery

FORMAT = "rim-probe-reading/1"
MAX_BYTES = 32 * 2**20  # of a file; a reading of the model in the box takes 0.4 MB
MAX_LAYERS, MAX_HEADS = 512, 512
EXPERIMENTS = ("surgery", "counterfactual")

Block = Annotated[int, Field(ge=1), upto("K")]
Layer = Annotated[int, Field(ge=0), upto("L")]
Layers = Annotated[list[Layer], RISING]
Whole = Annotated[int, Field(ge=0, le=MAX_ITEMS)]
StepNumber = Annotated[int, Field(ge=1, le=1000)]
Rank = Annotated[int | float, Field(ge=0, le=LARGEST)]
Entropy = Annotated[int | float, Field(ge=-1e-3, le=1e3)]
Point = Annotated[list[Number], shaped(3)]
Every = (BY_BLOCK, shaped("K"))  # one record for each of the blocks 1 to K, in order


# ------------------------------------------------------------------------------------------------ the blocks of a panel
NearestStep = form(step=str, cosine=Cosine, gold=Annotated[int, Field(ge=0, le=100)] | None)
StepDecode = form(
    step=StepNumber,
    cell=str,
    accuracy=Probability,
    nearest=Annotated[list[NearestStep], Field(min_length=1, max_length=20)],
    match=bool | None,
    coverage=NotRequired[Probability],  # files of before it was measured lack it
)
StepBlock = form(**StepDecode.__annotations__, block=Block, others=Annotated[list[StepDecode], Field(max_length=1000)])
StepsFound = form(
    bank=Annotated[int, Field(ge=1, le=10**9)], reading_layer=Layer, blocks=Annotated[list[StepBlock], BY_BLOCK]
)
Value = form(step=StepNumber | None, quantity=str, value=str, confidence=Probability, accuracy=Probability)
ValueBlock = form(block=Block, values=Annotated[list[Value], Field(max_length=1000)])
Values = form(blocks=Annotated[list[ValueBlock], BY_BLOCK])
WordBlock = form(block=Block, memory=str | None, stage1=str | None, carried=str | None)
Words = form(blocks=Annotated[list[WordBlock], *Every])
ChanceBlock = form(
    block=Block,
    value=str | None,
    own_probability=Probability,
    chance_right=Probability,
    chance_right_paper_probe=Probability,
)
Correctness = form(judge=str, blocks=Annotated[list[ChanceBlock], *Every], chosen_block=Block)
Moment = form(probability=Probability, matches=bool, entropy=Entropy)
CommitmentBlock = form(**Moment.__annotations__, block=Block, kl_to_last=Entropy)
ChainStep = form(**Moment.__annotations__, step=Whole, text=str)
ChainCommitment = form(answer=str | None, steps=Annotated[list[ChainStep], Field(max_length=MAX_ITEMS)])


def _every_or_none(value: list[CommitmentBlock], info: ValidationInfo) -> list[CommitmentBlock]:
    if value and [entry["block"] for entry in value] != list(range(1, info.context["K"] + 1)):
        raise wrong("Input should name every block, or none where the answer was cut off")
    return value


Commitment = form(
    answer=str | None,
    blocks=Annotated[list[CommitmentBlock], AfterValidator(_every_or_none)],
    first_block=Block | None,
    stable_block=Block | None,
    cot=ChainCommitment | None,
)


# -------------------------------------------------------------------------------------------- attention and other grids

Rows = list[list[list[Probability]]]
BlocksToBlocks = TypedDict("BlocksToBlocks", {"mean over heads": Annotated[Rows, shaped("L", "K", "K")]})
BlocksToTokens = TypedDict(
    "BlocksToTokens",
    {
        "mean over heads": Annotated[Rows, shaped("L", "K", "W")],
        "max over heads": Annotated[Rows, shaped("L", "K", "W")],
        "per head": Annotated[list[Rows], shaped("L", "H", "K", "W")] | None,
    },
)
Attention = form(
    tokens=Annotated[list[str], shaped("W")],
    numbers=Annotated[list[bool], shaped("W")],
    layers=Annotated[int, upto("L"), Field(ge=1)],
    heads=Annotated[int, Field(ge=1, le=MAX_HEADS), named("H")],
    aggregation=str,
    slots_to_tokens=BlocksToTokens,
    answer_to_blocks=Annotated[Rows, shaped("L", "H", "K")],
    answer_to_tokens=Annotated[Rows, shaped("L", "H", "W")] | None,
    slots_to_blocks=BlocksToBlocks,
    slots_to_slots=BlocksToBlocks,
)
Importance = form(
    answer=str,
    log_probability=Number,
    layers=Annotated[Layers, named("rows")],
    blocks=Annotated[list[Block], RISING, named("columns")],
    change=Annotated[list[list[Number]], shaped("rows", "columns")],
    says=Annotated[list[list[bool]], shaped("rows", "columns")],
)
Cloud = form(
    n=Annotated[Whole, named("n")],
    points=Annotated[list[list[Number]], shaped("n", 2)],
    right=Annotated[list[bool], shaped("n")],
    steps=Annotated[list[Annotated[int, Field(ge=0, le=1000)]], shaped("n")],
)
Geometry = form(
    layer=Layer,
    blocks=Annotated[list[Point], shaped("K")],
    depth_layers=Annotated[Layers, named("rows")],
    depth=Annotated[list[list[Point]], shaped("rows", "K")],
    explained_blocks=Annotated[list[Probability], shaped(3)],
    explained_depth=Annotated[list[Probability], shaped(3)],
    cloud=NotRequired[Cloud],
    mean_path=NotRequired[Annotated[list[Point], Field(min_length=1, max_length=MAX_BLOCKS)]],
)
Place = form(
    block=Block,
    position=Literal["end", "slots"] | Annotated[int, Field(ge=1), upto("M")],
    step=NotRequired[StepNumber],
    fitted_layer=NotRequired[Layer],
)
Cell = form(text=str, score=Cosine)
CellMinus = form(text=str, score=Annotated[int | float, Field(ge=-2.1, le=2.1)])


Cells = Annotated[list[list[Annotated[list[Cell], Field(max_length=5)]]], shaped("rows", "columns")]
CellsMinus = Annotated[list[list[Annotated[list[CellMinus], Field(max_length=5)]]], shaped("rows", "columns")]
DepthMode = form(
    name=Literal["logit lens", "tuned lens", "nearest step", "own words"],
    what=str,
    score_name=Literal["probability", "cosine"],
    layers=Annotated[Layers, named("rows")],
    positions=Annotated[list[Place], Field(min_length=1, max_length=MAX_BLOCKS * (MAX_SLOTS + 1)), named("columns")],
    cells=Cells,
    control=str | None,
    control_cells=Cells | None,
    minus=CellsMinus | None,
)
RankCourse = form(
    value=str,
    step=Annotated[int, Field(ge=1, le=MAX_ITEMS)],
    what=str,
    layers=Annotated[Layers, named("rows")],
    best=Annotated[list[Rank], shaped("rows")],
    by_block=Annotated[list[list[Rank]], shaped("K", "rows")],
    control=Annotated[list[Rank], shaped("rows")] | None,
    control_name=str,
)


def _once(modes: list[DepthMode]) -> list[DepthMode]:
    if len({mode["name"] for mode in modes}) != len(modes):
        raise wrong("Input should name every mode once")
    return modes


Depth = form(
    modes=Annotated[list[DepthMode], AfterValidator(_once)], ranks=Annotated[list[RankCourse], Field(max_length=1000)]
)
Probes = form(
    steps=NotRequired[StepsFound],
    values=NotRequired[Values],
    words=NotRequired[Words],
    correctness=NotRequired[Correctness],
    attention=NotRequired[Attention],
    commitment=NotRequired[Commitment],
    importance=NotRequired[Importance],
    geometry=NotRequired[Geometry],
    depth=NotRequired[Depth],
)
"""What each probe's `explain` gives, in the order of the screen."""


PROBES = tuple(Probes.__annotations__)


# ------------------------------------------------------------------------------------------------------------ the whole
Answer = form(**Said.__annotations__, right=bool | None)
BlockAnswer = form(**Answer.__annotations__, block=Block)
Chain = form(text=str, steps=Texts, value=str | None)
Provenance = form(
    checkpoint=str,
    fingerprint=str,
    device=str,
    dtype=str,
    date=str,
    seed=Seed,
    versions=Annotated[dict[str, str], Field(max_length=20)],
)
Head = form(
    tokens=Annotated[list[str], Field(min_length=1, max_length=MAX_ITEMS)],
    num_blocks=Annotated[int, Field(ge=0, le=MAX_BLOCKS)],
    slots=Annotated[int, Field(ge=1, le=MAX_SLOTS)],
    num_layers=Annotated[int, Field(ge=1, le=MAX_LAYERS)],
)
"""What a reading's other lengths follow from."""
ReadingData = form(
    **Head.__annotations__,
    format=Literal["rim-probe-reading/1"],
    question=str,
    gold=str | None,
    steps=Steps,
    chain=Chain | None,
    readouts=Annotated[list[BlockAnswer], *Every],
    answer=Answer,
    provenance=Provenance,
    probes=Probes,
    complaints=Annotated[list[str], Field(max_length=100)],
    surgery=NotRequired[Surgery | None],
    counterfactual=NotRequired[Counterfactual | None],
)


_HEAD, _WHOLE = adapter(Head), adapter(ReadingData)


@dataclass(frozen=True)
class Reading:
    """Everything the probes said of one question, as plain data.

    Attributes:
        data: see `to_dict`.
    """

    data: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """The data itself, not a copy, of the form `ReadingData`. A probe that is not in "probes" has a sentence in
        "complaints". Where experiments were made on the question: "surgery" and "counterfactual".
        """
        return dict(self.data)

    @classmethod
    def from_dict(cls, data: Any) -> Reading:
        """The reading that `to_dict` came from; entries that are not known are left out.

        Raises:
            RiMError: another format, an entry that is missing or damaged.
        """
        if not isinstance(data, Mapping) or data.get("format") != FORMAT:
            raise RiMError(f"This is no reading of this kind ({FORMAT}); export one from the page or save a Reading.")
        try:
            head = checked(_HEAD, data)
            sizes = {"K": head["num_blocks"], "M": head["slots"], "L": head["num_layers"], "W": len(head["tokens"])}
            return cls(checked(_WHOLE, data if head["num_blocks"] else {**data, "probes": {}}, sizes))
        except Damage as damage:
            raise RiMError(f"This reading is damaged ({damage}); export it again.") from None

    @classmethod
    def load(cls, path: str | Path) -> Reading:
        """A reading from a file: its own, or the export of a run, which has it under "reading" and experiments beside.

        Raises:
            RiMError: a file that is missing, too large, no JSON, or holds no whole reading.
        """
        path = Path(path)
        try:
            if path.stat().st_size > MAX_BYTES:
                raise RiMError(f"{path} has more than {MAX_BYTES // 2**20} MB and is no reading; choose another file.")
            data = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise RiMError(f"{path} cannot be read ({error.strerror or error}); check its path.") from None
        except (ValueError, RecursionError) as error:
            if isinstance(error, RiMError):
                raise
            raise RiMError(f"{path} is no JSON file; export the reading again.") from None
        if isinstance(data, Mapping) and isinstance(data.get("reading"), Mapping):
            data = {**data["reading"], **{name: data[name] for name in EXPERIMENTS if data.get(name) is not None}}
        return cls.from_dict(data)

    def save(self, path: str | Path) -> Path:
        """Writes one line of JSON."""
        path = Path(path)
        text = json.dumps(self.data, ensure_ascii=False, allow_nan=False)
        try:
            write_atomic(path, f"{text}\n".encode())
        except OSError as error:
            raise RiMError(f"{path} cannot be written ({error.strerror or error}); choose another place.") from None
        return path
