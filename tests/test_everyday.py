"""The everyday problems against their promises, read from the problems alone: nothing here knows how they are made."""

import re
from fractions import Fraction

import pytest

from rim_probe.cli import main
from rim_probe.datasets.everyday import generate
from rim_probe.datasets.everyday_frames import SPLITS
from rim_probe.errors import RecipeError
from rim_probe.problems import format_line, parse_line, read_problems

NUMBER_WORDS = "zero one two three four five six seven eight nine ten eleven twelve".split()
KNOWN = {  # a number that stands in no question, and the words that call for it
    2: "half|twice|double|both|two|pair|rectang|back|legs|wheels",
    3: "third|three",
    4: "quarter|square|four|legs|wheels",
    5: "fifth|weekday",
    6: "sixth",
    7: "week",
    8: "eighth",
    10: "tenth",
    12: "dozen|year|month",
    24: "day|hour",
    60: "hour|minute",
    100: "%|percent|meter|cents",
    1000: "kilo",
}
SIGNS = {"+": Fraction.__add__, "-": Fraction.__sub__, "*": Fraction.__mul__, "/": Fraction.__truediv__}
STEP = re.compile(r"<<(\d+(?:[-+*/]\d+){1,2})=(\d+)>>")
BAD_ENGLISH = re.compile(
    r"[][{}<>|_]|  | [.?,]|\b[Aa] (?:\$?(?:8|11\b|18\b)|[aeio])|\b[Aa]n (?!hour|8|11|18)[^aeiou]|\b1 \w+s\b"
)


def faults(problem):
    """What is wrong with a problem, in words; nothing where every step follows from its question."""
    found = []
    question = problem.question.lower()
    given = {int(number) for number in re.findall(r"\d+", question)}
    given |= {NUMBER_WORDS.index(word) for word in re.findall(r"[a-z]+", question) if word in NUMBER_WORDS}
    results, used = [], set()
    for step in problem.steps:
        match = STEP.fullmatch(step)
        if not match:
            found.append(f"{step} is no step of whole numbers")
            continue
        numbers = [int(number) for number in re.findall(r"\d+", match[1])]
        signs = re.findall(r"[-+*/]", match[1])
        if len(signs) == 2 and (signs != ["*", "/"] or len(numbers) != 3):
            found.append(f"{step} has two operations and is no share")
        value = Fraction(numbers[0])
        for sign, number in zip(signs, numbers[1:], strict=True):
            value = SIGNS[sign](value, Fraction(number))
        if value != int(match[2]) or value < 1:
            found.append(f"{step} is wrong or not positive")
        for number in numbers:
            if number in results:
                used.add(number)
            elif number not in given and not re.search(KNOWN.get(number, "(?!)"), question):
                found.append(f"{number} of {step} comes from nowhere")
        results.append(int(match[2]))
    if not results or problem.answer != str(results[-1]):
        found.append("the answer is not the last result")
    found += [f"nothing uses {result}" for result in results[:-1] if result not in used]
    if fault := BAD_ENGLISH.search(problem.question):
        found.append(f"the text holds “{fault[0]}”")
    return found


def masked(problem):
    """The text without its numbers, and the operators: what variants share."""
    return re.sub(r"\d+", "#", problem.question), tuple(re.sub(r"\d+", "#", step) for step in problem.steps)


@pytest.mark.parametrize("split", SPLITS)
def test_every_step_follows_from_the_question(split):
    for problem in generate(split, 3000):
        assert not faults(problem), problem
        assert parse_line(format_line(problem)) == problem


def test_variants_differ_in_their_numbers_alone():
    problems = list(generate("train", 6000, variants=4))
    assert len(problems) == 6000
    for start in range(0, len(problems), 4):
        group = problems[start : start + 4]
        assert len({masked(problem) for problem in group}) == 1
        assert len({problem.question for problem in group}) == 4
        assert not any(map(faults, group))


def test_the_same_arguments_give_the_same_problems():
    first = list(generate("train", 50, seed=3))
    assert list(generate("train", 50, seed=3)) == first != list(generate("train", 50, seed=4))
    with pytest.raises(RecipeError, match="Unknown split"):
        next(generate("dev", 1))


def test_splits_share_no_text_and_no_file_holds_a_question_twice():
    drawn = {split: [masked(problem)[0] for problem in generate(split, 3000)] for split in SPLITS}
    assert not set(drawn["train"]) & {*drawn["valid"], *drawn["test"]}
    assert not set(drawn["valid"]) & set(drawn["test"])
    for split in SPLITS:
        questions = [problem.question for problem in generate(split, 3000)]
        assert len(set(questions)) == len(questions) == 3000


def test_the_command_writes_a_file(capsys, tmp_path):
    path = tmp_path / "test.txt.gz"
    assert main(["data", "everyday", "--split", "test", "--rows", "9", "--variants", "3", "--output", str(path)]) == 0
    problems = read_problems(path).problems
    assert len(problems) == 9 and len({masked(problem) for problem in problems}) == 3
    assert "9 problems" in capsys.readouterr().out
