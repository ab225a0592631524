"""Interventions and patching: nothing changes where nothing should, everything is what whole passes give."""

import numpy as np
import pytest
import torch

from rim_probe.decoding import answer
from rim_probe.errors import RiMError
from rim_probe.probing.hooks import decoder_layers, edit_residual, num_layers
from rim_probe.probing.interventions import Donors, Pool, Variant, intervene, intervene_many
from rim_probe.probing.patching import CUTS, Edit, Patcher

QUESTION, OTHER = "Anna has 3 apples and buys 14 more.", "How many apples has Tom if he buys 9?"
MANY = [QUESTION, OTHER, "0 1 2 3", "Anna buys 5 5 5 apples."]
EVERY = ["begin", 1, 2, "end"]


def hooks_left(rim) -> int:
    return sum(len(layer._forward_hooks) + len(layer._forward_pre_hooks) for layer in decoder_layers(rim))


def one_pass(rim, clean: Patcher, target: list[int], edit: Edit) -> tuple[float, bool]:
    """Log probability of a target and whether it is said, by one whole pass."""
    prompt = rim.prompt_ids(clean.question, "memory", clean.K)
    first = len(prompt) - clean.K * clean.block_length

    def patch(states):
        states[:, first + edit.columns] = edit.values
        return states

    with torch.no_grad(), edit_residual(rim, {edit.layer: patch}):
        logits = rim.model(input_ids=torch.tensor([prompt + target[:-1]]), use_cache=False).logits[0, -len(target) :]
    logits[:, rim.banned_ids] = -torch.inf
    wanted = torch.tensor(target)
    return float(logits.log_softmax(-1).gather(-1, wanted[:, None]).sum()), bool((logits.argmax(-1) == wanted).all())


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "gpt_neox", "opt"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_sweep_equals_one_whole_pass_per_cell(make_rim, family, attention):
    rim = make_rim(family, attention)
    clean = Patcher(rim, QUESTION, [rim.encoder.answer_ids(target) for target in ("17", "3 apples", "9")])
    donors, rng = Donors(clean), np.random.default_rng(0)
    cells = [(layer, block) for layer in range(num_layers(rim) + 1) for block in range(1, 5)]
    for mode, source, slots in (("swap", OTHER, None), ("zero", None, EVERY)):
        edits = [donors.edits(Variant([block], [layer], slots, mode, source), rng) for layer, block in cells]
        swept = clean.score(edits)
        found = [[one_pass(rim, clean, target, edit) for target in clean.targets] for [edit] in edits]
        np.testing.assert_allclose(swept.log_probability, [[log for log, _ in cell] for cell in found], atol=1e-4)
        assert swept.says.tolist() == [[says for _, says in cell] for cell in found]
        assert np.ptp(swept.log_probability) > 0.1  # the patch does something


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "gpt_neox", "opt"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("cut", [*((name,) for name in CUTS), ("question", "memory")])
def test_a_cut_route_equals_a_plain_pass_without_these_pairs(make_rim, family, attention, cut):
    """Independent of `packing` and `patching`: the mask is written token by token, the swap is a plain hook."""
    rim = make_rim(family, attention)
    target, swapped = rim.encoder.answer_ids("17"), [2, 3]
    prompt, donor = rim.prompt_ids(QUESTION, "memory"), Patcher(rim, OTHER).memory
    ids, first = prompt + target[:-1], len(prompt) - 16
    kinds = ["first", *["question"] * (first - 1), *["begin", "slot", "slot", "end"] * 4][:-1] + ["answer"] * len(
        target
    )
    memory = ("begin", "slot", "end")

    def seen(i, j):
        query, key = kinds[i], kinds[j]
        return not (
            j > i
            or ("question" in cut and query == "answer" and key == "question")
            or ("memory" in cut and query == "answer" and key in memory)
            or ("slots" in cut and query != "slot" and key == "slot")
            or ("ends" in cut and i != j and key == "end")
        )

    shown = torch.tensor([[seen(i, j) for j in range(len(ids))] for i in range(len(ids))])
    mask = torch.zeros(shown.shape).masked_fill(~shown, torch.finfo(torch.float32).min)[None, None]

    def passed(swap: bool) -> float:
        hooks = []
        for layer, module in enumerate(decoder_layers(rim), start=1):

            def hook(module, args, output, layer=layer):
                states = output[0] if isinstance(output, tuple) else output
                for block in swapped:
                    begin = first + 4 * (block - 1)
                    states[0, begin + 1 : begin + 3] = donor[layer, block - 1, 1:3]

            hooks.append(module.register_forward_hook(hook) if swap else None)
        with torch.no_grad():
            places = {"position_ids": torch.arange(len(ids))[None], "attention_mask": mask}
            logits = rim.model(input_ids=torch.tensor([ids]), use_cache=False, **places).logits[0]
        [hook.remove() for hook in hooks if hook]
        logits[:, rim.banned_ids] = -torch.inf
        return float(logits[-len(target) :].log_softmax(-1).gather(-1, torch.tensor(target)[:, None]).sum())

    clean = Patcher(rim, QUESTION, [rim.encoder.answer_ids("3 apples"), target], cut=cut)
    scores = clean.score([clean.edits(donor, swapped)])
    assert np.isclose(clean.log_probability[1], passed(False), atol=1e-4)
    assert np.isclose(scores.log_probability[0, 1], passed(True), atol=1e-4)
    moved = abs(scores.log_probability[0, 1] - scores.clean[0, 1])
    assert moved < 1e-5 if {"memory", "slots"} & set(cut) else moved > 2e-5
    assert abs(clean.log_probability[1] - Patcher(rim, QUESTION, [target]).log_probability[0]) > 2e-5


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


