"""Reading an answer out of a text, and grading it."""

import time
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rim_probe.answers import ANSWER_MARKER, extract_answer, is_correct
from rim_probe.problems import Problem, read_problems
from tools.compare_grading import chains, good, made, ours
from tools.wrong_golds import wrong_golds

ROWS = Path(__file__).parent / "gsm8k_rows.txt"
fixed = settings(derandomize=True, deadline=None, max_examples=120, database=None)
any_text = st.text(max_size=80)
# Text made of the pieces that mean something to the grader reaches its branches far more often than random text.
graded_text = st.lists(
    st.sampled_from(
        ["####", "<<", ">>", "=", "18", "1,000", "3.50", ".5", "-", "−", "$", "%", "/", "1e3", "e", " ", "\n", ".", ":"]
        + ["(", ")", "A", "b", "yes", "No", "apples", "0", "||", "ſ", "İ", "°", "`", "00", "9" * 200, "½", "²", "×"]
        + ["\\frac", "\\boxed", "{", "}", "\\text", "Question:", "answer is", "how", "?", "and", "or", "√", "'", "√"]
    ),
    max_size=12,
).map("".join)


# ---------------------------------------------------------------------------------------------------- extraction


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # Where the answer stands.
        ("<<3+4=7>> <<7*2=14>> #### 14", "14"),
        ("#### 7 and then #### 14", "14"),
        ("<<7*2=14>> #### 15", "15"),
        ("#### 14\nQuestion 2: 99", "14"),
        ("####\n14", "14"),
        ("<<7*2=14>> ####", None),
        ("<<7*2=14>> The answer is 14.", "14"),
        ("", None),
        (" \n\t", None),
        ("It is hard to say what she has bought there, and nobody in the whole town knows it any better.", None),
        # Numbers.
        ("1,000", "1000"),
        ("$18", "18"),
        ("18.0", "18"),
        ("\\boxed{18}", "18"),
        ("-3", "-3"),
        ("−3", "-3"),
        ("$-5", "-5"),
        ("-0.0", "0"),
        ("007", "7"),
        (".5", "0.5"),
        ("1/2", "1/2"),
        ("2 1/2 cups", "5/2"),
        ("1e3", "1000"),
        ("2.0107e-06", "0.0000020107"),
        ("0.10000000000000000000000000000000000000001", "0.10000000000000000000000000000000000000001"),
        # Not numbers.
        ("It starts at 5:45", "5:45"),
        ("room B52", "room b52"),
        # Letters and words.
        ("(A)", "A"),
        ("D) the dog", "D"),
        ("#### (E) 14", "E"),
        ("It is 18 C.", "18"),
        ("18 °C", "18"),
        ("A dog has 4 legs", "4"),
        ("Yes", "yes"),
        ("there are no apples left", "there are no apples left"),
    ],
)
def test_extract_answer(text, expected):
    assert extract_answer(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # Spelling.
        ("１８", "18"),
        ("３．５", "3.5"),
        ("½", "1/2"),
        ("5 m²", "5"),
        ("18\u200b", "18"),
        # Thousands.
        ("1{,}234", "1234"),
        ("1 234", "1234"),
        ("1\u202f234\u2009567", "1234567"),
        ("1'234", "1234"),
        ("12,34,567", "1234567"),
        ("1.234,56", "1234.56"),
        ("1.234", "1.234"),
        # LaTeX, fractions, powers of ten.
        ("\\frac{3}{4}", "3/4"),
        ("2\\frac{1}{2}", "5/2"),
        ("\\boxed{1{,}234}", "1234"),
        ("$\\boxed{\\$18 \\text{ in all}}$. Then 3.", "18"),
        ("\\boxed{\\text{B}}", "B"),
        ("3 \\times 10^{2}", "300"),
        # Dress.
        ("<answer>18</answer>", "18"),
        ("25 (or 30)", "25"),
        ("0.5 or 1/2", "1/2"),
        # Where it is stated.
        ("The answer is 5 because 3 is too few.", "5"),
        ("The answer is not 5 but 6.", "6"),
        ("Answer:\n18", "18"),
        ("#### 5 apples + 3 pears = 8 fruits", "8"),
        # Where the text runs on.
        ("The answer is 5. Question: Bob has 3 pens. How many?", "5"),
        ("#### 18\n\nQuestion: Bob has 3 pens.\n#### 3", "18"),
        ("#### 18\nBob has 3 pens. How many pens has he?\n#### 3", "18"),
        ("18<|im_end|>\n<|im_start|>user\nBob has 3", "18"),
        ("#### Step 1: How many eggs?\n16-3=13\n#### 18", "18"),
        ("Let's see. Question: how many? 18", "18"),
    ],
)
def test_one_value_many_spellings(text, expected):
    assert extract_answer(text) == expected
    assert is_correct(text, expected)


