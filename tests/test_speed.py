"""The fast side of training on a CPU: speed, back ends as far as they go here, trials, profiles, stops in time."""

import json
import time

import numpy as np
import pytest
import torch
from conftest import tiny_base, tiny_rim, tiny_tokenizer
from test_training import GROUND, REFINE, bare_problems, lora_recipe, make_trainer, write_recipe
from torch.nn.attention.flex_attention import create_mask

from rim_probe.errors import RecipeError
from rim_probe.model import RiM, load_base
from rim_probe.packing import cot_row, flex_mask_mod, row_mask, stage1_row, stage2_row
from rim_probe.precision import matrix_rate
from rim_probe.problems import write_problems
from rim_probe.training import backends, origin, profiling, run, stages, train
from rim_probe.training.callbacks import StopAfter
from rim_probe.training.recipe import Data, Lora, Recipe, Stage
from rim_probe.training.rows import Batches
from rim_probe.training.speed import Meter, Work, count_work
from rim_probe.training.trainer import RiMTrainer
from rim_probe.training.trial import Trial

COT = GROUND | {"name": "chain", "objective": "cot", "rows": 12}


@pytest.fixture(scope="module")
def adapted(tmp_path_factory) -> dict:
    """An untied base, problems to train on and problems to validate on."""
    folder = tmp_path_factory.mktemp("adapted")
    tokenizer = tiny_tokenizer()
    tiny_base(vocab_size=len(tokenizer)).save_pretrained(folder / "untied")
    tokenizer.save_pretrained(folder / "untied")
    write_problems(folder / "problems.txt", bare_problems(20))
    write_problems(folder / "valid.txt", bare_problems(26)[20:])
    return {"untied": folder / "untied", "data": folder / "problems.txt", "valid": folder / "valid.txt"}


@pytest.fixture
def like_a_gpu(monkeypatch) -> None:
    """What a GPU run says of precision and loading, on the CPU: bfloat16 base, autocast, two worker processes."""
    with monkeypatch.context() as patch:
        patch.setattr(backends, "on_gpu", lambda: True)
        arguments = backends.running_arguments("bfloat16") | {"use_cpu": True, "dataloader_pin_memory": False}
    monkeypatch.setattr(run, "running_arguments", lambda precision: arguments)


@pytest.fixture
def quick_compiler(monkeypatch) -> None:
    """torch.compile as far as tracing: machine code takes a CPU the better part of a minute."""
    monkeypatch.setattr(backends, "_COMPILER", "eager")


def history(folder) -> list[dict]:
    """What a stage logged, without what depends on the clock."""
    entries = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    clocks = ("per_second", "tflops", "utilisation", "peak_gb", "padding")
    return [
        {key: value for key, value in entry.items() if not key.endswith(clocks)}
        for entry in entries
        if "loss" in entry or "eval_accuracy" in entry
    ]


# --------------------------------------------------------------------------------------------------------------- speed


def test_flops_of_a_llama_counted_by_hand():
    model = tiny_base()  # width 32, inner 64, 4 heads and 2 for keys and values of 8, 2 layers, vocabulary 300
    layer = 32 * 32 * 2 + 2 * 32 * 16 + 3 * 32 * 64 + 2 * 32  # q and o, k and v, gate, up and down, two norms
    assert count_work(model) == Work(token=6 * (2 * layer + 32), label=6 * 300 * 32, pair=12 * 2 * 4 * 8)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    frozen = count_work(model)
    assert frozen == Work(token=4 * (2 * layer + 32), label=4 * 300 * 32, pair=12 * 2 * 4 * 8)
    assert frozen.flops(tokens=10, labels=3, pairs=52) == 10 * frozen.token + 3 * frozen.label + 52 * frozen.pair


def test_an_adapter_costs_six_for_its_own_weights_and_four_for_the_base(rim):
    before = tiny_rim()
    for parameter in before.model.parameters():
        parameter.requires_grad_(False)
    adapted = origin.add_adapter(
        rim, Recipe("out", (Stage("a", "cot", 1, 0.1),), Data(files=("a.txt",)), base="b", lora=Lora(r=4, alpha=8))
    )
    lora = sum(p.numel() for name, p in adapted.model.named_parameters() if "lora_" in name)
    base, work = count_work(before.model), count_work(adapted.model)
    assert lora and work == Work(base.token + 6 * lora, base.label, base.pair)


