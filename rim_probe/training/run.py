"""Runs a recipe: loads, trains stage after stage, saves; resumes where a killed run left off.

Knows the order of things and the folders. The run's own files (stage folders with checkpoints, TensorBoard logs,
history) live in `<output>.run`; the finished checkpoint is written to `<output>`.
"""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import ProgressCallback, TrainingArguments, set_seed
from transformers.integrations import is_tensorboard_available

from rim_probe.datasets.arithmetic import generate, vocabulary
from rim_probe.datasets.sources import load_problems
from rim_probe.errors import QuestionError, RecipeError
from rim_probe.model import ADAPTER_FILE, RiM, load_base
from rim_probe.packing import Row, cot_row, direct_row, stage1_row, stage2_row
from rim_probe.problems import Problem
from rim_probe.training.recipe import Data, Lora, Recipe, Stage, load_recipe
from rim_probe.training.schedules import stage1_weights, stage2_weights
from rim_probe.training.scratch import small_llama, word_tokenizer
from rim_probe.training.trainer import Progress, RiMTrainer, Rows, StopAfter, bucketed_order

_STATE = "trainer_state.json"  # the Trainer writes it last: a checkpoint where it cannot be read is half written


def train(
    recipe: str | Path,
    *,
    output: str | None = None,
    resume: bool = False,
    max_minutes: float | None = None,
    report: Callable[[str], None] = print,
) -> Path | None:
    """Trains what a recipe says.

    Args:
        recipe: a YAML file, see `Recipe`.
        output: replaces the recipe's output folder.
        resume: go on from the last complete checkpoint of an earlier run into the same output.
        max_minutes: save and stop after so many minutes; None: no limit.

    Returns:
        The finished checkpoint folder, or None if the time ran out before the end.

    Raises:
        RecipeError: an impossible recipe, or an unfinished run in the same output and `resume` not asked for.
        CheckpointError: a base that cannot be loaded.
    """
    plan = load_recipe(recipe, output=output)
    folder = Path(plan.output)
    run = folder.with_name(folder.name + ".run")
    if folder.exists() and not folder.is_dir():
        raise RecipeError(f"{folder} is a file; output must name a folder for the finished checkpoint.")
    begun = run.exists() and any(path.is_dir() for path in run.iterdir())
    if begun and not resume:
        raise RecipeError(f"{run} holds an earlier run; add --resume to go on with it, or remove the folder.")
    processes = PartialState(cpu=not torch.cuda.is_available())
    processes.wait_for_everyone()  # so that nobody mistakes what the first one writes for an earlier run
    if not processes.is_main_process:
        report = _nothing
    run.mkdir(parents=True, exist_ok=True)
    set_seed(plan.seed)
    rim = _make_model(plan)
    problems, validation = _make_problems(plan.data, report)
    if processes.is_main_process:
        _check_same(run / "recipe.json", plan, problems + validation, begun)
    stopper = StopAfter(max_minutes) if max_minutes is not None else None
    for number, stage in enumerate(plan.stages):
        stage_folder = run / stage.name
        if (stage_folder / "done").exists():
            continue
        if number:
            rim = _reload(rim, run / plan.stages[number - 1].name / "best", plan.lora)
        weights = sum(map(_trained, rim.model.parameters()))
        report(f"{plan.output}, stage {stage.name}: {stage.rows:,} rows, {weights:,} weights")
        trainer = _make_trainer(rim, plan, stage, number, problems, validation, stage_folder, report)
        if stopper:
            trainer.add_callback(stopper)
        trainer.train(resume_from_checkpoint=_last_complete(stage_folder))
        if stopper and stopper.stopped:
            report(f"Stopped after {max_minutes:g} minutes at step {trainer.state.global_step}; go on with --resume.")
            return None
        trainer.save_model(str(stage_folder / "best"))
        if processes.is_main_process:
            _write_history(stage_folder, trainer.state)
            (stage_folder / "done").touch()
        processes.wait_for_everyone()
    if processes.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        # An adapter left by an earlier run would be loaded in the place of these weights, and the other way round.
        for stale in (*folder.glob("*.safetensors*"), folder / ADAPTER_FILE):
            stale.unlink(missing_ok=True)
        for file in (run / plan.stages[-1].name / "best").iterdir():
            shutil.copy2(file, folder / file.name)
    report(f"Saved {folder}.")
    return folder


