"""Evidence of a checkpoint from its own files: the right rows, honest verdicts, sentences for what is missing."""

import json
import shutil

import pytest

from rim_probe.probing.artifacts import save_report
from rim_probe.probing.evidence import load_evidence
from rim_probe.probing.section import Estimate, Figure, Section, Table, Target

PROVENANCE = {"command": "rim probe", "date": "2026-01-02T00:00:00", "seed": 3}


def share(value, width=0.02, n=100):
    return Estimate(value, max(0.0, value - width), min(1.0, value + width), n)


def bar(name, value, control=False):
    return {"name": name, "value": value, "low": max(0, value - 0.02), "high": min(1, value + 0.02), "control": control}


def section(name, tables=(), bars=(), targets=()):
    figures = [Figure("bars", "t", "what", "share of pairs", {"bars": list(bars)})] if bars else []
    return Section(name, name, "Why?", "So.", {"report": 100}, {}, list(tables), figures, list(targets))


def interchange(value, control=0.01, positive=0.9, met=False):
    bars = [bar("swapped", value), bar("control: random", control, True), bar("positive control: all", positive, True)]
    table = Table("t", ["swapped", "predicted, %"], [["swapped", share(value, n=55)]])
    return section("interchange", [table], bars, [Target("success", ">= 70 %", share(value), met)])


def load(folder, *sections):
    save_report(folder / "probes", sections, PROVENANCE)
    return load_evidence(folder)


def test_controls_in_columns_stand_beside_each_row(tmp_path):
    table = Table(
        "Values",
        ["quantity", "cell", "accuracy, %", "control: majority, %", "control: base, %"],
        [
            ["operand", "layer 1", share(0.5), share(0.2), share(0.49)],
            ["result", "layer 2", share(0.8), share(0.3), share(0.4)],
            ["never seen", "layer 2", None, None, None],
        ],
    )
    [probe] = load(tmp_path, section("values", [table]))["probes"]
    assert [(row["name"], row["against"]["name"]) for row in probe["rows"]] == [("operand", "base"), ("result", "base")]
    assert probe["headline"]["name"] == "result" and probe["headline"]["relation"] == "above"
    assert probe["headline"]["text"] == "80.0 % (78.0 to 82.0)"
    assert probe["clear"] == [1, 2]
    assert probe["made"]["command"] == "rim probe" and probe["made"]["n"] == {"report": 100}


def test_the_headline_is_the_row_the_target_was_set_for(tmp_path):
    bars = [bar("chosen", 0.5), bar("flattered", 0.6), bar("base", 0.49, True)]
    [probe] = load(tmp_path, section("steps", bars=bars, targets=[Target("top", ">= 90 %", share(0.5), False)]))[
        "probes"
    ]
    assert probe["headline"]["name"] == "chosen" and probe["headline"]["relation"] == "overlapping"
    assert probe["targets"][0]["verdict"].startswith("NOT MET by 40")


@pytest.mark.parametrize(
    "test, verdict, also",
    [
        (interchange(0.95, met=True), "is what the answer is made from", "in 55 pairs"),
        (interchange(0.3), "makes part of the answers", "so the test can see an effect"),
        (interchange(0.0), "is not shown to be", "so the test can see an effect"),
        (interchange(0.0, positive=0.5), "is not shown to be", "a weak effect could be missed"),
        (interchange(0.95, control=0.95, met=True), "is not shown to be", "random) in 95.0 %"),
    ],
)
def test_a_cause_is_claimed_only_above_its_control(tmp_path, test, verdict, also):
    [cause] = load(tmp_path, test)["causes"]
    assert verdict in cause["verdict"] and also in cause["text"].lower()


def test_importance_is_told_beside_the_untouched_model(tmp_path):
    def table(removed):
        rows = [["nothing (clean)", share(0.7)], ["all memory tokens but the one read: set to zero", share(removed)]]
        return section("importance", [Table("t", ["what", "gold answer said"], rows)])

    [cause] = load(tmp_path, table(0.2))["causes"]
    assert cause["verdict"] == "Emptying the memory costs answers." and "20.0 % (18.0 to 22.0) of 100" in cause["text"]
    assert "could be sure of" in load(tmp_path, table(0.69))["causes"][0]["verdict"]


def test_a_probe_without_numbers_keeps_its_words(tmp_path):
    [probe] = load(tmp_path, section("new"))["probes"]
    assert probe["headline"] is None and probe["rows"] == [] and probe["summary"] == "So."


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
