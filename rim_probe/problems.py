r"""Word problems as text: the line format of problem files.

This module knows the text format every method is trained on (the three constants below) and how a file of problems is
read and written; how an answer is read out of a text and graded is `answers`' job. It does not know tokens, models or
where problems come from.

Line format of `.txt` and `.txt.gz` files, UTF-8, one problem per line, only "\n" ends a line:

    question||<<16-3-4=9>> <<9*2=18>> #### 18

The steps may be missing (`question|| #### 18`, as in GSM-Hard). A step is `<<text>>`; the text is usually an equation.
The LAST "||" ends the question, so a question may hold "||" itself (steps and answers may not).
"""

from __future__ import annotations

import gzip
import itertools
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from rim_probe.answers import ANSWER_MARKER, extract_answer, is_correct
from rim_probe.errors import ProblemError
from rim_probe.files import write_atomic

__all__ = [
    "ANSWER_MARKER",
    "QUESTION_END",
    "STEP_SEPARATOR",
    "Problem",
    "ProblemFile",
    "RejectedLine",
    "extract_answer",
    "format_line",
    "gather",
    "is_correct",
    "is_problem_file",
    "iter_problems",
    "parse_line",
    "parse_steps",
    "read_lines",
    "read_problems",
    "write_problems",
]

QUESTION_END = "\n"
"""Ends the question segment of every row, whatever the method."""
STEP_SEPARATOR = " "
"""Stands between two steps, and between the last step and the answer marker."""

_FIELD_SEPARATOR = "||"
_MARKER = ANSWER_MARKER.strip()
_STEP = re.compile(r"<<((?:[^<>\n]|<(?!<)|>(?!>))+)>>")


@dataclass(frozen=True)
class Problem:
    """One word problem: its question, its worked steps (`"<<16-3-4=9>>"` each, maybe none) and its gold answer."""

    question: str
    steps: tuple[str, ...]
    answer: str


@dataclass(frozen=True)
class RejectedLine:
    """A line of a problem file that was left out, and why. `line_number` counts from 1."""

    path: str
    line_number: int
    reason: str

    def __str__(self) -> str:
        return f"{self.path}, line {self.line_number}: {self.reason}"


@dataclass(frozen=True)
class ProblemFile:
    """What `read_problems` found: the problems in file order, and every line it had to leave out."""

    problems: list[Problem]
    rejected: list[RejectedLine]


# ----------------------------------------------------------------------------------------------- the line format


def parse_line(line: str) -> Problem:
    """The problem of one line (with or without its final newline). The question is kept character by character.

    Raises ProblemError, whose text is the reason, where the line is not `question||steps #### answer`.
    """
    line = line.removesuffix("\n")
    if "\n" in line:
        raise ProblemError("A problem is one line, but this text holds several; parse them one by one.")
    question, separator, rest = line.rpartition(_FIELD_SEPARATOR)
    if not separator:
        raise ProblemError(f"No “{_FIELD_SEPARATOR}” stands between the question and its steps.")
    if not question.strip():
        raise ProblemError(f"The question before “{_FIELD_SEPARATOR}” is empty.")
    chain, marker, answer = rest.rpartition(_MARKER)
    if not marker:
        raise ProblemError(f"No “{_MARKER}” stands before the answer.")
    if not answer.strip():
        raise ProblemError(f"The answer after “{_MARKER}” is empty.")
    return Problem(question, parse_steps(chain), answer.strip())


def parse_steps(chain: str) -> tuple[str, ...]:
    """The steps of a chain such as `<<16-3-4=9>> <<9*2=18>>`; none of an empty one.

    Raises ProblemError for text outside “<<…>>”.
    """
    if between := _STEP.sub("", chain).strip():
        raise ProblemError(f"The steps hold text outside “<<…>>”: “{_shorten(between)}”.")
    return tuple(match.group() for match in _STEP.finditer(chain))


def format_line(problem: Problem) -> str:
    r"""The line of a problem, without a newline; `parse_line` gives the same problem back.

    One exception: a line cannot hold a newline, so each "\n" in the question becomes one space. Steps and answers
    are never changed. Raises ProblemError for a problem that no line can hold.
    """
    question = problem.question.replace("\n", " ")
    if not question.strip():
        raise ProblemError("A problem with an empty question cannot be written.")
    for step in problem.steps:
        if not _STEP.fullmatch(step) or _FIELD_SEPARATOR in step:
            raise ProblemError(
                f"A step is “<<text>>” on one line and without “||”, but this one is “{_shorten(step)}”."
            )
    answer = problem.answer
    if not answer or answer != answer.strip() or any(mark in answer for mark in ("\n", _FIELD_SEPARATOR, _MARKER)):
        raise ProblemError(
            "An answer is text on one line, without outer spaces, “||” and “####”, but this one is "
            f"“{_shorten(answer)}”."
        )
    return f"{question}{_FIELD_SEPARATOR}{STEP_SEPARATOR.join(problem.steps)}{STEP_SEPARATOR}{ANSWER_MARKER}{answer}"


