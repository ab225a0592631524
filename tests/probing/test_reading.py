"""Readings of the shipped checkpoint and of the glass box: complete, the same again, and unhurt by damaged files."""

import copy
import json
import sys
import threading
from pathlib import Path

import pytest

from rim_probe.decoding import answer
from rim_probe.errors import RiMError
from rim_probe.glassbox.box import glassbox
from rim_probe.probing.reading import Readers, Reading, read
from rim_probe.probing.reading_format import PROBES
from rim_probe.probing.study import load_models

CHECKPOINT = Path(__file__).parents[2] / "checkpoints" / "rim-tiny"
OTHER, *_, EXAMPLE = json.loads((CHECKPOINT / "examples.json").read_text(encoding="utf-8"))
QUESTION, STEPS, GOLD = EXAMPLE["question"], EXAMPLE["steps"], EXAMPLE["answer"]


@pytest.fixture(scope="module")
def models():
    return load_models(CHECKPOINT, device="cpu")


@pytest.fixture(scope="module")
def readers(models):
    return Readers.load(CHECKPOINT, models)


@pytest.fixture(scope="module")
def reading(models, readers):
    return read(models, readers, QUESTION, gold=GOLD, steps=STEPS)


def undated(reading: Reading) -> dict:
    data = reading.to_dict()
    return data | {"provenance": {**data["provenance"], "date": ""}}


# ------------------------------------------------------------------------------------------------------------- reading


def test_every_probe_speaks_and_the_size_is_bounded(reading):
    data = reading.to_dict()
    assert list(data["probes"]) == list(PROBES) and data["complaints"] == []
    assert [mode["name"] for mode in data["probes"]["depth"]["modes"]] == [
        "logit lens",
        "tuned lens",
        "nearest step",
        "own words",
    ]
    assert len(data["readouts"]) == data["num_blocks"] == 8 and data["readouts"][-1]["text"] == data["answer"]["text"]
    assert data["steps"] == STEPS and data["gold"] == GOLD and data["chain"]["steps"]
    assert [rank["step"] for rank in data["probes"]["depth"]["ranks"]] == list(range(1, len(STEPS) + 1))
    assert data["probes"]["geometry"]["cloud"]["n"] == len(data["probes"]["geometry"]["cloud"]["points"]) > 100
    assert len(json.dumps(data, allow_nan=False)) < 400_000


def test_the_same_question_gives_the_same_reading_also_to_two_visitors_at_once(models, readers, reading):
    """Every hook acts for its own thread: a question is read while another one is read by the same models."""
    other = OTHER["question"]
    wanted = {QUESTION: undated(reading), other: undated(read(models, readers, other, num_blocks=3))}
    found, switch = {}, sys.getswitchinterval()

    def visit(question: str, options: dict) -> None:
        found[question] = [undated(read(models, readers, question, **options)) for _ in range(2)]

    visits = [
        threading.Thread(target=visit, args=(QUESTION, {"gold": GOLD, "steps": STEPS})),
        threading.Thread(target=visit, args=(other, {"num_blocks": 3})),
    ]
    sys.setswitchinterval(1e-5)  # threads take turns far more often than usual
    try:
        for thread in visits:
            thread.start()
        for thread in visits:
            thread.join()
    finally:
        sys.setswitchinterval(switch)
    for question, expected in wanted.items():
        assert found[question] == [expected, expected]


def test_without_gold_nothing_is_called_right_and_ranks_follow_the_chain(models, readers):
    chain = answer(models["cot"], QUESTION, "cot")
    data = read({**models, "cot": models["direct"]}, readers, QUESTION, chain=chain).to_dict()
    assert data["gold"] is None and data["steps"] == [] and data["answer"]["right"] is None
    assert data["chain"] == {
        "text": chain.text,
        "steps": data["chain"]["steps"],
        "value": chain.value,
    }  # not asked again
    assert "chain-of-thought step 1" in data["probes"]["depth"]["ranks"][0]["what"]


@pytest.mark.parametrize("num_blocks", [1, 12])
def test_with_another_number_of_blocks_what_can_be_read_is_read_and_the_rest_named(models, readers, num_blocks):
    reading = read(models, readers, QUESTION, num_blocks=num_blocks)
    data = reading.to_dict()
    assert set(PROBES) - set(data["probes"]) == {"correctness"} and len(data["readouts"]) == num_blocks
    named = [sentence.partition(":")[0] for sentence in data["complaints"]]
    assert named == ["correctness", *(["steps", "values"] if num_blocks > 8 else []), "geometry"]
    assert Reading.from_dict(json.loads(json.dumps(data))) == reading