def test_answers_before_are_those_of_decoding_and_a_whole_swap_gives_the_others(every_rim):
    blocks = range(1, 5)
    told = answer(every_rim, QUESTION, "memory", max_new_tokens=6).readouts[-1]
    # Same length of question, so that even the positions agree; the last end token carries the whole answer over.
    other = QUESTION.replace("3", "9")
    found = intervene(every_rim, QUESTION, blocks, None, EVERY, "swap", other, max_new_tokens=6)
    assert (found.before.text, found.before.token_ids) == (told.text, told.token_ids)
    assert np.isclose(found.before.probability, told.probability, rtol=1e-3)
    swapped = answer(every_rim, other, "memory", max_new_tokens=6)
    assert found.after.token_ids[0] == swapped.token_ids[0]


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
    big = torch.stack([values("noise", None)[0] for _ in range(200)])
    assert np.isclose(big.std(), clean.memory[1, 1, 1].std(), rtol=0.1)
    assert donors.edits(Variant([2], [1], None, "noise", pool), rng)[0].add


def test_hooks_are_gone_after_an_exception_too(rim, monkeypatch):
    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    clean = Patcher(rim, QUESTION, [rim.encoder.answer_ids("17")])
    edits = Donors(clean).edits(Variant([1]), np.random.default_rng(0))
    monkeypatch.setattr(rim.model.lm_head, "forward", fail)
    for broken in (lambda: clean.score([edits]), lambda: clean.answers([edits]), lambda: Patcher(rim, QUESTION)):
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


def test_any_number_of_blocks_and_bfloat16(make_rim):
    rim = make_rim()
    found = intervene(rim, QUESTION, [6], mode="zero", num_blocks=6, gold="17", max_new_tokens=3)
    assert found.gold_change != 0
    rim.model.to(torch.bfloat16)
    half = intervene(rim, QUESTION, [6], mode="zero", num_blocks=6, gold="17", max_new_tokens=3)
    assert np.isclose(half.gold_log_probability, found.gold_log_probability, rtol=0.2)
    same = intervene(rim, QUESTION, [6], mode="swap", source=QUESTION, num_blocks=6, gold="17", max_new_tokens=3)
    assert same.gold_change == 0
