"""Knocking out heads: what the answer loses when a head is silent.

Method:
1. A head's output at a row is set to zero where it enters the attention's output projection; every other row, head and
   layer computes as before. (Zero, not the mean: what is measured is the head's whole contribution there.)
2. A head is silenced at the answer (role "reader": the last block's end token and the answer itself) or at the slots
   (role "writer"). Either takes away all that the head reads there, from memory and from the question alike; these are
   told apart by `patching.CUTS`.
3. The effect is the change of the gold answer's log probability (all its tokens, EOS included, banned ids ruled out),
   and whether greedy decoding still says exactly the gold answer, both by teacher forcing in one pass per batch.

Knows projections and rows. Knows nothing of attention weights.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Literal

import numpy as np
import torch
from torch import nn

from rim_probe.errors import CheckpointError, RiMError
from rim_probe.evaluation import can_ask
from rim_probe.model import RiM
from rim_probe.packing import IGNORED, pack_text, pad_rows
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
    for name, projection in product(_ATTENTIONS, _PROJECTIONS):
        if isinstance(found := getattr(getattr(modules[layer - 1], name, None), projection, None), nn.Module):
            return found
    raise CheckpointError(
        f"{rim.name}: no output projection was found in the attention of {type(modules[layer - 1]).__name__}; "
        "heads of this family cannot be knocked out."
    )


@contextmanager
def silence(rim: RiM, heads: Iterable[Head], rows: torch.Tensor) -> Iterator[None]:
    """Sets the outputs of `heads` to zero at `rows` (bool [B, T]) while the context lasts."""
    by_layer: dict[int, list[int]] = {}
    count = num_heads(rim)
    for layer, head in heads:
        if not 1 <= head <= count:
            raise RiMError(f"There is no head {head!r}; heads are 1 to {count}.")
        by_layer.setdefault(layer, []).append(head - 1)
    with ExitStack() as hooks:
        for layer, chosen in by_layer.items():
            silent = torch.isin(torch.arange(count), torch.tensor(chosen))
            mask = (rows.cpu()[..., None] & silent)[..., None].to(rim.device)

            def hook(module, args, mask=mask):
                states = args[0].unflatten(-1, (count, -1))
                return (states.masked_fill(mask, 0).flatten(-2), *args[1:])

            hooks.callback(output_projection(rim, layer).register_forward_pre_hook(hook).remove)
        yield


@dataclass(frozen=True)
class GoldScores:
    """log_probability [n] of the gold answers; says [n]: greedy decoding gives exactly the gold answer."""

    log_probability: np.ndarray
    says: np.ndarray


def fitting(rim: RiM, problems: Sequence[Problem], num_blocks: int | None = None) -> list[Problem]:
    """The problems that can be asked and whose question, memory and gold answer fit into the context together."""
    return [
        problem
        for problem in problems
        if can_ask(rim, problem.question, "memory", num_blocks)
        and len(rim.prompt_ids(problem.question, "memory", num_blocks)) + len(rim.encoder.answer_ids(problem.answer))
        <= rim.max_length + 1
    ]


class GoldScorer:
    """Gold answers of n problems behind K memory blocks, packed once and scored under any number of knockouts.

    Args:
        problems: problems with an answer; those that do not fit (`fitting`) are left out.

    Attributes:
        problems: the n problems that are scored.

    Raises:
        RiMError: no problem that fits into the context.
    """

    def __init__(self, rim: RiM, problems: Sequence[Problem], num_blocks: int | None = None):
        problems = fitting(rim, problems, num_blocks)
        if not problems:
            raise RiMError(f"No question fits into {rim.max_length} tokens with its answer; give shorter problems.")
        self.rim, self.problems, self.n = rim, problems, len(problems)
        rows = [
            pack_text(rim.prompt_ids(one.question, "memory", num_blocks), rim.encoder.answer_ids(one.answer))
            for one in problems
        ]
        order = sorted(range(self.n), key=lambda i: len(rows[i]))
        self._batches = [
            (batch, pad_rows([rows[i] for i in batch], rim.eos_id))
            for batch in (order[start : start + BATCH] for start in range(0, self.n, BATCH))
        ]
        self._banned = torch.tensor(rim.banned_ids, dtype=torch.long, device=rim.device)

    @torch.inference_mode()
    def scores(self, heads: Sequence[Head] = (), role: Role = "reader") -> GoldScores:
        """Scores with `heads` silent at the rows of a role (step 2)."""
        log_probability, says = np.zeros(self.n), np.zeros(self.n, dtype=bool)
        model = causal_lm(self.rim)
        for batch, padded in self._batches:
            ids, labels = (padded[name].to(self.rim.device) for name in ("input_ids", "labels"))
            wanted, slots = labels != IGNORED, ids == self.rim.memory_ids[1]
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
