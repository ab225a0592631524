"""Where to reach into a model: its decoder layers, its residual stream, its attention weights, its unembedding.

Plain transformers with forward hooks. Hooks act only on passes of the thread that set them, so that a page can answer
one visitor while another one's question is probed, and they are removed whatever happens.

Layer numbers: 0 is the embeddings (`blocks.0.hook_resid_pre` of TransformerLens), l is the residual stream after
decoder layer l (`blocks.{l-1}.hook_resid_post`), before the final norm also for the last one.

Knows module trees. Knows nothing of memory blocks, questions or probes.
"""

import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from numbers import Integral

import numpy as np
import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import AttentionInterface

from rim_probe import anatomy
from rim_probe.door import LENS, tolerance
from rim_probe.errors import RiMError
from rim_probe.model import RiM

RESIDUAL = "reading its residual stream"
ATTENTION = "reading its attention weights"
MOST_LAYERS = 13  # that are searched or swept where every layer costs as much as the first

_NAME = re.compile(r"blocks\.(\d+)\.hook_resid_(pre|post)")

# ----------------------------------------------------------------------------------------------------------- the model


def causal_lm(rim: RiM) -> nn.Module:
    """The transformers model itself, without a PEFT wrapper (whose adapters stay active inside it)."""
    return anatomy.causal_lm(rim.model)


def decoder_layers(rim: RiM) -> list[nn.Module]:
    """The L decoder layers in order."""
    return anatomy.decoder_layers(rim.model)


def num_layers(rim: RiM) -> int:
    """L."""
    return len(decoder_layers(rim))


def layer_number(layer: int | str, layers: int) -> int:
    """A layer as 0..`layers` from a number or a TransformerLens name such as `blocks.5.hook_resid_post`.

    Raises:
        RiMError: no such layer.
    """
    number = layer
    if isinstance(layer, str):
        match = _NAME.fullmatch(layer)
        number = int(match[1]) + (match[2] == "post") if match else None
    if isinstance(number, bool) or not isinstance(number, Integral) or not 0 <= number <= layers:
        raise RiMError(
            f"There is no layer {layer!r}; name a number from 0 (embeddings) to {layers}, or a residual stream such as "
            f"blocks.{layers - 1}.hook_resid_post."
        )
    return int(number)


def layer_numbers(layers: Iterable[int | str] | None, rim: RiM) -> tuple[int, ...]:
    """Layers named by a user as sorted numbers without repeats; None is all of 0..L."""
    count = num_layers(rim)
    if layers is None:
        return tuple(range(count + 1))
    return tuple(sorted({layer_number(layer, count) for layer in layers}))


def spread_layers(layers: Sequence[int], most: int = MOST_LAYERS) -> list[int]:
    """At most `most` of the layers, evenly spread, first and last among them."""
    places = np.linspace(0, len(layers) - 1, min(most, len(layers))).round().astype(int)
    return [layers[i] for i in dict.fromkeys(places.tolist())]


def layers_told(looked_at: Sequence[int], of: Sequence[int]) -> str:
    """Which of the layers were looked at: "all layers", or how many of how many."""
    return "all layers" if len(looked_at) >= len(of) else f"{len(looked_at)} of {len(of)} layers"


def unembed(rim: RiM, states: torch.Tensor) -> torch.Tensor:
    """Logit lens: residual states [..., d] -> float32 logits [..., V] by the final norm (once) and the head.

    Raises:
        RiMError: a model whose logits are not those of its last layer's states.
    """
    rim.verdict.require(LENS)
    head = causal_lm(rim).get_output_embeddings()
    return head(anatomy.before_head(rim.model)(states.to(rim.device, rim.dtype))).float()


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
        # A pass of another thread calls it without kwargs when it is removed in the middle of that pass.
        def hook(module, args, kwargs=None):
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

_observers = threading.local()  # what the passes of this thread are to tell
_lock = threading.Lock()
_observing = 0  # contexts that `sdpa` tells weights for


