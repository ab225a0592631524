"""A RiM as TransformerLens knows models: for notebooks written with its hook names, caches and patching functions.

Method:
1. The transformers model is copied (TransformerLens rewires what it is given), adapters of PEFT are merged into the
   copy, and its attention is set to `eager`: with `sdpa` some families (OPT) would show no attention pattern.
2. `build_bridge_from_module` wraps the copy without a tokenizer. TransformerLens' own tokenisation drops tokens that
   were added in memory, or puts a token before the text that shifts every slot; input ids are ours.

Knows how to wrap. Knows nothing of questions or probes: rim_probe itself reads models by plain hooks (`hooks`), which
costs no import of nine seconds, and a test holds both to the same numbers.
"""

import copy
from typing import TYPE_CHECKING

from rim_probe.errors import RiMError
from rim_probe.model import RiM

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


def to_transformer_lens(rim: RiM) -> "TransformerBridge":
    """A `TransformerBridge` over a copy of the model, in eval mode on its device; `rim` stays as it is.

    Input ids come from `rim.prompt_ids`, never from the bridge's own tokenisation (it has no tokenizer):

        bridge = to_transformer_lens(rim)
        ids = torch.tensor([rim.prompt_ids(question, "memory")], device=rim.device)
        logits, cache = bridge.run_with_cache(ids, names_filter=lambda name: name.endswith("hook_resid_post"))
        first = len(rim.encode_question(question))
        slots = cache["blocks.5.hook_resid_post"][0, rim.layout.slot_positions(first)]  # [K, M, d]

    `blocks.i.hook_resid_post` is layer i + 1 of a `Capture`, `blocks.i.attn.hook_pattern` [B, H, T, T] its attention
    layer i (rows of `to_question` and `to_memory`). Right padding needs no mask, since nothing sees what stands right
    of it. An unfiltered `run_with_cache` holds some 100 tensors of every layer: filter names.

    Raises:
        RiMError: TransformerLens is not installed, or lacks the model's architecture.
    """
    try:
        from transformer_lens.model_bridge.sources import build_bridge_from_module
    except ImportError as error:
        raise RiMError(
            f"TransformerLens cannot be imported ({error}); install it with `pip install transformer-lens`."
        ) from None
    model = copy.deepcopy(rim.model)
    if hasattr(model, "merge_and_unload"):
        model = model.merge_and_unload()
    model.set_attn_implementation("eager")
    architecture = type(model).__name__
    try:
        return build_bridge_from_module(model, architecture, hf_config=model.config, tokenizer=None)
    except ValueError as error:
        if "Unsupported architecture" not in str(error):
            raise
        raise RiMError(
            f"{rim.name}: TransformerLens does not know the architecture {architecture}; probe it with rim_probe's own "
            "capture and hooks, which need no TransformerLens."
        ) from None
