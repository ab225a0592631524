"""Problems as token ids, made once and kept: no text is tokenised while a model trains.

Knows the encoder and a file in the user's cache. Knows nothing about rows, objectives or models.

Every text is tokenised segment by segment exactly as `Encoder` does it one by one, but in a few calls that use all
cores. They are kept in `cache_folder()/tokens/KEY.safetensors`; the key is a digest of the tokenizer and all texts, so
a file belongs to its problems for ever, and one that is damaged or belongs to something else is made anew.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tokenizers
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from rim_probe.bases import cache_folder
from rim_probe.encoding import (
    MAX_QUESTION_CHARACTERS,
    QUESTION_END,
    STEP_SEPARATOR,
    Encoder,
    chain_text,
    question_text,
    result_text,
)
from rim_probe.errors import QuestionError
from rim_probe.files import write_atomic
from rim_probe.problems import Problem

_FORMAT = "rim-probe-tokens/2"
_WORTH_KEEPING = 20_000  # problems; fewer are tokenised in a second or two
_AT_ONCE = 10_000  # texts in one call of the tokenizer, which holds a few KB for each


class Entry(NamedTuple):
    """A problem of `Tokens`: the numbers of its texts in the place of the texts."""

    question: int
    steps: tuple[int, ...]
    answer: int


class Ragged:
    """Lists of token ids as one flat array: list i is `flat[ends[i - 1] : ends[i]]`."""

    def __init__(self, flat: np.ndarray, ends: np.ndarray):
        self.flat, self.ends = flat, ends
        self.starts = np.concatenate([[0], ends[:-1]]).astype(np.int64)
        self.lengths = self.ends - self.starts

    def __getitem__(self, number: int) -> list[int]:
        return self.flat[self.starts[number] : self.ends[number]].tolist()

    def holding(self, ids: Iterable[int]) -> np.ndarray:
        """Which lists hold one of `ids`, bool [lists]."""
        found = np.flatnonzero(np.isin(self.flat, np.fromiter(ids, np.int32)))
        held = np.zeros(len(self.ends), dtype=bool)
        held[np.searchsorted(self.ends, found, side="right")] = True
        return held


class Tokens(Sequence):
    """The ids of n problems, which stand in their order and are `Entry`s.

    It takes an encoder's place wherever rows are made (`packing.stage1_row` and its kin): the same methods and
    attributes, which take entries and their numbers instead of problems and texts.

    Attributes:
        questions, chains: one list per problem: `Encoder.text_ids` of the question with its line end, and of the steps.
        steps, answers: one list per different text.
        results: one list per different step, that of its result.
        step_numbers: the steps of every problem, as numbers of `steps`.
        answer_numbers: the answer of every problem, as a number of `answers`, [n].
        askable: whether `Encoder.question_ids` would take the question, unknown words aside, bool [n].
        known: whether every word of question, steps and answer belongs to the vocabulary, bool [n].
    """

    def __init__(self, encoder: Encoder, arrays: dict[str, np.ndarray]):
        self.layout, self.block_ids = encoder.layout, encoder.block_ids
        self.marker_ids, self.prefix_ids, self.eos_id = encoder.marker_ids, encoder.prefix_ids, encoder.eos_id
        self.questions, self.steps, self.results, self.answers, self.chains, self.step_numbers = (
            Ragged(arrays[name], arrays[f"{name}.ends"])
            for name in ("questions", "steps", "results", "answers", "chains", "step_numbers")
        )
        self.answer_numbers = arrays["answer_numbers"]
        unknown = encoder.tokenizer.unk_token_id  # itself a special token
        self.askable = (self.questions.lengths > 0) & ~self.questions.holding(encoder.control_ids - {unknown})
        self.known = np.ones(len(self), dtype=bool)
        if unknown is not None:
            self.known &= ~self.questions.holding([unknown]) & ~self.chains.holding([unknown])
            self.known &= ~self.answers.holding([unknown])[self.answer_numbers]

    def __len__(self) -> int:
        return len(self.answer_numbers)

    def __getitem__(self, number: int) -> Entry:
        return Entry(number, tuple(self.step_numbers[number]), int(self.answer_numbers[number]))

    def question_ids(self, question: int) -> list[int]:
        """See `Encoder.question_ids`."""
        return self.prefix_ids + self.questions[question]

    def step_ids(self, step: int) -> list[int]:
        """See `Encoder.step_ids`."""
        return self.steps[step] + [self.eos_id]

    def result_ids(self, step: int) -> list[int]:
        """See `Encoder.result_ids`."""
        return self.results[step]

    def answer_ids(self, answer: int) -> list[int]:
        """See `Encoder.answer_ids`."""
        return self.answers[answer] + [self.eos_id]

    def chain_ids(self, entry: Entry) -> list[int]:
        """See `Encoder.chain_ids`."""
        return self.chains[entry.question] + self.marker_ids + self.answer_ids(entry.answer)


def tokenise(encoder: Encoder, problems: Sequence[Problem], report: Callable[[str], None]) -> Tokens:
    """The ids of all problems, from the cache where it holds them; what is worth it is put there.

    Several processes may call this at once: files are written aside and put in their place in one move.
    """
    # A tokenizer written in Python has no description to tell it by.
    if len(problems) < _WORTH_KEEPING or not encoder.tokenizer.is_fast:
        return Tokens(encoder, _arrays(encoder, problems))
    key = _key(encoder, problems)
    file = cache_folder() / "tokens" / f"{key}.safetensors"
    arrays = _load(file, key)
    if arrays is None:
        report(f"Tokenising {len(problems):,} problems; the ids are kept in {file}.")
        arrays = _arrays(encoder, problems)
        try:
            _save(arrays, file, key)
        except (OSError, SafetensorError) as error:
            report(f"The ids could not be kept ({error}); they will be made again next time.")
    return Tokens(encoder, arrays)


def _arrays(encoder: Encoder, problems: Sequence[Problem]) -> dict[str, np.ndarray]:
    """What `Tokens` is made from: flat int32 ids of every table, with the int64 ends of its lists."""
    steps = {step: number for number, step in enumerate(dict.fromkeys(s for p in problems for s in p.steps))}
    answers = {answer: number for number, answer in enumerate(dict.fromkeys(p.answer for p in problems))}
    tables = {
        "questions": _ids(encoder, map(_askable_text, problems), len(problems)),
        "steps": _ids(encoder, steps, len(steps)),
        "results": _ids(encoder, map(result_text, steps), len(steps)),
        "answers": _ids(encoder, answers, len(answers)),
        "chains": _ids(encoder, map(chain_text, problems), len(problems)),
        "step_numbers": _flat([[steps[step] for step in p.steps] for p in problems]),
    }
    arrays = {"answer_numbers": np.array([answers[p.answer] for p in problems], dtype=np.int32)}
    for name, (flat, lengths) in tables.items():
        arrays |= {name: flat, f"{name}.ends": np.cumsum(lengths, dtype=np.int64)}
    return arrays


def _askable_text(problem: Problem) -> str:
    """The question as it is tokenised; nothing where it cannot be asked."""
    try:
        return question_text(problem.question)
    except QuestionError:
        return ""


def _ids(encoder: Encoder, texts: Iterable[str], count: int) -> tuple[np.ndarray, np.ndarray]:
    """The ids of `count` texts, flat, and how many each has."""
    texts = iter(texts)
    parts = []
    for start in range(0, count, _AT_ONCE):
        batch = [next(texts) for _ in range(min(_AT_ONCE, count - start))]
        parts.append(_flat(encoder.batch_ids(batch)))
    flats, lengths = zip(*parts, strict=True) if parts else ([np.empty(0, np.int32)], [np.empty(0, np.int64)])
    return np.concatenate(flats), np.concatenate(lengths)


def _flat(lists: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.fromiter(map(len, lists), np.int64, len(lists))
    return np.fromiter(chain.from_iterable(lists), np.int32, int(lengths.sum())), lengths


# ------------------------------------------------------------------------------------------------------------ the file


def _key(encoder: Encoder, problems: Sequence[Problem]) -> str:
    """A digest of all that the ids depend on."""
    code = (_FORMAT, tokenizers.__version__, QUESTION_END, STEP_SEPARATOR, MAX_QUESTION_CHARACTERS)
    digest = hashlib.sha256(repr(code).encode())
    digest.update(encoder.tokenizer.backend_tokenizer.to_str().encode())
    for problem in problems:
        # A `repr` has no line end inside and no character that UTF-8 lacks.
        digest.update(f"\n{problem.question!r},{problem.steps!r},{problem.answer!r}".encode())
    return digest.hexdigest()


def _load(file: Path, key: str) -> dict[str, np.ndarray] | None:
    """The arrays of a file, or None: there is none, it is damaged, or it does not belong to this key."""
    try:
        with safe_open(file, "np") as opened:
            told = opened.metadata() or {}
            arrays = {name: opened.get_tensor(name) for name in opened.keys()}
    except (OSError, SafetensorError, ValueError):
        return None
    return arrays if told == {"key": key, "digest": _digest(arrays)} else None


def _save(arrays: dict[str, np.ndarray], file: Path, key: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, save(arrays, {"key": key, "digest": _digest(arrays)}))


def _digest(arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
