"""The checkpoints the page can use: which there are, what can be read without their weights, and loading one.

Method: a thread loads what a race needs and says so; then it goes on to what only a reading needs, the control models
(stage 1, untrained base) and the fitted probes. A race never waits for those, and damage in them costs no more than a
note. A checkpoint whose base has to be fetched first says how far that is. However many visitors wait for a checkpoint,
it is loaded, and its base fetched, once; after a failure, the next one who asks begins anew.

Knows folders and threads. Does not know Gradio. Models are loaded in the background and nothing heavy is imported
before, so the page is up before torch is.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from app import gpu
from rim_probe.errors import CheckpointError, RiMError
from rim_probe.memory import LAYOUT_FILE, MemoryLayout

if TYPE_CHECKING:
    from rim_probe.bases import Progress
    from rim_probe.model import RiM
    from rim_probe.probing.reading import Readers
    from rim_probe.problems import Problem

log = logging.getLogger(__name__)

CHECKPOINTS = Path(__file__).parent.parent / "checkpoints"
GREETING = "rim-tiny"  # comes first where it is there: trained, and its questions are those of the page
KEPT = 3  # as many as are shipped, so that visitors do not throw out each other's; 3.4 GB, most of it SmolLM2's
_IMPORTING = threading.Lock()  # transformers imports its parts when they are asked for, and fails if two threads do
WARM_UPS = 3  # the first passes pay for allocation and the choice of kernels; no visitor should
WARM_UP_SECONDS = 2.0  # after which no further one begins: a large model would keep its first visitor waiting


@dataclass(frozen=True)
class Stage:
    """What is being done to get a base: in words, bytes done, and bytes in all (None: nobody knows)."""

    what: str
    done: int
    total: int | None


@dataclass
class Loading:
    """How far a checkpoint is.

    Attributes:
        models: by method, when it is ready for a race; a method without weights of its own has the memory model's.
        error: why it failed; neither this nor `models` while it is being loaded.
        roles: `models` with weights of their own and the controls (`rim_probe.probing.study.load_models`), later.
        readers: the fitted probes, at the same time as `roles`.
        note: what a visitor should know, for example that the GPU was not usable.
        stage: of fetching its base; None before, after, and for a checkpoint that needs none.
    """

    models: dict[str, RiM] | None = None
    error: RiMError | None = None
    roles: dict[str, RiM] | None = None
    readers: Readers | None = None
    note: str = ""
    stage: Stage | None = None

    def tell(self, what: str, done: int, total: int | None) -> None:
        """Takes progress as `rim_probe.bases` gives it."""
        self.stage = None if total is not None and done >= total else Stage(what, done, total)


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
            for path in sorted(folder.iterdir(), key=lambda path: (path.name != GREETING, path.name)):
                if (path / LAYOUT_FILE).is_file():
                    self._paths.setdefault(path.name, str(path))
        self._device = device
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
        loading = self.loading(name)
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

    def loading(self, name: str | None) -> Loading | None:
        """How far a checkpoint is; None where nobody asked for it yet, or it had to make room."""
        with self._lock:
            return self._loadings.get(name)

    def start(self, name: str) -> Loading:
        """Begins to load a checkpoint in the background, unless that is done or under way; after a failure, again."""
        path = self.path(name)
        with self._lock:
            loading = self._loadings.get(name)
            if loading is not None:
                self._loadings[name] = self._loadings.pop(name)  # used last
            if loading is None or (loading.error is not None and not gpu.is_lent()):
                ready = [other for other, value in self._loadings.items() if value.models is not None]
                for other in ready[: len(ready) + 1 - KEPT]:
                    del self._loadings[other]
                loading = self._loadings[name] = Loading()
                threading.Thread(
                    target=self._load, args=(name, path, loading), name=f"load {name}", daemon=True
                ).start()
        return loading

    def place(self) -> None:
        """On ZeroGPU, loads every checkpoint in this thread and keeps them all (see `app.gpu`); elsewhere nothing."""
        if not gpu.is_lent():
            return
        for name, path in self._paths.items():
            loading = self._loadings[name] = Loading()
            self._load(name, path, loading)
            gpu.stay(loading.models, loading.roles, loading.readers)

    def wait(self, name: str | Loading, cancel: threading.Event, seconds: float = 0.2) -> dict[str, RiM] | None:
        """The loaded models by method, or None if that takes longer than `seconds` (ask again) or `cancel` is set.

        Args:
            name: of a checkpoint; or what `start` gave, so that who asks again and again does not, after a failure,
                begin anew without having been told of it.

        Raises:
            RiMError: loading failed.
        """
        loading = name if isinstance(name, Loading) else self.start(name)
        with self._ready:
            self._ready.wait_for(lambda: loading.models or loading.error or cancel.is_set(), timeout=seconds)
        if loading.error is not None:
            raise loading.error
        return None if cancel.is_set() else loading.models

    def wait_readers(
        self, name: str | Loading, cancel: threading.Event, seconds: float = 0.2
    ) -> tuple[dict[str, RiM], Readers] | None:
        """Models by role and fitted probes, for `rim_probe.probing.reading.read`; the rest as for `wait`."""
        loading = name if isinstance(name, Loading) else self.start(name)
        with self._ready:
            self._ready.wait_for(lambda: loading.readers or loading.error or cancel.is_set(), timeout=seconds)
        if loading.error is not None:
            raise loading.error
        return None if cancel.is_set() or loading.readers is None else (loading.roles, loading.readers)

    def has(self, name: str | None, method: str) -> bool:
        """Whether a checkpoint has a model of its own for a method, as far as can be told without its weights."""
        path = Path(self._paths.get(name, ""))
        return name in self._paths and (path / method).is_dir()

    def _load(self, name: str, path: str, loading: Loading) -> None:
        models, error = None, None
        try:
            models, loading.note = _load_somewhere(path, self._device, loading.tell)
            self._warm_up(name, models)
        except RiMError as raised:
            error = raised
        except Exception:  # a visitor gets a sentence, the log the rest
            log.exception("loading %s failed", path)
            error = CheckpointError(f"The checkpoint {name} could not be loaded; the server's log has the details.")
        with self._ready:
            loading.models, loading.error, loading.stage = models if error is None else None, error, None
            self._ready.notify_all()
        if error is None:
            roles, readers, notes = _load_readers(path, models)
            with self._ready:
                loading.note = " ".join(filter(None, [loading.note, *notes]))
                loading.roles, loading.readers = roles, readers
                self._ready.notify_all()

    def _warm_up(self, name: str, models: dict[str, RiM]) -> None:
        from rim_probe.decoding import answer

        if gpu.is_lent():  # there is none yet, and the process that will have it is another one
            return
        try:
            begun = time.monotonic()
            for problem in self.examples(name)[:WARM_UPS]:
                for method in ("memory", "cot"):
                    if time.monotonic() - begun < WARM_UP_SECONDS:
                        gpu.call(answer, models[method], problem.question, method, max_new_tokens=16)
        except RiMError as error:  # the page says so where it shows examples; the model itself is usable
            log.warning("no warm-up for %s: %s", name, error)


def _load_somewhere(path: str, device: str | None, progress: Progress) -> tuple[dict[str, RiM], str]:
    """Loads on the device asked for, or on the CPU with a note if that device is there but cannot be used."""
    with _IMPORTING:
        import torch
        from transformers.utils import logging as transformers_logging

        from rim_probe.model import load_methods

    transformers_logging.disable_progress_bar()
    wanted = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if wanted.startswith("cuda") and not torch.cuda.is_available():
        return load_methods(path, device="cpu", progress=progress), "No GPU was found, so it runs on the CPU."
    try:
        return load_methods(path, device=wanted, progress=progress), ""
    except torch.cuda.OutOfMemoryError:
        note = "The GPU has too little free memory, so it runs on the CPU."
        return load_methods(path, device="cpu", progress=progress), note


def _load_readers(path: str, models: dict[str, RiM]) -> tuple[dict[str, RiM], Readers, list[str]]:
    """Models by role, fitted probes, and a sentence for everything that is damaged."""
    from rim_probe.probing.reading import Readers
    from rim_probe.probing.study import CONTROLS, load_control, own_models

    roles, notes = own_models(models), []
    for role in CONTROLS:
        try:
            control = load_control(role, path, models["memory"])
            if control is not None:
                roles[role] = control
        except Exception as error:  # the race and every other probe go on without it
            log.warning("no %s model from %s: %s", role, path, error, exc_info=not isinstance(error, RiMError))
            notes.append(f"Its {role} model could not be loaded, so what is compared with it is missing.")
    try:
        return roles, Readers.load(path, roles), notes
    except Exception:
        log.exception("no probes from %s", path)
        return roles, Readers({}, ("The fitted probes could not be loaded.",)), [*notes, "Its probes are damaged."]


def needs_hub(preferred: str | None, folder: Path = CHECKPOINTS) -> bool:
    """Whether a checkpoint, or the base that an adapter was trained on, can come from the Hub alone."""
    offered = [*folder.iterdir()] if folder.is_dir() else []
    if preferred is not None:
        if not Path(preferred).exists():
            return True
        offered.append(Path(preferred))
    for checkpoint in offered:
        try:
            if json.loads((checkpoint / "base.json").read_text(encoding="utf-8"))["source"] == "hub":
                return True
        except (OSError, ValueError, RecursionError, KeyError, TypeError):
            pass  # most have no such file; of a damaged one loading will complain
    return False


def has_own_cot(models: dict[str, RiM]) -> bool:
    """Whether chain of thought is answered by weights trained for it."""
    return models["cot"] is not models["memory"]


def describe_machine(models: dict[str, RiM]) -> str:
    """What the times of a run depend on, such as "Intel Xeon 2.20GHz, 2 cores, cpu float32"."""
    rim = models["memory"]
    cores = f"{os.cpu_count()} core{'s' if os.cpu_count() != 1 else ''}"
    dtype = str(rim.dtype).removeprefix("torch.")
    if gpu.is_lent():
        return f"a GPU lent by ZeroGPU, {dtype}"
    if rim.device.type == "cuda":
        import torch

        return f"{torch.cuda.get_device_name(rim.device)}, {dtype}"
    from rim_probe.evaluation import cpu_name

    return f"{cpu_name()}, {cores}, CPU, {dtype}"
