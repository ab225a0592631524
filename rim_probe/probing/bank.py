"""Explicit steps as the model itself reads them: one vector per step, from plain text.

Method:
1. A row is the question, then its steps as plain text, one pass of the model. The representation of step t is the
   residual stream at its last token; it has seen the question and the steps up to it, and no memory block.
2. Alternatives to step t ("what if it said something else?") are appended to the same row. Each stands, by position
   and mask, directly after step t - 1: it sees the question, the true steps before it and itself, never step t nor
   another alternative. Its representation is that of a pass of its own, at a fraction of the cost (the same idea as
   the packed readouts of `packing`).
3. The bank holds every distinct step once, as the mean over the contexts it was met in.

Knows text, rows and masks. Knows nothing of memory blocks or of what is compared with a representation.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

from rim_probe.errors import QuestionError
from rim_probe.model import RiM
from rim_probe.packing import additive_mask
from rim_probe.probing.hooks import causal_lm, read_residual
from rim_probe.problems import STEP_SEPARATOR

ROW_TOKENS = 256  # attention costs the square of a row, so alternatives beyond this go into another row
BATCH_TOKENS = {"cpu": 2048}  # what its caches hold; by device
MOST_BATCH_TOKENS = 16384


@dataclass(frozen=True)
class Reading:
    """A question, its explicit steps, and for each step alternatives to be read in its place.

    Attributes:
        alternatives: one list of texts per step; empty where only the steps themselves are wanted.
    """

    question: str
    steps: tuple[str, ...]
    alternatives: tuple[tuple[str, ...], ...] = ()


class _Enough(Exception):
    """Raised by a hook where no later layer of the pass is wanted."""


@dataclass
class _Row:
    ids: list[int]
    positions: list[int]
    segments: list[int]  # 0 for question and chain, else the number of the alternative
    limits: list[int]  # how much of the chain a token may see, in tokens
    wanted: list[tuple[int, tuple[int, int]]]  # (column of a last token, (step, alternative or -1))


@torch.no_grad()
def read_steps(rim: RiM, readings: Sequence[Reading], layers: Sequence[int]) -> list[list[np.ndarray]]:
    """The representations of every step and its alternatives.

    Args:
        layers: residual layers, 0..L.

    Returns:
        [reading][step] -> float32 [1 + alternatives, len(layers), d], the step itself first.

    Raises:
        QuestionError: a row longer than the model's context, or a question that cannot be asked.
    """
    if rim.model.training:
        rim.model.eval()
    encode = cache(rim.encode_text)  # a bank's steps come up again and again
    rows = [(r, row) for r, reading in enumerate(readings) for row in _rows(rim, reading, encode)]
    width = causal_lm(rim).config.hidden_size
    found = [
        [
            np.empty((1 + len(reading.alternatives[t] if reading.alternatives else ()), len(layers), width), np.float32)
            for t in range(len(reading.steps))
        ]
        for reading in readings
    ]
    for batch in _batches(rows, BATCH_TOKENS.get(rim.device.type, MOST_BATCH_TOKENS)):
        states: dict[int, torch.Tensor] = {}
        columns = [(b, column) for b, (_, row) in enumerate(batch) for column, _ in row.wanted]
        at, column = (torch.tensor(values, device=rim.device) for values in zip(*columns, strict=True))

        def read(layer, stream, states=states, at=at, column=column):
            states[layer] = stream[at, column].float().cpu()
            if len(states) == len(set(layers)):
                raise _Enough

        with suppress(_Enough), read_residual(rim, layers, read):
            _pass(rim, [row for _, row in batch])
        stacked = torch.stack([states[layer] for layer in layers], dim=1).numpy()
        places = [(r, t, a) for r, row in batch for _, (t, a) in row.wanted]
        for (r, t, a), vector in zip(places, stacked, strict=True):
            found[r][t][1 + a] = vector
    return found


def _rows(rim: RiM, reading: Reading, encode: Callable[[str], list[int]]) -> list[_Row]:
    """The row of a reading, or several that share the question where there are many alternatives."""
    question = rim.encode_question(reading.question)
    # Every segment is tokenised on its own, so that a step has the same tokens whatever follows it.
    chain = [encode(_separated(step, t)) for t, step in enumerate(reading.steps)]
    ends = np.cumsum([len(question), *map(len, chain)]).tolist()
    if ends[-1] > rim.max_length:
        raise QuestionError(
            f"The question needs {ends[-1]} tokens with its steps, but this model reads at most {rim.max_length}; "
            "shorten the question or leave out its steps."
        )
    ids = question + [token for step in chain for token in step]

    def start() -> _Row:
        return _Row(list(ids), list(range(len(ids))), [0] * len(ids), list(range(1, len(ids) + 1)), [])

    row = start()
    row.wanted = [(ends[t + 1] - 1, (t, -1)) for t in range(len(chain))]
    rows = [row]
    for t, texts in enumerate(reading.alternatives):
        for a, text in enumerate(texts):
            tokens = encode(_separated(text, t))
            if len(row.ids) + len(tokens) > max(ROW_TOKENS, 2 * len(ids)):
                row = start()
                rows.append(row)
            row.ids += tokens
            row.positions += range(ends[t], ends[t] + len(tokens))
            row.segments += [row.segments[-1] + 1] * len(tokens)
            row.limits += [ends[t]] * len(tokens)
            row.wanted.append((len(row.ids) - 1, (t, a)))
    return [row for row in rows if row.wanted]


def _separated(step: str, place: int) -> str:
    return (STEP_SEPARATOR if place else "") + step


def _batches(rows: list[tuple[int, _Row]], tokens: int) -> Iterable[list[tuple[int, _Row]]]:
    """Rows of like length together, at most `tokens` tokens with their padding (or one row)."""
    batch: list[tuple[int, _Row]] = []
    for numbered in sorted(rows, key=lambda item: (bool(item[1].segments[-1]), len(item[1].ids))):
        if batch and (len(batch) + 1) * len(numbered[1].ids) > tokens:
            yield batch
            batch = []
        batch.append(numbered)
    if batch:
        yield batch


def _pass(rim: RiM, rows: list[_Row]) -> None:
    """One pass for its hooks. Padding stands right of everything; without alternatives no mask is needed."""
    length = max(len(row.ids) for row in rows)

    def padded(name: str, fill: int) -> torch.Tensor:
        lists = [getattr(row, name) for row in rows]
        return torch.tensor([values + [fill] * (length - len(values)) for values in lists], device=rim.device)

    mask = None
    if any(row.segments[-1] for row in rows):
        segments, limits = padded("segments", -1), padded("limits", length)
        column = torch.arange(length, device=rim.device)
        # A token sees the chain up to its limit, and its own segment up to itself.
        before = (segments == 0)[:, None, :] & (column < limits[..., None])
        own = (segments[:, None, :] == segments[..., None]) & (column <= column[:, None])
        mask = additive_mask(before | own, rim.dtype)
    causal_lm(rim).base_model(
        input_ids=padded("ids", rim.eos_id), attention_mask=mask, position_ids=padded("positions", 0), use_cache=False
    )
