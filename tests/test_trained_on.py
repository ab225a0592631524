"""What a checkpoint was trained on: which questions are unlike it, and who says so."""

import json
import shutil

import pytest
import yaml

from app import figures
from app.api import Endpoints
from app.models import ModelShelf
from app.panels.race import Race
from app.runs import Run
from rim_probe.cli import main
from rim_probe.datasets.arithmetic import World, generate
from rim_probe.model import RiM, export
from rim_probe.problems import Problem, write_problems
from rim_probe.trained_on import TrainedOn
from rim_probe.training import train

WORLD = World(max_value=9, max_steps=2, bare=0.2)
LIKE = "Ann has 3 apples. Ann buys 4 more apples. How many apples does Ann have now?"
UNLIKE = "Ann has 300 apples. Ann buys 400 more apples. How many apples does Ann have now?"


@pytest.fixture(scope="module")
def closed() -> TrainedOn:
    return TrainedOn.of(list(generate(WORLD, "train", 1500, 1)), closed=True)


@pytest.mark.parametrize(
    ("question", "words"),
    [
        (UNLIKE, "300 and 400"),
        ("what is 3 + 4 - 12 ?", "here 12"),
        ("what is 2.5 + 3 ?", "2.5"),
        ("what is -3 + 4 ?", "here -3"),
        ("what is 1,234 + 1 ?", "1,234"),
        (LIKE.replace("apples", "zeppelins"), "“zeppelins”"),
        ("Сколько будет 3 + 4 ?", "Cyrillic"),
        (LIKE * 10, "here 190"),
        ("what is " + "9" * 400 + " + 1 ?", "numbers from 1 to 9"),
    ],
)
def test_what_is_outside_is_named_in_one_sentence(closed, question, words):
    told = closed.outside(question)
    assert words in told and "\n" not in told and len(told) < 1000


def test_what_is_inside_is_left_alone(closed):
    for split in ("train", "valid", "test"):
        for problem in generate(WORLD, split, 200, 5):
            assert closed.outside(problem.question) is None
    for question in (LIKE, "what is 7-3 ?", "What is 7 - 3 ?"):  # a minus is no sign of a negative number
        assert closed.outside(question) is None


def test_an_open_vocabulary_knows_new_words_and_another_language():
    problems = [
        Problem(f"{p.question} Please, tell me it now.", p.steps, "1") for p in generate(WORLD, "train", 900, 1)
    ]
    known = TrainedOn.of(problems, closed=False)
    assert known.outside(LIKE.replace("apples", "zeppelins")) is None
    assert "language" in known.outside(
        "Anna hat drei Bälle und kauft noch vier dazu, wie viele hat Anna nun insgesamt?"
    )


def test_training_writes_it_and_saving_loading_and_exporting_keep_it(tmp_path):
    stage = {"objective": "direct", "rows": 4, "batch_size": 4, "learning_rate": 1e-3, "validate_every": 1}
    recipe = {
        "output": str(tmp_path / "out"),
        "scratch": {"layers": 1, "width": 16, "heads": 2, "inner": 32, "context": 256},
        "data": {"world": {"max_value": 9, "max_steps": 2}, "rows": 300, "validation_rows": 0},
        "stages": [stage | {"name": "one"}, stage | {"name": "two"}],
    }
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    out = train(file, report=lambda line: None)
    known = RiM.from_pretrained(out).trained_on
    assert known.problems == 300 and known.closed and known.outside(UNLIKE)
    assert RiM.from_pretrained(out / "one").trained_on == known
    assert RiM.from_pretrained(export(out, tmp_path / "plain")).trained_on == known
    (out / "trained_on.json").unlink()
    assert main(["train", str(file), "--describe", str(out)]) == 0
    assert RiM.from_pretrained(out).trained_on == known
    assert main(["train", str(file), "--describe", str(tmp_path)]) == 2


@pytest.fixture(scope="module")
def told(small_checkpoint, closed, tmp_path_factory):
    """A checkpoint that says what it was trained on."""
    folder = tmp_path_factory.mktemp("told") / "small"
    shutil.copytree(small_checkpoint, folder)
    closed.save(folder)
    return folder


def test_ask_and_probe_say_it_before_the_answer(told, capsys):
    for command in (["ask", UNLIKE, "--model", str(told)], ["probe", str(told), "--question", UNLIKE]):
        assert main([*command]) == 0
        assert "here 300 and 400" in capsys.readouterr().out.splitlines()[0]
    assert main(["ask", LIKE, "--model", str(told), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["outside"] is None


def test_eval_counts_them(told, tmp_path, capsys):
    write_problems(tmp_path / "data.txt", [Problem(LIKE, (), "7"), Problem(UNLIKE, (), "700")])
    options = ["--method", "direct", "--latency-samples", "0", "--max-new-tokens", "2"]
    assert main(["eval", str(told), "--data", str(tmp_path / "data.txt"), *options]) == 0
    assert "1 question is unlike" in capsys.readouterr().err


def test_the_page_and_the_api_say_it_and_a_saved_run_keeps_it(told):
    race = Race(ModelShelf(told.parent))
    run = race.prepare(UNLIKE, 2, None, "small")
    assert "here 300 and 400" in figures.stage(run)  # drawn while it waits for its answer
    run.status = "done"
    saved = run.to_dict()
    assert Run.from_dict(saved).outside == saved["outside"] == run.outside
    endpoints = Endpoints(race)
    for name in ("run", "blocks"):
        assert getattr(endpoints, name)(UNLIKE, 2)["outside"] == run.outside
        assert getattr(endpoints, name)(LIKE, 2)["outside"] is None
    assert endpoints.surgery(UNLIKE, {"1": "blank"}, num_blocks=2)["outside"] == run.outside
