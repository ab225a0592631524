"""Training on tiny models: loss and weights, the order of rows, stages, resuming, adapters, processes, bad data."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import tiny_base, tiny_tokenizer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import TrainingArguments

from rim_probe.datasets.arithmetic import World, generate
from rim_probe.decoding import answer
from rim_probe.errors import CheckpointError, ProblemError, RecipeError, RiMError
from rim_probe.model import RiM
from rim_probe.packing import cot_row, direct_row, stage2_row
from rim_probe.problems import Problem, is_correct, write_problems
from rim_probe.training import origin, run, stages, train
from rim_probe.training.recipe import Stage
from rim_probe.training.rows import Batches
from rim_probe.training.schedules import ABSOLUTE_STEPS, stage1_weights, stage2_weights
from rim_probe.training.scratch import small_llama
from rim_probe.training.trainer import RiMTrainer

ROOT = Path(__file__).parents[1]
GROUND = {
    "name": "ground",
    "objective": "stage1",
    "rows": 24,
    "batch_size": 4,
    "learning_rate": 3e-3,
    "validate_every": 2,
}
REFINE = GROUND | {"name": "refine", "objective": "stage2", "grounded": 0.5, "learning_rate": 1e-3}
SCRATCH = {
    "scratch": {"layers": 2, "width": 32, "heads": 2, "inner": 64, "context": 256},
    "layout": {"num_blocks": 3},
    "data": {"world": {"max_steps": 3}, "rows": 30, "validation_rows": 8},
    "stages": [GROUND, REFINE],
}
WEIGHTS = "model.safetensors"
ADAPTER = "adapter_model.safetensors"


def write_recipe(folder: Path, *, name: str = "out", **recipe) -> Path:
    """A recipe file whose finished checkpoint goes to `folder/name`."""
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({"output": str(folder / name)} | recipe), encoding="utf-8")
    return path


def bare_problems(count: int) -> list[Problem]:
    return list(generate(World(max_steps=3, story=0, relation=0, bare=1), "train", count, seed=3))


@pytest.fixture(scope="module")
def adapted(tmp_path_factory) -> dict:
    """What a LoRA recipe starts from: bases with untied and with tied embeddings, and a file of problems."""
    folder = tmp_path_factory.mktemp("adapted")
    tokenizer = tiny_tokenizer()
    untied = tiny_base(vocab_size=len(tokenizer))
    tied = small_llama(tokenizer, layers=2, width=32, heads=2, inner=64, context=512, seed=0)
    for name, base in (("untied", untied), ("tied", tied)):
        base.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    write_problems(folder / "problems.txt", bare_problems(20))
    return {"untied": folder / "untied", "tied": folder / "tied", "data": folder / "problems.txt"}


def lora_recipe(adapted: dict, base: str = "untied", r: int = 4, **changes) -> dict:
    """Two stages of an adapter with dropout, so that a resumed run has random states to restore."""
    return {
        "base": str(adapted[base]),
        "layout": {"num_blocks": 3},
        "data": {"files": [str(adapted["data"])]},
        "lora": {"r": r, "alpha": 8, "dropout": 0.3 if r else 0.0},
        "stages": [GROUND | {"rows": 12}, REFINE | {"rows": 12}],
    } | changes


@pytest.fixture
def spy(monkeypatch) -> list[RiMTrainer]:
    """The trainers that `train` makes, in order."""
    made = []

    class Spied(RiMTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append(self)

    monkeypatch.setattr(run, "RiMTrainer", Spied)
    return made


def in_subprocess(code: str, *arguments: object, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    """Runs a script from the root of the repository, on the CPU and with as many threads as this process has."""
    environment = os.environ | {
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        "PYTHONPATH": str(ROOT),
    }
    script = ["-c", code] if not launcher else [*launcher, code]
    return subprocess.run(
        [sys.executable, *script, *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=180,
    )


def make_trainer(rim: RiM, stage: Stage, train_rows: list, valid_rows: list, folder: Path) -> RiMTrainer:
    args = TrainingArguments(output_dir=str(folder), report_to=[], use_cpu=True, max_steps=10)
    trainer = RiMTrainer(
        rim,
        args,
        Batches(train_rows, [np.arange(len(train_rows))], lambda r, _: r),
        valid_rows,
        stages.readout_weights(stage),
    )
    trainer.state.max_steps = 10
    return trainer


# ----------------------------------------------------------------------------------------------------------- schedules


@pytest.mark.parametrize(
    ("schedule", "progress", "expected"),
    [
        # T = 1, 2, 3, 4 steps: the first T - 1 readouts state a step, the last one the answer.
        ("relative", 0.0, [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]),
        ("relative", 0.5, [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0.5, 1, 0], [0, 0, 1, 1]]),
        ("relative", 1.0, [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]),
        ("absolute", 0.0, [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]),
        ("absolute", 1.5 / 13, [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0.5, 1, 0], [0, 0.5, 1, 1]]),
        ("absolute", 0.5, [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]),
        ("absolute", 1.0, [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]),
        ("constant", 0.5, [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]),
        ("constant", 1.0, [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]),
    ],
)
def test_lambda(schedule, progress, expected):
    weights = stage1_weights(schedule, progress, torch.tensor([0, 1, 2, 3]), torch.tensor([1, 2, 3, 4]))
    torch.testing.assert_close(weights, torch.tensor(expected, dtype=torch.float32))
    assert ABSOLUTE_STEPS == 13


def test_every_answer_keeps_its_weight_where_blocks_outnumber_steps():
    weights = stage1_weights("relative", 0.9, torch.tensor([2, 0]), torch.tensor([5, 4]))
    assert weights.tolist() == [[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]]


def test_alpha():
    weights = stage2_weights(torch.tensor([1, 2, 3, 8]))
    torch.testing.assert_close(weights.sum(1), torch.ones(4))
    torch.testing.assert_close(weights[1], torch.tensor([1 / 3, 2 / 3] + [0.0] * 6))
    torch.testing.assert_close(weights[2], torch.tensor([1 / 6, 2 / 6, 3 / 6] + [0.0] * 5))
    torch.testing.assert_close(weights[3], torch.tensor([2 * k / (8 * 9) for k in range(1, 9)]))


# ---------------------------------------------------------------------------------------------------------------- loss


def reference_loss(rim: RiM, problems: list[Problem], stage: Stage, progress: float) -> torch.Tensor:
    """The loss from one ordinary causal pass for each readout of each problem, with weights written out by hand."""
    encoder, losses, weights = rim.encoder, [], []
    for problem in problems:
        steps = problem.steps[1:] if stage.objective == "stage1" else ()
        texts = [encoder.step_ids(step) for step in steps] + [encoder.answer_ids(problem.answer)]
        if stage.objective == "stage2":
            texts = texts * stage.blocks
        for k, text in enumerate(texts, start=1):
            ids = encoder.question_ids(problem.question) + encoder.block_ids * k + text
            logits = rim.model(torch.tensor([ids])).logits[0, -len(text) - 1 : -1]
            losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(text), reduction="none"))
            if stage.objective == "stage2":
                weight = 2 * k / (len(texts) * (len(texts) + 1))
            else:
                weight = 1.0 if k == len(texts) else min(1.0, max(0.0, k - progress * len(texts)))
            weights.append(torch.full((len(text),), weight))
    losses, weights = torch.cat(losses), torch.cat(weights)
    return (losses * weights).sum() / weights.sum()


@pytest.mark.parametrize("objective", ["stage1", "stage2"])
def test_packed_loss_equals_separate_passes(make_rim, family, objective, tmp_path):
    rim = make_rim(family)
    problems = [problem for problem in bare_problems(40) if len(problem.steps) > 1][:4]
    stage = Stage("one", objective, rows=1, learning_rate=0.1, blocks=None if objective == "stage1" else 3)
    rows = [stages.make_row(rim.encoder, stage, seed=0)(problem, 0) for problem in problems]
    assert len(set(map(len, rows))) > 1  # padding is part of the test
    trainer = make_trainer(rim, stage, rows, [], tmp_path)
    trainer.state.global_step = 4
    loss = trainer.compute_loss(rim.model, trainer.data_collator([rows]))
    torch.testing.assert_close(loss, reference_loss(rim, problems, stage, 0.4), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("objective", ["direct", "cot", "stage2"])
def test_exact_match_equals_greedy_decoding(objective, tmp_path, spy):
    """On problems of which half were learnt by heart."""
    problems = bare_problems(16)
    write_problems(tmp_path / "learnt.txt", problems[:8])
    write_problems(tmp_path / "valid.txt", problems)
    stage = {"name": "one", "objective": objective, "rows": 8 * 40, "batch_size": 8, "learning_rate": 1e-2}
    recipe = SCRATCH | {
        "data": {"files": [str(tmp_path / "learnt.txt")], "validation": str(tmp_path / "valid.txt")},
        "stages": [stage | {"validate_every": 40}],
    }
    train(write_recipe(tmp_path, **recipe), report=lambda line: None)
    (trainer,) = spy
    rim = trainer.rim
    metrics = trainer.evaluate()
    method = "memory" if objective == "stage2" else objective
    answers = [answer(rim, problem.question, method, max_new_tokens=40) for problem in problems]
    chain = rim.encoder.chain_ids if objective == "cot" else lambda problem: rim.encoder.answer_ids(problem.answer)
    right = [list(given.token_ids) == chain(problem) for given, problem in zip(answers, problems, strict=True)]
    match = metrics["eval_exact_match" if objective == "cot" else "eval_accuracy"]
    assert match == sum(right) / len(right) and 0 < match < 1 and metrics["eval_n"] == 16
    if objective == "cot":  # the answer is graded, however the chain came there
        graded = [is_correct(given.value, problem.answer) for given, problem in zip(answers, problems, strict=True)]
        assert metrics["eval_accuracy"] == sum(graded) / len(graded) > match
    if objective == "stage2":
        for k in range(3):
            hits = [
                list(given.readouts[k].token_ids) == chain(problem)
                for given, problem in zip(answers, problems, strict=True)
            ]
            assert metrics[f"eval_readout_{k + 1}"] == sum(hits) / len(hits)


# -------------------------------------------------------------------------------------------------------------- stages


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    """The finished checkpoint of SCRATCH, trained in one go."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    return train(write_recipe(folder, **SCRATCH), report=lambda line: None)


