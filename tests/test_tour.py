"""The tour without a browser: every sentence is made from what was computed, and whatever fails leaves a way on."""

import re
import threading
import types
from html import unescape
from pathlib import Path

import pytest

from app.models import ModelShelf
from app.panels.inspect import Inspector
from app.panels.race import Race
from app.panels.tour import KNOWN, START, TITLES, TRAINED, Tour
from app.session import Session
from app.view import Looking
from rim_probe.errors import RiMError
from rim_probe.probing.matches import spelled

GLASS = Path(__file__).parent.parent / "checkpoints" / "glass-box"
STEPS = [str(number) for number in range(1, len(TITLES) + 1)]


@pytest.fixture(scope="module")
def tour(tmp_path_factory) -> Tour:
    """Over two glass boxes, one of them under the trained one's name."""
    folder = tmp_path_factory.mktemp("toured")
    for name in (KNOWN, TRAINED):
        (folder / name).symlink_to(GLASS)
    race = Race(ModelShelf(folder), folder)
    return Tour(race, Inspector(race))


class Visitor:
    def __init__(self, tour: Tour):
        self.tour, self.session, self.looking = tour, Session(), Looking()
        self.page: dict = {}
        self.events: list[dict] = []

    def take(self, step) -> str:
        """The card that stands at the end of a step, as text."""
        event = types.SimpleNamespace(_data={"step": step})
        self.events = list(self.tour.step(self.session, self.looking, event))
        for changes in self.events:
            self.page |= changes
        return unescape(re.sub("<[^>]*>", "", self.page["tour"]))


@pytest.fixture
def visitor(tour) -> Visitor:
    return Visitor(tour)


def test_five_steps_run_one_experiment(visitor):
    told = [visitor.take(step) for step in STEPS[:4]]
    run = visitor.session.run
    found = run.counterfactual
    assert run.checkpoint == KNOWN and len(visitor.session.runs) == 1, "one race, one experiment"
    assert found["blocks"] == [2] and found["came"]
    assert f"read {run.num_blocks} memory blocks" in told[0]
    assert spelled(run.steps[1]) in told[1] and re.search(r"cosine \d\.\d\d", told[1])
    assert found["change"] in told[2] and f"turn its answer {found['own']} into exactly {found['expected']}" in told[2]
    assert f"predicted {found['expected']}, and it says {found['said']}" in told[3]
    assert found["control"]["said"] in told[3] and "in this trial" in told[3]
    assert visitor.looking.panel == "surgery" and "surgery-result good" in visitor.page["panel"]
    last = visitor.take(STEPS[4])
    assert visitor.session.run.checkpoint == TRAINED and visitor.page["model"] == TRAINED
    assert "One trial proves little" in last and "Finish" in last


def test_the_outcome_is_not_on_the_page_before_the_experiment(visitor):
    visitor.take("1")
    visitor.take("3")
    assert "surgery-result" not in visitor.page["panel"] and "Nothing is changed yet" in visitor.page["panel"]
    assert visitor.session.run.surgery is None and "v.try" not in visitor.page["panel"]


def test_one_may_go_back_and_begin_in_the_middle(visitor):
    assert "The experiment" in visitor.take("4") and visitor.session.run.counterfactual["came"]
    assert visitor.take("2").startswith("2 of 5") and visitor.looking.panel == "blocks"


@pytest.mark.parametrize(
    ("step", "change"),
    [("4", {"control": {"what": "x", "said": "9", "outcome": "expected"}}), ("5", {"control": None})],
)
def test_what_came_with_the_control_too_is_not_called_proof(visitor, monkeypatch, change, step):
    import rim_probe.probing.trial as trial

    real = trial.try_counterfactual
    monkeypatch.setattr(trial, "try_counterfactual", lambda *given, **options: real(*given, **options) | change)
    told = visitor.take(step)
    assert "in this trial" not in told and ("shows nothing" in told or "no control" in told)


@pytest.mark.parametrize("step", ["0", "6", "close", "²", None, ["1"], "<img>"])
def test_any_other_step_closes_the_tour(visitor, step):
    assert visitor.take(step) == "" and visitor.page["tour"] == START and len(visitor.events) == 1


@pytest.mark.parametrize("error", [RiMError("No partner & no <claim>."), RuntimeError("CUDA error")])
def test_what_fails_is_a_sentence_and_can_be_tried_again(visitor, monkeypatch, error):
    visitor.take("2")

    def fail(*_, **__):
        raise error

    monkeypatch.setattr("rim_probe.probing.trial.try_counterfactual", fail)
    told = visitor.take("3")
    assert "Try again" in told and ("No partner & no <claim>." in told or "did not work" in told)
    assert "<claim>" not in visitor.page["tour"] and visitor.page["stop"].interactive is False
    monkeypatch.undo()
    assert "must turn its answer" in visitor.take("3")


def test_it_is_offered_only_where_both_models_are(tour, tmp_path):
    (tmp_path / KNOWN).symlink_to(GLASS)
    race = Race(ModelShelf(tmp_path), tmp_path)
    assert tour.offered and not Tour(race, Inspector(race)).offered


def test_two_visitors_take_it_at_once(tour):
    visitors, told = [Visitor(tour), Visitor(tour)], {}
    threads = [threading.Thread(target=lambda one=one: told.update({id(one): one.take("4")})) for one in visitors]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(told.values())) == 1 and visitors[0].session.run is not visitors[1].session.run
