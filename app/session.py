"""What a visitor asks and how it is answered: a `Run` holds one question answered by memory and by chain of thought.

Knows the order of a race, its clock and its cancelling. Does not know Gradio, HTML or where models come from.

A run is computed once and read by every panel. Its dictionary form (`Run.to_dict`) is at the same time what the page
offers for download, what the API returns and what is committed under `app/recorded/`.
"""

from __future__ import annotations

import datetime
import logging
import threading
import time
import unicodedata
from collections import deque
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rim_probe.errors import QuestionError, RiMError

if TYPE_CHECKING:
    from rim_probe.model import RiM

log = logging.getLogger(__name__)

RUN_FORMAT = "rim-probe-run/1"
RACERS = ("memory", "cot")  # in the order in which they run
MAX_BLOCKS = 16
MAX_GOLD_CHARACTERS = 100
MAX_NEW_TOKENS = 256
# The page is redrawn at most this often, and then given this long to draw. Meanwhile nothing is decoded and the clock
# stands still, for drawing shares the processor with decoding: chain of thought, which is drawn more often, was
# measured up to 3 times too slow without this.
REDRAW_SECONDS = 0.15
DRAWING_SECONDS = 0.05
SETTLE_SECONDS = 0.2  # before each method starts, so that neither pays for what came before it
MAX_WAITING = 16


@dataclass
class Lane:
    """One method's part of a run.

    Attributes:
        events: dictionaries with `kind` ("prefill", "token", "readout"), `seconds` since this method started, and
            `text`; a readout also has `block` (1-based), `value` and `probability`.
        answer: `rim_probe.decoding.Answer.to_dict()`, or None while the method is running.
        correct: whether the answer equals the gold one; None where no gold answer is known.
    """

    events: list[dict[str, Any]] = field(default_factory=list)
    answer: dict[str, Any] | None = None
    correct: bool | None = None

    @property
    def answered_seconds(self) -> float | None:
        """When the last token of the answer had come; None before the method has finished.

        For memory this may be earlier than `answer["total_seconds"]`: the readouts of the other blocks, which the page
        shows but an answer does not need, can take more tokens.
        """
        if self.answer is None:
            return None
        tokens = [event["seconds"] for event in self.events if event["kind"] == "token"]
        return self.answer["total_seconds"] if self.answer["cancelled"] or not tokens else tokens[-1]


@dataclass
class Run:
    """One question answered by both methods.

    Attributes:
        matched: chain of thought has weights of its own; else the memory model's are asked for it.
        status: "waiting" (for another visitor's run), "running", "done" or "stopped".
        ahead: how many runs are before this one while it waits.
    """

    checkpoint: str
    question: str
    gold: str | None
    num_blocks: int
    machine: str = ""
    date: str = ""
    matched: bool = True
    lanes: dict[str, Lane] = field(default_factory=lambda: {method: Lane() for method in RACERS})
    status: str = "running"
    ahead: int = 0

    def to_dict(self) -> dict[str, Any]:
        return {
            "format": RUN_FORMAT,
            "checkpoint": self.checkpoint,
            "question": self.question,
            "gold": self.gold,
            "num_blocks": self.num_blocks,
            "machine": self.machine,
            "date": self.date,
            "matched": self.matched,
            "status": self.status,
            **{
                method: {
                    "answer": lane.answer,
                    "answered_seconds": lane.answered_seconds,
                    "correct": lane.correct,
                    "events": lane.events,
                }
                for method, lane in self.lanes.items()
            },
        }

    @classmethod
    def from_dict(cls, data: Any) -> Run:
        """Inverse of `to_dict`.

        Raises:
            RiMError: not a run of this format.
        """
        try:
            if data["format"] != RUN_FORMAT:
                raise RiMError(f"A run of format {data['format']!r} cannot be shown; this page reads {RUN_FORMAT!r}.")
            return cls(
                **{
                    key: data[key]
                    for key in ("checkpoint", "question", "gold", "num_blocks", "machine", "date", "matched", "status")
                },
                lanes={
                    method: Lane(data[method]["events"], data[method]["answer"], data[method]["correct"])
                    for method in RACERS
                },
            )
        except (KeyError, TypeError) as error:
            raise RiMError(f"This is not a run of format {RUN_FORMAT!r} ({error}).") from None


@dataclass
class Session:
    """What one visitor has done so far. `picked` is the example (question, answer) put into the boxes, if any."""

    picked: tuple[str, str] | None = None
    run: Run | None = None


class Turnstile:
    """Lets one run through at a time, in order of arrival: two decodes at once would spoil each other's times."""

    def __init__(self) -> None:
        self._line: deque[object] = deque()

    def wait(self, ticket: object, cancel: threading.Event) -> Iterator[int]:
        """Yields the number of runs ahead until it is this ticket's turn or `cancel` is set. Call `leave` in any case.

        Raises:
            RiMError: too many are waiting already.
        """
        if len(self._line) > MAX_WAITING:
            raise RiMError(f"{MAX_WAITING} runs are waiting already; please try again in a minute.")
        self._line.append(ticket)
        while self._line[0] is not ticket and not cancel.is_set():
            yield self._line.index(ticket)
            cancel.wait(REDRAW_SECONDS)

    def leave(self, ticket: object) -> None:
        if ticket in self._line:
            self._line.remove(ticket)


