"""What a visitor asks and how it is answered: the order of a race, its clock, its cancelling, and the queue before it.

Knows a visitor's `Session` with its bounded history. Does not know Gradio, HTML or where models come from; what a run
is, is in `app.runs`.
"""

from __future__ import annotations

import copy
import datetime
import logging
import threading
import time
import unicodedata
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any

from app import gpu
from app.runs import METHODS, RACERS, Lane, Run
from rim_probe.errors import QuestionError, RiMError

if TYPE_CHECKING:
    from rim_probe.model import RiM

log = logging.getLogger(__name__)

MAX_BLOCKS = 16
MAX_GOLD_CHARACTERS = 100
MAX_NEW_TOKENS = 256
MAX_HISTORY = 12
# The page is redrawn at most this often, and then given this long to draw. Meanwhile nothing is decoded and the clock
# stands still, for drawing shares the processor with decoding: chain of thought, which is drawn more often, was
# measured up to 3 times too slow without this.
REDRAW_SECONDS = 0.15
FIRST_REDRAW_SECONDS = 0.08  # sooner, so that a slower method, too, shows its first token soon after the click
DRAWING_SECONDS = 0.05
# Before each method starts, so that neither pays for the drawing before it. Measured on rim-tiny with a browser on the
# same two cores: without a pause memory seems to take 20 to 34 ms instead of 13 to 17, because the page is just being
# sent. From 0.05 s on nothing changes any more that exceeds the noise: CoT / RiM is 3.6 to 4.4, as without any page.
SETTLE_SECONDS = 0.05
MAX_WAITING = 48
CANCEL_SECONDS = 0.15  # how long a cancelled run may still stand in line


class Session:
    """What one visitor has done so far. No dataclass: those Gradio writes out in full each time it keeps one, and
    then forgets what it wrote; with a reading inside, this was half of all the work under load.

    Attributes:
        picked: the example (question, answer, gold steps) put into the boxes, if any.
        runs: the last `MAX_HISTORY` runs, oldest first. A run that falls out is forgotten with all it holds.
        recorded: which recorded run is shown, None where it is one of `runs`.
    """

    def __init__(self, picked: tuple[str, str, tuple[str, ...]] | None = None):
        self.picked = picked
        self.runs: deque[Run] = deque(maxlen=MAX_HISTORY)
        self.recorded: int | None = None
        self._shown: Run | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Session:
        """What Gradio starts a visitor with: experiments on the opening run are the visitor's own, its reading, which
        nobody changes, is everybody's.
        """
        other = Session(self.picked)
        other.runs.extend(self.runs)
        other.recorded, other._shown = self.recorded, copy.copy(self._shown)
        return other

    @property
    def run(self) -> Run | None:
        """The run that is shown."""
        return self._shown

    @property
    def shown(self) -> int | None:
        """Its place in `runs`; None where nothing or a recorded run is shown."""
        return next((index for index, run in enumerate(self.runs) if run is self._shown), None)

    def add(self, run: Run) -> None:
        """Shows a new run."""
        self.runs.append(run)
        self._show(run, None)

    def show(self, index: int) -> Run:
        """Shows an earlier run.

        Raises:
            RiMError: it has fallen out of the history.
        """
        if not 0 <= index < len(self.runs):
            raise RiMError("This run is no longer in the history; ask its question again.")
        self._show(self.runs[index], None)
        return self.runs[index]

    def show_recorded(self, run: Run, index: int) -> None:
        """Shows a recorded run, which does not enter the history."""
        self._show(run, index)

    def _show(self, run: Run, recorded: int | None) -> None:
        self._shown, self.recorded = run, recorded

    def steps_for(self, question: str) -> tuple[str, ...]:
        """The gold steps of the picked example, as long as its question has not been edited."""
        return self.picked[2] if self.picked is not None and self.picked[0] == question else ()