def _observed_sdpa(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs):
    """`sdpa`, telling the weights of chosen queries; query [B, H, T, c], key and value [B, H_kv, S, c]."""
    observer = getattr(_observers, "current", None)
    if observer is not None:
        observer.record(module.layer_idx + 1, observer.weights(query, key, attention_mask, scaling))
    return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)


@contextmanager
def _observing_sdpa() -> Iterator[None]:
    """Meanwhile `sdpa` tells weights. No model is switched: for threads without an observer it is what it was."""
    global _observing
    with _lock:
        _observing += 1
        AttentionInterface.register("sdpa", _observed_sdpa)
    try:
        yield
    finally:
        with _lock:
            _observing -= 1
            if not _observing:
                AttentionInterface.register("sdpa", sdpa_attention_forward)


@contextmanager
def _observing_eager(rim: RiM) -> Iterator[None]:
    """Meanwhile every `eager` attention of the model, which computes all weights anyway, tells those chosen."""
    thread = threading.get_ident()

    def hook(module, args, output):
        if threading.get_ident() == thread:
            observer = _observers.current
            observer.record(module.layer_idx + 1, observer.chosen(output[1]).float())

    with ExitStack() as hooks:
        for layer in decoder_layers(rim):
            for module in layer.modules():
                if "Attention" in type(module).__name__ and hasattr(module, "layer_idx"):
                    hooks.callback(module.register_forward_hook(hook).remove)
        yield


class _Observer:
    """Which attention weights are told, and to whom; see `observe_attention`."""

    def __init__(self, rows: torch.Tensor, record: Callable[[int, torch.Tensor], None], columns: torch.Tensor | None):
        self.record = record
        self._rows, self._columns = rows, columns
        self._keys = None if columns is None else columns.clamp(min=0)
        self._causal = 0, torch.empty(0)  # length of a pass, mask: made once for all its layers

    def chosen(self, weights: torch.Tensor) -> torch.Tensor:
        """[B, H, T, S] -> [B, H, Q, S or C]."""
        weights = _pick(weights, self._rows)
        if self._columns is None:
            return weights
        weights = _pick(weights.transpose(2, 3), self._keys).transpose(2, 3)
        return weights.masked_fill((self._columns < 0)[:, None, None], 0)

    def weights(self, query, key, mask, scaling) -> torch.Tensor:
        """Softmax weights of the chosen queries alone, float32 [B, H, Q, S or C]."""
        keys = key if self._keys is None else _pick(key, self._keys)
        # Heads that share a key have their queries in one matrix, so that no key is repeated.
        queries = _pick(query, self._rows).reshape(len(self._rows), key.shape[1], -1, key.shape[3])
        scores = (queries @ keys.transpose(2, 3)).float().mul_(query.shape[3] ** -0.5 if scaling is None else scaling)
        scores = scores.view(len(self._rows), query.shape[1], self._rows.shape[1], -1)
        return scores.add_(self._mask(mask, key.shape[2])).softmax(-1)

    def _mask(self, mask: torch.Tensor | None, length: int) -> torch.Tensor:
        """The additive mask [B, 1, Q, S or C]: that of the model, or the causal one where it needs none."""
        if mask is not None:
            told = self.chosen(mask.expand(len(self._rows), -1, -1, -1)[..., :length])
            if self._columns is not None and told.dtype != torch.bool:
                told = told.masked_fill((self._columns < 0)[:, None, None], -torch.inf)
            return _additive(told)
        if self._causal[0] != length:
            columns = self._columns
            if columns is None:
                columns = torch.arange(length, device=self._rows.device).expand(len(self._rows), -1)
            columns = columns[:, None, None]
            self._causal = length, _additive((columns >= 0) & (columns <= self._rows[:, None, :, None]))
        return self._causal[1]


def _additive(mask: torch.Tensor) -> torch.Tensor:
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=torch.float32).masked_fill_(~mask, -torch.inf)


