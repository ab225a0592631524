"""Activation patching of one question's memory blocks: many edits of the residual stream for little more than one pass.

Method:
1. One pass over question, blocks and the target answers gives the keys and values of every layer and the states of
   every block: the clean run. Each answer follows the last block and sees nothing of the others (`packing.visible`).
2. Nothing before the first patched block can change, so edits are grouped by that block; a group runs the tokens from
   there on, and attends to the clean keys and values before, held once and expanded over the batch.
3. Nothing below the first patched layer can change either: a group starts as one clean row, and an edit joins the batch
   at its layer, as a copy of the clean row with the patched positions overwritten. Lower layers are never computed
   for it.
4. Teacher-forced target tokens give log probabilities, and whether greedy decoding says exactly the target: it does
   if and only if each of its tokens, EOS included, is the most probable one after banned ids are ruled out.
5. A route may be cut by the mask, in all layers (`CUTS`). The answer's tokens are the end of the last block, where its
   first token is read, and all that follow. The question's first token stays visible: it has seen nothing but itself,
   and language models rest the attention there that they do not need.
6. `Patcher.answers` decodes freely instead: all readouts of every variant as one batch.

The clean row in each batch is what an edit is compared with, so an edit that changes nothing is equal bit by bit.

Knows positions, masks, caches and batches. Knows nothing of what is put in (see `interventions`), of steps or scores.
Sources: activation patching as in Meng et al. 2022 (arXiv:2202.05262) and Zhang & Nanda 2024 (arXiv:2309.16042);
attention knockout as in Geva et al. 2023 (arXiv:2304.14767).
"""

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers.cache_utils import Cache, DynamicLayer

from rim_probe.decoding import Answer, answer_batch
from rim_probe.door import tolerance
from rim_probe.errors import RiMError
from rim_probe.greedy import check_attention, keeps_logits
from rim_probe.model import RiM
from rim_probe.packing import additive_mask, visible
from rim_probe.probing.hooks import edit_residual, num_layers

MAX_ROWS = 64
INTERVENING = "intervening in it"
CUTS = {
    "question": "the answer's tokens see nothing of the question",
    "memory": "the answer's tokens see nothing of the blocks, but the end of the last one where they begin",
    "slots": "no token but slots sees a slot",
    "ends": "no token sees the end of another block",
}


@dataclass(frozen=True)
class Edit:
    """What is written into the residual stream after one layer, [c] positions.

    Attributes:
        layer: 0..L.
        columns: int64 [c], counted from the first token of the first block.
        values: [c, d]; None writes the clean run's own states back, which changes nothing.
        add: whether `values` are added to the states rather than put in their place.
    """

    layer: int
    columns: torch.Tensor
    values: torch.Tensor | None
    add: bool = False


Edits = Sequence[Edit]
"""One variant of a run: edits at one layer or several."""


@dataclass(frozen=True)
class Scores:
    """n variants, A target answers; float32 and bool on the CPU.

    Attributes:
        log_probability [n, A]: of all tokens of the target, EOS included, after banned ids are ruled out.
        says [n, A]: greedy decoding gives exactly the target.
        clean [n, A]: the log probability of the clean row in the same batch.
    """

    log_probability: torch.Tensor
    says: torch.Tensor
    clean: torch.Tensor