def test_only_real_tokens_count(rim, tmp_path):
    problems = bare_problems(6)
    rows = [stage1_row(rim.encoder, problem) for problem in problems]
    trainer = make_trainer(rim, Stage("one", "stage1", 1, 0.1), rows, [], tmp_path)
    trainer._multiple = 64
    batch = trainer.data_collator([rows])
    meter = Meter(rim.model, torch.device("cpu"), torch.float32)
    meter.count(batch)
    time.sleep(0.01)
    reading = meter.read()
    tokens = sum(map(len, rows))
    assert reading["tokens_per_second"] / reading["rows_per_second"] == pytest.approx(tokens / 6, rel=1e-2)
    assert reading["padding"] == round(1 - tokens / batch["input_ids"].numel(), 4) > 0
    flops = meter._work.flops(tokens, len(batch["places"]), sum(len(row) ** 2 for row in rows))
    assert reading["tflops"] * 1e12 / reading["tokens_per_second"] == pytest.approx(flops / tokens, rel=1e-2)
    assert reading["utilisation"] == pytest.approx(
        reading["tflops"] * 1e12 / matrix_rate("cpu", torch.float32), rel=1e-2, abs=1e-5
    )
    assert meter.read() == {}


# ----------------------------------------------------------------------------------------------------------- back ends


def test_length_is_padded_without_changing_the_loss(rim, tmp_path):
    rows = [stage2_row(rim.encoder, problem, 3) for problem in bare_problems(3)]
    trainer = make_trainer(rim, Stage("one", "stage2", 1, 0.1), rows, [], tmp_path)
    plain = trainer.data_collator([rows])
    trainer._multiple = 64
    padded = trainer.data_collator([rows])
    assert padded["input_ids"].shape[1] % 64 == 0 and plain["input_ids"].shape[1] % 64
    losses = [trainer.compute_loss(rim.model, batch) for batch in (plain, padded)]
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_flex_attends_as_sdpa_does(make_rim, kind, tmp_path, monkeypatch):
    """The block mask, and the loss of a model that is given it, without the compiler that a GPU would use."""
    rim = make_rim(kind)
    rows = [stage1_row(rim.encoder, p) for p in bare_problems(5)] + [stage2_row(rim.encoder, bare_problems(1)[0], 3)]
    trainer = make_trainer(rim, Stage("one", "stage1", 1, 0.1), rows, rows, tmp_path)
    batch = trainer.data_collator([rows])
    readouts = batch["readouts"]
    shown = create_mask(flex_mask_mod(readouts), *readouts.shape[:1], None, *readouts.shape[1:] * 2, device="cpu")
    assert torch.equal(shown, row_mask(readouts, torch.float32) == 0)
    with torch.no_grad():
        plain = trainer.compute_loss(rim.model, batch)
        backends.set_attention(rim.model, "flex")
        monkeypatch.setattr(torch, "compile", lambda function, **options: function)
        block_mask = trainer._mask(readouts)
        assert type(block_mask).__name__ == "BlockMask"
        torch.testing.assert_close(trainer.compute_loss(rim.model, batch), plain, atol=1e-4, rtol=1e-4)
    trainer.evaluate()  # with sdpa, and back
    assert rim.model.config._attn_implementation == "flex_attention"


def test_flex_is_refused_where_it_cannot_train(make_rim, tmp_path, adapted, monkeypatch):
    recipe = write_recipe(tmp_path, **lora_recipe(adapted, attention="flex"))
    with pytest.raises(RecipeError, match="attention: flex trains on a GPU only; use attention: sdpa"):
        train(recipe, report=lambda line: None)
    monkeypatch.setattr(backends, "on_gpu", lambda: True)
    with pytest.raises(RecipeError, match="GPT2LMHeadModel has no flex attention in transformers; use attention: sdpa"):
        backends.check_flex(make_rim("gpt2").model)
    backends.check_flex(make_rim("llama").model)


