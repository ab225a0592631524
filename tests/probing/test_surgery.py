"""Surgery by hand: on the glass box what must follow, on random models what whole passes give."""

import math

import pytest
import torch

from rim_probe.decoding import answer
from rim_probe.errors import RiMError
from rim_probe.glassbox import draw_problems, glassbox, parts, swapped_answer
from rim_probe.glassbox.box import END_LAYER, HELD_LAYER, LAYERS
from rim_probe.probing.hooks import edit_residual
from rim_probe.probing.patching import Patcher
from rim_probe.probing.surgery import operate

QUESTION, OTHER, THIRD = "Anna has 3 apples and buys 14 more.", "How many apples has Tom if he buys 9?", "5 5 5 5"


@pytest.fixture(scope="module")
def box():
    return glassbox().rim


def two_problems(seed: int = 0):
    """Two problems whose results differ at every step, also after any swap."""
    drawn = draw_problems(seed, 40, "report")
    return next(
        (problem, partner)
        for problem in drawn
        for partner in drawn
        if all(parts(a)[3] != parts(b)[3] for a, b in zip(problem.steps, partner.steps, strict=True))
    )


def said(told) -> list[str]:
    return [readout["value"] for readout in told["readouts"]]


def results(problem) -> list[str]:
    return [str(parts(step)[3]) for step in problem.steps]


# -------------------------------------------------------------------------------------------------------- the glass box


def test_a_swapped_block_changes_its_own_readout_and_what_follows_from_it(box):
    problem, partner = two_problems()
    for block in (1, 2, 3):
        found = operate(box, problem.question, {block: "swap"}, partner=partner.question, gold=problem.answer)
        assert found["after"]["value"] == swapped_answer(problem, partner, block)
        assert said(found["before"]) == results(problem) and found["before"]["right"] is True
        assert said(found["after"])[: block - 1] == results(problem)[: block - 1]
        assert said(found["after"])[block - 1] == results(partner)[block - 1]
        assert found["changed_blocks"] == list(range(block, 4))
        assert found["answer_changed"] and found["gold_probability"]["after"] < found["gold_probability"]["before"]


def test_every_layer_does_what_is_written_down(box):
    """A block is read by the next one at one layer and by its end at another; a swap in between does what it must."""
    problem, partner = two_problems(1)
    for block in (1, 2, 3):
        for layer in range(LAYERS + 1):
            found = operate(box, problem.question, {block: "swap"}, partner=partner.question, layers=(layer, layer))
            last = HELD_LAYER.get(block + 1, END_LAYER)
            if HELD_LAYER[block] <= layer < last:
                assert found["changed_blocks"] == list(range(block, 4))
                assert found["after"]["value"] == swapped_answer(problem, partner, block)
            else:
                # Later than END_LAYER the end holds the partner's result: were it written, its readout would say that.
                assert found["changed_blocks"] == ([block] if HELD_LAYER[block] <= layer < END_LAYER else [])


def test_different_actions_in_one_pass(box):
    problem, partner = two_problems(2)
    both = operate(box, problem.question, {1: "swap", 2: "swap"}, partner=partner.question)
    assert said(both["after"])[:2] == results(partner)[:2]
    assert both["after"]["value"] == swapped_answer(problem, partner, 2)
    # Whatever is done before it, the last block brings its own result along.
    mixed = operate(box, problem.question, {3: "swap", 1: "blank", 2: "keep"}, partner=partner.question)
    assert mixed["after"]["value"] == results(partner)[2] and mixed["changed_blocks"] == [1, 2, 3]
    assert mixed["actions"] == {"1": "blank", "3": "swap"}


def test_a_blank_after_everything_has_been_read_changes_nothing(box):
    problem, _ = two_problems()
    late = operate(box, problem.question, {1: "blank", 3: "noise"}, layers=(END_LAYER, LAYERS))
    assert late["before"] == late["after"] and late["changed_blocks"] == []
    early = operate(box, problem.question, {2: "blank"})
    assert early["changed_blocks"] == [2, 3]


def test_the_control_tells_what_any_other_memory_would_have_done(box):
    problem, partner = two_problems()
    stranger = draw_problems(9, 1, "report")[0]
    options = {"partner": partner.question, "unrelated": stranger.question}
    for action in ("swap", "blank"):
        control = operate(box, problem.question, {2: action}, **options)["control"]
        assert control["what"] == "block 2 taken from an unrelated question instead"
        assert control["value"] == swapped_answer(problem, stranger, 2)
    assert operate(box, problem.question, {2: "swap"}, partner=partner.question)["control"] is None
    elsewhere = operate(box, problem.question, {3: "blank", 1: "blank"}, seed=4)
    assert elsewhere["control"] is None  # one block is left, two were blanked
    elsewhere = operate(box, problem.question, {3: "blank"}, layers=(6, 6), seed=4)["control"]
    assert elsewhere["what"] in ("the same done to block 1 instead", "the same done to block 2 instead")
    assert elsewhere["answer_changed"] is False  # at layer 6 nobody reads the blocks before the last


