"""Reading steps, following what depends on what, counterfactual partners and hard distractors."""

import re
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rim_probe.datasets.arithmetic import World, generate
from rim_probe.equations import (
    chain,
    counterfactual,
    distractors,
    number_text,
    number_value,
    read_equation,
    value_bounds,
)
from rim_probe.equations.distractors import meaning
from rim_probe.problems import Problem


@pytest.mark.parametrize(
    ("step", "operands", "signs", "result"),
    [
        ("<<16-3*2=10>>", [16, 3, 2], "-*", 10),
        ("<<3 x 14 = 42>>", [3, 14], "*", 42),
        ("<<1,250.50+.5=1251>>", ["1250.5", "0.5"], "+", 1251),
        ("<<(3+4)*-2=-14>>", [3, 4, -2], "+*", -14),
        ("<<-3+5=2>>", [-3, 5], "+", 2),
        ("<<$200*25%=$50>>", [200, "1/4"], "*", 50),
        ("<<1/2*10=5>>", [1, 2, 10], "/*", 5),
        ("3/4*1=3/4", [3, 4, 1], "/*", "3/4"),
        ("<<123456789012345678901+1=123456789012345678902>>", [123456789012345678901, 1], "+", 123456789012345678902),
        ("<<8÷2−1=3>>", [8, 2, 1], "/-", 3),
        ("<<8⋅2·1=16>>", [8, 2, 1], "**", 16),
        ("<<-(3+4)+10=3>>", [3, 4, 10], "++", 3),
    ],
)  # fmt: skip
def test_steps_are_read_with_the_spans_of_their_numbers(step, operands, signs, result):
    equation = read_equation(step)
    assert [number.value for number in equation.operands] == [Fraction(value) for value in operands]
    assert "".join(operator.sign for operator in equation.operators) == signs
    assert equation.result.value == Fraction(result)
    assert equation.exact and equation.holds
    for number in (*equation.operands, equation.result):
        assert step[number.start : number.end] == number.text
        assert number_value(number.text) == number.value


@pytest.mark.parametrize(
    "step",
    [
        "", "<<>>", "<<x=3>>", "<<3=3>>", "<<3+4>>", "<<3+4=>>", "<<3+4=7=7>>", "<<3+=7>>", "<<3 4+1=7>>",
        "<<7//2=3>>", "<<(3+4=7>>", "<<3+4)=7>>", "<<2(3)=6>>", "<<3+4=seven>>", "<<3%2+1=2>>",
        "<<__import__('os')=1>>", "<<2**3=8>>", "<<1+" * 200 + "1=2>>", "<<1+1=1/0>>",
        "<<" + "(" * 140 + "1+1" + ")" * 139 + "=2>>",
    ],
)  # fmt: skip
def test_what_is_no_equation_is_none(step):
    assert read_equation(step) is None


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="0123456789+-*/()=.,%x <>$", max_size=40))
def test_any_text_is_read_or_refused_but_never_raises(text):
    equation = read_equation(text)
    if equation:
        equation.holds  # noqa: B018
        assert equation.rewritten() == text


def test_a_rounded_result_holds_but_is_not_exact():
    assert read_equation("<<10/3=3.33>>").holds and not read_equation("<<10/3=3.33>>").exact
    assert not read_equation("<<10/3=3.34>>").holds
    assert not read_equation("<<10/3=3>>").holds
    assert not read_equation("<<1/0=3>>").holds


@pytest.mark.parametrize(
    ("value", "like", "text"),
    [
        (12, "7", "12"), (1250, "1,000", "1,250"), ("1/2", "3", "0.5"), ("1/4", ".5", ".25"), ("1/3", "2", "1/3"),
        ("3/4", "1/2", "3/4"), ("-1/8", "2", "-0.125"), ("1/4", "50%", "25%"),
    ],
)  # fmt: skip
def test_numbers_are_written_in_the_style_they_had(value, like, text):
    assert number_text(Fraction(value), like) == text
    assert number_value(text) == Fraction(value)


# --------------------------------------------------------------------------------------------------------------- chains


def kinds(problem):
    return [[(s.kind, s.step, s.ambiguous) for s in step] for step in chain(problem).sources]


def test_operands_are_traced_to_steps_question_and_constants():
    problem = Problem(
        "Ann works 3 days of 12 hours at $20 per hour.", ("<<3*12=36>>", "<<36*20=720>>", "<<720/60=12>>"), "12"
    )
    assert kinds(problem) == [
        [("question", None, False), ("question", None, False)],
        [("step", 1, False), ("question", None, False)],
        [("step", 2, False), ("constant", None, False)],
    ]
    assert chain(problem).answer_step == 3


def test_a_value_that_is_both_is_told_by_what_would_else_be_unused():
    # 5 is the result of step 1 and stands in the question, but nothing else uses step 1.
    told = Problem("Ann has 8 maps and loses 3. Ben has 5 maps. Ann finds 4.", ("<<8-3=5>>", "<<5+4=9>>"), "9")
    assert kinds(told)[1] == [("step", 1, False), ("question", None, False)]
    # Either 5 could be the result of step 1.
    open_ = Problem("Ann has 8 maps, loses 3 and finds 5.", ("<<8-3=5>>", "<<5+5=10>>"), "10")
    assert all(ambiguous for _, _, ambiguous in kinds(open_)[1])
    assert chain(open_).ambiguous and not chain(told).ambiguous