def test_text_rows_are_not_sent_through_flex(rim, tmp_path, monkeypatch):
    monkeypatch.setattr(backends, "on_gpu", lambda: True)
    rows = [cot_row(rim.encoder, problem) for problem in bare_problems(2)]
    args = make_trainer(rim, Stage("one", "cot", 1, 0.1), rows, [], tmp_path).args
    batches = Batches(rows, [np.arange(2)], lambda row, _: row)
    trainer = RiMTrainer(rim, args, batches, [], stages.readout_weights(Stage("one", "cot", 1, 0.1)), attention="flex")
    assert trainer.attention == "sdpa" == rim.model.config._attn_implementation


@pytest.mark.slow
def test_compiled_training_agrees_and_resumes(tmp_path, adapted, quick_compiler):
    plain = lora_recipe(adapted, stages=[GROUND | {"rows": 12, "dropout": 0.0}])
    whole = train(write_recipe(tmp_path, name="plain", **plain), report=lambda line: None)
    recipe = write_recipe(tmp_path, name="compiled", **plain | {"compile": True})
    assert train(recipe, max_minutes=0, report=lambda line: None) is None
    counters = torch._dynamo.utils.counters
    counters.clear()
    compiled = train(recipe, resume=True, report=lambda line: None)
    assert counters["stats"]["unique_graphs"] == 1  # for both layers and every length
    first, second = (RiM.from_pretrained(folder).model.state_dict() for folder in (whole, compiled))
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, atol=2e-3, rtol=2e-3)


def test_a_frozen_base_in_bfloat16_trains_float32_weights(tmp_path, adapted, like_a_gpu, monkeypatch):
    made = []

    class Spied(RiMTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            made.append((loss.dtype, {p.dtype for p in model.parameters() if p.requires_grad}))
            frozen = {p.dtype for p in model.parameters() if not p.requires_grad}
            assert frozen == {torch.bfloat16} and self._mask_dtype == torch.bfloat16
            assert {buffer.dtype for name, buffer in model.named_buffers() if "inv_freq" in name} == {torch.float32}
            return loss

    monkeypatch.setattr(run, "RiMTrainer", Spied)
    train(write_recipe(tmp_path, **lora_recipe(adapted)), report=lambda line: None)
    assert set((loss, *weights) for loss, weights in made) == {(torch.float32, torch.float32)}


def test_lean_adapters_compute_the_same_bits(adapted):
    rim = RiM.attach(*load_base(adapted["untied"]))
    rim = origin.add_adapter(
        rim, Recipe("o", (Stage("a", "cot", 1, 0.1),), Data(files=("a.txt",)), base="b", lora=Lora(r=4, alpha=8))
    )
    backends.narrow_base(rim.model)
    for name, parameter in rim.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter.data, std=0.1)
    ids = torch.arange(12)[None]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        before = rim.model(ids).logits
        backends.lean_adapters(rim.model)
        assert torch.equal(rim.model(ids).logits, before)


# ------------------------------------------------------------------------------------------------------------- resuming


@pytest.mark.slow
@pytest.mark.parametrize("gpu", [False, True], ids=["cpu", "like a gpu"])
def test_a_run_cut_at_every_step_logs_and_ends_the_same(tmp_path, adapted, gpu, request):
    """Adapters with dropout, greedy validation of chains, losses logged across the cuts, workers that read ahead."""
    if gpu:
        request.getfixturevalue("like_a_gpu")
    data = {"files": [str(adapted["data"])], "validation": str(adapted["valid"])}
    stages = [COT] if gpu else [COT, REFINE | {"rows": 12}]
    recipe = lora_recipe(adapted, data=data, stages=stages)
    whole = train(write_recipe(tmp_path, name="whole", **recipe), report=lambda line: None)
    parts, resume = write_recipe(tmp_path, name="parts", **recipe), False
    for _ in range(12):
        if finished := train(parts, resume=resume, max_minutes=0, report=lambda line: None):
            break
        resume = True
    for stage in [stage["name"] for stage in stages]:
        first, second = (history(tmp_path / f"{name}.run" / stage) for name in ("whole", "parts"))
        assert first == second and any("eval_exact_match" in entry for entry in first) == (stage == "chain")
        best = (tmp_path / f"{name}.run" / stage / "best" / "adapter_model.safetensors" for name in ("whole", "parts"))
        assert next(best).read_bytes() == next(best).read_bytes()
    assert finished == tmp_path / "parts" and whole == tmp_path / "whole"


