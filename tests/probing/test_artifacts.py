"""Stored probes: what is saved comes back, and nothing that belongs elsewhere or is damaged is ever loaded."""

import hashlib
import json
import os
import pickle

import numpy as np
import pytest
import torch
from conftest import add_lora

from rim_probe import files
from rim_probe.errors import ArtifactError
from rim_probe.model import RiM
from rim_probe.probing.artifacts import (
    describe_study,
    fingerprint,
    is_done,
    load_artifact,
    load_provenance,
    load_report,
    load_results,
    resume_key,
    save_artifact,
    save_report,
)
from rim_probe.probing.results import Estimate, Report, Result

TENSORS = {
    "map": np.arange(6, dtype=np.float32).reshape(2, 3),
    "half": np.ones(2, np.float16),
    "flags": np.array([True]),
}
REPORT = Report(
    "steps",
    [
        Result("top-1", "memory", Estimate(0.8, 0.7, 0.9, 100)),
        Result("top-1", "shuffled", Estimate(0.1, 0, 0.2, 9), "control"),
    ],
    {"fit": 3},
    {"layer": 5},
)


@pytest.fixture
def data(tmp_path) -> dict:
    path = tmp_path / "fit.txt"
    path.write_text("1+1||#### 2\n", encoding="utf-8")
    return {"fit": (path, 1), "report": (path, 1)}


@pytest.fixture
def provenance(rim, data) -> dict:
    return describe_study(rim, data, command="probe", seed=3, score=0.5)


@pytest.fixture
def stored(rim, provenance, tmp_path):
    """A folder with the probe `steps`, saved under the key that `resume_key` gives it."""
    folder = tmp_path / "probes"
    key = resume_key("steps", provenance)
    save_artifact(folder, "steps", TENSORS, {"layer": 5}, provenance, key=key, report=REPORT)
    return folder


def refused(folder, rim, match: str) -> None:
    with pytest.raises(ArtifactError, match=match) as error:
        load_artifact(folder, "steps", rim)
    message = str(error.value)
    assert message.endswith(".") and "\n" not in message and ". " not in message, "one sentence"


def edit(folder, **changes) -> None:
    path = folder / "steps.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# ---------------------------------------------------------------------------------------------------------- fingerprint


def test_a_fingerprint_is_that_of_the_weights(make_rim, tmp_path):
    rim = make_rim()
    rim.save_pretrained(tmp_path)
    assert fingerprint(make_rim()) == fingerprint(rim) == fingerprint(RiM.from_pretrained(tmp_path))
    assert fingerprint(make_rim(seed=1)) != fingerprint(rim)
    assert fingerprint(make_rim(num_blocks=5)) != fingerprint(rim)


def test_an_adapter_has_one_of_its_own_however_it_is_read(rim, tmp_path):
    rim.model.save_pretrained(tmp_path / "base")
    rim.tokenizer.save_pretrained(tmp_path / "base")
    rim.model.config._name_or_path = rim.model.name_or_path = str(tmp_path / "base")
    plain = fingerprint(rim)
    add_lora(rim, exclude_modules=["lm_head"]).model.eval()
    rim.save_pretrained(tmp_path / "adapter")
    one, coarse = (RiM.from_pretrained(tmp_path / "adapter", dtype=dtype) for dtype in (None, torch.bfloat16))
    assert fingerprint(one) == fingerprint(coarse) != plain


# -------------------------------------------------------------------------------------------------------- save and load


def test_what_is_saved_comes_back(stored, rim, provenance):
    tensors, settings, origin = load_artifact(stored, "steps", rim)
    assert {name: array.dtype for name, array in tensors.items()} == {name: a.dtype for name, a in TENSORS.items()}
    assert all(np.array_equal(tensors[name], TENSORS[name]) for name in TENSORS)
    assert settings == {"layer": 5} and origin == provenance and origin["score"] == 0.5
    assert load_results(stored, "steps") == REPORT and load_provenance(stored, "steps") == provenance


