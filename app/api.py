"""The panels as functions for other programs: endpoints of the page's API and, with `--mcp`, tools for language models.

Knows Gradio's endpoints and what a panel shows. Does not draw anything, and nothing on the page depends on it.

Every function takes plain values and gives a dictionary: what the panel of that name shows, without the drawing. The
docstrings are the documentation that Gradio serves, which takes one line for each argument. What cannot be done is an
error of one sentence. A question is read once for all panels: the last few readings are kept.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, TypeVar

import gradio as gr

from app import gpu
from app.panels.race import Race
from app.session import MAX_BLOCKS, Run, check_blocks, check_gold, check_question
from rim_probe.errors import RiMError

log = logging.getLogger(__name__)

KEPT_READINGS = 8  # of 2 MB each
AT_ONCE = 2  # readings and interventions at the same time; more would only slow each other down
HIGHEST_SEED = 2**32 - 1
FIELDS = ("question", "tokens", "num_blocks", "gold", "steps", "answer", "provenance", "complaints")
ENDPOINTS = ("run", "blocks", "attention", "layers", "trajectory", "surgery", "counterfactual", "evidence")

Result = TypeVar("Result")


def register(race: Race) -> None:
    """Adds the endpoints to the page under construction, over the checkpoints and cancel switches of `race`.

    Call it before anything else is added: an event of the page whose function is called `run` would take the name.
    """
    endpoints = Endpoints(race)
    for name in ENDPOINTS:
        shared = {"concurrency_id": "readings", "concurrency_limit": AT_ONCE}
        limits = {"concurrency_limit": None} if name == "run" else shared  # a run waits in the turnstile
        gr.api(getattr(endpoints, name), api_name=name, **limits)


class Endpoints:
    """The functions themselves."""

    def __init__(self, race: Race):
        self._race, self._shelf = race, race.shelf
        self._readings: OrderedDict[tuple, dict[str, Any]] = OrderedDict()
        self._lock = threading.Lock()

    def run(
        self,
        request: gr.Request,
        question: str,
        num_blocks: int | None = None,
        gold: str | None = None,
        model: str | None = None,
    ) -> dict:
        """Answer one word problem by memory and by chain of thought: the Race panel.

        Args:
            question: the word problem; a small model knows only the words of its examples
            num_blocks: number of memory blocks, 0 to 16 (default: the checkpoint's own)
            gold: the right answer, if known; then every answer is marked right or wrong
            model: which checkpoint to ask (default: the first on the page)

        Returns:
            The run: per method its answer, whether it is right and every event with its time in seconds; a summary
        """
        return self._do(request, lambda cancel: self._run(question, num_blocks, gold, model, cancel))

    def blocks(
        self,
        request: gr.Request,
        question: str,
        num_blocks: int | None = None,
        gold: str | None = None,
        model: str | None = None,
    ) -> dict:
        """Say of every memory block: its answer so far, the nearest explicit step, own words, chance to be right.

        Args:
            question: the word problem; a small model knows only the words of its examples
            num_blocks: number of memory blocks, 1 to 16 (default: the checkpoint's own)
            gold: the right answer, if known
            model: which checkpoint to ask (default: the first on the page)

        Returns:
            The readouts, chain of thought's own steps beside them, and the probes of the blocks with their controls
        """
        probes = ("steps", "values", "words", "correctness", "commitment")
        return self._part(request, question, num_blocks, gold, model, probes, ("readouts", "chain", "slots"))

    def attention(
        self,
        request: gr.Request,
        question: str,
        num_blocks: int | None = None,
        gold: str | None = None,
        model: str | None = None,
    ) -> dict:
        """Tell what the memory blocks attend to, and the answer to them. Attention is no proof of use.

        Args:
            question: the word problem; a small model knows only the words of its examples
            num_blocks: number of memory blocks, 1 to 16 (default: the checkpoint's own)
            gold: the right answer, if known
            model: which checkpoint to ask (default: the first on the page)

        Returns:
            The attention by layer and head
        """
        return self._part(request, question, num_blocks, gold, model, ("attention",))

    def layers(
        self,
        request: gr.Request,
        question: str,
        num_blocks: int | None = None,
        gold: str | None = None,
        model: str | None = None,
    ) -> dict:
        """Read every layer and slot of the memory: logit lens, tuned lens, nearest step, own words, with controls.

        Args:
            question: the word problem; a small model knows only the words of its examples
            num_blocks: number of memory blocks, 1 to 16 (default: the checkpoint's own)
            gold: the right answer, if known
            model: which checkpoint to ask (default: the first on the page)

        Returns:
            The grids, layer by slot, and the rank of the intermediate values over depth
        """
        return self._part(request, question, num_blocks, gold, model, ("depth",), ("num_layers", "slots"))

    def trajectory(
        self,
        request: gr.Request,
        question: str,
        num_blocks: int | None = None,
        gold: str | None = None,
        model: str | None = None,
    ) -> dict:
        """Trace the question's path through memory, block by block, in the space of known problems.

        Args:
            question: the word problem; a small model knows only the words of its examples
            num_blocks: number of memory blocks, 1 to 16 (default: the checkpoint's own)
            gold: the right answer, if known
            model: which checkpoint to ask (default: the first on the page)

        Returns:
            The path and the cloud of known problems
        """
        return self._part(request, question, num_blocks, gold, model, ("geometry",))

    def surgery(
        self,
        request: gr.Request,
        question: str,
        actions: dict[str, str],
        partner: str | None = None,
        first_layer: int | None = None,
        last_layer: int | None = None,
        num_blocks: int | None = None,
        gold: str | None = None,
        seed: int = 0,
        model: str | None = None,
    ) -> dict:
        """Blank, disturb or swap memory blocks and see what becomes of the answer, beside a control.

        Args:
            question: the word problem; a small model knows only the words of its examples
            actions: what to do with which block, such as {"2": "blank"}; blank, noise, swap or keep
            partner: the question that swapped blocks are taken from
            first_layer: first layer to write to, 0 is the embeddings (default: 1)
            last_layer: last layer to write to (default: the model's last)
            num_blocks: number of memory blocks, 0 to 16 (default: the checkpoint's own)
            gold: an answer whose probability is followed
            seed: of the noise, a whole number from 0 on
            model: which checkpoint to ask (default: the first on the page)

        Returns:
            Answers and readouts before and after, and the control
        """

        def work(cancel: threading.Event) -> dict[str, Any]:
            from rim_probe.probing.surgery import operate

            name, asked, blocks, right = self._checked(question, num_blocks, gold, model)
            models, _ = self._loaded(name, cancel)
            memory = models["memory"]
            layers = None
            if first_layer is not None or last_layer is not None:
                deepest = memory.model.config.num_hidden_layers
                layers = (1 if first_layer is None else first_layer, deepest if last_layer is None else last_layer)
            options = {"partner": partner or None, "layers": layers, "num_blocks": blocks, "gold": right}
            return gpu.call(operate, memory, asked, actions, seed=_checked_seed(seed), **options)

        return self._do(request, work)

    def counterfactual(
        self,
        request: gr.Request,
        question: str,
        block: int | None = None,
        num_blocks: int | None = None,
        gold: str | None = None,
        seed: int = 0,
        model: str | None = None,
    ) -> dict:
        """Test whether a decoded block is a cause: take it from a question that differs in one number.

        Args:
            question: a word problem with steps that are plain equations
            block: the block to swap (default: those said to hold one step)
            num_blocks: number of memory blocks, 1 to 16 (default: the checkpoint's own)
            gold: the right answer, if known
            seed: of the partner question, a whole number from 0 on
            model: which checkpoint to ask (default: the first on the page)

        Returns:
            The partner, the answer expected if the decode is true, what was said, a control, and one sentence
        """

        def work(cancel: threading.Event) -> dict[str, Any]:
            from rim_probe.probing.matches import claims
            from rim_probe.probing.trial import problem_from, try_counterfactual

            name, asked, blocks, right = self._checked(question, num_blocks, gold, model)
            reading = self._reading(name, asked, blocks, right, cancel)
            problem = problem_from(asked, reading["steps"], reading["chain"], right)
            models, _ = self._loaded(name, cancel)
            options = {"block": block, "seed": _checked_seed(seed), "num_blocks": blocks}
            return gpu.call(try_counterfactual, models["memory"], problem, claims(reading), **options)

        return self._do(request, work)

    def evidence(self, request: gr.Request, model: str | None = None) -> dict:
        """Give what was measured of a checkpoint on many problems: accuracy, probes beside controls, causal tests.

        Args:
            model: which checkpoint (default: the first on the page)

        Returns:
            The report, with intervals and the commands that made it
        """

        def work(_: threading.Event) -> dict[str, Any]:
            from rim_probe.probing.evidence import load_evidence

            return load_evidence(self._shelf.path(self._name(model)))

        return self._do(request, work)

    # ------------------------------------------------------------------------------------------------------ behind it

    def _do(self, request: gr.Request, work: Callable[[threading.Event], Result]) -> Result:
        """Does `work`, which is told when the client has gone, and says in one sentence what cannot be done."""
        cancel = self._race.cancellations.start(request.session_hash)
        try:
            return work(cancel)
        except RiMError as error:
            raise gr.Error(str(error), print_exception=False) from None
        except Exception:  # a client gets a sentence, the log the rest
            log.exception("an endpoint failed")
            raise gr.Error("This did not work; the server's log has the details.", print_exception=False) from None
        finally:
            self._race.cancellations.finish(request.session_hash, cancel)

    def _name(self, model: str | None) -> str:
        name = model or next(iter(self._shelf.names), None)
        self._shelf.path(name)  # refuses one that is not there
        assert name is not None
        return name

    def _checked(self, question: Any, num_blocks: Any, gold: Any, model: Any) -> tuple[str, str, int, str | None]:
        name = self._name(model)
        own = self._race.layout(name).num_blocks
        blocks = check_blocks(own if num_blocks is None else num_blocks, max(MAX_BLOCKS, own))
        return name, check_question(question), blocks, check_gold(gold)

    def _loaded(self, name: str, cancel: threading.Event) -> tuple[dict[str, Any], Any]:
        """Models and probes of a checkpoint; waits until they are loaded."""
        found = None
        while found is None:
            if cancel.is_set():
                raise RiMError("The client has gone.")
            found = self._shelf.wait_readers(name, cancel)
        return found

    def _run(self, question: Any, num_blocks: Any, gold: Any, model: Any, cancel: threading.Event) -> dict[str, Any]:
        from app import figures

        name, asked, blocks, right = self._checked(question, num_blocks, gold, model)
        run = None
        for run in self._race.answer(asked, blocks, right, name, cancel):  # noqa: B007 (the last one is wanted)
            pass
        if not isinstance(run, Run):
            raise RiMError("The run was stopped before it began.")
        return run.to_dict() | {"summary": figures.verdict(run)}

    def _part(
        self,
        request: gr.Request,
        question: Any,
        num_blocks: Any,
        gold: Any,
        model: Any,
        probes: tuple[str, ...],
        fields: tuple[str, ...] = (),
    ) -> dict[str, Any]:
        """Some fields and some probes of a reading."""

        def work(cancel: threading.Event) -> dict[str, Any]:
            reading = self._reading(*self._checked(question, num_blocks, gold, model), cancel)
            told = {name: reading["probes"][name] for name in probes if name in reading["probes"]}
            return {field: reading[field] for field in (*FIELDS, *fields)} | {"probes": told}

        return self._do(request, work)

    def _reading(
        self, name: str, question: str, num_blocks: int, gold: str | None, cancel: threading.Event
    ) -> dict[str, Any]:
        """Everything read of a question; the steps are known where it is one of the checkpoint's examples."""
        from rim_probe.probing.reading import read

        key = (name, question, num_blocks, gold)
        with self._lock:
            if key in self._readings:
                self._readings.move_to_end(key)
                return self._readings[key]
        models, readers = self._loaded(name, cancel)
        steps = next((p.steps for p in self._shelf.examples(name) if p.question == question), ())
        options = {"num_blocks": num_blocks, "gold": gold, "steps": steps}
        reading = gpu.call(read, models, readers, question, **options).to_dict()
        with self._lock:
            self._readings[key] = reading
            while len(self._readings) > KEPT_READINGS:
                self._readings.popitem(last=False)
        return reading


def _checked_seed(seed: Any) -> int:
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed <= HIGHEST_SEED:
        raise RiMError(f"The seed must be a whole number from 0 to {HIGHEST_SEED}, not {str(seed)[:40]!r}.")
    return seed
