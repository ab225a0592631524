"""The panels as functions for other programs: endpoints of the page's API and, with `--mcp`, tools for language models.

Knows Gradio's endpoints and what a panel shows. Does not draw anything, and nothing on the page depends on it.

Every function takes plain values and gives a dictionary: what the panel of that name shows, without the drawing. What
cannot be done is an error of one sentence. What an argument means is said once, in `ARGUMENTS`, and reaches Gradio's
API page and the tools from there. A question is read once for all panels: the last few readings are kept.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable
from typing import Any

import gradio as gr
from gradio.context import Context

from app import figures
from app.hands import Hands
from app.panels.race import Race
from app.session import MAX_BLOCKS, check_blocks, check_gold, check_question
from rim_probe.errors import RiMError
from rim_probe.trained_on import outside

log = logging.getLogger(__name__)

KEPT_READINGS = 8  # of 2 MB each
HIGHEST_SEED = 2**32 - 1
FIELDS = ("question", "tokens", "num_blocks", "gold", "steps", "answer", "provenance", "complaints")
ENDPOINTS = ("run", "blocks", "attention", "layers", "trajectory", "surgery", "counterfactual", "evidence")
ARGUMENTS = {
    "question": "the word problem; a small model knows only the words of its examples",
    "num_blocks": "number of memory blocks, 0 to 16; to look inside at least 1 (default: the checkpoint's own)",
    "gold": "the right answer, if known; answers are marked by it, and surgery follows its probability",
    "model": "which checkpoint to ask (default: the first on the page)",
    "actions": 'what to do with which block, such as {"2": "blank"}; blank, noise, swap or keep',
    "partner": "the question that swapped blocks are taken from",
    "first_layer": "first layer to write to, 0 is the embeddings (default: 1)",
    "last_layer": "last layer to write to (default: the model's last)",
    "seed": "of what is drawn at random (noise, the other question), a whole number from 0 on",
    "block": "the block to swap (default: those said to hold one step)",
}


def register(race: Race) -> None:
    """Adds the endpoints to the page under construction, over the checkpoints of `race`.

    Call it before anything else is added: an event of the page whose function is called `run` would take the name.
    """
    endpoints = Endpoints(race)
    for name in ENDPOINTS:
        work = getattr(endpoints, name)
        added = gr.api(work, api_name=name, concurrency_id="api", concurrency_limit=2)
        assert Context.root_block is not None
        for argument, field in zip(
            inspect.signature(work).parameters, Context.root_block.fns[added["id"]].inputs, strict=True
        ):
            field.label = argument
            field._api_info = field._api_info | {"additional_description": ARGUMENTS[argument]}
        (answer,) = Context.root_block.fns[added["id"]].outputs
        answer.label = "result"
        returns = (inspect.getdoc(work) or "").rpartition("Returns:")[2].strip()
        answer._api_info = {"type": "object", "additional_description": returns}


def _endpoint(work: Callable[..., dict]) -> Callable[..., dict]:
    """A function with what its arguments mean in its docstring, and one sentence for whatever it cannot do."""

    @functools.wraps(work)
    def answer(*given: Any, **options: Any) -> dict:
        try:
            return work(*given, **options)
        except RiMError as error:
            raise gr.Error(str(error), print_exception=False) from None
        except Exception:  # a client gets a sentence, the log the rest
            log.exception("an endpoint failed")
            raise gr.Error("This did not work; the server's log has the details.", print_exception=False) from None

    about, _, returns = (inspect.getdoc(work) or "").partition("\n\nReturns:\n")
    arguments = [name for name in inspect.signature(work).parameters if name != "self"]
    lines = [about, "", "Args:", *(f"    {name}: {ARGUMENTS[name]}" for name in arguments), "", "Returns:", returns]
    answer.__doc__ = "\n".join(lines)
    return answer


def _panel(
    name: str, about: str, returns: str, probes: tuple[str, ...], fields: tuple[str, ...] = ()
) -> Callable[..., dict]:
    """The endpoint that gives some probes and some fields of a reading."""

    def panel(
        self: Endpoints,
        question: str,
        num_blocks: int | None = None,
        gold: str | None = None,
        model: str | None = None,
    ) -> dict:
        reading = self._reading(*self._checked(question, num_blocks, gold, model))
        told = {name: reading["probes"][name] for name in probes if name in reading["probes"]}
        held = {field: reading[field] for field in (*FIELDS, *fields)}
        return held | {"outside": self._outside(model, question), "probes": told}

    panel.__name__ = name  # what the tool is called
    panel.__doc__ = f"{about}\n\nReturns:\n    {returns}"
    return _endpoint(panel)


class Endpoints:
    """The functions themselves."""

    def __init__(self, race: Race):
        self._race, self._hands = race, Hands(race.shelf)
        self._reading = functools.lru_cache(maxsize=KEPT_READINGS)(self._read)

    @_endpoint
    def run(
        self, question: str, num_blocks: int | None = None, gold: str | None = None, model: str | None = None
    ) -> dict:
        """Answer one word problem by memory and by chain of thought: the Race panel.

        Returns:
            The run: per method its answer, whether it is right and every event with its time in seconds; a summary
        """
        name, asked, blocks, right = self._checked(question, num_blocks, gold, model)
        run = self._race.prepare(asked, blocks, right, name)
        for _ in self._race.answer(run):
            pass
        return run.to_dict() | {"summary": figures.verdict(run)}

    blocks = _panel(
        "blocks",
        "Say of every memory block: its answer so far, the nearest explicit step, own words, chance to be right.",
        "The readouts, chain of thought's own steps beside them, and the probes of the blocks with their controls",
        ("steps", "values", "words", "correctness", "commitment"),
        ("readouts", "chain", "slots"),
    )
    attention = _panel(
        "attention",
        "Tell what the memory blocks attend to, and the answer to them. Attention is no proof of use.",
        "The attention by layer and head",
        ("attention",),
    )
    layers = _panel(
        "layers",
        "Read every layer and slot of the memory: logit lens, tuned lens, nearest step, own words, with controls.",
        "The grids, layer by slot, and the rank of the intermediate values over depth",
        ("depth",),
        ("num_layers", "slots"),
    )
    trajectory = _panel(
        "trajectory",
        "Trace the question's path through memory, block by block, in the space of known problems.",
        "The path and the cloud of known problems",
        ("geometry",),
    )

    @_endpoint
    def surgery(
        self,
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

        Returns:
            Answers and readouts before and after, and the control
        """
        name, asked, blocks, right = self._checked(question, num_blocks, gold, model)
        layers = None
        if first_layer is not None or last_layer is not None:
            deepest = self._race.shelf.load(name).models["memory"].model.config.num_hidden_layers
            layers = (1 if first_layer is None else first_layer, deepest if last_layer is None else last_layer)
        options = {"partner": partner or None, "layers": layers, "num_blocks": blocks, "gold": right}
        found = self._hands.surgery(name, asked, actions, seed=_checked_seed(seed), **options)
        return found | {"outside": self._outside(name, asked)}

    @_endpoint
    def counterfactual(
        self,
        question: str,
        block: int | None = None,
        num_blocks: int | None = None,
        gold: str | None = None,
        seed: int = 0,
        model: str | None = None,
    ) -> dict:
        """Test whether a decoded block is a cause: take it from a question that differs in one number. The steps of the
        question must be plain equations.

        Returns:
            The partner, the answer expected if the decode is true, what was said, a control, and one sentence
        """
        name, asked, blocks, right = self._checked(question, num_blocks, gold, model)
        options = {"block": block, "num_blocks": blocks, "seed": _checked_seed(seed)}
        found = self._hands.counterfactual(name, self._reading(name, asked, blocks, right), **options)
        return found | {"outside": self._outside(name, asked)}

    @_endpoint
    def evidence(self, model: str | None = None) -> dict:
        """Give what was measured of a checkpoint on many problems: accuracy, probes beside controls, causal tests.

        Returns:
            The report, with intervals and the commands that made it
        """
        return self._race.shelf.evidence(self._name(model))

    # ------------------------------------------------------------------------------------------------------ behind it

    def _name(self, model: str | None) -> str:
        name = model or next(iter(self._race.shelf.names), None)
        self._race.shelf.path(name)  # refuses one that is not there
        assert name is not None
        return name

    def _outside(self, model: str | None, question: str) -> str | None:
        return outside([self._race.shelf.load(self._name(model)).models["memory"]], question)

    def _checked(self, question: Any, num_blocks: Any, gold: Any, model: Any) -> tuple[str, str, int, str | None]:
        name = self._name(model)
        own = self._race.layout(name).num_blocks
        blocks = check_blocks(own if num_blocks is None else num_blocks, max(MAX_BLOCKS, own))
        return name, check_question(question), blocks, check_gold(gold)

    def _read(self, name: str, question: str, num_blocks: int, gold: str | None) -> dict[str, Any]:
        """Everything read of a question; the steps are known where it is one of the checkpoint's examples."""
        steps = self._race.gold_steps(name, question)
        return self._hands.reading(name, question, num_blocks=num_blocks, gold=gold, steps=steps)


def _checked_seed(seed: Any) -> int:
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed <= HIGHEST_SEED:
        raise RiMError(f"The seed must be a whole number from 0 to {HIGHEST_SEED}, not {str(seed)[:40]!r}.")
    return seed