def test_one_result_replaced_changes_what_depends_on_it_alone():
    problem = Problem(
        "3 and 4, times 2, plus 10 less 1", ("<<3+4=7>>", "<<10-1=9>>", "<<7*2=14>>", "<<14+9=23>>"), "23"
    )
    new = chain(problem).recomputed(results={1: Fraction(8)})
    assert new.steps == ("<<3+4=8>>", "<<10-1=9>>", "<<8*2=16>>", "<<16+9=25>>")
    assert new.answer == "25"
    same = chain(problem).recomputed()
    assert (same.steps, same.answer) == (problem.steps, problem.answer)
    assert chain(Problem("6 by 3 less 3", ("<<3-2=1>>", "<<6/1=6>>"), "6")).recomputed(results={1: Fraction(0)}) is None


# ------------------------------------------------------------------------------------------------------ counterfactuals

PROBLEMS = list(generate(World(min_steps=1, max_steps=3), "train", 400, seed=3))


@pytest.mark.parametrize("two_numbers", [False, True])
def test_partners_differ_in_the_numbers_told_and_all_their_equations_hold(two_numbers):
    rng = np.random.default_rng(0)
    bounds = value_bounds(PROBLEMS)
    assert bounds == (1, 9)
    found = 0
    for problem in PROBLEMS:
        partner = counterfactual(problem, rng, bounds, two_numbers=two_numbers)
        if partner is None:
            continue
        found += 1
        changes = [partner.change] + ([partner.second] if two_numbers else [])
        words, others = (re.findall(r"\w+", told.question) for told in (problem, partner.problem))
        differing = [(a, b) for a, b in zip(words, others, strict=True) if a != b]
        assert sorted(differing) == sorted((str(c.old), str(c.new)) for c in changes)
        assert all(1 not in (c.old, c.new) for c in changes)
        equations = [read_equation(step) for step in partner.problem.steps]
        assert all(e.exact and 1 <= e.result.value <= 9 for e in equations)
        assert number_text(equations[-1].result.value) == partner.problem.answer != problem.answer
        result = equations[partner.step - 1].result.value
        assert chain(problem).recomputed(results={partner.step: result}).answer == partner.predicted
        if two_numbers:
            assert partner.second.step > partner.step
            assert len({problem.answer, partner.problem.answer, partner.predicted}) == 3
        else:
            assert partner.second is None and partner.predicted == partner.problem.answer
    assert found > (60 if two_numbers else 200)


def test_numbers_of_several_digits_keep_their_length_and_percentages_their_sign():
    problem = Problem("A coat of $250 is sold at 20% less.", ("<<250*20%=50>>", "<<250-50=200>>"), "200")
    rng = np.random.default_rng(0)
    partner = counterfactual(problem, rng, (1, 1000))  # 250 enters two operands, so only the percentage can change
    assert partner.change.old == Fraction(1, 5)
    new = partner.change.new * 100
    assert 10 <= new <= 99 and f"at {new}% less" in partner.problem.question
    assert partner.problem.steps[0].startswith(f"<<250*{new}%=")
    large = Problem("Ann has 1,250 maps and finds 340.", ("<<1250+340=1590>>",), "1,590")
    partner = counterfactual(large, rng, (1, 5000))
    assert partner.problem.answer == f"{1590 + int(partner.change.new - partner.change.old):,}"


@pytest.mark.parametrize(
    "problem",
    [
        Problem("Ann has 3 maps and finds 3.", ("<<3+3=6>>",), "6"),  # which 3?
        Problem("Ann has 1 map and loses 1.", ("<<1-1=0>>",), "0"),
        Problem("Ann has 8 maps, loses 3 and finds 5.", ("<<8-3=5>>", "<<5+5=10>>"), "10"),  # ambiguous
        Problem("Ann has 8 maps and loses 3.", ("<<8-3=6>>",), "6"),  # wrong
        Problem("Ann has 8 maps and loses 3.", ("<<8-3=5>>",), "7"),  # not the answer
        Problem("Ann has 8 maps.", (), "8"),
    ],
)
def test_no_partner_where_the_prediction_would_be_a_guess(problem):
    assert counterfactual(problem, np.random.default_rng(0), (1, 100)) is None


# ---------------------------------------------------------------------------------------------------------- distractors


@pytest.mark.parametrize("step", ["<<3+4=7>>", "<<9/3=3>>", "<<16-3*2=10>>", "<<1250*.5=625>>", "<<10/4=2.5>>"])
def test_distractors_change_one_place_and_say_something_else(step):
    own = ("<<4+4=8>>", "<<7+2=9>>")
    found = distractors(step, 20, np.random.default_rng(0), own=own)
    assert len(found) == 20 == len(set(map(meaning, found)))
    assert not {meaning(step), *map(meaning, own)} & set(map(meaning, found))
    original = read_equation(step)
    assert {"operand", "result"} <= {text.kind for text in found}
    for text in found:
        equation = read_equation(text)
        if text.kind == "result":
            assert not equation.holds
        else:
            assert equation.exact
            assert original.result.value.denominator != 1 or equation.result.value.denominator == 1
            assert equation.result.value > 0
        left, right = text.rsplit("=", 1)
        old_left, old_right = step.rsplit("=", 1)
        assert len(left) == len(old_left) or text.kind == "operator"
        if right == old_right or text.kind != "result":
            assert sum(a != b for a, b in zip(left, old_left, strict=True)) == 1


def test_distractors_are_drawn_by_seed_and_stay_in_bounds():
    draw = [distractors("<<3+4=7>>", 30, np.random.default_rng(5), low=1, high=9) for _ in range(2)]
    assert draw[0] == draw[1]
    numbers = [n.value for text in draw[0] for e in [read_equation(text)] for n in (*e.operands, e.result)]
    assert min(numbers) >= 1 and max(numbers) <= 9
    assert "<<4+3=7>>" not in distractors("<<3+3=6>>", 99, np.random.default_rng(0), own=["<<3+4=7>>"])
    assert distractors("<<so 7>>", 5, np.random.default_rng(0)) == []
