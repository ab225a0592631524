"""Packed rows: one training row that trains every readout of a problem at once.

Knows token ids, positions, readout numbers and masks. Knows nothing about models or optimisers.

Method (arXiv:2605.30343, and ../docs of the project):
1. Write `x m_1 R_1 m_2 R_2 ... m_K R_K` as one row and number every token: 0 for question and memory, k for readout k.
2. Token i sees token j iff `j <= i` and (`readout[j] == 0` or `readout[j] == readout[i]`).
3. Position ids skip readouts: `m_{k+1}` and `R_k` both continue from the end of `m_k`.
Then the row equals, logit by logit, K separate causal passes over `x m_1..m_k R_k`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch

from rim_probe.encoding import Encoder
from rim_probe.problems import Problem

IGNORED = -100  # the label that cross entropy skips
PADDING = -1  # the readout number of padding


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
    """

    ids: list[int]
    positions: list[int]
    readouts: list[int]
    labels: list[int]
    label_readouts: list[int]
    num_readouts: int
    num_grounded: int = 0

    def __len__(self) -> int:
        return len(self.ids)


def pack_memory(
    question_ids: Sequence[int], block_ids: Sequence[int], readouts: Sequence[Sequence[int]], num_grounded: int = 0
) -> Row:
    """Question, then for every readout one block and the readout's tokens (the last of them as a label only)."""
    ids, positions, numbers = list(question_ids), list(range(len(question_ids))), [0] * len(question_ids)
    labels, label_readouts = [IGNORED] * len(ids), [0] * len(ids)
    place = len(question_ids)
    for k, readout in enumerate(readouts, start=1):
        inputs = list(readout[:-1])
        ids += list(block_ids) + inputs
        positions += list(range(place, place + len(block_ids) + len(inputs)))
        numbers += [0] * len(block_ids) + [k] * len(inputs)
        # The readout stands directly after its block, so the block's end token predicts its first token.
        labels += [IGNORED] * (len(block_ids) - 1) + list(readout)
        label_readouts += [0] * (len(block_ids) - 1) + [k] * len(readout)
        place += len(block_ids)
    return Row(ids, positions, numbers, labels, label_readouts, len(readouts), num_grounded)


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


def stage1_row(encoder: Encoder, problem: Problem, num_blocks: int | None = None) -> Row:
    """Grounding: readout t states step t + 1, the last one the answer (L1 of the paper).

    `num_blocks=None` gives one block per step, as in the paper; a number gives at least that many blocks, and every
    readout after the last step states the answer.
    """
    steps = problem.steps[1:]  # step 1 is never a target: readout 1 already states step 2
    blocks = max(len(steps) + 1, num_blocks or 0)
    answers = blocks - len(steps)
    readouts = [encoder.step_ids(step) for step in steps] + [encoder.answer_ids(problem.answer)] * answers
    return pack_memory(encoder.question_ids(problem.question), encoder.block_ids, readouts, num_grounded=len(steps))


def stage2_row(encoder: Encoder, problem: Problem, num_blocks: int) -> Row:
    """Refinement: every one of K readouts states the answer (L2 of the paper)."""
    readouts = [encoder.answer_ids(problem.answer)] * num_blocks
    return pack_memory(encoder.question_ids(problem.question), encoder.block_ids, readouts)


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
    `num_grounded` of shape [B]. Padding has readout number PADDING and no label.
    """
    lengths = np.fromiter(map(len, rows), np.int64, len(rows))
    filled, count = np.arange(lengths.max()) < lengths[:, None], int(lengths.sum())

    def padded(lists: list[list[int]], fill: int) -> torch.Tensor:
        batch = np.full(filled.shape, fill, dtype=np.int64)
        batch[filled] = np.fromiter(chain.from_iterable(lists), np.int64, count)  # torch is far slower with lists
        return torch.from_numpy(batch)

    return {
        "input_ids": padded([row.ids for row in rows], pad_id),
        "position_ids": padded([row.positions for row in rows], 0),
        "readouts": padded([row.readouts for row in rows], PADDING),
        "labels": padded([row.labels for row in rows], IGNORED),
        "label_readouts": padded([row.label_readouts for row in rows], 0),
        "num_readouts": torch.tensor([row.num_readouts for row in rows], dtype=torch.long),
        "num_grounded": torch.tensor([row.num_grounded for row in rows], dtype=torch.long),
    }


def visible(query_readouts: torch.Tensor, key_readouts: torch.Tensor) -> torch.Tensor:
    """Which keys a query may see by readout number alone, order aside: [..., Q], [..., S] -> bool [..., Q, S]."""
    keys, queries = key_readouts.unsqueeze(-2), query_readouts.unsqueeze(-1)
    return (keys == 0) | (keys == queries)


def additive_mask(allowed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """bool [B, Q, S] -> float [B, 1, Q, S] with 0 where allowed and the lowest finite number elsewhere.

    Never boolean: `eager` attention adds a mask to the scores, where True and False would count as 1 and 0. Never
    minus infinity: a row without any allowed key would become NaN.
    """
    mask = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return mask.masked_fill_(~allowed, torch.finfo(dtype).min).unsqueeze(1)


def row_mask(readouts: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
    """The mask of packed rows, [B, L] -> additive float [B, 1, L, L].

    Every padding token sees the question and itself, so no query is fully masked. None for rows that are plain causal
    text (padding stands right of everything), for which a model's own causal mask is the same and faster.
    """
    if not (readouts > 0).any():
        return None
    length = readouts.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=readouts.device).tril()
    return additive_mask(visible(readouts, readouts) & causal, dtype)


def flex_mask_mod(readouts: torch.Tensor) -> Callable:
    """The same rule as `row_mask` as a FlexAttention `mask_mod(batch, head, query, key)`; `readouts` is [B, L]."""

    def mask_mod(batch, head, query, key):
        key_readout = readouts[batch, key]
        return (query >= key) & ((key_readout == 0) | (key_readout == readouts[batch, query]))

    return mask_mod
