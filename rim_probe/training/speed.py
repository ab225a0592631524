"""How fast a training is: rows and real tokens per second, the share of padding, and the peak of a GPU's memory.

Knows batches and clocks. Knows nothing about objectives or recipes.
"""

import time
from typing import Any

import torch

from rim_probe.packing import PADDING


class Meter:
    """Counts what was trained since it was last read.

    What is on a GPU is counted there and read with the next log, so that counting makes nobody wait.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self.restart()

    def restart(self) -> None:
        """Forgets everything counted so far and starts the clock."""
        self._tokens = torch.zeros(1, dtype=torch.long, device=self._device)  # padding left out
        self._rows = self._places = 0
        self._start = time.perf_counter()

    def count(self, batch: dict[str, torch.Tensor]) -> None:
        """Takes note of one batch that is trained: `readouts` [B, L]."""
        self._tokens += (batch["readouts"] != PADDING).sum()
        self._rows += len(batch["readouts"])
        self._places += batch["readouts"].numel()

    def skip(self, seconds: float) -> None:
        """Leaves out time that was not spent on training."""
        self._start += seconds

    def read(self, accelerator: Any = None) -> dict[str, float]:
        """Rates of all processes together since the last reading, or nothing if no row was trained.

        `rows_per_second`, `tokens_per_second` (padding left out), `padding` (share of positions), and on a GPU
        `peak_gb` of this process.
        """
        if not self._rows:
            return {}
        counts = torch.cat([self._tokens, self._tokens.new_tensor([self._rows, self._places])])
        if accelerator is not None and accelerator.num_processes > 1:
            counts = accelerator.reduce(counts, "sum")
        tokens, rows, places = counts.tolist()
        seconds = max(1e-9, time.perf_counter() - self._start)
        reading = {
            "rows_per_second": round(rows / seconds, 3),
            "tokens_per_second": round(tokens / seconds, 1),
            "padding": round(1 - tokens / places, 4),
        }
        if self._device.type == "cuda":
            reading["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 3)
        self.restart()
        return reading


def told(reading: dict[str, float]) -> str:
    """A reading in words."""
    if "rows_per_second" not in reading:
        return ""
    text = f"{_short(reading['rows_per_second'])} rows/s, {_short(reading['tokens_per_second'])} tokens/s"
    return text + (f", {reading['peak_gb']:.1f} GB" if "peak_gb" in reading else "")


def _short(value: float) -> str:
    return f"{value:.1f}" if value < 100 else f"{value:,.0f}"
