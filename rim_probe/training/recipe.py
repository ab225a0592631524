"""Training recipes: a YAML file that says what is trained, on which rows, in which stages.

Knows names, types and defaults; pydantic refuses whatever is not known, by name. Knows nothing about how training runs.
"""

import json
import re
import reprlib
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from rim_probe.datasets.arithmetic import World
from rim_probe.errors import RecipeError
from rim_probe.memory import MAX_BLOCKS, MemoryLayout

_CHECKED = ConfigDict(strict=True, extra="forbid")

Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
Share = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True, config=_CHECKED)
class Scratch:
    """A small Llama trained from nothing with the vocabulary of the procedural world."""

    layers: Count = 8
    width: Count = 128
    heads: Count = 4
    inner: Count = 384
    context: Count = 512

    def __post_init__(self) -> None:
        if self.width % (2 * self.heads):
            raise RecipeError(f"width must be an even number for each of the {self.heads} heads, not {self.width}.")


@dataclass(frozen=True, config=_CHECKED)
class Data:
    """Where rows come from: a procedural `world`, or problem `files` (paths, or `hub:owner/name/file`).

    Attributes:
        rows: size of the pool (worlds), or how many problems to draw from the files (None: all of them).
        seed: of the world, or of the draw.
        repeats: how often a pass shows the rows of each file (all of them once, if empty). 2 is every row twice; 0.25
            is a quarter of the rows, and the next pass takes another quarter until the file is used up.
        validation: a problem file for choosing checkpoints; a world uses its own valid split.
        validation_rows: how many validation problems are read.
    """

    world: World | None = None
    files: tuple[str, ...] = ()
    repeats: tuple[Annotated[float, Field(gt=0, le=1000)], ...] = ()
    rows: Count | None = None
    seed: Seed = 1
    validation: str | None = None
    validation_rows: Annotated[int, Field(ge=0)] = 500

    def __post_init__(self) -> None:
        if (self.world is None) == (not self.files):
            raise RecipeError("Exactly one of world (procedural problems) and files (problem files) is needed.")
        if self.world is not None and self.rows is None:
            raise RecipeError("rows must say how many problems of the world make the pool.")
        if self.world is not None and (self.validation is not None or self.repeats):
            raise RecipeError("validation and repeats go with files; a world has problems of its own.")
        if self.repeats and len(self.repeats) != len(self.files):
            raise RecipeError(
                f"repeats must hold one number for each of the {len(self.files)} files, not {len(self.repeats)}."
            )


@dataclass(frozen=True, config=_CHECKED)
class Lora:
    """A low-rank adapter on every linear layer, plus the three memory-token rows; r = 0 trains those rows alone."""

    r: Annotated[int, Field(ge=0)] = 128
    alpha: Count = 256
    dropout: Share = 0.0


@dataclass(frozen=True, config=_CHECKED)
class Stage:
    """One stage with an optimizer and a scheduler of its own.

    Attributes:
        name: of its folder in the run.
        objective: stage1 (steps, then the answer), stage2 (the answer everywhere), interchange (as stage1 with every
            weight 1, and what follows where a block's slots are another problem's), cot, direct.
        rows: rows seen, over as many passes of the pool as that takes.
        schedule: learning rate after the warm-up.
        lambdas: how stage 1 fades its steps.
        blocks: stage 1: at least this many blocks (None: one per step). stage 2 and interchange: the layout's number if
            None.
        grounded: stage 2: share of rows that keep the targets of stage 1.
        share: interchange: share of rows that are pairs; the others are those of stage 1.
        one_number_share: interchange: share of pairs that differ in one number only, where there are such.
        slot_labels: stage 1 and interchange: after how many layers at most (evenly spaced, the last among them) slots
            are to name the result of their step; 0: after none.
        memory: stage 1: false trains the no-memory twin, whose readouts see the question and their block's end alone.
        dropout: of the adapter in this stage (None: as the recipe says).
        batch_tokens: a batch holds rows of like length of at most so many tokens, padding counted, in the place of
            `batch_size` rows: short rows come in larger batches, so that every batch is as much work.
        validate_every: steps between validations, each of which also saves a checkpoint.
    """

    name: str
    objective: Literal["stage1", "stage2", "interchange", "cot", "direct"]
    rows: Count
    learning_rate: Annotated[float, Field(gt=0, lt=1)]
    batch_size: Count = 32
    batch_tokens: Count | None = None
    accumulation: Count = 1
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup: Share = 0.04
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    lambdas: Literal["relative", "absolute", "constant"] = "relative"
    blocks: Annotated[int, Field(ge=1, le=MAX_BLOCKS)] | None = None
    grounded: Share = 0.0
    share: Share = 1.0
    one_number_share: Share = 0.3
    slot_labels: Annotated[int, Field(ge=0)] = 0
    memory: bool = True
    dropout: Share | None = None
    validate_every: Count = 500

    def __post_init__(self) -> None:
        if not self.name or set(self.name) & set("/\\ ."):
            raise RecipeError(f"name must be a plain word for a folder of its own, not {self.name!r}.")
        if self.slot_labels and self.objective not in ("stage1", "interchange"):
            raise RecipeError(f"slot_labels goes with stage1 and interchange, not with {self.objective}.")
        if not self.memory and (self.objective != "stage1" or self.slot_labels):
            raise RecipeError("memory: false goes with stage1 without slot_labels: there are no slots.")