def test_without_blocks_there_is_an_answer_and_an_empty_memory(models, readers):
    reading = read(models, readers, QUESTION, num_blocks=0, gold=GOLD)
    data = reading.to_dict()
    assert data["readouts"] == [] and data["probes"] == {} and data["answer"]["text"] and data["chain"]
    assert any("at least one" in sentence for sentence in data["complaints"])
    assert Reading.from_dict(json.loads(json.dumps(data))) == reading


def test_a_lone_memory_model_is_read_and_what_is_missing_is_named(tmp_path):
    box = glassbox()
    alone = {"memory": box.rim}
    readers = Readers.load(tmp_path, alone)
    (problem,) = box.problems(3, 1, "report")
    data = read(alone, readers, problem.question, gold=problem.answer, steps=problem.steps).to_dict()
    assert [readout["text"] for readout in data["readouts"]] == [step[-3] for step in problem.steps]
    assert data["answer"]["right"] and data["chain"] is None
    assert list(data["probes"]) == ["words", "attention", "commitment", "importance", "depth"]
    (mode,) = data["probes"]["depth"]["modes"]
    assert mode["name"] == "logit lens" and mode["control"] is None
    complaints = " ".join(data["complaints"])
    for missing in ("steps, lens, values, correctness, geometry", "no stage-1 model", "no base model"):
        assert missing in complaints


def test_probes_of_another_checkpoint_are_named_and_left_out(models, tmp_path):
    foreign = {"memory": models["stage1"]}
    readers = Readers.load(CHECKPOINT, foreign)
    assert readers.decoders == {} and len(readers.complaints) == 5
    assert all("other weights" in sentence for sentence in readers.complaints)
    folder = tmp_path / "probes"
    folder.mkdir()
    for kind in ("json", "safetensors"):
        (folder / f"lens.{kind}").write_bytes((CHECKPOINT / "probes" / f"lens.{kind}").read_bytes())
    entry = json.loads((folder / "lens.json").read_text(encoding="utf-8"))
    (folder / "lens.json").write_text(json.dumps(entry | {"settings": {}}), encoding="utf-8")
    assert "does not say what it should" in " ".join(Readers.load(tmp_path, models).complaints)


# ---------------------------------------------------------------------------------------------------------------- files


def test_a_saved_reading_and_the_export_of_a_run_load_again(reading, tmp_path):
    own = reading.save(tmp_path / "reading.json")
    assert Reading.load(own) == reading
    assert Reading.load(own).to_dict() == json.loads(json.dumps(reading.to_dict()))
    export = tmp_path / "run.json"
    export.write_text(json.dumps({"format": "another", "reading": reading.to_dict(), "race": {}}), encoding="utf-8")
    assert Reading.load(export) == reading


def test_unknown_keys_are_left_out_and_half_characters_refused(reading):
    data = copy.deepcopy(reading.to_dict())
    data["extra"] = data["probes"]["surprise"] = data["answer"]["more"] = {"a": 1}
    assert Reading.from_dict(data) == reading
    data["question"] = "half \ud83d of one"
    with pytest.raises(RiMError, match="question"):
        Reading.from_dict(data)


@pytest.mark.parametrize(
    "content", ["", "{", "[1]", "null", '{"format": "rim-probe-surgery/1"}', "[" * 100_000, "9" * 9000]
)
def test_files_that_are_no_reading_are_refused_in_one_sentence(tmp_path, content):
    path = tmp_path / "upload.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(RiMError) as refused:
        Reading.load(path)
    assert len(str(refused.value)) < 300


EVIL = (None, float("nan"), 10**400, -1, True, "<script>", [], {}, [[]], {"a": []})


def test_lists_of_other_lengths_are_refused(reading):
    def grown(change) -> dict:
        data = copy.deepcopy(reading.to_dict())
        change(data)
        return data

    def swap(data):
        data["readouts"][0], data["readouts"][1] = data["readouts"][1], data["readouts"][0]

    changes = [
        swap,
        lambda data: data["tokens"].append("more"),
        lambda data: data["readouts"].pop(),
        lambda data: data["probes"]["importance"]["layers"].pop(),
        lambda data: data["probes"]["importance"]["layers"].reverse(),
        lambda data: data["probes"]["depth"]["modes"][0]["positions"].pop(),
        lambda data: data["probes"]["depth"]["modes"].append(data["probes"]["depth"]["modes"][0]),
        lambda data: data["probes"]["geometry"]["cloud"]["right"].pop(),
        lambda data: data.update(num_blocks=7),
        lambda data: data.update(num_layers=5),
    ]
    for change in changes:
        with pytest.raises(RiMError, match="damaged"):
            Reading.from_dict(grown(change))
