"""Capture: what one forward pass leaves at the memory blocks of many questions.

Method:
1. Questions are packed right-padded, like lengths together; causal text needs no mask for that, so the model keeps its
   fastest attention.
2. Forward hooks read the residual stream of the chosen layers and keep the rows that matter: slots, block ends, the
   last question token, the answer position. The attention weights of slot and block-end queries are computed for those
   queries alone.
3. Of the logits one column is computed; nothing else of the pass is kept.

Knows prompts and positions. Knows nothing of probes, gold steps or answers.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from tqdm import tqdm

from rim_probe.errors import RiMError
from rim_probe.model import RiM
from rim_probe.probing.hooks import causal_lm, layer_numbers, num_layers, observe_attention, read_residual

if TYPE_CHECKING:
    import pandas

Position = int | Literal["end", "slots"]
SHARD_QUESTIONS = 512


class _Cells:
    """Access to single cells, the same for a capture in memory and one on disk.

    Attributes (of both): layers, K, M, num_questions.
    """

    def _layer(self, name: str, layer: int) -> np.ndarray:
        """All questions' tensor `name` at one layer, float32 [n, ...]."""
        raise NotImplementedError

    def cell(self, layer: int, block: int, position: Position) -> np.ndarray:
        """The states of one cell, float32 [n, d].

        Args:
            layer: 0..L, one of `layers`.
            block: 1..K.
            position: slot 1..M, `end` of the block, or `slots` for all M slots side by side, [n, M * d].
        """
        if not 1 <= block <= self.K or position not in (*range(1, self.M + 1), "end", "slots"):
            raise RiMError(
                f"There is no position {position!r} in block {block!r}; blocks are 1 to {self.K}, positions 1 to "
                f"{self.M}, 'slots' or 'end'."
            )
        if position == "end":
            return self._layer("ends", layer)[:, block - 1]
        states = self._layer("slots", layer)[:, block - 1]
        return states.reshape(len(states), -1) if position == "slots" else states[:, position - 1]

    def question_cell(self, layer: int) -> np.ndarray:
        """The states at the last question token, float32 [n, d]."""
        return self._layer("question", layer)

    def answer_cell(self, layer: int) -> np.ndarray:
        """The states where the answer's first token is predicted, float32 [n, d]."""
        return self._layer("answer", layer)

    def _index(self, layer: int) -> int:
        if layer not in self.layers:
            raise RiMError(f"Layer {layer!r} was not captured; layers are {', '.join(map(str, self.layers))}.")
        return self.layers.index(layer)


@dataclass(frozen=True)
class Capture(_Cells):
    """n questions, K blocks of M slots, A attention layers, H heads, Q = K * (M + 1) queries; tensors on the CPU.

    Attributes:
        layers: the residual layers held, see `hooks` for their numbers.
        slots [n, layers, K, M, d]: the memory slots.
        ends [n, layers, K, d]: the end token of each block, which predicts the first token of its readout.
        question [n, layers, d]: the last question token.
        answer [n, layers, d]: the last prompt token, which predicts the answer's first token (memory: the last end).
        to_question [n, A, H, Q, W], to_memory [n, A, H, Q, K * (M + 2)]: attention weights of decoder layers 1..L (layer
            l reads the residual stream l - 1) from each block's slots 1..M and then its end, block after block; to the
            question's tokens (0 beyond its end, W is the longest), and to each block's begin, slots and end. Each row
            sums to 1 over both. None where attention was not asked for.
        question_ids: token ids of each question.
    """

    layers: tuple[int, ...]
    slots: torch.Tensor
    ends: torch.Tensor
    question: torch.Tensor
    answer: torch.Tensor
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

    def _layer(self, name: str, layer: int) -> np.ndarray:
        return getattr(self, name)[:, self._index(layer)].float().numpy()

    def numpy(self) -> dict[str, np.ndarray]:
        """Every tensor by name, in float32."""
        return {name: tensor.float().numpy() for name, tensor in self._tensors().items()}

    def to_pandas(self) -> "pandas.DataFrame":
        """Residual states, one row per question, layer, block and position (slot 1..M or `end`), a column per dim."""
        import pandas

        states = torch.cat([self.slots, self.ends.unsqueeze(3)], dim=3).float()
        index = pandas.MultiIndex.from_product(
            [
                range(self.num_questions),
                self.layers,
                range(1, self.K + 1),
                [*(str(slot) for slot in range(1, self.M + 1)), "end"],
            ],
            names=["question", "layer", "block", "position"],
        )
        return pandas.DataFrame(states.flatten(0, 3).numpy(), index=index)

    def _tensors(self) -> dict[str, torch.Tensor]:
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in named.items() if isinstance(value, torch.Tensor)}


