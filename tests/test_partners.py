"""Interchange pairs: problems told alike, what follows when one takes over a result of the other, and their rows."""

import random
import re
from fractions import Fraction
from itertools import islice, pairwise

import numpy as np
import pytest

from rim_probe.datasets.arithmetic import World, generate
from rim_probe.datasets.partners import Partners
from rim_probe.equations import Variants, read_equation, value_bounds
from rim_probe.packing import pad_rows, stage1_row
from rim_probe.problems import Problem
from rim_probe.training.pairs import PairRows, draw_pairs
from rim_probe.training.tokens import tokenise

WORLD = World(story=0.4, relation=0.3, bare=0.3, held_out_steps=2)
PROBLEMS = list(generate(WORLD, "train", 150, seed=4))


def shirts(each: str, price: str, steps: tuple[str, ...], answer: str) -> Problem:
    return Problem(f"Ann buys {each} shirts at ${price}. She pays with a $50 note. Change?", steps, answer)


VARIANTS = [
    shirts("2", "9", ("<<2*9=18>>", "<<50-18=32>>"), "32"),
    shirts("four", "9", ("<<4*9=36>>", "<<50-36=14>>"), "14"),
    shirts("3", "12", ("<<3*12=36>>", "<<50-36=14>>"), "14"),
    shirts("8", "11", ("<<8*11=88>>", "<<50-88=-38>>"), "-38"),
    Problem("Ann buys 2 hats at $9. She pays with a $50 note. Change?", ("<<2*9=18>>", "<<50-18=32>>"), "32"),
    Problem("Ben has 7.", (), "7"),
]


def numbers_of(problem: Problem) -> list[str]:
    """Start and operands of a chain."""
    equations = [read_equation(step) for step in problem.steps]
    return [equations[0].operands[0].text, *(equation.operands[1].text for equation in equations)]


def words_of(question: str) -> str:
    singular = re.sub(r"\b(box)es\b", r"\1", re.sub(r"\d+", "#", question))
    return re.sub(r"s\b", "", re.sub(r"\bare\b", "is", singular))


def in_chain(problem: Problem) -> bool:
    equations = [read_equation(step) for step in problem.steps]
    links = pairwise(equations)
    return all(e.exact for e in equations) and all(b.operands[0].value == a.result.value for a, b in links)


@pytest.mark.parametrize("one_number", [True, False])
def test_partners_in_the_world_are_other_chains_in_the_same_words(one_number):
    tested = {p.steps for p in generate(WORLD, "test", 3000, seed=4) if len(p.steps) > 1}
    found = 0
    for number, draw in Partners(WORLD, "train", 4).each(set(range(150))):
        problem = PROBLEMS[number]
        for partner in islice(draw(random.Random(number), one_number), 3):
            found += 1
            assert words_of(partner.question) == words_of(problem.question)
            assert [s[len("<<d") : -4][0] for s in partner.steps] == [s[len("<<d") : -4][0] for s in problem.steps]
            assert in_chain(partner) and partner.steps != problem.steps and partner.steps not in tested
            changed = sum(a != b for a, b in zip(numbers_of(partner), numbers_of(problem), strict=True))
            assert changed == 1 if one_number else changed > 0
    assert found > 300


def test_what_follows_in_the_world_is_the_sources_chain_and_then_the_bases_operations():
    partners, followed, refused = Partners(WORLD, "train", 4), 0, 0
    tested = {p.steps for p in generate(WORLD, "test", 3000, seed=4) if len(p.steps) > 1}
    for number, draw in partners.each(set(range(150))):
        base = PROBLEMS[number]
        for source in islice(draw(random.Random(number), False), 3):
            for step in range(1, len(base.steps) + 1):
                follows = partners.interchanged(base, source, step)
                if follows is None:
                    refused += 1
                    continue
                followed += 1
                assert follows.question == base.question and follows.steps[:step] == source.steps[:step]
                assert follows.steps[step - 1] != base.steps[step - 1]
                assert numbers_of(follows)[step + 1 :] == numbers_of(base)[step + 1 :]
                assert in_chain(follows) and follows.steps not in tested
                assert follows.answer == read_equation(follows.steps[-1]).result.text
                assert all(1 <= read_equation(s).result.value <= WORLD.max_value for s in follows.steps)
    assert followed > 100 and refused > 100


