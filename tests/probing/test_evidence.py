"""What was measured of a checkpoint, in short: the view that stands for each probe; what is missing is a sentence."""

import json
import shutil

import pytest

from rim_probe.probing.artifacts import save_report
from rim_probe.probing.evidence import load_evidence
from rim_probe.probing.results import Estimate, Report, Result

PROVENANCE = {"command": "python -m rim_probe probe", "date": "2026-11-30", "seed": 0}


def test_the_view_of_the_headline_is_kept_and_causal_verdicts_are_said(tmp_path):
    score, control = Estimate(0.9, 0.8, 0.95, 40), Estimate(0.1, 0.05, 0.2, 40)
    results = [
        Result("says the predicted answer", "claimed blocks", score),
        Result("says the predicted answer", "wrong blocks", control, "control"),
        Result("other", "claimed blocks", score, place={"layer": 1}),
    ]
    save_report(tmp_path / "probes", [Report("interchange", results, {"pairs": 40}, verdict="It is used.")], PROVENANCE)
    found = load_evidence(tmp_path)
    (probe,) = found["probes"]
    assert len(Report.from_dict(probe["report"]).results) == 2 and "lies above" in probe["told"]
    assert found["causes"] == [{"probe": "interchange", "verdict": "It is used."}]
    assert probe["made"]["command"] == PROVENANCE["command"] and json.dumps(found)


def test_missing_files_name_the_command_that_makes_them(tmp_path):
    found = load_evidence(tmp_path / "none")
    assert found["metrics"] is None and found["probes"] == []
    assert "rim_probe eval" in found["complaints"][0] and "rim_probe probe" in found["complaints"][1]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "rim-probe-evaluation/1", "accuracy": {"memory": 3}}'])
def test_damaged_files_are_sentences(tmp_path, text):
    (tmp_path / "probes").mkdir()
    for name in ("metrics.json", "probes/report.json"):
        (tmp_path / name).write_text(text)
    assert len(load_evidence(tmp_path)["complaints"]) == 2


@pytest.mark.parametrize("name", ["rim-tiny", "glass-box"])
def test_a_shipped_checkpoint_is_complete_and_fits_into_json(name, tmp_path):
    found = load_evidence(f"checkpoints/{name}")
    assert not found["complaints"] and len(found["causes"]) == 2
    assert len(json.dumps(found, allow_nan=False)) < 120_000
    shutil.copy(f"checkpoints/{name}/metrics.json", tmp_path)
    assert load_evidence(tmp_path)["metrics"] == found["metrics"]
