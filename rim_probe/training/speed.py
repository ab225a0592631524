"""How fast a training is: real tokens per second, and the share of what the device can do (model FLOP utilisation).

Knows weights, batches and clocks. Knows nothing about objectives or recipes.

FLOPs are those that the training needs, not those that are run (PaLM, arXiv:2204.02311, appendix B): recomputation,
padding and masked positions count nothing. Per token a weight that is trained costs 6 (forward 2, gradient of the input
2, gradient of the weight 2), and a frozen one 4, for it has no gradient of its own. Embeddings are looked up and cost
nothing; the output head costs the same 4 or 6 per weight, at labelled positions only. Attention costs
12 * layers * heads * head width * length per token (PaLM's term: scores and mixture, forward and backward, not halved
for the causal mask).
"""

import time
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TrainingArguments

from rim_probe.packing import PADDING
from rim_probe.precision import matrix_rate

_FROZEN, _TRAINED = 4, 6  # FLOPs per weight and token


@dataclass(frozen=True)
class Work:
    """What one step of training costs.

    Attributes:
        token: FLOPs per real token in the weights of the layers.
        label: FLOPs per labelled position, in the output head.
        pair: FLOPs per pair of tokens of one row, in attention.
    """

    token: int
    label: int
    pair: int

    def flops(self, tokens: int, labels: int, pairs: int) -> float:
        """FLOPs of rows with so many real tokens and labels in all; `pairs` is the sum of their squared lengths."""
        return float(self.token * tokens + self.label * labels + self.pair * pairs)


def count_work(model) -> Work:
    """The FLOPs of a causal LM, read off its weights and configuration; PEFT adapters are understood."""
    head = model.get_output_embeddings()
    lookups = [module for module in model.modules() if isinstance(module, torch.nn.Embedding)]
    apart = {id(p) for module in (model.get_input_embeddings(), head, *lookups) for p in module.parameters()}
    layers = [p for p in model.parameters() if id(p) not in apart]
    config = model.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    head_weights = config.vocab_size * config.hidden_size
    head_cost = _TRAINED if any(p.requires_grad and p.numel() >= head_weights for p in head.parameters()) else _FROZEN
    return Work(
        token=sum(p.numel() * (_TRAINED if p.requires_grad else _FROZEN) for p in layers),
        label=head_weights * head_cost,
        pair=12 * config.num_hidden_layers * config.num_attention_heads * width,
    )


class Meter:
    """Counts what was trained since it was last read.

    What is on a GPU is counted there and read with the next log, so that counting makes nobody wait.
    """

    def __init__(self, model, device: torch.device, dtype: torch.dtype):
        self._work, self._device, self._dtype = count_work(model), device, dtype
        self.restart()

    def restart(self) -> None:
        """Forgets everything counted so far and starts the clock."""
        self._counts = torch.zeros(2, dtype=torch.long, device=self._device)  # real tokens, pairs
        self._rows = self._places = self._labels = 0
        self._start = time.perf_counter()

    def count(self, batch: dict[str, torch.Tensor]) -> None:
        """Takes note of one batch that is trained: `readouts` [B, L], and what is labelled: `places`, `slot_places`."""
        lengths = (batch["readouts"] != PADDING).sum(1)
        self._counts += torch.stack([lengths.sum(), lengths.square().sum()])
        self._rows += len(lengths)
        self._places += batch["readouts"].numel()
        self._labels += len(batch["places"]) + sum(map(len, batch.get("slot_places", ())))

    def skip(self, seconds: float) -> None:
        """Leaves out time that was not spent on training."""
        self._start += seconds

    def read(self, accelerator: Any = None) -> dict[str, float]:
        """Rates of all processes together since the last reading, or nothing if no row was trained.

        `rows_per_second`, `tokens_per_second` (padding left out), `padding` (share of positions), `tflops` (10^12
        FLOP/s) and `utilisation` (of `matrix_rate` of as many devices in the precision of training), and on a GPU
        `peak_gb` of this process.
        """
        if not self._rows:
            return {}
        counts = torch.cat([self._counts, self._counts.new_tensor([self._rows, self._places, self._labels])])
        devices = 1
        if accelerator is not None and accelerator.num_processes > 1:
            counts, devices = accelerator.reduce(counts, "sum"), accelerator.num_processes
        tokens, pairs, rows, places, labels = counts.tolist()
        seconds = max(1e-9, time.perf_counter() - self._start)
        rate = self._work.flops(tokens, labels, pairs) / seconds
        reading = {
            "rows_per_second": round(rows / seconds, 3),
            "tokens_per_second": round(tokens / seconds, 1),
            "padding": round(1 - tokens / places, 4),
            "tflops": round(rate / 1e12, 6),
            "utilisation": round(rate / (devices * matrix_rate(self._device.type, self._dtype)), 5),
        }
        if self._device.type == "cuda":
            reading["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 3)
        self.restart()
        return reading


def told(reading: dict[str, float], args: TrainingArguments) -> str:
    """A reading in words, with both numbers that make the utilisation."""
    if "tflops" not in reading:
        return ""
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    kind = str(dtype).removeprefix("torch.")
    whole = matrix_rate(args.device.type, dtype) / 1e12
    text = f"{_short(reading['rows_per_second'])} rows/s, {_short(reading['tokens_per_second'])} tokens/s, "
    text += f"{100 * reading['utilisation']:.1f}% MFU ({reading['tflops']:.3g} of {whole:.3g} TFLOP/s {kind})"
    return text + (f", {reading['peak_gb']:.1f} GB" if "peak_gb" in reading else "")


def _short(value: float) -> str:
    return f"{value:.1f}" if value < 100 else f"{value:,.0f}"
