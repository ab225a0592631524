"""Problem files, answer extraction and grading."""

import gzip
import string
import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rim_probe.errors import ProblemError
from rim_probe.problems import (
    ANSWER_MARKER,
    QUESTION_END,
    STEP_SEPARATOR,
    Problem,
    RejectedLine,
    extract_answer,
    format_line,
    is_correct,
    parse_line,
    read_problems,
    write_problems,
)

DUCKS = Problem("Janet has 16 eggs.", ("<<16-3-4=9>>", "<<9*2=18>>"), "18")
DUCKS_LINE = "Janet has 16 eggs.||<<16-3-4=9>> <<9*2=18>> #### 18"
# Everything str.splitlines() splits at, apart from the newline itself.
OTHER_SEPARATORS = "\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"

fixed = settings(derandomize=True, deadline=None, max_examples=120, database=None)
any_text = st.text(max_size=80)
# Text made of the pieces that mean something to the grader reaches its branches far more often than random text.
graded_text = st.lists(
    st.sampled_from(
        ["####", "<<", ">>", "=", "18", "1,000", "3.50", ".5", "-", "−", "$", "%", "/", "1e3", "e", " ", "\n", ".", ":"]
        + ["(", ")", "A", "b", "yes", "No", "apples", "0", "||", "ſ", "İ", "°", "`", "00", "9" * 200]
    ),
    max_size=12,
).map("".join)
step = st.text(st.characters(exclude_characters="<>|\n", exclude_categories=["Cs"]), min_size=1, max_size=12).map(
    "<<{}>>".format
)
question = st.text(st.characters(exclude_characters="\n", exclude_categories=["Cs"]), min_size=1, max_size=60).filter(
    lambda text: text.strip() and not text.startswith("\ufeff")
)
answer = st.one_of(st.integers().map(str), st.text(string.ascii_letters + string.digits + ".,/-$ ", min_size=1)).map(
    str.strip
)
problem = st.builds(Problem, question, st.lists(step, max_size=4).map(tuple), answer.filter(bool))


# ----------------------------------------------------------------------------------------------- the line format


def test_constants_are_those_the_rows_are_built_from():
    assert (QUESTION_END, STEP_SEPARATOR, ANSWER_MARKER) == ("\n", " ", "#### ")


def test_line_and_problem_are_two_forms_of_the_same():
    assert parse_line(DUCKS_LINE) == DUCKS
    assert parse_line(DUCKS_LINE + "\n") == DUCKS
    assert format_line(DUCKS) == DUCKS_LINE


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("How many?|| #### -9867630", Problem("How many?", (), "-9867630")),
        ("How many?||#### 2.0107e-06", Problem("How many?", (), "2.0107e-06")),
        ("Is a||b true?||<<1+1=2>> #### 2", Problem("Is a||b true?", ("<<1+1=2>>",), "2")),
        ("Is a|||<<1+1=2>> #### 2", Problem("Is a|", ("<<1+1=2>>",), "2")),
        ("Is #### here?|| #### 2", Problem("Is #### here?", (), "2")),
        ("Q||<<1+1=2>><<2*3=6>>####6\r\n", Problem("Q", ("<<1+1=2>>", "<<2*3=6>>"), "6")),
        ("Q||<<3>2=yes>> #### yes", Problem("Q", ("<<3>2=yes>>",), "yes")),
        (" Q\u2028two ||<<Tom is a terpus.>> #### 1,000", Problem(" Q\u2028two ", ("<<Tom is a terpus.>>",), "1,000")),
    ],
)
def test_parse_line(line, expected):
    assert parse_line(line) == expected


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("", "No “||”"),
        ("question <<1+1=2>> #### 2", "No “||”"),
        ("question||<<1+1=2>> 2", "No “####”"),
        ("question||<<1+1=2>> ####  ", "answer after “####” is empty"),
        ("  ||<<1+1=2>> #### 2", "question before “||” is empty"),
        ("question||first <<1+1=2>> #### 2", "outside “<<…>>”: “first”"),
        ("question||<<1+1=2 #### 2", "outside “<<…>>”: “<<1+1=2”"),
        ("question||<<>> #### 2", "outside"),
        ("question||<<1+1=2>> #### 2 #### 3", "outside"),
        (f"question||{'x' * 5000} #### 3", "x…”"),
        ("one|| #### 1\ntwo|| #### 2", "several"),
    ],
)
def test_a_line_that_does_not_parse_says_why(line, reason):
    with pytest.raises(ProblemError, match=r"^[A-Z].*[.]$") as caught:
        parse_line(line)
    assert reason in str(caught.value)
    assert len(str(caught.value)) < 200


