"""Training recipes: a YAML file that says what is trained, on which rows, in which stages.

Knows names, types and defaults; every key that is not known is refused by name. Knows nothing about how training runs.
"""

import dataclasses
import types
import typing
from dataclasses import dataclass
from pathlib import Path

import yaml

from rim_probe.datasets.arithmetic import World
from rim_probe.errors import RecipeError, RiMError
from rim_probe.memory import MAX_BLOCKS, MemoryLayout
from rim_probe.training.schedules import LAMBDA_SCHEDULES

OBJECTIVES = ("stage1", "stage2", "interchange", "cot", "direct")
LR_SCHEDULES = ("constant", "linear", "cosine")
ATTENTIONS = ("auto", "sdpa", "eager", "flex")
PRECISIONS = ("auto", "float32", "bfloat16")
MAX_REPEAT = 1000


@dataclass(frozen=True)
class Scratch:
    """A small Llama trained from nothing with the vocabulary of the procedural world."""

    layers: int = 8
    width: int = 128
    heads: int = 4
    inner: int = 384
    context: int = 512

    def __post_init__(self) -> None:
        for key in ("layers", "width", "heads", "inner", "context"):
            _positive(key, getattr(self, key))
        if self.width % (2 * self.heads):
            raise RecipeError(f"width must be an even number for each of the {self.heads} heads, not {self.width}.")


@dataclass(frozen=True)
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
    repeats: tuple[float, ...] = ()
    rows: int | None = None
    seed: int = 1
    validation: str | None = None
    validation_rows: int = 500

    def __post_init__(self) -> None:
        if (self.world is None) == (not self.files):
            raise RecipeError("Exactly one of world (procedural problems) and files (problem files) is needed.")
        if self.world is not None and self.rows is None:
            raise RecipeError("rows must say how many problems of the world make the pool.")
        if self.world is not None and self.validation is not None:
            raise RecipeError("validation goes with files; a world has problems of its own for that.")
        if self.world is not None and self.repeats:
            raise RecipeError("repeats goes with files; of a world, rows says how many problems there are.")
        if self.repeats and len(self.repeats) != len(self.files):
            raise RecipeError(
                f"repeats must hold one number for each of the {len(self.files)} files, not {len(self.repeats)}."
            )
        for repeat in self.repeats:
            if not 0 < repeat <= MAX_REPEAT:
                raise RecipeError(f"repeats must be above 0 and at most {MAX_REPEAT}, not {repeat:g}.")
        if self.rows is not None:
            _positive("rows", self.rows)
        if self.validation_rows < 0:
            raise RecipeError(f"validation_rows must be at least 0, not {self.validation_rows}.")
        _seed(self.seed)


@dataclass(frozen=True)
class Lora:
    """A low-rank adapter on every linear layer, plus the three memory-token rows; r = 0 trains those rows alone."""

    r: int = 128
    alpha: int = 256
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.r < 0:
            raise RecipeError(f"r must be at least 0, not {self.r}.")
        _positive("alpha", self.alpha)
        _share("dropout", self.dropout)


@dataclass(frozen=True)
class Stage:
    """One stage with an optimizer and a scheduler of its own.

    Attributes:
        objective: stage1 (steps, then the answer), stage2 (the answer everywhere), interchange (as stage1 with every
            weight 1, and what follows where a block's slots are another problem's), cot, direct.
        rows: rows seen, over as many passes of the pool as that takes.
        schedule: learning rate after the warm-up.
        lambdas: how stage 1 fades its steps: relative, absolute or constant.
        blocks: stage 1: at least this many blocks (None: one per step). stage 2 and interchange: the layout's number if
            None.
        grounded: stage 2: share of rows that keep the targets of stage 1.
        share: interchange: share of rows that are pairs; the others are those of stage 1.
        one_number_share: interchange: share of pairs that differ in one number only, where there are such.
        slot_labels: stage 1 and interchange: after how many layers at most (evenly spaced, the last among them) slots
            are to name the result of their step; 0: after none.
        dropout: of the adapter in this stage (None: as the recipe says).
        batch_tokens: a batch holds rows of like length of at most so many tokens, padding counted, in the place of
            `batch_size` rows: short rows come in larger batches, so that every batch is as much work.
        validate_every: steps between validations, each of which also saves a checkpoint.
    """

    name: str
    objective: str
    rows: int
    learning_rate: float
    batch_size: int = 32
    batch_tokens: int | None = None
    accumulation: int = 1
    schedule: str = "constant"
    warmup: float = 0.04
    weight_decay: float = 0.0
    lambdas: str = "relative"
    blocks: int | None = None
    grounded: float = 0.0
    share: float = 1.0
    one_number_share: float = 0.3
    slot_labels: int = 0
    dropout: float | None = None
    validate_every: int = 500

    def __post_init__(self) -> None:
        _choice("objective", self.objective, OBJECTIVES)
        _choice("schedule", self.schedule, LR_SCHEDULES)
        _choice("lambdas", self.lambdas, LAMBDA_SCHEDULES)
        for key in ("rows", "batch_size", "accumulation", "validate_every"):
            _positive(key, getattr(self, key))
        if self.batch_tokens is not None:
            _positive("batch_tokens", self.batch_tokens)
        if not 0 < self.learning_rate < 1:
            raise RecipeError(f"learning_rate must lie between 0 and 1, not {self.learning_rate}.")
        for key in ("warmup", "grounded", "share", "one_number_share", "dropout"):
            if getattr(self, key) is not None:
                _share(key, getattr(self, key))
        if not self.weight_decay >= 0:
            raise RecipeError(f"weight_decay must be at least 0, not {self.weight_decay}.")
        if self.slot_labels < 0:
            raise RecipeError(f"slot_labels must be at least 0, not {self.slot_labels}.")
        if self.slot_labels and self.objective not in ("stage1", "interchange"):
            raise RecipeError(f"slot_labels goes with stage1 and interchange, not with {self.objective}.")
        if self.blocks is not None and not 1 <= self.blocks <= MAX_BLOCKS:
            raise RecipeError(f"blocks must lie between 1 and {MAX_BLOCKS}, not {self.blocks}.")
        if not self.name or set(self.name) & set("/\\ .") or self.name in ("cot", "direct", "probes"):
            raise RecipeError(f"A stage name must be a plain word for a folder, not {self.name!r}.")


