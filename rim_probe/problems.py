r"""Word problems as text: the line format of problem files, and how an answer is read out of a text and graded.

This module knows the text format every method is trained on (the three constants below), how a file of problems is read
and written, and when two answers count as the same. It does not know tokens, models or where problems come from.

Line format of `.txt` and `.txt.gz` files, UTF-8, one problem per line, only "\n" ends a line:

    question||<<16-3-4=9>> <<9*2=18>> #### 18

The steps may be missing (`question|| #### 18`, as in GSM-Hard). A step is `<<text>>`; the text is usually an equation.
The LAST "||" ends the question, so a question may hold "||" itself (steps and answers may not).
"""

from __future__ import annotations

import gzip
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

from rim_probe.errors import ProblemError

QUESTION_END = "\n"
"""Ends the question segment of every row, whatever the method."""
STEP_SEPARATOR = " "
"""Stands between two steps, and between the last step and the answer marker."""
ANSWER_MARKER = "#### "
"""Stands before the answer where the text has one (chain of thought and direct)."""

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
        Path(name).write_bytes(data)
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


# --------------------------------------------------------------------------------------------- reading an answer

# Numbers beyond these bounds are not read as numbers: 1e999999999 or a megabyte of digits must not stop the program.
_MAX_DIGITS = 100
_MAX_EXPONENT = 100
_MAX_WORD_ANSWER = 60

# Every repetition below is bounded or starts only where no digit or letter stands before it, so that the time to search
# a text grows with its length alone.
_TOKEN = re.compile(
    r"""
      (?P<ratio> (?<![\w:]) [0-9]{1,9} (?: : [0-9]{1,9} ){1,3} (?![\w:]) )                    # 5:45 is not 45
    | (?P<number>
        (?P<sign> (?<![\w)\]%.]) [-\u2212\u2013\ufe63\uff0d] )?                              # not the minus of 16-3
        [$€£¥]? (?P<inner_sign> (?<=[$€£¥]) [-\u2212] )?
        (?<!\w) (?<![0-9]\.)
        (?: (?P<whole> [0-9]{1,9} ) [ ] (?= [0-9]{1,9} [ ]? / [ ]? [0-9] ) )?                # 2 of 2 1/2
        (?P<decimal> (?: [0-9]{1,3} (?: , [0-9]{3} )+ (?![0-9]) | [0-9]+ ) (?: \. [0-9]+ )? | (?<!\.) \. [0-9]+ )
        (?P<exponent> [eE] [-+]? [0-9]+ (?!\w) )?
        (?: [ ]? / [ ]? (?P<denominator> [0-9]+ ) )?
      )
    | (?P<option> (?<!\w) \( [A-Ea-e] \) | (?<![\w(]) [A-E] \)                               # (b), B)
        | \A [A-Ea-e] \Z | \A [A-E] (?= [.:] \s ) | (?<![\w'’°]) (?<![0-9]\s) [A-E] \Z )     # b, "B. ", "… is B"
    | (?P<word> \A (?i: yes | no | true | false ) \b | \b (?i: yes | no | true | false ) \Z )
    """,
    re.VERBOSE,
)


def extract_answer(text: str) -> str | None:
    """The answer a text gives, in canonical form, or None. Never raises, whatever the text.

    Where it looks, first rule that applies: the first answer on the line after the LAST "####"; the right side of the
    last complete `<<…=x>>`; the last answer in the text. An answer is a number, a ratio or time (`5:45`), an option
    letter A to E, or yes / no / true / false (as first or last word). A text of one short line with none of these
    (after "####" or alone) is a word answer.

    Canonical forms: `1,000`, `$1000`, `1000.0` and `1e3` give "1000"; `.50` gives "0.5"; `2/4` gives "1/2"; units and
    the percent sign are dropped (`12%` gives "12"); `(b)` gives "B"; words are in lower case without outer punctuation.
    """
    _, marker, tail = text.rpartition(_MARKER)
    return _canonical(tail) if marker else _canonical(text, last=True)


