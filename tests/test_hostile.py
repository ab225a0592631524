"""A few tries of each group of `python -m tests.hostile`; CI and people run the thousands."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hostile import checkpoints, disk, questions, runs

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(("group", "count"), [(questions, 40), (checkpoints, 12), (runs, 12)])
def test_hostile_input_is_answered_or_refused_in_one_sentence(group, count):
    found = group.attempt(count, 1)
    assert found.tried == count and not found.failures, found.failures


def test_a_full_disk_costs_no_file_that_was_there():
    found = disk.attempt(3, 0, ("data", "report", "card"))
    if found.skipped:
        pytest.skip(found.skipped)
    assert found.tried == 3 and not found.failures, found.failures


@pytest.mark.slow
@pytest.mark.parametrize(("group", "count"), [("kills", 3), ("disk", 5), ("api", 25), ("visitors", 4)])
def test_killed_full_asked_and_left(group, count):
    """In processes of their own: a training is forked, and a page leaves threads behind."""
    command = [sys.executable, "-m", "tests.hostile", "--only", group, "--count", str(count)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "failures: 0" in done.stdout
    if "skipped" in done.stdout:
        pytest.skip(done.stdout)
