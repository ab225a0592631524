"""Interchange training: the loss with its slot labels, stages and resuming, files, and whether slots carry the sum."""

import json

import numpy as np
import pytest
import torch
from conftest import tiny_tokenizer
from test_training import ADAPTER, GROUND, REFINE, SCRATCH, WEIGHTS, adapted, lora_recipe, write_recipe  # noqa: F401
from torch.nn.functional import cross_entropy
from transformers import TrainingArguments

from rim_probe.datasets.arithmetic import World, generate
from rim_probe.datasets.partners import Partners
from rim_probe.decoding import answer
from rim_probe.memory import MemoryLayout
from rim_probe.model import RiM
from rim_probe.packing import IGNORED, row_mask, stage1_row
from rim_probe.probing.hooks import edit_residual, num_layers, read_residual
from rim_probe.problems import Problem, write_problems
from rim_probe.training import backends, run, stages, train
from rim_probe.training.pairs import PairRows, draw_pairs
from rim_probe.training.recipe import Stage
from rim_probe.training.rows import Batches
from rim_probe.training.scratch import small_llama
from rim_probe.training.tokens import tokenise
from rim_probe.training.trainer import RiMTrainer

SWAP = GROUND | {"name": "swap", "objective": "interchange", "slot_labels": 2}
WORLD = World()


def silent(line: str) -> None:
    pass


# ---------------------------------------------------------------------------------------------------------------- loss


@pytest.fixture
def deep() -> RiM:
    """Ten layers, of which five are read."""
    tokenizer = tiny_tokenizer()
    base = small_llama(tokenizer, layers=10, width=16, heads=2, inner=32, context=512, seed=0)
    return RiM.attach(base, tokenizer, MemoryLayout(num_blocks=4))


def pair_rows(rim: RiM, share: float = 1.0) -> list:
    problems = list(generate(WORLD, "train", 12, seed=5))
    numbers = list(range(len(problems)))
    pairs = draw_pairs(problems, numbers, Partners(WORLD, "train", 5), share, 0.3, 0)
    tokens = tokenise(rim.encoder, problems, silent)
    rows = PairRows(rim, tokens, numbers, pairs, 4, True, silent)
    return [row for place in numbers if (row := rows.row(place))]


def trainer_of(rim: RiM, rows: list, folder, slot_labels: int = 5) -> RiMTrainer:
    args = TrainingArguments(output_dir=str(folder), report_to=[], use_cpu=True, max_steps=10)
    weights = stages.readout_weights(Stage("one", "interchange", 1, 0.1))
    return RiMTrainer(
        rim, args, Batches(rows, [np.arange(len(rows))], lambda r, _: r), [], weights, slot_labels=slot_labels
    )


def test_the_loss_is_the_mean_over_readouts_plus_that_of_the_lens_at_slots(deep, tmp_path):
    rows = [*pair_rows(deep)[:3], stage1_row(deep.encoder, next(generate(WORLD, "train", 1, seed=8)), 4, True)]
    trainer = trainer_of(deep, rows, tmp_path)
    loss = trainer.compute_loss(deep.model, trainer.data_collator([rows]))
    readout, slots = [], []
    for row in rows:
        segments, audience = (torch.tensor([row.column(name)]) for name in ("segments", "audience"))
        states = deep.model(
            input_ids=torch.tensor([row.ids]),
            position_ids=torch.tensor([row.positions]),
            attention_mask=row_mask(torch.tensor([row.readouts]), deep.dtype, segments, audience),
            output_hidden_states=True,
        )
        labels = torch.tensor(row.labels)
        places = labels != IGNORED
        readout.append(cross_entropy(states.logits[0][places], labels[places], reduction="none"))
        for place, (label, depth) in enumerate(zip(row.slot_labels, row.slot_depths, strict=True)):
            if label != IGNORED:
                read = [states.hidden_states[2 * n][0, place] for n in range(min(depth, 5), 6)]
                named = [deep.model.model.norm(x) for x in read[:-1]] + read[-1:]  # the last is normed as it is told
                logits = deep.model.lm_head(torch.stack(named))
                slots.append(cross_entropy(logits, torch.tensor([label] * len(read))))
    expected = torch.cat(readout).mean() + torch.stack(slots).mean()
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)


# -------------------------------------------------------------------------------------------------------------- stages


