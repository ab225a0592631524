"""What is done with a model beside the race: a question's memory is read, operated on, a decode is put to the test.

Calls `rim_probe.probing` where the models are (`app.gpu`). Knows the view of the Surgery panel, which says what is to
be done. Does not know Gradio, HTML or sessions, and does no maths.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from app import gpu
from app.models import Loaded, ModelShelf
from app.runs import Run
from rim_probe.errors import RiMError
from rim_probe.plots import view_of
from rim_probe.plots.surgery import ACTIONS, parse
from rim_probe.probing.matches import claims
from rim_probe.problems import Problem

log = logging.getLogger(__name__)

LETTERS = {action: letter for letter, action in ACTIONS.items()}
UNREAD = "What this run's memory holds was not read, so there is nothing to operate on; ask its question again."


def _read(loaded: Loaded, question: str, **options: Any) -> dict[str, Any]:
    from rim_probe.probing.reading import read

    return read(loaded.roles, loaded.readers, question, **options).to_dict()


def _operate(loaded: Loaded, question: str, actions: Mapping[int | str, str], **options: Any) -> dict[str, Any]:
    from rim_probe.probing.surgery import operate

    return operate(loaded.models["memory"], question, actions, **options)


def _try_claim(loaded: Loaded, reading: Mapping[str, Any], **options: Any) -> dict[str, Any]:
    from rim_probe.probing.trial import try_counterfactual

    problem = Problem(reading["question"], tuple(reading["steps"]), reading["gold"] or "")
    return try_counterfactual(loaded.models["memory"], problem, claims(reading), steps=reading["chain"], **options)


@dataclass
class Hands:
    """What all visitors share: the checkpoints."""

    shelf: ModelShelf

    def reading(self, name: str, question: str, **options: Any) -> dict[str, Any]:
        """What the probes say of a question (`rim_probe.probing.reading.read`).

        Raises:
            RiMError: the models cannot be loaded or read.
        """
        loaded = self.shelf.load(name, readable=True)
        try:
            return gpu.call(_read, loaded, question, **options)
        except RiMError:
            raise
        except Exception:  # a visitor gets a sentence and the log gets the rest
            log.exception("reading failed")
            raise RiMError("The memory of this run could not be read; the server's log has the details.") from None

    def surgery(self, name: str, question: str, actions: Mapping[int | str, str], **options: Any) -> dict[str, Any]:
        """What becomes of the answer (`rim_probe.probing.surgery.operate`).

        Raises:
            RiMError: a block, layer or second question that it cannot be done with.
        """
        return gpu.call(_operate, self.shelf.load(name), question, actions, **options)

    def counterfactual(self, name: str, reading: Mapping[str, Any], **options: Any) -> dict[str, Any]:
        """Whether a block is a cause (`rim_probe.probing.trial.try_counterfactual`).

        Raises:
            RiMError: there is no claim to test, or no partner to test it with.
        """
        return gpu.call(_try_claim, self.shelf.load(name), reading, **options)

    def read(self, run: Run) -> None:
        """Fills `run.reading`; errors as for `reading`."""
        options = {"num_blocks": run.num_blocks, "gold": run.gold, "steps": run.steps, "chain": run.chain()}
        run.reading = self.reading(run.checkpoint, run.question, **options)

    def operate(self, run: Run, view: Mapping[str, str]) -> None:
        """Does what a view of Surgery says, into `run.surgery`; errors as for `surgery`."""
        if run.reading is None:
            raise RiMError(UNREAD)
        view = view_of(run.drawable(), "surgery", view)
        low, high = view["layers"].split("-")
        actions = {block: ACTIONS[letter] for block, letter in (parse(view["ops"], run.num_blocks) or {}).items()}
        run.surgery = self.surgery(
            run.checkpoint,
            run.question,
            actions,
            partner=view["partner"] or None,
            unrelated=self._unrelated(run, view["partner"]),
            layers=(int(low), int(high)),
            num_blocks=run.num_blocks,
            gold=run.gold,
            seed=run.seed,
        )

    def test_claim(self, run: Run, block: str) -> None:
        """Tests the claim that a block holds its decoded step, into `run.counterfactual` and `run.surgery`; errors as
        for `counterfactual`.

        Args:
            block: its number; anything else leaves the choice to the trial.
        """
        if run.reading is None:
            raise RiMError(UNREAD)
        told = run.reading | {"steps": run.steps, "gold": run.gold}
        options = {"block": int(block) if block.isdecimal() else None, "num_blocks": run.num_blocks, "seed": run.seed}
        found = self.counterfactual(run.checkpoint, told, **options)
        run.counterfactual, run.surgery = found, found["surgery"]
        self.operate(run, view_of_done(run))  # the same once more, beside the control of an operation

    def _unrelated(self, run: Run, partner: str) -> str | None:
        """An example whose memory knows nothing of the two questions; of another answer, if there is one, for with the
        same one nobody could tell whether the answer stayed or was brought along."""
        try:
            examples, memory = self.shelf.examples(run.checkpoint), self.shelf.load(run.checkpoint).models["memory"]
        except RiMError:  # damaged: the gallery says so, and other controls need none
            return None

        def tokens(question: str) -> list[int] | None:
            """What the model sees of a question; None where it cannot be asked."""
            try:
                return memory.encode_question(question)
            except RiMError:
                return None

        same = [tokens(run.question), tokens(partner), None]
        others = [problem for problem in examples if tokens(problem.question) not in same]
        said = run.reading["answer"]["value"] if run.reading else None
        return min(others, key=lambda problem: problem.answer in (said, run.gold)).question if others else None


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
