"""Where to reach into a model: its decoder layers, its residual stream, its attention weights, its unembedding.

Plain transformers with forward hooks. Hooks act only on passes of the thread that set them, so that a page can answer
one visitor while another one's question is probed, and they are removed whatever happens.

Layer numbers: 0 is the embeddings (`blocks.0.hook_resid_pre` of TransformerLens), l is the residual stream after
decoder layer l (`blocks.{l-1}.hook_resid_post`), before the final norm also for the last one.

Knows module trees. Knows nothing of memory blocks, questions or probes.
"""

import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from rim_probe.errors import CheckpointError, RiMError
from rim_probe.model import RiM

_NAME = re.compile(r"blocks\.(\d+)\.hook_resid_(pre|post)")
_NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm")

# ----------------------------------------------------------------------------------------------------------- the model


def causal_lm(rim: RiM) -> nn.Module:
    """The transformers model itself, without a PEFT wrapper (whose adapters stay active inside it)."""
    return rim.model.get_base_model() if hasattr(rim.model, "get_base_model") else rim.model


def decoder_layers(rim: RiM) -> list[nn.Module]:
    """The L decoder layers in order."""
    return list(_layer_list(rim)[1])


def num_layers(rim: RiM) -> int:
    """L."""
    return len(_layer_list(rim)[1])


def _layer_list(rim: RiM) -> tuple[nn.Module, nn.ModuleList]:
    """The module that holds the list of decoder layers, and the list."""
    model = causal_lm(rim)
    wanted = model.config.num_hidden_layers
    for module in model.modules():
        for child in module.children():
            if isinstance(child, nn.ModuleList) and len(child) == wanted:
                return module, child
    raise CheckpointError(f"{rim.name}: no list of {wanted} decoder layers was found in {type(model).__name__}.")


def layer_number(layer: int | str, layers: int) -> int:
    """A layer as 0..`layers` from a number or a TransformerLens name such as `blocks.5.hook_resid_post`.

    Raises:
        RiMError: no such layer.
    """
    number = layer
    if isinstance(layer, str):
        match = _NAME.fullmatch(layer)
        number = int(match[1]) + (match[2] == "post") if match else None
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number <= layers:
        raise RiMError(
            f"There is no layer {layer!r}; name a number from 0 (embeddings) to {layers}, or a residual stream such as "
            f"blocks.{layers - 1}.hook_resid_post."
        )
    return number


def layer_numbers(layers: Iterable[int | str] | None, rim: RiM) -> tuple[int, ...]:
    """Layers named by a user as sorted numbers without repeats; None is all of 0..L."""
    count = num_layers(rim)
    if layers is None:
        return tuple(range(count + 1))
    return tuple(sorted({layer_number(layer, count) for layer in layers}))


def unembed(rim: RiM, states: torch.Tensor) -> torch.Tensor:
    """Logit lens: residual states [..., d] -> float32 logits [..., V] by the final norm (once) and the head."""
    holder, _ = _layer_list(rim)
    norm = next((getattr(holder, name) for name in _NORMS if getattr(holder, name, None) is not None), nn.Identity())
    project = getattr(holder, "project_out", None) or nn.Identity()  # OPT-350m alone
    head = causal_lm(rim).get_output_embeddings()
    return head(project(norm(states.to(rim.device, rim.dtype)))).float()


# -------------------------------------------------------------------------------------------------- the residual stream