@fixed
@given(problem)
def test_a_written_problem_is_read_back_unchanged(original):
    assert parse_line(format_line(original)) == original


@fixed
@given(st.one_of(any_text, st.builds("{}||{}####{}".format, graded_text, st.just("<<1+1=2>>"), graded_text)))
def test_any_text_parses_or_gives_a_problem_error(text):
    try:
        parsed = parse_line(text)
    except ProblemError:
        return
    assert parse_line(format_line(parsed)) == parsed


@fixed
@given(st.builds(Problem, any_text, st.lists(graded_text, max_size=3).map(tuple), graded_text))
def test_what_cannot_be_read_back_is_not_written(original):
    try:
        line = format_line(original)
    except ProblemError:
        return
    assert parse_line(line) == Problem(original.question.replace("\n", " "), original.steps, original.answer)


def test_a_newline_in_a_question_becomes_a_space():
    assert format_line(Problem("Two\nlines\r\nhere", (), "1")) == "Two lines\r here|| #### 1"


@pytest.mark.parametrize(
    "bad",
    [
        Problem("", (), "1"),
        Problem(" \n ", (), "1"),
        Problem("Q", ("1+1=2",), "2"),
        Problem("Q", ("<<1+\n1=2>>",), "2"),
        Problem("Q", ("<<1||1>>",), "2"),
        Problem("Q", ("<<1>> <<2>>",), "2"),
        Problem("Q", (), ""),
        Problem("Q", (), " 2"),
        Problem("Q", (), "2\n3"),
        Problem("Q", (), "2||3"),
        Problem("Q", (), "#### 2"),
    ],
)
def test_a_problem_no_line_can_hold_is_refused(bad, tmp_path):
    with pytest.raises(ProblemError):
        format_line(bad)
    with pytest.raises(ProblemError):
        write_problems(tmp_path / "all.txt", [DUCKS, bad])
    assert not (tmp_path / "all.txt").exists()


# --------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("name", ["problems.txt", "problems.txt.gz"])
def test_files_round_trip_with_every_unicode_line_separator(tmp_path, name):
    problems = [DUCKS, Problem(f"a{OTHER_SEPARATORS}b 😀 ש", (), "-1/2"), Problem("x||y", ("<<1+1=2>>",), "2")]
    write_problems(tmp_path / name, problems)
    read = read_problems(str(tmp_path / name))
    assert read.problems == problems
    assert read.rejected == []


def test_gz_files_are_packed_and_reproducible(tmp_path):
    write_problems(tmp_path / "one.txt.gz", [DUCKS])
    assert (tmp_path / "one.txt.gz").read_bytes()[4:8] == bytes(4), "a time stamp"
    write_problems(tmp_path / "two.txt.gz", [DUCKS])
    assert gzip.decompress((tmp_path / "one.txt.gz").read_bytes()).decode() == DUCKS_LINE + "\n"
    assert (tmp_path / "one.txt.gz").read_bytes() == (tmp_path / "two.txt.gz").read_bytes()


@fixed
@given(st.lists(problem, min_size=1, max_size=4))
def test_any_problems_survive_a_file(tmp_path_factory, problems):
    path = tmp_path_factory.mktemp("files") / "some.txt"
    write_problems(path, problems)
    assert read_problems(path).problems == problems


def test_bad_lines_are_reported_and_the_rest_is_kept(tmp_path):
    path = tmp_path / "mixed.txt"
    path.write_bytes(f"{DUCKS_LINE}\nno separator\n\n{DUCKS_LINE}\r\nQ|| ####\nQ|| #### 5".encode())
    read = read_problems(path)
    assert read.problems == [DUCKS, DUCKS, Problem("Q", (), "5")]
    assert [(line.path, line.line_number) for line in read.rejected] == [(str(path), 2), (str(path), 5)]
    assert "||" in read.rejected[0].reason
    assert str(RejectedLine("a.txt", 7, "No answer.")) == "a.txt, line 7: No answer."


