"""The glass box's world: "what is 3 + 2 - 1 + 4 ?", a start and three operations, every result from 0 to 9.

Knows questions, their steps, the three disjoint splits of all 7,290 problems, and what an answer becomes when one
result is replaced. Knows nothing of models.
"""

import functools
import itertools
import random

from rim_probe.problems import Problem

SIGNS = ("+", "-")


def true_result(left: int, sign: str, right: int) -> int:
    """What a step makes; on a clock of ten, which problems never need and only some swaps of random partners do."""
    return (left + right if sign == "+" else left - right) % 10


def draw_problems(seed: int, n: int, split: str) -> list[Problem]:
    """`n` different problems of one of the disjoint splits "fit" (4374), "choose" and "report" (1458 each)."""
    return random.Random(seed).sample(all_problems()[split], n)


def swapped_answer(problem: Problem, partner: Problem, block: int) -> str:
    """What the problem's own equations give once the result of step `block` is the partner's."""
    (_, _, _, value) = parts(partner.steps[block - 1])
    for step in problem.steps[block:]:
        _, sign, right, _ = parts(step)
        value = true_result(value, sign, right)
    return str(value)


def problem_of(start: int, moves: tuple[tuple[str, int], ...]) -> Problem:
    """The problem that begins with `start` and makes three moves (sign, number)."""
    steps, value = [], start
    for sign, right in moves:
        result = true_result(value, sign, right)
        steps.append(f"<<{value}{sign}{right}={result}>>")
        value = result
    question = f"what is {start} " + " ".join(f"{sign} {right}" for sign, right in moves) + " ?"
    return Problem(question, tuple(steps), str(value))


def parts(step: str) -> tuple[int, str, int, int]:
    """(3, "+", 2, 5) of "<<3+2=5>>"."""
    return int(step[2]), step[3], int(step[4]), int(step[6])


@functools.cache
def all_problems() -> dict[str, tuple[Problem, ...]]:
    """Every start and three moves whose results stay from 0 to 9, shuffled and cut into the three splits."""

    def moves(value: int, count: int):
        if count == 0:
            yield ()
            return
        for sign, right in itertools.product(SIGNS, range(1, 10)):
            result = value + right if sign == "+" else value - right
            if 0 <= result <= 9:
                yield from (((sign, right), *rest) for rest in moves(result, count - 1))

    every = [(start, found) for start in range(10) for found in moves(start, 3)]
    random.Random(0).shuffle(every)
    problems = tuple(problem_of(start, found) for start, found in every)
    fifth = len(problems) // 5
    return {"fit": problems[: 3 * fifth], "choose": problems[3 * fifth : 4 * fifth], "report": problems[4 * fifth :]}
