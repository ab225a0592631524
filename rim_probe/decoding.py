"""Answering a question: memory, chain of thought and direct through ONE greedy loop (`greedy`).

Knows prompts, readouts and clocks. Knows nothing about the screen, data sets or grading of right and wrong.

Comparisons between methods are fair because nothing in the loop knows which method it serves. Times are those of the
decoding itself: the clock starts before tokenising and stands still while the consumer of `stream` holds an event.
"""

import bisect
import math
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Literal

from rim_probe.errors import RiMError
from rim_probe.greedy import Greedy, Trace
from rim_probe.model import RiM
from rim_probe.problems import ANSWER_MARKER, extract_answer
from rim_probe.report import count

Place = Literal["lone end", "one block", "one position"]
PLACES: dict[Place, str] = {  # controls of the number of blocks: the same place of the readout with other blocks
    "lone end": "a lone end token where the end of block K would stand",
    "one block": "one block where block K would stand",
    "one position": "K blocks, all where block 1 stands",
}


@dataclass(frozen=True)
class Readout:
    """What one memory block says.

    Attributes:
        block: 1-based number of the block it stands after; 0 where the blocks were removed.
        text: the decoded text without EOS.
        value: the parsed answer, None where there is none.
        token_ids: the generated ids, EOS included unless it was truncated.
        probability: product of the probabilities of these tokens, after banned ids were ruled out.
    """

    block: int
    text: str
    value: str | None
    token_ids: tuple[int, ...]
    probability: float


@dataclass(frozen=True)
class Answer:
    """One answered question.

    Attributes:
        text, value, token_ids: the answer shown; for memory that of the final readout. `token_ids` holds EOS where the
            model ended by itself.
        ttft_seconds: from the start (before tokenising) to the first token of the *answer*: the first token of the
            final readout (memory), the first token (direct), the first token that shows something after `####` (cot).
            None where no such token came, and in `answer_batch`.
        total_seconds: from the start to the end of every readout asked for; None in `answer_batch`.
        forward_passes: passes of the model that served this question, the prefix pass included.
        generated_tokens: tokens generated for the answer shown, EOS included.
        prompt_tokens: tokens of question, blocks or marker.
        kv_cache_bytes: keys and values held at the end; in a batch the share of one row, padding included.
        readouts: memory only: every readout that ended, by block.
        cancelled: stopped by the caller; everything above is what there was by then.
        truncated: the answer shown met `max_new_tokens` or the end of the context before EOS.
    """

    method: str
    question: str
    text: str
    value: str | None
    token_ids: tuple[int, ...]
    ttft_seconds: float | None
    total_seconds: float | None
    forward_passes: int
    generated_tokens: int
    prompt_tokens: int
    kv_cache_bytes: int
    readouts: tuple[Readout, ...] = ()
    cancelled: bool = False
    truncated: bool = False

    def to_dict(self) -> dict:
        """Plain lists, numbers, strings and dicts; equal to itself after a round trip through JSON."""
        data = asdict(self)
        data["token_ids"] = list(self.token_ids)
        data["readouts"] = [{**readout, "token_ids": list(readout["token_ids"])} for readout in data["readouts"]]
        return data


@dataclass(frozen=True)
class Event:
    """One thing that happened while a question was answered.

    Attributes:
        kind: `prefill` (the prefix pass is over), `token` (one more token of the answer shown), `readout` (a memory
            readout has ended; several can come at once, by block), `done` (the last event, also when cancelled).
        seconds: since the start; never falls from event to event.
        text: the new text of a token; empty for EOS and inside a character that spans tokens. The texts of all token
            events join to `Answer.text`.
        token_id: the token, for `token`.
        block: the block of a readout, or the one a memory token belongs to.
    """

    kind: Literal["prefill", "token", "readout", "done"]
    seconds: float
    method: str
    text: str = ""
    token_id: int | None = None
    block: int | None = None
    readout: Readout | None = None
    answer: Answer | None = None


