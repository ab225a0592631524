"""What commands may write: nothing is replaced that they did not make, every file is there whole or not at all."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rim_probe import files
from rim_probe.cli import main
from rim_probe.datasets.arithmetic import World, generate
from rim_probe.errors import RiMError
from rim_probe.problems import write_problems


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def problems(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("problems") / "problems.txt"
    write_problems(path, generate(World(), "test", 24, unique=True))
    return path


@pytest.fixture
def refuses(capsys):
    """Runs a command that must be refused in one sentence and leave a folder as it is."""

    def check(folder: Path, *command: object) -> str:
        before = snapshot(folder)
        assert main([str(part) for part in command]) == 2
        (told,) = capsys.readouterr().err.strip().splitlines()[-1:]
        assert snapshot(folder) == before and "Traceback" not in told
        return told

    return check


FOREIGN = {"model": "model.safetensors", "notes": "notes.json", "figure": "page.html"}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_file_that_a_command_did_not_write_is_not_replaced(refuses, small_checkpoint, problems, tmp_path, kind):
    victim = tmp_path / FOREIGN[kind]
    victim.write_text('{"what": "mine"}', encoding="utf-8")
    world = ("data", "arithmetic", "--split", "test", "--rows", 2)
    assert victim.name in refuses(tmp_path, *world, "--output", victim)
    quick = ("--data", problems, "--latency-samples", 0, "--limit", 2, "--method", "direct")
    assert victim.name in refuses(tmp_path, "eval", small_checkpoint, *quick, "--output", victim)
    victim.rename(tmp_path / "report.json.partial")
    assert ".partial" in refuses(tmp_path, "eval", small_checkpoint, *quick, "--output", tmp_path / "report.json")


def test_probe_fills_no_folder_of_anything_else(refuses, small_checkpoint, problems, tmp_path):
    """Neither a model's, nor the run of a training that has the name of its own working folder."""
    command = ("probe", small_checkpoint, "--data", problems, "--only", "geometry", "--output")
    shutil.copytree(small_checkpoint, tmp_path / "model")
    assert "did not make" in refuses(tmp_path, *command, tmp_path / "model")
    for name in ("out.run", "out.captures"):
        (tmp_path / name / "stage" / "checkpoint-2").mkdir(parents=True)
        (tmp_path / name / "stage" / "checkpoint-2" / "optimizer.pt").write_bytes(b"state")
    before = snapshot(tmp_path)
    assert "out.captures" in refuses(tmp_path / "out.captures", *command, tmp_path / "out")
    shutil.rmtree(tmp_path / "out.captures")
    assert main([str(part) for part in (*command, tmp_path / "out")]) == 0
    left = snapshot(tmp_path)
    assert all(left[name] == content for name, content in before.items() if not name.startswith("out.captures"))


def test_training_goes_on_in_no_run_of_anything_else(refuses, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"output: {tmp_path / 'out'}\nscratch: {{}}\ndata: {{world: {{}}, rows: 10}}\n"
        "stages: [{name: one, objective: direct, rows: 4, learning_rate: 0.1}]\n"
    )
    (tmp_path / "out.run" / "memory-fit").mkdir(parents=True)
    (tmp_path / "out.run" / "memory-fit" / "shard-00000.safetensors").write_bytes(b"captures")
    for options in ((), ("--resume",)):
        assert "out.run" in refuses(tmp_path, "train", recipe, *options)


def test_a_fetched_base_takes_no_place_of_anything_else(tmp_path, monkeypatch):
    from rim_probe import bases

    monkeypatch.setenv("RIM_PROBE_CACHE", str(tmp_path))
    mine = bases.base_folder("smollm2-135m", "hub") / "mine.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    with (
        pytest.raises(RiMError, match="did not make"),
        bases._making(bases.KNOWN["smollm2-135m"], "hub", anew=True) as folder,
    ):
        (folder / "model.safetensors").touch()
    assert mine.read_text() == "mine"


HOLDER = """
import sys, time
from pathlib import Path
from rim_probe import files
with files.hold(Path(sys.argv[1]), "test"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_lock_ends_with_its_process_and_not_before(tmp_path):
    """However it ends: nothing has to be broken, and nothing is."""
    root = Path(__file__).parent.parent
    with subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path], stdout=subprocess.PIPE, cwd=root) as holder:
        try:
            holder.stdout.readline()
            with pytest.raises(RiMError, match="at work"), files.hold(tmp_path, "test"):
                pass
        finally:
            holder.kill()
    with files.hold(tmp_path, "test"):
        pass
    with pytest.raises(RiMError, match="did not make"), files.hold(tmp_path, "another"):
        pass


def test_a_failed_write_leaves_the_old_file_alone(tmp_path, monkeypatch):
    path = tmp_path / "report.json"
    files.write_atomic(path, b"old")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", fail)
    with pytest.raises(OSError, match="report.json"):
        files.write_atomic(path, json.dumps({"new": 1}).encode())
    assert snapshot(tmp_path) == {"report.json": b"old"}
