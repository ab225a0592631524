"""The command line as a stranger meets it: help, errors in one sentence, exit codes, each command on tiny models."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rim_probe.bench import run_bench
from rim_probe.cli import main
from rim_probe.datasets.arithmetic import vocabulary
from rim_probe.memory import MemoryLayout
from rim_probe.model import RiM
from rim_probe.problems import Problem, read_problems
from rim_probe.training.scratch import small_llama, word_tokenizer

QUESTION = "Ann has 3 apples. Ann buys 4 more apples. How many apples does Ann have now?"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A random model with the closed vocabulary of the procedural world, saved with a gallery."""
    tokenizer = word_tokenizer(vocabulary())
    model = small_llama(tokenizer, layers=1, width=16, heads=2, inner=16, context=128, seed=0)
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny"
    RiM.attach(model.eval(), tokenizer, MemoryLayout(num_blocks=2)).save_pretrained(folder)
    examples = [
        {"question": "What is 3 + 4?", "steps": ["<<3+4=7>>"], "answer": "7"},
        {"question": QUESTION, "steps": ["<<3+4=7>>"], "answer": "7"},
    ]
    (folder / "examples.json").write_text(json.dumps(examples), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def data_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "test.txt"
    assert main(["data", "arithmetic", "--split", "test", "--rows", "6", "--output", str(path)]) == 0
    return path


def fails(capsys, *argv):
    """Runs a command that must fail with exit code 2 and one sentence on stderr; returns the sentence."""
    try:
        code = main([str(argument) for argument in argv])
    except SystemExit as stop:  # argparse ends the process itself
        code = stop.code
    captured = capsys.readouterr()
    assert code == 2
    assert captured.err.count("\n") == 1 and "Traceback" not in captured.err
    return captured.err.strip()


# ----------------------------------------------------------------------------------------------------------------- help


def test_help_lists_the_commands_and_loads_nothing_heavy():
    code = (
        "import sys\nfrom rim_probe.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "print(sorted({'torch', 'transformers', 'gradio', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for command in ("ask", "train", "eval", "bench", "data"):
        assert f"    {command} " in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_module_runs_as_a_program():
    done = subprocess.run([sys.executable, "-m", "rim_probe", "nonsense"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "nonsense" in done.stderr and "--help" in done.stderr


# --------------------------------------------------------------------------------------------------------------- errors


def test_mistyped_flags_are_told_in_one_sentence(capsys):
    assert "--num-blocks: '-1' is not a whole number from 0 on" in fails(capsys, "ask", "x", "--num-blocks", "-1")
    assert "'many'" in fails(capsys, "ask", "x", "--num-blocks", "many")
    assert "--method" in fails(capsys, "ask", "x", "--method", "magic")
    assert "--data" in fails(capsys, "eval", "somewhere")
    assert "above 0" in fails(capsys, "train", "recipe.yaml", "--max-minutes", "0")
    assert "COMMAND" in fails(capsys)


def test_missing_files_are_named(capsys, tmp_path, checkpoint, data_file):
    assert "no-such-folder" in fails(capsys, "ask", "1 + 1?", "--model", tmp_path / "no-such-folder")
    assert "none.txt" in fails(capsys, "eval", checkpoint, "--data", tmp_path / "none.txt")
    assert "none.yaml" in fails(capsys, "train", tmp_path / "none.yaml")
    assert "none" in fails(capsys, "bench", tmp_path / "none")
    world = ("data", "arithmetic", "--split", "test")
    assert "nowhere" in fails(capsys, *world, "--output", tmp_path / "nowhere" / "x.txt")


def test_an_output_is_checked_before_the_work(capsys, tmp_path, checkpoint, data_file, monkeypatch):
    monkeypatch.setattr("rim_probe.comparison.compare", lambda *a, **o: pytest.fail("the work was begun"))
    asked = ("eval", checkpoint, "--data", data_file, "--output")
    assert "does not exist" in fails(capsys, *asked, tmp_path / "nowhere" / "report.json")
    assert "is a folder" in fails(capsys, *asked, tmp_path)


def test_questions_that_cannot_be_asked(capsys, checkpoint):
    assert "empty" in fails(capsys, "ask", "  ", "--model", checkpoint)
    assert "characters" in fails(capsys, "ask", "apples " * 4000, "--model", checkpoint)
    assert "tokens" in fails(capsys, "ask", "apples " * 200, "--model", checkpoint)
    assert "blocks" in fails(capsys, "ask", QUESTION, "--model", checkpoint, "--num-blocks", "65")


def test_unknown_words_are_named_with_the_nearest_example(capsys, checkpoint):
    sentence = fails(capsys, "ask", "How many zebras does Ann have now?", "--model", checkpoint)
    assert "zebras" in sentence and sentence.endswith(f"Try for example: “{QUESTION}”")


def test_impossible_worlds_are_refused(capsys, tmp_path):
    world = ("data", "arithmetic", "--split", "test", "--output", tmp_path / "x.txt")
    assert "steps" in fails(capsys, *world, "--min-steps", "5", "--max-steps", "2")
    assert "operations" in fails(capsys, *world, "--operations", "%")
    for weight in ("nan", "inf"):
        assert "weights" in fails(capsys, *world, "--story", weight)
    for flag, value in (("--shuffle", "nan"), ("--distract", "7")):
        assert "between 0 and 1" in fails(capsys, *world, flag, value)
    assert "held_out_steps" in fails(capsys, *world, "--held-out-steps", "0")


def test_ctrl_c_ends_with_130(capsys, monkeypatch):
    def breaks(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("rim_probe.model.load_methods", breaks)
    assert main(["ask", QUESTION]) == 130
    assert capsys.readouterr().err == "Stopped.\n"


def test_too_little_memory_is_told(capsys, monkeypatch):
    def exhausts(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    monkeypatch.setattr("rim_probe.model.load_methods", exhausts)
    assert "ran out of memory" in fails(capsys, "ask", QUESTION)


# ------------------------------------------------------------------------------------------------------------------ ask


def test_ask_prints_readouts_and_costs(capsys, checkpoint):
    assert main(["ask", QUESTION, "--model", str(checkpoint), "--max-new-tokens", "4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines if not line.startswith(" ")] == ["memory", "cot", "direct"]
    assert [line.split()[:2] for line in lines if "probability" in line] == [["block", "1"], ["block", "2"]]
    assert [line for line in lines if "weights of memory answer" in line] == [
        f"  (there is no {method} model in {checkpoint}, so the weights of memory answer)"
        for method in ("cot", "direct")
    ]
    costs = [line for line in lines if " ms, " in line]
    assert len(costs) == 3 and all("pass" in line and "token" in line for line in costs)


def test_ask_as_json(capsys, checkpoint):
    assert main(["ask", QUESTION, "--model", str(checkpoint), "--json", "--max-new-tokens", "3"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["question"] == QUESTION
    assert [given["method"] for given in told["answers"]] == ["memory", "cot", "direct"]
    memory = told["answers"][0]
    assert len(memory["readouts"]) == 2 and memory["generated_tokens"] <= 3 and memory["total_seconds"] > 0


# ----------------------------------------------------------------------------------------------------------------- eval


def test_eval_writes_and_prints_a_report(capsys, checkpoint, data_file, tmp_path):
    damaged = tmp_path / "damaged.txt"
    damaged.write_text(data_file.read_text(encoding="utf-8") + "not a problem\n", encoding="utf-8")
    output = tmp_path / "report.json"
    options = ["--latency-samples", "2", "--max-new-tokens", "4", "--limit", "4", "--output", str(output)]
    assert main(["eval", str(checkpoint), "--data", str(damaged), *options]) == 0
    captured = capsys.readouterr()
    assert "line 7" in captured.err and "1 line rejected, 6 problems kept" in captured.err
    report = json.loads(output.read_text(encoding="utf-8"))
    [told] = [entry["report"] for entry in report["files"]]
    assert (told["done"], told["run"]["data"]["rejected"], told["run"]["limit"]) == (4, 1, 4)
    assert report["run"]["command"].startswith("python -m rim_probe eval ")
    assert [entry["num_blocks"] for entry in told["sweep"]] == list(range(17))
    assert "| RiM, final block" in captured.out and "K" in captured.out


def test_eval_of_one_method(capsys, checkpoint, data_file):
    options = ["--method", "cot", "--latency-samples", "0", "--max-new-tokens", "2"]
    assert main(["eval", str(checkpoint), "--data", str(data_file), *options]) == 0
    out = capsys.readouterr().out
    assert "chain of thought" in out and "RiM" not in out


# ---------------------------------------------------------------------------------------------------------- data, train


def test_data_is_reproducible_and_in_the_line_format(capsys, tmp_path, data_file):
    again, other = tmp_path / "again.txt", tmp_path / "other.txt.gz"
    for path, extra in ((again, []), (other, ["--seed", "1", "--max-steps", "1", "--operations", "+"])):
        options = ["--split", "test", "--rows", "6", "--output", str(path), *extra]
        assert main(["data", "arithmetic", *options]) == 0
    assert again.read_bytes() == data_file.read_bytes()
    problems = read_problems(other).problems
    assert len(problems) == 6 and all(len(problem.steps) == 1 and "+" in problem.steps[0] for problem in problems)
    assert "6 problems" in capsys.readouterr().out


def test_data_says_when_the_world_is_exhausted(capsys, tmp_path):
    options = ["--max-value", "4", "--max-steps", "1", "--story", "0", "--relation", "0", "--bare", "1"]
    output = ["--split", "test", "--output", str(tmp_path / "x.txt")]
    assert main(["data", "arithmetic", *output, *options]) == 0
    assert "not 1,000: this world holds no more" in capsys.readouterr().out


def test_train_hands_its_options_on(monkeypatch):
    seen = {}

    def train(recipe, **options):
        seen.update(options, recipe=recipe)
        return None if options["max_minutes"] else Path("out")

    monkeypatch.setattr("rim_probe.training.train", train)
    assert main(["train", "r.yaml", "--resume", "--max-minutes", "1.5", "--output", "out"]) == 75
    assert seen == {"recipe": "r.yaml", "resume": True, "max_minutes": 1.5, "output": "out", "trial": None}
    assert main(["train", "r.yaml", "--trial", "--batch-size", "2", "--output", "out"]) == 0
    assert str(seen["trial"]) == "30 steps of 2 rows a stage"


def test_train_refuses_options_that_do_nothing(capsys):
    assert "leave out --output" in fails(capsys, "train", "r.yaml", "--profile", "--output", "out")
    assert "a training takes the recipe's own" in fails(capsys, "train", "r.yaml", "--batch-size", "2")


# ---------------------------------------------------------------------------------------------------------------- bench


def test_bench_on_a_checkpoint(capsys, checkpoint, tmp_path):
    output = tmp_path / "bench.json"
    options = ["--questions", "2", "--train-batch", "2", "--train-steps", "1", "--json", str(output)]
    assert main(["bench", str(checkpoint), *options]) == 0
    report = json.loads(output.read_text(encoding="utf-8"))
    assert len(report["ratios"]) == 5 and report["num_blocks"] == 8
    assert report["loss_difference"] < 1e-5  # packed and separate rows do the same work
    out = capsys.readouterr().out
    assert out.count("\n| ") == 6 and "<= 1.15" in out


def test_bench_leaves_the_weights_as_they_are_and_stops_at_the_gold_length(rim):
    problem = Problem("Anna has 3 apples?", ("<<3+14=17>>",), "17")
    before = {name: tensor.clone() for name, tensor in rim.model.state_dict().items()}
    methods = dict.fromkeys(("memory", "cot", "direct"), rim)
    report = run_bench(methods, [problem, problem], num_blocks=2, train_batch=1, train_steps=1, progress=False)
    sides = {side["name"]: side["tokens"] for entry in report["ratios"] for side in (entry["first"], entry["second"])}
    assert 0 < sides["cot"]["median"] <= len(rim.encoder.chain_ids(problem))
    assert 0 < sides["memory"]["median"] <= len(rim.encoder.answer_ids(problem.answer))
    assert all(torch.equal(before[name], tensor) for name, tensor in rim.model.state_dict().items())
