"""Evaluation: statistics against known values, the report against hand-made outcomes and against the real decoder."""

import hashlib
import json
from types import SimpleNamespace

import pytest
import torch

from rim_probe import evaluation
from rim_probe.decoding import Answer, Readout, answer
from rim_probe.errors import QuestionError
from rim_probe.evaluation import describe_run, evaluate, mcnemar_p, proportion, wilson_interval
from rim_probe.memory import MemoryLayout
from rim_probe.problems import Problem, is_correct, read_problems

# ----------------------------------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [  # Newcombe, Statistics in Medicine 17 (1998), table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (20, 20, 1 - 0.1611, 1.0),
    ],
)
def test_wilson_interval_equals_published_values(right, n, low, high):
    assert wilson_interval(right, n) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(
    ("first", "second", "p"),
    [(0, 0, 1.0), (5, 5, 1.0), (0, 1, 1.0), (1, 9, 22 / 1024), (0, 10, 2 / 1024), (8, 2, 112 / 1024)],
)
def test_mcnemar_is_the_exact_binomial_test(first, second, p):
    assert mcnemar_p(first, second) == mcnemar_p(second, first) == pytest.approx(p)


# --------------------------------------------------------------------------------------------- the report, made by hand

# Each problem's question is a key of WRITTEN; its gold answer is always 1.
WRITTEN = {
    # question: (readouts of memory after blocks 1 and 2, chain of thought, direct, blocks removed)
    "one step, all right": (("1", "1"), "1", "1", "0"),
    "one step, memory refines": (("0", "1"), "1", "0", "0"),
    "two steps, memory spoils": (("1", "0"), "1", "1", "1"),
    "two steps, only cot": (("0", "0"), "1", "0", "0"),
    "two steps, none": (("0", "0"), "0", "0", "0"),
}
STEPS = {"one": ("<<0+1=1>>",), "two": ("<<2-2=0>>", "<<0+1=1>>")}
PROBLEMS = [Problem(question, STEPS[question.split()[0]], "1") for question in WRITTEN]


def fake_rim(name="fake", refuse=()):
    """What `evaluate` needs of a RiM, without a model."""

    def prompt_ids(question, method, num_blocks=None):
        if question in refuse:
            raise QuestionError("too long")
        return [0]

    return SimpleNamespace(name=name, layout=MemoryLayout(num_blocks=2), dtype=torch.float32, prompt_ids=prompt_ids)


def fake_answer(question, method, num_blocks):
    """An Answer as the table above says; blocks beyond the second repeat the second."""
    memory, cot, direct, removed = WRITTEN[question]
    values = {"cot": [cot], "direct": [direct]}.get(method)
    readouts = ()
    if method == "memory":
        values = [removed] if num_blocks == 0 else [memory[min(k, 1)] for k in range(num_blocks)]
        first = 1 if num_blocks else 0
        readouts = tuple(Readout(first + k, value, value, (1, 0), 0.5) for k, value in enumerate(values))
    tokens = {"memory": 2, "cot": 20, "direct": 3}[method]
    return Answer(method, question, values[-1], values[-1], (1,), None, 0.0, tokens, tokens, 9, 4096, readouts)


@pytest.fixture
def faked(monkeypatch):
    """Puts the table in the place of the decoder; returns the list of what was asked."""
    asked = []

    def batch(rim, questions, method, *, num_blocks=None, max_new_tokens=256):
        asked.append((method, num_blocks, tuple(questions)))
        return [fake_answer(question, method, num_blocks) for question in questions]

    monkeypatch.setattr(evaluation, "answer_batch", batch)
    return asked


def fake_methods(**options):
    return {name: fake_rim(name, **options) for name in ("memory", "cot", "direct")}


def run(methods=None, problems=PROBLEMS, **options):
    options = {"batch_size": 2, "block_sweep": (0, 1, 2, 4), "progress": False} | options
    return evaluate(methods or fake_methods(), problems, **options)


def rights(cell):
    return {key: [p["right"] for p in value] if key == "blocks" else value["right"] for key, value in cell.items()}


def test_accuracy_of_every_block_any_block_and_by_steps(faked):
    accuracy = run()["accuracy"]
    assert rights(accuracy["memory"]["all"]) == {"final": 2, "any_block": 3, "blocks": [2, 2]}
    assert rights(accuracy["memory"]["by_steps"]["1"]) == {"final": 2, "any_block": 2, "blocks": [1, 2]}
    assert rights(accuracy["memory"]["by_steps"]["2"]) == {"final": 0, "any_block": 1, "blocks": [1, 0]}
    assert rights(accuracy["cot"]["all"]) == {"final": 4}
    assert rights(accuracy["direct"]["by_steps"]["2"]) == {"final": 1}
    assert {count: cell["final"]["n"] for count, cell in accuracy["cot"]["by_steps"].items()} == {"1": 2, "2": 3}


