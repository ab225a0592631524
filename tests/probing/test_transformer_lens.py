"""The TransformerLens adapter says what transformers and our capture say. Importing it takes nine seconds, once."""

import runpy
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ALL_FAMILIES, add_lora, tiny_rim

from rim_probe.equations import counterfactual
from rim_probe.errors import RiMError
from rim_probe.gallery import load_examples
from rim_probe.model import RiM
from rim_probe.probing.capture import capture
from rim_probe.probing.interventions import intervene
from rim_probe.probing.transformer_lens import to_transformer_lens

QUESTIONS = ["Anna has 3 apples and buys 14 more. How many apples has she?", "3+14=?"]
ROOT = Path(__file__).parents[2]
KINDS = (*ALL_FAMILIES, "adapter")


@pytest.fixture(scope="module", params=KINDS)
def pair(request):
    """A RiM and its bridge: every family, and a Llama with an adapter that moves linear layers and memory rows."""
    rim = tiny_rim("llama" if request.param == "adapter" else request.param)
    if request.param == "adapter":
        add_lora(rim, trainable_token_indices={"embed_tokens": sorted(rim.memory_ids)}).model.eval()
        for name, weight in rim.model.named_parameters():
            if "trainable_tokens_delta" in name:
                weight.data += 0.5 * torch.randn_like(weight)
    return rim, to_transformer_lens(rim)


def padded(rim) -> torch.Tensor:
    """Both prompts in one batch, padded on the right."""
    prompts = [rim.prompt_ids(question, "memory") for question in QUESTIONS]
    length = max(map(len, prompts))
    return torch.tensor([ids + [rim.eos_id] * (length - len(ids)) for ids in prompts])


@torch.no_grad()
def test_logits_states_and_patterns_are_ours(pair):
    rim, bridge = pair
    ids, held = padded(rim), capture(rim, QUESTIONS)
    logits, cache = bridge.run_with_cache(ids)
    torch.testing.assert_close(logits, rim.model(input_ids=ids).logits, atol=1e-4, rtol=1e-4)
    for n, question_ids in enumerate(held.question_ids):
        first = len(question_ids)
        slots, ends = torch.tensor(rim.layout.slot_positions(first)), torch.tensor(rim.layout.end_positions(first))
        queries = torch.cat([slots, ends[:, None]], dim=1).flatten()
        tail = first + rim.layout.num_blocks * rim.layout.block_length
        for layer in held.layers:
            name = "blocks.0.hook_resid_pre" if layer == 0 else f"blocks.{layer - 1}.hook_resid_post"
            states = cache[name][n]
            torch.testing.assert_close(held.slots[n, layer], states[slots], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(held.ends[n, layer], states[ends], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(held.question[n, layer], states[first - 1], atol=1e-4, rtol=1e-4)
            if layer:
                pattern = cache[f"blocks.{layer - 1}.attn.hook_pattern"][n, :, queries]
                torch.testing.assert_close(held.to_question[n, layer - 1, ..., :first], pattern[..., :first])
                torch.testing.assert_close(held.to_memory[n, layer - 1], pattern[..., first:tail])


@pytest.mark.parametrize("name", ["glass-box", "rim-tiny"])
def test_the_example_swaps_a_block_as_the_interchange_test_does(name):
    checkpoint = ROOT / "checkpoints" / name
    if not (checkpoint / "config.json").is_file():
        pytest.skip(f"{checkpoint} holds no weights")
    swap = runpy.run_path(str(ROOT / "examples" / "transformer_lens_swap.py"))["swap"]
    rim, changed, bounds = RiM.from_pretrained(checkpoint, "cpu"), 0, (Fraction(1), Fraction(9))
    for number, problem in enumerate(load_examples(checkpoint)[:3]):
        partner = counterfactual(problem, np.random.default_rng(number), bounds)
        if partner is not None:
            found = intervene(rim, problem.question, [partner.step], mode="swap", source=partner.problem.question)
            answers = [found.before.text, found.after.text]
            assert swap(rim, problem.question, partner.problem.question, partner.step) == answers
            assert name != "glass-box" or answers == [problem.answer, partner.predicted]
            changed += 1
    assert changed


def test_the_model_itself_is_not_touched(pair):
    rim, bridge = pair
    own = {parameter.data_ptr() for parameter in rim.model.parameters()}
    assert not own & {parameter.data_ptr() for parameter in bridge.parameters()}
    assert not any("_original_component" in name for name, _ in rim.model.named_modules())
    assert rim.model.config._attn_implementation == "sdpa"
    assert bridge.tokenizer is None and not bridge.training


def test_its_absence_is_told_in_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformer_lens.model_bridge.sources", None)
    with pytest.raises(RiMError, match=r"^TransformerLens cannot be imported .*`pip install transformer-lens`\.$"):
        to_transformer_lens(tiny_rim())
