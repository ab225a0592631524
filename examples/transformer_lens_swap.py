"""A block swapped by TransformerLens' own hooks: cache the partner's run, patch the slots, read the answer.

python examples/transformer_lens_swap.py checkpoints/glass-box "what is 3 + 2 - 1 + 4 ?" "what is 3 + 1 - 1 + 4 ?" 1
"""

import sys

import torch

from rim_probe.model import RiM
from rim_probe.probing.transformer_lens import to_transformer_lens


def swap(rim: RiM, question: str, partner: str, block: int) -> list[str]:
    """The first token of the answer without and with the slots of one block from another question, at all layers."""
    bridge = to_transformer_lens(rim)
    own, other = (torch.tensor([rim.prompt_ids(text, "memory")]) for text in (question, partner))
    to, source = (rim.layout.slot_positions(len(rim.encode_question(text)))[block - 1] for text in (question, partner))
    _, cache = bridge.run_with_cache(other, names_filter=lambda name: name.endswith("hook_resid_post"))

    def patched(name: str):
        def patch(states, hook):
            states[:, to] = cache[name][:, source]
            return states

        return name, patch

    hooks = [patched(f"blocks.{layer}.hook_resid_post") for layer in range(bridge.cfg.n_layers)]
    with torch.no_grad():
        runs = bridge(own), bridge.run_with_hooks(own, fwd_hooks=hooks)
    return [rim.decode([int(logits[0, -1].argmax())]) for logits in runs]


if __name__ == "__main__":
    checkpoint, question, partner, block = sys.argv[1:]
    before, after = swap(RiM.from_pretrained(checkpoint, "cpu"), question, partner, int(block))
    print(f"{before} before, {after} with block {block} of the partner")