def test_a_partner_is_found_by_masked_words_and_operators():
    alike = Variants(VARIANTS, value_bounds(VARIANTS))
    found = {number: list(draw(random.Random(0), True)) for number, draw in alike.each(set(range(6)))}
    assert found[0][0] is VARIANTS[1]  # differs in one number, written as a word
    assert found[0][1:] == [VARIANTS[2]]  # and not the one whose steps have another sign
    assert found[4] == found[5] == []
    ((_, draw),) = alike.each({0})
    assert list(draw(random.Random(0), False))[-1] is VARIANTS[1]


def test_only_what_depends_on_the_step_is_computed_anew():
    base = Problem("3 4 5 6?", ("<<3+4=7>>", "<<5*6=30>>", "<<30-7=23>>"), "23")
    source = Problem("1 9 8 2?", ("<<1+9=10>>", "<<8*2=16>>", "<<16-10=6>>"), "6")
    alike = Variants([base, source], (Fraction(0), Fraction(99)))
    assert alike.interchanged(base, source, 2).steps[2] == "<<16-7=9>>"
    assert alike.interchanged(base, source, 1).steps[1:] == ("<<5*6=30>>", "<<30-10=20>>")


# ---------------------------------------------------------------------------------------------------------------- pairs


def drawn(share: float = 1.0, one_number_share: float = 0.3, seed: int = 0):
    numbers = np.random.default_rng(9).integers(0, len(PROBLEMS), 200)
    return numbers, draw_pairs(PROBLEMS, numbers, Partners(WORLD, "train", 4), share, one_number_share, seed)


def test_rows_of_pairs_are_as_long_as_they_say_and_fit_into_the_context(rim, make_rim):
    tokens = tokenise(rim.encoder, PROBLEMS, print)
    numbers, pairs = drawn(share=0.8)
    rows = PairRows(rim, tokens, numbers, pairs, 4, True, print)
    made = [rows.row(place) for place in range(len(numbers))]
    assert rows.lengths.tolist() == [len(row) if row else 0 for row in made]
    assert [row is None for row in made] == [pair is None for pair in pairs]
    bound = sorted(max(row.positions) + 1 for row in made if row)[80]
    short = PairRows(make_rim(context=bound), tokens, numbers, pairs, 4, True, print)
    for place, row in enumerate(made):
        assert bool(short.lengths[place]) == (row is not None and max(row.positions) < bound)


def test_a_row_holds_both_problems_and_what_follows(rim):
    tokens = tokenise(rim.encoder, PROBLEMS, print)
    numbers, pairs = drawn()
    place = next(i for i, pair in enumerate(pairs) if pair and len(pair.follows) == 2)
    row = PairRows(rim, tokens, numbers, pairs, 4, False, print).row(place)
    base, pair = PROBLEMS[numbers[place]], pairs[place]

    def said(segment: int, k: int) -> list[int]:
        each = zip(row.segments, row.label_readouts, row.labels, strict=True)
        return [label for s, number, label in each if (s, number) == (segment, k)]

    told = [pair.source, base, *(problem for _, _, problem in pair.follows)]
    for segment, problem in enumerate(told):
        whole = stage1_row(rim.encoder, problem, 4)
        first = pair.follows[segment - 2][1] if segment > 1 else 1
        for k in range(first, 5):
            expected = [label for n, label in zip(whole.label_readouts, whole.labels, strict=True) if n == k]
            assert said(segment, k) == expected
        assert first == 1 or not said(segment, first - 1)
    assert "slot_labels" not in pad_rows([row], 0)
