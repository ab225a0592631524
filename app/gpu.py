"""Where the functions that touch a model run: here, or on a GPU that Hugging Face ZeroGPU lends for one call.

Knows devices and the `spaces` package. Does not know what the functions do, nor Gradio's page.

Everything that runs a model goes through `stream` or `call`; nothing else in the app asks which of three cases it is:

1. CPU: the function simply runs, in the thread that called, on as many cores as its model can use.
2. A GPU of our own: the models stay on it, and one function at a time uses a model. Others would share its time and
   add up their memory; on a CPU, where threads have cores of their own, no lock is taken.
3. ZeroGPU (`SPACES_ZERO_GPU` is set and `spaces` is there): the function runs decorated with `spaces.GPU`, in a process
   forked from this one for as long as it lasts. What is passed and returned is pickled, so models and probes, which are
   too large, must `stay`: the fork has them already, and only their name is sent. They must be placed before the page
   is served (https://huggingface.co/docs/hub/spaces-zerogpu, "Model loading"), and in the main thread, because `spaces`
   pretends that there is a GPU in no other. A cancel switch cannot be sent either; closing the stream stops the work.
"""

from __future__ import annotations

import importlib.util
import inspect
import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from rim_probe.errors import RiMError

# A race of the models in the box takes two seconds; a short estimate comes first in ZeroGPU's queue and costs a visitor
# little of the daily quota. A call may go on longer only if `spaces` allows it.
SECONDS = 15
SMALL_MODEL = 20_000_000  # parameters
WAIT_SECONDS = 0.1  # how long a cancelled visitor may still stand in line for a GPU of our own


@dataclass(frozen=True)
class _Staying:
    """The name of something that a forked process has already."""

    key: int


@dataclass(frozen=True)
class _Failed:
    """A sentence for the visitor; `spaces` itself would pass on no more than the name of the error's class."""

    error: RiMError


_staying: dict[int, Any] = {}
_lent: Callable[..., Iterator[Any]] | None = None  # `_work`, decorated; None outside ZeroGPU
_locks: WeakKeyDictionary[Any, threading.Lock] = WeakKeyDictionary()
_locks_lock = threading.Lock()
_sizes: WeakKeyDictionary[Any, int] = WeakKeyDictionary()  # parameters of a model
_cores: int | None = None  # torch's own choice of threads


def is_lent() -> bool:
    """Whether this process runs in a ZeroGPU Space."""
    flag = os.environ.get("SPACES_ZERO_GPU", "").lower() in ("1", "t", "true")
    return flag and importlib.util.find_spec("spaces") is not None


def prepare() -> None:
    """On ZeroGPU, imports `spaces` and decorates; elsewhere does nothing. Call it before torch is imported."""
    global _lent
    if is_lent() and _lent is None:
        import spaces

        _lent = spaces.GPU(duration=SECONDS)(_work)


def stay(*things: Any) -> None:
    """On ZeroGPU, registers what every later call finds in its own process (models by method, a model, probes)."""
    if _lent is None:
        return
    for thing in things:
        if thing is None:  # a checkpoint that could not be loaded
            continue
        _staying[id(thing)] = thing
        if isinstance(thing, dict):
            _staying.update({id(value): value for value in thing.values()})


def stream(job: Callable[..., Iterator[Any]], *arguments: Any, cancel: threading.Event) -> Iterator[Any]:
    """What the generator function `job(*arguments, cancel=...)` yields.

    On ZeroGPU `job` must be a function of a module, and what it yields are copies: take them, not what was passed.

    Raises:
        RiMError: as `job` raises them; on ZeroGPU also when no GPU was lent.
    """
    if _lent is not None:
        yield from _borrowed(job, arguments, cancel)
        return
    lock = _lock(arguments)
    if lock is None:
        with closing(job(*arguments, cancel=cancel)) as results:
            while True:
                _spare_threads(arguments)  # since the last result, another model may have had its way
                try:
                    result = next(results)
                except StopIteration:
                    return
                yield result
    while not lock.acquire(timeout=WAIT_SECONDS):
        if cancel.is_set():
            return
    try:
        yield from job(*arguments, cancel=cancel)
    finally:
        lock.release()


def call(job: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """`job(*arguments, **options)`, for a function that takes a second or less and so needs no cancelling.

    Raises:
        RiMError: as `stream`.
    """
    if _lent is not None:
        (result,) = _borrowed(job, arguments, threading.Event(), options)
        return result
    lock = _lock(arguments)
    if lock is None:
        _spare_threads(arguments)
        return job(*arguments, **options)
    with lock:
        return job(*arguments, **options)


def _model(arguments: tuple[Any, ...]) -> Any:
    """The memory model, or the only one, among the arguments."""
    for thing in arguments:
        rim = thing.get("memory") if isinstance(thing, dict) else thing
        if hasattr(rim, "device"):
            return rim
    return None


def _lock(arguments: tuple[Any, ...]) -> threading.Lock | None:
    """The lock of the model among the arguments, where it lies on a GPU."""
    rim = _model(arguments)
    if getattr(getattr(rim, "device", None), "type", "cpu") == "cpu":
        return None
    with _locks_lock:
        return _locks.setdefault(rim, threading.Lock())


def _spare_threads(arguments: tuple[Any, ...]) -> None:
    """One CPU thread for a small model: it gains nothing from more, and waits for them where cores are shared. All of
    them for a large one. Set anew every time, in 0.2 µs, for torch keeps one number for all models."""
    global _cores
    model = getattr(_model(arguments), "model", None)
    if model is None:
        return
    import torch

    if model not in _sizes:
        _sizes[model] = sum(parameter.numel() for parameter in model.parameters())
    _cores = _cores or torch.get_num_threads()
    torch.set_num_threads(1 if _sizes[model] < SMALL_MODEL else _cores)


def _borrowed(job: Callable[..., Any], arguments: tuple[Any, ...], cancel: threading.Event, options: Any = None) -> Any:
    import gradio as gr

    sent = tuple(_Staying(id(thing)) if id(thing) in _staying else thing for thing in arguments)
    assert _lent is not None
    try:
        with closing(_lent(job, sent, options or {})) as results:
            for result in results:
                if isinstance(result, _Failed):
                    raise result.error
                if cancel.is_set():
                    return
                yield result
    except gr.Error as error:  # no quota left, none free, took too long: `spaces` says it in HTML
        raise RiMError(f"No GPU could be had: {re.sub('<[^>]*>', '', str(error.message))}") from None


def _work(job: Callable[..., Any], sent: tuple[Any, ...], options: dict[str, Any]) -> Iterator[Any]:
    """Runs in the forked process: `job` with the things that have stayed there, results and sentences going back."""
    try:
        arguments = [_staying[thing.key] if isinstance(thing, _Staying) else thing for thing in sent]
        if inspect.isgeneratorfunction(job):
            yield from job(*arguments, cancel=threading.Event(), **options)
        else:
            yield job(*arguments, **options)
    except RiMError as error:
        yield _Failed(error)
