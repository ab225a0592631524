"""What a recipe's training will take on this machine: each back end for some steps, in about a minute, nothing kept.

Knows trainers, back ends and clocks. The first stage is measured at its own batch size on batches spread over its whole
order; minutes of the other stages follow from the real tokens of their rows. Validation and saving are not counted.
"""

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from accelerate.utils import send_to_device

from rim_probe.precision import matrix_rate, synchronize
from rim_probe.training.backends import compile_layers, on_gpu, set_attention, uncompile_layers
from rim_probe.training.recipe import Recipe, load_recipe
from rim_probe.training.run import make_trainers
from rim_probe.training.trainer import RiMTrainer

WARM, TIMED = 3, 12  # steps of a variant; fewer where a step takes seconds
_SECONDS = 12.0  # that a variant's timed steps may take in all
_SAMPLE = 40  # batches of a stage that are measured for their tokens
_PARTS = ("forward", "backward", "optimizer")


@dataclasses.dataclass(frozen=True)
class Variant:
    attention: str
    compile: bool

    def __str__(self) -> str:
        return self.attention + (" + compile" if self.compile else "")


@dataclasses.dataclass(frozen=True)
class Result:
    """What was measured of a variant.

    Attributes:
        seconds: median of a step, one call after the other as in training.
        compile_seconds: what the first steps took beyond that.
        rows_per_second, tokens_per_second, flops_per_second: of the timed steps together.
        padding: share of positions.
        peak: bytes on the GPU, None on a CPU.
        parts: seconds of forward, backward and optimizer of a step in which each is waited for.
    """

    seconds: float
    compile_seconds: float
    rows_per_second: float
    tokens_per_second: float
    flops_per_second: float
    padding: float
    peak: int | None
    parts: dict[str, float]


def variants() -> list[Variant]:
    """On a CPU nothing compiled, which would take most of the minute, and no flex, which does not train there."""
    if not on_gpu():
        return [Variant("sdpa", False), Variant("eager", False)]
    return [Variant(attention, compiled) for attention in ("sdpa", "flex") for compiled in (False, True)]


def profile(
    recipe: str | Path, *, batch_size: int | None = None, report: Callable[[str], None] = print
) -> dict[Variant, Result]:
    """Measures every variant and reports a table; a variant that fails is named with its reason.

    Args:
        batch_size: rows in a step, in the place of the recipe's.

    Raises:
        RiMError: as `train`.
    """
    plan = dataclasses.replace(load_recipe(recipe), compile=False)
    if batch_size is not None:
        stages = tuple(
            dataclasses.replace(stage, batch_size=batch_size, batch_tokens=None, accumulation=1)
            for stage in plan.stages
        )
        plan = dataclasses.replace(plan, stages=stages)
    with tempfile.TemporaryDirectory() as folder:  # a trainer makes the folder of its files
        trainers = make_trainers(plan, Path(folder), report)
        return _measure_all(plan, trainers, report)


def _measure_all(plan: Recipe, trainers: list[RiMTrainer], report: Callable[[str], None]) -> dict[Variant, Result]:
    trainer, stage = trainers[0], plan.stages[0]
    start = time.perf_counter()
    batches = _batches(trainer)
    loading = (time.perf_counter() - start) / len(batches)
    device = trainer.args.device.type
    rate = matrix_rate(device, torch.bfloat16 if trainer.args.bf16 else torch.float32)
    trainer.create_optimizer()
    trainer.state.max_steps = trainer.args.max_steps
    model, trainer.optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
    kind = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    kind += ", bfloat16" if trainer.args.bf16 else ", float32"
    report(
        f"{kind}: {rate / 1e12:.3g} TFLOP/s in a large matrix product; stage {stage.name}, "
        f"{trainer.rows_per_batch:.1f} rows a batch."
    )
    results = {}
    for variant in variants():
        try:
            results[variant] = _measure(trainer, model, batches, variant)
        except Exception as error:  # a back end may fail in a hundred ways; the others are still of use
            line = (str(error).strip().splitlines() or [""])[0]
            report(f"{variant} failed: {type(error).__name__}: {line[:200]}")
        if device == "cuda":
            torch.cuda.empty_cache()
    if results:
        _tell(plan, trainers, results, rate, loading, report)
    return results


