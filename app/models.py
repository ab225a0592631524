"""The checkpoints the page can use: which there are, what can be read without their weights, and loading one.

Knows folders and threads. Does not know Gradio. Models are loaded in the background and nothing heavy is imported
before, so the page is up before torch is.
"""

from __future__ import annotations

import logging
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rim_probe.errors import CheckpointError, RiMError
from rim_probe.memory import LAYOUT_FILE, MemoryLayout

if TYPE_CHECKING:
    from rim_probe.model import RiM
    from rim_probe.problems import Problem

log = logging.getLogger(__name__)

CHECKPOINTS = Path(__file__).parent.parent / "checkpoints"
SMALL_MODEL = 20_000_000  # parameters
KEPT = 2  # so that two visitors with two models do not throw out each other's
WARM_UPS = 3  # the first passes pay for allocation and the choice of kernels; no visitor should


@dataclass
class Loading:
    """How far a checkpoint is: `models` when it is ready, `error` when it failed, neither while it is being loaded."""

    models: dict[str, RiM] | None = None
    error: RiMError | None = None
    note: str = ""  # what a visitor should know, for example that the GPU was not usable


class ModelShelf:
    """Checkpoints by name. The last few that were used stay in memory.

    Args:
        folder: where checkpoint folders lie.
        preferred: a checkpoint folder or Hub id that comes first; may lie elsewhere.
        device: "cpu", "cuda", or None for the GPU where there is one. A GPU that cannot be used falls back to the CPU.
    """

    def __init__(self, folder: Path = CHECKPOINTS, preferred: str | None = None, device: str | None = None):
        self._paths: dict[str, str] = {}
        if preferred is not None:
            self._paths[Path(preferred).name] = str(preferred)
        if folder.is_dir():
            for path in sorted(folder.iterdir()):
                if (path / LAYOUT_FILE).is_file():
                    self._paths.setdefault(path.name, str(path))
        self._device = device
        self._threads: int | None = None  # torch's own choice, once torch is there
        self._lock = threading.Lock()
        self._ready = threading.Condition(self._lock)
        self._loadings: dict[str, Loading] = {}

    @property
    def names(self) -> list[str]:
        return list(self._paths)

    def path(self, name: str | None) -> str:
        """Where checkpoint `name` lies.

        Raises:
            CheckpointError: not one of `names`.
        """
        if not self._paths:
            raise CheckpointError(
                "There is no checkpoint to ask; train one (`python -m rim_probe train`) or start with --model FOLDER."
            )
        if name not in self._paths:
            raise CheckpointError(
                f"There is no checkpoint {str(name)[:60]!r} here; choose one of {', '.join(self._paths)}."
            )
        return self._paths[name]

    def layout(self, name: str) -> MemoryLayout:
        """The checkpoint's memory layout, read without loading weights; the default one for a Hub id not loaded yet.

        Raises:
            LayoutError: a damaged layout file. CheckpointError: no such checkpoint.
        """
        path = Path(self.path(name))
        loading = self._loadings.get(name)
        if loading is not None and loading.models is not None:
            return loading.models["memory"].layout
        return MemoryLayout.load(path) if path.is_dir() else MemoryLayout()

    def examples(self, name: str) -> list[Problem]:
        """The checkpoint's example problems; empty where it brings none.

        Raises:
            RiMError: a damaged examples file, or no such checkpoint.
        """
        from rim_probe.gallery import load_examples

        path = Path(self.path(name))
        return load_examples(path)

    def start(self, name: str) -> Loading:
        """Begins to load a checkpoint in the background, unless that is done or under way; after a failure, again."""
        path = self.path(name)
        with self._lock:
            loading = self._loadings.get(name)
            if loading is None or loading.error is not None:
                ready = [other for other, value in self._loadings.items() if value.models is not None]
                for other in ready[: len(ready) + 1 - KEPT]:
                    del self._loadings[other]
                loading = self._loadings[name] = Loading()
                threading.Thread(
                    target=self._load, args=(name, path, loading), name=f"load {name}", daemon=True
                ).start()
        return loading

    def wait(self, name: str, cancel: threading.Event, seconds: float = 0.2) -> dict[str, RiM] | None:
        """The loaded models by method, or None if that takes longer than `seconds` (ask again) or `cancel` is set.

        Raises:
            RiMError: loading failed.
        """
        loading = self.start(name)
        with self._ready:
            self._ready.wait_for(lambda: loading.models or loading.error or cancel.is_set(), timeout=seconds)
        if loading.error is not None:
            raise loading.error
        return None if cancel.is_set() else loading.models

    def _load(self, name: str, path: str, loading: Loading) -> None:
        models, error = None, None
        try:
            models, loading.note = _load_somewhere(path, self._device)
            self._spare_threads(models)
            self._warm_up(name, models)
        except RiMError as raised:
            error = raised
        except Exception:  # a visitor gets a sentence, the log the rest
            log.exception("loading %s failed", path)
            error = CheckpointError(f"The checkpoint {name} could not be loaded; the server's log has the details.")
        with self._ready:
            loading.models, loading.error = (models, None) if error is None else (None, error)
            self._ready.notify_all()

    def _spare_threads(self, models: dict[str, RiM]) -> None:
        """One CPU thread for a small model: it gains nothing from more, and waits for them where cores are shared."""
        import torch

        self._threads = self._threads or torch.get_num_threads()
        parameters = max(sum(parameter.numel() for parameter in rim.model.parameters()) for rim in models.values())
        torch.set_num_threads(1 if parameters < SMALL_MODEL else self._threads)

    def _warm_up(self, name: str, models: dict[str, RiM]) -> None:
        from rim_probe.decoding import answer

        try:
            examples = self.examples(name)
            for problem in examples[:WARM_UPS]:
                for method in ("memory", "cot"):
                    answer(models[method], problem.question, method, max_new_tokens=16)
        except RiMError as error:  # the page says so where it shows examples; the model itself is usable
            log.warning("no warm-up for %s: %s", name, error)


def _load_somewhere(path: str, device: str | None) -> tuple[dict[str, RiM], str]:
    """Loads on the device asked for, or on the CPU with a note if that device is there but cannot be used."""
    import torch
    from transformers.utils import logging as transformers_logging

    from rim_probe.model import load_methods

    transformers_logging.disable_progress_bar()
    wanted = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if wanted.startswith("cuda") and not torch.cuda.is_available():
        return load_methods(path, device="cpu"), "No GPU was found, so it runs on the CPU."
    try:
        return load_methods(path, device=wanted), ""
    except torch.cuda.OutOfMemoryError:
        return load_methods(path, device="cpu"), "The GPU has too little free memory, so it runs on the CPU."


def has_own_cot(models: dict[str, RiM]) -> bool:
    """Whether chain of thought is answered by weights trained for it."""
    return models["cot"] is not models["memory"]


def describe_machine(models: dict[str, RiM]) -> str:
    """What the times of a run depend on, such as "Intel Xeon 2.20GHz, 2 cores, cpu float32"."""
    rim = models["memory"]
    cores = f"{os.cpu_count()} core{'s' if os.cpu_count() != 1 else ''}"
    dtype = str(rim.dtype).removeprefix("torch.")
    if rim.device.type == "cuda":
        import torch

        return f"{torch.cuda.get_device_name(rim.device)}, {dtype}"
    from rim_probe.evaluation import cpu_name

    return f"{cpu_name()}, {cores}, CPU, {dtype}"
