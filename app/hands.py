"""What is done with a finished run: its memory is read, operated on, and a decode is put to the test.

Calls `rim_probe.probing` where the models are (`app.gpu`) and puts the results into the run. Knows the view of the
Surgery panel, which says what is to be done. Does not know Gradio, HTML or sessions, and does no maths.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from app import gpu
from app.models import ModelShelf
from app.runs import Run
from app.words import format_time
from rim_probe.errors import RiMError
from rim_probe.plots import view_of
from rim_probe.plots.surgery import ACTIONS, parse
from rim_probe.probing.matches import claims

if TYPE_CHECKING:
    from rim_probe.model import RiM

log = logging.getLogger(__name__)

AT_ONCE = 2  # readings and interventions computed at the same time; more would only slow each other down
LONG = 2.0  # seconds for which one would like to know how long it will take
LETTERS = {action: letter for letter, action in ACTIONS.items()}
UNREAD = "What this run's memory holds was not read, so there is nothing to operate on; ask its question again."


@dataclass
class Hands:
    """What all visitors share: the checkpoints, and how many are served at once."""

    shelf: ModelShelf
    _free: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(AT_ONCE))
    _took: dict[str, float] = field(default_factory=dict)  # seconds of the last reading, by checkpoint

    def readers(self, name: str) -> tuple[Mapping[str, RiM], Any]:
        """The models of a checkpoint by role, and its fitted decoders; waits until they are loaded."""
        found, patience = None, threading.Event()
        while found is None:
            found = self.shelf.wait_readers(name, patience)
        return found

    def read(self, run: Run) -> None:
        """Fills `run.reading`.

        Raises:
            RiMError: the models cannot be loaded or read.
        """
        from rim_probe.probing.reading import read

        models, readers = self.readers(run.checkpoint)
        options = {"num_blocks": run.num_blocks, "gold": run.gold, "steps": run.steps, "chain": run.chain()}
        try:
            with self._free:
                begun = time.monotonic()
                run.reading = gpu.call(read, models, readers, run.question, **options).to_dict()
                self._took[run.checkpoint] = time.monotonic() - begun
        except RiMError:
            raise
        except Exception:  # the race stands; a visitor gets a sentence and the log gets the rest
            log.exception("reading failed")
            raise RiMError("The memory of this run could not be read; the server's log has the details.") from None

    def patience(self, run: Run) -> str:
        """What to say while a run's memory is read; of a large model also how long that took the last time."""
        seconds = self._took.get(run.checkpoint, 0)
        last = f" With this model that took {format_time(seconds)} the last time." if seconds >= LONG else ""
        return f"Reading the memory blocks …{last}"

    def operate(self, run: Run, view: Mapping[str, str]) -> None:
        """Does what a view of Surgery says, into `run.surgery`.

        Raises:
            RiMError: a block, layer or second question that it cannot be done with.
        """
        from rim_probe.probing.surgery import operate

        if run.reading is None:
            raise RiMError(UNREAD)
        view = view_of(run.drawable(), "surgery", view)
        low, high = view["layers"].split("-")
        actions = {block: ACTIONS[letter] for block, letter in (parse(view["ops"], run.num_blocks) or {}).items()}
        memory = self.readers(run.checkpoint)[0]["memory"]
        options = {
            "partner": view["partner"] or None,
            "unrelated": self._unrelated(memory, run, view["partner"]),
            "layers": (int(low), int(high)),
            "num_blocks": run.num_blocks,
            "gold": run.gold,
            "seed": run.seed,
        }
        with self._free:
            run.surgery = gpu.call(operate, memory, run.question, actions, **options)

    def test_claim(self, run: Run, block: str) -> None:
        """Tests the claim that a block holds its decoded step, into `run.counterfactual` and `run.surgery`.

        Args:
            block: its number; anything else leaves the choice to the trial.

        Raises:
            RiMError: there is no claim to test, or no partner to test it with.
        """
        from rim_probe.probing.trial import problem_from, try_counterfactual

        if run.reading is None:
            raise RiMError(UNREAD)
        problem = problem_from(run.question, run.steps, run.reading["chain"], run.gold)
        memory = self.readers(run.checkpoint)[0]["memory"]
        options = {"block": int(block) if block.isdecimal() else None, "num_blocks": run.num_blocks, "seed": run.seed}
        with self._free:
            found = gpu.call(try_counterfactual, memory, problem, claims(run.reading), **options)
        run.counterfactual, run.surgery = found, found["surgery"]
        self.operate(run, view_of_done(run))  # the same once more, beside the control of an operation

    def _unrelated(self, memory: RiM, run: Run, partner: str) -> str | None:
        """An example whose memory knows nothing of the two questions; of another answer, if there is one, for with the
        same one nobody could tell whether the answer stayed or was brought along."""
        try:
            examples = self.shelf.examples(run.checkpoint)
        except RiMError:  # damaged: the gallery says so, and other controls need none
            return None
        same = [_tokens(memory, run.question), _tokens(memory, partner), None]
        others = [problem for problem in examples if _tokens(memory, problem.question) not in same]
        said = run.reading["answer"]["value"] if run.reading else None
        return min(others, key=lambda problem: problem.answer in (said, run.gold)).question if others else None


def _tokens(memory: RiM, question: str) -> list[int] | None:
    """What the model sees of a question; None where it cannot be asked."""
    try:
        return memory.encode_question(question)
    except RiMError:
        return None


def view_of_done(run: Run) -> dict[str, str]:
    """The view of Surgery that shows what was done to this run; empty where nothing was."""
    view = {}
    if run.surgery is not None and run.surgery["actions"]:
        done = run.surgery
        view["ops"] = "".join(f"{block}{LETTERS[action]}" for block, action in done["actions"].items())
        view |= {"layers": "-".join(map(str, done["layers"])), "partner": done["partner"] or ""}
    if run.counterfactual is not None:
        blocks = run.counterfactual["blocks"]
        view["try"] = str(blocks[0]) if len(blocks) == 1 else "all"
    return view
