"""Runs a recipe: loads, trains stage after stage, saves; resumes where a killed run left off.

Knows the order of things and the folders. The run's own files (stage folders with checkpoints, TensorBoard logs,
history) live in `<output>.run`; the finished checkpoint is written to `<output>`.
"""

import dataclasses
import hashlib
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from transformers import ProgressCallback, TrainingArguments, set_seed
from transformers.integrations import is_tensorboard_available

from rim_probe.adapters import checkpoint_files, finish_checkpoint, has_tokenizer
from rim_probe.bases import record_of
from rim_probe.encoding import has_closed_vocabulary
from rim_probe.errors import RecipeError
from rim_probe.files import begins_with, check_file, check_folder, hold, one_sentence_if_full, write_atomic
from rim_probe.loading import load_tokenizer
from rim_probe.memory import LAYOUT_FILE
from rim_probe.model import RiM
from rim_probe.problems import Problem
from rim_probe.trained_on import FILE, TrainedOn
from rim_probe.training.backends import chosen_attention, chosen_precision, on_gpu, running_arguments
from rim_probe.training.callbacks import Progress, StopAfter
from rim_probe.training.origin import make_model, reload, set_dropout
from rim_probe.training.recipe import Recipe, Stage, load_recipe
from rim_probe.training.stages import (
    Pool,
    batches_per_step,
    make_batches,
    make_pool,
    make_problems,
    make_row,
    readout_weights,
    usable_problems,
)
from rim_probe.training.trainer import RiMTrainer
from rim_probe.training.trial import Trial

LOG_EVERY = 50  # steps
_STEPS_TOLD = ("stage1", "interchange")  # objectives whose rows tell steps; a pair is more than one of them
_MAKER = "train"  # what a run's folder is marked with
_WRITTEN = "written"  # in a run's folder: it has begun to write its output
_RECIPE = "recipe.json"  # of a run: what it was started with
_STATE = "trainer_state.json"  # the Trainer writes it last: a checkpoint where it cannot be read is half written


def train(
    recipe: str | Path,
    *,
    output: str | None = None,
    resume: bool = False,
    max_minutes: float | None = None,
    trial: Trial | None = None,
    report: Callable[[str], None] = print,
) -> Path | None:
    """Trains what a recipe says.

    Args:
        recipe: a YAML file, see `Recipe`.
        output: replaces the recipe's output folder.
        resume: go on from the last complete checkpoint of an earlier run into the same output.
        max_minutes: save and stop before so many minutes are over, see `StopAfter`; None: no limit. SIGTERM and SIGINT
            do the same.
        trial: a few steps of few rows in the place of every stage, to see that a recipe works; needs `output`.

    Returns:
        The finished checkpoint folder, with a folder inside for every stage but the last, as controls; or None if the
        time ran out before the end.

    Raises:
        RecipeError: an impossible recipe, an unfinished run in the same output and `resume` not asked for, an output
            that holds another model.
        RiMError: a run's folder that another command made, or into which another process trains now; a full disk.
        CheckpointError: a base that cannot be loaded.
    """
    stopper = StopAfter(math.inf if max_minutes is None else max_minutes)
    plan = load_recipe(recipe, output=output)
    if trial and output is None:
        raise RecipeError("A trial needs an output of its own (--output), not the place of the real checkpoint.")
    plan = trial.of(plan) if trial else plan
    folder = Path(plan.output)
    run = folder.with_name(folder.name + ".run")
    if folder.exists() and not folder.is_dir():
        raise RecipeError(f"{folder} is a file; output must name a folder for the finished checkpoint.")
    check_folder(run, _MAKER, _is_run)
    begun = run.exists() and any(path.is_dir() for path in run.iterdir())
    if begun and not resume:
        raise RecipeError(f"{run} holds an earlier run; add --resume to go on with it, or remove the folder.")
    for place in (folder, *(folder / stage.name for stage in plan.stages[:-1])):
        _check_free(place, run)
    processes = PartialState(cpu=not on_gpu())
    processes.wait_for_everyone()  # so that nobody mistakes what the first one writes for an earlier run
    if not processes.is_main_process:
        return _train(plan, folder, run, begun, trial, stopper, processes, _nothing)
    with one_sentence_if_full(run), hold(run, _MAKER, _is_run):
        return _train(plan, folder, run, begun, trial, stopper, processes, report)


