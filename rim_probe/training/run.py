"""Runs a recipe: loads, trains stage after stage, saves; resumes where a killed run left off.

Knows the order of things and the folders. The run's own files (stage folders with checkpoints, TensorBoard logs,
history) live in `<output>.run`; the finished checkpoint is written to `<output>`.
"""

import dataclasses
import hashlib
import itertools
import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from transformers import ProgressCallback, TrainingArguments, set_seed
from transformers.integrations import is_tensorboard_available

from rim_probe.adapters import ADAPTER_FILE, finish_checkpoint
from rim_probe.bases import record_of
from rim_probe.datasets.arithmetic import generate, vocabulary
from rim_probe.datasets.partners import Partners
from rim_probe.datasets.sources import load_problems
from rim_probe.encoding import Encoder
from rim_probe.errors import RecipeError
from rim_probe.model import RiM, load_base
from rim_probe.options import show_progress
from rim_probe.packing import Row, cot_row, direct_row, stage1_row, stage2_row
from rim_probe.problems import Problem
from rim_probe.training.backends import chosen_attention, chosen_precision, on_gpu, running_arguments
from rim_probe.training.pairs import PairRows, draw_pairs
from rim_probe.training.recipe import Data, Recipe, Stage, load_recipe
from rim_probe.training.rows import Batches, draw, padding, row_sizes, sized_batches, token_batches
from rim_probe.training.schedules import stage1_weights, stage2_weights
from rim_probe.training.scratch import small_llama, word_tokenizer
from rim_probe.training.tokens import Entry, Tokens, tokenise
from rim_probe.training.trainer import Progress, RiMTrainer, StopAfter
from rim_probe.training.trial import Trial

LOG_EVERY = 50  # steps
_STEPS_TOLD = ("stage1", "interchange")  # objectives whose rows tell steps; a pair is more than one of them
_RECIPE = "recipe.json"  # of a run: what it was started with
_STATE = "trainer_state.json"  # the Trainer writes it last: a checkpoint where it cannot be read is half written


@dataclasses.dataclass(frozen=True)
class _Pool:
    """Problems, how many of them each file holds (they stand in the order of the files), and their ids."""

    problems: list[Problem]
    sizes: list[int]
    tokens: Tokens


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
        RecipeError: an impossible recipe, or an unfinished run in the same output and `resume` not asked for.
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
    begun = run.exists() and any(path.is_dir() for path in run.iterdir())
    if begun and not resume:
        raise RecipeError(f"{run} holds an earlier run; add --resume to go on with it, or remove the folder.")
    processes = PartialState(cpu=not on_gpu())
    processes.wait_for_everyone()  # so that nobody mistakes what the first one writes for an earlier run
    if not processes.is_main_process:
        report = _nothing
    run.mkdir(parents=True, exist_ok=True)
    set_seed(plan.seed)
    rim = _make_model(plan)
    plan = _settled(plan, rim, run / _RECIPE)
    files, validation = _make_problems(plan.data, report)
    with processes.main_process_first():  # the others find in the cache what it made
        pool, held = _make_pool(rim, files, report), _make_pool(rim, [validation], report)
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
            rim = _reload(rim, run / plan.stages[number - 1].name / "best")
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
        finish_checkpoint(run / plan.stages[-1].name / "best", folder)
        for stage in plan.stages[:-1]:  # what the last stage is compared with
            finish_checkpoint(run / stage.name / "best", folder / stage.name)
    report(f"Saved {folder}." if not trial else f"Saved {folder}, which was tried and not trained: {trial}.")
    return folder


def make_trainers(plan: Recipe, folder: Path, report: Callable[[str], None]) -> list[RiMTrainer]:
    """A trainer for every stage, all of the untrained model, with their files in `folder`; nothing to validate on.

    The first stage's is made last, so the model is left as that stage begins with it.
    """
    PartialState(cpu=not on_gpu())
    set_seed(plan.seed)
    rim = _make_model(plan)
    plan = _settled(plan, rim, None)
    files, _ = _make_problems(plan.data, report)
    pool, held = _make_pool(rim, files, report), _make_pool(rim, [[]], report)
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
        file.write_text(json.dumps(now, indent=2) + "\n", encoding="utf-8")
        return
    before = json.loads(file.read_text(encoding="utf-8"))
    if changed := [key for key in now if now[key] != before.get(key)]:
        raise RecipeError(
            f"{', '.join(changed)} changed since the run in {file.parent} began; restore what it was, or remove the "
            "folder and start anew."
        )


def make_row(encoder: Encoder | Tokens, stage: Stage, seed: int) -> Callable[[Problem | Entry, int], Row]:
    """The function that turns a problem, and its place among those drawn, into a row of this stage's objective."""
    blocks = _blocks(encoder, stage)

    def row(problem: Problem | Entry, place: int) -> Row:
        if stage.objective == "cot":
            return cot_row(encoder, problem)
        if stage.objective == "direct":
            return direct_row(encoder, problem)
        if stage.objective in _STEPS_TOLD or _keeps_steps(stage, place, seed):
            return stage1_row(encoder, problem, blocks, stage.slot_labels > 0, stage.memory)
        return stage2_row(encoder, problem, blocks)

    return row