def test_a_byte_order_mark_is_not_part_of_the_first_question(tmp_path):
    path = tmp_path / "windows.txt"
    path.write_bytes(b"\xef\xbb\xbf" + DUCKS_LINE.encode() + b"\r\n")
    assert read_problems(path).problems == [DUCKS]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("missing.txt", None, "does not exist"),
        ("missing.txt.gz", None, "does not exist"),
        ("latin.txt", DUCKS_LINE.encode() + b"\ncaf\xe9|| #### 1\n", "not UTF-8 text (line 2)"),
        ("utf16.txt", DUCKS_LINE.encode("utf-16"), "not UTF-8 text (line 1)"),
        ("packed.txt", gzip.compress(DUCKS_LINE.encode(), mtime=0), "not UTF-8 text (line 1)"),
        ("plain.txt.gz", DUCKS_LINE.encode(), "no gzip file or a damaged one"),
        ("cut.txt.gz", gzip.compress(DUCKS_LINE.encode() * 50, mtime=0)[:-20], "no gzip file or a damaged one"),
        (
            "rot.txt.gz",
            gzip.compress(DUCKS_LINE.encode(), mtime=0)[:12] + b"\xff" * 40,
            "no gzip file or a damaged one",
        ),
        ("empty.txt", b"", "holds no problem;"),
        ("empty.txt.gz", b"", "holds no problem;"),
        ("data.json", b'[\n{"question": "Q"}\n]', "holds no problem (line 1: No “||”"),
        ("bad\0name.txt", None, "cannot be read"),
    ],
)
def test_an_unusable_file_is_one_clear_sentence(tmp_path, name, content, reason):
    path = str(tmp_path / name)
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ProblemError) as caught:
        read_problems(path)
    assert reason in str(caught.value)
    assert path in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_can_be_neither_read_nor_written(tmp_path):
    with pytest.raises(ProblemError, match="cannot be read: Is a directory"):
        read_problems(tmp_path)
    with pytest.raises(ProblemError, match="cannot be written: Is a directory"):
        write_problems(tmp_path, [DUCKS])
    with pytest.raises(ProblemError, match="cannot be written: No such file"):
        write_problems(tmp_path / "nowhere" / "a.txt", [DUCKS])


def test_text_that_is_not_unicode_is_not_written(tmp_path):
    with pytest.raises(ProblemError, match="Problem 2 holds a character"):
        write_problems(tmp_path / "a.txt", [DUCKS, Problem("half a \ud83d pair", (), "1"), DUCKS])
    assert not (tmp_path / "a.txt").exists()


# ---------------------------------------------------------------------------------------------------- extraction


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # Where the answer stands.
        ("<<3+4=7>> <<7*2=14>> #### 14", "14"),
        ("#### 7 and then #### 14", "14"),
        ("<<7*2=14>> #### 15", "15"),
        ("#### 14 apples and 3 pears", "14"),
        ("#### 14\nQuestion 2: 99", "14"),
        ("####\n14", "14"),
        ("<<7*2=14>> ####", None),
        ("<<3+4=7>> <<7*2=14>>", "14"),
        ("<<7*2=14>> so 99 is wrong", "14"),
        ("<<3+4=7>> <<7*2=", "7"),
        ("<<80/3=26.67=27(roundedup)>>", "27"),
        ("<<Tom is a terpus.>>", "tom is a terpus"),
        ("14", "14"),
        ("He has 3 apples and 4 pears, 7 in all.", "7"),
        ("", None),
        (" \n\t", None),
        ("It is hard to say what she has bought there, and nobody in the whole town knows it any better.", None),
        ("two\nlines", None),
        # Numbers.
        ("1,000", "1000"),
        ("1,234,567.50", "1234567.5"),
        ("1,2,3", "3"),
        ("$18", "18"),
        ("US$18", "18"),
        ("€1,000.00", "1000"),
        ("18.0", "18"),
        ("18.", "18"),
        ("**18**.", "18"),
        ("\\boxed{18}", "18"),
        ("-3", "-3"),
        ("−3", "-3"),
        ("x = -3", "-3"),
        ("-$5", "-5"),
        ("$-5", "-5"),
        ("16-3", "3"),
        ("10-12 apples", "12"),
        ("-0.0", "0"),
        ("007", "7"),
        (".5", "0.5"),
        ("-.50", "-0.5"),
        ("1/2", "1/2"),
        ("2/4", "1/2"),
        ("-6/3", "-2"),
        ("2 1/2 cups", "5/2"),
        ("12%", "12"),
        ("18 dollars", "18"),
        ("18kg.", "18"),
        ("~7.2", "7.2"),
        ("1e3", "1000"),
        ("2.0107e-06", "0.0000020107"),
        ("98836.3333333334", "98836.3333333334"),
        ("0.10000000000000000000000000000000000000001", "0.10000000000000000000000000000000000000001"),
        # Not numbers.
        ("01:45 to 5:45", "5:45"),
        ("3:2", "3:2"),
        ("4 or 1/0", "4"),
        ("4 or 1e999999999", "4"),
        ("4 or 1e-999", "4"),
        ("4 or " + "9" * 5000, "4"),
        ("room B52", "room b52"),
        # Letters and words.
        ("(A)", "A"),
        ("(b)", "B"),
        ("c", "C"),
        ("D) the dog", "D"),
        ("#### B. 14", "B"),
        ("#### (E) 14", "E"),
        ("The answer is C.", "C"),
        ("It is 18 C.", "18"),
        ("18 °C", "18"),
        ("A dog has 4 legs", "4"),
        ("f(A)", "f(a)"),
        ("Yes", "yes"),
        ("NO.", "no"),
        ("5 > 3, so the answer is yes.", "yes"),
        ("#### True", "true"),
        ("there are no apples left", "there are no apples left"),
        ("#### 'Orange  ball.'", "orange ball"),
        ("İ0", "i0"),
    ],
)
def test_extract_answer(text, expected):
    assert extract_answer(text) == expected


