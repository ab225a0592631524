"""The parts of a causal LM that families name differently: its decoder layers, and what stands before its head.

Knows module trees of transformers and PEFT. Knows nothing of memory blocks or of what is read there.
"""

from collections.abc import Callable

import torch
from torch import nn

from rim_probe.errors import CheckpointError

_NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm", "layer_norm")


def causal_lm(model: nn.Module) -> nn.Module:
    """The transformers model itself, without a PEFT wrapper (whose adapters stay active inside it)."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The L decoder layers in order.

    Raises:
        CheckpointError: a family that has no list of them.
    """
    return list(_layer_list(model)[1])


def before_head(model: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """What turns residual states [..., d] into the head's input: the final norm and (OPT-350m alone) a projection."""
    holder, _ = _layer_list(model)
    norm = next((getattr(holder, name) for name in _NORMS if getattr(holder, name, None) is not None), nn.Identity())
    project = getattr(holder, "project_out", None) or nn.Identity()
    return lambda states: project(norm(states))


def _layer_list(model: nn.Module) -> tuple[nn.Module, nn.ModuleList]:
    """The module that holds the list of decoder layers, and the list."""
    model = causal_lm(model)
    wanted = model.config.num_hidden_layers
    for module in model.modules():
        for child in module.children():
            if isinstance(child, nn.ModuleList) and len(child) == wanted:
                return module, child
    raise CheckpointError(f"{type(model).__name__}: no list of {wanted} decoder layers was found.")