class Patcher:
    """One question whose clean run is held, ready for any number of variants.

    Args:
        targets: A answers as token ids, each ended by EOS (`Encoder.answer_ids`), scored after the last block.
        num_blocks: K, None for the layout's own.
        cut: names of `CUTS`, which hold for the clean run and every variant.

    Attributes:
        memory [L + 1, K, M + 2, d]: the clean states of every block token, begin, slots, end; on the model's device.
        log_probability, says [A]: the clean run's scores.
        K, block_length: blocks, and tokens in each.

    Raises:
        RiMError: a question that cannot be asked, or that does not fit with the targets; or a model that does not run
            on as it was when nothing is changed.
    """

    @torch.inference_mode()
    def __init__(
        self,
        rim: RiM,
        question: str,
        targets: Sequence[Sequence[int]] = (),
        *,
        num_blocks: int | None = None,
        cut: Collection[str] = (),
    ):
        check_attention(rim)
        if rim.model.training:
            rim.model.eval()
        self.rim, self.question, self.targets = rim, question, [list(target) for target in targets]
        self.K, self.block_length = rim.layout.check_blocks(num_blocks), rim.layout.block_length
        prompt = rim.prompt_ids(question, "memory", num_blocks)
        self._length, self._first = len(prompt), len(prompt) - self.K * self.block_length
        longest = max(map(len, self.targets), default=1)
        if len(prompt) + longest - 1 > rim.max_length:
            raise RiMError(
                f"The question and an answer of {longest} tokens do not fit into {rim.max_length} tokens; shorten them."
            )
        if self.K:
            rim.verdict.require(INTERVENING, lambda: _fault(rim, question, num_blocks))
        ids, positions, readouts = list(prompt), list(range(len(prompt))), [0] * len(prompt)
        self._predicts = []  # of each target the logits, counted from the last prompt token, that predict its tokens
        for number, target in enumerate(self.targets, start=1):
            begin = len(ids) - len(prompt) + 1
            self._predicts.append([0, *range(begin, begin + len(target) - 1)])
            ids += target[:-1]
            positions += range(len(prompt), len(prompt) + len(target) - 1)
            readouts += [number] * (len(target) - 1)
        self._ids, self._positions = (torch.tensor(row, device=rim.device) for row in (ids, positions))
        numbers = torch.tensor(readouts)
        self._sees = visible(numbers, numbers) & torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
        self._sees &= ~self._hidden(cut)
        self._cache = Cache(layers=[_Layer() for _ in range(num_layers(rim))])
        states: list[torch.Tensor] = []

        def read(hidden):
            states.append(hidden[0, self._first : self._length].clone())
            return hidden

        with edit_residual(rim, dict.fromkeys(range(num_layers(rim) + 1), read)):
            logits = self._forward(0, self._cache)
        self.memory = torch.stack(states).unflatten(1, (self.K, self.block_length))
        self.log_probability, self.says = (scores[0] for scores in self._score(logits))

    def edits(
        self,
        states: torch.Tensor | None,
        blocks: Sequence[int],
        layers: Sequence[int] | None = None,
        positions: Sequence[int] | None = None,
        add: bool = False,
    ) -> list[Edit]:
        """The swap: states [L + 1, K, M + 2, d] put in at blocks 1..K, by default at the slots in all of 1..L.

        Args:
            states: such as another question's `memory`; None for the question's own, which changes nothing.
            positions: 0 (begin) to M + 1 (end); None for the slots.
        """
        positions = range(1, self.block_length - 1) if positions is None else positions
        places = [(block - 1, position) for block in blocks for position in positions]
        columns = torch.tensor([block * self.block_length + position for block, position in places], dtype=torch.long)
        block, position = torch.tensor(places, dtype=torch.long).reshape(-1, 2).T
        return [
            Edit(layer, columns, None if states is None else states[layer, block, position], add)
            for layer in (range(1, len(self.memory)) if layers is None else layers)
        ]

    @torch.inference_mode()
    def score(self, variants: Sequence[Edits], max_rows: int = MAX_ROWS) -> Scores:
        """The targets' scores under every variant."""
        shape = len(variants), len(self.targets)
        log_probability, says = (x.expand(shape).clone() for x in (self.log_probability, self.says))
        clean = log_probability.clone()
        for start, members in self._groups(variants, max_rows):
            logs, found = self._score(self._run(start, [variants[i] for i in members]))
            log_probability[members], says[members], clean[members] = logs[1:], found[1:], logs[:1]
        return Scores(log_probability, says, clean)

    def answers(self, variants: Sequence[Edits], max_new_tokens: int = 256) -> list[Answer]:
        """All readouts under each variant, decoded greedily as one batch without cuts; an empty one is clean."""
        by_layer: dict[int, list[tuple[int, Edit]]] = {}
        for row, edits in enumerate(variants):
            for edit in edits:
                by_layer.setdefault(edit.layer, []).append((row, edit))

        def patch(layer: int):
            def function(states: torch.Tensor) -> torch.Tensor:
                if states.shape[1] != self._length:  # the passes after the first bring the readouts' own tokens
                    return states
                states = states.clone()
                for row, edit in by_layer[layer]:
                    _write(states, row, edit, self._first)
                return states

            return function

        with edit_residual(self.rim, {layer: patch(layer) for layer in by_layer}):
            asked = [self.question] * len(variants)
            return answer_batch(self.rim, asked, "memory", num_blocks=self.K, max_new_tokens=max_new_tokens)

    def _hidden(self, cut: Collection[str]) -> torch.Tensor:
        """What the cuts take from view, bool [T, T]."""
        column = torch.arange(len(self._ids))
        place = (column - self._first) % self.block_length
        answer, question = column >= self._length - 1, (column > 0) & (column < self._first)
        memory = (column >= self._first) & ~answer
        slot, end = memory & (place > 0) & (place < self.block_length - 1), memory & (place == self.block_length - 1)
        routes = {
            "question": answer[:, None] & question,
            "memory": answer[:, None] & memory,
            "slots": ~slot[:, None] & slot,
            "ends": (column[:, None] != column) & end,
        }
        if unknown := set(cut) - set(routes):
            raise RiMError(f"There is no route {min(unknown)!r} to cut; choose from {', '.join(routes)}.")
        return torch.stack([torch.zeros_like(routes["ends"]), *(routes[name] for name in cut)]).any(0)

    def _groups(self, variants: Sequence[Edits], max_rows: int) -> Iterator[tuple[int, list[int]]]:
        """The column to start from, and variants with the same first block, those that join at lower layers first."""
        by_block: dict[int, list[int]] = {}
        for i, edits in enumerate(variants):
            if columns := [int(edit.columns.min()) for edit in edits]:
                by_block.setdefault(min(columns) // self.block_length, []).append(i)
        for block, members in sorted(by_block.items()):
            ordered = sorted(members, key=lambda i: min(edit.layer for edit in variants[i]))
            for first in range(0, len(ordered), max_rows):
                yield self._first + block * self.block_length, ordered[first : first + max_rows]

    def _run(self, start: int, variants: Sequence[Edits]) -> torch.Tensor:
        """Logits [1 + n, kept, V] of the clean row and of variants, those that join at lower layers first."""
        by_layer: dict[int, list[tuple[int, Edit]]] = {}
        for row, edits in enumerate(variants, start=1):
            for edit in edits:
                by_layer.setdefault(edit.layer, []).append((row, edit))
        rows = {layer: 1 + sum(min(e.layer for e in edits) <= layer for edits in variants) for layer in by_layer}

        def patch(layer: int):
            def function(states: torch.Tensor) -> torch.Tensor:
                states = torch.cat([states, states[:1].expand(rows[layer] - len(states), -1, -1)])
                for row, edit in by_layer[layer]:
                    _write(states, row, edit, self._first - start)
                return states

            return function

        held = [_Layer(layer.keys[:, :, :start], layer.values[:, :, :start]) for layer in self._cache.layers]
        with edit_residual(self.rim, {layer: patch(layer) for layer in by_layer}):
            return self._forward(start, Cache(layers=held))

    def _forward(self, start: int, cache: Cache) -> torch.Tensor:
        """Logits [B, kept, V] from the last prompt token on; the columns before `start` are in the cache."""
        kept = len(self._ids) - self._length + 1
        choose = {"logits_to_keep": kept} if keeps_logits(self.rim.model) else {}
        logits = self.rim.model(
            input_ids=self._ids[None, start:],
            position_ids=self._positions[None, start:],
            attention_mask=additive_mask(self._sees[None, start:].to(self.rim.device), self.rim.dtype),
            past_key_values=cache,
            use_cache=True,
            **choose,
        ).logits
        return logits[:, -kept:]

    def _score(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Log probability and whether it would be said, [n, A], from logits [n, kept, V]."""
        banned = torch.tensor(self.rim.banned_ids, dtype=torch.long, device=logits.device)
        logs = logits.float().index_fill(-1, banned, -math.inf).log_softmax(-1)
        best = logs.max(-1).indices  # max, not argmax, which is slower on a CPU
        total, says = torch.zeros(len(logs), len(self.targets)), torch.ones(len(logs), len(self.targets)).bool()
        for a, (at, target) in enumerate(zip(self._predicts, self.targets, strict=True)):
            ids = torch.tensor(target, device=logs.device)
            total[:, a] = logs[:, at, ids].sum(-1).cpu()
            says[:, a] = (best[:, at] == ids).all(-1).cpu()
        return total, says


def _write(states: torch.Tensor, row: int, edit: Edit, first: int) -> None:
    """Does an edit to states [B, T, d] whose column `first` is the first token of block 1; row 0 is the clean one."""
    columns = edit.columns.to(states.device) + first
    new = states[0, columns] if edit.values is None else edit.values.to(states)
    states[row, columns] = states[row, columns] + new if edit.add else new


class _Layer(DynamicLayer):
    """Keys and values of a clean prefix, held once and expanded to whatever batch comes; the first pass fills it."""

    def __init__(self, keys: torch.Tensor | None = None, values: torch.Tensor | None = None):
        super().__init__()
        if keys is not None:
            self.lazy_initialization(keys, values)
            self.keys, self.values = keys, values

    def update(self, key_states, value_states, *args, **kwargs):
        if not self.is_initialized:
            return super().update(key_states, value_states)
        held = [x.expand(len(key_states), -1, -1, -1) for x in (self.keys, self.values)]
        return tuple(torch.cat(pair, dim=-2) for pair in zip(held, (key_states, value_states), strict=True))


@torch.inference_mode()
def _fault(rim: RiM, question: str, num_blocks: int | None) -> str | None:
    """Whether a run into which its own states are written scores as a plain pass does, and how far it is off."""
    target = [rim.eos_id]  # which fits wherever a question does
    clean = Patcher(rim, question, [target], num_blocks=num_blocks)
    own = clean.edits(clean.memory, [1], positions=range(clean.block_length))
    ids = torch.tensor([rim.prompt_ids(question, "memory", num_blocks)], device=rim.device)
    plain, _ = clean._score(rim.model(input_ids=ids, use_cache=False).logits[:, -1:])
    missed = (clean.score([own, *([edit] for edit in own)]).log_probability - plain).abs().max().item()
    return f"its own states written back change a score by {missed:.2g}" if missed > tolerance(rim.dtype) else None
