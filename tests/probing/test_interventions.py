"""Interventions and patching: nothing changes where nothing should, everything is what whole passes give."""

import numpy as np
import pytest
import torch

from rim_probe.decoding import answer
from rim_probe.errors import RiMError
from rim_probe.probing.capture import capture
from rim_probe.probing.hooks import decoder_layers, edit_residual, num_layers
from rim_probe.probing.importance import explain
from rim_probe.probing.interventions import Donors, Pool, Variant, intervene, intervene_many
from rim_probe.probing.patching import Edit, Patcher
from rim_probe.probing.sweep import patching_naive, patching_sweep

QUESTION, OTHER = "Anna has 3 apples and buys 14 more.", "How many apples has Tom if he buys 9?"
MANY = [QUESTION, OTHER, "0 1 2 3", "Anna buys 5 5 5 apples."]
EVERY = ["begin", 1, 2, "end"]


def hooks_left(rim) -> int:
    return sum(len(layer._forward_hooks) + len(layer._forward_pre_hooks) for layer in decoder_layers(rim))


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "gpt_neox", "opt"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_sweep_equals_one_whole_pass_per_cell(make_rim, family, attention):
    rim = make_rim(family, attention)
    targets = ["17", "3 apples", "9"]
    for source, slots in ((OTHER, None), (None, EVERY)):
        options = {"layers": range(num_layers(rim) + 1), "slots": slots}
        swept = patching_sweep(rim, QUESTION, source, targets, **options, max_rows=5)
        naive = patching_naive(rim, QUESTION, source, targets, **options)
        assert swept.log_probability.shape == (num_layers(rim) + 1, 4, 3)
        np.testing.assert_allclose(swept.log_probability, naive.log_probability, atol=1e-4)
        assert (swept.says == naive.says).all()
        assert np.ptp(swept.log_probability) > 0.1  # the patch does something


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "gpt_neox", "opt"])
def test_original_values_change_nothing_bit_by_bit(make_rim, family):
    rim = make_rim(family)
    variants = [Variant([k], None, EVERY, "swap", QUESTION) for k in (1, 3, 4)]
    variants += [
        Variant([1, 4], [0, 1], None, "swap", QUESTION),
        Variant([2], ["blocks.0.hook_resid_post"], ["end"], "zero"),
    ]
    found = intervene_many(rim, QUESTION, variants, gold="17", max_new_tokens=8)
    for same in found[:-1]:
        assert same.before == same.after
        assert same.before_answer_change == same.gold_change == 0
    assert found[-1].gold_change != 0


def test_recorded_states_put_back_change_nothing_but_the_last_bits(rim):
    clean = Patcher(rim, QUESTION, [rim.encoder.answer_ids("17")])
    columns = torch.arange(clean.K * clean.block_length)
    back = [Edit(layer, columns, clean.memory[layer].flatten(0, 1)) for layer in range(num_layers(rim) + 1)]
    scores = clean.score([back])
    torch.testing.assert_close(scores.log_probability, scores.clean, atol=1e-4, rtol=0)