def _batches(trainer: RiMTrainer) -> list[dict[str, torch.Tensor]]:
    """Batches as training would see them, spread evenly over the stage."""
    batches = trainer.train_dataset
    chosen = [place * len(batches) // (WARM + TIMED) for place in range(WARM + TIMED)]
    return [trainer.data_collator([batches[n]]) for n in chosen]


def _measure(trainer: RiMTrainer, model, batches: Sequence[dict], variant: Variant) -> Result:
    device = trainer.args.device.type
    set_attention(model, variant.attention)
    if variant.compile:
        compile_layers(model)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    try:
        warm = [_timed(device, lambda batch=batch: _step(trainer, model, batch)) for batch in batches[:WARM]]
        trainer.meter.restart()
        times: list[float] = []
        for batch in batches[WARM:]:
            times.append(_timed(device, lambda batch=batch: _step(trainer, model, batch)))
            if sum(times) > _SECONDS and len(times) > 1:
                break
        reading = trainer.meter.read()
        parts: dict[str, float] = {}
        _step(trainer, model, batches[len(batches) // 2], parts)
    finally:
        if variant.compile:
            uncompile_layers(model)
        set_attention(model, "sdpa")
    median = statistics.median(times)
    return Result(
        seconds=median,
        compile_seconds=max(0.0, sum(warm) - len(warm) * median)
        if variant.compile or variant.attention == "flex"
        else 0.0,
        rows_per_second=reading["rows_per_second"],
        tokens_per_second=reading["tokens_per_second"],
        flops_per_second=reading["tflops"] * 1e12,
        padding=reading["padding"],
        peak=torch.cuda.max_memory_allocated() if device == "cuda" else None,
        parts=parts,
    )


def _timed(device: str, work: Callable[[], None]) -> float:
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def _step(trainer: RiMTrainer, model, batch: dict, parts: dict[str, float] | None = None) -> None:
    """One step of training; with `parts` each part is waited for and timed."""
    device = trainer.args.device.type
    model.train()
    inputs = send_to_device(batch, trainer.args.device)
    losses = []

    def update() -> None:
        trainer.accelerator.clip_grad_norm_(model.parameters(), trainer.args.max_grad_norm)
        trainer.optimizer.step()
        model.zero_grad()

    work = (
        lambda: losses.append(trainer.compute_loss(model, inputs)),
        lambda: trainer.accelerator.backward(losses[0]),
        update,
    )
    for name, part in zip(_PARTS, work, strict=True):
        if parts is None:
            part()
        else:
            parts[name] = _timed(device, part)


def _tell(
    plan: Recipe,
    trainers: list[RiMTrainer],
    results: dict[Variant, Result],
    rate: float,
    loading: float,
    report: Callable[[str], None],
) -> None:
    tokens = [stage.rows * _tokens_per_row(trainer) for stage, trainer in zip(plan.stages, trainers, strict=True)]
    minutes = {
        variant: [(each / result.tokens_per_second + result.compile_seconds) / 60 for each in tokens]
        for variant, result in results.items()
    }
    head = ["variant", "ms/step", "rows/s", "tokens/s", "MFU", "GB", "padding", "compile s"]
    head += [f"{stage.name} min" for stage in plan.stages] + ["all min"]
    table = [head]
    for variant, result in results.items():
        table.append(
            [
                str(variant),
                f"{1000 * result.seconds:.1f}",
                f"{result.rows_per_second:.1f}",
                f"{result.tokens_per_second:.0f}",
                f"{100 * result.flops_per_second / rate:.1f}%",
                "-" if result.peak is None else f"{result.peak / 1e9:.1f}",
                f"{100 * result.padding:.1f}%",
                f"{result.compile_seconds:.0f}",
                *(f"{each:.1f}" for each in minutes[variant]),
                f"{sum(minutes[variant]):.1f}",
            ]
        )
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        cells = [
            line[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)),
        ]
        report("  ".join(cells))
    for variant, result in results.items():
        whole = sum(result.parts.values())
        shares = ", ".join(f"{name} {100 * seconds / whole:.0f}%" for name, seconds in result.parts.items())
        report(f"A step of {variant}: {shares}.")
    workers = trainers[0].args.dataloader_num_workers
    where = f"by {workers} processes beside the steps" if workers else "between the steps"
    report(f"Making a batch takes {1000 * loading:.1f} ms, {where}.")
    best = min(minutes, key=lambda variant: sum(minutes[variant]))
    told = f"Least for this run, compiling counted: {best}, {sum(minutes[best]):.1f} minutes"
    plain = Variant("sdpa", False)
    told += f", against {sum(minutes[plain]):.1f} of {plain}" if best != plain and plain in minutes else ""
    report(f"{told} (attention: {best.attention}, compile: {str(best.compile).lower()}).")


def _tokens_per_row(trainer: RiMTrainer) -> float:
    """Mean length of rows of batches spread evenly over a stage."""
    batches = trainer.train_dataset
    count = min(_SAMPLE, len(batches))
    return statistics.mean(len(row) for place in range(count) for row in batches[place * len(batches) // count])