def read_problems(path: str | os.PathLike[str]) -> ProblemFile:
    """All problems of a `.txt` or `.txt.gz` file (any name that ends in `.gz` is unpacked).

    A line that does not parse is left out and listed with its number and the reason; blank lines are skipped. Raises
    ProblemError where the file as a whole is unusable: missing, unreadable, not UTF-8, a damaged gzip, or without
    a single problem.
    """
    name = os.fspath(path)
    found = gather(iter_problems(name))
    if not found.problems:
        why = f" (line {found.rejected[0].line_number}: {found.rejected[0].reason})" if found.rejected else ""
        raise ProblemError(
            f"“{name}” holds no problem{why}; a line looks like “question||<<16-3-4=9>> <<9*2=18>> #### 18”."
        )
    return found


def iter_problems(path: str | os.PathLike[str]) -> Iterator[Problem | RejectedLine]:
    """What `read_problems` gathers, line by line: for files too large to be held in memory.

    Raises as it does, but not where there is no problem.
    """
    name = os.fspath(path)
    for number, line in read_lines(name):
        if not line.strip():
            continue
        try:
            yield parse_line(line)
        except ProblemError as error:
            yield RejectedLine(name, number, str(error))


def is_problem_file(path: str | os.PathLike[str]) -> bool:
    """Whether one of the first lines of a file is a problem."""
    try:
        return any(isinstance(line, Problem) for line in itertools.islice(iter_problems(path), 100))
    except ProblemError:
        return False


def gather(lines: Iterable[Problem | RejectedLine]) -> ProblemFile:
    """Problems and rejected lines, each in their order."""
    found = ProblemFile([], [])
    for line in lines:
        if isinstance(line, Problem):
            found.problems.append(line)
        else:
            found.rejected.append(line)
    return found


def write_problems(path: str | os.PathLike[str], problems: Iterable[Problem]) -> None:
    """Write problems as lines, packed if the name ends in `.gz` (the same problems always give the same bytes).

    Nothing is written unless every problem can be. Newlines in questions become spaces (see `format_line`).
    """
    name = os.fspath(path)
    text = "".join(format_line(problem) + "\n" for problem in problems)
    try:
        data = text.encode("utf-8")
    except UnicodeEncodeError as error:
        line_number = text.count("\n", 0, error.start) + 1
        raise ProblemError(
            f"Problem {line_number} holds a character that is not valid Unicode text; remove it to write “{name}”."
        ) from None
    if name.endswith(".gz"):
        data = gzip.compress(data, mtime=0)  # no time stamp: equal problems, equal file
    try:
        write_atomic(Path(name), data)
    except OSError as error:
        raise ProblemError(f"“{name}” cannot be written: {error.strerror or error}.") from None


def read_lines(name: str) -> Iterator[tuple[int, str]]:
    r"""(line number, text) of each line, split in bytes: text mode would also split at "\r" and its relatives.

    Names that end in `.gz` are unpacked. Raises ProblemError for a file that cannot be read or is not UTF-8.
    """
    number = 0
    try:
        with gzip.open(name, "rb") if name.endswith(".gz") else open(name, "rb") as stream:
            for number, raw in enumerate(stream, start=1):
                # Editors on Windows put a byte-order mark before the first line; it is not part of the question.
                yield number, raw.removeprefix(b"\xef\xbb\xbf" if number == 1 else b"").decode("utf-8")
    except FileNotFoundError:
        raise ProblemError(f"The problem file “{name}” does not exist; check its path.") from None
    except UnicodeDecodeError:
        raise ProblemError(f"“{name}” is not UTF-8 text (line {number}); save it as UTF-8.") from None
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise ProblemError(
            f"“{name}” is no gzip file or a damaged one (only {number} lines can be read); copy it again."
        ) from None
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        raise ProblemError(f"“{name}” cannot be read: {getattr(error, 'strerror', None) or error}.") from None


def _shorten(text: str) -> str:
    return text if len(text) <= 60 else text[:60] + "…"
