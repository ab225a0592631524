"""Attention to memory and knockout: shares add up, a silent head is silent, one that does nothing is not missed."""

import json

import numpy as np
import pytest
import torch
from judged import JudgedStudy

from rim_probe.decoding import answer_batch
from rim_probe.probing import attention
from rim_probe.probing.attention import attention_shares, explain
from rim_probe.probing.heads import GoldScorer, num_heads, output_projection, silence
from rim_probe.probing.hooks import num_layers
from rim_probe.probing.results import Report, headline
from rim_probe.probing.study import observe
from rim_probe.problems import Problem

QUESTIONS = ["Anna has 3 apples.", "Ben buys 14 more apples than Anna has, which is 12 and 1."]


def problems(rim) -> list[Problem]:
    """Problems of which some are answered right: their gold answers are what the model says."""
    questions = [f"Anna has {i} apples and buys {i + 3} more." for i in range(6)]
    said = answer_batch(rim, questions, "memory", max_new_tokens=3)
    golds = [given.text.strip() if i % 2 else "7" for i, given in enumerate(said)]
    return [Problem(question, (), gold or "7") for question, gold in zip(questions, golds, strict=True)]


# -------------------------------------------------------------------------------------------------------------- shares


def test_shares_of_attention_sum_to_one_and_blocks_see_only_what_stands_before(every_rim):
    shares = attention_shares(every_rim, QUESTIONS)
    blocks = every_rim.layout.num_blocks
    assert (
        shares.slots.shape == shares.ends.shape == (2, num_layers(every_rim), num_heads(every_rim), blocks, 2 + blocks)
    )
    for mass in (shares.slots, shares.ends, shares.even):
        np.testing.assert_allclose(mass.sum(axis=-1), 1, atol=1e-5)
    for block in range(blocks):
        assert not shares.slots[:, :, :, block, 3 + block :].any()


def test_one_question_is_told_in_rounded_rows_that_add_up(rim):
    told = explain(observe(rim, QUESTIONS[0]))
    blocks, width = rim.layout.num_blocks, len(told["tokens"])
    per_head = np.array(told["slots_to_tokens"]["per head"])
    assert per_head.shape == (told["layers"], told["heads"], blocks, width) and len(told["numbers"]) == width
    np.testing.assert_allclose(per_head.mean(axis=1), told["slots_to_tokens"]["mean over heads"], atol=2e-3)
    answer_mass = np.array(told["answer_to_blocks"]).sum(-1) + np.array(told["answer_to_tokens"]).sum(-1)
    np.testing.assert_allclose(answer_mass, 1, atol=1e-2)
    to_blocks, to_slots = (np.array(told[name]["mean over heads"]) for name in ("slots_to_blocks", "slots_to_slots"))
    assert to_slots.shape == to_blocks.shape == (told["layers"], blocks, blocks)
    assert (to_slots <= to_blocks + 1e-3).all() and to_slots.max() > 0
    assert json.dumps(told)


# ------------------------------------------------------------------------------------------------------------ knockout


def test_gold_scores_are_those_of_the_decoder(every_rim):
    """A gold answer is `said` where greedy decoding says it, with the probability that the decoder gave it."""
    asked = problems(every_rim)
    found = GoldScorer(every_rim, asked).scores()
    given = answer_batch(every_rim, [problem.question for problem in asked], "memory", max_new_tokens=8)
    for place, (problem, one) in enumerate(zip(asked, given, strict=True)):
        target = tuple(every_rim.encoder.answer_ids(problem.answer))
        assert found.says[place] == (one.token_ids == target)
        if found.says[place]:
            assert np.exp(found.log_probability[place]) == pytest.approx(one.readouts[-1].probability, rel=1e-3)


