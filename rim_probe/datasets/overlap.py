"""Whether training problems are in a test set: the same question, or the same but for its numbers.

Knows questions as text alone. Paraphrases are beyond it, and so are numbers in words: `four` is no number.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from rim_probe.problems import Problem

SHOWN = 3
_WORD = re.compile(r"(?P<number>\d[\d,]*(?:\.\d+)?|\.\d+)|\w+")


@dataclass
class Overlap:
    """What a training set shares with one test set.

    Attributes:
        rows: training problems compared.
        same: those whose question is in the test set; case and blanks do not count.
        renumbered: further ones whose question differs from one of the test set in numbers and punctuation alone.
        examples: the first few shared questions, as the training set has them.
    """

    rows: int = 0
    same: int = 0
    renumbered: int = 0
    examples: list[str] = field(default_factory=list)

    @property
    def shared(self) -> int:
        """Test questions that are in the training set, as they stand or with other numbers."""
        return self.same + self.renumbered


def find_overlap(train: Iterable[Problem], tests: Sequence[Iterable[Problem]]) -> list[Overlap]:
    """One `Overlap` per test set. The training set is read once and never held: memory grows with the tests alone."""
    indices = [_index(test) for test in tests]
    found = [Overlap() for _ in tests]
    for problem in train:
        same, masked = _same(problem.question), _masked(problem.question)
        for overlap, (questions, patterns) in zip(found, indices, strict=True):
            overlap.rows += 1
            if same not in questions and masked not in patterns:
                continue
            if same in questions:
                overlap.same += 1
            else:
                overlap.renumbered += 1
            if len(overlap.examples) < SHOWN:
                overlap.examples.append(problem.question)
    return found


def _index(problems: Iterable[Problem]) -> tuple[set[str], set[str]]:
    questions, patterns = set(), set()
    for problem in problems:
        questions.add(_same(problem.question))
        patterns.add(_masked(problem.question))
    return questions, patterns


def _same(question: str) -> str:
    return " ".join(question.casefold().split())


def _masked(question: str) -> str:
    """The words of a question in their order, each number as `#`."""
    return " ".join("#" if word["number"] else word[0] for word in _WORD.finditer(question.casefold()))
