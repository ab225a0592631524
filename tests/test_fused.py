"""Fused parts of training give the losses and gradients of the plain modules."""

import pytest
import torch
from conftest import tiny_base, tiny_tokenizer
from torch.nn.functional import cross_entropy

from rim_probe.model import RiM
from rim_probe.training import origin
from rim_probe.training.fused import fuse_adapter, has_frozen_head, head_losses
from rim_probe.training.recipe import Data, Lora, Recipe, Stage


@pytest.fixture(params=["llama", "gpt2"])
def adapted(request) -> RiM:
    """A LoRA model in float32 whose adapter does something; llama with an untied head, gpt2 with a tied one."""
    tokenizer = tiny_tokenizer()
    rim = RiM.attach(tiny_base(request.param, vocab_size=len(tokenizer)), tokenizer)
    recipe = Recipe("o", (Stage("a", "cot", 1, 0.1),), Data(files=("a.txt",)), base="b", lora=Lora(r=4, alpha=8))
    rim = origin.add_adapter(rim, recipe)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in rim.model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return rim


def losses_and_gradients(rim: RiM, fused_head: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    ids = torch.tensor([[5, 6, 7, *rim.encoder.block_ids, 8, 9], [9, 8, 7, *rim.encoder.block_ids, 6, 5]])
    labels, weights = ids.flatten(), torch.linspace(0.1, 1, ids.numel())
    rim.model.zero_grad()
    body = rim.model.get_base_model()
    hidden = body.base_model(input_ids=ids).last_hidden_state.flatten(0, 1)
    head = rim.model.get_output_embeddings()
    losses = head_losses(head, hidden, labels) if fused_head else cross_entropy(head(hidden), labels, reduction="none")
    (losses * weights).sum().backward()
    return losses.detach(), {n: p.grad.clone() for n, p in rim.model.named_parameters() if p.grad is not None}


def test_fused_training_equals_the_plain_modules(adapted):
    assert has_frozen_head(adapted.model.get_output_embeddings())
    plain, gradients = losses_and_gradients(adapted, False)
    fuse_adapter(adapted.model)
    fused, same = losses_and_gradients(adapted, True)
    torch.testing.assert_close(fused, plain, atol=1e-5, rtol=1e-5)
    assert same.keys() == gradients.keys() and any("trainable_tokens" in name for name in same)
    for name, value in gradients.items():
        torch.testing.assert_close(same[name], value, atol=1e-5, rtol=1e-4, msg=name)


def test_what_is_more_than_plain_lora_stays_as_it_is(adapted):
    for module in adapted.model.modules():
        if hasattr(module, "lora_dropout") and "default" in module.lora_dropout:
            module.lora_dropout["default"] = torch.nn.Dropout(0.5)
    fuse_adapter(adapted.model)
    adapted.model.train()
    first, second = (losses_and_gradients(adapted, True)[0] for _ in range(2))
    assert not torch.equal(first, second)  # dropout still drops


def test_a_head_that_is_trained_is_not_fused(adapted):
    head = adapted.model.get_output_embeddings()
    for parameter in head.parameters():
        parameter.requires_grad_(True)
    assert not has_frozen_head(head)