def test_a_head_whose_projection_is_zero_is_not_missed(every_rim):
    asked = problems(every_rim)
    projection, heads = output_projection(every_rim, 1), num_heads(every_rim)
    with torch.no_grad():
        # GPT-2 keeps its matrices the other way round.
        rows = projection.weight.T if type(projection).__name__ == "Conv1D" else projection.weight
        size = rows.shape[1] // heads
        rows[:, size : 2 * size] = 0  # head 2
    scorer = GoldScorer(every_rim, asked)
    clean = scorer.scores()
    for role in ("reader", "writer"):
        np.testing.assert_array_equal(scorer.scores([(1, 2)], role).log_probability, clean.log_probability)
        assert np.abs(scorer.scores([(1, 1)], role).log_probability - clean.log_probability).max() > 1e-4


def test_silence_changes_chosen_rows_and_heads_alone(family, make_rim):
    rim = make_rim(family)
    ids = torch.tensor([rim.prompt_ids(QUESTIONS[0], "memory")])
    rows = torch.zeros(ids.shape, dtype=torch.bool)
    rows[0, 4] = True
    seen = []
    hook = output_projection(rim, 2).register_forward_hook(lambda module, args, output: seen.append(args[0].clone()))
    with torch.no_grad():
        rim.model(ids)
        with silence(rim, [(2, 3)], rows):
            # Hooks run in the order of their making: the one above now sees what the silenced head left.
            rim.model(ids)
        rim.model(ids)
    hook.remove()
    before, silent, after = (states.unflatten(-1, (num_heads(rim), -1)) for states in seen)
    assert not silent[0, 4, 2].any() and before[0, 4, 2].any()
    silent[0, 4, 2] = before[0, 4, 2]
    assert torch.equal(silent, before) and torch.equal(after, before)


@pytest.mark.parametrize("name", ["mistral", "gpt_neox", "opt"])
def test_every_family_has_a_projection(make_rim, name):
    rim = make_rim(name)
    clean, without = (GoldScorer(rim, problems(rim)[:2]).scores(heads) for heads in ([], [(1, 1)]))
    assert np.abs(clean.log_probability - without.log_probability).max() > 1e-5


# ------------------------------------------------------------------------------------------------------------- results


@pytest.fixture(scope="module")
def report():
    from conftest import tiny_rim

    rim = tiny_rim()
    study = JudgedStudy()
    study.models, study.K = {"memory": rim, "base": tiny_rim(seed=1)}, rim.layout.num_blocks
    study.splits = {"choose": problems(rim), "report": problems(rim)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "RANDOM_SETS", 2)
        patch.setattr(attention, "DRAWS", 20)
        return attention.score(study, problems=5)


def test_cuts_and_knockouts_stand_beside_their_controls(report):
    score, control = headline(report)
    assert (score.of, control.of) == ("memory cut", "the question cut") and report.n == {"choose": 5, "report": 5}
    frame = report.frame()
    together = frame[(frame.metric == attention.FALL) & frame["at heads silenced"].notna()]
    assert sorted(together["at heads silenced"]) == [1, 1, 1, 1, 2, 2, 2, 2, 4, 4, 4, 4]  # of 8 heads
    assert (together.role == "control").sum() == 6
    rho = frame[frame.metric.str.startswith("Spearman")]
    assert len(rho) == 2 and rho.value.between(-1, 1).all()
    alone = frame[(frame.metric == attention.FALL) & frame["at head"].notna()]
    assert len(alone) == 2 * 8 and all(len(xs) == 8 for c in report.clouds.values() for xs, _ in c.groups.values())


def test_shares_are_told_of_trained_and_untrained_memory(report):
    frame = report.frame()
    answer = frame[frame.metric == attention.SHARE]
    assert dict(answer.groupby("of").value.sum().round(5)) == {"trained": 1, "untrained": 1, "even attention": 1}
    by_layer = frame[frame.metric.str.contains("mean over heads") & (frame.of == "trained")]
    assert by_layer.groupby("at layer").value.sum().tolist() == pytest.approx([1, 1])
    assert Report.from_dict(json.loads(json.dumps(report.to_dict()))).to_dict() == report.to_dict()
