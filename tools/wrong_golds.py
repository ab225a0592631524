"""The gold answers of GSM8K's test split that GSM8K-Platinum corrects, and the questions it takes out.

    python -m tools.wrong_golds [gsm8k:test gsm8k-platinum:test]

Either is a source as `data check` takes them: a split known by name, downloaded from the Hub, or a file of our lines.
"""

import sys
from collections.abc import Iterable, Iterator

from rim_probe.datasets.sources import load_problems
from rim_probe.problems import Problem, is_correct


def wrong_golds(given: Iterable[Problem], revised: Iterable[Problem]) -> Iterator[tuple[int, Problem, str | None]]:
    """(row from 1, problem, answer as revised) of each given problem that is answered otherwise; None: taken out."""
    answers = {_key(problem): problem.answer for problem in revised}
    for row, problem in enumerate(given, start=1):
        answer = answers.get(_key(problem))
        if answer is None or not is_correct(answer, problem.answer):
            yield row, problem, answer


def _key(problem: Problem) -> str:
    return " ".join(problem.question.split()).casefold()


def main() -> None:
    given, revised = sys.argv[1:] or ("gsm8k:test", "gsm8k-platinum:test")
    found = list(wrong_golds(load_problems(given).problems, load_problems(revised).problems))
    for row, problem, answer in found:
        print(f"row {row}: {problem.answer} -> {answer or 'taken out'}: {problem.question}")
    out = sum(answer is None for _, _, answer in found)
    print(f"{len(found) - out} answers corrected, {out} questions taken out.")


if __name__ == "__main__":
    main()
