"""Own words: a model's own states carried into its own run change nothing; another question's may."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from rim_probe.decoding import answer_batch
from rim_probe.errors import RiMError
from rim_probe.probing import words
from rim_probe.probing.capture import capture
from rim_probe.probing.hooks import decoder_layers, num_layers
from rim_probe.probing.results import Report, headline
from rim_probe.probing.study import Study, observe
from rim_probe.probing.words import carried_answers, carried_states, carry
from rim_probe.problems import Problem

QUESTIONS = ["Anna has 3 apples.", "How many apples has she? 14 more", "3 + 14"]


def problem(number: int, steps: int = 2) -> Problem:
    chain = tuple(f"<<{number}+{i}={number + i}>>" for i in range(1, steps + 1))
    return Problem(f"Anna has {number} apples and buys more.", chain, str(number + steps))


def carried_words(*given, **more):
    return [answer.text for answer in carry(*given, **more)]


@pytest.mark.parametrize("ends", [False, True])
def test_own_states_in_the_run_on_their_own_question_change_nothing(make_rim, family, ends):
    rim = make_rim(family, num_blocks=3)
    held = capture(rim, QUESTIONS, attention=False)
    for blocks in (1, 3):
        plain = [answer.text for answer in answer_batch(rim, QUESTIONS, "memory", num_blocks=blocks, max_new_tokens=6)]
        for layers in ([1], range(num_layers(rim) + 1)):
            states = carried_states(held, blocks, layers, ends)
            assert carried_words(rim, QUESTIONS, states, max_new_tokens=6) == plain


def test_with_the_end_of_the_last_layer_the_first_word_is_the_donors(rim):
    donors = ["She buys 14 more. How many?", "9 8 7 6", "apples apples 5"]
    held = capture(rim, donors, attention=False)
    states = carried_states(held, 2, [num_layers(rim)], ends=True)
    first = [a.text for a in answer_batch(rim, donors, "memory", num_blocks=2, max_new_tokens=1)]
    own = [a.text for a in answer_batch(rim, QUESTIONS, "memory", num_blocks=2, max_new_tokens=1)]
    assert carried_words(rim, QUESTIONS, states, max_new_tokens=1) == first != own


def test_states_of_another_shape_are_refused_and_hooks_go_after_an_error(rim):
    held = capture(rim, QUESTIONS, attention=False)
    states = carried_states(held, 1, [1], ends=False)
    with pytest.raises(RiMError, match="do not fit"):
        carried_words(rim, QUESTIONS[:2], states)
    with pytest.raises(RiMError, match="do not fit"):
        carried_words(rim, QUESTIONS, {1: np.zeros((3, 1, 2, 5), np.float32)}, max_new_tokens=2)
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in decoder_layers(rim))


def test_explain_tells_every_block_with_and_without_a_stage_1_model(make_rim):
    rim = make_rim(num_blocks=2, context=48)
    observation = observe(rim, QUESTIONS[0])
    alone = words.explain(observation)
    assert [block["block"] for block in alone["blocks"]] == [1, 2]
    assert all(block["stage1"] is None and block["carried"] is None for block in alone["blocks"])
    both = words.explain(observation, *carried_answers(rim, observation, [(), [0, 1, 2]]))
    assert both == json.loads(json.dumps(both))
    for block in both["blocks"]:
        assert block["memory"] == block["stage1"] == block["carried"]


def test_one_row_per_variant_says_what_every_block_carried_by_itself_says(make_rim, family):
    rim, stage1 = make_rim(family, num_blocks=3), make_rim(family, num_blocks=3, seed=1)
    observation = observe(rim, QUESTIONS[0])
    held, variants = observation.capture, [(), (0,), (1,), (2,), (0, 1, 2)]
    together = carried_answers(stage1, observation, variants, max_new_tokens=6)
    assert len({answer.text for answer in together}) > 1  # something is carried
    plain = answer_batch(stage1, [QUESTIONS[0]], "memory", max_new_tokens=6)[0]
    assert [r.text for r in together[0].readouts] == [r.text for r in plain.readouts]
    for layers, answer in zip(variants[1:], together[1:], strict=True):
        alone = [
            carried_words(stage1, QUESTIONS[:1], carried_states(held, k, layers, ends=False), max_new_tokens=6)[0]
            for k in (1, 2, 3)
        ]
        assert [readout.text for readout in answer.readouts] == alone


@pytest.fixture(scope="module")
def report():
    """A memory model that is its own stage 1, on problems that no random model can solve."""
    from conftest import tiny_rim

    rim = tiny_rim(num_blocks=2, context=48)
    splits = {
        "fit": [problem(50)],
        "choose": [problem(n) for n in range(4)],
        "report": [problem(n, 3) for n in range(5, 9)],
    }
    with Study({"memory": rim, "stage1": rim}, splits, progress=False) as study:
        yield words.score(study)


def test_another_memory_is_carried_in_beside_the_question_asked(report):
    frame = report.frame()
    carried = frame[frame.of == "the memory's step"].groupby("metric")["at carried"].nunique()
    assert carried.tolist() == [4, 4]  # into another and into a neutral question: two states, one layer or all
    assert Report.from_dict(json.loads(json.dumps(report.to_dict()))).to_dict() == report.to_dict()


def test_own_memory_says_the_same_words_and_no_step_is_claimed_for_babble(report):
    frame = report.frame()
    assert (frame[(frame.metric == words.SAME) & frame.of.str.contains("own")].value == 1).all()
    assert (frame[frame.of.isin(["its step", "the memory's step"])].value == 0).all()
    assert "cannot be told" in report.verdict


def test_readouts_are_held_against_every_gold_step_and_another_problems(monkeypatch):
    monkeypatch.setattr(words, "FEWEST_PROBLEMS", 2)
    nothing = SimpleNamespace(report=lambda: Report("words", [], {}))
    monkeypatch.setattr(words, "_Patchscope", lambda study, role: nothing)
    problems = [problem(n, 2) for n in range(3)]
    said = [
        SimpleNamespace(readouts=[SimpleNamespace(text=p.steps[1]), SimpleNamespace(text=p.answer)]) for p in problems
    ]
    study = SimpleNamespace(
        models={"memory": None},
        K=2,
        problems=lambda split: problems,
        answers=lambda role, split: said,
        rng=lambda name: np.random.default_rng(0),
    )
    report = words.score(study)
    score, control = headline(report)
    assert (score.metric, score.estimate.value, control.estimate.value) == (words.STATES, 1, 0)
    cells = report.frame().dropna(subset="at gold step").set_index(["at readout", "at gold step"]).value
    assert dict(cells) == {(1, 1): 0, (1, 2): 1, (1, "answer"): 0, (2, 1): 0, (2, 2): 0, (2, "answer"): 1}


def test_problems_of_one_step_are_refused_in_a_sentence():
    study = SimpleNamespace(problems=lambda split: [problem(3, steps=1)])
    with pytest.raises(RiMError, match="two steps or more"):
        words.score(study)