# -------------------------------------------------------------------------------------------------------- random models


def naive(rim, block_rows, span, readout, count) -> list[int]:
    """Readout after block `readout` by one whole pass per token; `block_rows`: block -> states [L + 1, M + 2, d]."""
    prompt = rim.prompt_ids(QUESTION, "memory")
    length = rim.layout.block_length
    first = len(prompt) - rim.layout.num_blocks * length

    def patch(layer):
        def function(states):
            for block, rows in block_rows.items():
                for position in range(1, length - 1):
                    states[:, first + (block - 1) * length + position] = rows[layer, position]
            return states

        return function

    ids = prompt[: first + readout * length]
    start = len(ids)
    block_rows = {block: rows for block, rows in block_rows.items() if block <= readout}
    with torch.inference_mode(), edit_residual(rim, {layer: patch(layer) for layer in range(span[0], span[1] + 1)}):
        while len(ids) < start + count and ids[-1] != rim.eos_id:
            logits = rim.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
            logits[rim.banned_ids] = -torch.inf
            ids.append(int(logits.argmax()))
    return ids[start:]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("span", [(0, 1), (1, 2)])
def test_every_readout_is_what_whole_passes_give(make_rim, family, span):
    rim = make_rim(family)
    # A random model rarely ends by itself; some tokens are enough to compare.
    actions = {1: "blank", 3: "swap", 4: "swap"}
    found = operate(rim, QUESTION, actions, partner=OTHER, layers=span, max_new_tokens=4)
    donor = Patcher(rim, OTHER).memory
    rows = {1: torch.zeros_like(donor[:, 0]), 3: donor[:, 2], 4: donor[:, 3]}
    for readout in found["after"]["readouts"]:
        assert readout["text"] == rim.decode(naive(rim, rows, span, readout["block"], 4))
    assert found["changed_blocks"] and found["before"]["readouts"] != found["after"]["readouts"]


@pytest.mark.parametrize("blocks", [None, 0, 1, 16])
def test_all_kept_is_the_clean_answer(rim, blocks):
    told = answer(rim, QUESTION, "memory", num_blocks=blocks, max_new_tokens=5)
    actions = {1: "keep"} if blocks != 0 else {}
    found = operate(rim, QUESTION, actions, num_blocks=blocks, gold="17", max_new_tokens=5)
    assert found["before"] == found["after"] and found["before"]["text"] == told.text
    assert [one["text"] for one in found["after"]["readouts"]] == [one.text for one in told.readouts]
    assert found["actions"] == {} and found["control"] is None and not found["answer_changed"]
    if blocks != 0:
        clean = Patcher(rim, QUESTION, [rim.encoder.answer_ids("17")], num_blocks=blocks)
        chance = math.exp(clean.log_probability)
        assert found["gold_probability"]["after"] == pytest.approx(chance, abs=1e-3)


def test_noise_is_drawn_by_seed_and_no_other_blocks_action_changes_it(rim):
    first, again, other = (operate(rim, QUESTION, {2: "noise"}, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first["answer_log_probability"]["after"] != other["answer_log_probability"]["after"]
    beside = operate(rim, QUESTION, {2: "noise", 4: "blank"}, seed=1)
    assert beside["after"]["readouts"][1:3] == first["after"]["readouts"][1:3]


@pytest.mark.parametrize(
    "wrong",
    [
        {"actions": {5: "blank"}}, {"actions": {0: "blank"}}, {"actions": {True: "blank"}}, {"actions": {"x": "blank"}},
        {"actions": {"²": "blank"}}, {"actions": ["blank"]}, {"actions": {1: "erase"}}, {"actions": {1: None}},
        {"actions": {1: "swap"}}, {"actions": {1: "swap"}, "partner": " "}, {"actions": {1: "swap"}, "partner": 3},
        {"unrelated": ""}, {"unrelated": QUESTION}, {"layers": (2, 1)}, {"layers": (1, 3)}, {"layers": (-1, 1)},
        {"layers": (1,)}, {"layers": 1}, {"layers": "12"}, {"layers": (True, 2)}, {"num_blocks": 0},
        {"num_blocks": 99}, {"num_blocks": "4"}, {"seed": -1}, {"max_new_tokens": 0},
        {"gold": "7" * 999}, {"gold": "7" * 999, "actions": {}}, {"seed": 0.5}, {"question": " "},
    ],
)  # fmt: skip
def test_bad_input_is_told_in_one_sentence(rim, wrong):
    given = {"question": QUESTION, "actions": {1: "blank"}} | wrong
    with pytest.raises(RiMError) as error:
        operate(rim, given.pop("question"), given.pop("actions"), **given)
    assert str(error.value).endswith(".") and "\n" not in str(error.value)
