"""What a checkpoint was trained on, as far as the questions tell it, and whether another question is like them.

`trained_on.json` in a checkpoint's folder: the range of numbers, the words where the vocabulary is closed (else the
most common ones), the scripts, the longest question, how many steps. Training writes it; `train RECIPE --describe
CHECKPOINT` writes it for a checkpoint that has none. A question outside is still answered: models answer everything,
and this is how a user learns that the answer may mean nothing.

Knows questions as text. Knows no model and no tokenizer.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, NonNegativeInt, ValidationError

from rim_probe.errors import CheckpointError
from rim_probe.files import write_atomic
from rim_probe.problems import Problem

FILE = "trained_on.json"
COMMON_WORDS = 300  # that tell the language of an open vocabulary
FEWEST_WORDS = 10  # of a question whose share of common words tells anything
MOST_READ = 20_000  # problems: a few seconds
MOST_KNOWN = 0.5  # a question of an open vocabulary with this share of common words is never unlike the others
RARE = 1e-4  # what no more than this share of the questions goes beyond (or holds) is no part of the range
LARGEST_NUMBER = 1e30  # larger ones count as this
SHOWN = 3  # numbers and words that a sentence names
_LARGEST = 2**22  # bytes of a file
_NUMBER = r"\d{1,3}(?:,\d{3})+(?:\.\d+)?(?!\d)|\d+(?:\.\d+)?"
_SIGNED = re.compile(r"(?<![\w)%])(?<![\d)%] )[-−]$")  # a minus between two terms is no sign
_PIECE = re.compile(rf"{_NUMBER}|[^\W\d_]+|[^\w\s]|_")

_Word = Annotated[str, Field(min_length=1, max_length=100)]
_Words = Annotated[list[_Word], Field(max_length=100_000)]


class TrainedOn(BaseModel):
    """What the questions of a training are like; see `of` for how it is found.

    Attributes:
        problems: how many.
        lowest, highest: of the numbers written in digits; None where there are none.
        decimals: whether there are any but whole numbers.
        closed: `words` are all there are; else the most common ones.
        known_share: the least share of a question's words that are among `words`.
        scripts: of the letters, such as LATIN.
        pieces: of the longest question: words, numbers and signs.
        steps: of the shortest and the longest chain of steps; None where there are no steps.
    """

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    format: Literal["rim-probe-trained-on/1"] = "rim-probe-trained-on/1"
    problems: NonNegativeInt
    lowest: FiniteFloat | None
    highest: FiniteFloat | None
    decimals: bool
    closed: bool
    words: _Words
    known_share: Annotated[float, Field(ge=0, le=1)]
    scripts: _Words
    pieces: NonNegativeInt
    steps: Annotated[list[NonNegativeInt], Field(min_length=2, max_length=2)] | None

    @classmethod
    def of(cls, problems: Sequence[Problem], closed: bool) -> TrainedOn:
        """The range of some problems: all but the `RARE` extremes of them (of every second or third of very many).

        Args:
            closed: whether the model knows no word but those of its training.
        """
        total = len(problems)
        problems = problems[:: 1 + len(problems) // MOST_READ]
        questions = [_Question(problem.question) for problem in problems]
        counted = Counter(word for question in questions for word in question.words)
        words = [word for word, _ in counted.most_common(None if closed else COMMON_WORDS)]
        known = set(words)
        shares = [question.share(known) for question in questions if len(question.words) >= FEWEST_WORDS]
        scripts = Counter(script for question in questions for script in question.scripts)
        numbers = [question.numbers for question in questions if question.numbers]
        steps = sorted(len(problem.steps) for problem in problems if problem.steps)
        return cls(
            problems=total,
            lowest=_extreme([-min(found) for found in numbers], -1),
            highest=_extreme([max(found) for found in numbers]),
            decimals=sum(any(n % 1 for n in found) for found in numbers) > RARE * len(problems),
            closed=closed,
            words=sorted(words),
            known_share=1.0 if closed else min(MOST_KNOWN, -(_extreme([-share for share in shares]) or 0.0)),
            scripts=sorted(script for script, n in scripts.items() if n > RARE * len(problems)),
            pieces=int(_extreme([question.pieces for question in questions]) or 0),
            steps=[steps[0], steps[-1]] if steps else None,
        )

    def outside(self, question: str) -> str | None:
        """One sentence on what a question has that those of the training had not; None where it is like them."""
        asked, told = _Question(question), []
        if self.highest is not None and self.lowest is not None:
            if beyond := [number for number in asked.numbers if not self.lowest <= number <= self.highest]:
                told.append(
                    f"numbers from {_listed([self.lowest])} to {_listed([self.highest])}, here {_listed(beyond)}"
                )
            if not self.decimals and (parts := [number for number in asked.numbers if number % 1]):
                told.append(f"whole numbers, here {_listed(parts)}")
        known, scripts = set(self.words), asked.scripts - set(self.scripts)
        if scripts:
            told.append(
                f"{', '.join(map(str.capitalize, self.scripts)) or 'no'} letters, here "
                f"{', '.join(sorted(scripts)).capitalize()}"
            )
        elif self.closed and (new := list(dict.fromkeys(word for word in asked.words if word not in known))):
            told.append(f"other words than {', '.join(f'“{word}”' for word in new[:SHOWN])}{' …' * (len(new) > SHOWN)}")
        elif len(asked.words) >= FEWEST_WORDS and asked.share(known) < self.known_share:
            told.append("other words; is it another language?")
        if asked.pieces > self.pieces:
            told.append(f"at most {self.pieces:,} words, numbers and signs, here {asked.pieces:,}")
        if not told:
            return None
        return f"This question is unlike those the model was made for ({'; '.join(told)}); its answer may mean nothing."

    def save(self, folder: Path) -> None:
        """Writes the file into a checkpoint's folder."""
        write_atomic(folder / FILE, (self.model_dump_json(indent=1) + "\n").encode())

    @classmethod
    def load(cls, folder: Path) -> TrainedOn | None:
        """What the file in a folder says; None where there is none.

        Raises:
            CheckpointError: a damaged file.
        """
        path = folder / FILE
        try:
            if path.stat().st_size > _LARGEST:
                raise CheckpointError(f"{path} is too large to be what training wrote; delete it.")
            return cls.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValidationError) as error:
            reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error.strerror
            raise CheckpointError(f"{path} cannot be read ({reason}); restore or delete it.") from None


