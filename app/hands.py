"""What is done with a model beside the race: a question's memory is read, operated on, a decode is put to the test.

Calls `rim_probe.probing` where the models are (`app.gpu`). Knows the view of the Surgery panel, which says what is to
be done. Does not know Gradio, HTML or sessions, and does no maths.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
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


def _predict(loaded: Loaded, reading: Mapping[str, Any], block: int | None, **options: Any) -> dict[str, Any]:
    from rim_probe.probing.trial import predict

    problem = Problem(reading["question"], tuple(reading["steps"]), reading["gold"] or "")
    options |= {"steps": reading["chain"], "block": block}
    return predict(loaded.models["memory"], problem, claimed(reading, block), **options)


def claimed(reading: Mapping[str, Any], block: int | None) -> dict[int, int] | None:
    """What a trial takes blocks to hold: the decode of a block that is named, else step t, as the interchange test."""
    decoded = claims(reading)
    return decoded if block in decoded else None


def _carry_out(loaded: Loaded, predicted: Mapping[str, Any], **options: Any) -> dict[str, Any]:
    from rim_probe.probing.trial import carry_out

    return carry_out(loaded.models["memory"], predicted, **options)


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

    def predict(
        self, name: str, reading: Mapping[str, Any], block: int | None, num_blocks: int, seed: int
    ) -> dict[str, Any]:
        """The answer that follows if a block holds its step (`rim_probe.probing.trial.predict`).

        Raises:
            RiMError: there is no claim to test, or no partner to test it with.
        """
        return gpu.call(_predict, self.shelf.load(name), reading, block, num_blocks=num_blocks, seed=seed)

    def carry_out(self, name: str, predicted: Mapping[str, Any], **options: Any) -> dict[str, Any]:
        """What came of a prediction (`rim_probe.probing.trial.carry_out`), beside the rate over many pairs."""
        found = gpu.call(_carry_out, self.shelf.load(name), predicted, **options)
        return found | {"checkpoint": name, "rate": self._rate(name)}

    def _rate(self, name: str) -> str | None:
        told = self.shelf.interchange(name)
        return told and told[1]

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

    def test_claim(self, run: Run, block: str) -> Iterator[None]:
        """The experiment: a prediction (`write_down`), what came of it, and the same on the checkpoint that was trained
        the other way (`ModelShelf.counterpart`). Yields when there is something new to draw; errors as for `predict`.
        """
        self.write_down(run, block)
        yield
        self.try_it(run)
        if self.shelf.counterpart(run.checkpoint):
            yield
            self.try_beside(run)

    def write_down(self, run: Run, block: str) -> None:
        """The prediction, into `run.predicted`; errors as for `predict`.

        Args:
            block: its number; anything else leaves the choice to the trial.
        """
        run.surgery = run.counterfactual = run.predicted = None
        if run.reading is None:
            raise RiMError(UNREAD)
        if other := self.shelf.counterpart(run.checkpoint):
            self.shelf.start(other)
        number = int(block) if block.isdecimal() else None
        predicted = self.predict(run.checkpoint, self._told(run), number, run.num_blocks, run.seed)
        run.predicted = predicted | {"asked": "all" if number is None else str(number)}

    def try_it(self, run: Run) -> None:
        """What came of `run.predicted`, into `run.counterfactual` and `run.surgery`."""
        assert run.predicted is not None
        unrelated = self._unrelated(run, run.predicted["partner"]["question"])
        options = {"num_blocks": run.num_blocks, "seed": run.seed, "unrelated": unrelated}
        run.counterfactual = self.carry_out(run.checkpoint, run.predicted, **options)
        run.surgery = run.counterfactual["surgery"]

    def try_beside(self, run: Run) -> None:
        """The same block of the same question on the checkpoint trained the other way, or why that cannot be done."""
        other, tried = self.shelf.counterpart(run.checkpoint), run.counterfactual
        assert other is not None and tried is not None
        options = {"num_blocks": run.num_blocks, "seed": run.seed}
        beside = {"checkpoint": other, "found": None, "why": None, "rate": self._rate(other)}
        try:
            predicted = self.predict(other, self._told(run), tried["blocks"][0], **options)
            beside["found"] = self.carry_out(other, predicted, **options)
        except RiMError as error:
            beside["why"] = str(error)
        run.counterfactual = tried | {"beside": beside}

    @staticmethod
    def _told(run: Run) -> dict[str, Any]:
        assert run.reading is not None
        return run.reading | {"steps": run.steps, "gold": run.gold}

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
        view["try"] = run.counterfactual.get("asked", "all")
    return view
