"""The gallery of a checkpoint: example problems its model was made for, and which of them is nearest to a question.

This module knows the file `examples.json` in a checkpoint folder. It does not know the model.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, StringConstraints, TypeAdapter, ValidationError

from rim_probe.errors import CheckpointError
from rim_probe.problems import Problem

EXAMPLES_FILE = "examples.json"

_Text = Annotated[str, StringConstraints(pattern=r"\S")]


class _Example(BaseModel):
    question: _Text
    steps: list[str]
    answer: _Text


_EXAMPLES = TypeAdapter(list[_Example])
_COMPARED_WORDS = 200  # bounds the time for a question of any length; example questions are far shorter


def load_examples(checkpoint_folder: str | os.PathLike[str]) -> list[Problem]:
    """The examples of a checkpoint in the order of its file; none where it has no `examples.json`.

    The file is a list of `{"question": str, "steps": [str, ...], "answer": str}`; other keys are ignored. Raises
    CheckpointError that names the file and the first thing wrong in it.
    """
    path = Path(checkpoint_folder) / EXAMPLES_FILE
    try:
        entries = _EXAMPLES.validate_json(path.read_bytes())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(f"“{path}” cannot be read: {error.strerror or error}.") from None
    except ValidationError as error:
        first = error.errors()[0]
        place = "".join(f", {key}" if isinstance(key, str) else f", number {key + 1}" for key in first["loc"])
        raise CheckpointError(f"“{path}”{place}: {first['msg']}; write it again or delete it.") from None
    return [Problem(entry.question, tuple(entry.steps), entry.answer) for entry in entries]


def nearest_example(question: str, examples: Sequence[Problem]) -> Problem:
    """The example whose wording is nearest to the question: most words in common, then most alike in their order.

    Numbers count as one word, whatever their value, since they say nothing about the wording. Among equals the first
    example wins. `examples` must not be empty (ValueError).
    """
    asked = _words(question)

    def likeness(example: Problem) -> tuple[float, float]:
        words = _words(example.question)
        common = len(set(asked) & set(words)) / max(1, len(set(asked) | set(words)))
        return common, difflib.SequenceMatcher(None, asked, words, autojunk=False).ratio()

    return max(examples, key=likeness)


def _words(text: str) -> list[str]:
    return ["0" if word[0].isdigit() else word for word in re.findall(r"[0-9]+|\w+", text.lower())[:_COMPARED_WORDS]]
