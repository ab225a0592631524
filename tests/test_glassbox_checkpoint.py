"""The checkpoint `glass-box` as it is shipped: it is the model of `rim_probe.glassbox`, and its memory is a cause."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rim_probe.decoding import answer, answer_batch
from rim_probe.gallery import load_examples
from rim_probe.glassbox import all_problems, draw_problems, glassbox
from rim_probe.glassbox.build import build
from rim_probe.model import RiM
from rim_probe.probing.study import load_models
from rim_probe.probing.trial import try_counterfactual
from rim_probe.problems import is_correct, read_problems

FOLDER = Path(__file__).parent.parent / "checkpoints" / "glass-box"


@pytest.fixture(scope="module")
def models():
    return load_models(FOLDER, "cpu")


def same_weights(one: RiM, other: RiM) -> bool:
    left, right = one.model.state_dict(), other.model.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize(("role", "trained"), [("memory", True), ("base", False)])
def test_what_is_shipped_is_what_the_library_writes(models, role, trained):
    assert same_weights(models[role], glassbox(trained=trained).rim)


@pytest.mark.slow
def test_building_it_anew_gives_what_is_shipped(tmp_path):
    build(tmp_path / "box", tmp_path / "work")
    for weights in ("model.safetensors", "base/model.safetensors"):
        written, shipped = (load_file(folder / weights) for folder in (tmp_path / "box", FOLDER))
        assert written.keys() == shipped.keys() and all(torch.equal(written[name], shipped[name]) for name in written)
    for file in ("examples.json", "memory_layout.json", "base/memory_layout.json"):
        assert (tmp_path / "box" / file).read_bytes() == (FOLDER / file).read_bytes()
    for split, problems in all_problems().items():
        assert read_problems(tmp_path / "work" / f"{split}.txt").problems == list(problems)


def test_its_answers_are_right_in_float32_and_bfloat16(models):
    problems = draw_problems(0, 50, "report")
    coarse = RiM.from_pretrained(FOLDER, "cpu", torch.bfloat16)
    for rim in (models["memory"], coarse):
        answers = answer_batch(rim, [problem.question for problem in problems], "memory")
        assert [given.value for given in answers] == [problem.answer for problem in problems]


@pytest.mark.parametrize("method", ["cot", "direct"])
def test_the_trained_models_can_be_asked_the_same_questions(models, method):
    problems = draw_problems(0, 50, "report")
    answers = answer_batch(models[method], [problem.question for problem in problems], method)
    right = [is_correct(given.value, problem.answer) for given, problem in zip(answers, problems, strict=True)]
    assert sum(right) >= 48
    if method == "cot":
        assert answers[0].text == f"{' '.join(problems[0].steps)} #### {problems[0].answer}"


def test_blocks_that_nothing_is_written_for_say_nothing(models):
    (problem,) = draw_problems(3, 1, "report")
    without = answer(models["memory"], problem.question, "memory", num_blocks=0)
    assert without.text == "" and without.value is None
    many = answer(models["memory"], problem.question, "memory", num_blocks=16)
    assert many.readouts[2].value == problem.answer
    assert {readout.text for readout in many.readouts[3:]} == {""}


@pytest.mark.slow
def test_every_block_of_its_examples_can_be_tried_and_the_predicted_answer_comes(models):
    examples = load_examples(FOLDER)
    assert len(set(examples)) == 9 and set(examples) <= set(all_problems()["report"])
    for problem in examples:
        for block in (1, 2, 3):
            trial = try_counterfactual(models["memory"], problem, None, block=block)
            assert trial["came"] and trial["control"]["outcome"] != "expected"