def _train(
    plan: Recipe,
    folder: Path,
    run: Path,
    begun: bool,
    trial: Trial | None,
    stopper: StopAfter,
    processes: PartialState,
    report: Callable[[str], None],
) -> Path | None:
    set_seed(plan.seed)
    rim = make_model(plan)
    plan = _settled(plan, rim, run / _RECIPE)
    files, validation = make_problems(plan.data, report)
    with processes.main_process_first():  # the others find in the cache what it made
        pool, held = make_pool(rim, files, report), make_pool(rim, [validation], report)
    trained_on = TrainedOn.of(pool.problems, has_closed_vocabulary(rim.tokenizer))
    if processes.is_main_process:
        origin = _origin(rim, plan)
        _check_same(run / _RECIPE, plan, pool.problems + held.problems, begun, trial is not None, origin)
    trained = 0
    for number, stage in enumerate(plan.stages):
        stage_folder = run / stage.name
        if (stage_folder / "done").exists():
            continue
        if trained and stopper.too_late_for_a_stage(processes.device):
            report(f"Stopped {stopper.why} before stage {stage.name}; go on with --resume.")
            return None
        if number:
            rim = reload(rim, run / plan.stages[number - 1].name / "best")
        rim.trained_on = trained_on
        weights = sum(map(_trained, rim.model.parameters()))
        report(f"{plan.output}, stage {stage.name}: {stage.rows:,} rows, {weights:,} weights")
        every = trial.log_every if trial else LOG_EVERY
        trainer = _make_trainer(rim, plan, stage, number, pool, held, stage_folder, report, every)
        stopper.validation_steps = len(trainer.valid_rows) / trainer.rows_per_batch + (50 if trainer.asked else 0)
        trainer.add_callback(stopper)
        with stopper.on_signals():
            trainer.train(resume_from_checkpoint=_last_complete(stage_folder))
        if stopper.stopped:
            report(f"Stopped {stopper.why} at step {trainer.state.global_step}; go on with --resume.")
            return None
        trainer.save_model(str(stage_folder / "best"))
        if processes.is_main_process:
            _write_history(stage_folder, trainer.state)
            (stage_folder / "done").touch()
        if trial:
            report(f"Stage {stage.name}: {trial.told(trainer.state.log_history)}.")
        trained += 1
        processes.wait_for_everyone()
    if processes.is_main_process:
        (run / _WRITTEN).touch()
        finish_checkpoint(run / plan.stages[-1].name / "best", folder)
        for stage in plan.stages[:-1]:  # what the last stage is compared with
            finish_checkpoint(run / stage.name / "best", folder / stage.name)
    report(f"Saved {folder}." if not trial else f"Saved {folder}, which was tried and not trained: {trial}.")
    return folder


def describe(recipe: str | Path, checkpoint: str | Path, report: Callable[[str], None] = print) -> TrainedOn:
    """Writes into a checkpoint what a recipe trains on, as a training by it would have done.

    Raises:
        RiMError: an impossible recipe, problems that cannot be read, no checkpoint folder.
    """
    plan, folder = load_recipe(recipe), Path(checkpoint)
    if not (folder / LAYOUT_FILE).is_file():
        raise RecipeError(f"{folder} is no checkpoint folder ({LAYOUT_FILE} is missing); name one that was trained.")
    check_file(folder / FILE, begins_with('{"format": "rim-probe-trained-on/'), "what training wrote")
    files, _ = make_problems(plan.data, report)
    closed = has_tokenizer(folder) and has_closed_vocabulary(load_tokenizer(folder))
    told = TrainedOn.of(list(itertools.chain.from_iterable(files)), closed)
    told.save(folder)
    return told


def _is_run(folder: Path) -> bool:
    """Whether a folder without a mark is that of a run: older ones have none."""
    return (folder / _RECIPE).is_file() or (folder / _WRITTEN).is_file()


def _check_free(folder: Path, run: Path) -> None:
    """Refuses an output folder with a model that another run, or another program, put there: it would be replaced."""
    if (run / _WRITTEN).exists():
        return
    if held := checkpoint_files(folder):
        raise RecipeError(
            f"{folder} holds a model that this run did not make ({held[0].name}); name another output, or move it away."
        )


def make_trainers(plan: Recipe, folder: Path, report: Callable[[str], None]) -> list[RiMTrainer]:
    """A trainer for every stage, all of the untrained model, with their files in `folder`; nothing to validate on.

    The first stage's is made last, so the model is left as that stage begins with it.
    """
    PartialState(cpu=not on_gpu())
    set_seed(plan.seed)
    rim = make_model(plan)
    plan = _settled(plan, rim, None)
    files, _ = make_problems(plan.data, report)
    pool, held = make_pool(rim, files, report), make_pool(rim, [[]], report)
    stages = list(enumerate(plan.stages))
    made = [_make_trainer(rim, plan, stage, i, pool, held, folder, report) for i, stage in reversed(stages)]
    return made[::-1]


def _settled(plan: Recipe, rim: RiM, file: Path | None) -> Recipe:
    """The recipe with its precision and attention chosen for this machine; a run that has begun keeps its own.

    Or a busy machine, on which bfloat16 seems slow, would change them in the middle of a run.
    """
    begun = json.loads(file.read_text(encoding="utf-8")) if file and file.exists() else {}
    precision = begun.get("precision", plan.precision) if plan.precision == "auto" else plan.precision
    precision = chosen_precision(precision, rim.model)
    attention = begun.get("attention", plan.attention) if plan.attention == "auto" else plan.attention
    return dataclasses.replace(plan, precision=precision, attention=chosen_attention(attention, precision))


