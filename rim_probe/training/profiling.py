"""What a recipe's training will take on this machine: its first stage with each back end for some steps, nothing kept.

Method: the trainer itself takes the steps, into a folder that is thrown away, and its own log says how fast. The first
steps pay for compiling and are told apart; minutes of all stages follow from the tokens of their rows. Validation and
saving are not counted. Knows trainers and back ends.
"""

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from transformers import ProgressCallback, TrainerCallback

from rim_probe.loading import first_line
from rim_probe.report import table
from rim_probe.training.backends import on_gpu, uncompile_layers
from rim_probe.training.recipe import Recipe, load_recipe
from rim_probe.training.run import make_trainers
from rim_probe.training.trainer import RiMTrainer

WARM, TIMED = 3, 12  # steps of a variant; fewer where a step takes seconds
_SECONDS = 12.0  # that a variant's timed steps may take in all
_SAMPLE = 40  # batches of a stage that are measured for their tokens


@dataclasses.dataclass(frozen=True)
class Variant:
    """A back end: how packed rows attend, and whether the layers are compiled."""

    attention: str
    compile: bool

    def __str__(self) -> str:
        return self.attention + (" + compile" if self.compile else "")


@dataclasses.dataclass(frozen=True)
class Result:
    """What was measured of a variant.

    Attributes:
        log: medians of what the trainer logs of the timed steps (see `speed.Meter.read`).
        compile_seconds: what the first steps took beyond a timed one each.
        minutes: of every stage at that speed, compiling counted.
    """

    log: dict[str, float]
    compile_seconds: float
    minutes: list[float]


class _Clock(TrainerCallback):
    """Times the steps and ends the training when there are enough."""

    def __init__(self):
        self.seconds: list[float] = []

    def on_train_begin(self, args, state, control, **kwargs):
        self._last = time.perf_counter()

    def on_log(self, args, state, control, **kwargs):  # the loss has been read: the step is over on a GPU, too
        now = time.perf_counter()
        self.seconds.append(now - self._last)
        self._last = now
        timed = self.seconds[WARM:]
        if len(timed) == TIMED or (len(timed) > 1 and sum(timed) > _SECONDS):
            control.should_training_stop = True


def variants() -> list[Variant]:
    """On a CPU nothing compiled, which would take minutes, and no flex, which does not train there."""
    if not on_gpu():
        return [Variant("sdpa", False), Variant("eager", False)]
    return [Variant(attention, compiled) for attention in ("sdpa", "flex") for compiled in (False, True)]


def profile(
    recipe: str | Path, *, batch_size: int | None = None, report: Callable[[str], None] = print
) -> dict[Variant, Result]:
    """Measures every variant and reports a table; a variant that fails is named with its reason.

    Args:
        recipe: a YAML file.
        batch_size: rows in a step, in the place of the recipe's.
        report: takes each line.

    Raises:
        RiMError: as `train`.
    """
    plan = load_recipe(recipe)
    if batch_size is not None:
        stages = tuple(
            dataclasses.replace(stage, batch_size=batch_size, batch_tokens=None, accumulation=1)
            for stage in plan.stages
        )
        plan = dataclasses.replace(plan, stages=stages)
    results: dict[Variant, Result] = {}
    failure = None
    for variant in variants():
        chosen = dataclasses.replace(plan, attention=variant.attention, compile=variant.compile)
        with tempfile.TemporaryDirectory() as folder:
            try:
                results[variant] = _measure(chosen, Path(folder))
            except Exception as error:  # a back end may fail in a hundred ways; the others are still of use
                failure = error
                report(f"{variant} failed: {first_line(error)}")
    if failure and not results:
        raise failure
    _tell(plan, results, report)
    return results


def _measure(plan: Recipe, folder: Path) -> Result:
    trainers = make_trainers(plan, folder, lambda line: None)
    trainer, clock = trainers[0], _Clock()
    trainer.args.logging_steps, trainer.args.save_strategy = 1, "no"
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(clock)
    try:
        trainer.train()
    finally:
        if plan.compile:
            uncompile_layers(trainer.model)
    log = [entry for entry in trainer.state.log_history if "tokens_per_second" in entry]
    timed = log[WARM:] or log[-1:]
    keys = [key for key in timed[0] if all(key in entry for entry in timed)]
    median = {key: statistics.median(entry[key] for entry in timed) for key in keys}
    step = statistics.median(clock.seconds[WARM:] or clock.seconds)
    compiling = max(0.0, sum(clock.seconds[:WARM]) - WARM * step) if plan.compile or plan.attention == "flex" else 0.0
    tokens = [stage.rows * _tokens_per_row(each) for stage, each in zip(plan.stages, trainers, strict=True)]
    minutes = [(each / median["tokens_per_second"] + compiling) / 60 for each in tokens]
    return Result(median, compiling, minutes)


def _tokens_per_row(trainer: RiMTrainer) -> float:
    """Mean length of rows of batches spread evenly over a stage."""
    batches = trainer.train_dataset
    count = min(_SAMPLE, len(batches))
    return statistics.mean(len(row) for place in range(count) for row in batches[place * len(batches) // count])


def _tell(plan: Recipe, results: dict[Variant, Result], report: Callable[[str], None]) -> None:
    header = ["variant", "rows/s", "tokens/s", "MFU", "padding", "GB", "compile s"]
    header += [f"{stage.name} min" for stage in plan.stages] + ["all min"]
    rows = [
        [
            str(variant),
            f"{result.log['rows_per_second']:.1f}",
            f"{result.log['tokens_per_second']:.0f}",
            f"{result.log['utilisation']:.1%}",
            f"{result.log['padding']:.1%}",
            f"{result.log['peak_gb']:.1f}" if "peak_gb" in result.log else "-",
            f"{result.compile_seconds:.0f}",
            *(f"{minutes:.1f}" for minutes in result.minutes),
            f"{sum(result.minutes):.1f}",
        ]
        for variant, result in results.items()
    ]
    report(table(header, rows))
    best = min(results, key=lambda variant: sum(results[variant].minutes))
    report(
        f"Least for this run, compiling counted: {best}, {sum(results[best].minutes):.1f} minutes "
        f"(attention: {best.attention}, compile: {str(best.compile).lower()})."
    )
