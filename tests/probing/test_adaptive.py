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
    CHAIN,
    HALF_TIME,
    JUDGED,
    MEMORY,
    OWN,
    RANDOM,
    RELATIVE,
    RULES,
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
from rim_probe.probing.results import Report

QUESTION = "Anna has 3 apples and buys 14 more."


def outcomes(scores, memory, cot, memory_seconds=1.0, cot_seconds=9.0):
    scores = np.asarray(scores, dtype=float)
    seconds = np.broadcast_to(np.asarray(cot_seconds, dtype=float), scores.shape)
    return Outcomes(scores, np.asarray(memory, bool), np.asarray(cot, bool), memory_seconds, seconds)


# ---------------------------------------------------------------------------------------------------------- thresholds


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
    slow = outcomes(scores, memory=scores >= 0.6, cot=np.ones(100), memory_seconds=8.0, cot_seconds=10.0)
    assert not slow.sent(choose_threshold(slow, HALF_TIME)).any()


# ------------------------------------------------------------------------------------------------------------- routing


def judge_of(rim, bias: float, view: str = "memory", readouts: str = "none") -> Judge:
    """A judge that always gives the same chance."""
    layers, width = tuple(range(num_layers(rim) + 1)), rim.model.config.hidden_size
    cells = (len(layers) - 1) * rim.layout.num_blocks if view == "memory" else 1
    extra, blocks = {"none": 0, "own": 1, "all": 2}[readouts], rim.layout.num_blocks
    weight = np.zeros((blocks, cells * 3 * width + extra), np.float32)
    return Judge(view, readouts, layers, weight, np.full(blocks, bias), 1.0)


def test_the_states_judged_are_those_of_the_pass_that_answered(every_rim):
    given, held = answer_observed(every_rim, QUESTION, judge_of(every_rim, 0.0), max_new_tokens=3)
    assert given.text == answer(every_rim, QUESTION, "memory", max_new_tokens=3).text and len(given.readouts) == 1
    alone = capture(every_rim, QUESTION, attention=False)
    assert held.layers == alone.layers[1:]
    for name in ("slots", "ends", "question"):
        torch.testing.assert_close(getattr(held, name), getattr(alone, name)[:, 1:], rtol=1e-3, atol=1e-4)


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
        AdaptivePolicy.fit(study, CorrectnessProbe.fit(study))


# -------------------------------------------------------------------------------------------------------------- report


def clock(study, judge, split, timed):
    """Clocks that always show the same: 1 s for memory, 1.1 s judged, a second per pass of chain of thought."""
    passes = np.array([given.forward_passes for given in study.answers("cot", split)[:20]], dtype=float)
    return adaptive._Clock({MEMORY: np.ones(20), JUDGED: np.full(20, 1.1), CHAIN: passes}, np.arange(20))


@pytest.fixture(autouse=True, scope="module")
def steady_clock():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adaptive, "_clock", clock)
        yield


def study_with_cot() -> JudgedStudy:
    found = JudgedStudy()
    found.models["cot"] = found.models["memory"]
    return found


@pytest.fixture(scope="module")
def study():
    return study_with_cot()


@pytest.fixture(scope="module")
def probe(study):
    return CorrectnessProbe.fit(study)


@pytest.fixture(scope="module")
def policy(study, probe):
    return AdaptivePolicy.fit(study, probe)


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_stands_beside_the_same_rule_by_own_probability_and_random_routing(study, policy, rule):
    report = policy.score(study)
    frame = report.frame()
    of = {metric: part.set_index("of") for metric, part in frame[frame["at rule"] == rule].groupby("metric")}
    # What the judge knows is planted: it beats chance at any rate of routing.
    assert of["right, judge minus it"].low[RANDOM] > 0
    for name in (OWN, RANDOM):
        apart = of["right"].value["judge"] - of["right"].value[name]
        assert of["right, judge minus it"].value[name] == pytest.approx(apart)
    sent = of["sent on to chain of thought"].value["judge"]
    assert 0 < sent < 1 and of[RELATIVE].goal["judge"] and rule in report.verdict
    assert Report.from_dict(json.loads(json.dumps(report.to_dict()))).to_dict() == report.to_dict()


def test_thresholds_come_from_the_choosing_split_alone(policy):
    other = study_with_cot()
    other._right["report"] = ~other._right["report"]
    assert AdaptivePolicy.fit(other, CorrectnessProbe.fit(other)).thresholds == policy.thresholds


def test_a_restored_policy_routes_alike(study, probe, policy):
    restored = AdaptivePolicy.restore(policy.tensors(), json.loads(json.dumps(policy.settings())), lambda: probe)
    observation = observed(study.capture("memory", "report"), answer=study.answers("memory", "report")[0])
    told = policy.explain(observation)
    assert restored.explain(observation) == told and [rule["rule"] for rule in told["rules"]] == list(RULES)
    assert all((rule["method"] == "cot") == (told["chance_right"] < rule["threshold"]) for rule in told["rules"])
    with pytest.raises(RiMError, match="fit it anew"):
        AdaptivePolicy.restore({}, policy.settings(), lambda: probe)
