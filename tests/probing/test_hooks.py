"""Where hooks reach: layers by number and name, the residual stream, attention weights; and that they go."""

import threading

import numpy as np
import pytest
import torch
from conftest import ALL_FAMILIES, ATTENTIONS, tiny_rim

from rim_probe.decoding import answer
from rim_probe.errors import CheckpointError, RiMError
from rim_probe.probing.hooks import (
    decoder_layers,
    edit_residual,
    layer_number,
    layer_numbers,
    layers_told,
    num_layers,
    observe_attention,
    read_residual,
    spread_layers,
    unembed,
)

QUESTION = "Anna has 3 apples and buys 14 more. How many?"


def forward(rim, ids, **options):
    with torch.no_grad():
        return rim.model(input_ids=torch.tensor(ids), use_cache=False, **options)


def ids_of(rim, question=QUESTION):
    return [rim.prompt_ids(question, "memory")]


def states_of(rim, ids):
    """The residual stream of one pass as hooks read it, by layer."""
    states = {}
    with read_residual(rim, range(num_layers(rim) + 1), states.__setitem__):
        out = forward(rim, ids)
    return states, out


def hooks_left(rim) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in rim.model.modules())


def add_adapter(rim):
    """LoRA whose weights are not zero, so that a pass through the bare base would be noticed."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    rim.model = get_peft_model(rim.model, config).eval()
    return rim


# -------------------------------------------------------------------------------------------------------------- layers


@pytest.mark.parametrize("name", ["blocks.0.hook_resid_pre", 0, np.int64(0)])
def test_layer_zero_is_the_embeddings(name):
    assert layer_number(name, 6) == 0


def test_transformerlens_names():
    assert layer_number("blocks.5.hook_resid_post", 6) == 6
    assert layer_number("blocks.5.hook_resid_pre", 6) == layer_number("blocks.4.hook_resid_post", 6) == 5


@pytest.mark.parametrize(
    "name",
    [7, -1, True, 1.5, None, "5", "blocks.6.hook_resid_post", "blocks.1.attn.hook_z", "blocks.-1.hook_resid_pre"],
)
def test_a_layer_that_is_not_there_is_named_in_one_sentence(name):
    with pytest.raises(RiMError, match=r"There is no layer .*; name a number from 0 \(embeddings\) to 6"):
        layer_number(name, 6)


def test_layers_are_sorted_without_repeats(rim):
    assert layer_numbers([2, "blocks.1.hook_resid_post", 0], rim) == (0, 2)
    assert layer_numbers(None, rim) == (0, 1, 2)


def test_a_model_without_a_list_of_layers_is_refused_in_one_sentence(rim):
    rim.model.config.num_hidden_layers = 7
    with pytest.raises(CheckpointError, match="LlamaForCausalLM: no list of 7 decoder layers was found"):
        decoder_layers(rim)


# ------------------------------------------------------------------------------------------------- the residual stream


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("family", ALL_FAMILIES)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_hooks_read_what_output_hidden_states_tells(family, wrapped):
    rim = tiny_rim(family)
    if wrapped:
        rim = add_adapter(rim)
    states, out = states_of(rim, ids_of(rim))
    told = forward(rim, ids_of(rim), output_hidden_states=True).hidden_states
    for layer in range(num_layers(rim)):
        assert torch.equal(states[layer], told[layer])
    # transformers tells the last one after the norm, hooks before it; so does the unembedding apply the norm once.
    last = states[num_layers(rim)]
    assert not torch.allclose(last, told[-1])
    torch.testing.assert_close(unembed(rim, last), out.logits)
    torch.testing.assert_close(rim.model.get_output_embeddings()(told[-1]), out.logits)


def test_unembedding_in_bfloat16_gives_float32_logits(rim):
    rim.model.to(torch.bfloat16)
    states, out = states_of(rim, ids_of(rim))
    logits = unembed(rim, states[2])
    assert logits.dtype == torch.float32 and states[2].dtype == torch.bfloat16
    assert torch.equal(logits, out.logits.float())


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_an_edit_acts_from_its_layer_on_and_an_empty_one_changes_nothing(family):
    rim = tiny_rim(family)
    ids = ids_of(rim)
    states, out = states_of(rim, ids)
    for layer in range(num_layers(rim) + 1):
        with edit_residual(rim, {layer: lambda x: x}):
            assert torch.equal(forward(rim, ids).logits, out.logits)
        seen = {}
        with edit_residual(rim, {layer: torch.zeros_like}), read_residual(rim, (0, 1, 2), seen.__setitem__):
            changed = forward(rim, ids).logits
        assert [torch.equal(seen[i], states[i]) for i in (0, 1, 2)] == [i < layer for i in (0, 1, 2)]
        assert not torch.allclose(changed, out.logits)


def test_an_edit_can_be_named_as_in_transformerlens_and_can_add_rows(rim):
    ids = ids_of(rim)
    with edit_residual(rim, {"blocks.0.hook_resid_post": lambda x: torch.cat([x, torch.zeros_like(x)])}):
        logits = forward(rim, ids).logits
    assert len(logits) == 2
    torch.testing.assert_close(logits[:1], forward(rim, ids).logits)


def test_hooks_go_whatever_happens(rim):
    before, expected = hooks_left(rim), forward(rim, ids_of(rim)).logits

    def fail(*_):
        raise RuntimeError("inside")

    for context in (
        edit_residual(rim, {0: torch.zeros_like, 2: fail}),
        read_residual(rim, (0, 1), fail),
        observe_attention(rim, torch.tensor([[1]]), fail),
    ):
        with pytest.raises(RuntimeError, match="inside"), context:
            forward(rim, ids_of(rim))
        assert hooks_left(rim) == before
        assert torch.equal(forward(rim, ids_of(rim)).logits, expected)
    with pytest.raises(RiMError), edit_residual(rim, {0: torch.zeros_like, 9: torch.zeros_like}):
        pass
    assert hooks_left(rim) == before


# ------------------------------------------------------------------------------------------------------ attention


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_observed_attention_is_that_of_the_eager_model(family, attention):
    ids = [[5, 6, 7, 8, 9, 10, 11], [12, 13, 14, 15, 2, 2, 2]]  # a row padded on the right
    rows = torch.tensor([[2, 6], [1, 3]])
    told = forward(tiny_rim(family, "eager"), ids, output_attentions=True).attentions
    rim, seen = tiny_rim(family, attention), {}
    before = forward(rim, ids).logits
    with observe_attention(rim, rows, seen.__setitem__):
        during = forward(rim, ids).logits
    assert torch.equal(during, before)
    assert rim.model.config._attn_implementation == attention
    assert sorted(seen) == [1, 2]
    for layer, weights in seen.items():
        assert weights.shape == (2, 4, 2, 7) and weights.dtype == torch.float32
        expected = torch.stack([told[layer - 1][row][:, rows[row]] for row in (0, 1)])
        torch.testing.assert_close(weights, expected)
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 2))


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_weights_of_chosen_keys_in_a_chosen_order(attention):
    ids, rows = [[5, 6, 7, 8, 9, 10, 11], [12, 13, 14, 15, 2, 2, 2]], torch.tensor([[2, 5], [1, 3]])
    columns = torch.tensor([[5, 4, 3, 2, 1, 0, 6, -1], [0, 1, -1, 3, 2, -1, -1, -1]])
    rim, seen, chosen = tiny_rim("llama", attention), {}, {}
    with observe_attention(rim, rows, seen.__setitem__):
        forward(rim, ids)
    with observe_attention(rim, rows, chosen.__setitem__, columns):
        forward(rim, ids)
    for layer in (1, 2):
        expected = torch.stack([seen[layer][i][..., columns[i]] * (columns[i] >= 0) for i in (0, 1)])
        torch.testing.assert_close(chosen[layer], expected)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_attention_under_a_mask_of_left_padding(attention):
    """Passes with a mask of their own are observed as well: 4-D ones, and those transformers makes of 0 and 1."""
    ids, mask, rows = [[2, 2, 2, 5, 6, 7], [8, 9, 10, 11, 12, 13]], torch.ones(2, 6), torch.tensor([[3, 5], [2, 5]])
    mask[0, :3] = 0
    told = forward(tiny_rim("llama", "eager"), ids, attention_mask=mask, output_attentions=True).attentions
    rim, seen = tiny_rim("llama", attention), {}
    with observe_attention(rim, rows, seen.__setitem__):
        forward(rim, ids, attention_mask=mask)
    for layer in (1, 2):
        expected = torch.stack([told[layer - 1][row][:, rows[row]] for row in (0, 1)])
        torch.testing.assert_close(seen[layer], expected)


@pytest.mark.parametrize("wrapped", [False, True])
def test_an_adapter_is_observed_too(wrapped):
    rim = tiny_rim("qwen3")
    ids, seen, rows = ids_of(rim), {}, torch.tensor([[3]])
    if wrapped:
        rim = add_adapter(rim)
    with observe_attention(rim, rows, seen.__setitem__):
        forward(rim, ids)
    rim.model.set_attn_implementation("eager")
    told = forward(rim, ids, output_attentions=True).attentions
    for layer in (1, 2):
        torch.testing.assert_close(seen[layer], told[layer - 1][:, :, 3:4])


# ---------------------------------------------------------------------------------------------------------- threads


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_hooks_of_one_thread_leave_the_answers_of_another_alone(attention):
    """A page answers one visitor while the question of another one is probed."""
    rim = tiny_rim("llama", attention)
    expected = answer(rim, QUESTION, "memory", max_new_tokens=6)
    inside, over, seen = threading.Event(), threading.Event(), []

    def probe():
        rows = torch.tensor([[1]])
        with edit_residual(rim, {1: torch.zeros_like}), observe_attention(rim, rows, lambda *_: seen.append(1)):
            inside.set()
            over.wait(30)

    prober = threading.Thread(target=probe)
    prober.start()
    try:
        assert inside.wait(30)
        given = answer(rim, QUESTION, "memory", max_new_tokens=6)
    finally:
        over.set()
        prober.join()
    assert given.readouts == expected.readouts and given.token_ids == expected.token_ids
    assert not seen


def test_a_hook_removed_in_the_middle_of_another_threads_pass_does_not_disturb_it(rim):
    inside, over = threading.Event(), threading.Event()

    def probe():
        with edit_residual(rim, {0: torch.zeros_like}):
            inside.set()
            over.wait(30)

    def outlast(states):  # torch has listed both hooks by now; the other one goes before it is reached
        over.set()
        prober.join(30)
        return states

    ids = ids_of(rim, QUESTION)
    expected = forward(rim, ids).logits
    prober = threading.Thread(target=probe)
    with edit_residual(rim, {0: outlast}):
        prober.start()
        assert inside.wait(30)
        torch.testing.assert_close(forward(rim, ids).logits, expected)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_two_threads_observe_one_model_each_its_own(attention):
    rim = tiny_rim("llama", attention)
    questions = {0: QUESTION, 1: "3 apples and 14 more?"}
    together, seen = threading.Barrier(2), {0: [], 1: []}

    def observe(number):
        ids = ids_of(rim, questions[number])
        with observe_attention(rim, torch.tensor([[number + 1]]), lambda _, weights: seen[number].append(weights)):
            for _ in range(20):
                together.wait(30)
                forward(rim, ids)

    threads = [threading.Thread(target=observe, args=(number,)) for number in seen]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, weights in seen.items():
        alone = {}
        with observe_attention(rim, torch.tensor([[number + 1]]), alone.__setitem__):
            forward(rim, ids_of(rim, questions[number]))
        assert len(weights) == 40
        for i, observed in enumerate(weights):
            torch.testing.assert_close(observed, alone[i % 2 + 1])
    assert rim.model.config._attn_implementation == attention


def test_it_is_told_how_many_layers_were_looked_at():
    assert layers_told(spread_layers(range(7)), range(7)) == "all layers"
    assert layers_told(spread_layers(range(31)), range(31)) == "13 of 31 layers"
