"""The greedy loop: R readouts for each of B prompts in one KV cache.

The loop, for B prompts and R readouts of each (R = 1 for chain of thought and direct):
1. One prefix pass over every prompt, padded on the left. `question + K blocks` is plain causal text, and the logits at
   the end of block k give the first token of readout k, so this one pass starts all K readouts.
2. Every further pass feeds one token per live readout, all of them into the same cache rows. The rule of
   `packing.visible` keeps readouts apart: readout k sees the question, blocks 1..k and its own earlier tokens, and its
   positions continue from the end of block k. No cache is copied, and each readout equals, token by token, the one
   decoded alone after k blocks.
Readouts that have ended leave the query; passes stop when none is left. Questions that have ended leave the batch,
cache and all, once they are half of it: the longest answer of a batch does not keep all of them at work.

Knows ids, masks and the cache. Knows nothing of methods, texts or clocks.
"""

import inspect
import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from transformers import DynamicCache

from rim_probe.errors import RiMError
from rim_probe.model import RiM
from rim_probe.packing import additive_mask, visible

_MASKED_ATTENTION = ("sdpa", "eager")


@dataclass
class Trace:
    """One readout as it grows."""

    limit: int
    ids: list[int] = field(default_factory=list)
    log_probability: float = 0.0
    ended: bool = False
    truncated: bool = False

    def push(self, token: int, log_probability: float, eos_id: int) -> None:
        """Adds a token, and ends the readout at EOS or at its limit."""
        self.ids.append(token)
        self.log_probability += log_probability
        self.truncated = token != eos_id and len(self.ids) == self.limit
        self.ended = token == eos_id or self.truncated


@dataclass(frozen=True)
class Token:
    """One generated token: the readout's index (not its block number), the id, and the readout it was added to."""

    readout: int
    id: int
    trace: Trace


