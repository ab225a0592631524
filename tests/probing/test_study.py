"""A study captures and asks each thing once, keeps it, and never serves what belongs to something else."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import add_lora, tiny_base, tiny_rim, tiny_tokenizer

from rim_probe.decoding import answer
from rim_probe.errors import RiMError
from rim_probe.model import RiM
from rim_probe.probing import study as study_module
from rim_probe.probing.capture import capture
from rim_probe.probing.study import SPLITS, Study, load_models, split_problems
from rim_probe.problems import Problem, is_correct


def problem(number: int) -> Problem:
    return Problem(f"Anna has {number} apples and buys {number % 7}.", (f"<<{number}+{number % 7}=1>>",), "17")


PROBLEMS = [problem(number) for number in range(20)]
SPLIT = {"fit": PROBLEMS[:3], "choose": PROBLEMS[3:5], "report": PROBLEMS[5:7]}
SPAN = Problem("7 " * 600, (), "7")  # longer than the context
EMPTY = Problem(" ", (), "7")


@pytest.fixture
def rim(make_rim):
    """With a short context, which ends the babble of a random model early."""
    return make_rim(context=64)


@pytest.fixture
def counted(monkeypatch):
    """What is captured and answered from here on: a list of (what, how many questions)."""
    calls, real_capture, real_answers = [], study_module.capture_to, study_module.answer_batch

    def capture_to(folder, rim, questions, **options):
        calls.append(("capture", len(questions)))
        return real_capture(folder, rim, questions, **options)

    def answer_batch(rim, questions, *args, **options):
        calls.append(("answers", len(questions)))
        return real_answers(rim, questions, *args, **options)

    monkeypatch.setattr(study_module, "capture_to", capture_to)
    monkeypatch.setattr(study_module, "answer_batch", answer_batch)
    return calls


def study_of(models, splits=None, **options) -> Study:
    return Study(models, splits or SPLIT, progress=False, **options)


def test_right_tells_which_readouts_are_right(rim):
    """Gold answers are set to what some readout of each problem says, so that both outcomes occur."""
    asked = [answer(rim, p.question, "memory") for p in SPLIT["report"]]
    gold = [next((r.value for r in a.readouts if r.value), "17") for a in asked]
    problems = [Problem(p.question, p.steps, value) for p, value in zip(SPLIT["report"], gold, strict=True)]
    with study_of({"memory": rim}, SPLIT | {"report": problems}) as study:
        right = study.right("report")
        answers = study.answers("memory", "report")
    assert right.shape == (2, 4) and right.dtype == bool
    assert right.any() == any(r.value for a in asked for r in a.readouts)
    for row, given, one in zip(right, answers, problems, strict=True):
        assert row.tolist() == [is_correct(readout.value, one.answer) for readout in given.readouts]


def test_problems_that_a_model_cannot_read_are_left_out_and_counted(rim):
    short = tiny_rim(context=56)
    long_for_one = Problem("7 " * 40, (), "7")
    assert 56 - 2 < len(rim.prompt_ids(long_for_one.question, "memory")) <= 64 - 2
    splits = {"fit": [SPAN, *PROBLEMS[:2]], "choose": [PROBLEMS[2], EMPTY], "report": [PROBLEMS[3], long_for_one]}
    with study_of({"memory": rim, "cot": rim}, splits) as study:
        assert study.left_out == {"fit": 1, "choose": 1, "report": 0}
        assert study.problems("fit") == PROBLEMS[:2]
        assert study.capture("memory", "fit").num_questions == 2
    with study_of({"memory": rim, "base": short}, splits) as study:
        assert study.left_out == {"fit": 1, "choose": 1, "report": 1}


@pytest.mark.parametrize("splits", [{}, {"fit": PROBLEMS}, SPLIT | {"choose": [SPAN]}])
def test_a_split_without_problems_is_one_sentence(rim, splits):
    with pytest.raises(RiMError, match="No problem is left for the split “(fit|choose)”; give more problems"):
        Study({"memory": rim}, splits)


def test_a_study_goes_on_where_it_stopped(rim, tmp_path, counted):
    with study_of({"memory": rim}, folder=tmp_path) as first:
        cell, answers = first.capture("memory", "fit").cell(1, 1, 1), first.answers("memory", "fit")
    counted.clear()
    with study_of({"memory": rim}, folder=tmp_path) as second:
        assert second.answers("memory", "fit") == answers
        shards = list((tmp_path / "memory-fit").glob("*.safetensors"))
        times = [shard.stat().st_mtime_ns for shard in shards]
        assert np.array_equal(second.capture("memory", "fit").cell(1, 1, 1), cell)
        assert [shard.stat().st_mtime_ns for shard in shards] == times
    assert counted == [("capture", 3)] and tmp_path.is_dir()  # looked up, not made again; a folder given is kept


@pytest.mark.parametrize("change", ["model", "questions", "blocks", "dtype", "damage"])
def test_a_kept_folder_never_serves_what_belongs_to_something_else(rim, tmp_path, change):
    with study_of({"memory": rim}, folder=tmp_path) as study:
        study.capture("memory", "fit"), study.answers("memory", "fit")
    models, splits, options = {"memory": rim}, SPLIT, {}
    if change == "model":
        models = {"memory": tiny_rim(seed=1, context=64)}
    elif change == "questions":
        splits = SPLIT | {"fit": PROBLEMS[10:13]}
    elif change == "blocks":
        options = {"num_blocks": 2}
    elif change == "dtype":
        rim.model.to(torch.bfloat16)
    else:
        (tmp_path / "answers-memory-fit.json").write_text('{"key": 1, "answers": [')
        (tmp_path / "memory-fit" / "shard-00000.safetensors").write_bytes(b"")
    with study_of(models, splits, **options) as fresh, study_of(models, splits, **options, folder=tmp_path) as kept:
        assert np.array_equal(
            kept.capture("memory", "fit").cell(2, 2, "slots"), fresh.capture("memory", "fit").cell(2, 2, "slots")
        )
        assert kept.answers("memory", "fit") == fresh.answers("memory", "fit")


# --------------------------------------------------------------------------------------------------------- one file


def test_one_file_is_split_without_a_question_in_two_splits():
    splits = split_problems(PROBLEMS * 3, seed=5)
    assert tuple(splits) == SPLITS and [len(part) for part in splits.values()] == [10, 4, 6]
    questions = [p.question for part in splits.values() for p in part]
    assert sorted(questions) == sorted({p.question for p in PROBLEMS})
    assert split_problems(PROBLEMS * 3, seed=5) == splits
    assert split_problems(PROBLEMS * 3, seed=6) != splits


# ----------------------------------------------------------------------------------------------------- loading models


def test_models_of_a_checkpoint_by_role(tmp_path):
    folder = Path(tiny_rim().save_pretrained(tmp_path / "checkpoint"))
    assert set(load_models(folder, "cpu")) == {"memory"}  # the memory model is no control of itself
    for number, role in enumerate(("cot", "direct", "stage1", "base", "paper"), start=1):
        tiny_rim(seed=number).save_pretrained(folder / role)
    models = load_models(folder, "cpu")
    assert set(models) == {"memory", "cot", "direct", "stage1", "base", "paper"}
    rows = {role: rim.model.get_input_embeddings().weight[0, 0].item() for role, rim in models.items()}
    assert len(set(rows.values())) == 6
    with Study(models, SPLIT, progress=False) as study:
        assert [study.capture(role, "fit").K for role in models] == [4, 0, 0, 4, 4, 4]


def test_a_plain_base_gets_untrained_memory_tokens(tmp_path, make_rim):
    folder = Path(make_rim().save_pretrained(tmp_path / "checkpoint"))
    tiny_base(seed=3).save_pretrained(tmp_path / "plain")
    tiny_tokenizer().save_pretrained(tmp_path / "plain")
    base = load_models(folder, "cpu", base=tmp_path / "plain")["base"]
    expected = RiM.attach(tiny_base(seed=3), tiny_tokenizer(), make_rim().layout)
    assert torch.equal(base.model.get_input_embeddings().weight, expected.model.get_input_embeddings().weight)
    (folder / "cot").mkdir()
    with pytest.raises(RiMError, match="memory_layout.json is missing"):
        load_models(folder, "cpu")


def test_the_base_of_an_adapter_is_the_one_it_names(tmp_path):
    tiny_base().save_pretrained(tmp_path / "plain")
    tiny_tokenizer().save_pretrained(tmp_path / "plain")
    rim = add_lora(tiny_rim())
    rim.model.peft_config["default"].base_model_name_or_path = str(tmp_path / "plain")
    models = load_models(rim.save_pretrained(tmp_path / "adapter"), "cpu")
    assert set(models) == {"memory", "base"} and json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    questions = [p.question for p in SPLIT["fit"]]
    torch.testing.assert_close(capture(models["base"], questions).slots, capture(tiny_rim(), questions).slots)
    assert not torch.allclose(capture(models["memory"], questions).slots, capture(tiny_rim(), questions).slots)