@contextmanager
def edit_residual(rim: RiM, edits: Mapping[int, Callable[[torch.Tensor], torch.Tensor]]) -> Iterator[None]:
    """Passes the residual stream of chosen layers through functions while the context lasts.

    Args:
        edits: layer number -> function of the states [B, T, d] that returns the states to go on with (it may change its
            argument in place, and may return more rows than it got).
    """
    modules = decoder_layers(rim)
    thread = threading.get_ident()

    def before(function):
        def hook(module, args, kwargs):
            if threading.get_ident() != thread:
                return None
            if args:
                return (function(args[0]), *args[1:]), kwargs
            return args, kwargs | {"hidden_states": function(kwargs["hidden_states"])}

        return hook

    def after(function):
        def hook(module, args, output):
            if threading.get_ident() != thread:
                return None
            if isinstance(output, tuple):  # families whose layers still return one
                return (function(output[0]), *output[1:])
            return function(output)

        return hook

    with ExitStack() as hooks:
        for layer, function in edits.items():
            number = layer_number(layer, len(modules))
            if number == 0:
                handle = modules[0].register_forward_pre_hook(before(function), with_kwargs=True)
            else:
                handle = modules[number - 1].register_forward_hook(after(function))
            hooks.callback(handle.remove)
        yield


@contextmanager
def read_residual(rim: RiM, layers: Iterable[int], read: Callable[[int, torch.Tensor], None]) -> Iterator[None]:
    """Calls `read(layer, states [B, T, d])` for chosen layers on every pass; the states are not to be changed."""

    def reader(layer: int):
        def function(states):
            read(layer, states)
            return states

        return function

    with edit_residual(rim, {layer: reader(layer) for layer in layers}):
        yield


# ------------------------------------------------------------------------------------------------ the attention weights

OBSERVED = "rim_probe_observed"
"""A transformers attention back end: `sdpa`, which also tells the weights of chosen queries."""
_observers = threading.local()
_observed_models: WeakKeyDictionary = WeakKeyDictionary()  # model -> [contexts inside, back end to go back to]
_lock = threading.Lock()


def _observed_attention(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs):
    """query [B, H, T, c], key and value [B, H_kv, S, c]; the output of `sdpa` for them."""
    observer = getattr(_observers, "current", None)
    if observer is not None:
        rows, record = observer
        record(module.layer_idx + 1, _weights(query, key, attention_mask, scaling, rows))
    return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)


AttentionInterface.register(OBSERVED, _observed_attention)
AttentionMaskInterface.register(OBSERVED, sdpa_mask)


def _weights(query, key, mask, scaling, rows: torch.Tensor) -> torch.Tensor:
    """Softmax weights of the queries at `rows` [B, Q] alone, float32 [B, H, Q, S]."""
    key = repeat_kv(key, query.shape[1] // key.shape[1])
    index = rows[:, None, :, None]
    chosen = query.gather(2, index.expand(-1, query.shape[1], -1, query.shape[3]))
    scores = (chosen @ key.transpose(2, 3)).float() * (query.shape[3] ** -0.5 if scaling is None else scaling)
    if mask is None:
        hidden = torch.arange(key.shape[2], device=rows.device) > index
        scores = scores.masked_fill(hidden, -torch.inf)
    else:
        mask = mask.expand(len(rows), -1, -1, -1)[..., : key.shape[2]]
        picked = mask.gather(2, index.expand(-1, mask.shape[1], -1, mask.shape[3]))
        scores = scores.masked_fill(~picked, -torch.inf) if picked.dtype == torch.bool else scores + picked
    return scores.softmax(-1)


@contextmanager
def observe_attention(rim: RiM, rows: torch.Tensor, record: Callable[[int, torch.Tensor], None]) -> Iterator[None]:
    """Calls `record(layer 1..L, weights [B, H, Q, S])` for queries at columns `rows` [B, Q] of passes without cache.

    The model runs `sdpa` meanwhile; the weights are computed for these queries alone, in float32.
    """
    model = causal_lm(rim)
    with _lock:
        entry = _observed_models.setdefault(model, [0, model.config._attn_implementation])
        entry[0] += 1
        model.set_attn_implementation(OBSERVED)
    _observers.current = (rows, record)
    try:
        yield
    finally:
        _observers.current = None
        with _lock:
            entry[0] -= 1
            if entry[0] == 0:
                model.set_attn_implementation(entry[1])
                del _observed_models[model]
