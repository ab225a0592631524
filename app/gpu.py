"""Runs what touches a model, one function at a time: two decodes at once would spoil each other's times, and on a GPU
add up their memory.

In a ZeroGPU Space (`SPACES_ZERO_GPU` is set and `spaces` is there) functions run decorated with `spaces.GPU`, in a
process forked from this one for as long as they last. What is passed and returned is pickled, of a checkpoint no more
than its name (`app.models.Loaded`): the fork has its weights already, because they were placed before the page was
served (https://huggingface.co/docs/hub/spaces-zerogpu, "Model loading").

Import this before torch. Knows devices. Does not know what the functions do, nor the page.
"""

from __future__ import annotations

import importlib.util
import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import TYPE_CHECKING, Any

from rim_probe.errors import RiMError

if TYPE_CHECKING:
    from app.models import Loaded

# A race of the models in the box takes two seconds; a short estimate comes first in ZeroGPU's queue and costs a visitor
# little of the daily quota. A call may go on longer only if `spaces` allows it.
SECONDS = 15
LENT = os.environ.get("SPACES_ZERO_GPU", "").lower() in ("1", "t", "true") and bool(importlib.util.find_spec("spaces"))

_model = threading.Lock()


def _work(job: Callable[..., Any], arguments: tuple[Any, ...], options: dict[str, Any]) -> Iterator[Any]:
    try:
        found = job(*arguments, **options)
        if isinstance(found, Iterator):
            yield from found
        else:
            yield found
    except RiMError as error:  # `spaces` itself would pass on no more than the name of its class
        yield error


if LENT:
    import spaces

    _work = spaces.GPU(duration=SECONDS)(_work)


def stream(job: Callable[..., Iterator[Any]], loaded: Loaded, *arguments: Any, **options: Any) -> Iterator[Any]:
    """What the generator function `job(loaded, *arguments, **options)` yields, when no other function uses a model.

    In a ZeroGPU Space `job` must be a function of a module, and what it yields are copies: take them, not what was
    passed. Closing the generator ends the work.

    Raises:
        RiMError: as `job` raises them; in a ZeroGPU Space also when no GPU was lent.
    """
    import gradio as gr

    with _model, closing(_work(job, (loaded, *arguments), options)) as results:
        while True:
            loaded.set_threads()  # torch keeps it by thread, and Gradio asks for every result in another one
            try:
                result = next(results)
            except StopIteration:
                return
            except gr.Error as error:  # no quota left, none free, took too long: `spaces` says it in HTML
                raise RiMError(f"No GPU could be had: {re.sub('<[^>]*>', '', str(error.message))}") from None
            if isinstance(result, RiMError):
                raise result
            yield result


def call(job: Callable[..., Any], loaded: Loaded, *arguments: Any, **options: Any) -> Any:
    """`job(loaded, *arguments, **options)`; the rest as for `stream`."""
    (result,) = stream(job, loaded, *arguments, **options)
    return result
