"""How a model is run while it is trained: precision, attention, compilation, loading of rows.

Knows torch, transformers and PEFT. Knows nothing about recipes, rows or losses. Nothing here changes the names of
weights or what is saved.
"""

import contextlib
from collections.abc import Iterator

import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from rim_probe.errors import RecipeError
from rim_probe.precision import default_dtype

ATTENTIONS = {"sdpa": "sdpa", "eager": "eager", "flex": "flex_attention"}  # a recipe's word: that of transformers
_COMPILER = "inductor"
_ALIGNED = 8  # bfloat16 values in 16 bytes: kernels copy nothing to align lengths that are multiples of it


def on_gpu() -> bool:
    """Whether training runs on a GPU."""
    return torch.cuda.is_available()


def chosen_precision(asked: str, model) -> str:
    """`float32` or `bfloat16` for a recipe's word and the model that is trained here."""
    if asked != "auto":
        return asked
    device = torch.device("cuda" if on_gpu() else "cpu")
    weights = sum(parameter.numel() for parameter in model.parameters())
    return str(default_dtype(device, weights)).removeprefix("torch.")


def running_arguments(precision: str) -> dict:
    """What `TrainingArguments` says of device, precision and loading: autocast for bfloat16, on a GPU two workers.

    The workers only make rows, in the order they are told, so neither they nor rows read ahead show in a result.
    """
    bf16 = {"bf16": precision == "bfloat16"}
    if not on_gpu():
        return bf16 | {"use_cpu": True, "dataloader_pin_memory": False}
    return bf16 | {
        "dataloader_num_workers": 2,
        "dataloader_persistent_workers": True,
        "dataloader_prefetch_factor": 4,
        "dataloader_pin_memory": True,
    }


def length_multiple(device: torch.device) -> int:
    """Rows are padded to a multiple of this: fewer different lengths and aligned kernels on a GPU."""
    return _ALIGNED if device.type == "cuda" else 1


def check_flex(model) -> None:
    """Refuses `attention: flex` where it cannot be trained.

    Raises:
        RecipeError: no GPU (torch has no backward pass of flex attention for CPUs), or a family without it.
    """
    if not on_gpu():
        raise RecipeError("attention: flex trains on a GPU only; use attention: sdpa (or leave the line out) here.")
    inner = _inner(model)
    if not getattr(inner, "_supports_flex_attn", False):
        raise RecipeError(f"{type(inner).__name__} has no flex attention in transformers; use attention: sdpa.")


def chosen_attention(asked: str, precision: str) -> str:
    """A recipe's word; auto is eager on a CPU in bfloat16, where the backward pass of sdpa is slow, else sdpa."""
    if asked != "auto":
        return asked
    return "eager" if precision == "bfloat16" and not on_gpu() else "sdpa"


def set_attention(model, attention: str) -> None:
    """Switches a model, wrapped by PEFT or not, to `sdpa`, `eager` or `flex`."""
    _inner(model).set_attn_implementation(ATTENTIONS[attention])


def narrow_base(model) -> None:
    """Holds the frozen base of an adapter in bfloat16; what is trained, and every buffer, stays in float32.

    Buffers because positions are computed from one: in bfloat16 neighbours far from the start would be told apart no
    more.
    """
    if hasattr(model, "peft_config"):
        for parameter in model.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(torch.bfloat16)


def lean_adapters(model) -> None:
    """Under autocast PEFT would cast every input to float32, and autocast back again: the same values for more work."""
    if not hasattr(model, "peft_config"):
        return
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.cast_input_dtype_enabled = False


def compile_layers(model) -> None:
    """Compiles the decoder layers in place, with dynamic lengths.

    Layers and not the model: they are equal, so one compilation serves all of them, and the hooks of the trainer on the
    head, saving and PEFT see the modules they know.
    """
    torch._dynamo.reset()  # what an earlier stage compiled belongs to weights that are gone
    for layer in decoder_layers(model):
        layer.compile(dynamic=True, backend=_COMPILER)


def uncompile_layers(model) -> None:
    """Takes back what `compile_layers` did."""
    for layer in decoder_layers(model):
        layer._compiled_call_impl = None
    torch._dynamo.reset()


def decoder_layers(model) -> list[torch.nn.Module]:
    """The layers of a model of any family, wrapped by PEFT or not."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


@contextlib.contextmanager
def as_asked(model) -> Iterator[None]:
    """The model as a finished checkpoint is asked: eval mode, sdpa, nothing compiled.

    Validation has many lengths and a growing cache, for which compiling would never pay.
    """
    inner = _inner(model)
    attention = inner.config._attn_implementation
    inner.set_attn_implementation(ATTENTIONS["sdpa"])
    model.eval()
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        inner.set_attn_implementation(attention)


def _inner(model):
    return model.get_base_model() if hasattr(model, "get_base_model") else model
