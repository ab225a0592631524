"""Rows of text with branches: residual states of many alternatives in one pass.

Method: alternatives to what follows a text are appended to one row. Each stands, by position and mask, directly where
it is said to; it sees the text and itself, never another one (the idea of the packed readouts of `packing`). Its states
are those of a pass of its own, at a fraction of the cost.

Knows token ids, positions and masks. Knows nothing of what they say.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import torch

from rim_probe.errors import QuestionError
from rim_probe.model import RiM
from rim_probe.packing import row_mask
from rim_probe.probing.hooks import causal_lm, read_residual

BATCH_TOKENS = {"cpu": 2048}  # what its caches hold; by device
MOST_BATCH_TOKENS = 16384


@dataclass(frozen=True)
class Row:
    """A text, and branches of it that do not see each other: as many passes in one.

    Attributes:
        trunk: token ids that every branch sees.
        kept: places of the trunk to read, negative ones from its end; before the first token the first is read.
        branches: (position of the first token, token ids); read at their last token.
    """

    trunk: Sequence[int]
    kept: Sequence[int] = ()
    branches: Sequence[tuple[int, Sequence[int]]] = ()

    @property
    def tokens(self) -> int:
        return len(self.trunk) + sum(len(ids) for _, ids in self.branches)


class _Enough(Exception):
    """Raised by a hook where no later layer of the pass is wanted."""


@torch.no_grad()
def read_rows(rim: RiM, rows: Sequence[Row], layers: Sequence[int]) -> list[np.ndarray]:
    """Residual states of every row, float32 [kept + branches, len(layers), d].

    Raises:
        QuestionError: a row that goes beyond the model's context.
    """
    rim.model.eval()
    found: list[np.ndarray] = [np.empty(0)] * len(rows)
    for batch in _batches(rows, BATCH_TOKENS.get(rim.device.type, MOST_BATCH_TOKENS)):
        shape = (len(batch), max(rows[i].tokens for i in batch))
        ids, positions, branch_of = torch.full(shape, rim.eos_id), torch.zeros(shape).long(), torch.zeros(shape).long()
        at = []
        for b, row in enumerate(rows[i] for i in batch):
            end = len(row.trunk)
            ids[b, :end], positions[b, :end] = torch.tensor(row.trunk), torch.arange(end)
            at += [(b, max(0, end + place) if place < 0 else place) for place in row.kept]
            for number, (start, branch) in enumerate(row.branches, start=1):
                own = slice(end, end + len(branch))
                ids[b, own], positions[b, own] = torch.tensor(branch), torch.arange(start, start + len(branch))
                branch_of[b, own], end = number, own.stop
                at.append((b, end - 1))
        if int(positions.max()) >= rim.max_length:
            raise QuestionError(
                f"A question needs {int(positions.max()) + 1} tokens with its steps, but this model reads at most "
                f"{rim.max_length}; leave out such long problems."
            )
        states: dict[int, torch.Tensor] = {}
        row_of, column = torch.tensor(at, device=rim.device).T

        def read(layer, stream, states=states, row_of=row_of, column=column):
            states[layer] = stream[row_of, column].float().cpu()
            if len(states) == len(set(layers)):
                raise _Enough

        with suppress(_Enough), read_residual(rim, layers, read):
            causal_lm(rim).base_model(
                input_ids=ids.to(rim.device),
                attention_mask=row_mask(branch_of.to(rim.device), rim.dtype),
                position_ids=positions.to(rim.device),
                use_cache=False,
            )
        sizes = [len(rows[i].kept) + len(rows[i].branches) for i in batch]
        stacked = torch.stack([states[layer] for layer in layers], dim=1).numpy()
        for i, own in zip(batch, np.split(stacked, np.cumsum(sizes)[:-1]), strict=True):
            found[i] = own
    return found


def _batches(rows: Sequence[Row], tokens: int) -> Iterator[list[int]]:
    """Rows of like length together, by number, at most `tokens` tokens with their padding (or one row)."""
    batch: list[int] = []
    for i in sorted(range(len(rows)), key=lambda i: (bool(rows[i].branches), rows[i].tokens)):
        if batch and (len(batch) + 1) * rows[i].tokens > tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch
