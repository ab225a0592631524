"""Capture: what one forward pass leaves at the memory blocks of many questions.

Method:
1. Questions are packed right-padded, like lengths together; causal text needs no mask for that, so the model keeps its
   fastest attention.
2. Forward hooks read the residual stream of the chosen layers and keep the rows that matter: slots, block ends, the
   last question token. The attention weights of slot and block-end queries are computed for those queries alone.
3. No logits are computed; nothing else of the pass is kept.

Knows prompts and positions. Knows nothing of probes, gold steps or answers.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm

from rim_probe.errors import RiMError
from rim_probe.files import write_atomic
from rim_probe.model import RiM
from rim_probe.probing.hooks import (
    causal_lm,
    layer_number,
    layer_numbers,
    num_layers,
    observe_attention,
    read_residual,
    require_residual,
    tells_attention,
)

Position = int | Literal["end", "slots"]
SHARD_QUESTIONS, SHARD_BYTES = 512, 2**28  # whichever is reached first
PARTS = ("slots", "ends", "question")


class _Cells:
    """Access to single cells, the same for a capture in memory and one on disk.

    Attributes (of both): layers, K, M, num_questions.
    """

    def _states(self, name: str, layer: int, block: int | None = None) -> torch.Tensor:
        """All questions' tensor `name` at one of `layers`, of one block (1..K) where it has blocks: [n, ...]."""
        raise NotImplementedError

    def cell(self, layer: int | str, block: int, position: Position) -> np.ndarray:
        """The states of one cell, float32 [n, d].

        Args:
            layer: 0..L, one of `layers`, or its TransformerLens name.
            block: 1..K.
            position: slot 1..M, `end` of the block, or `slots` for all M slots side by side, [n, M * d].
        """
        if not 1 <= block <= self.K or position not in (*range(1, self.M + 1), "end", "slots"):
            raise RiMError(
                f"There is no position {position!r} in block {block!r}; blocks are 1 to {self.K}, positions 1 to "
                f"{self.M}, 'slots' or 'end'."
            )
        if position == "end":
            return self._array("ends", layer, block)
        states = self._array("slots", layer, block)
        return states.reshape(len(states), -1) if position == "slots" else states[:, position - 1]

    def question_cell(self, layer: int | str) -> np.ndarray:
        """The states at the last question token, float32 [n, d]."""
        return self._array("question", layer)

    def _array(self, name: str, layer: int | str, block: int | None = None) -> np.ndarray:
        number = layer_number(layer, max(self.layers)) if isinstance(layer, str) else layer
        if number not in self.layers:
            raise RiMError(f"Layer {layer!r} was not captured; layers are {', '.join(map(str, self.layers))}.")
        return self._states(name, number, block).float().numpy()


@dataclass(frozen=True)
class Capture(_Cells):
    """n questions, K blocks of M slots, A attention layers, H heads, Q = K * (M + 1) queries; tensors on the CPU.

    Attributes:
        layers: the residual layers held, see `hooks` for their numbers.
        slots [n, layers, K, M, d]: the memory slots.
        ends [n, layers, K, d]: the end token of each block, which predicts the first token of its readout.
        question [n, layers, d]: the last question token.
        to_question [n, A, H, Q, W], to_memory [n, A, H, Q, K * (M + 2)]: attention weights of decoder layers 1..L
            (layer l reads the residual stream l - 1) from each block's slots 1..M and then its end, block after block;
            to the question's tokens (0 beyond its end, W is the longest), and to each block's begin, slots and end.
            Each row sums to 1 over both. None where attention was not asked for, or is not told by every layer.
        question_ids: token ids of each question.
    """

    layers: tuple[int, ...]
    slots: torch.Tensor
    ends: torch.Tensor
    question: torch.Tensor
    to_question: torch.Tensor | None
    to_memory: torch.Tensor | None
    question_ids: list[list[int]]

    @property
    def K(self) -> int:
        return self.slots.shape[2]

    @property
    def M(self) -> int:
        return self.slots.shape[3]

    @property
    def num_questions(self) -> int:
        return len(self.slots)

    def _states(self, name: str, layer: int, block: int | None = None) -> torch.Tensor:
        states = getattr(self, name)[:, self.layers.index(layer)]
        return states if block is None else states[:, block - 1]


@torch.no_grad()  # not inference mode, whose tensors no probe could be trained on
def capture(
    rim: RiM,
    questions: str | Sequence[str],
    layers: Sequence[int | str] | None = None,
    attention: bool = True,
    *,
    method: str = "memory",
    num_blocks: int | None = None,
    batch_size: int = 32,
) -> Capture:
    """One pass over each question's prompt; see `Capture`.

    Args:
        layers: numbers or TransformerLens names (`blocks.5.hook_resid_post`); None for all.
        attention: also keep attention weights (memory only).
        method: whose prompt: `memory`, `direct` or `cot`; without blocks K is 0.
        num_blocks: K, None for the layout's own (memory only).

    Raises:
        RiMError: a question that cannot be asked, an unknown layer or method, a model whose states cannot be read.
    """
    questions = [questions] if isinstance(questions, str) else list(questions)
    if not questions:
        raise RiMError("There is no question to capture; give at least one.")
    chosen = layer_numbers(layers, rim)
    if rim.model.training:
        rim.model.eval()  # dropout would be captured as well
    prompts = [rim.prompt_ids(question, method, num_blocks) for question in questions]
    require_residual(rim)
    layout = rim.layout
    num_blocks = layout.check_blocks(num_blocks) if method == "memory" else 0
    tail = {"memory": num_blocks * layout.block_length, "direct": len(rim.encoder.marker_ids), "cot": 0}[method]
    question_ids = [prompt[: len(prompt) - tail] for prompt in prompts]
    lengths = torch.tensor([len(ids) for ids in question_ids])
    slots = _columns(lengths, layout.slot_positions(0, num_blocks))  # [n, K * M]
    ends = _columns(lengths, layout.end_positions(0, num_blocks))
    kept = torch.cat([slots, ends, lengths[:, None] - 1], dim=1)
    config, count = causal_lm(rim).config, len(prompts)
    # Layers first, so that what a pass writes, and what a probe reads later, lies together.
    states = torch.empty(len(chosen), count, kept.shape[1], config.hidden_size, dtype=rim.dtype)
    weights = None
    if attention and num_blocks > 0 and tells_attention(rim):
        queries = torch.cat([slots.unflatten(1, (num_blocks, -1)), ends.unsqueeze(2)], dim=2).flatten(1)  # [n, Q]
        weights = _Weights(rim, queries, lengths, tail)

    _keep_heap()
    order = sorted(range(count), key=lambda i: len(prompts[i]))
    for start in range(0, count, batch_size):
        batch = torch.tensor(order[start : start + batch_size])
        length = max(len(prompts[i]) for i in batch)
        rows = (torch.arange(len(batch))[:, None] * length + kept[batch]).flatten().to(rim.device)

        def read(layer, stream, batch=batch, rows=rows):
            picked = stream.flatten(0, 1).index_select(0, rows).cpu()
            states[chosen.index(layer)].index_copy_(0, batch, picked.view(len(batch), *states.shape[2:]))

        with read_residual(rim, chosen, read), weights.observe(batch) if weights else nullcontext():
            _pass(rim, [prompts[i] for i in batch])
    parts = states.transpose(0, 1).split([slots.shape[1], ends.shape[1], 1], dim=2)
    return Capture(
        layers=chosen,
        slots=parts[0].unflatten(2, (num_blocks, layout.slots_per_block)),
        ends=parts[1],
        question=parts[2].squeeze(2),
        to_question=weights.to_question.transpose(0, 1) if weights else None,
        to_memory=weights.to_memory.transpose(0, 1) if weights else None,
        question_ids=question_ids,
    )


class _Weights:
    """The attention weights of many questions, filled in batch by batch.

    Attributes:
        to_question [A, n, H, Q, W], to_memory [A, n, H, Q, tail]: see `Capture`; layers first.
    """

    def __init__(self, rim: RiM, queries: torch.Tensor, lengths: torch.Tensor, tail: int):
        self._rim, self._queries, self._lengths, self._tail = rim, queries, lengths, tail
        shape = (num_layers(rim), len(queries), causal_lm(rim).config.num_attention_heads, queries.shape[1])
        self.to_question = torch.zeros(*shape, int(lengths.max()), dtype=rim.dtype)
        self.to_memory = torch.empty(*shape, tail, dtype=rim.dtype)

    def observe(self, batch: torch.Tensor) -> AbstractContextManager:
        """Keeps the weights of the pass inside the context, which is over the questions `batch` [B]."""
        lengths = self._lengths[batch, None]
        width = int(lengths.max())
        # Keys in the order of `Capture`, so that weights are copied once: question, padding, memory.
        question = torch.arange(width).expand(len(batch), -1)
        columns = torch.cat(
            [question.masked_fill(question >= lengths, -1), lengths + torch.arange(self._tail)], dim=1
        ).to(self._rim.device)

        def record(layer: int, weights: torch.Tensor) -> None:
            weights = weights.to(self.to_memory.dtype).cpu()
            self.to_question[layer - 1, ..., :width].index_copy_(0, batch, weights[..., :width])
            self.to_memory[layer - 1].index_copy_(0, batch, weights[..., width:])

        return observe_attention(self._rim, self._queries[batch].to(self._rim.device), record, columns)


def _columns(lengths: torch.Tensor, offsets: Sequence) -> torch.Tensor:
    """Question lengths [n] and places after the question [...] -> columns [n, P]."""
    flat = torch.tensor(offsets, dtype=torch.long).flatten()
    return lengths[:, None] + flat


@cache
def _keep_heap() -> None:
    """Spares a pass on the CPU the memory that it would give back to the system after one layer and fetch again for the
    next, a fourth of the time of a small model: glibc keeps up to twice the largest block freed, of those below 32 MiB
    (nothing is written to this one, so it takes no memory itself)."""
    torch.empty(2**25 - 2**13, dtype=torch.uint8)


def _pass(rim: RiM, prompts: list[list[int]]) -> None:
    """One forward pass for its hooks: the backbone alone, since no logits are wanted."""
    length = max(map(len, prompts))
    # Whatever stands right of a prompt, none of its tokens sees it.
    ids = torch.tensor([prompt + [rim.encoder.eos_id] * (length - len(prompt)) for prompt in prompts])
    causal_lm(rim).base_model(input_ids=ids.to(rim.device), use_cache=False)


# -------------------------------------------------------------------------------------------------------------- on disk


class CaptureSet(_Cells):
    """Captures of many questions in safetensors shards, one tensor per name and layer; read cell by cell.

    Iterating gives each shard as a `Capture` without attention.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        try:
            index = json.loads((self.folder / "capture.json").read_text(encoding="utf-8"))
            self.layers = tuple(index["layers"])
            self.K, self.M = index["num_blocks"], index["slots_per_block"]
            self.num_questions = index["num_questions"]
            self._shards = [self.folder / name for name in index["shards"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RiMError(f"{self.folder} holds no complete capture ({error}); capture the questions again.") from None

    @cached_property
    def _files(self):
        files = [_open(path, self.layers) for path in self._shards]
        if None in files:
            damaged = self._shards[files.index(None)]
            raise RiMError(f"{damaged} is missing or damaged; capture the questions again, which mends it.")
        return files

    def _states(self, name: str, layer: int, block: int | None = None) -> torch.Tensor:
        # A slice reads what is asked for and no more: 300 times faster than the whole layer for one block of it.
        where = (slice(None),) if block is None else (slice(None), block - 1)
        return torch.cat([file.get_slice(f"{name}.{layer}")[where] for file in self._files])

    def __iter__(self) -> Iterator[Capture]:
        for file in self._files:
            tensors = {
                name: torch.stack([file.get_tensor(f"{name}.{layer}") for layer in self.layers], dim=1)
                for name in PARTS
            }
            lengths, flat = file.get_tensor("question_lengths").tolist(), file.get_tensor("question_ids")
            question_ids = [ids.tolist() for ids in flat.split(lengths)]
            yield Capture(self.layers, **tensors, to_question=None, to_memory=None, question_ids=question_ids)


def capture_to(
    folder: str | Path,
    rim: RiM,
    questions: Sequence[str],
    layers: Sequence[int | str] | None = None,
    *,
    method: str = "memory",
    num_blocks: int | None = None,
    batch_size: int = 32,
    progress: bool = True,
) -> CaptureSet:
    """Streams the captures of a data set (without attention) into `folder`, shard by shard; resumes at the first one
    missing. Memory is bounded by one shard.

    Every shard names the model, the questions and the options it was made from: one that is damaged or made from others
    is made again, whatever lies in the folder.

    Raises:
        RiMError: as `capture`.
    """
    from safetensors.torch import save_file

    folder, questions = Path(folder), list(questions)
    if not questions:
        raise RiMError("There is no question to capture; give at least one.")
    folder.mkdir(parents=True, exist_ok=True)
    chosen = layer_numbers(layers, rim)
    blocks = rim.layout.check_blocks(num_blocks) if method == "memory" else 0
    states = len(chosen) * (blocks * (rim.layout.slots_per_block + 1) + 1) * causal_lm(rim).config.hidden_size
    size = max(1, min(SHARD_QUESTIONS, SHARD_BYTES // (states * rim.dtype.itemsize)))
    shards = [questions[start : start + size] for start in range(0, len(questions), size)]
    names = [f"shard-{number:05d}.safetensors" for number in range(len(shards))]
    with tqdm(total=len(questions), desc=f"capture {folder.name}", unit="question", disable=not progress) as bar:
        for name, shard in zip(names, shards, strict=True):
            key = request_key(rim, shard, method, blocks, chosen)
            file = _open(folder / name, chosen)
            if file is None or file.metadata().get("key") != key:
                held = capture(rim, shard, chosen, False, method=method, num_blocks=num_blocks, batch_size=batch_size)
                tensors = {
                    f"{part}.{layer}": getattr(held, part)[:, i].contiguous()
                    for part in PARTS
                    for i, layer in enumerate(chosen)
                }
                tensors["question_lengths"] = torch.tensor([len(ids) for ids in held.question_ids])
                tensors["question_ids"] = torch.tensor([id for ids in held.question_ids for id in ids])
                partial = folder / (name + ".partial")  # an interrupted write must not pass for a shard
                save_file(tensors, partial, metadata={"key": key})
                partial.replace(folder / name)
            bar.update(len(shard))
    index = {
        "layers": list(chosen),
        "num_blocks": blocks,
        "slots_per_block": rim.layout.slots_per_block,
        "num_questions": len(questions),
        "shards": names,
    }
    write_atomic(folder / "capture.json", json.dumps(index).encode())
    return CaptureSet(folder)


def _open(path: Path, layers: Sequence[int]):
    """A shard opened for reading; None where it is missing, damaged or lacks a tensor."""
    from safetensors import SafetensorError, safe_open

    try:
        file = safe_open(path, "pt")
    except (OSError, SafetensorError):
        return None
    wanted = {f"{part}.{layer}" for part in PARTS for layer in layers} | {"question_lengths", "question_ids"}
    return file if wanted <= set(file.keys()) and file.metadata() else None


def request_key(rim: RiM, questions: Sequence[str], *options) -> str:
    """A digest of everything that what a model does with questions depends on: weights, dtype, questions, options."""
    from rim_probe.probing.artifacts import fingerprint

    request = [fingerprint(rim), str(rim.dtype), list(questions), options]
    return hashlib.sha256(json.dumps(request).encode()).hexdigest()