class Greedy:
    """Greedy decoding of R readouts for each of B prompts in one KV cache of B rows.

    Args:
        prompts: B lists of ids.
        tails: [R] the number of prompt tokens after the point where a readout begins, the same for every prompt.
        max_new_tokens: bound for every readout; or one per prompt, [B].
        positions: B lists of position ids, where they are not 0, 1, 2, ...

    Attributes:
        traces: [B][R], what has been generated.
        forward_passes, cancelled, kv_cache_bytes: how far it came and what it holds.
    """

    def __init__(
        self,
        rim: RiM,
        prompts: list[list[int]],
        tails: list[int],
        max_new_tokens: int | list[int],
        positions: list[list[int]] | None = None,
    ):
        limits = max_new_tokens if isinstance(max_new_tokens, list) else [max_new_tokens] * len(prompts)
        for limit in limits:
            if not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
                raise RiMError(f"max_new_tokens must be a whole number of at least 1, not {limit!r}.")
        if rim.model.training:
            rim.model.eval()  # a model in the middle of its training would answer with dropout
        self._model, self._dtype, self._eos_id, self._max_length = rim.model, rim.dtype, rim.eos_id, rim.max_length
        ends = [len(prompt) for prompt in prompts] if positions is None else [given[-1] + 1 for given in positions]
        self.traces = [
            [Trace(min(limit, rim.max_length - end + tail)) for tail in tails]
            for end, limit in zip(ends, limits, strict=True)
        ]
        self.forward_passes = 0
        self.cancelled = False
        self._cache = DynamicCache()
        self._live = list(range(len(tails)))  # readouts that some row still decodes
        self._rows = list(range(len(prompts)))  # prompts that are still in the batch
        self._largest_cache = 0
        device, length = rim.device, max(map(len, prompts))
        self._banned = torch.tensor(rim.banned_ids, dtype=torch.long, device=device)
        self._columns = torch.arange(length, device=device)
        # Left padding puts the blocks of every row into the same columns; readouts begin at the columns `starts`.
        self._starts = length - torch.tensor(tails, device=device)
        self._pads = torch.tensor([[length - len(prompt)] for prompt in prompts], device=device)  # [B, 1]
        self._padded = any(len(prompt) < length for prompt in prompts)
        # Any id serves as padding: nothing sees it.
        self._inputs = torch.tensor(
            [[0] * (length - len(prompt)) + prompt for prompt in prompts], dtype=torch.long, device=device
        )
        self._positions = (self._columns - self._pads).clamp(min=0)
        if positions is not None:
            padded = [[0] * (length - len(given)) + given for given in positions]
            self._positions = torch.tensor(padded, dtype=torch.long, device=device)
        self._keep = self._starts - 1
        self._mask = self._prefix_mask() if self._padded else None
        self._own_mask = None
        if self._padded or len(tails) > 1:
            check_attention(rim)

    @property
    def kv_cache_bytes(self) -> int:
        """The most that keys and values of all rows took at any time."""
        pairs = [(getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in self._cache.layers]
        held = sum(keys.nbytes + values.nbytes for keys, values in pairs if keys is not None and values is not None)
        return max(held, self._largest_cache)

    def passes(self, cancel: threading.Event | None = None) -> Iterator[list[Token]]:
        """Runs passes until every readout has ended or `cancel` is set; yields the tokens each pass brought."""
        alive = self._live
        while alive:
            if cancel is not None and cancel.is_set():
                self.cancelled = True
                return
            # Only now: what prepares a further pass must not delay the token that the last one brought.
            if self.forward_passes:
                self._advance(alive)
            log_probabilities = self._forward().tolist()
            tokens = []
            for row, row_ids, row_logs in zip(self._rows, self._found.tolist(), log_probabilities, strict=True):
                for readout, token, log_probability in zip(self._live, row_ids, row_logs, strict=True):
                    trace = self.traces[row][readout]
                    if not trace.ended:
                        trace.push(token, log_probability, self._eos_id)
                        tokens.append(Token(readout, token, trace))
            alive = [readout for readout in self._live if not all(row[readout].ended for row in self.traces)]
            yield tokens

    @torch.inference_mode()
    def _forward(self) -> torch.Tensor:
        """One pass: finds the most probable next id of every live readout; returns its log probability [B, live]."""
        prefix = self.forward_passes == 0
        choose = {"logits_to_keep": self._keep} if prefix and keeps_logits(self._model) else {}
        logits = self._model(
            input_ids=self._inputs,
            position_ids=self._positions,
            attention_mask=self._mask,
            past_key_values=self._cache,
            use_cache=True,
            **choose,
        ).logits
        if prefix and not choose:
            logits = logits[:, self._keep]
        self.forward_passes += 1
        logits = logits.float().index_fill(-1, self._banned, -math.inf)
        # max, not argmax: on a CPU the latter is 30 times slower for one row.
        best, self._found = logits.max(dim=-1)
        return best - logits.logsumexp(dim=-1)

    @torch.inference_mode()
    def _advance(self, alive: list[int]) -> None:
        """Makes the tokens just found the input of the next pass; what has ended leaves, readouts and whole rows."""
        self._drop_rows()
        if self.forward_passes == 1:
            self._positions = self._positions[:, self._keep] + 1  # readouts go on from the ends of their blocks
            if self._padded or len(self._live) > 1:
                self._mask, self._own_mask = self._readout_masks()
        else:
            # Rows that have ended are fed until half of their batch has; their positions must stay inside the context.
            self._positions = (self._positions + 1).clamp(max=self._max_length - 1)
        self._inputs = self._found
        if len(alive) < len(self._live):
            index = torch.tensor([self._live.index(readout) for readout in alive], device=self._inputs.device)
            self._inputs, self._positions = self._inputs[:, index], self._positions[:, index]
            if self._mask is not None and self._own_mask is not None:
                self._mask, self._own_mask = self._mask[:, :, index], self._own_mask[:, :, index][..., index]
            self._live = alive
        if self._mask is not None:
            self._mask = torch.cat([self._mask, self._own_mask], dim=-1)

    def _drop_rows(self) -> None:
        """Takes the rows that have ended out of the batch, once they are half of it: moving a cache costs a pass."""
        staying = [i for i, row in enumerate(self._rows) if not all(trace.ended for trace in self.traces[row])]
        if 2 * len(staying) > len(self._rows):
            return
        self._largest_cache = self.kv_cache_bytes
        index = torch.tensor(staying, device=self._found.device)
        self._cache.batch_select_indices(index)
        self._rows = [self._rows[i] for i in staying]
        self._found, self._positions, self._pads = self._found[index], self._positions[index], self._pads[index]
        if self._mask is not None:
            self._mask = self._mask[index]
        if self._own_mask is not None:
            self._own_mask = self._own_mask[index]

    def _prefix_mask(self) -> torch.Tensor:
        """Causal text behind left padding, additive [B, 1, columns, columns]."""
        real = self._columns >= self._pads
        causal = self._columns[:, None] >= self._columns
        # Padding sees itself, so that no query is fully masked.
        itself = self._columns[:, None] == self._columns
        return additive_mask(causal & real[:, None, :] | itself, self._dtype)

    def _readout_masks(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What readouts see, additive: of the prompt [B, 1, R, columns], and of tokens fed in one pass [B, 1, R, R]."""
        numbers = torch.arange(1, len(self._starts) + 1, device=self._starts.device)
        real = self._columns >= self._pads
        before = self._columns < self._starts[:, None]
        prompt = visible(numbers, torch.zeros_like(self._columns)) & before & real[:, None, :]
        own = visible(numbers, numbers).expand(len(self._rows), -1, -1)
        return additive_mask(prompt, self._dtype), additive_mask(own, self._dtype)


def keeps_logits(model) -> bool:
    """Whether the model can compute logits at chosen positions only."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "logits_to_keep" in inspect.signature(base.forward).parameters


def check_attention(rim: RiM) -> None:
    """Refuses attention back ends that take no dense mask.

    Raises:
        RiMError: neither sdpa nor eager.
    """
    implementation = getattr(rim.model.config, "_attn_implementation", None)
    if implementation not in _MASKED_ATTENTION:
        raise RiMError(
            f"Readouts and batches need the attention back end sdpa or eager, not {implementation!r}; "
            "load the model with attention='sdpa'."
        )