def test_paired_counts(faked):
    direct, cot = run()["paired"]
    assert (direct["first"], direct["second"], cot["second"]) == ("memory", "direct", "cot")
    cells = ("both_right", "only_first", "only_second", "both_wrong")
    assert [direct[cell] for cell in cells] == [1, 1, 1, 2]
    assert [cot[cell] for cell in cells] == [2, 0, 2, 1]
    assert cot["p_value"] == mcnemar_p(0, 2)


def test_sweep_with_blocks_removed_at_its_start(faked):
    sweep = run()["sweep"]
    assert [(entry["num_blocks"], entry["right"]) for entry in sweep] == [(0, 1), (1, 2), (2, 2), (4, 2)]
    # Readout k does not depend on later blocks, so three runs serve every K: the asked one, the largest, and none.
    assert {count for method, count, _ in faked if method == "memory"} == {2, 4, 0}


def test_refused_questions_count_as_wrong(faked):
    refused = ("one step, all right", "two steps, none")
    report = run(fake_methods(refuse=refused))
    assert report["accuracy"]["cot"]["refused"] == 2
    assert report["accuracy"]["cot"]["all"]["final"] == proportion([True, True, True, False, False])
    assert rights(report["accuracy"]["memory"]["all"]) == {"final": 1, "any_block": 2, "blocks": [1, 1]}


def test_ctrl_c_keeps_whole_groups_of_every_method(faked, monkeypatch):
    calls = {"direct": 0}
    real = evaluation.answer_batch

    def breaks(rim, questions, method, **options):
        if method == "direct":
            calls["direct"] += 1
            if calls["direct"] == 5:  # the first problem of the second group
                raise KeyboardInterrupt
        return real(rim, questions, method, **options)

    monkeypatch.setattr(evaluation, "answer_batch", breaks)
    report = run(batch_size=1)
    assert report["interrupted"] is True
    assert (report["requested"], report["done"]) == (5, 4)
    assert {cell["all"]["final"]["n"] for cell in report["accuracy"].values()} == {4}


def test_description_of_a_run_names_data_and_machine(tmp_path):
    data_file = tmp_path / "test.txt"
    data_file.write_text("What is 1 + 1?||<<1+1=2>> #### 2\nno problem\n", encoding="utf-8")
    data = read_problems(data_file)
    run = describe_run("box", data, data_file, None, torch.device("cpu"), "python -m rim_probe eval box")
    assert run["data"]["sha256"] == hashlib.sha256(data_file.read_bytes()).hexdigest()
    assert (run["data"]["problems"], run["data"]["rejected"]) == (1, 1)
    assert "line 2" in run["data"]["first_rejected"][0]
    machine = run["machine"]
    assert machine["versions"]["torch"] == torch.__version__ and machine["threads"] >= 1 and machine["cpu"]
    assert json.loads(json.dumps(run)) == run


# ------------------------------------------------------------------------------------------------ with the real decoder


def test_figures_equal_those_of_single_answers(make_rim):
    rim = make_rim(num_blocks=2)
    questions = ["Anna has 3 apples?", "How many apples has she?", "3 + 14?", "more more more 5"]
    # A random model is never right, so the answers it gives are made the gold of the first half.
    gold = [answer(rim, question, "memory", max_new_tokens=4).value or "" for question in questions]
    problems = [Problem(question, (), gold[i] if i < 2 else "no such answer") for i, question in enumerate(questions)]
    report = evaluate(
        {"memory": rim, "cot": rim, "direct": rim},
        problems,
        batch_size=3,
        max_new_tokens=4,
        block_sweep=(0, 1, 2, 3),
        progress=False,
    )

    def right(method, **options):
        return sum(
            is_correct(answer(rim, p.question, method, max_new_tokens=4, **options).value, p.answer) for p in problems
        )

    assert report["accuracy"]["memory"]["all"]["final"]["right"] == right("memory") > 0
    assert report["accuracy"]["cot"]["all"]["final"]["right"] == right("cot")
    assert report["accuracy"]["direct"]["all"]["final"]["right"] == right("direct")
    assert [entry["right"] for entry in report["sweep"]] == [right("memory", num_blocks=k) for k in (0, 1, 2, 3)]
    assert list(report["accuracy"]["memory"]["by_steps"]) == ["0"]
