"""GSM8K and its kin, SVAMP and MultiArith: from the Hub's files to our lines; training problems found in test files.

The files are small ones written here in the formats of the Hub; `gsm8k_rows.txt` holds 20 real problems.
"""

import json
import sys
from pathlib import Path

import huggingface_hub
import pytest

from rim_probe.cli import main
from rim_probe.datasets.gsm import SETS
from rim_probe.datasets.overlap import find_overlap
from rim_probe.datasets.sources import iter_source, load_problems, load_split
from rim_probe.equations import read_equation
from rim_probe.errors import ProblemError
from rim_probe.gallery import load_examples
from rim_probe.problems import Problem, is_correct, read_problems, write_problems

ROWS = Path(__file__).parent / "gsm8k_rows.txt"
SMOLLM2 = Path(__file__).parent.parent / "checkpoints" / "smollm2-135m"


def gsm8k_row(problem):
    """A problem as GSM8K has it: sentences with calculator annotations, thousands with commas."""
    equations = [step.removeprefix("<<").removesuffix(">>") for step in problem.steps]
    sentences = [f"Then {equation.partition('=')[0]} = $<<{equation}>>." for equation in equations]
    return {
        "question": problem.question,
        "answer": "\n".join([*(sentences or ["Let x be it: 2x > 3."]), f"#### {int(problem.answer):,}"]),
    }


def aug_row(problem):
    return {"question": problem.question, "steps": list(problem.steps), "answer": problem.answer}


def write_jsonl(path, rows):
    path.write_bytes(b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows))
    return str(path)


def write_json(path, rows):
    path.write_text(json.dumps(list(rows), indent=2), encoding="utf-8")
    return str(path)


def svamp_row(body, question, equation, answer):
    return {
        "ID": "chal-1", "Body": body, "Question": question, "Equation": equation, "Answer": answer,
        "Type": "Subtraction", "question_concat": f"{body} {question}",
    }  # fmt: skip


def write_parquet(path, rows):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.Table.from_pylist(rows), path)
    return str(path)


