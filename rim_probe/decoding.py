"""Answering a question: memory, chain of thought and direct through ONE greedy loop with a KV cache.

Knows prompts, readouts, masks and clocks. Knows nothing about the screen, data sets or grading of right and wrong.

The loop, for B prompts and R readouts of each (R = 1 for chain of thought and direct):
1. One prefix pass over every prompt, padded on the left. `question + K blocks` is plain causal text, and the logits at
   the end of block k give the first token of readout k, so this one pass starts all K readouts.
2. Every further pass feeds one token per live readout, all of them into the same cache rows. The rule of
   `packing.visible` keeps readouts apart: readout k sees the question, blocks 1..k and its own earlier tokens, and its
   positions continue from the end of block k. No cache is copied, and each readout equals, token by token, the one
   decoded alone after k blocks.
Readouts that have ended leave the query; passes stop when none is left. Questions that have ended leave the batch,
cache and all, once they are half of it: the longest answer of a batch does not keep all of them at work.

Comparisons between methods are fair because nothing in the loop knows which method it serves. Times are those of the
decoding itself: the clock starts before tokenising and stands still while the consumer of `stream` holds an event.
"""

import bisect
import inspect
import math
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from typing import Literal

import torch
from transformers import DynamicCache

from rim_probe.errors import RiMError
from rim_probe.model import RiM
from rim_probe.packing import additive_mask, visible
from rim_probe.problems import ANSWER_MARKER, extract_answer

# Back ends that honour an additive 4-D mask; flash attention drops it, flex attention crashed on the CPU.
_MASKED_ATTENTION = ("sdpa", "eager")


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
) -> tuple[list[list[int]], list[int], "_Greedy"]:
    prompts = [rim.prompt_ids(question, method, num_blocks) for question in questions]
    blocks = _blocks(rim, method, num_blocks, readouts)
    return prompts, blocks, _Greedy(rim, prompts, _tails(rim, blocks), max_new_tokens)