def _blocks(encoder: Encoder | Tokens, stage: Stage) -> int | None:
    """See `Stage.blocks`."""
    own = stage.blocks is None and stage.objective in ("stage2", "interchange")
    return encoder.layout.num_blocks if own else stage.blocks


def _keeps_steps(stage: Stage, place, seed: int):
    """Whether the row at a place (or at each of an array of them) keeps the targets of stage 1 in stage 2.

    A share of the rows does; which ones depends on the place alone, not on any state.
    """
    return (place * 2_654_435_761 + seed) % 2**32 < stage.grounded * 2**32


def _make_model(plan: Recipe) -> RiM:
    if plan.start is not None:
        return _load_start(plan)
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
        model, tokenizer = load_base(plan.base, progress=show_progress())
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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # between PEFT and transformers
        rim.model = get_peft_model(rim.model, config)
    rim.model.peft_config["default"].base_model_name_or_path = plan.base
    return rim


def _load_start(plan: Recipe) -> RiM:
    """The adapter of `start`, ready to be trained further."""
    if not (Path(plan.start) / ADAPTER_FILE).exists():
        raise RecipeError(
            f"start: {plan.start} is no adapter folder ({ADAPTER_FILE} is missing); use base for a model."
        )
    held = RiM.from_pretrained(plan.start, device="cpu", dtype=torch.float32, trainable=True)
    if dataclasses.replace(held.layout, num_blocks=plan.layout.num_blocks) != plan.layout:
        raise RecipeError(
            f"The memory blocks of start are {held.layout.block_text}, those of the recipe {plan.layout.block_text}; "
            "give the recipe the layout of start (num_blocks may differ)."
        )
    return RiM(held.model, held.tokenizer, plan.layout, name=plan.output)


def _reload(rim: RiM, folder: Path) -> RiM:
    """The best checkpoint of the stage before, ready to be trained further."""
    adapted = hasattr(rim.model, "peft_config")
    fresh = RiM.from_pretrained(folder, device="cpu", dtype=torch.float32, trainable=adapted)
    return RiM(fresh.model, fresh.tokenizer, rim.layout, rim.name)


def _make_problems(data: Data, report: Callable[[str], None]) -> tuple[list[list[Problem]], list[Problem]]:
    """The training problems of each file (a world counts as one), and those for choosing checkpoints."""
    if data.world is not None:
        train = list(generate(data.world, "train", data.rows, data.seed))
        valid = list(generate(data.world, "valid", data.validation_rows, data.seed, unique=True))
        return [train], valid
    files = [_read(source, report) for source in data.files]
    whole = sum(map(len, files))
    if data.rows is not None and data.rows < whole:
        drawn = torch.randperm(whole, generator=torch.Generator().manual_seed(data.seed))[: data.rows]
        drawn, starts = set(drawn.tolist()), itertools.accumulate(map(len, files), initial=0)
        files = [
            [p for i, p in enumerate(file, start) if i in drawn] for file, start in zip(files, starts, strict=False)
        ]
    valid = _read(data.validation, report)[: data.validation_rows] if data.validation else []
    return files, valid


def _read(source: str, report: Callable[[str], None]) -> list[Problem]:
    """The problems of a source; lines that were left out are counted aloud."""
    loaded = load_problems(source)
    if loaded.rejected:
        first = loaded.rejected[0]
        report(f"{source}: {len(loaded.rejected)} lines left out, such as line {first.line_number}: {first.reason}")
    return loaded.problems


def _make_pool(rim: RiM, files: list[list[Problem]], report: Callable[[str], None]) -> _Pool:
    problems = list(itertools.chain.from_iterable(files))
    return _Pool(problems, list(map(len, files)), tokenise(rim.encoder, problems, report))


def _make_trainer(
    rim: RiM,
    plan: Recipe,
    stage: Stage,
    number: int,
    pool: _Pool,
    held: _Pool,
    folder: Path,
    report: Callable[[str], None],
    log_every: int = LOG_EVERY,
) -> RiMTrainer:
    batches = _make_batches(rim, pool, _usable(pool, "training", rim, stage, report), plan, number, report)
    # Validation is about the objective alone: rows that keep the targets of stage 1 say nothing about stage 2.
    plain = dataclasses.replace(stage, grounded=0.0, slot_labels=0)
    valid = np.flatnonzero(_usable(held, "validation", rim, plain, report)).tolist()
    valid_row = make_row(held.tokens, plain, plan.seed)
    valid_rows = [valid_row(held.tokens[i], 0) for i in valid]
    steps = max(1, len(batches) // _at_once(stage))
    if stage.dropout is not None:
        _set_dropout(rim.model, stage.dropout)
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
        _weights(stage),
        asked=[held.problems[i] for i in valid] if stage.objective == "cot" else (),
        slot_labels=stage.slot_labels,
        attention=plan.attention,
        compile=plan.compile,
    )
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(Progress())
    return trainer