def _pick(tensor: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """[B, H, T, c] and `rows` [B, Q] -> [B, H, Q, c], the vectors of all heads copied at once, as `gather` does not."""
    batch, heads, length, width = tensor.shape
    flat = (torch.arange(batch, device=rows.device)[:, None] * length + rows).flatten()
    picked = tensor.transpose(1, 2).reshape(batch * length, heads * width).index_select(0, flat)
    return picked.view(batch, -1, heads, width).transpose(1, 2)


@contextmanager
def observe_attention(
    rim: RiM,
    rows: torch.Tensor,
    record: Callable[[int, torch.Tensor], None],
    columns: torch.Tensor | None = None,
) -> Iterator[None]:
    """Calls `record(layer 1..L, weights [B, H, Q, S])` for queries at columns `rows` [B, Q] of passes without cache.

    A model that runs `sdpa` goes on with it; the weights are computed for these queries alone, in float32.

    Args:
        columns [B, C]: the keys to tell of, in this order, -1 for none (weight 0): weights are then [B, H, Q, C]. They
            have to hold every key that one of the queries sees.

    Raises:
        RiMError: an attention back end that is neither `sdpa` nor `eager`.
    """
    implementation = causal_lm(rim).config._attn_implementation
    if implementation not in ("sdpa", "eager"):
        raise RiMError(
            f"Attention weights need the attention back end sdpa or eager, not {implementation!r}; "
            "load the model with attention='sdpa'."
        )
    outer = getattr(_observers, "current", None)
    with _observing_sdpa() if implementation == "sdpa" else _observing_eager(rim):
        _observers.current = _Observer(rows, record, columns)
        try:
            yield
        finally:
            _observers.current = outer


# -------------------------------------------------------------------------------------------- what can be read of it


def require_residual(rim: RiM) -> None:
    """Refuses a model whose residual stream hooks do not read as transformers tells it.

    Raises:
        RiMError: with the reason.
    """
    rim.verdict.require(RESIDUAL, lambda: _residual_fault(rim))


def tells_attention(rim: RiM) -> bool:
    """Whether every layer of a model tells attention weights that sum to 1; where not, `verdict` holds the reason."""
    return rim.verdict.works(ATTENTION, lambda: _attention_fault(rim))


@torch.no_grad()
def _residual_fault(rim: RiM) -> str | None:
    states: dict[int, torch.Tensor] = {}
    layers = num_layers(rim)
    with read_residual(rim, range(layers + 1), states.__setitem__):
        told = rim.model(input_ids=_some_ids(rim), output_hidden_states=True, use_cache=False).hidden_states
    if wrong := [layer for layer in range(layers) if not torch.equal(states[layer], told[layer])]:
        return f"what hooks read differs from what transformers tells from layer {wrong[0]} on"
    return None if all(state.isfinite().all() for state in states.values()) else "it holds NaN or infinity"


@torch.no_grad()
def _attention_fault(rim: RiM) -> str | None:
    ids, told = _some_ids(rim), {}
    with observe_attention(rim, torch.arange(ids.shape[1], device=rim.device)[None], told.__setitem__):
        causal_lm(rim).base_model(input_ids=ids, use_cache=False)
    if silent := [layer for layer in range(1, num_layers(rim) + 1) if layer not in told]:
        return f"layer {', '.join(map(str, silent))} computes them without telling (of {num_layers(rim)} layers)"
    missed = max((weights.float().sum(-1) - 1).abs().max().item() for weights in told.values())
    return f"its rows miss a sum of 1 by {missed:.2g}" if missed > tolerance(rim.dtype) / 4 else None


def _some_ids(rim: RiM) -> torch.Tensor:
    """A little text and a block, [1, T]."""
    ids = rim.encoder.prefix_ids + rim.encoder.marker_ids + rim.encoder.block_ids
    return torch.tensor([ids], device=rim.device)