def _check_same(file: Path, plan: Recipe, problems: list[Problem], begun: bool) -> None:
    """Keeps what a run was started with; refuses to go on with another recipe or other problems.

    Stages that are done would be taken over, and the result would be that of no recipe at all.
    """
    told = "\n".join(f"{problem.question}|{problem.steps}|{problem.answer}" for problem in problems)
    now = json.loads(json.dumps(dataclasses.asdict(plan)))
    del now["output"]  # a run may have been moved
    now["problems_sha256"] = hashlib.sha256(told.encode("utf-8", "surrogatepass")).hexdigest()
    if not begun or not file.exists():
        file.write_text(json.dumps(now, indent=2) + "\n", encoding="utf-8")
        return
    before = json.loads(file.read_text(encoding="utf-8"))
    if changed := [key for key in now if now[key] != before.get(key)]:
        raise RecipeError(
            f"{', '.join(changed)} changed since the run in {file.parent} began; restore what it was, or remove the "
            "folder and start anew."
        )


def make_row(rim: RiM, stage: Stage, seed: int) -> Callable[[Problem, int], Row]:
    """The function that turns a problem at a place of the order into a row of this stage's objective."""
    blocks = rim.layout.num_blocks if stage.blocks is None else stage.blocks

    def row(problem: Problem, place: int) -> Row:
        if stage.objective == "cot":
            return cot_row(rim.encoder, problem)
        if stage.objective == "direct":
            return direct_row(rim.encoder, problem)
        if stage.objective == "stage1":
            return stage1_row(rim.encoder, problem, stage.blocks)
        # A share of the rows keeps the targets of stage 1; which ones depends on the place alone, not on any state.
        if stage.grounded and ((place * 2_654_435_761 + seed) % 2**32) < stage.grounded * 2**32:
            return stage1_row(rim.encoder, problem, blocks)
        return stage2_row(rim.encoder, problem, blocks)

    return row


def _make_model(plan: Recipe) -> RiM:
    if plan.scratch is not None:
        tokenizer = word_tokenizer(vocabulary())
        tokenizer.add_special_tokens({"additional_special_tokens": list(plan.layout.tokens)})
        size = plan.scratch
        model = small_llama(
            tokenizer,
            layers=size.layers,
            width=size.width,
            heads=size.heads,
            inner=size.inner,
            context=size.context,
            seed=plan.seed,
        )
    else:
        model, tokenizer = load_base(plan.base)
    rim = RiM.attach(model, tokenizer, plan.layout, name=plan.output)
    return _add_adapter(rim, plan) if plan.lora else rim


def _add_adapter(rim: RiM, plan: Recipe) -> RiM:
    """LoRA on all linear layers; of the embeddings only the three memory rows are trained."""
    from peft import LoraConfig, TaskType, TrainableTokensConfig, get_peft_model

    name = next(n for n, m in rim.model.named_modules() if m is rim.model.get_input_embeddings()).rsplit(".", 1)[-1]
    rows = sorted(rim.memory_ids)
    if plan.lora.r == 0:
        config = TrainableTokensConfig(target_modules=[name], token_indices=rows, task_type=TaskType.CAUSAL_LM)
    else:
        config = LoraConfig(
            r=plan.lora.r,
            lora_alpha=plan.lora.alpha,
            lora_dropout=plan.lora.dropout,
            target_modules="all-linear",
            trainable_token_indices={name: rows},
            task_type=TaskType.CAUSAL_LM,
        )
    rim.model = get_peft_model(rim.model, config)
    rim.model.peft_config["default"].base_model_name_or_path = plan.base
    return rim


def _reload(rim: RiM, folder: Path, lora: Lora | None) -> RiM:
    """The best checkpoint of the stage before, ready to be trained further."""
    fresh = RiM.from_pretrained(folder, device="cpu", dtype=torch.float32, trainable=lora is not None)
    return RiM(fresh.model, fresh.tokenizer, rim.layout, rim.name)


def _make_problems(data: Data, report: Callable[[str], None]) -> tuple[list[Problem], list[Problem]]:
    if data.world is not None:
        train = list(generate(data.world, "train", data.rows, data.seed))
        valid = list(generate(data.world, "valid", data.validation_rows, data.seed, unique=True))
        return train, valid
    problems = [problem for source in data.files for problem in _read(source, report)]
    if data.rows is not None and data.rows < len(problems):
        chosen = torch.randperm(len(problems), generator=torch.Generator().manual_seed(data.seed))[: data.rows]
        problems = [problems[i] for i in chosen.tolist()]
    valid = _read(data.validation, report)[: data.validation_rows] if data.validation else []
    return problems, valid


def _read(source: str, report: Callable[[str], None]) -> list[Problem]:
    """The problems of a source; lines that were left out are counted aloud."""
    loaded = load_problems(source)
    if loaded.rejected:
        first = loaded.rejected[0]
        report(f"{source}: {len(loaded.rejected)} lines left out, such as line {first.line_number}: {first.reason}")
    return loaded.problems