@dataclass(frozen=True, config=_CHECKED)
class Recipe:
    """What `python -m rim_probe train` reads.

    Attributes:
        output: folder of the finished checkpoint; the run's own files live in its sibling `<output>.run`.
        base: a folder, Hub id or GGUF file to start from. None: `scratch` or `start`.
        start: an adapter folder to go on from, on the base that it records; its rank and its memory tokens stay.
        precision: what the matrix products of training compute in; auto: see `precision.default_dtype`. An adapter's
            frozen base is then held in bfloat16; trained weights, optimizer and loss stay in float32.
        attention: how packed rows attend in training: sdpa or eager with a dense mask, or flex with a block mask (GPU
            only). auto: eager on a CPU in bfloat16, where the backward pass of sdpa is slow, else sdpa.
        compile: compile the decoder layers, which pays in long runs; see `train --profile`.
    """

    output: str
    stages: Annotated[tuple[Stage, ...], Field(min_length=1)]
    data: Data
    base: str | None = None
    scratch: Scratch | None = None
    start: str | None = None
    layout: MemoryLayout = MemoryLayout()
    lora: Lora | None = None
    seed: Seed = 0
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    attention: Literal["auto", "sdpa", "eager", "flex"] = "auto"
    compile: bool = False

    def __post_init__(self) -> None:
        if sum(origin is not None for origin in (self.base, self.scratch, self.start)) != 1:
            raise RecipeError(
                "Exactly one of base (a model to begin with), scratch (a new model) and start (an adapter to go on "
                "from) is needed."
            )
        if Path(self.output).name in ("", ".."):
            raise RecipeError(f"output must name a folder for the finished checkpoint, not {self.output!r}.")
        if self.lora is not None and self.base is None:
            raise RecipeError(
                "lora needs a base: the adapter of start keeps its own rank, and one to a new model could not be "
                "loaded again."
            )
        if not self.start and not (self.lora and self.lora.r) and any(s.dropout is not None for s in self.stages):
            raise RecipeError("dropout is that of an adapter; it needs lora with r of at least 1, or start.")
        for stage in self.stages:
            if stage.objective in ("stage2", "interchange") and stage.blocks is None and not self.layout.num_blocks:
                raise RecipeError(f"{stage.objective} needs memory blocks; give the layout num_blocks of at least 1.")
        if len({stage.name for stage in self.stages}) < len(self.stages):
            raise RecipeError("Every stage needs a name of its own.")
        if taken := {stage.name for stage in self.stages[:-1]} & {"cot", "direct", "probes"}:
            raise RecipeError(
                f"A stage before the last must not be called {taken.pop()!r}: that is another folder's name."
            )


_RECIPE = TypeAdapter(Recipe)
_PARTS = {"stages": Stage, "data": Data, "world": World, "scratch": Scratch, "layout": MemoryLayout, "lora": Lora}


class _Loader(yaml.SafeLoader):
    """YAML whose numbers may be written as 1e-3, which YAML 1.1 reads as text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def load_recipe(path: str | Path, **overrides: object) -> Recipe:
    """Reads a YAML recipe; `overrides` replace its top-level values (None is ignored).

    Raises:
        RecipeError: no such file, not YAML, an unknown key, a wrong type or an impossible value.
    """
    try:
        data = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)
        if isinstance(data, dict):
            data |= {key: value for key, value in overrides.items() if value is not None}
        text = json.dumps(data, default=str)  # as JSON, lists and mappings are taken where types are strict
    except OSError as error:
        raise RecipeError(f"The recipe {path} cannot be read ({error.strerror}).") from None
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        said = f"line {mark.line + 1}: {getattr(error, 'problem', '')}" if mark else str(error).splitlines()[0]
        raise RecipeError(f"The recipe {path} is not YAML ({said}).") from None
    try:
        return _RECIPE.validate_json(text)
    except ValidationError as error:
        raise RecipeError(f"{path}: {_sentence(error)}") from None


def _sentence(error: ValidationError) -> str:
    """The first of pydantic's complaints, with the place as it is written in the recipe."""
    first = error.errors()[0]
    *outer, last = first["loc"] or ("",)
    kind, place, inside = first["type"], _place(first["loc"]), _place(outer)
    if kind == "value_error":
        return f"{place}: {first.get('ctx', {}).get('error')}"
    if kind == "missing":
        return f"{inside} lacks {last!r}."
    if kind == "unexpected_keyword_argument":
        part = next((_PARTS[key] for key in reversed(outer) if key in _PARTS), Recipe)
        return f"{inside} has an unknown key {last!r}; known keys are {', '.join(part.__dataclass_fields__)}."
    if kind == "dataclass_type":
        return f"{place} must be a mapping of names to values, not {first['input']!r}."
    said = re.sub(r"^\w+ should", "should", first["msg"]).replace("array", "list")
    return f"{place} {said}, not {reprlib.repr(first['input'])}."


def _place(location: tuple | list) -> str:
    return "recipe" + "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in location)