def stream(
    rim: RiM,
    question: str,
    method: str,
    *,
    num_blocks: int | None = None,
    max_new_tokens: int = 256,
    cancel: threading.Event | None = None,
    readouts: Literal["all", "final"] = "all",
) -> Iterator[Event]:
    """Answers `question` and yields events as they happen; the last one is `done` and carries the `Answer`.

    Work is done only while the iterator is advanced: closing it, or setting `cancel`, stops before the next pass.

    Args:
        method: `memory`, `cot` or `direct`.
        num_blocks: memory blocks after the question (memory only); None for the layout's own. 0 removes them: one
            readout, numbered 0, right after the question.
        max_new_tokens: bound on the tokens of every readout; the context length is the other bound.
        cancel: looked at before every pass of the model.
        readouts: `all` decodes the readout of every block, `final` only the last one (memory only).

    Raises:
        RiMError (at the first event): unknown method or option, a question that cannot be asked (`RiM.prompt_ids`).
    """
    clock = _Clock()
    with closing(_events(rim, question, method, num_blocks, max_new_tokens, cancel, readouts, clock)) as events:
        for event in events:
            handed_over = time.perf_counter()
            yield event
            clock.skip(time.perf_counter() - handed_over)


def answer(
    rim: RiM,
    question: str,
    method: str,
    *,
    num_blocks: int | None = None,
    max_new_tokens: int = 256,
    cancel: threading.Event | None = None,
    readouts: Literal["all", "final"] = "all",
) -> Answer:
    """The `Answer` at the end of `stream`, which see."""
    *_, done = stream(
        rim,
        question,
        method,
        num_blocks=num_blocks,
        max_new_tokens=max_new_tokens,
        cancel=cancel,
        readouts=readouts,
    )
    assert done.answer is not None  # the last event is `done`
    return done.answer


def answer_batch(
    rim: RiM, questions: Sequence[str], method: str, *, num_blocks: int | None = None, max_new_tokens: int = 256
) -> list[Answer]:
    """Answers many questions in one batch, all readouts of each; for accuracy, so times are None.

    Texts and values are those of `answer`. The caller chooses the batch; questions of like length pad least.

    Raises:
        RiMError: as `stream`, for the first question that cannot be asked.
    """
    if not questions:
        return []
    prompts, blocks, greedy = _begin(rim, questions, method, num_blocks, max_new_tokens, "all")
    for _ in greedy.passes():
        pass
    return _answers(rim, questions, method, prompts, blocks, greedy)


def answer_placed(
    rim: RiM, questions: Sequence[str], place: Place, num_blocks: int, *, max_new_tokens: int = 256
) -> list[Answer]:
    """Final readouts of `PLACES[place]`: what the table over K measures beside the number of blocks.

    Raises:
        RiMError: as `answer_batch`; fewer than one block.
    """
    if num_blocks < 1:
        raise RiMError("A control of the number of blocks needs at least one block.")
    block, end = rim.encoder.block_ids, num_blocks * rim.layout.block_length
    placed = {  # ids after the question, and their positions counted from its end
        "lone end": (block[-1:], [end - 1]),
        "one block": (block, range(end - len(block), end)),
        "one position": (block * num_blocks, [*range(len(block))] * num_blocks),
    }
    ids, places = placed[place]
    asked = [len(rim.prompt_ids(question, "memory", num_blocks)) - end for question in questions]  # [B] question tokens
    prompts = [rim.encode_question(question) + ids for question in questions]
    positions = [[*range(length), *(length + at for at in places)] for length in asked]
    greedy = Greedy(rim, prompts, [0], max_new_tokens, positions)
    for _ in greedy.passes():
        pass
    return _answers(rim, questions, "memory", prompts, [num_blocks], greedy)


@dataclass(frozen=True)
class TimedBatch:
    """Questions answered together against the clock, which starts before tokenising.

    Attributes:
        answers: final readouts alone, their own times None.
        pass_seconds: [passes] when the tokens of each pass had been read back from the device; token i of an answer
            comes with pass i.
        ttft_seconds: [B] as `Answer.ttft_seconds`, by question.
        total_seconds: until the texts of all answers were there.
        kv_cache_bytes: the most that keys and values of the whole batch took, padding included.
    """

    answers: list[Answer]
    pass_seconds: tuple[float, ...]
    ttft_seconds: tuple[float | None, ...]
    total_seconds: float
    kv_cache_bytes: int


