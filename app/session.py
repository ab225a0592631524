"""What a visitor asks and how it is answered: the order of a race and its clock.

Knows a visitor's `Session` with its bounded history. Does not know Gradio, HTML or where models come from; what a run
is, is in `app.runs`.
"""

from __future__ import annotations

import copy
import datetime
import logging
import re
import time
import unicodedata
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any

from app import gpu
from app.runs import Run
from rim_probe.equations import number_text, question_numbers, read_equation
from rim_probe.equations.chains import NUMBER_WORD
from rim_probe.errors import QuestionError, RiMError

if TYPE_CHECKING:
    from app.models import Loaded
    from rim_probe.problems import Problem

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
REPEATS = 3  # of a race that is over, for the comparison of times; the race itself was the warm-up


class Session:
    """What one visitor has done so far. No dataclass: those Gradio writes out in full each time it keeps one, and
    then forgets what it wrote; with a reading inside, this was half of all the work under load.

    Attributes:
        picked: the example (question, answer, gold steps) put into the boxes, if any.
        runs: the last `MAX_HISTORY` runs, oldest first. A run that falls out is forgotten with all it holds.
        recorded: which recorded run is shown, None where it is one of `runs`.
        asked: a run that waits for its turn in the queue.
        watched: the checkpoint whose loading the page shows.
    """

    def __init__(self, picked: tuple[str, str, tuple[str, ...]] | None = None):
        self.picked = picked
        self.runs: deque[Run] = deque(maxlen=MAX_HISTORY)
        self.recorded: int | None = None
        self.asked: Run | None = None
        self.watched: str | None = None
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


def check_question(question: Any) -> str:
    """The question, stripped. The model has its own say later; this is what can be refused before it is loaded."""
    if not isinstance(question, str) or not question.strip():
        raise QuestionError("The question is empty; type a word problem or pick an example.")
    _check_characters("question", question)
    return question.strip()


def _check_characters(what: str, text: str) -> None:
    strange = [char for char in text if unicodedata.category(char) in ("Cc", "Cs") and char not in "\n\r\t"]
    if strange:
        raise QuestionError(f"The {what} holds a control character (U+{ord(strange[0]):04X}); remove it and run again.")


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
    _check_characters("correct answer", str(gold))
    return str(gold).strip()


_SUM = re.compile(
    r"(?:(?:what|how much) is|what's|calculate|compute)?\s*([-+*/x×÷().,\d\s]+?)\s*=?\s*\??", re.IGNORECASE
)


def evaluate(question: str) -> str | None:
    """The answer of a question that is nothing but a sum ("what is 12 + 7?"), None of any other."""
    match = _SUM.fullmatch(question.strip())
    equation = read_equation(f"{match[1]}=0") if match else None
    value = equation.value() if equation else None
    return None if value is None else number_text(value)


def _form(question: str) -> str:
    """A question with all its numbers and signs alike."""
    return re.sub(r"\d+", "0", re.sub(r"[-*/]", "+", "".join(question.lower().split())))


def caution(question: str, examples: Sequence[Problem]) -> str:
    """What makes a question one that the model was not trained for, as far as its examples tell; else ""."""
    letters = [char for char in question if char.isalpha()]
    if sum(char.isascii() for char in letters) < 0.8 * len(letters):
        return "This model was trained on English alone, so what it answers here is a guess."
    asked = [number.value for number in question_numbers(question)]
    if not asked and not NUMBER_WORD.search(question):
        return "There is no number in this question, and the model was trained on word problems alone: it will guess."
    forms = {_form(problem.question) for problem in examples}
    if len(forms) == 1 and _form(question) not in forms:
        return (
            f"This model reads questions of one form alone, such as “{next(iter(examples)).question}”: it will guess."
        )
    known = [n.value for p in examples for text in (p.question, p.answer, *p.steps) for n in question_numbers(text)]
    most, seen = max(asked, default=0), max(known, default=None)
    if seen is not None and len(str(int(most))) > len(str(int(seen))):
        here = f"{number_text(most)} is larger than the numbers of this model’s examples"
        return f"{here} (up to {number_text(seen)}), so its answer is a guess."
    return ""


def race(loaded: Loaded, run: Run) -> Iterator[Run]:
    """Answers `run.question` for each of its lanes, one after the other; yields `run` whenever it is worth redrawing.

    Every time is measured from its own method's start, and no clock runs while a run is yielded: the times are those
    of decoding, not of drawing. Closing the generator ends the decoding, and makes the run a "stopped" one.

    Raises:
        RiMError: a question the model cannot be asked, or a failure in the model.
    """
    check_asked(loaded, run)
    run.status = "running"
    try:
        yield run
        with closing(gpu.stream(_decode, loaded, run)) as steps:
            for step in steps:
                run.lanes = step.lanes  # a lent GPU decodes a copy of the run
                yield run
        run.status = "done"
    finally:
        run.status = "done" if run.status == "done" else "stopped"
        run.date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    yield run


def check_asked(loaded: Loaded, run: Run) -> None:
    """Refuses what the models of a run's lanes cannot be asked.

    Raises:
        RiMError: too long a question, or one of unknown words.
    """
    for method in run.lanes:
        loaded.models[method].prompt_ids(run.question, method, run.num_blocks)


def measure(loaded: Loaded, run: Run) -> None:
    """Times every lane of a finished race `REPEATS` times more, in turn, into `Lane.repeats`."""
    for _ in range(REPEATS):
        for method, seconds in gpu.call(_time, loaded, run).items():
            run.lanes[method].repeats.append(seconds)


def _time(loaded: Loaded, run: Run) -> dict[str, float]:
    """Seconds to the answer, by method, of one more race without the readouts that an answer does not need."""
    from rim_probe.decoding import answer

    found = {}
    for method in run.lanes:
        blocks = {"num_blocks": run.num_blocks, "readouts": "final"} if method == "memory" else {}
        told = answer(loaded.models[method], run.question, method, max_new_tokens=MAX_NEW_TOKENS, **blocks)
        found[method] = told.total_seconds
    return found


def _decode(loaded: Loaded, run: Run) -> Iterator[Run]:
    from rim_probe.decoding import stream

    for method in run.lanes:
        time.sleep(SETTLE_SECONDS)
        blocks = {"num_blocks": run.num_blocks} if method == "memory" else {}
        events = stream(loaded.models[method], run.question, method, max_new_tokens=MAX_NEW_TOKENS, **blocks)
        try:
            with closing(events):
                drawn = time.monotonic() - (REDRAW_SECONDS - FIRST_REDRAW_SECONDS)
                for event in events:
                    _note(run, method, event)
                    if event.kind != "done" and time.monotonic() - drawn >= REDRAW_SECONDS:
                        # The clock of `stream` stands still until it is asked for the next event.
                        yield run
                        time.sleep(DRAWING_SECONDS)
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
