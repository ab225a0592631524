"""Runs: their dictionary form, what a stranger may put into it, a visitor's history, three lanes, why one is faster."""

import copy
import json
import shutil
import subprocess
import sys
import threading

import pytest

from app import figures
from app.models import ModelShelf
from app.panels.race import Race
from app.runs import METHODS, Lane, Run
from app.session import MAX_HISTORY, Session, race
from rim_probe.errors import RiMError
from rim_probe.model import RiM


@pytest.fixture(scope="module")
def shelf(small_checkpoint, tmp_path_factory) -> ModelShelf:
    """The small checkpoint with a direct and a (damaged) stage-1 model of its own."""
    folder = tmp_path_factory.mktemp("more")
    shutil.copytree(small_checkpoint, folder / "small")
    RiM.from_pretrained(small_checkpoint).save_pretrained(folder / "small" / "direct")
    shutil.copytree(folder / "small" / "direct", folder / "small" / "stage1")
    (folder / "small" / "stage1" / "config.json").write_text("{")
    return ModelShelf(folder)


@pytest.fixture(scope="module")
def loaded(shelf):
    return shelf.load("small", readable=True)


@pytest.fixture(scope="module")
def run(shelf, loaded) -> Run:
    """A finished run with three lanes, a reading and an experiment."""
    from rim_probe.probing.reading import read
    from rim_probe.probing.surgery import operate

    problem = shelf.examples("small")[2]
    run = Run("small", problem.question, problem.answer, 3, "a machine", steps=problem.steps, matched=False)
    run.lanes = {method: Lane() for method in METHODS}
    for _ in race(loaded, run):
        pass
    run.reading = read(
        loaded.roles, loaded.readers, run.question, num_blocks=3, gold=run.gold, steps=run.steps
    ).to_dict()
    run.surgery = operate(loaded.roles["memory"], run.question, {2: "blank"}, num_blocks=3, gold=run.gold)
    return run


# ------------------------------------------------------------------------------------------------- the dictionary form


def test_a_run_survives_its_file(run):
    data = json.loads(json.dumps(run.to_dict()))
    assert set(METHODS) <= set(data) and data["steps"] and data["reading"] and data["surgery"]
    again = Run.from_dict(data)
    assert again.to_dict() == run.to_dict()
    assert again.drawable()["surgery"]["actions"] == {"2": "blank"}


def test_the_older_format_is_still_read(run):
    data = json.loads(json.dumps(run.to_dict())) | {"format": "rim-probe-run/1"}
    for key in ("steps", "seed", "reading", "surgery", "counterfactual", "direct"):
        del data[key]
    old = Run.from_dict(data)
    assert old.steps == () and old.reading is None and list(old.lanes) == ["memory", "cot"]


DAMAGES = {
    "format": "other/1",
    "question": "",
    "gold": ["4"],
    "num_blocks": True,
    "steps": "<<1+1=2>>",
    "status": "running",
    "checkpoint": "x" * 1000,
    "machine": None,
    "seed": 0.5,
    "memory": None,
    "cot": {"events": [], "answer": {}, "correct": None},
    "direct": {"events": [{"kind": "token", "seconds": "1", "text": ""}], "answer": None, "correct": None},
    "reading": {"format": "rim-probe-reading/1"},
    "surgery": {"format": "rim-probe-surgery/1"},
    "counterfactual": [],
}


@pytest.mark.parametrize("data", [None, 7, [], {}, "x", {"format": "rim-probe-run/2"}])
def test_something_else_than_a_run_gives_one_sentence(data):
    with pytest.raises(RiMError):
        Run.from_dict(data)


def test_the_stage_offers_every_moment_of_the_race_as_a_table(run):
    assert figures.stage(run).count("<tr>") > sum(len(lane.events) for lane in run.lanes.values())


# --------------------------------------------------------------------------------------------------------- the history


def test_history_is_bounded(run):
    session, runs = Session(), [copy.copy(run) for _ in range(MAX_HISTORY + 3)]
    for one in runs:
        session.add(one)
    assert list(session.runs) == runs[3:] and session.run is runs[-1] and session.shown == MAX_HISTORY - 1
    assert session.show(0) is runs[3] is session.run
    assert session.run.reading == run.reading
    with pytest.raises(RiMError, match="no longer"):
        session.show(MAX_HISTORY)


def test_a_recorded_run_is_shown_beside_the_history(run):
    session = Session()
    session.add(copy.copy(run))
    session.show_recorded(run, 2)
    assert session.run is run and session.recorded == 2 and session.shown is None and len(session.runs) == 1
    session.show(0)
    assert session.recorded is None


# ----------------------------------------------------------------------------------------------------------- the shelf


def test_controls_and_probes_come_after_the_race_and_damage_is_a_note(shelf, loaded):
    assert set(loaded.roles) == {"memory", "direct"}, "no cot of its own, and stage1 is damaged"
    assert loaded.readers.complaints and "stage1" in loaded.note
    states = [told["model_state"] for told in Race(shelf).watch_model("small", Session()) if told]
    assert states[-1].count("stage1") == 1
    assert shelf.has("small", "direct") and not shelf.has("small", "cot") and not shelf.has(None, "direct")


def test_a_race_does_not_wait_for_the_probes(small_checkpoint, monkeypatch):
    go = threading.Event()
    monkeypatch.setattr("app.models._load_readers", lambda *_: go.wait(60))
    shelf = ModelShelf(small_checkpoint.parent)
    assert shelf.load("small").models and not shelf.start("small").readable.done()
    go.set()


# ---------------------------------------------------------------------------------------------------------- three lanes


def test_direct_is_a_lane_where_it_was_asked_for(shelf, run):
    drawn = figures.stage(run)
    assert drawn.count('class="lane direct"') == 1 and "Direct:" in drawn
    assert drawn.count('<tr class="') == 3, "what every method took"
    asked = shelf.examples("small")[0].question
    for methods, lanes in ((METHODS, list(METHODS)), (METHODS[:2], ["memory", "cot"])):
        panel = Race(shelf)
        *_, last = panel.answer(panel.prepare(asked, 2, "", "small", methods=methods))
        assert list(last.lanes) == lanes and last.status == "done"


def test_reading_a_file_needs_no_torch():
    code = "import sys, app.run_format, app.recorded; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
