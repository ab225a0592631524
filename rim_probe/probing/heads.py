"""Knocking out attention heads: what the answer loses when a head is silent for chosen tokens.

Method:
1. A head's output at a row is set to zero where it enters the attention's output projection; every other row, head and
   layer computes as before. (Zero, not the mean: what is measured is the head's whole contribution there.)
2. A head as a reader of memory is silenced at the rows that speak the answer (the last block's end token and the answer
   itself), as a writer of memory at the slots.
3. The effect is the change of the gold answer's log probability (all its tokens, EOS included, banned ids ruled out),
   and whether greedy decoding still says exactly the gold answer, both by teacher forcing in one pass per batch.

Knows projections and rows. Knows nothing of attention weights.
"""

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import nn

from rim_probe.errors import CheckpointError, RiMError
from rim_probe.model import RiM
from rim_probe.probing.hooks import causal_lm, decoder_layers
from rim_probe.problems import Problem

Role = Literal["reader", "writer"]
Head = tuple[int, int]  # decoder layer 1..L, head 1..H
BATCH = 64
_ATTENTIONS = ("self_attn", "attn", "attention")
_PROJECTIONS = ("o_proj", "c_proj", "dense", "out_proj")


def num_heads(rim: RiM) -> int:
    """H, the query heads of a layer."""
    return causal_lm(rim).config.num_attention_heads


def output_projection(rim: RiM, layer: int) -> nn.Module:
    """The output projection of the attention of decoder layer 1..L; its input holds the heads side by side.

    Raises:
        CheckpointError: a family that names its attention otherwise. RiMError: no such layer.
    """
    modules = decoder_layers(rim)
    if not 1 <= layer <= len(modules):
        raise RiMError(f"There is no attention in layer {layer!r}; decoder layers are 1 to {len(modules)}.")
    for name in _ATTENTIONS:
        attention = getattr(modules[layer - 1], name, None)
        for projection in _PROJECTIONS:
            if isinstance(found := getattr(attention, projection, None), nn.Module):
                return found
    raise CheckpointError(
        f"{rim.name}: no output projection was found in the attention of {type(modules[layer - 1]).__name__}; "
        "heads of this family cannot be knocked out."
    )


@contextmanager
def silence(rim: RiM, heads: Iterable[Head], rows: torch.Tensor) -> Iterator[None]:
    """Sets the outputs of `heads` to zero at `rows` (bool [B, T]) on passes of this thread, while the context lasts."""
    by_layer: dict[int, list[int]] = {}
    count = num_heads(rim)
    for layer, head in heads:
        if not 1 <= head <= count:
            raise RiMError(f"There is no head {head!r}; heads are 1 to {count}.")
        by_layer.setdefault(layer, []).append(head - 1)
    thread = threading.get_ident()

    def hook_for(chosen: list[int]):
        silent = torch.zeros(count, dtype=torch.bool)
        silent[chosen] = True

        def hook(module, args):
            if threading.get_ident() != thread:
                return None
            states = args[0].unflatten(-1, (count, -1))
            mask = rows.to(states.device)[..., None] & silent.to(states.device)
            return (states.masked_fill(mask[..., None], 0).flatten(-2), *args[1:])

        return hook

    with ExitStack() as hooks:
        for layer, chosen in by_layer.items():
            handle = output_projection(rim, layer).register_forward_pre_hook(hook_for(chosen))
            hooks.callback(handle.remove)
        yield


@dataclass(frozen=True)
class GoldScores:
    """log_probability [n] of the gold answers; says [n]: greedy decoding gives exactly the gold answer."""

    log_probability: np.ndarray
    says: np.ndarray


class GoldScorer:
    """Gold answers of n problems behind K memory blocks, packed once and scored under any number of knockouts.

    Args:
        problems: problems with an answer; those that leave no room for it are refused.

    Raises:
        RiMError: a question that cannot be asked, or an answer that does not fit into the context.
    """

    def __init__(self, rim: RiM, problems: Sequence[Problem], num_blocks: int | None = None):
        self.rim, self.n = rim, len(problems)
        blocks, layout = rim.layout.check_blocks(num_blocks), rim.layout
        prompts = [rim.prompt_ids(problem.question, "memory", num_blocks) for problem in problems]
        answers = [rim.encoder.answer_ids(problem.answer) for problem in problems]
        longest = max((len(p) + len(a) - 1 for p, a in zip(prompts, answers, strict=True)), default=0)
        if longest > rim.max_length:
            raise RiMError(
                f"A question and its answer need {longest} tokens, but this model reads {rim.max_length}; "
                "leave that problem out."
            )
        order = sorted(range(self.n), key=lambda i: len(prompts[i]))
        self._batches = []
        for start in range(0, self.n, BATCH):
            batch = order[start : start + BATCH]
            length = max(len(prompts[i]) + len(answers[i]) - 1 for i in batch)
            ids = torch.full((len(batch), length), rim.eos_id)
            labels = torch.full((len(batch), length), -1)
            slots = torch.zeros((len(batch), length), dtype=torch.bool)
            for row, i in enumerate(batch):
                prompt, answer = prompts[i], answers[i]
                text = prompt + answer[:-1]
                ids[row, : len(text)] = torch.tensor(text)
                labels[row, len(prompt) - 1 : len(text)] = torch.tensor(answer)
                place = len(prompt) - blocks * layout.block_length
                slots[row, torch.tensor(layout.slot_positions(place, blocks)).flatten().long()] = True
            self._batches.append((batch, ids.to(rim.device), labels.to(rim.device), slots.to(rim.device)))
        self._banned = torch.tensor(rim.banned_ids, dtype=torch.long, device=rim.device)

    @torch.inference_mode()
    def scores(self, heads: Sequence[Head] = (), role: Role = "reader") -> GoldScores:
        """Scores with `heads` silent at the rows of a role (step 2)."""
        log_probability, says = np.zeros(self.n), np.zeros(self.n, dtype=bool)
        model = causal_lm(self.rim)
        for batch, ids, labels, slots in self._batches:
            wanted = labels >= 0
            with silence(self.rim, heads, wanted if role == "reader" else slots):
                # Causal text with its padding on the right needs no mask: no token sees what stands after it.
                states = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
            logits = model.get_output_embeddings()(states[wanted]).float()
            logits = logits.index_fill(-1, self._banned, -torch.inf).log_softmax(-1)
            gold = labels[wanted]
            chosen = logits.gather(1, gold[:, None])[:, 0]
            rows = torch.nonzero(wanted)[:, 0]
            total = torch.zeros(len(batch), device=ids.device).index_add_(0, rows, chosen)
            missed = torch.zeros(len(batch), device=ids.device).index_add_(0, rows, (logits.argmax(-1) != gold).float())
            log_probability[batch] = total.cpu().numpy()
            says[batch] = (missed == 0).cpu().numpy()
        return GoldScores(log_probability, says)

    def each_head(self, heads: Iterable[Head], role: Role) -> Mapping[Head, GoldScores]:
        """The scores with each of `heads` silenced alone."""
        return {head: self.scores([head], role) for head in heads}