def _canonical(text: str, last: bool = False) -> str | None:
    """The first (or last) answer in a text; without `last`, only the first line of the text counts."""
    text = text.strip()
    if not last:
        text = text.partition("\n")[0]
    text = _last_step_result(text)
    text = text.strip(" \t\r\n\"'“”‘’`*_").rstrip(".,;:!? \t\r\n\"'“”‘’`*_")
    found = None
    for match in _TOKEN.finditer(text):
        found = _token_value(match) or found
        if found and not last:
            break
    return found or _word_answer(text)


def _last_step_result(text: str) -> str:
    """The right side of the last complete `<<…=x>>` (its whole inside without "="), else the text itself."""
    end = text.rfind(">>")
    start = text.rfind("<<", 0, end) if end >= 0 else -1
    return text[start + 2 : end].rpartition("=")[2] if start >= 0 else text


def _token_value(match: re.Match[str]) -> str | None:
    if match["number"]:
        return _number_text(match)
    if match["option"]:
        return match["option"].strip("()").upper()
    return match.group().casefold()


def _number_text(match: re.Match[str]) -> str | None:
    """The canonical text of a number token; None where it is out of bounds or divides by zero."""
    digits, exponent, denominator = match["decimal"].replace(",", ""), match["exponent"] or "", match["denominator"]
    if len(digits) > _MAX_DIGITS or len(denominator or "") > _MAX_DIGITS or len(exponent) > 5:
        return None
    if exponent and abs(int(exponent[1:])) > _MAX_EXPONENT:
        return None
    negative = bool(match["sign"]) != bool(match["inner_sign"])
    plain = format(Decimal(digits + exponent), "f")  # exact: the context's precision rounds arithmetic only
    if denominator is None:
        if "." in plain:
            plain = plain.rstrip("0").rstrip(".")
        plain = plain.lstrip("0") or "0"
        plain = "0" + plain if plain.startswith(".") else plain
        return "-" + plain if negative and plain != "0" else plain
    if not int(denominator):
        return None
    value = Fraction(plain) / int(denominator) + int(match["whole"] or 0)
    return str(-value if negative else value)


def _word_answer(text: str) -> str | None:
    # "İ" is the one letter whose lower case is two characters, and the second would end the word before it.
    words = " ".join(text.replace("İ", "i").lower().split())
    return words if words and "\n" not in text and len(words) <= _MAX_WORD_ANSWER else None


# ------------------------------------------------------------------------------------------------------- grading

_RELATIVE_TOLERANCE = Fraction(1, 10**6)
_LARGEST_TOLERANCE = Fraction(1, 10**3)
_SMALLEST_TOLERANCE = Fraction(1, 2 * 10**10)


def is_correct(prediction: str | None, gold: str) -> bool:
    """Whether a prediction (what `extract_answer` gave, or an answer by itself) equals the gold answer.

    Both are brought to canonical form first. Two whole numbers must be equal, exactly. Where either has a fractional
    part they may differ by a millionth of the larger, though by no more than 0.001: gold answers such as 0.3333333
    stand for 1/3, and GSM-Hard's carry float noise (3244047.0999999996). GSM-Hard rounds to ten decimals, so half a
    unit of the tenth always passes. Everything else must be the same text.

    A percent sign is a unit: `12%` equals `12` and not `0.12`. Formulas are compared as far as their first number only.
    """
    if prediction is None:
        return False
    given, wanted = _canonical(prediction), _canonical(gold)
    if given is None or wanted is None:
        return False
    if given == wanted:
        return True
    left, right = _as_fraction(given), _as_fraction(wanted)
    if left is None or right is None or (left.denominator == 1 and right.denominator == 1):
        return False
    tolerance = min(_LARGEST_TOLERANCE, _RELATIVE_TOLERANCE * max(abs(left), abs(right)))
    return abs(left - right) <= max(_SMALLEST_TOLERANCE, tolerance)


def _as_fraction(canonical: str) -> Fraction | None:
    """The exact value of a canonical number; None for letters, words and ratios."""
    return Fraction(canonical) if re.fullmatch(r"-?[0-9]+(?:[./][0-9]+)?", canonical) else None
