"""Adaptive answering: thresholds by hand, routes that are really taken, states out of the very pass that answered."""

import json

import numpy as np
import pytest
import torch
from judged import JudgedStudy
from planted import observed

from rim_probe.decoding import answer
from rim_probe.errors import RiMError
from rim_probe.probing import adaptive
from rim_probe.probing.adaptive import (
    HALF_TIME,
    WITHIN_POINT,
    AdaptivePolicy,
    Outcomes,
    answer_adaptive,
    answer_observed,
    choose_threshold,
)
from rim_probe.probing.capture import capture
from rim_probe.probing.correctness import CorrectnessProbe
from rim_probe.probing.hooks import num_layers
from rim_probe.probing.judge import Judge
from rim_probe.probing.section import Estimate, Section

QUESTION = "Anna has 3 apples and buys 14 more."


def outcomes(scores, memory, cot, memory_seconds=1.0, cot_seconds=9.0):
    scores = np.asarray(scores, dtype=float)
    seconds = np.broadcast_to(np.asarray(cot_seconds, dtype=float), scores.shape)
    return Outcomes(scores, np.asarray(memory, bool), np.asarray(cot, bool), memory_seconds, seconds)


# ---------------------------------------------------------------------------------------------------------- thresholds


def test_answers_below_the_threshold_are_sent_on_and_paid_twice():
    some = outcomes([0.2, 0.5, 0.9], memory=[0, 0, 1], cot=[1, 1, 0])
    assert some.sent(0.5).tolist() == [True, False, False]
    assert some.right(0.5).tolist() == [True, False, True]
    assert some.seconds(0.5).tolist() == [10.0, 1.0, 1.0]


def test_within_a_point_sends_on_no_more_than_it_must():
    # The five least trusted are wrong by memory; chain of thought is right in all.
    scores = np.arange(100) / 100
    some = outcomes(scores, memory=scores >= 0.05, cot=np.ones(100))
    threshold = choose_threshold(some, WITHIN_POINT)
    assert some.sent(threshold).sum() == 4 and some.right(threshold).mean() == 0.99


def test_pure_memory_is_chosen_where_it_is_good_enough_and_pure_thought_where_nothing_else_is():
    good = outcomes(np.arange(10), memory=np.ones(10), cot=np.ones(10))
    assert not good.sent(choose_threshold(good, WITHIN_POINT)).any()
    bad = outcomes(np.arange(10), memory=np.zeros(10), cot=np.ones(10))
    assert bad.sent(choose_threshold(bad, WITHIN_POINT)).all()


def test_half_the_time_takes_the_best_accuracy_that_its_budget_allows():
    scores = np.arange(100) / 100
    some = outcomes(scores, memory=scores >= 0.6, cot=np.ones(100), memory_seconds=1.0, cot_seconds=10.0)
    threshold = choose_threshold(some, HALF_TIME)
    # 1 + 10 * share <= 4.5 leaves 35 %.
    assert some.sent(threshold).mean() == pytest.approx(0.35, abs=0.011)
    assert some.seconds(threshold).mean() <= 4.5
    slow = outcomes(scores, memory=scores >= 0.6, cot=np.ones(100), memory_seconds=8.0, cot_seconds=10.0)
    assert not slow.sent(choose_threshold(slow, HALF_TIME)).any()


def test_the_seconds_of_a_chain_follow_its_passes():
    assert adaptive._line(np.array([2, 4, 6]), np.array([1.0, 2.0, 3.0])) == pytest.approx((0.5, 0.0))
    assert adaptive._line(np.array([3, 3]), np.array([1.0, 2.0])) == (0.0, 1.5)


# ------------------------------------------------------------------------------------------------------------- routing


def judge_of(rim, bias: float, view: str = "memory", readouts: str = "none") -> Judge:
    """A judge that always gives the same chance."""
    layers, width = tuple(range(num_layers(rim) + 1)), rim.model.config.hidden_size
    cells = (len(layers) - 1) * rim.layout.num_blocks if view == "memory" else 1
    size = cells * 3 * width if view in ("memory", "both") else width
    extra = {"none": 0, "own": 1, "all": 2}[readouts]
    blocks = rim.layout.num_blocks
    return Judge(view, readouts, layers, np.zeros((blocks, size + extra), np.float32), np.full(blocks, bias), 1.0)


def test_the_states_judged_are_those_of_the_pass_that_answered(every_rim):
    given, held = answer_observed(every_rim, QUESTION, judge_of(every_rim, 0.0), max_new_tokens=3)
    assert given.text == answer(every_rim, QUESTION, "memory", max_new_tokens=3).text and len(given.readouts) == 1
    alone = capture(every_rim, QUESTION, attention=False)
    assert held.layers == alone.layers[1:]
    for name in ("slots", "ends", "question", "answer"):
        torch.testing.assert_close(getattr(held, name), getattr(alone, name)[:, 1:], rtol=1e-3, atol=1e-4)


def test_only_the_layers_a_judge_reads_are_kept(rim):
    _, held = answer_observed(rim, QUESTION, judge_of(rim, 0.0, "both", "all"), max_new_tokens=3)
    assert held.layers == (1,)


def test_a_trusted_answer_stands_and_a_doubted_one_is_thought_over(rim, make_rim):
    models = {"memory": rim, "cot": make_rim(seed=1)}
    sure = answer_adaptive(models, QUESTION, judge_of(rim, 2.0), 0.5, max_new_tokens=8)
    assert sure.answer is sure.memory and sure.answer.method == "memory" and sure.chance > 0.8
    doubted = answer_adaptive(models, QUESTION, judge_of(rim, -2.0), 0.5, max_new_tokens=8)
    assert doubted.answer.method == "cot" and doubted.memory.method == "memory" and doubted.chance < 0.2
    assert doubted.seconds >= doubted.answer.total_seconds + doubted.memory.total_seconds