def test_a_stage_starts_afresh_from_the_best_weights_before(tmp_path, monkeypatch):
    starts = []

    class Spied(RiMTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            if self.state.global_step == 0:
                weights = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
                starts.append((len(self.optimizer.state), self.lr_scheduler.last_epoch, weights))
            return super().training_step(model, inputs, num_items_in_batch)

        def evaluate(self, *args, **kwargs):
            """The second of three validations is the best."""
            metrics = {"eval_accuracy": 1.0 if self.state.global_step == 4 else 0.5}
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
            return metrics

    monkeypatch.setattr(run, "RiMTrainer", Spied)
    train(write_recipe(tmp_path, **SCRATCH), report=lambda line: None)
    assert [(states, steps) for states, steps, _ in starts] == [(0, 0), (0, 0)]
    ground = tmp_path / "out.run" / "ground"
    best = RiM.from_pretrained(ground / "checkpoint-4", device="cpu").model.state_dict()
    last = RiM.from_pretrained(ground / "checkpoint-6", device="cpu").model.state_dict()
    assert all(torch.equal(value, best[name]) for name, value in starts[1][2].items())
    assert not all(torch.equal(value, last[name]) for name, value in starts[1][2].items())


def test_finished_checkpoint_holds_a_rim_and_nothing_pickled(uninterrupted):
    names = {path.name for path in uninterrupted.iterdir()}
    assert {WEIGHTS, "memory_layout.json", "config.json", "tokenizer.json"} <= names
    assert not [name for name in names if Path(name).suffix in (".bin", ".pt", ".pth", ".pkl")]
    assert RiM.from_pretrained(uninterrupted).layout.num_blocks == 3
    log = uninterrupted.with_name("out.run") / "refine" / "history.jsonl"
    history = [json.loads(line) for line in log.read_text().splitlines()]
    assert [entry["step"] for entry in history if "eval_accuracy" in entry] == [2, 4, 6]
    assert all("eval_readout_3" in entry for entry in history if "eval_accuracy" in entry)


def test_the_stage_before_is_kept_as_a_control(uninterrupted):
    control = RiM.from_pretrained(uninterrupted / "ground")
    expected = RiM.from_pretrained(uninterrupted.with_name("out.run") / "ground" / "best").model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in control.model.state_dict().items())
    final = RiM.from_pretrained(uninterrupted).model.state_dict()
    assert any(not torch.equal(value, final[name]) for name, value in expected.items())


