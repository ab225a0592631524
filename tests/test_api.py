"""The panels as endpoints: what they give, what they refuse, what they document."""

import json
import threading
import types

import gradio as gr
import pytest

from app import api
from app.api import ENDPOINTS, Endpoints
from app.demo import build_demo
from app.models import ModelShelf
from app.panels.race import Race
from app.session import Cancellations

READINGS = ("blocks", "attention", "layers", "trajectory")
VISITOR = types.SimpleNamespace(session_hash="someone")


@pytest.fixture(scope="module")
def shelf(small_checkpoint) -> ModelShelf:
    return ModelShelf(small_checkpoint.parent)


@pytest.fixture(scope="module")
def endpoints(shelf) -> Endpoints:
    return Endpoints(Race(shelf))


@pytest.fixture(scope="module")
def question(shelf) -> str:
    return shelf.examples("small")[1].question


def test_every_panel_gives_its_part_as_plain_data(endpoints, question, monkeypatch):
    import rim_probe.probing.reading as reading

    read, calls = reading.read, []
    monkeypatch.setattr(reading, "read", lambda *given, **options: calls.append(given) or read(*given, **options))
    parts = {name: getattr(endpoints, name)(VISITOR, question, 4) for name in READINGS}
    assert len(calls) == 1
    for part in parts.values():
        assert json.loads(json.dumps(part)) == part
        assert part["question"] == question and part["num_blocks"] == 4 and part["complaints"]
    assert len(parts["blocks"]["readouts"]) == 4 and parts["attention"]["probes"]["attention"]
    assert (
        parts["layers"]["probes"]["depth"]["modes"] and parts["trajectory"]["probes"] == {}
    )  # it has no fitted probes


def test_only_the_last_readings_are_kept(endpoints, question, monkeypatch):
    monkeypatch.setattr(api, "KEPT_READINGS", 2)
    for blocks in (1, 2, 3):
        endpoints.blocks(VISITOR, question, blocks)
    assert [key[2] for key in endpoints._readings] == [2, 3]


def test_surgery_takes_its_blocks_layers_and_partner(endpoints, shelf, question):
    partner = shelf.examples("small")[0].question
    found = endpoints.surgery(VISITOR, question, {"2": "blank", "3": "swap"}, partner, first_layer=0, num_blocks=4)
    assert found["actions"] == {"2": "blank", "3": "swap"} and found["layers"] == [0, 1]
    assert found["partner"] == partner and len(found["after"]["readouts"]) == 4


def test_evidence_names_what_is_missing(endpoints):
    assert endpoints.evidence(VISITOR)["complaints"]


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("run", {"question": ""}, "empty"),
        ("blocks", {"question": "x" * 20_001}, "characters"),
        ("blocks", {"question": "3 + 4 = ?", "num_blocks": 99}, "from 0 to 16"),
        ("layers", {"question": "3 + 4 = ?", "gold": "9" * 200}, "correct answer"),
        ("attention", {"question": "3 + 4 = ?", "model": "../../etc"}, "choose one of small"),
        ("trajectory", {"question": "zeppelin"}, "never seen"),
        ("surgery", {"question": "3 + 4 = ?", "actions": {"99": "blank"}}, "no block '99'"),
        ("surgery", {"question": "3 + 4 = ?", "actions": {"1": "explode"}}, "explode"),
        ("surgery", {"question": "3 + 4 = ?", "actions": {"1": "swap"}}, "second question"),
        ("surgery", {"question": "3 + 4 = ?", "actions": {}, "seed": -1}, "seed"),
        ("surgery", {"question": "3 + 4 = ?", "actions": {"1": "blank"}, "first_layer": 7}, "layer"),
        ("counterfactual", {"question": "3 + 4 = ?", "seed": 2**40}, "."),
        ("evidence", {"model": "nobody"}, "choose one of small"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(endpoints, name, arguments, words):
    with pytest.raises(gr.Error) as error:
        getattr(endpoints, name)(VISITOR, **arguments)
    assert words in str(error.value.message) and "\n" not in str(error.value.message)


def test_a_failure_is_a_sentence_too_and_leaves_no_switch(endpoints, question, monkeypatch):
    monkeypatch.setattr("rim_probe.probing.surgery.operate", lambda *_, **__: 1 / 0)
    with pytest.raises(gr.Error, match="did not work"):
        endpoints.surgery(VISITOR, question, {"1": "blank"})
    assert endpoints._race.cancellations._switches == {}


def test_a_client_who_has_gone_does_not_wait_for_the_model(small_checkpoint, monkeypatch):
    monkeypatch.setattr("app.models._load_somewhere", lambda *_: threading.Event().wait())
    endpoints = Endpoints(Race(ModelShelf(small_checkpoint.parent)))
    threading.Timer(0.1, lambda: endpoints._race.cancellations.stop("someone")).start()
    with pytest.raises(gr.Error, match="gone"):
        endpoints.blocks(VISITOR, "3 + 4 = ?")


def test_every_argument_is_documented(shelf):
    documented = build_demo(shelf).get_api_info()["named_endpoints"]
    assert list(documented) == [f"/{name}" for name in ENDPOINTS]
    for endpoint in documented.values():
        assert endpoint["description"]
        for parameter in endpoint["parameters"]:
            assert parameter["parameter_name"] != "request"
    from gradio.utils import get_function_description

    for name in ENDPOINTS:
        _, parameters, returns = get_function_description(getattr(Endpoints, name))
        assert returns and all(text for key, text in parameters.items() if key not in ("self", "request"))


def test_switches_survive_threads_of_one_session():
    switches, lost = Cancellations(), []

    def work():
        for _ in range(300):
            switch = switches.start("me")
            with switches._lock:
                if switch not in switches._switches.get("me", ()):
                    lost.append(switch)
            switches.finish("me", switch)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not lost and switches._switches == {}