def _answers(
    rim: RiM, questions: Sequence[str], method: str, prompts: list[list[int]], blocks: list[int], greedy: "_Greedy"
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
    greedy = _Greedy(rim, [prompt], _tails(rim, blocks), max_new_tokens)
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
    rim: RiM, method: str, question: str, prompt: list[int], blocks: list[int], traces: list["_Trace"], **measured
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


def _readout(rim: RiM, block: int, trace: "_Trace") -> Readout:
    text = _text(rim, trace)
    return Readout(block, text, extract_answer(text), tuple(trace.ids), math.exp(trace.log_probability))


def _text(rim: RiM, trace: "_Trace") -> str:
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


@dataclass
class _Trace:
    """One readout as it grows."""

    limit: int
    ids: list[int] = field(default_factory=list)
    log_probability: float = 0.0
    ended: bool = False
    truncated: bool = False

    def push(self, token: int, log_probability: float, eos_id: int) -> None:
        self.ids.append(token)
        self.log_probability += log_probability
        self.truncated = token != eos_id and len(self.ids) == self.limit
        self.ended = token == eos_id or self.truncated


@dataclass(frozen=True)
class _Token:
    """One generated token: the readout's index (not its block number), the id, and the readout it was added to."""

    readout: int
    id: int
    trace: _Trace


class _Greedy:
    """Greedy decoding of R readouts for each of B prompts in one KV cache of B rows; see the head of this module.

    Args:
        prompts: B lists of ids.
        tails: [R] the number of prompt tokens after the point where a readout begins, the same for every prompt.
        max_new_tokens: bound for every readout; or one per prompt, [B].

    Attributes:
        traces: [B][R], what has been generated.
        forward_passes, cancelled, kv_cache_bytes: how far it came and what it holds.
    """

    def __init__(self, rim: RiM, prompts: list[list[int]], tails: list[int], max_new_tokens: int | list[int]):
        limits = max_new_tokens if isinstance(max_new_tokens, list) else [max_new_tokens] * len(prompts)
        for limit in limits:
            if not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
                raise RiMError(f"max_new_tokens must be a whole number of at least 1, not {limit!r}.")
        if rim.model.training:
            rim.model.eval()  # a model in the middle of its training would answer with dropout
        self._model, self._dtype, self._eos_id, self._max_length = rim.model, rim.dtype, rim.eos_id, rim.max_length
        self.traces = [
            [_Trace(min(limit, rim.max_length - len(prompt) + tail)) for tail in tails]
            for prompt, limit in zip(prompts, limits, strict=True)
        ]
        self.forward_passes = 0
        self.cancelled = False
        self._cache = DynamicCache()
        self._live = list(range(len(tails)))  # readouts that some row still decodes
        self._rows = list(range(len(prompts)))  # prompts that are still in the batch
        self._largest_cache = 0
        device, length = rim.device, max(map(len, prompts))
        self._banned = torch.tensor(rim.banned_ids, dtype=torch.long, device=device)
        self._columns = torch.arange(length, device=device)
        # Left padding puts the blocks of every row into the same columns; readouts begin at the columns `starts`.
        self._starts = length - torch.tensor(tails, device=device)
        self._pads = torch.tensor([[length - len(prompt)] for prompt in prompts], device=device)  # [B, 1]
        self._padded = any(len(prompt) < length for prompt in prompts)
        # Any id serves as padding: nothing sees it.
        self._inputs = torch.tensor(
            [[0] * (length - len(prompt)) + prompt for prompt in prompts], dtype=torch.long, device=device
        )
        self._positions = (self._columns - self._pads).clamp(min=0)
        self._keep = self._starts - 1
        self._mask = self._prefix_mask() if self._padded else None
        self._own_mask = None
        if self._padded or len(tails) > 1:
            check_attention(rim)

    @property
    def kv_cache_bytes(self) -> int:
        """The most that keys and values of all rows took at any time."""
        pairs = [(getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in self._cache.layers]
        held = sum(keys.nbytes + values.nbytes for keys, values in pairs if keys is not None and values is not None)
        return max(held, self._largest_cache)

    def passes(self, cancel: threading.Event | None = None) -> Iterator[list[_Token]]:
        """Runs passes until every readout has ended or `cancel` is set; yields the tokens each pass brought."""
        alive = self._live
        while alive:
            if cancel is not None and cancel.is_set():
                self.cancelled = True
                return
            # Only now: what prepares a further pass must not delay the token that the last one brought.
            if self.forward_passes:
                self._advance(alive)
            log_probabilities = self._forward().tolist()
            tokens = []
            for row, row_ids, row_logs in zip(self._rows, self._found.tolist(), log_probabilities, strict=True):
                for readout, token, log_probability in zip(self._live, row_ids, row_logs, strict=True):
                    trace = self.traces[row][readout]
                    if not trace.ended:
                        trace.push(token, log_probability, self._eos_id)
                        tokens.append(_Token(readout, token, trace))
            alive = [readout for readout in self._live if not all(row[readout].ended for row in self.traces)]
            yield tokens

    @torch.inference_mode()
    def _forward(self) -> torch.Tensor:
        """One pass: finds the most probable next id of every live readout; returns its log probability [B, live]."""
        prefix = self.forward_passes == 0
        choose = {"logits_to_keep": self._keep} if prefix and keeps_logits(self._model) else {}
        logits = self._model(
            input_ids=self._inputs,
            position_ids=self._positions,
            attention_mask=self._mask,
            past_key_values=self._cache,
            use_cache=True,
            **choose,
        ).logits
        if prefix and not choose:
            logits = logits[:, self._keep]
        self.forward_passes += 1
        logits = logits.float().index_fill(-1, self._banned, -math.inf)
        # max, not argmax: on a CPU the latter is 30 times slower for one row.
        best, self._found = logits.max(dim=-1)
        return best - logits.logsumexp(dim=-1)

    @torch.inference_mode()
    def _advance(self, alive: list[int]) -> None:
        """Makes the tokens just found the input of the next pass; what has ended leaves, readouts and whole rows."""
        self._drop_rows()
        if self.forward_passes == 1:
            self._positions = self._starts - self._pads
            if self._padded or len(self._live) > 1:
                self._mask, self._own_mask = self._readout_masks()
        else:
            # Rows that have ended are fed until half of their batch has; their positions must stay inside the context.
            self._positions = (self._positions + 1).clamp(max=self._max_length - 1)
        self._inputs = self._found
        if len(alive) < len(self._live):
            index = torch.tensor([self._live.index(readout) for readout in alive], device=self._inputs.device)
            self._inputs, self._positions = self._inputs[:, index], self._positions[:, index]
            if self._mask is not None and self._own_mask is not None:
                self._mask, self._own_mask = self._mask[:, :, index], self._own_mask[:, :, index][..., index]
            self._live = alive
        if self._mask is not None:
            self._mask = torch.cat([self._mask, self._own_mask], dim=-1)

    def _drop_rows(self) -> None:
        """Takes the rows that have ended out of the batch, once they are half of it: moving a cache costs a pass."""
        staying = [i for i, row in enumerate(self._rows) if not all(trace.ended for trace in self.traces[row])]
        if 2 * len(staying) > len(self._rows):
            return
        self._largest_cache = self.kv_cache_bytes
        index = torch.tensor(staying, device=self._found.device)
        self._cache.batch_select_indices(index)
        self._rows = [self._rows[i] for i in staying]
        self._found, self._positions, self._pads = self._found[index], self._positions[index], self._pads[index]
        if self._mask is not None:
            self._mask = self._mask[index]
        if self._own_mask is not None:
            self._own_mask = self._own_mask[index]

    def _prefix_mask(self) -> torch.Tensor:
        """Causal text behind left padding, additive [B, 1, columns, columns]."""
        real = self._columns >= self._pads
        causal = self._columns[:, None] >= self._columns
        # Padding sees itself, so that no query is fully masked.
        itself = self._columns[:, None] == self._columns
        return additive_mask(causal & real[:, None, :] | itself, self._dtype)

    def _readout_masks(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What readouts see, additive: of the prompt [B, 1, R, columns], and of tokens fed in one pass [B, 1, R, R]."""
        numbers = torch.arange(1, len(self._starts) + 1, device=self._starts.device)
        real = self._columns >= self._pads
        before = self._columns < self._starts[:, None]
        prompt = visible(numbers, torch.zeros_like(self._columns)) & before & real[:, None, :]
        own = visible(numbers, numbers).expand(len(self._rows), -1, -1)
        return additive_mask(prompt, self._dtype), additive_mask(own, self._dtype)


class _Clock:
    """Seconds since it was made, less the time it was told to skip."""

    def __init__(self):
        self._start = time.perf_counter()

    def seconds(self) -> float:
        return time.perf_counter() - self._start

    def skip(self, seconds: float) -> None:
        self._start += seconds


def keeps_logits(model) -> bool:
    """Whether the model can compute logits at chosen positions only."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "logits_to_keep" in inspect.signature(base.forward).parameters


def check_attention(rim: RiM) -> None:
    """Refuses attention back ends that take no dense mask.

    Raises:
        RiMError: neither sdpa nor eager.
    """
    implementation = getattr(rim.model.config, "_attn_implementation", None)
    if implementation not in _MASKED_ATTENTION:
        raise RiMError(
            f"Readouts and batches need the attention back end sdpa or eager, not {implementation!r}; "
            "load the model with attention='sdpa'."
        )