def test_states_are_those_of_a_capture(every_rim):
    held = capture(every_rim, QUESTION, attention=False)
    memory = Patcher(every_rim, QUESTION).memory
    torch.testing.assert_close(memory[:, :, 1:-1], held.slots[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(memory[:, :, -1], held.ends[0], atol=1e-4, rtol=1e-4)


def test_answers_before_are_those_of_decoding_and_a_whole_swap_gives_the_others(every_rim):
    blocks = range(1, 5)
    told = answer(every_rim, QUESTION, "memory", max_new_tokens=6).readouts[-1]
    # Same length of question, so that even the positions agree; the last end token carries the whole answer over.
    other = QUESTION.replace("3", "9")
    found = intervene(every_rim, QUESTION, blocks, None, EVERY, "swap", other, max_new_tokens=6)
    assert (found.before.text, found.before.token_ids) == (told.text, told.token_ids)
    assert np.isclose(np.exp(found.before.log_probability), told.probability, rtol=1e-3)
    swapped = answer(every_rim, other, "memory", max_new_tokens=6)
    assert found.after.token_ids[0] == swapped.token_ids[0]


def test_decoding_under_a_patch_equals_decoding_step_by_step(every_rim):
    rim, length = every_rim, 6
    clean = Patcher(rim, QUESTION)
    variant = Variant([2, 3], [1, 2], [1, "end"], "swap", OTHER)
    edits = Donors(clean).edits(variant, np.random.default_rng(0))
    [(_, decoded)] = clean.decode([edits], length)
    prompt = rim.prompt_ids(QUESTION, "memory")
    first = len(prompt) - 4 * 4

    def patch(edit):
        def function(states):
            states[:, first + edit.columns] = edit.values
            return states

        return function

    ids = list(prompt)
    with torch.inference_mode(), edit_residual(rim, {edit.layer: patch(edit) for edit in edits}):
        for _ in range(length):
            logits = rim.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
            logits[rim.banned_ids] = -torch.inf
            ids.append(int(logits.argmax()))
            if ids[-1] == rim.eos_id:
                break
    assert list(decoded.token_ids) == ids[len(prompt) :]


def test_scores_say_what_greedy_decoding_gives_at_every_readout(rim):
    told = answer(rim, QUESTION, "memory", max_new_tokens=5)
    for k, readout in enumerate(told.readouts):
        clean = Patcher(rim, QUESTION, [list(readout.token_ids), rim.encoder.answer_ids("17")], readouts=[1, 2, 3, 4])
        assert clean.says[k].tolist() == [True, False]
        assert np.isclose(clean.log_probability[k, 0].exp(), readout.probability, rtol=1e-3)


def test_a_patch_cannot_reach_earlier_readouts(rim):
    clean = Patcher(rim, QUESTION, [rim.encoder.answer_ids("17")], readouts=[1, 2, 3, 4])
    edits = Donors(clean).edits(Variant([3], [1], EVERY, "swap", OTHER), np.random.default_rng(0))
    scores = clean.score([edits])
    changed = (scores.log_probability != scores.clean)[0, :, 0].tolist()
    assert changed == [False, False, True, True]


def test_modes_write_what_they_say(rim):
    clean = Patcher(rim, QUESTION)
    donors, rng = Donors(clean), np.random.default_rng(0)
    pool = Pool.of(MANY, rim)

    def values(mode, source=None, slots=None):
        edits = donors.edits(Variant([2], [1], slots, mode, source), rng)
        return edits[0].values

    assert not values("zero").any()
    torch.testing.assert_close(values("mean", pool), pool.states[:, 1, 1, 1:3].mean(0))
    torch.testing.assert_close(values("swap", OTHER), pool.states[1, 1, 1, 1:3], atol=1e-4, rtol=1e-4)
    drawn = values("resample", pool)
    assert any(torch.equal(drawn, pool.states[i, 1, 1, 1:3]) for i in (1, 2, 3))
    assert not torch.equal(drawn, pool.states[0, 1, 1, 1:3])  # never the question itself
    held = capture(rim, MANY, attention=False)
    torch.testing.assert_close(values("mean", held), values("mean", pool), atol=1e-4, rtol=1e-4)
    big = torch.stack([values("noise", None)[0] for _ in range(200)])
    assert np.isclose(big.std(), clean.memory[1, 1, 1].std(), rtol=0.1)
    assert donors.edits(Variant([2], [1], None, "noise", pool), rng)[0].add


def test_draws_are_the_same_for_the_same_seed(rim):
    variants = [Variant([1, 2], None, None, mode, MANY) for mode in ("resample", "noise")]
    first, again = (intervene_many(rim, QUESTION, variants, gold="17", seed=3, max_new_tokens=4) for _ in range(2))
    other = intervene_many(rim, QUESTION, variants, gold="17", seed=4, max_new_tokens=4)
    assert [x.gold_change for x in first] == [x.gold_change for x in again]
    assert first[1].gold_change != other[1].gold_change
    assert [x.noise for x in first] == [None, "pool"]


def test_hooks_are_gone_after_an_exception_too(rim, monkeypatch):
    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    clean = Patcher(rim, QUESTION, [rim.encoder.answer_ids("17")])
    edits = Donors(clean).edits(Variant([1]), np.random.default_rng(0))
    monkeypatch.setattr(rim.model.lm_head, "forward", fail)
    for broken in (lambda: clean.score([edits]), lambda: clean.decode([edits]), lambda: Patcher(rim, QUESTION)):
        with pytest.raises(KeyboardInterrupt):
            broken()
        assert hooks_left(rim) == 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"blocks": []}, {"blocks": [0]}, {"blocks": [5]}, {"blocks": "12"}, {"blocks": 3}, {"blocks": [True]},
        {"layers": [3]}, {"layers": []}, {"layers": ["blocks.2.hook_resid_post"]}, {"layers": 1},
        {"slots": [3]}, {"slots": ["middle"]}, {"slots": []}, {"mode": "erase"}, {"mode": "swap"},
        {"mode": "swap", "source": ["x"]}, {"mode": "mean"}, {"mode": "resample"}, {"mode": "mean", "source": "text"},
        {"mode": "mean", "source": ["1 2"]}, {"mode": "resample", "source": [QUESTION, QUESTION]},
        {"mode": "zero", "source": OTHER}, {"num_blocks": 0}, {"num_blocks": 99}, {"max_new_tokens": 0},
        {"mode": "swap", "source": " "},
    ],
)  # fmt: skip
def test_bad_arguments_are_told_in_one_sentence(rim, wrong):
    with pytest.raises(RiMError) as error:
        intervene(rim, QUESTION, **({"blocks": [1]} | wrong))
    assert str(error.value).endswith(".") and "\n" not in str(error.value)


