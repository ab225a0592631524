"""Activation patching of one question's memory blocks: many edits of the residual stream for little more than one pass.

Method:
1. One pass over question, blocks and the target answers (packed as isolated readouts, see `packing`) gives the keys and
   values of every layer and the states of every block: the clean run.
2. Nothing before the first patched block can change, so edits are grouped by that block; a group runs the tokens from
   there on, and attends to the clean keys and values before, held once and expanded over the batch.
3. Nothing below the first patched layer can change either: a group starts as one clean row, and an edit joins the batch
   at its layer, as a copy of the clean row with the patched positions overwritten. Lower layers are never computed
   for it.
4. Teacher-forced target tokens give log probabilities, and whether greedy decoding says exactly the target: it does
   if and only if each of its tokens, EOS included, is the most probable one after banned ids are ruled out.
5. Free decoding goes on from the keys and values of step 3 (an edit's lower layers are those of the clean row).

The clean row in each batch is what an edit is compared with, so an edit that changes nothing is equal bit by bit.

Knows positions, caches and batches. Knows nothing of what is put in (see `interventions`), of gold steps or scores.
Sources: activation patching as in Meng et al. 2022 (arXiv:2202.05262) and Zhang & Nanda 2024 (arXiv:2309.16042).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers.cache_utils import Cache, DynamicLayer

from rim_probe.door import tolerance
from rim_probe.errors import RiMError
from rim_probe.greedy import check_attention, keeps_logits
from rim_probe.model import RiM
from rim_probe.packing import additive_mask
from rim_probe.probing.hooks import edit_residual, num_layers

MAX_ROWS = 64
INTERVENING = "intervening in it"


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
    """n variants, R readouts, A target answers; float32 and bool on the CPU.

    Attributes:
        log_probability [n, R, A]: of all tokens of the target, EOS included, after banned ids are ruled out.
        says [n, R, A]: greedy decoding gives exactly the target.
        clean [n, R, A]: the log probability of the clean row in the same batch.
    """

    log_probability: torch.Tensor
    says: torch.Tensor
    clean: torch.Tensor


@dataclass(frozen=True)
class Decoded:
    """A greedily decoded answer: its ids (EOS included unless it was truncated) and their log probability."""

    token_ids: tuple[int, ...]
    log_probability: float


class Patcher:
    """One question whose clean run is held, ready for any number of variants.

    Args:
        targets: A answers as token ids, each ended by EOS (`Encoder.answer_ids`).
        readouts: the R blocks after which targets are scored; None for the last one alone.
        num_blocks: K, None for the layout's own.

    Attributes:
        memory [L + 1, K, M + 2, d]: the clean states of every block token, begin, slots, end; on the model's device.
        log_probability, says [R, A]: the clean run's scores.
        K, block_length: blocks, and tokens in each.

    Raises:
        RiMError: a question that cannot be asked, no blocks, a readout that does not exist, or a model that does not
            run on as it was when nothing is changed.
    """

    @torch.inference_mode()
    def __init__(
        self,
        rim: RiM,
        question: str,
        targets: Sequence[Sequence[int]] = (),
        *,
        readouts: Sequence[int] | None = None,
        num_blocks: int | None = None,
    ):
        check_attention(rim)
        if rim.model.training:
            rim.model.eval()
        self.rim, self.question = rim, question
        self.K, self.block_length = rim.layout.check_blocks(num_blocks), rim.layout.block_length
        if self.K == 0:
            raise RiMError("There is nothing to intervene on without memory blocks; choose at least one.")
        self.readouts = (self.K,) if readouts is None else tuple(readouts)
        for block in self.readouts:
            if isinstance(block, bool) or not isinstance(block, int) or not 1 <= block <= self.K:
                raise RiMError(f"There is no readout {block!r}; readouts are numbered 1 to {self.K}.")
        self.targets = [list(target) for target in targets]
        prompt = rim.prompt_ids(question, "memory", num_blocks)
        self._blocks = self.K * self.block_length
        self._question = len(prompt) - self._blocks
        longest = max(map(len, self.targets), default=1)
        if len(prompt) + longest - 1 > rim.max_length:
            raise RiMError(f"The question and an answer of {longest} tokens do not fit into {rim.max_length} tokens.")
        rim.verdict.require(INTERVENING, lambda: _fault(rim, question, num_blocks))
        self._row = _Row.pack(self._question, prompt, self.targets, self.readouts, self.block_length, rim.device)
        self._cache = _cache(rim)
        states: list[torch.Tensor] = []

        def read(hidden):
            states.append(hidden[0, self._question : self._question + self._blocks].clone())
            return hidden

        with edit_residual(rim, dict.fromkeys(range(num_layers(rim) + 1), read)):
            logits = self._forward(self._row, 0, self._cache)
        self.memory = torch.stack(states).unflatten(1, (self.K, self.block_length))
        self.log_probability, self.says = (
            scores[0] for scores in self._score(logits, [*range(len(self.readouts))], self._row, 0)
        )

    def columns(self, block: int, positions: Sequence[int]) -> torch.Tensor:
        """Columns of positions 0 (begin) to M + 1 (end) of block 1..K, as an `Edit` counts them."""
        return torch.tensor([(block - 1) * self.block_length + p for p in positions], dtype=torch.long)

    def score(self, variants: Sequence[Edits], max_rows: int = MAX_ROWS) -> Scores:
        """The targets' scores under every variant."""
        shape = (len(variants), len(self.readouts), len(self.targets))
        # A readout before the first patched block sees nothing of it: it is the clean one.
        log_probability, says = (x.expand(shape).clone() for x in (self.log_probability, self.says))
        clean = log_probability.clone()
        for chosen, found, right in self._scored(variants, max_rows):
            index = torch.tensor(chosen.members)[:, None], torch.tensor(chosen.readouts)
            log_probability[index], says[index], clean[index] = found[1:], right[1:], found[:1].expand_as(found[1:])
        return Scores(log_probability, says, clean)

    @torch.inference_mode()
    def _scored(self, variants, max_rows) -> Iterator[tuple["_Group", torch.Tensor, torch.Tensor]]:
        for group in self._groups(variants, max_rows):
            if group.readouts and self.targets:
                row = self._row.after(self._question, group.start, group.readouts)
                logits = self._run(group, row, _cache(self.rim, self._cache, self._question + group.start))
                yield group, *self._score(logits, group.readouts, row, group.start)

    @torch.inference_mode()
    def decode(
        self, variants: Sequence[Edits], max_new_tokens: int = 256, max_rows: int = MAX_ROWS
    ) -> list[tuple[Decoded, Decoded]]:
        """The final answer of the clean row in the same batch, and of each variant, decoded greedily."""
        found: list[tuple[Decoded, Decoded] | None] = [None] * len(variants)
        blocks = _Row.pack(self._question, self._row.ids[: self._question + self._blocks].tolist(), [], (), 1, "cpu")
        for group in self._groups(variants, max_rows):
            row = blocks.after(self._question, group.start, [])
            row = row.to(self.rim.device, [len(row.ids) - 1])
            cache = _cache(self.rim, self._cache, self._question + group.start, store=True)
            logits = self._run(group, row, cache)
            for layer, held in enumerate(cache.layers, start=1):
                # Decoder layer l reads the stream after l - 1: rows that had not joined by then are the clean row.
                held.select([0] + [i if edits[0].layer < layer else 0 for i, edits in enumerate(group.edits, start=1)])
            answers = self._greedy(logits[:, 0], cache, max_new_tokens)
            for member, answer in zip(group.members, answers[1:], strict=True):
                found[member] = (answers[0], answer)
        return found

    def _greedy(self, logits: torch.Tensor, cache: Cache, max_new_tokens: int) -> list[Decoded]:
        """Goes on from the logits [B, V] of the answer's first token."""
        rim, place = self.rim, self._question + self._blocks
        ids: list[list[int]] = [[] for _ in logits]
        logs = [0.0] * len(ids)
        for position in range(place, place + min(max_new_tokens, rim.max_length - place)):
            best, tokens = _log_probabilities(rim, logits).max(-1)
            for row, (log, token) in enumerate(zip(best.tolist(), tokens.tolist(), strict=True)):
                if not ids[row] or ids[row][-1] != rim.eos_id:
                    ids[row].append(token)
                    logs[row] += log
            if all(row[-1] == rim.eos_id for row in ids):
                break
            positions = torch.full_like(tokens[:, None], position)
            logits = rim.model(
                input_ids=tokens[:, None], position_ids=positions, past_key_values=cache, use_cache=True
            ).logits[:, -1]
        return [Decoded(tuple(row), log) for row, log in zip(ids, logs, strict=True)]

    def _groups(self, variants: Sequence[Edits], max_rows: int) -> Iterator["_Group"]:
        """Variants with the same first block, those that join at lower layers first, at most `max_rows` at a time."""
        by_block: dict[int, list[int]] = {}
        for i, edits in enumerate(variants):
            by_block.setdefault(int(min(edit.columns.min() for edit in edits)) // self.block_length, []).append(i)
        for block, members in sorted(by_block.items()):
            ordered = sorted(members, key=lambda i: min(edit.layer for edit in variants[i]))
            readouts = [i for i, readout in enumerate(self.readouts) if readout > block]
            for first in range(0, len(ordered), max_rows):
                chosen = ordered[first : first + max_rows]
                edits = [sorted(variants[i], key=lambda edit: edit.layer) for i in chosen]
                yield _Group(block * self.block_length, chosen, edits, readouts)

    def _run(self, group: "_Group", row: "_Row", cache: Cache) -> torch.Tensor:
        """Logits [1 + n, kept, V] of the clean row and a group's variants."""
        by_layer: dict[int, list[tuple[int, Edit]]] = {}
        for i, edits in enumerate(group.edits, start=1):
            for edit in edits:
                by_layer.setdefault(edit.layer, []).append((i, edit))
        joined_by = {layer: sum(edits[0].layer <= layer for edits in group.edits) for layer in by_layer}

        def patch(layer: int):
            def function(states: torch.Tensor) -> torch.Tensor:
                new = 1 + joined_by[layer] - len(states)
                states = torch.cat([states, states[:1].expand(new, -1, -1)]) if new else states.clone()
                for add in (False, True):
                    chosen = [(i, edit) for i, edit in by_layer[layer] if edit.add == add and edit.values is not None]
                    if not chosen:
                        continue
                    rows = torch.cat([torch.full_like(edit.columns, i) for i, edit in chosen]).to(states.device)
                    columns = torch.cat([edit.columns for _, edit in chosen]).to(states.device) - group.start
                    values = torch.cat([edit.values for _, edit in chosen]).to(states)
                    states.index_put_((rows, columns), values, accumulate=add)
                for i, edit in by_layer[layer]:
                    if edit.values is None:
                        columns = edit.columns.to(states.device) - group.start
                        states[i, columns] = states[0, columns]
                return states

            return function

        with edit_residual(self.rim, {layer: patch(layer) for layer in by_layer}):
            return self._forward(row, self._question + group.start, cache)

    def _forward(self, row: "_Row", past: int, cache: Cache) -> torch.Tensor:
        """Logits at the columns a row keeps; `past` columns are in the cache."""
        rim = self.rim
        choose = {"logits_to_keep": row.keep} if keeps_logits(rim.model) else {}
        logits = rim.model(
            input_ids=row.ids[None],
            position_ids=row.positions[None],
            attention_mask=additive_mask(row.sees[None], rim.dtype),
            past_key_values=cache,
            use_cache=True,
            **choose,
        ).logits
        return logits if choose else logits[:, row.keep]

    def _score(
        self, logits: torch.Tensor, readouts: list[int], row: "_Row", start: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log probability and whether it would be said, [n, readouts, A], from logits [n, kept, V]."""
        logs = _log_probabilities(self.rim, logits)
        best = logs.max(-1)
        shape = (len(logits), len(readouts), len(self.targets))
        total, says = torch.zeros(shape), torch.ones(shape, dtype=torch.bool)
        for r, readout in enumerate(readouts):
            for a, target in enumerate(self.targets):
                at = torch.tensor(row.predicts[readout, a], device=logs.device)
                ids = torch.tensor(target, device=logs.device)
                total[:, r, a] = logs[:, at, ids].sum(-1).cpu()
                says[:, r, a] = (best.indices[:, at] == ids).all(-1).cpu()
        return total, says


@dataclass(frozen=True)
class _Group:
    """Variants that run together: the first column they run, their numbers, their edits, the readouts they reach."""

    start: int
    members: list[int]
    edits: list[list[Edit]]
    readouts: list[int]


@dataclass(frozen=True)
class _Row:
    """Tokens to run, what they see (cache included) and which logits are wanted.

    Attributes:
        ids, positions: [T].
        sees: bool [T, past + T].
        keep: int64 [kept], columns whose logits are computed.
        owners: [T] (readout index, target index) of an answer's token, None for question and blocks.
        predicts: (readout index, target index) -> indices into `keep` that predict the target's tokens.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    sees: torch.Tensor
    keep: torch.Tensor
    owners: list[tuple[int, int] | None]
    predicts: dict[tuple[int, int], list[int]]

    @classmethod
    def pack(cls, question: int, prompt, targets, readouts, block_length: int, device) -> "_Row":
        """Question and blocks, then every target after every readout, each blind to the others."""
        ids, positions = list(prompt), list(range(len(prompt)))
        owners: list[tuple[int, int] | None] = [None] * len(prompt)
        ends = [question + block * block_length for block in readouts]  # the column after each readout's block
        last = len(prompt) * [0]
        keep: list[int] = []
        predicts = {}
        for r, end in enumerate(ends):
            keep.append(end - 1)
            at = len(keep) - 1
            for a, target in enumerate(targets):
                inputs = target[:-1]
                predicts[r, a] = [at, *range(len(keep), len(keep) + len(inputs))]
                keep += range(len(ids), len(ids) + len(inputs))
                ids += inputs
                positions += range(end, end + len(inputs))
                owners += [(r, a)] * len(inputs)
                last += [end] * len(inputs)
        number = torch.tensor([-1 if owner is None else owner[0] * len(targets) + owner[1] for owner in owners])
        column, reach = torch.arange(len(ids)), torch.tensor(last)
        causal = column[:, None] >= column
        prompt_key = number < 0
        # A readout's token sees the prompt up to its block, and its own tokens.
        sees = causal & torch.where(
            prompt_key[:, None], prompt_key, (prompt_key & (column < reach[:, None])) | (number[:, None] == number)
        )
        tensors = [torch.tensor(x, dtype=torch.long) for x in (ids, positions)]
        row = cls(*tensors, sees, torch.tensor(keep, dtype=torch.long), owners, predicts)
        return row.to(device)

    def to(self, device, keep: list[int] | None = None) -> "_Row":
        kept = self.keep if keep is None else torch.tensor(keep)
        tensors = [x.to(device) for x in (self.ids, self.positions, self.sees, kept)]
        return _Row(*tensors, self.owners, self.predicts)

    def after(self, question: int, start: int, readouts: list[int]) -> "_Row":
        """The part of the row from column `start` of the blocks on, with the chosen readouts alone."""
        first = question + start
        device = self.ids.device
        chosen = [i for i, owner in enumerate(self.owners) if i >= first and (owner is None or owner[0] in readouts)]
        place = {column: i for i, column in enumerate(chosen)}
        kept = self.keep.tolist()
        wanted = [i for i, column in enumerate(kept) if column in place]
        new = {old: i for i, old in enumerate(wanted)}
        index = torch.tensor(chosen, device=device)
        seen = torch.cat([torch.arange(first, device=device), index])
        keep = torch.tensor([place[kept[i]] for i in wanted], dtype=torch.long, device=device)
        predicts = {key: [new[i] for i in at] for key, at in self.predicts.items() if key[0] in readouts}
        owners = [self.owners[i] for i in chosen]
        return _Row(self.ids[index], self.positions[index], self.sees[index][:, seen], keep, owners, predicts)


class _Layer(DynamicLayer):
    """Keys and values of a clean prefix, held once and expanded to whatever batch comes.

    With `store` what comes is kept for the passes to follow; else it is only seen by the pass that brings it.
    """

    def __init__(self, keys=None, values=None, store: bool = True):
        super().__init__()
        self._store = store
        if keys is not None:
            self.lazy_initialization(keys, values)
            self.keys, self.values = keys, values

    def update(self, key_states, value_states, *args, **kwargs):
        if not self.is_initialized:
            return super().update(key_states, value_states)
        rows = len(key_states)
        keys = torch.cat([self.keys.expand(rows, -1, -1, -1), key_states], dim=-2)
        values = torch.cat([self.values.expand(rows, -1, -1, -1), value_states], dim=-2)
        if self._store:
            self.keys, self.values = keys, values
        return keys, values

    def select(self, rows: list[int]) -> None:
        """Makes the batch the rows named, in that order."""
        index = torch.tensor(rows, device=self.keys.device)
        self.keys, self.values = self.keys[index], self.values[index]


def _cache(rim: RiM, of: Cache | None = None, length: int = 0, store: bool = False) -> Cache:
    """An empty cache, or one that begins with the first `length` columns of another."""
    if of is None:
        return Cache(layers=[_Layer() for _ in range(num_layers(rim))])
    return Cache(layers=[_Layer(x.keys[:, :, :length], x.values[:, :, :length], store) for x in of.layers])


def _log_probabilities(rim: RiM, logits: torch.Tensor) -> torch.Tensor:
    """float32 log probabilities with banned ids ruled out."""
    banned = torch.tensor(rim.banned_ids, dtype=torch.long, device=logits.device)
    return logits.float().index_fill(-1, banned, -math.inf).log_softmax(-1)


@torch.inference_mode()
def _fault(rim: RiM, question: str, num_blocks: int | None) -> str | None:
    """Whether a run into which its own states are written scores as a plain pass does, and how far it is off."""
    target = [rim.eos_id]  # which fits wherever a question does
    clean = Patcher(rim, question, [target], num_blocks=num_blocks)
    layers, block = range(1, num_layers(rim) + 1), clean.columns(1, range(clean.block_length))
    own = [Edit(layer, block, clean.memory[layer, 0]) for layer in layers]
    ids = torch.tensor([rim.prompt_ids(question, "memory", num_blocks)], device=rim.device)
    plain = _log_probabilities(rim, rim.model(input_ids=ids, use_cache=False).logits)[0, -1, rim.eos_id].cpu()
    missed = (clean.score([own, *([edit] for edit in own)]).log_probability - plain).abs().max().item()
    return f"its own states written back change a score by {missed:.2g}" if missed > tolerance(rim.dtype) else None