def test_validation_of_stage_2_is_not_mixed_with_stage_1(tmp_path, spy):
    train(write_recipe(tmp_path, **SCRATCH), report=lambda line: None)
    refine = spy[1]
    assert {row.num_grounded for row in refine.valid_rows} == {0}
    mixed = [row.num_grounded > 0 for i in range(3) for row in refine.train_dataset[i]]
    assert any(mixed) and not all(mixed)


@pytest.mark.slow
def test_all_methods_see_equal_rows(tmp_path, adapted):
    """Stages go on in the files where the one before ended, so two stages see what one long one sees."""
    write_problems(tmp_path / "real.txt", [*bare_problems(12), Problem("No steps?", (), "1")])
    write_problems(tmp_path / "numeric.txt", list(generate(World(max_steps=4), "train", 85, seed=9)))
    files = [str(tmp_path / "real.txt"), str(tmp_path / "numeric.txt")]
    stage = GROUND | {"batch_size": 4}
    methods = {  # a pass has 24 + 21 rows; 112 of them end in the middle of the third
        "memory": [
            stage | {"rows": 82},
            stage | {"rows": 33, "name": "refine", "objective": "stage2", "grounded": 0.5},
        ],
        "cot": [stage | {"objective": "cot", "rows": 112}],
        "direct": [stage | {"objective": "direct", "rows": 112}],
    }
    seen, lines = {}, []
    for method, planned in methods.items():
        data = {"files": files, "repeats": [2.0, 0.25]}
        recipe = write_recipe(tmp_path, name=method, **lora_recipe(adapted, data=data, stages=planned))
        trainers = run.make_trainers(run.load_recipe(recipe), tmp_path / "run", lines.append)
        sets = [trainer.train_dataset for trainer in trainers]
        seen[method] = [int(each.problems[i]) for each in sets for batch in each.batches for i in batch]
        assert [sum(map(len, each.batches)) for each in sets] == ([80, 32] if method == "memory" else [112])
    assert Counter(seen["memory"]) == Counter(seen["cot"]) == Counter(seen["direct"])
    assert seen["cot"] != seen["direct"]  # sorted by lengths of their own
    counts = Counter(seen["cot"])
    assert counts[12] == 0 and all(counts[i] >= 4 for i in range(12))
    assert max(counts[i] for i in range(13, 98)) == 1  # nothing of the second file twice before all of it
    assert sum(line.endswith("98 training problems: 1 have no steps.") for line in lines) == 4
    (told,) = [line for line in lines if line.startswith("Stage ground: rows 80, batches 20, tokens ")]
    assert told.endswith("%")