def test_captures_that_do_not_fit_are_refused(rim):
    for held in (capture(rim, MANY, [0, 1], False), capture(rim, MANY, attention=False, num_blocks=2)):
        with pytest.raises(RiMError):
            intervene(rim, QUESTION, [1], mode="mean", source=held)
    with pytest.raises(RiMError, match="begin"):
        intervene(rim, QUESTION, [1], None, ["begin"], "mean", capture(rim, MANY, attention=False))
    with pytest.raises(RiMError):
        patching_sweep(rim, QUESTION, None, [])


def test_any_number_of_blocks_and_bfloat16(make_rim):
    rim = make_rim()
    found = intervene(rim, QUESTION, [6], mode="zero", num_blocks=6, gold="17", max_new_tokens=3)
    assert found.gold_change != 0
    rim.model.to(torch.bfloat16)
    half = intervene(rim, QUESTION, [6], mode="zero", num_blocks=6, gold="17", max_new_tokens=3)
    assert np.isclose(half.gold_log_probability, found.gold_log_probability, rtol=0.2)
    same = intervene(rim, QUESTION, [6], mode="swap", source=QUESTION, num_blocks=6, gold="17", max_new_tokens=3)
    assert same.gold_change == 0


def test_adapters_are_patched_too(make_rim):
    from peft import LoraConfig, get_peft_model

    rim = make_rim()
    rim.model = get_peft_model(rim.model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()
    swept = patching_sweep(rim, QUESTION, OTHER, ["17"], blocks=[1, 3])
    naive = patching_naive(rim, QUESTION, OTHER, ["17"], blocks=[1, 3])
    np.testing.assert_allclose(swept.log_probability, naive.log_probability, atol=1e-4)


def test_one_question_explained(rim):
    told = explain(rim, QUESTION, gold="17")
    assert np.shape(told["change"]) == (len(told["layers"]), len(told["blocks"])) == (2, 4)
    assert told["layers"] == [0, 1] and told["answer"] == "17"