@pytest.mark.parametrize(
    "text",  # beside those of the comparison with other graders
    ["<<80/3=26.67=27(roundedup)>>", "#### <<9*2=18>>", "<<Tom is a terpus.>>", "<<7*2=14>> so", "#### 3+4=7"]
    + ["#### 14 apples and 3 pears", "01:45 to 5:45", "4 or 1/0", "±5", "1.234,567", "1e999999999", "9" * 5000]
    + ["She has 5 apples.\n\nBob has 3 pens and 4 pencils. How many has he?"],
)
def test_in_doubt_there_is_no_answer(text):
    assert extract_answer(text) is None
    assert not is_correct(text, text)


@fixed
@given(st.one_of(any_text, graded_text))
def test_extraction_and_grading_never_raise_and_agree_with_themselves(text):
    value = extract_answer(text)
    assert value is None or (value and value == value.strip() and "\n" not in value and len(value) <= 300)
    if value is not None:
        assert extract_answer(ANSWER_MARKER + value) == value
        assert extract_answer(value) == value
        assert is_correct(value, value)
    assert is_correct(text, text) is (value is not None)


@fixed
@given(graded_text, graded_text)
def test_grading_is_symmetric(left, right):
    assert is_correct(left, right) == is_correct(right, left)


step = st.text(st.characters(exclude_characters="<>|#\n", exclude_categories=["Cs"]), min_size=1, max_size=12)