def test_every_step_takes_a_full_batch_and_there_are_no_more_batches_than_steps(tmp_path, spy):
    stage = GROUND | {"rows": 30, "accumulation": 2}
    train(write_recipe(tmp_path, **SCRATCH | {"stages": [stage]}), report=lambda line: None)
    (trainer,) = spy
    assert trainer.state.global_step == trainer.state.max_steps == 3  # 30 rows, 8 a step
    assert len(trainer.get_train_dataloader()) == 6


def test_progress_bar_and_event_file(tmp_path, capsys):
    pytest.importorskip("tensorboard")
    data = SCRATCH["data"] | {"world": {"min_steps": 3, "max_steps": 3}}
    train(write_recipe(tmp_path, **SCRATCH | {"data": data, "stages": [GROUND]}))
    printed = capsys.readouterr()
    assert "TFLOP/s float32), weights 0.0 1.0 1.0" in printed.err  # after step 2 of 6, T = 3: 1 - 1, 2 - 1, the answer
    assert "TFLOP/s float32), weights 0.0 0.0 1.0" in printed.err  # after step 4 of 6: 1 - 2, 2 - 2, the answer
    assert "rows/s" in printed.err and "tokens/s" in printed.err and "% MFU" in printed.err
    assert "step 2: exact match" in printed.out and "stage ground: 24 rows" in printed.out
    (events,) = (tmp_path / "out.run" / "ground").rglob("events.out.tfevents*")
    assert b"weight_1" in events.read_bytes()


