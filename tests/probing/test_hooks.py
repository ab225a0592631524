"""Where hooks reach: layers by number and name, the residual stream, attention weights; and that they go."""

import threading

import pytest
import torch
from conftest import ALL_FAMILIES, ATTENTIONS, add_lora, tiny_rim

from rim_probe.errors import CheckpointError, RiMError
from rim_probe.probing.hooks import (
    decoder_layers,
    edit_residual,
    layer_number,
    num_layers,
    observe_attention,
    read_residual,
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


# -------------------------------------------------------------------------------------------------------------- layers


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
        add_lora(rim).model.eval()
    states, out = states_of(rim, ids_of(rim))
    told = forward(rim, ids_of(rim), output_hidden_states=True).hidden_states
    for layer in range(num_layers(rim)):
        assert torch.equal(states[layer], told[layer])
    # transformers tells the last one after the norm, hooks before it; so does the unembedding apply the norm once.
    last = states[num_layers(rim)]
    assert not torch.allclose(last, told[-1])
    torch.testing.assert_close(unembed(rim, last), out.logits)
    torch.testing.assert_close(rim.model.get_output_embeddings()(told[-1]), out.logits)


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


# ---------------------------------------------------------------------------------------------------------- threads


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