@torch.inference_mode()
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
        RiMError: a question that cannot be asked, an unknown layer or method.
    """
    questions = [questions] if isinstance(questions, str) else list(questions)
    if not questions:
        raise RiMError("There is no question to capture; give at least one.")
    chosen = layer_numbers(layers, rim)
    prompts = [rim.prompt_ids(question, method, num_blocks) for question in questions]
    question_ids = [rim.encode_question(question) for question in questions]
    layout, lengths = rim.layout, torch.tensor([len(ids) for ids in question_ids])
    num_blocks = layout.check_blocks(num_blocks) if method == "memory" else 0
    slots = _columns(lengths, layout.slot_positions(0, num_blocks)).unflatten(1, (num_blocks, layout.slots_per_block))
    ends = _columns(lengths, layout.end_positions(0, num_blocks))
    kept = {
        "slots": slots,
        "ends": ends,
        "question": lengths - 1,
        "answer": torch.tensor([len(prompt) - 1 for prompt in prompts]),
    }
    config = causal_lm(rim).config
    tensors = {
        name: torch.empty(len(prompts), len(chosen), *columns.shape[1:], config.hidden_size, dtype=rim.dtype)
        for name, columns in kept.items()
    }
    observed = attention and num_blocks > 0
    queries = torch.cat([slots, ends.unsqueeze(2)], dim=2).flatten(1)  # [n, Q]
    width, tail = int(lengths.max()), num_blocks * layout.block_length
    if observed:
        shape = (len(prompts), num_layers(rim), config.num_attention_heads, queries.shape[1])
        tensors["to_question"] = torch.zeros(*shape, width, dtype=rim.dtype)
        tensors["to_memory"] = torch.zeros(*shape, tail, dtype=rim.dtype)

    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), batch_size):
        batch = torch.tensor(order[start : start + batch_size])

        def read(layer, states, batch=batch):
            rows = torch.arange(len(batch), device=states.device)
            for name, columns in kept.items():
                places = columns[batch].to(states.device)
                picked = states[rows.view(-1, *[1] * (places.dim() - 1)), places]
                tensors[name][batch, chosen.index(layer)] = picked.cpu()

        def record(layer, weights, batch=batch):
            own = lengths[batch].to(weights.device)
            inside = torch.arange(min(width, weights.shape[-1]), device=weights.device) < own[:, None]
            to_question = weights[..., : inside.shape[1]] * inside[:, None, None]
            tensors["to_question"][batch, layer - 1, :, :, : inside.shape[1]] = to_question.to(rim.dtype).cpu()
            places = own[:, None] + torch.arange(tail, device=weights.device)
            index = places[:, None, None].expand(-1, *weights.shape[1:3], -1)
            tensors["to_memory"][batch, layer - 1] = weights.gather(3, index).to(rim.dtype).cpu()

        with read_residual(rim, chosen, read):
            if observed:
                with observe_attention(rim, queries[batch].to(rim.device), record):
                    _pass(rim, [prompts[i] for i in batch])
            else:
                _pass(rim, [prompts[i] for i in batch])
    return Capture(
        layers=chosen,
        to_question=tensors.pop("to_question", None),
        to_memory=tensors.pop("to_memory", None),
        question_ids=question_ids,
        **tensors,
    )


def _columns(lengths: torch.Tensor, offsets: Sequence) -> torch.Tensor:
    """Question lengths [n] and places after the question [...] -> columns [n, P]."""
    flat = torch.tensor(offsets, dtype=torch.long).flatten()
    return lengths[:, None] + flat


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
        from safetensors import SafetensorError, safe_open

        try:
            return [safe_open(path, "pt") for path in self._shards]
        except (OSError, SafetensorError) as error:
            raise RiMError(f"{self.folder} holds a damaged shard ({error}); capture the questions again.") from None

    def _layer(self, name: str, layer: int) -> np.ndarray:
        self._index(layer)
        return torch.cat([file.get_tensor(f"{name}.{layer}") for file in self._files]).float().numpy()

    def __iter__(self) -> Iterator[Capture]:
        for file in self._files:
            tensors = {
                name: torch.stack([file.get_tensor(f"{name}.{layer}") for layer in self.layers], dim=1)
                for name in ("slots", "ends", "question", "answer")
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

    The folder must belong to this model and these questions: the caller names it so (see `study`).
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    chosen = layer_numbers(layers, rim)
    shards = [questions[start : start + SHARD_QUESTIONS] for start in range(0, len(questions), SHARD_QUESTIONS)]
    names = [f"shard-{number:05d}.safetensors" for number in range(len(shards))]
    with tqdm(total=len(questions), desc=f"capture {folder.name}", unit="question", disable=not progress) as bar:
        for name, shard in zip(names, shards, strict=True):
            if not (folder / name).exists():
                held = capture(rim, shard, chosen, False, method=method, num_blocks=num_blocks, batch_size=batch_size)
                tensors = {
                    f"{part}.{layer}": getattr(held, part)[:, i].contiguous()
                    for part in ("slots", "ends", "question", "answer")
                    for i, layer in enumerate(chosen)
                }
                tensors["question_lengths"] = torch.tensor([len(ids) for ids in held.question_ids])
                tensors["question_ids"] = torch.tensor([id for ids in held.question_ids for id in ids])
                partial = folder / (name + ".partial")  # an interrupted write must not pass for a shard
                save_file(tensors, partial)
                partial.replace(folder / name)
            bar.update(len(shard))
    index = {
        "layers": list(chosen),
        "num_blocks": rim.layout.check_blocks(num_blocks) if method == "memory" else 0,
        "slots_per_block": rim.layout.slots_per_block,
        "num_questions": len(questions),
        "shards": names,
    }
    (folder / "capture.json").write_text(json.dumps(index), encoding="utf-8")
    return CaptureSet(folder)