# ------------------------------------------------------------------------------------------------------------ resuming

KILLED_WHILE_SAVING = """
import os, signal, sys
from pathlib import Path
from rim_probe.model import RiM
from rim_probe.training import train

save = RiM.save_pretrained
def save_half(self, folder, **extra):
    save(self, folder, **extra)
    if Path(folder).parts[-2:] == ("refine", "checkpoint-4"):
        weights = Path(folder) / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:1000])
        os.kill(os.getpid(), signal.SIGKILL)
RiM.save_pretrained = save_half
train(sys.argv[1])
"""


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_bits(tmp_path, uninterrupted, spy):
    recipe = write_recipe(tmp_path, **SCRATCH)
    killed = in_subprocess(KILLED_WHILE_SAVING, recipe)
    assert killed.returncode == -9, killed.stderr
    stage = tmp_path / "out.run" / "refine"
    assert sorted(path.name for path in stage.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    (stage / "checkpoint-5").mkdir()
    (stage / "checkpoint-5" / "trainer_state.json").write_text('{"global_step": 5, ')  # killed even later
    with pytest.raises(RecipeError, match=r"out\.run holds an earlier run; add --resume"):
        train(recipe)
    assert train(recipe, resume=True, report=lambda line: None) == tmp_path / "out"
    assert [Path(trainer.args.output_dir).name for trainer in spy] == ["refine"]  # a finished stage is left alone
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (uninterrupted / WEIGHTS).read_bytes()


def test_a_run_does_not_go_on_with_another_recipe_or_other_problems(tmp_path):
    train(write_recipe(tmp_path, **SCRATCH), max_minutes=0)
    other = SCRATCH | {"stages": [GROUND | {"learning_rate": 1e-4}, REFINE]}
    with pytest.raises(RecipeError, match="stages changed since the run"):
        train(write_recipe(tmp_path, **other), resume=True)
    recipe = json.loads((tmp_path / "out.run" / "recipe.json").read_text())
    recipe["problems_sha256"] = "0"
    (tmp_path / "out.run" / "recipe.json").write_text(json.dumps(recipe))
    with pytest.raises(RecipeError, match="problems_sha256 changed"):
        train(write_recipe(tmp_path, **SCRATCH), resume=True)


def test_a_run_does_not_go_on_with_other_weights_of_its_base(tmp_path, adapted):
    base = tmp_path / "base"
    shutil.copytree(adapted["untied"], base)
    recipe = write_recipe(tmp_path, **lora_recipe(adapted) | {"base": str(base)})
    assert train(recipe, max_minutes=0) is None
    weights = load_file(base / WEIGHTS)
    save_file({name: value + 1 for name, value in weights.items()}, base / WEIGHTS, {"format": "pt"})
    with pytest.raises(RecipeError, match="base_weights changed since the run"):
        train(recipe, resume=True)


def test_a_finished_run_is_not_trained_again(tmp_path, monkeypatch):
    recipe = write_recipe(tmp_path, **SCRATCH | {"stages": [GROUND | {"rows": 4}]})
    finished = train(recipe, report=lambda line: None)
    weights = (finished / WEIGHTS).read_bytes()
    (finished / WEIGHTS).unlink()
    monkeypatch.setattr(RiMTrainer, "train", lambda *args, **kwargs: pytest.fail("trained again"))
    assert train(recipe, resume=True, report=lambda line: None) == finished
    assert (finished / WEIGHTS).read_bytes() == weights


# ------------------------------------------------------------------------------------------------------------ adapters


WRAPPERS = re.compile(r"^base_model\.model\.|base_layer\.|original_module\.|token_adapter\.")  # names that PEFT adds


@pytest.mark.parametrize("r", [0, 4])
@pytest.mark.parametrize("base", ["untied", "tied"])
def test_an_adapter_trains_three_rows_and_leaves_the_base_alone(tmp_path, adapted, spy, base, r):
    recipe = lora_recipe(adapted, base, r)
    finished = train(write_recipe(tmp_path, **recipe), report=lambda line: None)
    trained, loaded = spy[-1].rim, RiM.from_pretrained(finished)
    trained.model.eval()
    fresh = RiM.attach(*origin.load_base(adapted[base]), loaded.layout)

    every = torch.arange(len(fresh.tokenizer))
    old, new = fresh.model.get_input_embeddings()(every), trained.model.get_input_embeddings()(every)
    changed = (old != new).any(-1).nonzero().flatten().tolist()
    assert changed == sorted(fresh.memory_ids)
    plain = {WRAPPERS.sub("", name): value for name, value in trained.model.named_parameters()}
    for name, value in fresh.model.named_parameters():
        kept = torch.ones(len(value), dtype=torch.bool)
        if "embed_tokens" in name or "lm_head" in name:
            kept[list(fresh.memory_ids)] = False
        assert torch.equal(plain[name][kept], value[kept]), name
    if r == 0:
        assert sum(p.numel() for p in trained.model.parameters() if p.requires_grad) == 3 * 32

    assert not [path for path in finished.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".pkl")]
    assert not (finished / WEIGHTS).exists()
    with safe_open(finished / ADAPTER, "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}
    assert [3, 32] in shapes.values() and not [shape for shape in shapes.values() if len(fresh.tokenizer) in shape]

    # What training chose is kept to the bit in the run's own folder; the output holds it in bfloat16.
    best = RiM.from_pretrained(tmp_path / "out.run" / "refine" / "best", trainable=True)
    for problem in bare_problems(3):
        for method in ("memory", "direct"):
            first, second = (answer(rim, problem.question, method, max_new_tokens=8) for rim in (trained, best))
            assert (first.token_ids, first.readouts) == (second.token_ids, second.readouts)


def test_stages_pass_the_adapter_on_with_a_dropout_of_their_own(tmp_path, adapted, spy):
    recipe = lora_recipe(adapted)
    recipe["stages"] = [GROUND | {"rows": 4}, REFINE | {"rows": 4, "dropout": 0.5}]
    train(write_recipe(tmp_path, **recipe), report=lambda line: None)
    for trainer, expected in zip(spy, (0.3, 0.5), strict=True):
        adapters = [m for name, m in trainer.model.named_modules() if name.endswith("lora_dropout.default")]
        assert adapters and {dropout.p for dropout in adapters} == {expected}
        assert all(p.requires_grad for name, p in trainer.model.named_parameters() if "lora_" in name)


# ----------------------------------------------------------------------------------------------------------- processes

TWO_PROCESSES = """
import os, sys
from pathlib import Path
from rim_probe.training import train
from rim_probe.training.rows import Batches

rank, seen, batch = int(os.environ["RANK"]), [], Batches.__getitem__
Batches.__getitem__ = lambda self, number: (seen.append(number), batch(self, number))[1]
# Only the clock of the first process counts; the other one would never stop.
assert train(sys.argv[1], max_minutes=0 if rank == 0 else 60) is None
train(sys.argv[1], resume=True)
Path(sys.argv[1]).with_name(f"rows-{rank}").write_text(" ".join(map(str, seen)))
"""


@pytest.mark.slow
def test_two_processes_share_the_rows(tmp_path):
    stage = GROUND | {"rows": 34, "batch_size": 4}
    recipe = write_recipe(tmp_path, **SCRATCH | {"stages": [stage]})
    script = tmp_path / "script.py"
    script.write_text(TWO_PROCESSES)
    # `--cpu` would start one process, for accelerate leaves several to MPI then; without a GPU this is gloo on the CPU.
    launcher = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1")
    launcher += ("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0")
    done = in_subprocess(str(script), recipe, launcher=launcher)
    assert done.returncode == 0, done.stderr[-3000:]
    # A loader reads one batch ahead, so the batch after the stop was read twice.
    first, second = (list(dict.fromkeys(map(int, (tmp_path / f"rows-{rank}").read_text().split()))) for rank in (0, 1))
    assert first == list(range(0, 8, 2)) and second == list(range(1, 8, 2))
    state = json.loads((tmp_path / "out.run" / "ground" / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["global_step"] == state["max_steps"] == 4  # 34 rows, 8 a step
    assert done.stdout.count("Saved ") == done.stdout.count("Stopped ") == 1
    assert answer(RiM.from_pretrained(tmp_path / "out"), "What is 3 + 4?", "memory", max_new_tokens=3).readouts


NOTHING_ELSE = """
import sys
for name in ("gradio", "plotly", "pandas", "datasets", "tensorboard", "tensorboardX", "gguf", "matplotlib", "scipy"):
    sys.modules[name] = None
from rim_probe.cli import main
sys.exit(main(["train", sys.argv[1]]))
"""


@pytest.mark.slow
def test_training_from_files_needs_the_core_packages_only(tmp_path, adapted):
    recipe = write_recipe(tmp_path, **lora_recipe(adapted, stages=[GROUND | {"rows": 8}]))
    done = in_subprocess(NOTHING_ELSE, recipe)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "out" / ADAPTER).exists()
    assert not list((tmp_path / "out.run").rglob("events*"))


# ------------------------------------------------------------------------------------------------------------ bad data


@pytest.mark.parametrize("objective", ["stage1", "cot"])
def test_problems_without_steps_are_refused_where_steps_are_needed(tmp_path, adapted, objective):
    write_problems(tmp_path / "bare.txt", [Problem("What is 3 + 4?", (), "7"), Problem("What is 3 + 5?", (), "8")])
    recipe = lora_recipe(
        adapted, data={"files": [str(tmp_path / "bare.txt")]}, stages=[GROUND | {"objective": objective}]
    )
    with pytest.raises(RecipeError, match="Stage ground can use none of the 2 training problems: 2 have no steps"):
        train(write_recipe(tmp_path, **recipe))


def test_unusable_problems_are_left_out_and_counted(tmp_path, adapted, spy):
    long = Problem("What is " + "1 + " * 300 + "1?", ("<<1+1=2>>",), "301")
    endless = Problem("What is " + "1 + " * 9000 + "1?", ("<<1+1=2>>",), "9001")
    write_problems(tmp_path / "mixed.txt", [*bare_problems(4), long, endless, Problem("What is 3 + 4?", (), "7")])
    with open(tmp_path / "mixed.txt", "a", encoding="utf-8") as file:
        file.write("this is no problem\n")
    lines = []
    recipe = lora_recipe(adapted, data={"files": [str(tmp_path / "mixed.txt")]}, stages=[GROUND | {"rows": 4}])
    train(write_recipe(tmp_path, **recipe), report=lines.append)
    assert set(spy[0].train_dataset.problems) == {0, 1, 2, 3}
    assert "1 lines left out, such as line 8" in lines[0]
    assert (
        "Stage ground leaves out some of the 7 training problems: "
        "1 have no steps and 1 have a question that is empty, too long or holds a control token and "
        "1 do not fit into the context of 512 tokens." in lines
    )


def test_what_cannot_be_trained_is_a_sentence(tmp_path, adapted):
    (tmp_path / "noise.txt").write_text("nothing\nat all\n")
    with pytest.raises(ProblemError, match="holds no problem"):
        train(write_recipe(tmp_path, **lora_recipe(adapted, data={"files": [str(tmp_path / "noise.txt")]})))
    with pytest.raises(CheckpointError, match="nowhere"):
        train(write_recipe(tmp_path, **lora_recipe(adapted) | {"base": str(tmp_path / "nowhere")}))
    assert not any(path.is_dir() for path in (tmp_path / "out.run").iterdir())  # nothing to resume stands in the way
    (tmp_path / "out").touch()
    with pytest.raises(RecipeError, match="is a file; output must name a folder"):
        train(write_recipe(tmp_path, **lora_recipe(adapted)))


def test_rows_say_what_they_train(rim):
    """`make_row`: the objective decides, and so do `blocks` and `grounded`."""
    problem = Problem("q", ("<<1+1=2>>", "<<2+1=3>>"), "3")

    def made(place=0, **stage):
        return stages.make_row(rim.encoder, Stage("one", rows=1, learning_rate=0.1, **stage), seed=0)(problem, place)

    assert made(objective="cot") == cot_row(rim.encoder, problem)
    assert made(objective="direct") == direct_row(rim.encoder, problem)
    assert made(objective="stage1").num_readouts == 2 and made(objective="stage1", blocks=3).num_readouts == 3
    assert made(objective="stage2") == stage2_row(rim.encoder, problem, 4)
    assert made(objective="stage2", blocks=2) == stage2_row(rim.encoder, problem, 2)
    grounded = [made(place, objective="stage2", grounded=0.25).num_grounded for place in range(1000)]
    assert 0.22 < sum(count > 0 for count in grounded) / 1000 < 0.28


def test_start_goes_on_with_an_adapter(tmp_path, adapted):
    """Its rank and weights stay, its base is found by its own record, and a change to it ends a run."""
    first = train(write_recipe(tmp_path, name="first", **lora_recipe(adapted)), report=lambda line: None)
    recipe = {key: value for key, value in lora_recipe(adapted).items() if key not in ("base", "lora")}
    recipe |= {"start": str(first), "stages": [GROUND | {"rows": 8, "learning_rate": 1e-9}]}
    path = write_recipe(tmp_path, name="second", **recipe)
    assert train(path, max_minutes=0, report=lambda line: None) is None
    second = train(path, resume=True, report=lambda line: None)
    before, after = load_file(first / ADAPTER), load_file(second / ADAPTER)
    assert before.keys() == after.keys()
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, atol=1e-6, rtol=1e-2)
    with pytest.raises(RecipeError, match="is no adapter folder"):
        train(write_recipe(tmp_path, name="third", **recipe | {"start": str(tmp_path)}), report=lambda line: None)
    with pytest.raises(RecipeError, match="give the recipe the layout of start"):
        slots = {"layout": {"num_blocks": 3, "slots_per_block": 5}}
        train(write_recipe(tmp_path, name="fourth", **recipe | slots), report=lambda line: None)
    fifth = write_recipe(tmp_path, name="fifth", **recipe)
    assert train(fifth, max_minutes=0, report=lambda line: None) is None
    save_file({name: value + 1 for name, value in before.items()}, first / ADAPTER)
    with pytest.raises(RecipeError, match="start_weights changed"):
        train(fifth, resume=True, report=lambda line: None)


@pytest.mark.slow
def test_a_signal_saves_and_the_run_goes_on_to_the_same_bits(tmp_path):
    recipe = write_recipe(tmp_path, **SCRATCH | {"stages": [GROUND]})
    whole = train(recipe, output=str(tmp_path / "whole"), report=lambda line: None)
    lines = []
    before = signal.getsignal(signal.SIGTERM)
    begin = RiMTrainer.training_step

    def step(self, *args, **kwargs):
        if self.state.global_step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return begin(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RiMTrainer, "training_step", step)
        assert train(recipe, report=lines.append) is None
    assert signal.getsignal(signal.SIGTERM) is before
    assert any("step 2; go on with --resume" in line for line in lines)
    resumed = train(recipe, resume=True, report=lambda line: None)
    first, second = (load_file(folder / WEIGHTS) for folder in (whole, resumed))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_no_model_is_replaced_that_the_run_did_not_make(tmp_path, adapted):
    """Neither its own base nor any other model's folder."""
    for name in ("its own base", "another model"):
        folder = tmp_path / name
        shutil.copytree(adapted["untied"], folder)
        before = {file.name: file.read_bytes() for file in folder.iterdir()}
        recipe = lora_recipe(adapted) | ({"base": str(folder)} if name == "its own base" else {})
        with pytest.raises(RecipeError, match="did not make"):
            train(write_recipe(tmp_path, name=name, **recipe), report=lambda line: None)
        assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    own = write_recipe(tmp_path, name="own", **lora_recipe(adapted, stages=[GROUND | {"rows": 4}]))
    assert train(own, report=lambda line: None) == train(own, resume=True, report=lambda line: None)


def test_two_trainings_do_not_share_a_run(tmp_path, adapted):
    recipe = write_recipe(tmp_path, **lora_recipe(adapted))
    found = []

    def report(line: str) -> None:
        if "stage ground" in line:
            with pytest.raises(RiMError, match="is at work in"):
                train(recipe, resume=True, report=found.append)
            found.append("refused")

    train(recipe, report=report)
    assert found == ["refused"]