@pytest.mark.parametrize(
    "piece",
    ["9", "1,", "1,111", "1 ", "1/", "1:", "1.", "1e", "-", "$", "(", "<<", ">>", "<<=", "<<a>", "####", "A ", "no "]
    + [
        "\\frac",
        "\\boxed{",
        "}{",
        "²",
        "\u0345\u0327",
        "5\nQ:",
        "how ",
        "how?",
        "answer is ",
        "5 and ",
        "5=",
        "(a",
        "x",
    ],
)
def test_a_huge_text_takes_time_in_proportion_to_its_length(piece):
    """Eight times the text: linear work costs 8 times the processor time, quadratic work 64 times."""

    def cost(characters: int) -> float:
        text = "<<a=" + piece * (characters // len(piece))
        start = time.process_time()
        is_correct(extract_answer(text), text)
        is_correct(text, "18")
        return time.process_time() - start

    cost(25_000)  # the first call compiles and caches
    assert cost(200_000) < 32 * max(cost(25_000), 0.01)


# ------------------------------------------------------------------------------------------------------- grading


@pytest.mark.parametrize(
    ("prediction", "gold"),
    [
        ("18", "18"),
        ("18.00", "18"),
        ("1000", "1,000"),
        ("0.5", "1/2"),
        ("−3", "-3"),
        ("17.9999999999", "18"),
        ("1/3", "0.3333333"),
        ("0.3333333333", "1/3"),
        ("2.0107e-06", "0.0000020107"),
        ("Tom is a lempus", "Tom is a lempus."),
        ("5:45", "5:45"),
    ],
)
def test_right_answers(prediction, gold):
    assert is_correct(prediction, gold)
    assert is_correct(extract_answer(ANSWER_MARKER + prediction), gold)


@pytest.mark.parametrize(
    ("prediction", "gold"),
    [
        (None, "18"),
        ("", "18"),
        ("", ""),
        ("18", "19"),
        ("18", "-18"),
        ("1000000", "1000001"),
        ("123456789123456789", "123456789123456788"),
        ("12%", "0.12"),
        ("5.33", "5.3333333333"),
        ("0.33", "1/3"),
        ("98836", "98836.3333333334"),
        ("0", "5.158e-07"),
        ("A", "B"),
        ("yes", "no"),
        ("5:45", "45"),
        ("Tom is a lempus", "Tom is a terpus."),
    ],
)
def test_wrong_answers(prediction, gold):
    assert not is_correct(prediction, gold)


whole = st.integers(-(10**30), 10**30)


@fixed
@given(whole, whole)
def test_whole_numbers_are_compared_exactly(left, right):
    assert is_correct(str(left), str(right)) == (left == right)
    assert not is_correct(str(left + 1), str(left))


@fixed
@given(
    whole,
    st.sampled_from(["{}", "{:,}", "{}.0", "{}.", "{} apples", "{}%", "**{}**", "#### {}", "\\boxed{{{}}}", "x = {}"]),
)
def test_a_number_may_be_dressed_in_any_usual_way(number, dress):
    assert is_correct(extract_answer(dress.format(number)), str(number))


@fixed
@given(st.integers(1000, 10**12), st.sampled_from(["{,}", "\\,", " ", "\u00a0", "\u202f", "'", "’", "_", ","]))
def test_thousands_may_be_parted_in_any_usual_way(number, separator):
    assert extract_answer(f"{number:,}".replace(",", separator)) == str(number)


@fixed
@given(st.integers(0, 999), st.integers(1, 99), st.integers(1, 99))
def test_a_mixed_number_has_a_proper_fraction(whole, numerator, denominator):
    value = str(whole + Fraction(numerator, denominator)) if numerator < denominator else None
    for text in ("{} {}/{}", "{}\\frac{{{}}}{{{}}}", "\\boxed{{{}\\tfrac{{{}}}{{{}}}}}"):
        assert extract_answer(text.format(whole, numerator, denominator)) == value


@fixed
@given(st.integers(-(10**9), 10**9), graded_text)
def test_what_follows_a_next_question_does_not_count(number, rest):
    for stop in ("\nQuestion: ", "\n\nQ: ", "<|im_end|>"):
        assert extract_answer(f"The answer is {number}.{stop}{rest.replace('####', '')}") == str(number)


@fixed
@given(st.integers(-(10**9), 10**9), st.integers(1, 10**6))
def test_a_fraction_equals_its_decimal_form_and_not_its_neighbour(numerator, denominator):
    value = Fraction(numerator, denominator)
    assert is_correct(f"{numerator}/{denominator}", str(value))
    assert is_correct(f"{float(value):.15f}", f"{numerator}/{denominator}")
    assert not is_correct(str(value + Fraction(1, 500)), str(value))


@fixed
@given(st.floats(-1e12, 1e12).filter(lambda number: number == 0 or abs(number) > 1e-90))
def test_any_float_python_prints_is_read_exactly(number):
    value = extract_answer(ANSWER_MARKER + repr(number))
    assert float(value) == number
    assert is_correct(repr(number), f"{number:.17g}")


# ---------------------------------------------------------------------------------------------- beside other graders


def test_every_text_of_the_comparison_is_read_as_it_is():
    texts = [*made(), *chains(read_problems(ROWS).problems)]
    assert len(texts) > 1000
    assert [text for text in texts if not good(text, ours(text))] == []


def test_golds_that_another_file_corrects_are_named():
    given = [Problem("Ann?", (), "18"), Problem("Ben  walks?", (), "1,000"), Problem("Cy?", (), "3")]
    revised = [Problem("Ann?", (), "10"), Problem("Ben walks?", (), "1000")]
    assert list(wrong_golds(given, revised)) == [(1, given[0], "10"), (3, given[2], None)]


WORKED = (  # a gold answer of GSM8K as it stands in its file
    "The cost of the house and repairs came out to 80,000+50,000=$<<80000+50000=130000>>130,000\nHe increased the "
    "value of the house by 80,000*1.5=<<80000*1.5=120000>>120,000\nSo the new value of the house is 120,000+80,000="
    "$<<120000+80000=200000>>200,000\nSo he made a profit of 200,000-130,000=$<<200000-130000=70000>>70,000\n#### 70000"
)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (WORKED, "70000"),  # lm-evaluation-harness#1204: the target was the whole text
        (f"The example says #### 5, so I think on. {WORKED}", "70000"),  # #3438: the first marker was taken
        (f"{WORKED}\n\nQuestion: Ann has 3 apples.\nAnswer: She has <<3=3>>3.\n#### 3", "70000"),
    ],
)
def test_cases_reported_of_other_graders(text, value):
    assert extract_answer(text) == value and is_correct(extract_answer(text), "70,000")