def test_provenance_names_the_data_by_their_digest(provenance, data, rim):
    digest = hashlib.sha256(data["fit"][0].read_bytes()).hexdigest()
    assert provenance["data"]["report"] == {"file": str(data["fit"][0]), "sha256": digest, "problems": 1}
    assert provenance["layout"] == {"num_blocks": 4, "slots_per_block": 2, "tokens": ["<b>", "<m>", "</b>"]}
    assert {"torch", "transformers"} <= set(provenance["machine"]["versions"]) and provenance["checkpoint"] == rim.name


def test_objects_are_never_stored(provenance, tmp_path):
    with pytest.raises(ArtifactError, match="store numbers"):
        save_artifact(tmp_path, "steps", {"a": np.array([None])}, {}, provenance)


# ------------------------------------------------------------------------------------------------------------- refusals


def test_another_checkpoint_is_refused(stored, make_rim):
    refused(stored, make_rim(seed=1), "made for other weights")


def test_another_layout_is_refused(stored, make_rim):
    refused(stored, make_rim(num_blocks=5), "for 4 memory blocks of 2 slots .* has 5 of 2")


@pytest.mark.parametrize("file", ["steps.safetensors", "steps.json"])
@pytest.mark.parametrize("keep", [0.0, 0.5, 0.99])
def test_a_truncated_file_is_refused(stored, rim, file, keep):
    content = (stored / file).read_bytes()
    (stored / file).write_bytes(content[: int(keep * len(content))])
    refused(stored, rim, "is damaged")


def test_a_pickle_is_not_opened(stored, rim):
    content = pickle.dumps(TENSORS)
    (stored / "steps.safetensors").write_bytes(content)
    edit(stored, tensors_sha256=hashlib.sha256(content).hexdigest())
    refused(stored, rim, "no safetensors file")


# --------------------------------------------------------------------------------------------------------------- resume


def test_only_the_same_work_counts_as_done(stored, make_rim, provenance, data):
    key = resume_key("steps", provenance)
    assert is_done(stored, "steps", key) and not is_done(stored, "values", key)
    later = {**provenance, "date": "later", "command": "other", "machine": {}}
    assert resume_key("steps", later) == key, "when and where it ran does not matter"
    others = [{**provenance, "seed": 4}, describe_study(make_rim(seed=1), data, command="probe", seed=3)]
    data["fit"][0].write_text("1+2||#### 3\n", encoding="utf-8")
    others.append(describe_study(make_rim(), data, command="probe", seed=3))
    keys = [resume_key("steps", other) for other in others] + [resume_key("steps", provenance, {"layer": 1})]
    assert not any(is_done(stored, "steps", other) for other in keys) and len({key, *keys}) == 5


def test_an_interrupted_save_is_not_done_and_leaves_no_rubbish(stored, rim, provenance, monkeypatch):
    replace, calls = os.replace, []

    def once(*paths):
        calls.append(paths)
        if len(calls) == 2:  # the tensors are new, the JSON is still the old one
            raise KeyboardInterrupt
        replace(*paths)

    monkeypatch.setattr(files.os, "replace", once)
    key = resume_key("steps", provenance)
    with pytest.raises(KeyboardInterrupt):
        save_artifact(stored, "steps", {"map": np.zeros(3)}, {"layer": 6}, provenance, key=key)
    assert not is_done(stored, "steps", key)
    assert sorted(path.name for path in stored.iterdir()) == ["steps.json", "steps.safetensors"]
    refused(stored, rim, "damaged or does not belong")


# ----------------------------------------------------------------------------------------------------------- the report


def test_a_report_comes_back(tmp_path, provenance):
    save_report(tmp_path, [REPORT], provenance)
    assert load_report(tmp_path) == ([REPORT], provenance)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (None, "is missing"),
        ("{", "is damaged"),
        ("7", "holds no JSON object"),
        ('{"format": "rim-probe report", "version": 1}', "lacks its results"),
        ('{"format": "rim-probe report", "version": 1, "reports": [1], "provenance": {}}', "damaged results"),
    ],
)
def test_a_damaged_report_is_refused(tmp_path, content, match):
    if content is not None:
        (tmp_path / "report.json").write_text(content)
    with pytest.raises(ArtifactError, match=match):
        load_report(tmp_path)