@dataclass(frozen=True)
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
    stages: tuple[Stage, ...]
    data: Data
    base: str | None = None
    scratch: Scratch | None = None
    start: str | None = None
    layout: MemoryLayout = MemoryLayout()
    lora: Lora | None = None
    seed: int = 0
    precision: str = "auto"
    attention: str = "auto"
    compile: bool = False

    def __post_init__(self) -> None:
        _choice("attention", self.attention, ATTENTIONS)
        _choice("precision", self.precision, PRECISIONS)
        if sum(origin is not None for origin in (self.base, self.scratch, self.start)) != 1:
            raise RecipeError(
                "A recipe needs exactly one of base (a model to begin with), scratch (a new model) and start (an "
                "adapter to go on from)."
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
        _seed(self.seed)
        if not self.stages:
            raise RecipeError("A recipe needs at least one stage.")
        if len({stage.name for stage in self.stages}) < len(self.stages):
            raise RecipeError("Every stage needs a name of its own.")


def load_recipe(path: str | Path, **overrides) -> Recipe:
    """Reads a YAML recipe; `overrides` replace its top-level values (None is ignored).

    Raises:
        RecipeError: no such file, not YAML, an unknown key, a wrong type or an impossible value.
    """
    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"The recipe {path} cannot be read ({error.strerror}).") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # what its constructors raise besides YAMLError
        mark = getattr(error, "problem_mark", None)
        said = f"line {mark.line + 1}: {error.problem}" if mark else str(error).splitlines()[0]
        raise RecipeError(f"The recipe {path} is not YAML ({said}).") from None
    if isinstance(data, dict):
        data |= {key: value for key, value in overrides.items() if value is not None}
    try:
        return _build(Recipe, data, "recipe")
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from None


def _build(kind: type, data: object, where: str):
    """A dataclass from plain YAML values, checked key by key."""
    if not isinstance(data, dict):
        raise RecipeError(f"{where} must be a mapping of names to values, not {type(data).__name__}.")
    hints, known = typing.get_type_hints(kind), {field.name: field for field in dataclasses.fields(kind)}
    unknown = [str(key) for key in data if key not in known]
    if unknown:
        raise RecipeError(f"{where} has an unknown key {unknown[0]!r}; known keys are {', '.join(known)}.")
    required = [name for name, field in known.items() if field.default is dataclasses.MISSING and name not in data]
    if required:
        raise RecipeError(f"{where} lacks {required[0]!r}.")
    values = {key: _convert(hints[key], value, f"{where}.{key}") for key, value in data.items()}
    try:
        return kind(**values)
    except RiMError as error:
        raise RecipeError(f"{where}: {error}") from None


def _convert(hint, value, where: str):
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        if value is None:
            return None
        hint = next(option for option in typing.get_args(hint) if option is not types.NoneType)
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, list):
            raise RecipeError(f"{where} must be a list, not {value!r}.")
        return tuple(_convert(typing.get_args(hint)[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, where)
    if hint is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:  # YAML 1.1 reads 1e-3 as text
            return float(value)
        except (ValueError, OverflowError):
            pass
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise RecipeError(f"{where} must be of type {hint.__name__}, not {value!r}.")
    return value


def _choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise RecipeError(f"{key} must be one of {', '.join(choices)}, not {value!r}.")


def _positive(key: str, value: int) -> None:
    if value < 1:
        raise RecipeError(f"{key} must be at least 1, not {value}.")


def _share(key: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise RecipeError(f"{key} must lie between 0 and 1, not {value}.")


def _seed(value: int) -> None:
    if not 0 <= value < 2**31:
        raise RecipeError(f"seed must lie between 0 and 2**31 - 1, not {value}.")