def test_without_a_chain_of_thought_model_it_says_so(rim):
    with pytest.raises(RiMError, match="chain-of-thought model"):
        answer_adaptive({"memory": rim}, QUESTION, judge_of(rim, 0.0), 0.5)
    study = JudgedStudy()
    with pytest.raises(RiMError, match="chain-of-thought model"):
        AdaptivePolicy.fit(study)


# -------------------------------------------------------------------------------------------------------------- report


@pytest.fixture(scope="module")
def study():
    found = JudgedStudy()
    found.models["cot"] = found.models["memory"]
    return found


@pytest.fixture(scope="module")
def policy(study):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adaptive, "_clock", clock)
        return AdaptivePolicy.fit(study, CorrectnessProbe.fit(study), timed=20)


def clock(study, judge, split, timed, *thresholds):
    """Clocks that always show the same: 1 s for memory, 1.1 s judged, a second per pass of chain of thought."""
    cot = study.answers("cot", split)[:timed]
    passes = np.array([given.forward_passes for given in cot], dtype=float)
    adaptively = {f"adaptive {i}": 1.1 + passes / 5 for i in range(1, len(thresholds))}
    seconds = {"memory": np.ones(timed), "memory, judged": np.full(timed, 1.1), "chain of thought": passes}
    return adaptive._Clock(seconds | adaptively, cot, list(range(timed)))


def test_the_report_compares_with_both_methods_and_every_control(study, policy, monkeypatch):
    monkeypatch.setattr(adaptive, "_clock", clock)
    section = policy.score(study, timed=20)
    names = [row[0] for row in section.tables[0].rows]
    assert names[:3] == ["memory", "memory, judged (nothing sent on)", "chain of thought"]
    assert sum(name.startswith("control: own probability") for name in names) == 2
    assert sum(name.startswith("control: random routing") for name in names) == 2
    by = {row[0]: row[1:] for row in section.tables[0].rows}
    # What the judge knows is planted: at any rate of routing it beats chance.
    for rule in (WITHIN_POINT, HALF_TIME):
        assert by[f"adaptive, {rule}"][0].value >= by[f"control: random routing at {rule}'s rate"][0].value
    assert len(section.targets) == 4
    assert section.summary.count("By the readout's own probability the same rule") == 2
    duel = {row[0]: row[3] for row in section.tables[1].rows}
    for rule in (WITHIN_POINT, HALF_TIME):
        difference = by[f"adaptive, {rule}"][0].value - by[f"control: own probability, {rule}"][0].value
        assert duel[rule].value == pytest.approx(difference)
    assert Section.from_dict(json.loads(json.dumps(section.to_dict()))).to_dict() == section.to_dict()


def test_the_summary_says_what_is_missed_by_how_much_and_what_is_pure_memory():
    some = outcomes([0.2, 0.5, 0.9], memory=[0, 1, 1], cot=[1, 1, 1])
    low, half = Estimate(-0.04, -0.05, -0.03, 3), Estimate(0.62, 0.6, 0.64, 3)
    even = Estimate(0.0, -0.1, 0.1, 3)
    said = adaptive._rule_summary(WITHIN_POINT, {"judge": some, "own": some}, 0.0, 0.0, low, half, even, half)
    assert "sends nothing on (it is pure memory)" in said and "no difference is shown" in said
    assert "misses its accuracy goal by 3.00 points and its latency goal by 0.12 of" in said
    near = Estimate(-0.010013, -0.03, 0.01, 3)
    said = adaptive._rule_summary(HALF_TIME, {"judge": some, "own": some}, 0.3, 0.0, near, even, even, half)
    assert "sends 33% on" in said and "accuracy goal by less than 0.01 points" in said


def test_thresholds_come_from_the_choosing_split_alone(study, policy, monkeypatch):
    monkeypatch.setattr(adaptive, "_clock", clock)
    other = JudgedStudy()
    other.models["cot"] = other.models["memory"]
    other._right["report"] = ~other._right["report"]
    again = AdaptivePolicy.fit(other, CorrectnessProbe.fit(other), timed=20)
    assert again.thresholds == policy.thresholds


def test_a_restored_policy_routes_alike(study, policy):
    restored = AdaptivePolicy.restore(policy.tensors(), json.loads(json.dumps(policy.settings())))
    observation = observed(study.capture("memory", "report"), answer=study.answers("memory", "report")[0])
    told = policy.explain(observation)
    assert restored.explain(observation) == told and {rule["rule"] for rule in told["rules"]} == {
        WITHIN_POINT,
        HALF_TIME,
    }
    assert all((rule["method"] == "cot") == (told["chance_right"] < rule["threshold"]) for rule in told["rules"])
    with pytest.raises(RiMError, match="fit it anew"):
        AdaptivePolicy.restore({}, policy.settings())


def test_the_real_clock_times_every_method_on_the_same_problems(make_rim, monkeypatch):
    monkeypatch.setattr(adaptive, "WARM_UP_QUESTIONS", 0)
    study = JudgedStudy()
    rim = make_rim(context=48)  # a random model babbles until the context is full
    study.models = {"memory": rim, "cot": make_rim(seed=1, context=48)}
    study.K = rim.layout.num_blocks
    found = adaptive._clock(study, judge_of(rim, 0.0), "report", 2, -np.inf, np.inf)
    assert set(found.seconds) == {"memory", "memory, judged", "chain of thought", "adaptive 1"}
    assert all((seconds > 0).all() and len(seconds) == 2 for seconds in found.seconds.values())
    assert (found.seconds["adaptive 1"] > 0).all() and len(found.cot) == len(found.problems) == 2
