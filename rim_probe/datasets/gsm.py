"""GSM8K and its kin, SVAMP and MultiArith: where they lie on the Hugging Face Hub, and their rows as problems.

Knows the repositories, their files and what their fields hold. Knows neither file formats (`records`) nor downloads
(`sources`).
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from rim_probe.datasets.gsm8k_valid import is_held_out
from rim_probe.datasets.records import JSON_ENDINGS, PARQUET_ENDING, iter_rows
from rim_probe.errors import ProblemError
from rim_probe.problems import (
    ANSWER_MARKER,
    Problem,
    RejectedLine,
    extract_answer,
    format_line,
    iter_problems,
    parse_steps,
)

_ANNOTATION = re.compile(r"<<[^<>\n]+>>")  # GSM8K's calculator annotations stand inside sentences


@dataclass(frozen=True)
class HubSet:
    """One data set of the Hub.

    Attributes:
        title: what texts call it.
        repo: owner/name on the Hub.
        revision: the commit described here; None where none is known, which means the newest.
        files: split -> file; two splits may share one.
        fields: the columns a row has.
        convert: a row (field -> value) as a problem; raises ProblemError, whose text is the reason.
        answer: a gold answer as this set writes it in our line format.
        belongs: whether a question of a split's file is one of the split.
    """

    title: str
    repo: str
    revision: str | None
    files: Mapping[str, str]
    fields: tuple[str, ...]
    convert: Callable[[Mapping[str, Any]], Problem]
    answer: Callable[[str], str]
    belongs: Callable[[str, str], bool] = lambda question, split: True


def convert_file(dataset: HubSet, split: str, path: str) -> Iterator[Problem | RejectedLine]:
    """The problems of a split in a file of the data set: Parquet or JSON lines as on the Hub, or our own line format.

    Order and duplicates stay as they are. A row that is no problem comes as a RejectedLine, its number counted from 1.
    """
    for number, row in _rows(dataset, path):
        if isinstance(row, RejectedLine):
            yield row
            continue
        try:
            if isinstance(row, Problem):
                problem = replace(row, answer=dataset.answer(row.answer))
            else:
                problem = dataset.convert(row)
            format_line(problem)
        except ProblemError as error:
            yield RejectedLine(path, number, str(error))
        else:
            if dataset.belongs(problem.question, split):
                yield problem


def _rows(dataset: HubSet, path: str) -> Iterator[tuple[int, Mapping[str, Any] | Problem | RejectedLine]]:
    if path.endswith((*JSON_ENDINGS, PARQUET_ENDING)):
        return iter_rows(path, dataset.fields)
    return enumerate(iter_problems(path), start=1)


# ---------------------------------------------------------------------------------------------------------- the fields


def _text(row: Mapping[str, Any], field: str) -> str:
    value = row.get(field)
    if not isinstance(value, str) or not value.strip():
        raise ProblemError(f"The field “{field}” holds no text.")
    return value


def _graded(answer: str) -> str:
    """An answer as the grader reads it: `2,125` is `2125`, `$18` is `18`, `12%` is `12`, `25 (or 30)` is `25`."""
    read = extract_answer(ANSWER_MARKER + answer)  # after the marker the first number counts, as in `is_correct`
    if read is None:
        raise ProblemError("The answer holds nothing that can be graded.")
    return read


def _gsm8k(row: Mapping[str, Any]) -> Problem:
    """`question`; `answer`: sentences with annotations such as <<48/2=24>>, and a last line `#### 72`."""
    solution, marker, answer = _text(row, "answer").rpartition("####")
    if not marker:
        raise ProblemError("No “####” stands before the answer.")
    if "<<" in (rest := _ANNOTATION.sub("", solution)) or ">>" in rest:
        raise ProblemError("A calculator annotation is not of the form “<<48/2=24>>”.")
    return Problem(_text(row, "question"), tuple(_ANNOTATION.findall(solution)), _graded(answer))


def _gsm8k_aug(row: Mapping[str, Any]) -> Problem:
    """`question`; `steps`: a list of `<<600*30/100=180>>`; `answer`: a number as text."""
    steps = row.get("steps")
    if not isinstance(steps, list) or not all(isinstance(step, str) for step in steps):
        raise ProblemError("The field “steps” holds no list of texts.")
    return Problem(_text(row, "question"), parse_steps(" ".join(steps)), _graded(_text(row, "answer")))


def _gsm_hard(row: Mapping[str, Any]) -> Problem:
    """`input`: the question; `target`: a number, whole ones as `-9867630.0`; `code` is a program, not steps."""
    target = row.get("target")
    if isinstance(target, bool) or not isinstance(target, int | float) or not math.isfinite(target):
        raise ProblemError("The field “target” holds no number.")
    return Problem(_text(row, "input"), (), str(int(target)) if target == int(target) else repr(target))


def _svamp(row: Mapping[str, Any]) -> Problem:
    """`Body` and `Question`; `Equation`: `( ( 8.0 + 2.0 ) - 3.0 )`, the one step; `Answer`: a number as text."""
    answer = _graded(_text(row, "Answer"))
    left = re.sub(r"(?<=[0-9])\.0+(?![0-9])", "", _text(row, "Equation").replace(" ", ""))
    if left.startswith("(") and left.endswith(")"):  # every operation has its own parentheses
        left = left[1:-1]
    question = " ".join((_text(row, "Body").strip(), _text(row, "Question").strip()))
    return Problem(question, parse_steps(f"<<{left}={answer}>>"), answer)


def _multiarith(row: Mapping[str, Any]) -> Problem:
    """`question`; `final_ans`: a number as text. There are no steps."""
    return Problem(_text(row, "question").strip(), (), _graded(_text(row, "final_ans")))


def _gsm8k_split(question: str, split: str) -> bool:
    """GSM8K's `train` is the Hub's without the 500 problems of `valid`."""
    return split == "test" or is_held_out(question) == (split == "valid")


# File names and fields are those of the commit; the Hub calls all of GSM-Hard “train”, but its questions are those of
# GSM8K's test split.
SETS = {
    "gsm8k": HubSet(
        title="GSM8K",
        repo="openai/gsm8k",
        revision="740312add88f781978c0658806c59bc2815b9866",
        files={
            "train": "main/train-00000-of-00001.parquet",
            "valid": "main/train-00000-of-00001.parquet",
            "test": "main/test-00000-of-00001.parquet",
        },
        fields=("question", "answer"),
        convert=_gsm8k,
        answer=_graded,
        belongs=_gsm8k_split,
    ),
    "gsm8k-platinum": HubSet(
        title="GSM8K-Platinum",
        repo="madrylab/gsm8k-platinum",
        revision=None,
        files={"test": "main/test-00000-of-00001.parquet"},
        fields=("question", "answer"),
        convert=_gsm8k,
        answer=_graded,
    ),
    "gsm8k-aug": HubSet(
        title="GSM8K-Aug",
        repo="whynlp/gsm8k-aug",
        revision=None,
        files={
            "train": "data/train-00000-of-00001.parquet",
            "valid": "data/validation-00000-of-00001.parquet",
            "test": "data/test-00000-of-00001.parquet",
        },
        fields=("question", "steps", "answer"),
        convert=_gsm8k_aug,
        answer=_graded,
    ),
    "gsm-hard": HubSet(
        title="GSM-Hard",
        repo="reasoning-machines/gsm-hard",
        revision="960448f73503112d4226baeb8eb41d3fb5ae2506",
        files={"test": "gsmhardv2.jsonl"},
        fields=("input", "target"),
        convert=_gsm_hard,
        answer=str,
    ),
    "svamp": HubSet(
        title="SVAMP",
        repo="ChilleD/SVAMP",
        revision="5e0bf1e5e7c0e9c4bc39180d224f41f3f801b7ef",
        files={"train": "data/train-00000-of-00001.parquet", "test": "data/test-00000-of-00001.parquet"},
        fields=("Body", "Question", "Equation", "Answer"),
        convert=_svamp,
        answer=_graded,
    ),
    "multiarith": HubSet(
        title="MultiArith",
        repo="ChilleD/MultiArith",
        revision=None,
        files={"train": "train.json", "test": "test.json"},
        fields=("question", "final_ans"),
        convert=_multiarith,
        answer=_graded,
    ),
}