@fixed
@given(st.one_of(any_text, graded_text))
def test_extraction_and_grading_never_raise_and_agree_with_themselves(text):
    value = extract_answer(text)
    assert value is None or (value and value == value.strip() and "\n" not in value and len(value) <= 300)
    if value is not None:
        assert extract_answer(ANSWER_MARKER + value) == value
        assert is_correct(value, value)
    assert isinstance(is_correct(text, text), bool)


@fixed
@given(graded_text, graded_text)
def test_grading_is_symmetric(left, right):
    assert is_correct(left, right) == is_correct(right, left)


@fixed
@given(any_text.filter(lambda text: "####" not in text), st.integers(-(10**12), 10**12))
def test_only_what_follows_the_last_marker_counts(reasoning, number):
    assert extract_answer(f"{reasoning} #### {number}") == str(number)


@fixed
@given(problem.filter(lambda one: one.steps), st.integers(-(10**9), 10**9))
def test_the_answer_of_a_worked_chain_is_its_last_result(original, number):
    chain = STEP_SEPARATOR.join([*original.steps, f"<<a+b={number}>>"])
    assert extract_answer(chain) == str(number)
    assert is_correct(extract_answer(f"{chain} {ANSWER_MARKER}{number}"), str(number))


@pytest.mark.parametrize(
    "piece",
    ["9", "1,", "1,111", "1 ", "1/", "1:", "1.", "1e", "-", "$", "(", "<<", ">>", "<<=", "<<a>", "####", "A ", "no "],
)
def test_a_huge_text_takes_time_in_proportion_to_its_length(piece):
    """Eight times the text: linear work costs 8 times the processor time, quadratic work 64 times."""

    def cost(characters: int) -> float:
        text = "<<a=" + piece * (characters // len(piece))
        start = time.process_time()
        is_correct(extract_answer(text), text)
        is_correct(text, "18")
        with pytest.raises(ProblemError):
            parse_line("question||" + text)
        return time.process_time() - start

    cost(25_000)  # the first call compiles and caches
    assert cost(200_000) < 32 * max(cost(25_000), 0.01)


# ------------------------------------------------------------------------------------------------------- grading


@pytest.mark.parametrize(
    ("prediction", "gold"),
    [
        ("18", "18"),
        ("18.00", "18"),
        ("$18", "18 dollars"),
        ("1000", "1,000"),
        ("15", "15."),
        ("99,000", "99000"),
        ("12%", "12"),
        ("0.5", "1/2"),
        (".50", "2/4"),
        ("−3", "-3"),
        ("4/5", "0.8"),
        ("7.2", "~7.2"),
        ("17.9999999999", "18"),
        ("1/3", "0.3333333"),
        ("0.3333333333", "1/3"),
        ("3244047.1", "3244047.0999999996"),
        ("98836.33333", "98836.3333333334"),
        ("2.0107e-06", "0.0000020107"),
        ("5.1579e-07", "5.158e-07"),
        ("(b)", "B"),
        ("A", "a"),
        ("Yes.", "yes"),
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
        ("18", "180"),
        ("18", "1.8"),
        ("1000000", "1000001"),
        ("123456789123456789", "123456789123456788"),
        ("12%", "0.12"),
        ("5.33", "5.3333333333"),
        ("0.33", "1/3"),
        ("98836", "98836.3333333334"),
        ("10074006", "10074005.666666666"),
        ("0", "5.158e-07"),
        ("0.0505", "0.05051"),
        ("18.0001", "18"),
        ("-0.5", "1/2"),
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
@given(whole, st.sampled_from(["{}", "{:,}", "{}.0", "{}.", "{} apples", "{}%", "**{}**", "#### {}", "<<a={}>>"]))
def test_a_number_may_be_dressed_in_any_usual_way(number, dress):
    assert is_correct(extract_answer(dress.format(number)), str(number))


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