class _Trained(Protocol):
    trained_on: TrainedOn | None


def outside(models: Iterable[_Trained], question: str) -> str | None:
    """`TrainedOn.outside` of the first model of which it is known; None where it is known of none."""
    known = next((model.trained_on for model in models if model.trained_on is not None), None)
    return None if known is None else known.outside(question)


class _Question:
    """A question taken apart: its words and signs, its numbers, the scripts of its letters."""

    def __init__(self, text: str):
        text = unicodedata.normalize("NFKC", text).lower()
        found = list(_PIECE.finditer(text))
        self.pieces = len(found)
        self.words = [piece.group() for piece in found if not piece.group()[0].isdigit()]
        self.numbers = list(_numbers(text, found))
        self.scripts = {_script(char) for char in set(text) if char.isalpha()}

    def share(self, known: set[str]) -> float:
        return sum(word in known for word in self.words) / max(1, len(self.words))


def _numbers(text: str, found: Iterable[re.Match[str]]) -> Iterator[float]:
    for piece in found:
        if piece.group()[0].isdigit():
            value = min(float(piece.group().replace(",", "")), LARGEST_NUMBER)
            yield -value if _SIGNED.search(text, max(0, piece.start() - 10), piece.start()) else value


@functools.cache
def _script(char: str) -> str:
    return unicodedata.name(char, "UNKNOWN").partition(" ")[0]


def _extreme(values: list[float], sign: int = 1) -> float | None:
    """The largest value but for the `RARE` ones, times `sign`."""
    values = sorted(values)
    return sign * values[-1 - int(RARE * len(values))] if values else None


def _listed(numbers: Sequence[float]) -> str:
    shown = [f"{number:,.12g}" for number in dict.fromkeys(numbers)]
    return " and ".join(shown[:SHOWN]) + (" …" if len(shown) > SHOWN else "")