class Cancellations:
    """The cancel switches of the runs under way, by session (one browser tab, or one API client)."""

    def __init__(self) -> None:
        self._switches: dict[str, list[threading.Event]] = {}

    def start(self, session: str) -> threading.Event:
        """A switch for a new run."""
        switch = threading.Event()
        self._switches.setdefault(session, []).append(switch)
        return switch

    def stop(self, session: str) -> None:
        """Stops every run of a session."""
        for switch in self._switches.pop(session, []):
            switch.set()

    def finish(self, session: str, switch: threading.Event) -> None:
        """Stops one run, if it still goes on, and forgets it."""
        switch.set()
        others = [other for other in self._switches.pop(session, []) if other is not switch]
        if others:
            self._switches[session] = others


def check_question(question: Any) -> str:
    """The question, stripped. The model has its own say later; this is what can be refused before it is loaded."""
    if not isinstance(question, str) or not question.strip():
        raise QuestionError("The question is empty; type a word problem or pick an example.")
    strange = [char for char in question if unicodedata.category(char) in ("Cc", "Cs") and char not in "\n\r\t"]
    if strange:
        raise QuestionError(
            f"The question holds a control character (U+{ord(strange[0]):04X}); remove it and run again."
        )
    return question.strip()


def check_blocks(value: Any, highest: int = MAX_BLOCKS) -> int:
    """K as an int.

    Raises:
        RiMError: not a whole number from 0 to `highest`.
    """
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or value not in range(highest + 1):
        raise RiMError(
            f"The number of memory blocks must be a whole number from 0 to {highest}, not {str(value)[:40]!r}."
        )
    return int(value)


def check_gold(gold: Any) -> str | None:
    """The correct answer as typed, or None for an empty field."""
    if gold is None or (isinstance(gold, str) and not gold.strip()):
        return None
    if not isinstance(gold, str | int | float) or len(str(gold)) > MAX_GOLD_CHARACTERS:
        raise RiMError(f"The correct answer must be a number or a word of at most {MAX_GOLD_CHARACTERS} characters.")
    return str(gold).strip()


def race(models: dict[str, RiM], run: Run, cancel: threading.Event, turnstile: Turnstile) -> Iterator[Run]:
    """Answers `run.question` with both methods, one after the other, and yields `run` whenever it is worth redrawing.

    Every time is measured from its own method's start, and no clock runs while a run is yielded: the times are those
    of decoding, not of drawing. The last run yielded has the status "done" or "stopped". Closing the generator ends the
    decoding, and `cancel` ends it within one token.

    Raises:
        RiMError: a question the model cannot be asked, or a failure in the model.
    """
    for method in RACERS:  # what cannot be asked is refused before anything is drawn or queued
        models[method].prompt_ids(run.question, method, run.num_blocks)
    ticket = object()
    try:
        run.status = "waiting"
        for run.ahead in turnstile.wait(ticket, cancel):
            yield run
        run.status, run.ahead = "running", 0
        yield run
        if not cancel.is_set():
            yield from _decode(models, run, cancel)
        run.status = "stopped" if cancel.is_set() else "done"
        run.date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        yield run
    finally:
        turnstile.leave(ticket)


def _decode(models: dict[str, RiM], run: Run, cancel: threading.Event) -> Iterator[Run]:
    from rim_probe.decoding import stream

    for method in RACERS:
        if cancel.wait(SETTLE_SECONDS):
            return
        blocks = {"num_blocks": run.num_blocks} if method == "memory" else {}
        events = stream(models[method], run.question, method, max_new_tokens=MAX_NEW_TOKENS, cancel=cancel, **blocks)
        try:
            with closing(events):
                drawn = time.monotonic()
                for event in events:
                    _note(run, method, event)
                    if event.kind != "done" and time.monotonic() - drawn >= REDRAW_SECONDS:
                        # The clock of `stream` stands still until it is asked for the next event.
                        yield run
                        cancel.wait(DRAWING_SECONDS)
                        drawn = time.monotonic()
        except RiMError:
            raise
        except Exception:  # whatever a model can raise, a visitor gets a sentence and the log gets the rest
            log.exception("answering failed")
            raise RiMError(
                "The model failed while answering this question; the server's log has the details."
            ) from None
        yield run


def _note(run: Run, method: str, event: Any) -> None:
    """Takes one decoding event into the run."""
    lane = run.lanes[method]
    if event.kind == "done":
        lane.answer = event.answer.to_dict()
        if run.gold is not None and not event.answer.cancelled:
            from rim_probe.problems import is_correct

            lane.correct = is_correct(event.answer.value, run.gold)
        return
    entry = {"kind": event.kind, "seconds": event.seconds, "text": event.text}
    if event.readout is not None:
        readout = event.readout
        entry |= {
            "block": readout.block,
            "value": readout.value,
            "probability": readout.probability,
            "text": readout.text,
        }
    lane.events.append(entry)