def time_batch(
    rim: RiM,
    questions: Sequence[str],
    method: str,
    *,
    num_blocks: int | None = None,
    max_new_tokens: int | list[int] = 256,
) -> TimedBatch:
    """Answers at least one question, all in one batch, as `answer_batch` does but with the final readout alone.

    Which token is the first of an answer is found out afterwards, so that looking for it takes no time of the race.

    Args:
        max_new_tokens: one bound for all, or [B].

    Raises:
        RiMError: as `stream`, for the first question that cannot be asked.
    """
    clock, seconds = _Clock(), []
    prompts, blocks, greedy = _begin(rim, questions, method, num_blocks, max_new_tokens, "final")
    for _ in greedy.passes():
        seconds.append(clock.seconds())
    answers = _answers(rim, questions, method, prompts, blocks, greedy)
    total = clock.seconds()
    firsts = [_first_answer_token(rim, method, given.token_ids) for given in answers]
    return TimedBatch(
        answers,
        tuple(seconds),
        tuple(None if first is None else seconds[first] for first in firsts),
        total,
        greedy.kv_cache_bytes,
    )


def _begin(
    rim: RiM,
    questions: Sequence[str],
    method: str,
    num_blocks: int | None,
    max_new_tokens: int | list[int],
    readouts: str,
) -> tuple[list[list[int]], list[int], "Greedy"]:
    prompts = [rim.prompt_ids(question, method, num_blocks) for question in questions]
    blocks = _blocks(rim, method, num_blocks, readouts)
    return prompts, blocks, Greedy(rim, prompts, _tails(rim, blocks), max_new_tokens)


def _answers(
    rim: RiM, questions: Sequence[str], method: str, prompts: list[list[int]], blocks: list[int], greedy: "Greedy"
) -> list[Answer]:
    """What a batch that has ended says."""
    return [
        _answer(
            rim,
            method,
            question,
            prompt,
            blocks,
            traces,
            ttft_seconds=None,
            total_seconds=None,
            forward_passes=max(len(trace.ids) for trace in traces),
            kv_cache_bytes=greedy.kv_cache_bytes // len(questions),
        )
        for question, prompt, traces in zip(questions, prompts, greedy.traces, strict=True)
    ]


def _first_answer_token(rim: RiM, method: str, ids: Sequence[int]) -> int | None:
    """Index of the token that `Answer.ttft_seconds` waits for; None where it never came."""
    shown = [token for token in ids if token != rim.eos_id]
    if method != "cot":
        return 0 if shown else None

    def shows(length: int) -> bool:
        return _shows_answer(rim.decode(shown[:length]).rstrip("\ufffd"))

    # Once the answer shows it stays, so halving finds the first place in a few decodings.
    length = bisect.bisect_left(range(len(shown) + 1), True, key=shows)
    return length - 1 if length <= len(shown) else None


def _events(rim, question, method, num_blocks, max_new_tokens, cancel, readouts, clock) -> Generator[Event, None, None]:
    """The events of `stream`, without the bookkeeping of the consumer's time."""
    prompt = rim.prompt_ids(question, method, num_blocks)
    blocks = _blocks(rim, method, num_blocks, readouts)
    shown = len(blocks) - 1
    shown_block = blocks[shown] if method == "memory" else None
    greedy = Greedy(rim, [prompt], _tails(rim, blocks), max_new_tokens)
    emitted, ttft = "", None
    for tokens in greedy.passes(cancel):
        now = clock.seconds()
        if greedy.forward_passes == 1:
            yield Event("prefill", now, method)
        for token in tokens:
            if token.readout != shown:
                continue
            text = _text(rim, token.trace)
            new_text = text[len(emitted) :]
            emitted = text
            if ttft is None and token.id != rim.eos_id and (method != "cot" or _shows_answer(text)):
                ttft = now
            yield Event("token", now, method, text=new_text, token_id=token.id, block=shown_block)
        if method == "memory":
            for token in tokens:
                if token.trace.ended:
                    readout = _readout(rim, blocks[token.readout], token.trace)
                    yield Event("readout", clock.seconds(), method, block=readout.block, readout=readout)
    total = clock.seconds()
    result = _answer(
        rim,
        method,
        question,
        prompt,
        blocks,
        greedy.traces[0],
        forward_passes=greedy.forward_passes,
        kv_cache_bytes=greedy.kv_cache_bytes,
        ttft_seconds=ttft,
        total_seconds=total,
        cancelled=greedy.cancelled,
    )
    yield Event("done", total, method, answer=result)


