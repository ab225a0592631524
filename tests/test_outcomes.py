"""Examples by failure: counting outcomes, keeping a few, offering them in the gallery."""

import json
import shutil

import pytest

from app import recorded
from app.models import ModelShelf
from app.panels.race import Race
from rim_probe import outcomes
from rim_probe.gallery import load_examples
from rim_probe.model import RiM
from rim_probe.problems import Problem, write_problems


@pytest.fixture(scope="module")
def checkpoint(small_checkpoint, tmp_path_factory):
    """The small checkpoint with a CoT model of its own."""
    folder = tmp_path_factory.mktemp("outcomes") / "small"
    shutil.copytree(small_checkpoint, folder)
    RiM.from_pretrained(small_checkpoint).save_pretrained(folder / "cot")
    return folder


def test_outcomes_are_counted_and_offered(checkpoint, tmp_path, capsys):
    problems = load_examples(checkpoint)
    file = tmp_path / "small-outcomes.json"
    write_problems(tmp_path / "some.txt", [*problems, Problem("Ann has 3 zeppelins.", (), "3")])
    assert outcomes.main([str(checkpoint), str(tmp_path / "some.txt"), "--output", str(file)]) == 0
    assert f"of {len(problems)}" in capsys.readouterr().out, "what cannot be asked is not counted"
    found = recorded.outcomes("small", tmp_path)
    assert found.n == len(problems) and found.data == "some.txt" and "rim_probe.outcomes" in found.command
    assert all(len(kept) <= outcomes.KEPT for kept in found.examples.values())
    offered = {what for _, what in Race(ModelShelf(checkpoint.parent), tmp_path).offered("small")}
    for name, kept in found.examples.items():
        assert (name in offered) == bool(kept)


def test_without_a_cot_model_there_is_nothing_to_compare(small_checkpoint, tmp_path, capsys):
    assert outcomes.main([str(small_checkpoint), "none.txt", "--output", str(tmp_path / "none.json")]) == 1
    assert "no CoT model of its own" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["{", "[]", json.dumps({"format": "other"}), "null", "[" * 100_000])
def test_damaged_outcomes_leave_the_examples(checkpoint, tmp_path, text):
    (tmp_path / "small-outcomes.json").write_text(text)
    shelf = ModelShelf(checkpoint.parent)
    race = Race(shelf, tmp_path)
    assert race.offered("small") and "small-outcomes.json cannot be shown" in race.state("small", shelf.load("small"))
