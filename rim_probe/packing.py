"""Packed rows: one training row that trains every readout of a problem at once.

Knows token ids, positions, readout numbers and masks. Knows nothing about models or optimisers.

Method (arXiv:2605.30343, and ../docs of the project):
1. Write `x m_1 R_1 m_2 R_2 ... m_K R_K` as one row and number every token: 0 for question and memory, k for readout k.
2. Token i sees token j iff `j <= i` and (`readout[j] == 0` or `readout[j] == readout[i]`).
3. Position ids skip readouts: `m_{k+1}` and `R_k` both continue from the end of `m_k`.
Then the row equals, logit by logit, K separate causal passes over `x m_1..m_k R_k`.

Interchange (Geiger et al., arXiv:2112.00826) by packing alone: two such rows, the worlds, and branches of them in one.
4. Segments 0 and 1 are the worlds. Their positions are right-aligned: block k stands at the same ones in both.
5. A branch (w, t) is a segment `</b>_t R_t m_{t+1} R_{t+1} ... m_K R_K`: what follows in world w, had the slots of its
   block t been those of the other world. Its positions are those of w.
6. The audience of a token is the segments that see it: its own and, of tokens of no readout, every branch (w, t) if the
   token stands before the slots of block t in w, or is a slot of block t in the other world.
7. Token i sees token j iff step 2 says so and `segment[i]` is in `audience[j]`.
Then a branch equals, logit by logit, passes over w in which the slots of block t have the other world's states in every
layer (where positions are relative; where they are absolute, for questions of equal length).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch

from rim_probe.encoding import Encoder
from rim_probe.problems import Problem

IGNORED = -100  # the label that cross entropy skips
PADDING = -1  # the readout number of padding
_UNTOLD = {"slot_labels": IGNORED, "slot_depths": 0, "segments": 0, "audience": 1}  # of a row that leaves them empty


@dataclass(frozen=True)
class Row:
    """One training row of L tokens; all lists have length L unless said otherwise.

    Attributes:
        ids: token ids. The last token of a readout is a label only, never an input.
        positions: position ids; readouts do not advance the question-and-memory count.
        readouts: 0 for question and memory, k for a token of readout k.
        labels: the token to be predicted *at* this position (already shifted), or IGNORED.
        label_readouts: the readout a label belongs to (1-based), 0 where there is no label.
        num_readouts: readouts in the row.
        num_grounded: how many of the first readouts state a reasoning step rather than the answer.
        slot_labels: at a slot the token that its state is to name (a token of a step's result), else IGNORED.
        slot_depths: at a labelled slot which of the layers read is the first where it is to name it, else 0.
        segments: 0 for the first world (every token of a row without a second), 1 for the second, 2.. for branches.
        audience: the segments that see a token, as a sum of 2 ** segment.
    """

    ids: list[int]
    positions: list[int]
    readouts: list[int]
    labels: list[int]
    label_readouts: list[int]
    num_readouts: int
    num_grounded: int = 0
    slot_labels: list[int] = field(default_factory=list)  # these four are empty where no slot is labelled, or there
    slot_depths: list[int] = field(default_factory=list)  # is one world and no branch
    segments: list[int] = field(default_factory=list)
    audience: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.ids)

    def column(self, name: str) -> list[int]:
        """One of the lists, [L] also where it was left empty."""
        return getattr(self, name) or [_UNTOLD[name]] * len(self)


def pack_memory(
    question_ids: Sequence[int],
    block_ids: Sequence[int],
    readouts: Sequence[Sequence[int]],
    num_grounded: int = 0,
    results: Sequence[Sequence[int]] = (),
    memory: bool = True,
) -> Row:
    """Question, then for every readout one block and the readout's tokens (the last of them as a label only).

    Args:
        results: for each block the ids of the result that its slots are to name, none to label no slot.
        memory: False: of its block a readout sees the end token alone, and that sees the question alone; both stand at
            the same positions as with memory.
    """
    ids, positions, numbers = list(question_ids), list(range(len(question_ids))), [0] * len(question_ids)
    labels, label_readouts = [IGNORED] * len(ids), [0] * len(ids)
    place = len(question_ids)
    shown = list(block_ids) if memory else list(block_ids[-1:])
    for k, readout in enumerate(readouts, start=1):
        inputs = list(readout[:-1])
        place += len(block_ids)
        ids += shown + inputs
        positions += list(range(place - len(shown), place + len(inputs)))
        numbers += [0 if memory else k] * len(shown) + [k] * len(inputs)
        # The readout stands directly after its block, so the block's end token predicts its first token.
        labels += [IGNORED] * (len(shown) - 1) + list(readout)
        label_readouts += [0] * (len(shown) - 1) + [k] * len(readout)
    row = Row(ids, positions, numbers, labels, label_readouts, len(readouts), num_grounded)
    return _label_slots(row, results, len(block_ids) - 2) if any(results) else row


def _label_slots(row: Row, results: Sequence[Sequence[int]], num_slots: int) -> Row:
    """Slot j of M takes the result's token j; of a result of n < M tokens the last n slots take one each."""
    labels, depths = [IGNORED] * len(row), [0] * len(row)
    for k, result in enumerate(results, start=1):
        end, count = row.label_readouts.index(k), min(len(result), num_slots)
        labels[end - count : end] = result[:count]
        depths[end - count : end] = [slot_depth(k, row.num_grounded + 1)] * count
    return replace(row, slot_labels=labels, slot_depths=depths)


def slot_depth(block: int, num_steps: int) -> int:
    """From which of the layers read on (1-based) block k is to name the result of step min(k, T).

    It is 2 + min(k, T), and one more for k > T: a step takes a layer at least, and later steps build on earlier ones.
    """
    return 2 + min(block, num_steps) + (block > num_steps)


def pack_text(prompt_ids: Sequence[int], target_ids: Sequence[int]) -> Row:
    """An ordinary causal row: the prompt, then the target as its one readout (chain of thought, direct)."""
    prompt_ids, target_ids = list(prompt_ids), list(target_ids)
    ids = prompt_ids + target_ids[:-1]
    labels = [IGNORED] * (len(prompt_ids) - 1) + target_ids
    return Row(
        ids=ids,
        positions=list(range(len(ids))),
        readouts=[0] * len(ids),
        labels=labels,
        label_readouts=[0] * (len(prompt_ids) - 1) + [1] * len(target_ids),
        num_readouts=1,
    )


# The encoder of the rows below may also be `training.tokens.Tokens`, and the problem an entry of it: the same methods.


def stage1_row(
    encoder: Encoder,
    problem: Problem,
    num_blocks: int | None = None,
    label_slots: bool = False,
    memory: bool = True,
) -> Row:
    """Grounding: readout t states step t + 1, the last one the answer (L1 of the paper).

    `num_blocks=None` gives one block per step, as in the paper; a number gives at least that many blocks, and every
    readout after the last step states the answer. With `label_slots` block k is also to name the result of step
    min(k, T) in its slots. For `memory` see `pack_memory`.
    """
    steps = problem.steps[1:]  # step 1 is never a target: readout 1 already states step 2
    blocks = max(len(steps) + 1, num_blocks or 0)
    answers = blocks - len(steps)
    readouts = [encoder.step_ids(step) for step in steps] + [encoder.answer_ids(problem.answer)] * answers
    results = [encoder.result_ids(step) for step in problem.steps] if label_slots else []
    results += results[-1:] * (blocks - len(results))
    return pack_memory(encoder.question_ids(problem.question), encoder.block_ids, readouts, len(steps), results, memory)


def stage2_row(encoder: Encoder, problem: Problem, num_blocks: int) -> Row:
    """Refinement: every one of K readouts states the answer (L2 of the paper)."""
    readouts = [encoder.answer_ids(problem.answer)] * num_blocks
    return pack_memory(encoder.question_ids(problem.question), encoder.block_ids, readouts)


class Branch(NamedTuple):
    """What follows in a world (0 or 1) when the slots of its block t, 1-based, are those of the other world.

    `told` is the row of the world's question with the steps and the answer that follow, of which the branch takes what
    stands from the end token of block t on.
    """

    world: int
    block: int
    told: Row


def interchange_row(worlds: tuple[Row, Row], branches: Sequence[Branch], num_slots: int) -> Row:
    """Two memory rows of equally many blocks, and branches of them; see the head of this module.

    Readouts keep their numbers in every segment, so that whatever weighs readout k weighs it in all of them.
    """
    firsts = [world.label_readouts.index(1) for world in worlds]  # where block 1 ends, a place and a position
    shifts = [max(firsts) - first for first in firsts]
    parts = [(world, 0, shift) for world, shift in zip(worlds, shifts, strict=True)]
    parts += [(told, told.label_readouts.index(t), shifts[w]) for w, t, told in branches]

    def joined(name: str) -> list[int]:
        told = any(getattr(row, name) for row, _, _ in parts)
        return [value for row, begin, _ in parts for value in row.column(name)[begin:]] if told else []

    positions = [position + shift for row, begin, shift in parts for position in row.positions[begin:]]
    segments = [segment for segment, (row, begin, _) in enumerate(parts) for _ in row.ids[begin:]]
    readouts = joined("readouts")
    audience = [1 << segment for segment in segments]
    for number, (w, t, _) in enumerate(branches, start=2):
        end = shifts[w] + worlds[w].positions[worlds[w].label_readouts.index(t)]
        slots = range(end - num_slots, end)
        for j, (segment, position) in enumerate(zip(segments, positions, strict=True)):
            seen = position < slots.start if segment == w else position in slots and segment == 1 - w
            audience[j] |= (seen and not readouts[j]) << number
    return replace(
        worlds[1],
        ids=joined("ids"),
        positions=positions,
        readouts=readouts,
        labels=joined("labels"),
        label_readouts=joined("label_readouts"),
        slot_labels=joined("slot_labels"),
        slot_depths=joined("slot_depths"),
        segments=segments,
        audience=audience,
    )


def cot_row(encoder: Encoder, problem: Problem) -> Row:
    """Chain of thought: question, then steps, marker, answer."""
    return pack_text(encoder.question_ids(problem.question), encoder.chain_ids(problem))


def direct_row(encoder: Encoder, problem: Problem) -> Row:
    """Direct: question and answer marker, then the answer."""
    prompt = encoder.question_ids(problem.question) + encoder.marker_ids
    return pack_text(prompt, encoder.answer_ids(problem.answer))


def pad_rows(rows: Sequence[Row], pad_id: int) -> dict[str, torch.Tensor]:
    """A batch of B rows padded on the right to the longest, L tokens; all int64.

    Returns `input_ids`, `position_ids`, `readouts`, `labels`, `label_readouts` of shape [B, L], and `num_readouts`,
    `num_grounded` of shape [B]; and where a row has them `slot_labels`, `slot_depths`, and `segments`, `audience`, all
    of shape [B, L]. Padding has readout number PADDING and no label.
    """
    lengths = np.fromiter(map(len, rows), np.int64, len(rows))
    filled, count = np.arange(lengths.max()) < lengths[:, None], int(lengths.sum())

    def padded(name: str, fill: int) -> torch.Tensor:
        batch = np.full(filled.shape, fill, dtype=np.int64)
        values = chain.from_iterable(row.column(name) for row in rows)
        batch[filled] = np.fromiter(values, np.int64, count)  # torch is far slower with lists
        return torch.from_numpy(batch)

    return {
        "input_ids": padded("ids", pad_id),
        "position_ids": padded("positions", 0),
        "readouts": padded("readouts", PADDING),
        "labels": padded("labels", IGNORED),
        "label_readouts": padded("label_readouts", 0),
        "num_readouts": torch.tensor([row.num_readouts for row in rows], dtype=torch.long),
        "num_grounded": torch.tensor([row.num_grounded for row in rows], dtype=torch.long),
    } | {name: padded(name, fill) for name, fill in _UNTOLD.items() if any(getattr(row, name) for row in rows)}


def visible(query_readouts: torch.Tensor, key_readouts: torch.Tensor) -> torch.Tensor:
    """Which keys a query may see by readout number alone, order aside: [..., Q], [..., S] -> bool [..., Q, S]."""
    keys, queries = key_readouts.unsqueeze(-2), query_readouts.unsqueeze(-1)
    return (keys == 0) | (keys == queries)


def additive_mask(allowed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Bool [B, Q, S] -> float [B, 1, Q, S] with 0 where allowed and the lowest finite number elsewhere.

    Never boolean: `eager` attention adds a mask to the scores, where True and False would count as 1 and 0. Never
    minus infinity: a row without any allowed key would become NaN.
    """
    mask = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return mask.masked_fill_(~allowed, torch.finfo(dtype).min).unsqueeze(1)


def row_mask(
    readouts: torch.Tensor,
    dtype: torch.dtype,
    segments: torch.Tensor | None = None,
    audience: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """The mask of packed rows, [B, L] -> additive float [B, 1, L, L]; `segments` and `audience` where rows have them.

    Every padding token sees the question and itself, so no query is fully masked. None for rows that are plain causal
    text (padding stands right of everything), for which a model's own causal mask is the same and faster.
    """
    if segments is None and not (readouts > 0).any():
        return None
    length = readouts.shape[1]
    allowed = visible(readouts, readouts)
    allowed &= torch.ones(length, length, dtype=torch.bool, device=readouts.device).tril()
    if segments is not None and audience is not None:
        allowed &= _addressed(segments.unsqueeze(-1), audience.unsqueeze(-2))
    return additive_mask(allowed, dtype)


def flex_mask_mod(
    readouts: torch.Tensor, segments: torch.Tensor | None = None, audience: torch.Tensor | None = None
) -> Callable:
    """The same rule as `row_mask` as a FlexAttention `mask_mod(batch, head, query, key)`; all [B, L]."""

    def mask_mod(batch, head, query, key):
        key_readout = readouts[batch, key]
        seen = (query >= key) & ((key_readout == 0) | (key_readout == readouts[batch, query]))
        if segments is None or audience is None:
            return seen
        return seen & _addressed(segments[batch, query], audience[batch, key])

    return mask_mod


def _addressed(segments: torch.Tensor, audience: torch.Tensor) -> torch.Tensor:
    """Whether a query's segment belongs to a key's audience, by broadcasting."""
    return (audience >> segments) & 1 == 1
