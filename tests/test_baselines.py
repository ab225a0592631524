"""Shallow baselines know words and counts, and nothing of who owns what."""

import pytest

from rim_probe.baselines import baselines, keyword_answer
from rim_probe.datasets.arithmetic import World, generate
from rim_probe.problems import Problem, is_correct


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("Ann has 8 coins. Later Ann buys 1 coin. How many?", "9"),
        ("Ann has 6 pens. Ben has 2 keys. Ann loses 2 of the pens.", "4"),
        ("What is 7 - 2 * 3?", "15"),
        ("Ann has 9 cups. Ann splits the cups by 3 and keeps one part.", "3"),
        ("How many?", None),
        ("Split 8 by 0 parts.", None),
    ],
)
def test_keyword_rules_go_from_left_to_right(question, answer):
    assert keyword_answer(question) == answer


def test_keyword_rules_read_most_of_the_generated_world_and_the_counts_little():
    world = World(held_out_steps=2)
    train, test = list(generate(world, "train", 400, 1)), list(generate(world, "test", 200, 2))
    right = {
        name: sum(map(is_correct, answer([p.question for p in test]), [p.answer for p in test])) / len(test)
        for name, answer in baselines(train).items()
    }
    assert right["keyword rules"] > 0.7 > 0.5 > max(right[name] for name in ("majority", "last number", "bag of words"))


def test_without_training_problems_only_rules_are_left():
    assert set(baselines([])) == {"last number", "keyword rules"}
    one = baselines([Problem("Ann has 3 pens.", (), "3")])
    assert one["bag of words"](["x"]) == ["3"] and one["majority"](["x", "y"]) == ["3", "3"]