def complaint(*arguments, **options):
    """The one sentence with which a split is refused."""
    with pytest.raises(ProblemError) as caught:
        load_split(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ----------------------------------------------------------------------------------------------------------- converting


@pytest.mark.parametrize(
    ("name", "as_row", "write", "file"),
    [
        ("gsm8k", gsm8k_row, write_jsonl, "test.jsonl"),
        ("gsm8k", gsm8k_row, write_parquet, "test.parquet"),
        ("gsm8k-aug", aug_row, write_jsonl, "test.jsonl"),
        ("gsm8k-aug", aug_row, write_parquet, "test.parquet"),
    ],
)
def test_real_problems_come_out_as_our_own_files_have_them(tmp_path, name, as_row, write, file):
    problems = read_problems(ROWS).problems
    assert len(problems) == 20
    found = load_split(name, "test", write(tmp_path / file, [as_row(problem) for problem in problems]))
    write_problems(tmp_path / "out.txt", found.problems)
    assert (tmp_path / "out.txt").read_bytes() == ROWS.read_bytes()
    assert not found.rejected


@pytest.mark.parametrize(
    ("write", "file"), [(write_parquet, "t.parquet"), (write_jsonl, "t.jsonl"), (write_json, "t.json")]
)
def test_svamp_gives_its_equation_as_the_one_step(tmp_path, write, file):
    rows = [
        svamp_row("Ann has 8 pens. ", "How many are left if 3 go?", "( 8.0 - 3.0 )", "5"),
        svamp_row("There are 35 and 49 ants and 2.5 l of tea.", "What is it?", "( ( 35.0 + 49.0 ) - 2.5 )", "81.5"),
        svamp_row("It has 10 rows of 100.", "How many seats?", "( 10.0 * 100.0 )", "1000.0"),
        svamp_row("Ann has 8 pens.", "How many?", "( 8.0 - 3.0 )", ""),
    ]
    for split in ("train", "test"):
        found = load_split("svamp", split, write(tmp_path / file, rows))
        assert [(problem.question, problem.steps, problem.answer) for problem in found.problems] == [
            ("Ann has 8 pens. How many are left if 3 go?", ("<<8-3=5>>",), "5"),
            ("There are 35 and 49 ants and 2.5 l of tea. What is it?", ("<<(35+49)-2.5=81.5>>",), "81.5"),
            ("It has 10 rows of 100. How many seats?", ("<<10*100=1000>>",), "1000"),
        ]
        assert all(read_equation(step).holds for problem in found.problems for step in problem.steps)
        assert [line.line_number for line in found.rejected] == [4]


@pytest.mark.parametrize(
    ("write", "file"), [(write_json, "t.json"), (write_jsonl, "t.json"), (write_parquet, "t.parquet")]
)
def test_multiarith_is_a_list_of_questions_and_final_answers(tmp_path, write, file):
    rows = [
        {"question": " Ann has 3 pens. How many? ", "final_ans": "3"},
        {"question": "Q?", "final_ans": "a lot of " * 9},
    ]
    found = load_split("multiarith", "test", write(tmp_path / file, rows))
    assert found.problems == [Problem("Ann has 3 pens. How many?", (), "3")]
    assert [line.line_number for line in found.rejected] == [2]


@pytest.mark.parametrize("text", ["[1]", "[[", "", "3", '{"question": "Q?"}'])
def test_a_json_file_without_problems_is_one_clear_sentence(tmp_path, text):
    path = tmp_path / "t.json"
    path.write_text(text)
    assert "holds no problem" in complaint("multiarith", "test", str(path))


def test_our_own_lines_are_converted_too(tmp_path):
    path = tmp_path / "own.txt"
    path.write_text("How many?||<<1000*2=2000>> #### 2,000\nHow many?||<<1+1=2>> #### $2\nno problem\n")
    found = load_split("gsm8k", "test", str(path))
    assert [(problem.steps, problem.answer) for problem in found.problems] == [
        (("<<1000*2=2000>>",), "2000"),
        (("<<1+1=2>>",), "2"),
    ]
    assert [line.line_number for line in found.rejected] == [3]


@pytest.mark.parametrize(
    ("target", "text"),
    [
        (-9867630.0, "-9867630"),
        (3431580, "3431580"),
        (3244047.0999999996, "3244047.0999999996"),
        (14053029.666666666, "14053029.666666666"),
        (2.0107e-06, "2.0107e-06"),
        (0.0016791648, "0.0016791648"),
        (1e16, "10000000000000000"),
        (-0.0, "0"),
    ],
)
def test_numbers_of_gsm_hard_are_written_as_in_our_file(tmp_path, target, text):
    row = {"input": "How  many?", "code": "def solution():\n    return 1", "target": target}
    for path in (write_jsonl(tmp_path / "hard.jsonl", [row]), tmp_path / "hard.txt"):
        found = load_split("gsm-hard", "test", str(path))
        assert found.problems == [Problem("How  many?", (), text)]
        assert is_correct(str(target), text)
        write_problems(tmp_path / "hard.txt", found.problems)  # and our own line stays what it is


@pytest.mark.parametrize(
    ("written", "answer"),
    [
        *(("2,125", "2125"), ("$18", "18"), ("12%", "12"), ("7.50", "7.5"), ("-3", "-3"), ("5 cm", "5")),
        *(("25 (or 30)", "25"), ("1 234 567", "1234567"), ("3 1/2 feet", "7/2")),
    ],
)
def test_answers_are_written_as_the_grader_reads_them(tmp_path, written, answer):
    path = write_jsonl(tmp_path / "a.jsonl", [{"question": "Q?", "answer": f"It is so.\n#### {written}"}])
    assert load_split("gsm8k", "test", path).problems == [Problem("Q?", (), answer)]
    assert is_correct(answer, written)


def test_separators_of_unicode_break_no_line(tmp_path):
    question = "Ann\u2028has\x85 3\x0c\u2029apples\r and || 4\u00a0pears. How many?"
    row = {"question": question + "\nReally?", "answer": "<<3+4=7>>\n#### 7"}
    problems = load_split("gsm8k", "test", write_jsonl(tmp_path / "a.jsonl", [row, row])).problems
    write_problems(tmp_path / "out.txt", problems)
    assert read_problems(tmp_path / "out.txt").problems == 2 * [Problem(question + " Really?", ("<<3+4=7>>",), "7")]


def test_rows_that_are_no_problem_are_left_out_and_named(tmp_path):
    good = gsm8k_row(Problem("How many?", ("<<3+4=7>>",), "7"))
    bad = [
        good | {"answer": "It is 3+4=<<3+4=7>7.\n#### 7"},
        good | {"answer": "It is 7."},
        good | {"answer": "#### "},
        good | {"question": " "},
        {"question": "How many?"},
        good | {"answer": "<<3||4=7>>\n#### 7"},
        [1],
    ]
    path = Path(write_jsonl(tmp_path / "a.jsonl", [good, *bad, good]))
    path.write_bytes(path.read_bytes() + b"{broken\n")
    found = load_split("gsm8k", "test", str(path))
    assert len(found.problems) == 2  # duplicates stay
    assert [line.line_number for line in found.rejected] == [*range(2, 9), 10]
    reasons = [line.reason for line in found.rejected]
    assert "annotation" in reasons[0] and "“####”" in reasons[1] and "“question”" in reasons[3]
    assert "“answer”" in reasons[4] and "JSON" in reasons[6] and "JSON" in reasons[7]


@pytest.mark.parametrize("steps", [["She has 3+4=7 apples"], "<<3+4=7>>", [7], None, ["<<3+4=7>> apples"]])
def test_steps_that_do_not_parse(tmp_path, steps):
    good = aug_row(Problem("Q?", ("<<3+4=7>>",), "7"))
    found = load_split("gsm8k-aug", "train", write_jsonl(tmp_path / "a.jsonl", [good, good | {"steps": steps}]))
    assert len(found.problems) == 1 and "steps" in found.rejected[0].reason


@pytest.mark.parametrize("target", [True, "7", None, float("nan"), float("inf")])
def test_targets_that_are_no_number(tmp_path, target):
    rows = [{"input": "Q?", "target": 7.0}, {"input": "Q?", "target": target}]
    found = load_split("gsm-hard", "test", write_jsonl(tmp_path / "a.jsonl", rows))
    assert len(found.problems) == 1 and "“target”" in found.rejected[0].reason


def test_train_and_valid_of_gsm8k_share_nothing_and_lose_nothing(tmp_path):
    """The 20 problems are of those that the implicit-CoT split holds out; the others are not."""
    problems = read_problems(ROWS).problems
    others = [Problem(f"Ann has {number} apples. How many?", (), "7") for number in range(300)]
    path = write_jsonl(tmp_path / "train.jsonl", map(gsm8k_row, [*problems[:10], *others, *problems[10:]]))
    assert load_split("gsm8k", "valid", path).problems == problems
    assert load_split("gsm8k", "train", path).problems == others
    assert len(load_split("gsm8k", "test", path).problems) == 320


# ---------------------------------------------------------------------------------------------------- files and the Hub


def test_a_file_of_another_data_set_is_refused(tmp_path):
    hard = write_jsonl(tmp_path / "hard.jsonl", [{"input": "Q?", "target": 7.0}])
    assert "choose the data set" in complaint("gsm8k", "test", hard)
    parquet = write_parquet(tmp_path / "hard.parquet", [{"input": "Q?", "target": 7.0}])
    assert "no column “answer”" in complaint("gsm8k", "test", parquet)


def test_files_that_cannot_be_read(tmp_path):
    pytest.importorskip("pyarrow")
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(b"PAR1 and no more")
    assert "broken.parquet" in complaint("gsm8k", "test", str(broken))
    for name in ("none.parquet", "none.jsonl", "none.txt"):
        assert "does not exist" in complaint("gsm8k", "test", str(tmp_path / name))


def test_without_pyarrow_one_sentence_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert complaint("gsm8k", "test", str(tmp_path / "a.parquet")).endswith("pip install pyarrow.")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub that gives every file the 20 problems; what it was asked is kept."""
    asked = []
    rows = list(map(gsm8k_row, read_problems(ROWS).problems))

    def download(repo, file, repo_type, revision=None):
        asked.append((repo, file, revision))
        folder = tmp_path / "snapshots" / "c0ffee" / Path(file).parent
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / Path(file).name
        if repo == "ChilleD/SVAMP":
            return write_parquet(path, [svamp_row(row["question"], "And?", "( 3.0 + 4.0 )", "7") for row in rows])
        if repo == "ChilleD/MultiArith":
            return write_json(path, [{"question": row["question"], "final_ans": "7"} for row in rows])
        if repo == "reasoning-machines/gsm-hard":
            return write_jsonl(path, [{"input": row["question"], "target": 7.0} for row in rows])
        if repo == "whynlp/gsm8k-aug":
            return write_parquet(path, list(map(aug_row, read_problems(ROWS).problems)))
        return write_parquet(path, rows)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return asked


def test_a_split_is_named_where_a_file_could_be(hub):
    for name, known in SETS.items():
        for split, file in known.files.items():
            hub.clear()
            if (name, split) == ("gsm8k", "train"):  # nothing remains, for the 20 are all held out
                assert not list(iter_source("gsm8k:train"))
            else:
                assert len(load_problems(f"{name}:{split}").problems) == len(list(iter_source(f"{name}:{split}"))) == 20
            assert set(hub) == {(known.repo, file, known.revision)}


@pytest.mark.parametrize(("source", "splits"), [("gsm8k:dev", "train, valid, test"), ("gsm-hard:train", "test")])
def test_an_unknown_split_is_answered_with_those_there_are(source, splits):
    for read in (load_problems, iter_source):
        with pytest.raises(ProblemError, match=f"^{source}: .* has {splits}; "):
            read(source)


def test_where_the_hub_cannot_be_reached_the_way_around_is_told(monkeypatch):
    def download(*args, **kwargs):
        raise OSError("no route\nto host")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(ProblemError, match="^gsm8k-aug:train cannot be downloaded .no route.") as caught:
        load_problems("gsm8k-aug:train")
    told = str(caught.value)
    assert "https://huggingface.co/datasets/whynlp/gsm8k-aug/" in told and "--from FILE" in told and "\n" not in told


# -------------------------------------------------------------------------------------------------------------- overlap


def questions(*texts):
    return [Problem(text, (), "1") for text in texts]


def test_the_same_question_is_found_whatever_its_blanks_and_case():
    test = questions("Ann has 3 apples.  How many?", "Ben runs.")
    (found,) = find_overlap(questions("ann has 3 apples. How many?", "Ben walks.", "Ben runs. "), [test])
    assert (found.rows, found.same, found.renumbered, found.shared) == (3, 2, 0, 2)
    assert found.examples == ["ann has 3 apples. How many?", "Ben runs. "]


@pytest.mark.parametrize(
    ("question", "found"),
    [
        ("Ann has 12 apples and $4.50. How many?", True),
        ("Ann has 1,200 apples and $.5: how many?", True),
        ("Ben has 3 apples and $4. How many?", False),
        ("Ann has 3 apples and 3 pears and $4. How many?", False),
        ("Ann has many apples and $4. How many?", False),
    ],
)
def test_a_question_with_other_numbers_is_found(question, found):
    (overlap,) = find_overlap(questions(question), [questions("Ann has 3 apples and $4. How many?")])
    assert (overlap.same, overlap.renumbered) == (0, int(found))


# --------------------------------------------------------------------------------------------------------- command line


def test_data_converts_a_file(capsys, tmp_path):
    source = write_jsonl(tmp_path / "test.jsonl", [*map(gsm8k_row, read_problems(ROWS).problems), {}])
    output = tmp_path / "test.txt"
    assert main(["data", "gsm8k", "--split", "test", "--from", source, "--output", str(output)]) == 0
    told = capsys.readouterr()
    assert output.read_bytes() == ROWS.read_bytes()
    assert "20 problems, 4 of them without steps" in told.out and source in told.out
    assert "line 21" in told.err and "1 line rejected, 20 problems kept" in told.err


def test_data_downloads_and_says_which_commit_it_got(capsys, tmp_path, hub):
    output = ["--output", str(tmp_path / "out.txt")]
    assert main(["data", "gsm8k-aug", "--split", "valid", "--revision", "abc", *output]) == 0
    assert main(["data", "gsm-hard", *output]) == 0
    assert [revision for _, _, revision in hub] == ["abc", SETS["gsm-hard"].revision]
    assert "From whynlp/gsm8k-aug at commit c0ffee." in capsys.readouterr().out


def test_data_check_ends_with_2_where_a_training_problem_is_in_a_test_file(capsys, tmp_path):
    train, test = tmp_path / "train.txt", tmp_path / "test.txt.gz"
    write_problems(train, questions("Ann has 3 apples. How many?", "Ben has 4 pears. How many?"))
    write_problems(test, questions("Ann has 5 apples. How many?"))
    assert main(["data", "check", str(train), "--against", str(ROWS)]) == 0
    assert "2 problems" in capsys.readouterr().out
    assert main(["data", "check", str(train), "--against", str(ROWS), str(test)]) == 2
    told = capsys.readouterr()
    assert f"{ROWS}: 0 the same, 0 more" in told.out and f"{test}: 0 the same, 1 more" in told.out
    assert "Ann has 3 apples" in told.out and "Ben" not in told.out
    assert told.err.count("\n") == 1 and "take them out" in told.err


# ----------------------------------------------------------------------------------------- the examples of smollm2-135m


def test_the_examples_are_right_and_of_every_depth():
    examples = load_examples(SMOLLM2)
    assert 12 <= len(examples) <= 16
    assert {len(example.steps) for example in examples} == {1, 2, 3, 4, 5, 6}
    assert [len(example.question) for example in examples] == sorted(len(example.question) for example in examples)
    for example in examples:
        equations = [read_equation(step) for step in example.steps]
        assert all(equation is not None and equation.holds for equation in equations), example.steps
        assert is_correct(example.steps[-1].rpartition("=")[2].removesuffix(">>"), example.answer)
    assert len({example.question for example in examples}) == len(examples)