class Turnstile:
    """Lets one run through at a time, in order of arrival: two decodes at once would spoil each other's times."""

    def __init__(self) -> None:
        self._line: deque[object] = deque()
        self._moved = threading.Condition()

    def wait(self, ticket: object, cancel: threading.Event) -> Iterator[int]:
        """Yields the number of runs ahead, whenever it has changed, until it is this ticket's turn or `cancel` is set.
        Call `leave` in any case.

        Raises:
            RiMError: too many are waiting already.
        """
        with self._moved:
            if len(self._line) > MAX_WAITING:
                raise RiMError(f"{MAX_WAITING} runs are waiting already; please try again in a minute.")
            self._line.append(ticket)
            ahead = len(self._line) - 1
        while ahead and not cancel.is_set():
            yield ahead
            before = ahead
            while ahead == before and not cancel.is_set():
                with self._moved:
                    self._moved.wait_for(lambda: self._line.index(ticket) != before, timeout=CANCEL_SECONDS)  # noqa: B023
                    ahead = self._line.index(ticket)

    def leave(self, ticket: object) -> None:
        with self._moved:
            if ticket in self._line:
                self._line.remove(ticket)
                self._moved.notify_all()


class Cancellations:
    """The cancel switches of the runs under way, by session (one browser tab, or one API client)."""

    def __init__(self) -> None:
        self._switches: dict[str, list[threading.Event]] = {}
        self._lock = threading.Lock()

    def start(self, session: str) -> threading.Event:
        """A switch for a new run."""
        switch = threading.Event()
        with self._lock:
            self._switches.setdefault(session, []).append(switch)
        return switch

    def stop(self, session: str) -> None:
        """Stops every run of a session."""
        with self._lock:
            switches = self._switches.pop(session, [])
        for switch in switches:
            switch.set()

    def finish(self, session: str, switch: threading.Event) -> None:
        """Stops one run, if it still goes on, and forgets it."""
        switch.set()
        with self._lock:
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


def race(
    models: Mapping[str, RiM],
    run: Run,
    cancel: threading.Event,
    turnstile: Turnstile,
    methods: Sequence[str] = RACERS,
) -> Iterator[Run]:
    """Answers `run.question` with every method, one after the other, and yields `run` whenever it is worth redrawing.

    Every time is measured from its own method's start, and no clock runs while a run is yielded: the times are those
    of decoding, not of drawing. The last run yielded has the status "done" or "stopped". Closing the generator ends the
    decoding, and `cancel` ends it within one token.

    Args:
        methods: which lanes the run gets, of `METHODS`, "memory" and "cot" among them.

    Raises:
        RiMError: a question the model cannot be asked, or a failure in the model.
    """
    run.lanes = {method: Lane() for method in METHODS if method in methods}
    for method in run.lanes:  # what cannot be asked is refused before anything is drawn or queued
        models[method].prompt_ids(run.question, method, run.num_blocks)
    ticket = object()
    try:
        run.status = "waiting"
        for run.ahead in turnstile.wait(ticket, cancel):
            yield run
        run.status, run.ahead = "running", 0
        yield run
        if not cancel.is_set():
            with closing(gpu.stream(_decode, models, run, cancel=cancel)) as steps:
                for step in steps:
                    run.lanes = step.lanes  # a lent GPU decodes a copy of the run
                    yield run
        run.status = "stopped" if cancel.is_set() else "done"
        run.date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        yield run
    finally:
        turnstile.leave(ticket)


def _decode(models: Mapping[str, RiM], run: Run, cancel: threading.Event) -> Iterator[Run]:
    from rim_probe.decoding import stream

    for method in run.lanes:
        if cancel.wait(SETTLE_SECONDS):
            return
        blocks = {"num_blocks": run.num_blocks} if method == "memory" else {}
        events = stream(models[method], run.question, method, max_new_tokens=MAX_NEW_TOKENS, cancel=cancel, **blocks)
        try:
            with closing(events):
                drawn = time.monotonic() - (REDRAW_SECONDS - FIRST_REDRAW_SECONDS)
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
