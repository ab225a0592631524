"""Parts of training an adapter, with less work than the plain modules: fewer and smaller tensors go through memory.

Knows torch and the modules of PEFT. Values are those of the plain modules, up to rounding.

1. Cross entropy straight from hidden states (the idea of Liger Kernel, arXiv:2410.10989): only a slice of the logits
   [N, vocabulary] exists at a time, and their gradient is spent at once on that of the hidden states. The head is
   frozen but for the rows of the memory tokens, so no gradient of the whole matrix is made.
2. A linear layer with LoRA: `y = x W' + s (x A') B'`, the small product added into the large one, gradients likewise.
3. Embeddings of which some rows are trained: looked up in both tables, where PEFT copies the whole table in each step.
"""

import functools

import torch
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.trainable_tokens import TrainableTokensLayer
from torch.nn.functional import embedding, linear

_SLICE = 128  # labelled positions whose logits exist at the same time


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, rows, row_ids, labels):
        """Hidden [N, d], weight [V, d] frozen, rows [R, d] trained in the place of weight[row_ids] -> losses [N]."""
        wanted = any(ctx.needs_input_grad)
        losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        to_hidden, of_rows = torch.empty_like(hidden), hidden.new_empty(len(hidden), len(row_ids))
        narrow = rows.to(hidden.dtype)
        for part in torch.arange(len(hidden), device=hidden.device).split(_SLICE):
            picked, targets = hidden[part], labels[part, None]
            logits = linear(picked, weight).float()
            logits[:, row_ids] = linear(picked, narrow).float()
            scale = logits.logsumexp(-1, keepdim=True)
            losses[part] = (scale - logits.gather(1, targets))[:, 0]
            if wanted:
                gradient = logits.sub_(scale).exp_()  # softmax, less one at the label
                gradient.scatter_add_(1, targets, torch.full_like(scale, -1))
                of_rows[part] = gradient[:, row_ids].to(hidden.dtype)
                gradient[:, row_ids] = 0
                to_hidden[part] = (gradient.to(hidden.dtype) @ weight).addmm_(of_rows[part], narrow)
        ctx.save_for_backward(hidden, to_hidden, of_rows)
        return losses

    @staticmethod
    def backward(ctx, upstream):
        hidden, to_hidden, of_rows = ctx.saved_tensors
        scale = upstream[:, None]
        return (scale * to_hidden).to(hidden.dtype), None, (scale * of_rows).T @ hidden.float(), None, None


def head_losses(head: torch.nn.Module, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross entropy [N] in float32 of hidden states [N, d] and labels [N] through an output head.

    The head must be frozen but for rows that PEFT trains; see `has_frozen_head`.
    """
    adapter = getattr(head, "token_adapter", None)
    weight = (head if adapter is None else adapter.base_layer).weight
    if adapter is None:
        rows, row_ids = weight[:0], []
    else:
        rows, row_ids = adapter.trainable_tokens_delta["default"], adapter.token_indices["default"]
    row_ids = torch.as_tensor(row_ids, dtype=torch.long, device=hidden.device)
    with torch.autocast(hidden.device.type, enabled=False):
        return _CrossEntropy.apply(hidden.to(weight.dtype), weight, rows, row_ids, labels)


def has_frozen_head(head: torch.nn.Module) -> bool:
    """Whether `head_losses` serves a head: linear, frozen, without bias, some rows trained by PEFT or none."""
    adapter = getattr(head, "token_adapter", None)
    base = head if adapter is None else adapter.base_layer
    if adapter is not None and set(adapter.trainable_tokens_delta) != {"default"}:
        return False
    return type(base) is torch.nn.Linear and base.bias is None and not base.weight.requires_grad


class _LoraProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, down, up, scale):
        """X [N, in], frozen weight [out, in] and bias, down [r, in], up [out, r] -> [N, out]."""
        down, up = down.to(x.dtype), (scale * up).to(x.dtype)
        low = x @ down.T
        ctx.save_for_backward(x, low, weight, down, up)
        ctx.scale = scale
        return linear(x, weight, bias).addmm_(low, up.T)

    @staticmethod
    def backward(ctx, gradient):
        x, low, weight, down, up = ctx.saved_tensors
        to_low = gradient @ up
        to_x = (gradient @ weight).addmm_(to_low, down) if ctx.needs_input_grad[0] else None
        return to_x, None, None, (to_low.T @ x).float(), ctx.scale * (gradient.T @ low).float(), None


def fuse_adapter(model: torch.nn.Module) -> None:
    """Gives the LoRA layers and the embeddings of a PEFT model that is trained under autocast the forms above.

    A layer that is more than plain LoRA (dropout, biases that are trained, variants such as DoRA) stays as it is.
    """
    for module in model.modules():
        if isinstance(module, LoraLinear) and _is_plain(module):
            module.forward = functools.partial(_lora_forward, module)
        elif isinstance(module, TrainableTokensLayer) and type(module.base_layer) is torch.nn.Embedding:
            module.forward = functools.partial(_embed, module)


def _is_plain(layer: LoraLinear) -> bool:
    base = layer.get_base_layer()
    return (
        type(base) is torch.nn.Linear
        and set(layer.lora_A) == {"default"}
        and not layer.lora_variant
        and layer.lora_B["default"].bias is None
        and not any(parameter.requires_grad for parameter in base.parameters())
    )


def _lora_forward(layer: LoraLinear, x: torch.Tensor) -> torch.Tensor:
    dropout = layer.lora_dropout["default"]
    if layer.merged or layer.disable_adapters or (layer.training and getattr(dropout, "p", 0)):
        return type(layer).forward(layer, x)
    base, device = layer.get_base_layer(), x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    bias = None if base.bias is None else base.bias.to(dtype)
    with torch.autocast(device, enabled=False):
        flat = x.reshape(-1, x.shape[-1]).to(dtype)
        product = _LoraProduct.apply(flat, base.weight.to(dtype), bias, down, up, layer.scaling["default"])
    return product.view(*x.shape[:-1], -1)


def _embed(layer: TrainableTokensLayer, ids: torch.Tensor) -> torch.Tensor:
    if layer.merged or layer.disable_adapters:
        return type(layer).forward(layer, ids)
    vectors = embedding(ids, layer.base_layer.weight)
    for row, token in zip(layer.trainable_tokens_delta["default"], layer.token_indices["default"], strict=True):
        vectors = torch.where((ids == token)[..., None], row.to(vectors.dtype), vectors)
    return vectors