def _answer(
    rim: RiM, method: str, question: str, prompt: list[int], blocks: list[int], traces: list[Trace], **measured
) -> Answer:
    """The `Answer` told by the readouts of one question; the last of them is the one shown."""
    shown = traces[-1]
    text = _text(rim, shown)
    ended = [(block, trace) for block, trace in zip(blocks, traces, strict=True) if trace.ended]
    return Answer(
        method=method,
        question=question,
        text=text,
        value=extract_answer(text),
        token_ids=tuple(shown.ids),
        generated_tokens=len(shown.ids),
        prompt_tokens=len(prompt),
        readouts=tuple(_readout(rim, block, trace) for block, trace in ended) if method == "memory" else (),
        truncated=shown.truncated,
        **measured,
    )


def _readout(rim: RiM, block: int, trace: Trace) -> Readout:
    text = _text(rim, trace)
    return Readout(block, text, extract_answer(text), tuple(trace.ids), math.exp(trace.log_probability))


def _text(rim: RiM, trace: Trace) -> str:
    """The text so far; a character whose bytes are still incomplete waits until they are, or for the end."""
    text = rim.decode(trace.ids)
    return text if trace.ended else text.rstrip("\ufffd")


def _shows_answer(text: str) -> bool:
    """Whether anything but white space stands after the answer marker."""
    return bool(text.partition(ANSWER_MARKER.strip())[2].strip())


def _blocks(rim: RiM, method: str, num_blocks: int | None, readouts: str) -> list[int]:
    """Numbers of the blocks whose readouts are decoded, [R], the final one last; [0] where there is no block."""
    if readouts not in ("all", "final"):
        raise RiMError(f"readouts must be 'all' or 'final', not {readouts!r}.")
    last = rim.layout.check_blocks(num_blocks) if method == "memory" else 0
    return list(range(1, last + 1)) if readouts == "all" and last else [last]


def _tails(rim: RiM, blocks: list[int]) -> list[int]:
    """How many prompt tokens stand after the place where each readout begins, [R]; the final one has none."""
    return [(blocks[-1] - block) * rim.layout.block_length for block in blocks]


class _Clock:
    """Seconds since it was made, less the time it was told to skip."""

    def __init__(self):
        self._start = time.perf_counter()

    def seconds(self) -> float:
        return time.perf_counter() - self._start

    def skip(self, seconds: float) -> None:
        self._start += seconds


def format_answer(given: Answer) -> str:
    """What stands under an answer's text: the readouts of memory, then the parsed answer and what it cost."""
    lines = []
    for readout in given.readouts:
        place = f"block {readout.block}" if readout.block else "no block"
        lines.append(f"  {place:<8}  {readout.text}  (probability {readout.probability:.2f})")
    value = "no answer" if given.value is None else f"answer {given.value}"
    first = "" if given.ttft_seconds is None else f"first answer token after {1000 * given.ttft_seconds:.1f} ms, "
    passes = count(given.forward_passes, "pass", "passes")
    tokens = count(given.generated_tokens, "token", "tokens")
    cut = "; cut off by --max-new-tokens or the end of the context" if given.truncated else ""
    whole = f"all {len(given.readouts)} readouts" if len(given.readouts) > 1 else "all"
    time = "" if given.total_seconds is None else f" after {1000 * given.total_seconds:.1f} ms"
    lines.append(f"  {value}: {first}{whole}{time}, {passes}, {tokens}{cut}")
    return "\n".join(lines)
