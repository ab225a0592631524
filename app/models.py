"""The checkpoints the page can use: which there are, what can be read without their weights, and loading one.

Method: a thread loads what a race needs, and then what only a reading needs: the control models (stage 1, untrained
base) and the fitted probes. A race never waits for those, and damage in them costs no more than a note. However many
visitors wait for a checkpoint, it is loaded, and its base fetched, once; after a failure, the next one who asks begins
anew.

Does not know Gradio. Nothing heavy is imported before a model is loaded, so the page is up before torch is.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import re
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
GREETINGS = ("smollm2-135m", "rim-tiny")  # what the page opens with: the first that is complete and can be loaded
ROLES = ("", "cot", "direct")  # of a complete checkpoint, each a folder
VARIANT = "paper"  # the same model trained the paper's way, beside it
MOST_OWN = 20  # checkpoints that visitors bring
_HUB_ID = re.compile(r"[\w-][\w.-]{0,95}/[\w-][\w.-]{0,95}")
ABOUT = {
    "smollm2-135m": "SmolLM2, 135 million weights, with adapters. Reads any short word problem in plain English; it is "
    "small and often wrong (see Evidence).",
    "rim-tiny": "One million weights, trained from nothing on small stories. Answers at once; knows the words and "
    "numbers of its examples alone and refuses others.",
    "glass-box": "Weights written by hand, so that we know what each block holds. Reads sums of four numbers, such as "
    "“what is 3 + 4 - 2 + 1 ?”, and nothing else.",
}
KEPT = 3  # as many as are shipped, so that visitors do not throw out each other's; 3.4 GB, most of it SmolLM2's
WARM_UPS = 3  # the first passes pay for allocation and the choice of kernels; no visitor should
WARM_UP_SECONDS = 2.0  # after which no further one begins: a large model would keep its first visitor waiting
LOOK_SECONDS = 0.5  # between two looks at a model that is being loaded
_IMPORTING = threading.Lock()  # transformers imports its parts when they are asked for, and fails if two threads do


@dataclass(eq=False)
class Loaded:
    """A checkpoint in memory. Pickled, it is no more than its name for a process forked from this one.

    Attributes:
        models: by method; a method without weights of its own has the memory model's.
        note: what a visitor should know, for example that the GPU was not usable.
        roles: `models` with weights of their own and the controls (`rim_probe.probing.study.load_models`).
        readers: the fitted probes; None as long as they, and the controls, are being loaded.
    """

    models: dict[str, RiM]
    note: str = ""
    roles: dict[str, RiM] = field(default_factory=dict)
    readers: Readers | None = None

    def __post_init__(self) -> None:
        _loaded[id(self)] = self

    def __reduce__(self) -> tuple[Callable[[int], Loaded], tuple[int]]:
        return _find, (id(self),)

    def set_threads(self) -> None:
        """As many CPU threads as the model can use, for the calling thread."""
        import torch

        global _cores
        _cores = _cores or torch.get_num_threads()
        torch.set_num_threads(1 if self._is_small else _cores)

    @functools.cached_property
    def _is_small(self) -> bool:
        from rim_probe.precision import SMALL_MODEL

        return sum(parameter.numel() for parameter in self.models["memory"].model.parameters()) < SMALL_MODEL

    @property
    def has_own_cot(self) -> bool:
        """Whether chain of thought is answered by weights trained for it."""
        return self.models["cot"] is not self.models["memory"]

    @property
    def machine(self) -> str:
        """What the times of a run depend on, such as "Intel Xeon 2.20GHz, 2 cores, CPU, float32"."""
        rim = self.models["memory"]
        dtype = str(rim.dtype).removeprefix("torch.")
        if gpu.LENT:
            return f"a GPU lent by ZeroGPU, {dtype}"
        if rim.device.type == "cuda":
            import torch

            return f"{torch.cuda.get_device_name(rim.device)}, {dtype}"
        from rim_probe.evaluation import cpu_name

        return f"{cpu_name()}, {os.cpu_count()} core{'s' if os.cpu_count() != 1 else ''}, CPU, {dtype}"


_loaded: weakref.WeakValueDictionary[int, Loaded] = weakref.WeakValueDictionary()
_cores: int | None = None  # torch's own choice of threads


def _find(number: int) -> Loaded:
    return _loaded[number]


@dataclass
class Loading:
    """How far a checkpoint is.

    Attributes:
        ready: for a race.
        readable: the same, with the controls and probes that a reading needs.
        stage: of fetching its base: what is done, bytes done, bytes in all (None: nobody knows).
    """

    ready: Future[Loaded] = field(default_factory=Future)
    readable: Future[Loaded] = field(default_factory=Future)
    stage: tuple[str, int, int | None] | None = None

    def tell(self, what: str, done: int, total: int | None) -> None:
        """Takes progress as `rim_probe.bases` gives it."""
        self.stage = None if total is not None and done >= total else (what, done, total)


class ModelShelf:
    """Checkpoints by name. The last few that were used stay in memory.

    Args:
        folder: where checkpoint folders lie.
        preferred: a checkpoint folder or Hub id that comes first; may lie elsewhere.
        device: "cpu", "cuda", or None for the GPU where there is one. A GPU that cannot be used falls back to the CPU.
        online: the Hub may be asked for what visitors bring, though `app.py` has told its client to be offline.
    """

    def __init__(
        self, folder: Path = CHECKPOINTS, preferred: str | None = None, device: str | None = None, online: bool = False
    ):
        self._paths: dict[str, str] = {}
        if preferred is not None:
            self._paths[Path(preferred).name] = str(preferred)
        if folder.is_dir():
            for path in sorted(folder.iterdir(), key=_rank):
                if (path / LAYOUT_FILE).is_file():
                    self._paths.setdefault(path.name, str(path))
                    if (path / VARIANT / LAYOUT_FILE).is_file():
                        self._paths.setdefault(f"{path.name}-{VARIANT}", str(path / VARIANT))
        self._device, self._online = device, online
        self._lock = threading.Lock()
        self._loadings: dict[str, Loading] = {}

    @property
    def names(self) -> list[str]:
        return list(self._paths)

    @property
    def greeting(self) -> str | None:
        """What the page opens with: the first name, or the next one where loading that has failed."""
        return next((name for name in self._paths if not self._has_failed(name)), next(iter(self._paths), None))

    def about(self, name: str | None) -> str:
        """What a checkpoint is and what it cannot do, in a line; "" where nobody said."""
        return ABOUT.get(name or "", "")

    def is_open(self, name: str) -> bool:
        """Whether a checkpoint reads any words, as the adapter of a language model does."""
        return (Path(self._paths[name]) / "adapter_config.json").is_file()

    def add(self, source: str, folders: bool, tell: Callable[[tuple | None], object] = lambda stage: None) -> str:
        """Loads a visitor's own checkpoint and offers it.

        Args:
            source: a Hub id, or a folder of this machine.
            folders: whether folders may be named: only where the page runs on the visitor's own machine.

        Returns:
            Its name.

        Raises:
            RiMError: no such form, one too many, or one that cannot be loaded.
        """
        source = source.strip().removeprefix("https://huggingface.co/").rstrip("/")
        name, place = source, source
        if folders and Path(source).expanduser().is_dir():
            place = str(Path(source).expanduser().resolve())
            name = place if Path(place).name in self._paths else Path(place).name
        elif not _HUB_ID.fullmatch(source):
            here = ", or a folder of this machine that holds one" if folders else ""
            raise CheckpointError(f"Give the id of a checkpoint on the Hugging Face Hub, such as owner/name{here}.")
        if place in self._paths.values():
            return next(name for name, path in self._paths.items() if path == place)
        with self._lock:
            if sum(name not in ABOUT for name in self._paths) >= MOST_OWN:
                raise CheckpointError("Too many checkpoints have been brought to this page; start it anew.")
            self._paths[name] = place
        if place == source and self._online:
            import huggingface_hub.constants

            huggingface_hub.constants.HF_HUB_OFFLINE = False
        try:
            self.load(name, tell=tell)
        except RiMError:
            del self._paths[name]
            raise
        return name

    def interchange(self, name: str) -> tuple[str, str] | None:
        """What the interchange test of a checkpoint found (`rim_probe.probing.evidence.interchange_sentence`)."""
        with _IMPORTING:
            from rim_probe.probing.evidence import interchange_sentence

        return interchange_sentence(self.path(name))

    def verdict(self, name: str) -> str:
        """What a checkpoint that was loaded can do, in a sentence."""
        loaded = self.load(name)
        blocks = loaded.models["memory"].layout.num_blocks
        own = "a model of its own" if loaded.has_own_cot else "the memory model, which was not trained for it"
        words = f"{name} is loaded: it reads {blocks} memory blocks; chain of thought is written by {own}."
        return words if self.examples(name) else f"{words} It brings no examples; type a question."

    def path(self, name: str | None) -> str:
        """Where checkpoint `name` lies.

        Raises:
            CheckpointError: not one of `names`.
        """
        if not self._paths:
            raise CheckpointError(
                "There is no checkpoint to ask; train one (`python -m rim_probe train`) or start with --model FOLDER."
            )
        if not isinstance(name, str) or name not in self._paths:
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
        if self.is_ready(name):
            return self._loadings[name].ready.result().models["memory"].layout
        return MemoryLayout.load(path) if path.is_dir() else MemoryLayout()

    def examples(self, name: str) -> list[Problem]:
        """The checkpoint's example problems; empty where it brings none.

        Raises:
            RiMError: a damaged examples file, or no such checkpoint.
        """
        from rim_probe.gallery import load_examples

        path = Path(self.path(name))
        return load_examples(path) or (load_examples(path.parent) if path.name == VARIANT else [])

    def evidence(self, name: str) -> dict[str, Any]:
        """What was measured of a checkpoint (`rim_probe.probing.evidence.load_evidence`), without its place here.

        Raises:
            RiMError: no such checkpoint.
        """
        from rim_probe.probing.evidence import load_evidence

        found = load_evidence(path := self.path(name))
        return found | {"complaints": [_public(sentence, path, name) for sentence in found["complaints"]]}

    def has(self, name: str | None, method: str) -> bool:
        """Whether a checkpoint has a model of its own for a method, as far as can be told without its weights."""
        return name in self._paths and (Path(self._paths[name]) / method).is_dir()

    def is_ready(self, name: str | None) -> bool:
        """Whether a race with it can begin at once."""
        loading = self._loadings.get(name)
        return loading is not None and loading.ready.done() and loading.ready.exception() is None

    def _has_failed(self, name: str) -> bool:
        loading = self._loadings.get(name)
        return loading is not None and loading.ready.done() and loading.ready.exception() is not None

    def load(
        self, name: str | None, readable: bool = False, tell: Callable[[tuple | None], object] = lambda stage: None
    ) -> Loaded:
        """The checkpoint, as soon as it is there.

        Args:
            readable: with all that a reading needs.
            tell: called now and then with the `Loading.stage`.

        Raises:
            RiMError: there is none, or loading failed.
        """
        loading = self.start(name)
        future = loading.readable if readable else loading.ready
        while not wait([future], LOOK_SECONDS).done:
            tell(loading.stage)
        return future.result()

    def start(self, name: str | None) -> Loading:
        """Begins to load a checkpoint in the background, unless that is done or under way; after a failure, again."""
        path = self.path(name)
        with self._lock:
            loading = self._loadings.pop(name, None)
            if loading is None or (loading.ready.done() and loading.ready.exception() is not None and not gpu.LENT):
                for other in [other for other in self._loadings if self.is_ready(other)][: 1 - KEPT]:
                    del self._loadings[other]
                loading = Loading()
                threading.Thread(target=self._load, args=(name, path, loading), daemon=True).start()
            self._loadings[name] = loading  # used last
        return loading

    def place(self) -> None:
        """In a ZeroGPU Space, loads every checkpoint in this thread, because `spaces` pretends that there is a GPU in
        no other, and keeps them all; elsewhere nothing."""
        for name, path in self._paths.items() if gpu.LENT else ():
            loading = self._loadings[name] = Loading()
            self._load(name, path, loading)

    def _load(self, name: str, path: str, loading: Loading) -> None:
        try:
            loaded = Loaded(*_load_somewhere(path, self._device, loading.tell))
            for rim in loaded.models.values():  # what visitors see names no folder of the server
                rim.name = _public(rim.name, path, name)
            if not gpu.LENT:  # there is none yet, and the process that will have it is another one
                self._warm_up(name, loaded)
        except Exception as raised:
            error = raised
            if isinstance(raised, RiMError):
                error.args = (_public(str(raised), path, name),)
            else:  # a visitor gets a sentence, the log the rest
                log.exception("loading %s failed", path)
                error = CheckpointError(f"The checkpoint {name} could not be loaded; the server's log has the details.")
            loading.ready.set_exception(error)
            loading.readable.set_exception(error)
            return
        finally:
            loading.stage = None
        loading.ready.set_result(loaded)
        _load_readers(name, path, loaded)
        loading.readable.set_result(loaded)

    def _warm_up(self, name: str, loaded: Loaded) -> None:
        try:
            begun = time.monotonic()
            for problem in self.examples(name)[:WARM_UPS]:
                for method in ("memory", "cot"):
                    if time.monotonic() - begun < WARM_UP_SECONDS:
                        gpu.call(_warm_up, loaded, problem.question, method)
        except RiMError as error:  # the page says so where it shows examples; the model itself is usable
            log.warning("no warm-up for %s: %s", name, error)


def _rank(path: Path) -> tuple[int, str]:
    """Complete models in the order of `GREETINGS`, then the others by name."""
    whole = all((path / role / LAYOUT_FILE).is_file() for role in ROLES)
    return GREETINGS.index(path.name) if path.name in GREETINGS and whole else len(GREETINGS), path.name


def _warm_up(loaded: Loaded, question: str, method: str) -> None:
    from rim_probe.decoding import answer

    answer(loaded.models[method], question, method, max_new_tokens=16)


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


def _load_readers(name: str, path: str, loaded: Loaded) -> None:
    """Models by role and fitted probes, into `loaded`, and a sentence in its note for everything that is damaged."""
    with _IMPORTING:
        from rim_probe.probing.reading import Readers
        from rim_probe.probing.study import CONTROLS, load_control, own_models

    loaded.roles, notes = own_models(loaded.models), []
    notes += [
        f"{feature[0].upper()}{feature[1:]} is off: {why}."
        for feature, why in loaded.roles["memory"].verdict.off.items()
    ]
    for role in CONTROLS:
        try:
            control = load_control(role, path, loaded.models["memory"])
            if control is not None:
                control.name = _public(control.name, path, name)
                loaded.roles[role] = control
        except Exception as error:  # the race and every other probe go on without it
            log.warning("no %s model from %s: %s", role, path, error, exc_info=not isinstance(error, RiMError))
            notes.append(f"Its {role} model could not be loaded, so what is compared with it is missing.")
    try:
        found = Readers.load(path, loaded.roles)
        loaded.readers = Readers(found.decoders, tuple(_public(text, path, name) for text in found.complaints))
    except Exception:
        log.exception("no probes from %s", path)
        loaded.readers = Readers({}, ("The fitted probes could not be loaded.",))
        notes.append("Its probes are damaged.")
    loaded.note = " ".join(filter(None, [loaded.note, *notes]))


def _public(text: str, path: str, name: str) -> str:
    """A text that names no folder of the server."""
    return text.replace(path, name) if Path(path).is_dir() else text


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
