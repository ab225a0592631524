"""The gallery of a checkpoint: example problems its model was made for, and which of them is nearest to a question.

This module knows the file `examples.json` in a checkpoint folder. It does not know the model.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rim_probe.errors import CheckpointError
from rim_probe.problems import Problem

EXAMPLES_FILE = "examples.json"

_COMPARED_WORDS = 200  # bounds the time for a question of any length; example questions are far shorter


def load_examples(checkpoint_folder: str | os.PathLike[str]) -> list[Problem]:
    """The examples of a checkpoint in the order of its file; none where it has no `examples.json`.

    The file is a list of `{"question": str, "steps": [str, ...], "answer": str}`; other keys are ignored. Raises
    CheckpointError that names the file and the first thing wrong in it.
    """
    path = Path(checkpoint_folder) / EXAMPLES_FILE
    try:
        entries = json.loads(path.read_bytes().decode("utf-8"))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(f"“{path}” cannot be read: {error.strerror or error}.") from None
    except (ValueError, RecursionError) as error:  # ValueError: not UTF-8, not JSON, or a number of absurd length
        raise CheckpointError(f"“{path}” is not valid JSON ({error}); write it again or delete it.") from None
    if not isinstance(entries, list):
        raise CheckpointError(f"“{path}” should hold a list of examples, but holds {_kind(entries)}.")
    return [_example(path, number, entry) for number, entry in enumerate(entries, start=1)]


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


def _example(path: Path, number: int, entry: Any) -> Problem:
    """One checked example; `number` counts from 1."""
    where = f"Example {number} of “{path}”"
    if not isinstance(entry, dict):
        raise CheckpointError(f"{where} should be an object with question, steps and answer, but is {_kind(entry)}.")
    for key in ("question", "steps", "answer"):
        if key not in entry:
            raise CheckpointError(f"{where} has no “{key}”.")
    for key in ("question", "answer"):
        if not isinstance(entry[key], str):
            raise CheckpointError(f"{where}: “{key}” should be text, but is {_kind(entry[key])}.")
        if not entry[key].strip():
            raise CheckpointError(f"{where}: “{key}” is empty.")
    steps = entry["steps"]
    if not isinstance(steps, list):
        raise CheckpointError(f"{where}: “steps” should be a list of texts, but is {_kind(steps)}.")
    for step in steps:
        if not isinstance(step, str):
            raise CheckpointError(f"{where}: each of “steps” should be text, but one is {_kind(step)}.")
    return Problem(entry["question"], tuple(steps), entry["answer"])


def _kind(value: Any) -> str:
    """What a JSON value is, in words."""
    if value is None:
        return "null"
    kinds = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return kinds[type(value)]