def _usable(pool: _Pool, purpose: str, rim: RiM, stage: Stage, report: Callable[[str], None]) -> np.ndarray:
    """Which problems make rows of a stage, bool [n]; what is left out is counted aloud, all of it is refused.

    A problem without steps is left out where the objective needs them. It is also left out where others of its file
    have them, so that what is compared, memory, chain of thought and direct, sees the same rows of the same files.
    """
    tokens = pool.tokens
    stepped = tokens.step_numbers.lengths > 0
    file = np.repeat(np.arange(len(pool.sizes)), pool.sizes)
    needed = (np.bincount(file, stepped, len(pool.sizes))[file] > 0) | (stage.objective in (*_STEPS_TOLD, "cot"))
    blocks = _blocks(tokens, stage)
    ends = row_sizes(tokens, stage.objective, blocks).ends
    if stage.grounded:
        ends = np.maximum(ends, row_sizes(tokens, "stage1", blocks).ends)
    usable, told = np.ones(len(tokens), dtype=bool), []
    for fault, sound in (
        ("have no steps", stepped | ~needed),
        ("hold words that the tokenizer does not know", tokens.known),
        ("have a question that is empty, too long or holds a control token", tokens.askable),
        (f"do not fit into the context of {rim.max_length:,} tokens", ends <= rim.max_length),
    ):
        if count := int((usable & ~sound).sum()):
            told.append(f"{count:,} {fault}")
        usable &= sound
    if told and not usable.any():
        raise RecipeError(
            f"Stage {stage.name} can use none of the {len(tokens):,} {purpose} problems: {' and '.join(told)}."
        )
    if told:
        report(f"Stage {stage.name} leaves out some of the {len(tokens):,} {purpose} problems: {' and '.join(told)}.")
    return usable


def _at_once(stage: Stage) -> int:
    """Batches of a step."""
    return stage.accumulation * PartialState().num_processes


def _rows(stage: Stage) -> int:
    """How many rows a stage draws: batches of a fixed size make whole steps of them."""
    step = 1 if stage.batch_tokens else stage.batch_size * _at_once(stage)
    return min(stage.rows, max(1, stage.rows // step) * step)


def _make_batches(
    rim: RiM, pool: _Pool, usable: np.ndarray, plan: Recipe, number: int, report: Callable[[str], None]
) -> Batches:
    """The batches of a stage in their order, and a line that says how many rows they hold and how large they are.

    No batch more than the steps need: with batches to spare, a run resumed at its last step would take another one.
    """
    stage, tokens = plan.stages[number], pool.tokens
    # Stages follow one another through the files, as one long stage would go through them.
    start, rows = sum(map(_rows, plan.stages[:number])), _rows(stage)
    repeats = plan.data.repeats or (1.0,) * len(pool.sizes)
    drawn, ends = draw(pool.sizes, repeats, usable, plan.seed, start, rows)
    blocks = _blocks(tokens, stage)
    lengths = row_sizes(tokens, stage.objective, blocks, stage.memory).lengths[drawn]
    if stage.grounded:
        grounded = row_sizes(tokens, "stage1", blocks).lengths[drawn]
        lengths = np.where(_keeps_steps(stage, np.arange(rows), plan.seed), grounded, lengths)
    seed = plan.seed + 1000 * number
    pairs = None
    if stage.objective == "interchange":
        alike = Partners(plan.data.world, "train", plan.data.seed) if plan.data.world else None
        drawn_pairs = draw_pairs(pool.problems, drawn, alike, stage.share, stage.one_number_share, seed)
        pairs = PairRows(rim, tokens, drawn, drawn_pairs, blocks, stage.slot_labels > 0, report)
        report(f"Stage {stage.name}: {(pairs.lengths > 0).mean():.1%} of the rows are pairs")
        lengths = np.where(pairs.lengths > 0, pairs.lengths, lengths)
    if stage.batch_tokens:
        batches = token_batches(lengths, ends, stage.batch_tokens, seed)
    else:
        batches = sized_batches(lengths, ends, stage.batch_size, seed)
    at_once = _at_once(stage)
    batches = batches[: max(1, len(batches) // at_once) * at_once]
    told = (
        f"rows {sum(map(len, batches)):,}, batches {len(batches):,}, tokens {lengths[np.concatenate(batches)].sum():,}"
    )
    report(f"Stage {stage.name}: {told}, padding {padding(lengths, batches):.1%}")
    single = make_row(tokens, stage, plan.seed)
    return Batches(drawn, batches, lambda problem, at: (pairs and pairs.row(at)) or single(tokens[problem], at))


def _weights(stage: Stage):
    def weights(progress: float, num_grounded: torch.Tensor, num_readouts: torch.Tensor) -> torch.Tensor:
        if stage.objective == "stage1":
            return stage1_weights(stage.lambdas, progress, num_grounded, num_readouts)
        if stage.objective == "interchange":
            return stage1_weights("constant", progress, num_grounded, num_readouts)
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
