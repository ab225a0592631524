"""The panels as endpoints: what they give, what they refuse, what they document."""

import json

import gradio as gr
import pytest

from app.api import ENDPOINTS, Endpoints
from app.demo import build_demo
from app.models import ModelShelf
from app.panels.race import Race

READINGS = ("blocks", "attention", "layers", "trajectory")


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
    parts = {name: getattr(endpoints, name)(question, 4) for name in READINGS}
    assert len(calls) == 1
    for part in parts.values():
        assert json.loads(json.dumps(part)) == part
        assert part["question"] == question and part["num_blocks"] == 4 and part["complaints"]
    assert len(parts["blocks"]["readouts"]) == 4 and parts["attention"]["probes"]["attention"]
    assert (
        parts["layers"]["probes"]["depth"]["modes"] and parts["trajectory"]["probes"] == {}
    )  # it has no fitted probes


def test_surgery_takes_its_blocks_layers_and_partner(endpoints, shelf, question):
    partner = shelf.examples("small")[0].question
    found = endpoints.surgery(question, {"2": "blank", "3": "swap"}, partner, first_layer=0, num_blocks=4)
    assert found["actions"] == {"2": "blank", "3": "swap"} and found["layers"] == [0, 1]
    assert found["partner"] == partner and len(found["after"]["readouts"]) == 4


def test_evidence_names_what_is_missing(endpoints):
    assert endpoints.evidence()["complaints"]


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
        ("run", {"question": "3", "model": ["small"]}, "choose one of small"),
        ("run", {"question": "3", "gold": "\ud800"}, "control character"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(endpoints, name, arguments, words):
    with pytest.raises(gr.Error) as error:
        getattr(endpoints, name)(**arguments)
    assert words in str(error.value.message) and "\n" not in str(error.value.message)


def test_a_failure_is_a_sentence_too(endpoints, question, monkeypatch):
    monkeypatch.setattr("rim_probe.probing.surgery.operate", lambda *_, **__: 1 / 0)
    with pytest.raises(gr.Error, match="did not work"):
        endpoints.surgery(question, {"1": "blank"})


def test_every_argument_is_documented_for_programs_and_for_tools(shelf):
    from gradio.utils import get_function_description

    documented = build_demo(shelf).get_api_info()["named_endpoints"]
    assert list(documented) == [f"/{name}" for name in ENDPOINTS]
    for name, endpoint in documented.items():
        about, arguments, returns = get_function_description(getattr(Endpoints, name[1:]))
        assert endpoint["description"] == about and about and returns
        assert getattr(Endpoints, name[1:]).__name__ == name[1:], "what the tool is called"
        for parameter in endpoint["parameters"]:
            assert parameter["label"] == parameter["parameter_name"]
            assert parameter["python_type"]["description"] == arguments[parameter["parameter_name"]] != ""
        (result,) = endpoint["returns"]
        assert result["label"] == "result" and result["type"]["additional_description"].split() == returns[0].split()


def test_no_answer_names_a_folder_of_the_server(endpoints, shelf, question):
    folder = str(shelf.path("small")).rpartition("/")[0]
    for name in ("run", *READINGS):
        assert folder not in json.dumps(getattr(endpoints, name)(question))
    assert folder not in json.dumps(endpoints.evidence())