def _make_trainer(
    rim: RiM,
    plan: Recipe,
    stage: Stage,
    number: int,
    problems: list[Problem],
    validation: list[Problem],
    folder: Path,
    report: Callable[[str], None],
) -> RiMTrainer:
    row = make_row(rim, stage, plan.seed)
    usable = _usable(problems, "training", rim, stage, report)
    # Validation is about the objective alone: rows that keep the targets of stage 1 say nothing about stage 2.
    valid_row = make_row(rim, dataclasses.replace(stage, grounded=0.0), plan.seed)
    valid_rows = [valid_row(p, 0) for p in _usable(validation, "validation", rim, stage, report)]
    lengths = [len(p.question) + sum(map(len, p.steps)) for p in usable]
    seed = plan.seed + 1000 * number
    rows_per_step = stage.batch_size * stage.accumulation * PartialState().num_processes
    steps = max(1, stage.rows // rows_per_step)
    # No row more than the steps need: with batches to spare, a run resumed at its last step would take another one.
    order = bucketed_order(lengths, min(stage.rows, steps * rows_per_step), stage.batch_size, seed)
    if stage.dropout is not None:
        _set_dropout(rim.model, stage.dropout)
    gpu = torch.cuda.is_available()
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=stage.batch_size,
        gradient_accumulation_steps=stage.accumulation,
        learning_rate=stage.learning_rate,
        lr_scheduler_type={"constant": "constant_with_warmup"}.get(stage.schedule, stage.schedule),
        warmup_steps=round(stage.warmup * steps),
        weight_decay=stage.weight_decay,
        optim="adamw_torch_fused",
        bf16=gpu,
        use_cpu=not gpu,
        logging_steps=min(50, stage.validate_every),
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
        seed=seed,
    )
    args._n_gpu = min(1, args.n_gpu)  # one process, one GPU; several are for `accelerate launch`, not for DataParallel
    trainer = RiMTrainer(rim, args, Rows(usable, order, row), valid_rows, _weights(stage))
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(Progress())
    return trainer


def _usable(
    problems: list[Problem], purpose: str, rim: RiM, stage: Stage, report: Callable[[str], None]
) -> list[Problem]:
    """The problems that make rows of a stage: with steps where it needs them, and not longer than the context."""
    stepped = [p for p in problems if p.steps or stage.objective not in ("stage1", "cot")]
    row = make_row(rim, stage, seed=0)
    fitting = [p for p in stepped if _fits(p, rim, stage, row)]
    faults = {
        "have no steps": len(problems) - len(stepped),
        f"do not fit into the context of {rim.max_length:,} tokens": len(stepped) - len(fitting),
    }
    told = " and ".join(f"{count:,} {fault}" for fault, count in faults.items() if count)
    if told and not fitting:
        raise RecipeError(f"Stage {stage.name} can use none of the {len(problems):,} {purpose} problems: {told}.")
    if told:
        report(f"Stage {stage.name} leaves out some of the {len(problems):,} {purpose} problems: {told}.")
    return fitting


def _fits(problem: Problem, rim: RiM, stage: Stage, row: Callable[[Problem, int], Row]) -> bool:
    text = problem.question + "  ".join(problem.steps) + problem.answer
    blocks = max(stage.blocks or rim.layout.num_blocks, len(problem.steps))
    # Tokens are hardly ever more than bytes, so few problems have to be tokenised here; 32 for markers and ends.
    if len(text.encode()) + blocks * rim.layout.block_length + 32 < rim.max_length:
        return True
    try:
        return max(row(problem, 0).positions) < rim.max_length
    except QuestionError:
        return False


def _weights(stage: Stage):
    def weights(progress: float, num_grounded: torch.Tensor, num_readouts: torch.Tensor) -> torch.Tensor:
        if stage.objective == "stage1":
            return stage1_weights(stage.lambdas, progress, num_grounded, num_readouts)
        if stage.objective == "stage2":
            alphas = stage2_weights(num_readouts)
            # Rows that keep their steps weigh every readout alike: their steps are there to be remembered.
            return torch.where((num_grounded > 0)[:, None], (alphas > 0) / num_readouts[:, None].float(), alphas)
        return torch.ones(len(num_readouts), 1, device=num_readouts.device)

    return weights


def _set_dropout(model: torch.nn.Module, dropout: float) -> None:
    for name, module in model.named_modules():
        if name.endswith("lora_dropout"):
            for key in module:
                module[key] = torch.nn.Dropout(dropout)


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
    with open(folder / "history.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(entry) + "\n" for entry in state.log_history)


def _trained(parameter: torch.nn.Parameter) -> int:
    return parameter.numel() if parameter.requires_grad else 0


def _nothing(line: str) -> None:
    """Takes the reports nobody should read twice."""