@pytest.mark.slow
def test_stages_in_any_order_resume_to_the_same_bits(tmp_path):
    stages = [
        SWAP | {"rows": 8},
        REFINE | {"rows": 4},
        GROUND | {"name": "named", "rows": 4, "slot_labels": 1},
        SWAP | {"name": "again", "rows": 8, "share": 0.5, "blocks": 2},
    ]
    whole = train(write_recipe(tmp_path, name="whole", **SCRATCH | {"stages": stages}), report=silent)
    recipe, stops = write_recipe(tmp_path, name="parts", **SCRATCH | {"stages": stages}), 0
    while train(recipe, resume=stops > 0, max_minutes=0, report=silent) is None:
        stops += 1
    assert stops > 3
    assert (tmp_path / "parts" / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()


def test_pairs_of_files_are_numeric_variants(tmp_path, adapted):  # noqa: F811
    """Unlike problems are rows of stage 1; validation asks whole problems."""
    variants = [
        Problem(
            f"{a} + {b} boxes of {c}?", (f"<<{a}+{b}={a + b}>>", f"<<{a + b}*{c}={(a + b) * c}>>"), f"{(a + b) * c}"
        )
        for a, b, c in [(1, 3, 2), (4, 5, 2), (6, 3, 4), (8, 7, 5), (2, 9, 5), (10, 4, 2)]
    ]
    alone = [Problem("What is 3 + 4?", ("<<3+4=7>>",), "7"), Problem("Ann has 2?", ("<<2+0=2>>",), "2")]
    write_problems(tmp_path / "variants.txt", variants + alone)
    data = {"files": [str(tmp_path / "variants.txt")], "validation": str(tmp_path / "variants.txt")}
    recipe, lines = lora_recipe(adapted, data=data, stages=[SWAP | {"rows": 16, "batch_size": 4}]), []
    (trainer,) = run.make_trainers(run.load_recipe(write_recipe(tmp_path, **recipe)), tmp_path / "run", lines.append)
    seen = trainer.train_dataset
    each = [
        (int(seen.problems[i]), row)
        for n, batch in enumerate(seen.batches)
        for i, row in zip(batch, seen[n], strict=True)
    ]
    paired = {number for number, row in each if row.segments}
    assert paired == set(range(6))
    assert "Stage swap: 75.0% of the rows are pairs" in lines
    finished = train(tmp_path / "out.yaml", report=silent)
    assert (finished / ADAPTER).exists()


def test_bfloat16_and_its_fused_head_have_nearly_the_same_loss(tmp_path, adapted):  # noqa: F811
    losses = []
    for precision in ("float32", "bfloat16"):
        stage = SWAP | {"rows": 12, "batch_size": 12, "dropout": 0.0, "validate_every": 1}
        recipe = lora_recipe(adapted, stages=[stage], precision=precision)
        train(write_recipe(tmp_path, name=precision, **recipe), report=silent)
        history = (tmp_path / f"{precision}.run" / "swap" / "history.jsonl").read_text().splitlines()
        losses.append(json.loads(history[0])["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


@pytest.mark.slow
def test_compiled_layers_have_the_same_loss(deep, tmp_path, monkeypatch):
    monkeypatch.setattr(backends, "_COMPILER", "eager")
    rows = pair_rows(deep)[:3]
    trainer = trainer_of(deep, rows, tmp_path)
    batch = trainer.data_collator([rows])
    plain = [trainer.compute_loss(deep.model, batch).item() for _ in range(2)]
    backends.compile_layers(deep.model)
    compiled = [trainer.compute_loss(deep.model, batch).item() for _ in range(2)]
    backends.uncompile_layers(deep.model)
    assert compiled == pytest.approx(plain, abs=1e-5)


# -------------------------------------------------------------------------------------------------- what it is done for


def swapped(rim: RiM, base: str, source: str, block: int) -> str:
    """The first token of the answer to `base` when the slots of a block hold `source`'s states in every layer."""
    base_ids, source_ids = (torch.tensor([rim.prompt_ids(question, "memory")]) for question in (base, source))
    places = rim.layout.slot_positions(len(rim.encode_question(base)))[block - 1]
    states = {}
    with torch.no_grad():
        with read_residual(rim, range(num_layers(rim) + 1), lambda layer, x: states.update({layer: x})):
            rim.model(source_ids)
        edits = {
            layer: lambda x, donor=donor: x.index_copy(1, torch.tensor(places), donor[:, places])
            for layer, donor in states.items()
        }
        with edit_residual(rim, edits):
            return rim.decode([rim.model(base_ids).logits[0, -1].argmax().item()])


@pytest.mark.slow
@pytest.mark.parametrize("share", [1.0, 0.0])
def test_interchange_training_makes_the_slots_carry_the_answer(tmp_path, share):
    """A tiny model learns sums by heart; with pairs a swap of block 1's slots swaps the answer, without it does not."""
    world = {"max_steps": 1, "max_value": 5, "operations": "+", "story": 0, "relation": 0, "bare": 1}
    world["held_out_steps"] = 2
    stage = SWAP | {"rows": 3200, "batch_size": 8, "learning_rate": 5e-3, "schedule": "linear", "share": share}
    recipe = {
        "scratch": {"layers": 2, "width": 32, "heads": 4, "inner": 64, "context": 64},
        "layout": {"num_blocks": 2},
        "data": {"world": world, "rows": 500, "validation_rows": 0},
        "stages": [stage | {"validate_every": 10_000}],
    }
    rim = RiM.from_pretrained(train(write_recipe(tmp_path, **recipe), report=silent), device="cpu")
    answers = {p.question: p.answer for p in generate(World(**world), "train", 200) if p.question.endswith("= ?")}
    assert len(answers) > 5
    assert sum(answer(rim, q, "memory").value == right for q, right in answers.items()) > 0.8 * len(answers)
    pairs = [(b, s) for b in answers for s in answers if answers[b] != answers[s]]
    taken = {block: sum(swapped(rim, b, s, block) == answers[s] for b, s in pairs) / len(pairs) for block in (1, 2)}
    assert taken[2] < 0.2
    assert taken[1] > 0.8 if share else taken[1] < 0.2
