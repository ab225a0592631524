"""The runs that are shipped: each is of the shipped weights, and every panel can be drawn from it without a model."""

import json
from pathlib import Path

import pytest

from app import recorded
from rim_probe.gallery import load_examples
from rim_probe.plots import PANELS, draw

PROBES = set("steps values words correctness attention commitment geometry importance depth".split())
CHECKPOINTS = Path(__file__).parent.parent / "checkpoints"
SHIPPED = sorted(path.name.removesuffix(".json.gz") for path in recorded.FOLDER.glob("*.json.gz"))
RUNS = [pytest.param(name, entry.run, id=f"{name}, {entry.label}") for name in SHIPPED for entry in recorded.load(name)]


@pytest.mark.parametrize(("checkpoint", "run"), RUNS)
def test_a_recording_is_of_the_shipped_weights_and_examples(checkpoint, run):
    probes = json.loads((CHECKPOINTS / checkpoint / "probes" / "steps.json").read_text(encoding="utf-8"))
    assert run.reading["provenance"]["fingerprint"] == probes["fingerprint"]
    assert set(run.reading["probes"]) == PROBES and run.status == "done"
    assert (run.question, run.gold, run.steps) in [
        (p.question, p.answer, p.steps) for p in load_examples(CHECKPOINTS / checkpoint)
    ]


@pytest.mark.parametrize("panel", PANELS)
@pytest.mark.parametrize(("checkpoint", "run"), RUNS)
def test_every_panel_is_drawn_from_every_recording(checkpoint, run, panel):
    drawn = draw(run.drawable(), panel)
    assert drawn.html() and drawn.table.rows


def test_the_glass_box_opens_on_a_run_in_which_block_k_holds_step_k():
    """The tour and the page tell it so."""
    (entry,) = recorded.load("glass-box")
    blocks = entry.run.reading["probes"]["steps"]["blocks"]
    found = [block["nearest"][0]["step"] for block in blocks]
    assert found == list(entry.run.steps)
    assert len({step.rpartition("=")[2] for step in entry.run.steps}) == 3
