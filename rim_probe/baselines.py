"""Shallow baselines: how much of a test falls to rules and counts that understand nothing.

- majority: the answer that occurs most often in the training problems;
- last number: the last number of the question;
- bag of words: a linear classifier of the answer over the words and pairs of words of the question;
- keyword rules: the question's numbers from left to right, each joined by the operation that a word of its sentence
  names (the words of the generated world `arithmetic`); who owns what is not looked at.

Knows texts. Knows no model.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence

from rim_probe.answers import extract_answer
from rim_probe.problems import Problem

_NUMBER = re.compile(r"\d+(?:\.\d+)?")
_SENTENCE = re.compile(r"[.?!;](?!\d)| and (?=\d)")
_SUM = re.compile(r"([-+*/])\s*$")
_KEYWORDS = (  # the first that a sentence holds
    ("*", re.compile(r"times as|twice|double|each|every")),
    ("/", re.compile(r"split|parts|equal|share|half")),
    (
        "-",
        re.compile(r"fewer|less|lose|lost|sell|sold|\b(?:eat|ate)|spen[dt]|gives? .* to |gives \w+ \d+ of|from \w+$"),
    ),
    ("+", re.compile(r"more|buy|bought|find|found|get|got|gives?|gave|earn|add")),
)
MOST_ANSWERS = 200  # classes of the bag of words: the most frequent answers


def baselines(train: Sequence[Problem]) -> dict[str, Callable[[Sequence[str]], list[str | None]]]:
    """By name: from questions to answers, fitted on `train` (those that need no fitting come without it, too)."""
    found = {
        "last number": lambda questions: [numbers[-1] if (numbers := _NUMBER.findall(q)) else None for q in questions],
        "keyword rules": lambda questions: list(map(keyword_answer, questions)),
    }
    if train:
        most = Counter(problem.answer for problem in train).most_common(1)[0][0]
        found |= {"majority": lambda questions: [most] * len(questions), "bag of words": _bag_of_words(train)}
    return found


def keyword_answer(question: str) -> str | None:
    """The numbers of a question joined from left to right by the operations that words name; None where it breaks.

    A sentence that names none is where the count begins, once; further ones are left out.
    """
    start, steps = None, []
    for part in _SENTENCE.split(question.lower()):
        named = next((sign for sign, words in _KEYWORDS if words.search(part)), None)
        for found in _NUMBER.finditer(part):
            written = _SUM.search(part[: found.start()])
            sign = written.group(1) if written else named
            if sign is not None:
                steps.append((sign, float(found.group())))
            elif start is None:
                start = float(found.group())
    if start is None:
        (_, start), *steps = steps or [("+", None)]
    if start is None or any(sign == "/" and number == 0 for sign, number in steps):
        return None
    value = float(start)
    for sign, number in steps:
        value = {"+": value + number, "-": value - number, "*": value * number}.get(sign, value / (number or 1))
    return extract_answer(f"{value:g}")


def _bag_of_words(train: Sequence[Problem]) -> Callable[[Sequence[str]], list[str | None]]:
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import SGDClassifier
    from sklearn.pipeline import make_pipeline

    common = {answer for answer, _ in Counter(problem.answer for problem in train).most_common(MOST_ANSWERS)}
    kept = [problem for problem in train if problem.answer in common]
    if len({problem.answer for problem in kept}) < 2:
        return lambda questions: [kept[0].answer] * len(questions)
    model = make_pipeline(
        CountVectorizer(ngram_range=(1, 2), token_pattern=r"[^\s]+"), SGDClassifier("log_loss", random_state=0)
    )
    model.fit([problem.question for problem in kept], [problem.answer for problem in kept])
    return lambda questions: model.predict(list(questions)).tolist()
