"""Hostile input by the thousand: `python -m tests.hostile [--quick] [--only GROUP ...]` tries it and counts.

Each module is one group: a function takes how many tries there shall be and a seed, and gives a `Count`.
"""

import logging
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # `conftest` has the tiny models


class Complaints(logging.Handler):
    """Keeps what is logged from a level on."""

    def __init__(self, level: int):
        super().__init__(level)
        self.told: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.told.append(f"{record.getMessage()} {record.exc_info and record.exc_info[1]!r}")


@dataclass
class Count:
    """What came of a group: how many tries, what became of them, and a line for each that failed."""

    tried: int = 0
    became: Counter = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    skipped: str = ""

    def note(self, what: str, failure: str | None = None) -> None:
        """One more try."""
        self.tried += 1
        self.became[what] += 1
        if failure is not None:
            self.failures.append(f"{what}: {failure[:600]}")

    def __str__(self) -> str:
        if self.skipped:
            return f"skipped: {self.skipped}"
        became = ", ".join(f"{n:,} {what}" for what, n in self.became.most_common())
        return f"{self.tried:,} tried, {len(self.failures):,} failed ({became})"