def _origin(rim: RiM, plan: Recipe) -> dict[str, str | None]:
    """Digests of the weights that a run begins with: of its base, and of the adapter it goes on from."""
    base = record_of(rim.model)
    start = None if plan.start is None else hashlib.sha256()
    for file in sorted(Path(plan.start).glob("*.safetensors")) if plan.start else ():
        start.update(file.read_bytes())
    return {"base_weights": base.sha256 if base else None, "start_weights": start and start.hexdigest()}


def _check_same(
    file: Path, plan: Recipe, problems: list[Problem], begun: bool, trial: bool, origin: dict[str, str | None]
) -> None:
    """Keeps what a run was started with; refuses to go on with another recipe, other problems or other weights.

    Stages that are done would be taken over, and the result would be that of no recipe at all.
    """
    told = "\n".join(f"{problem.question}|{problem.steps}|{problem.answer}" for problem in problems)
    now = json.loads(json.dumps(dataclasses.asdict(plan)))
    del now["output"]  # a run may have been moved
    now["trial"] = trial
    now |= origin
    now["problems_sha256"] = hashlib.sha256(told.encode("utf-8", "surrogatepass")).hexdigest()
    if not begun or not file.exists():
        write_atomic(file, (json.dumps(now, indent=2) + "\n").encode())
        return
    before = json.loads(file.read_text(encoding="utf-8"))
    if changed := [key for key in now if now[key] != before.get(key)]:
        raise RecipeError(
            f"{', '.join(changed)} changed since the run in {file.parent} began; restore what it was, or remove the "
            "folder and start anew."
        )


def _make_trainer(
    rim: RiM,
    plan: Recipe,
    stage: Stage,
    number: int,
    pool: Pool,
    held: Pool,
    folder: Path,
    report: Callable[[str], None],
    log_every: int = LOG_EVERY,
) -> RiMTrainer:
    batches = make_batches(rim, pool, usable_problems(pool, "training", rim, stage, report), plan, number, report)
    # Validation is about the objective alone: rows that keep the targets of stage 1 say nothing about stage 2.
    plain = dataclasses.replace(stage, grounded=0.0, slot_labels=0)
    valid = np.flatnonzero(usable_problems(held, "validation", rim, plain, report)).tolist()
    valid_row = make_row(held.tokens, plain, plan.seed)
    valid_rows = [valid_row(held.tokens[i], 0) for i in valid]
    steps = max(1, len(batches) // batches_per_step(stage))
    if stage.dropout is not None:
        set_dropout(rim.model, stage.dropout)
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=1,  # whole batches are made by `Batches`
        gradient_accumulation_steps=stage.accumulation,
        learning_rate=stage.learning_rate,
        lr_scheduler_type={"constant": "constant_with_warmup"}.get(stage.schedule, stage.schedule),
        warmup_steps=round(stage.warmup * steps),
        weight_decay=stage.weight_decay,
        optim="adamw_torch_fused",
        **running_arguments(plan.precision),
        logging_nan_inf_filter=False,  # it would hide them, and wait for the device in every step to do so
        logging_steps=min(log_every, stage.validate_every),
        eval_strategy="steps" if valid_rows else "no",
        eval_steps=stage.validate_every,
        save_strategy="steps",
        save_steps=stage.validate_every,
        save_total_limit=2,
        load_best_model_at_end=bool(valid_rows),
        metric_for_best_model="accuracy" if valid_rows else None,
        greater_is_better=True if valid_rows else None,
        report_to=["tensorboard"] if is_tensorboard_available() else [],
        remove_unused_columns=False,
        disable_tqdm=False,
        ddp_find_unused_parameters=False,
        seed=plan.seed + 1000 * number,
    )
    args._n_gpu = min(1, args.n_gpu)  # one process, one GPU; several are for `accelerate launch`, not for DataParallel
    trainer = RiMTrainer(
        rim,
        args,
        batches,
        valid_rows,
        readout_weights(stage),
        asked=[held.problems[i] for i in valid] if stage.objective == "cot" else (),
        slot_labels=stage.slot_labels,
        attention=plan.attention,
        compile=plan.compile,
    )
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(Progress())
    return trainer


def _last_complete(folder: Path) -> str | None:
    """The newest checkpoint that was written to the end."""
    for path in sorted(folder.glob("checkpoint-*"), key=lambda path: -int(path.name.rsplit("-", 1)[1])):
        try:
            json.loads((path / _STATE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        return str(path)
    return None


def _write_history(folder: Path, state) -> None:
    """The log of the stage as JSON lines, for curves and model cards."""
    lines = "".join(json.dumps(entry) + "\n" for entry in state.log_history)
    write_atomic(folder / "history.jsonl", lines.encode())


def _trained(parameter: torch.nn.Parameter) -> int:
    return parameter.numel() if parameter.requires_grad else 0


def _nothing(line: str) -> None:
    """Takes the reports nobody should read twice."""
