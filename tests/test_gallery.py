"""The example problems of a checkpoint."""

import json
import time

import pytest

from rim_probe.errors import CheckpointError
from rim_probe.gallery import load_examples, nearest_example
from rim_probe.problems import Problem

APPLES = Problem("Anna has 3 apples. She buys 4 more. How many apples has Anna?", ("<<3+4=7>>",), "7")
TRAIN = Problem("A train runs 60 miles in one hour. How far does it run in 3 hours?", ("<<60*3=180>>",), "180")
CARDS = Problem("Ben shares 12 cards among 4 friends. How many cards does each friend get?", (), "3")


def entry(**changes):
    return {"question": "How many?", "steps": ["<<3+4=7>>"], "answer": "7"} | changes


def write(folder, content):
    (folder / "examples.json").write_text(content if isinstance(content, str) else json.dumps(content))


def test_examples_come_in_file_order_and_other_keys_are_ignored(tmp_path):
    write(tmp_path, [entry(), entry(question="How far?", steps=[], answer="1/2", depth=3)])
    assert load_examples(tmp_path) == [Problem("How many?", ("<<3+4=7>>",), "7"), Problem("How far?", (), "1/2")]
    assert load_examples(str(tmp_path)) == load_examples(tmp_path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "JSON"),
        ({"question": "Q"}, "array"),
        (["text"], "number 1"),
        ([{"question": "Q", "steps": []}], "answer"),
        ([entry(question=" ")], "question"),
        ([entry(steps=["<<3+4=7>>", None])], "steps, number 2"),
    ],
)
def test_a_damaged_file_is_named_with_what_is_wrong(tmp_path, content, reason):
    write(tmp_path, content)
    with pytest.raises(CheckpointError) as caught:
        load_examples(tmp_path)
    assert reason in str(caught.value)
    assert str(tmp_path / "examples.json") in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("question", "nearest"),
    [
        (APPLES.question, APPLES),
        ("Zoe has 91 apples. She buys 8 more kumquats. How many has Zoe?", APPLES),
        ("How far does a TRAIN go in 77 hours", TRAIN),
        ("Zoe shares 99 marbles among 9 friends, how many does each get?", CARDS),
        ("", APPLES),
        ("שלום 😀", APPLES),
    ],
)
def test_the_nearest_example_shares_the_wording(question, nearest):
    assert nearest_example(question, [APPLES, TRAIN, CARDS]) == nearest


def test_a_long_question_is_answered_at_once():
    start = time.perf_counter()
    assert nearest_example("apples and " * 20_000, [TRAIN, APPLES] * 20) == APPLES
    assert time.perf_counter() - start < 5