class Clock:
    """A run on paper: steps, validations and saves of known length."""

    def __init__(self, monkeypatch, minutes: float, *, starting=60.0, step=1.0, validation=20.0, save=2.0, every=100):
        self.now = 1000.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        stopper = StopAfter(minutes)
        stopper.validation_steps = 30
        args = type("Args", (), {"eval_strategy": "steps", "eval_steps": every, "device": torch.device("cpu")})()
        state = type("State", (), {"global_step": 0, "max_steps": 10**6})()
        control = type("Control", (), {})()
        self.now += starting
        stopper.on_train_begin(args, state, control)
        while not stopper.stopped:
            self.now += step if state.global_step else step + starting
            state.global_step += 1
            stopper.on_step_end(args, state, control)
            if state.global_step % every == 0:
                self.now += validation
                stopper.on_evaluate(args, state, control)
            if state.global_step % every == 0 or stopper.stopped:
                self.now += save
                stopper.on_save(args, state, control)
        self.minutes, self.steps, self.stopper = (self.now - 1000) / 60, state.global_step, stopper


@pytest.mark.parametrize("every", [100, 37, 3])
@pytest.mark.parametrize("minutes", [4, 9])
def test_a_stop_comes_in_time_with_a_validation_under_way(monkeypatch, minutes, every):
    clock = Clock(monkeypatch, minutes, every=every)
    assert minutes - 0.75 < clock.minutes <= minutes
    assert clock.stopper.too_late_for_a_stage(torch.device("cpu"))


def test_one_step_is_taken_whatever_the_time(monkeypatch):
    assert Clock(monkeypatch, 0.01).steps == 1


# ---------------------------------------------------------------------------------------------------- trial and profile


@pytest.mark.slow
def test_a_trial_shows_that_the_loss_falls_and_is_no_run(tmp_path, adapted):
    data = {"files": [str(adapted["data"])], "validation": str(adapted["valid"])}
    big = {"rows": 10**6, "batch_size": 128, "schedule": "cosine", "validate_every": 500, "accumulation": 4}
    recipe = lora_recipe(adapted, data=data, stages=[COT | big, REFINE | big])
    path, lines = write_recipe(tmp_path, name="real", **recipe), []
    with pytest.raises(RecipeError, match="A trial needs an output of its own"):
        train(path, trial=Trial())
    out = str(tmp_path / "tried")
    assert train(path, output=out, trial=Trial(), max_minutes=0, report=lines.append) is None
    train(path, output=out, trial=Trial(), resume=True, report=lines.append)
    told = [line.split() for line in lines if "(means of 5 steps)" in line]
    assert [words[1] for words in told] == ["chain:", "refine:"]
    assert all(float(words[5]) < float(words[3]) for words in told)  # loss 5.678 -> 3.210
    assert lines[-1] == f"Saved {out}, which was tried and not trained: 30 steps of 4 rows a stage."
    assert not (tmp_path / "real.run").exists()
    assert json.loads((tmp_path / "tried.run" / "recipe.json").read_text())["trial"] is True
    with pytest.raises(RecipeError, match="trial changed since the run"):
        train(path, output=out, resume=True)


@pytest.mark.slow
def test_a_profile_compares_what_works_and_writes_nothing(tmp_path, adapted, quick_compiler, monkeypatch):
    tried = [profiling.Variant("flex", False), profiling.Variant("sdpa", False), profiling.Variant("sdpa", True)]
    monkeypatch.setattr(profiling, "variants", lambda: tried)
    monkeypatch.chdir(tmp_path)
    recipe = write_recipe(tmp_path, **lora_recipe(adapted))
    before, lines = sorted(tmp_path.rglob("*")), []
    results = profiling.profile(recipe, batch_size=2, report=lines.append)
    assert sorted(tmp_path.rglob("*")) == before
    assert list(map(str, results)) == ["sdpa", "sdpa + compile"]
    assert lines[0].startswith("flex failed: ")  # no backward on a CPU
    assert all(f"{stage['name']} min" in lines[1] for stage in lora_recipe(adapted)["stages"])
    assert "compiling counted: sdpa, " in lines[-1]  # 24 rows never pay for a compilation
    plain, compiled = results.values()
    assert plain.compile_seconds == 0 < compiled.compile_seconds
    assert len(plain.minutes) == 2 and plain.log["tokens_per_second"] > 0
