"""Problem files."""

import gzip
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rim_probe.errors import ProblemError
from rim_probe.problems import (
    Problem,
    RejectedLine,
    format_line,
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


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("How many?|| #### -9867630", Problem("How many?", (), "-9867630")),
        ("Is a||b true?||<<1+1=2>> #### 2", Problem("Is a||b true?", ("<<1+1=2>>",), "2")),
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
        ("question||<<1+1=2>> 2", "No “####”"),
        ("  ||<<1+1=2>> #### 2", "question before “||” is empty"),
        ("question||first <<1+1=2>> #### 2", "outside “<<…>>”: “first”"),
        ("question||<<1+1=2 #### 2", "outside “<<…>>”: “<<1+1=2”"),
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


@pytest.mark.parametrize(
    "bad",
    [
        Problem(" \n ", (), "1"),
        Problem("Q", ("1+1=2",), "2"),
        Problem("Q", ("<<1+\n1=2>>",), "2"),
        Problem("Q", ("<<1||1>>",), "2"),
        Problem("Q", (), ""),
        Problem("Q", (), "2\n3"),
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
        ("latin.txt", DUCKS_LINE.encode() + b"\ncaf\xe9|| #### 1\n", "not UTF-8 text (line 2)"),
        ("utf16.txt", DUCKS_LINE.encode("utf-16"), "not UTF-8 text (line 1)"),
        ("plain.txt.gz", DUCKS_LINE.encode(), "no gzip file or a damaged one"),
        ("cut.txt.gz", gzip.compress(DUCKS_LINE.encode() * 50, mtime=0)[:-20], "no gzip file or a damaged one"),
        (
            "rot.txt.gz",
            gzip.compress(DUCKS_LINE.encode(), mtime=0)[:12] + b"\xff" * 40,
            "no gzip file or a damaged one",
        ),
        ("empty.txt", b"", "holds no problem;"),
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


def test_text_that_is_not_unicode_is_not_written(tmp_path):
    with pytest.raises(ProblemError, match="Problem 2 holds a character"):
        write_problems(tmp_path / "a.txt", [DUCKS, Problem("half a \ud83d pair", (), "1"), DUCKS])
    assert not (tmp_path / "a.txt").exists()
