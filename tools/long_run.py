"""The long run: SmolLM2-135M by memory, by chain of thought and directly, stage after stage, in pieces.

    python -m tools.long_run --data DATA [--minutes 120]    train what is left; exit code 75: not done, call again
    python -m tools.long_run --status                       what is done, what is under way, rows/s, hours left
    python -m tools.long_run --keep                         newest weights of the stage under way, into the checkout

DATA holds gsm/, mwp/ and arith/, beside it models/chain-start; everyday problems are made here. Run it in a clone of
its own, at low priority:

    OMP_NUM_THREADS=2 OMP_WAIT_POLICY=PASSIVE nice -n 10 python -m tools.long_run ...

SIGTERM saves and stops. A finished stage is copied to checkpoints/smollm2-135m. Where the run's own folder is gone, the
stage under way goes on from checkpoints/smollm2-135m/unfinished, for the rows that it still lacks.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

from rim_probe.adapters import finish_checkpoint
from rim_probe.cli import main as rim_probe

ROOT = Path(__file__).resolve().parent.parent
RECIPES = ROOT / "rim_probe" / "training" / "recipes"
RUNS = Path("runs/smollm2")
CHECKPOINT = ROOT / "checkpoints" / "smollm2-135m"
UNFINISHED = CHECKPOINT / "unfinished"
TIME_OVER = 75
# In the order of training; where the finished adapter lies in the checkpoint.
STAGES = {
    "chain": "chain",
    "stage1": "stage1",
    "interchange": ".",
    "cot": "cot",
    "direct": "direct",
    "paper": "paper",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with gsm/, mwp/ and arith/, linked as data/ here")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="save and stop before so many are over")
    parser.add_argument("--status", action="store_true")
    parser.add_argument("--keep", action="store_true")
    arguments = parser.parse_args()
    if arguments.status:
        return status()
    if arguments.keep:
        return keep()
    os.chdir(ROOT)
    prepare(arguments.data)
    end = time.monotonic() + 60 * arguments.minutes
    for stage, place in STAGES.items():
        if (CHECKPOINT / place / "adapter_config.json").exists() and not (RUNS / f"{stage}.run").exists():
            link(stage)  # finished in another session
            continue
        left = (end - time.monotonic()) / 60
        if not (RUNS / stage / "adapter_config.json").exists():
            if left < 1:
                return TIME_OVER
            command = [sys.executable, "-m", "rim_probe", "train", str(recipe(stage)), "--resume"]
            command += ["--output", str(RUNS / stage)]
            command += ["--max-minutes", f"{left:.2f}"] if left < float("inf") else []
            os.environ["PYTHONPATH"] = str(ROOT)
            code = wait(subprocess.Popen(command))
            if code:
                return code
        ship(stage, place)
    return 0


def prepare(data: Path | None) -> None:
    """Links the data, makes the everyday problems and the file that chooses checkpoints; what is there stays."""
    folder = ROOT / "data"
    (folder / "everyday").mkdir(parents=True, exist_ok=True)
    for name in ("gsm", "mwp", "arith"):
        if not (folder / name).exists():
            if data is None or not (data / name).is_dir():
                sys.exit(f"data/{name} is missing; give --data, the folder that holds {name}/.")
            (folder / name).symlink_to((data / name).resolve())
    start = ROOT / "models" / "chain-start"
    if data is not None and not start.exists() and (data.parent / "models" / "chain-start").is_dir():
        start.parent.mkdir(exist_ok=True)
        start.symlink_to((data.parent / "models" / "chain-start").resolve())
    for name, split, rows, seed, variants in (
        ("train.txt.gz", "train", 160_000, 1, 1),
        ("pairs.txt.gz", "train", 120_000, 2, 10),
        ("valid.txt", "valid", 500, 1, 1),
        ("test.txt", "test", 500, 1, 1),
    ):
        file = folder / "everyday" / name
        if not file.exists():
            given = ["--split", split, "--rows", rows, "--seed", seed, "--variants", variants, "--output", file]
            rim_probe(["data", "everyday", *map(str, given)])
    lines = (folder / "gsm" / "valid.txt").open().readlines()[:100]
    lines += (folder / "everyday" / "valid.txt").open().readlines()[:150]
    (folder / "valid.txt").write_text("".join(lines))
    rim_probe(["base", "smollm2-135m"])


def recipe(stage: str) -> Path:
    """The recipe of a stage; where its run is gone, one for the rows that the kept weights have not seen."""
    file = RECIPES / f"smollm2-{stage}.yaml"
    left = RUNS / f"{stage}-rest.yaml"
    if left.exists():
        return left
    kept = json.loads((UNFINISHED / "seen.json").read_text()) if UNFINISHED.exists() else {}
    if kept.get("stage") != stage or (RUNS / f"{stage}.run").exists():
        return file
    plan = yaml.safe_load(file.read_text())
    plan = {key: value for key, value in plan.items() if key != "base"}
    start = RUNS / f"{stage}-start"
    shutil.copytree(UNFINISHED, start, dirs_exist_ok=True)
    plan |= {"start": str(start), "seed": plan.get("seed", 0) + 100}
    plan["stages"][0]["rows"] -= kept["rows"]
    left.write_text(f"# {kept['rows']:,} rows were seen before, by an earlier run.\n" + yaml.safe_dump(plan))
    return left


def wait(process: subprocess.Popen) -> int:
    """The exit code; SIGTERM and SIGINT go on to the training, which then saves and stops."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: process.send_signal(number))
    return process.wait()


def ship(stage: str, place: str) -> None:
    """The finished adapter, with its training log, into the checkpoint."""
    folder = CHECKPOINT / place
    finish_checkpoint(RUNS / stage, folder)
    history = next((RUNS / f"{stage}.run").glob("*/history.jsonl"))
    shutil.copy2(history, folder / "history.jsonl")
    if UNFINISHED.exists() and json.loads((UNFINISHED / "seen.json").read_text())["stage"] == stage:
        shutil.rmtree(UNFINISHED)
    print(f"{stage}: done, {folder}", flush=True)


def link(stage: str) -> None:
    """A stage that lies in the checkpoint already is found where the recipes look for it."""
    folder = RUNS / stage
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(CHECKPOINT / STAGES[stage], folder, ignore=shutil.ignore_patterns(*STAGES, "probes"))


def under_way() -> tuple[str, Path] | None:
    """The stage under way and its newest complete checkpoint."""
    for stage in STAGES:
        if (RUNS / stage / "adapter_config.json").exists():
            continue
        found = sorted(
            (path.parent for path in (RUNS / f"{stage}.run").glob("*/checkpoint-*/trainer_state.json")),
            key=lambda path: int(path.name.rsplit("-", 1)[1]),
        )
        return (stage, found[-1]) if found else None
    return None


def seen(stage: str, checkpoint: Path) -> dict:
    """Rows and steps that a checkpoint has seen, and its speed."""
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    own = json.loads((RUNS / f"{stage}.run" / "recipe.json").read_text())["stages"][0]["rows"]
    whole = yaml.safe_load((RECIPES / f"smollm2-{stage}.yaml").read_text())["stages"][0]["rows"]
    rates = [entry["rows_per_second"] for entry in state["log_history"] if "rows_per_second" in entry]
    now = round(own * state["global_step"] / state["max_steps"])
    return {"stage": stage, "rows": whole - own + now, "of": whole, "rows_per_second": rates[-1] if rates else None}


def keep() -> int:
    """Bfloat16 weights of the newest checkpoint, with the rows seen beside them."""
    os.chdir(ROOT)
    found = under_way()
    if found is None:
        print("Nothing is under way.")
        return 0
    stage, checkpoint = found
    with tempfile.TemporaryDirectory() as folder:
        for file in checkpoint.iterdir():
            if file.name in ("adapter_config.json", "base.json", "memory_layout.json", "adapter_model.safetensors"):
                shutil.copy2(file, folder)
        shutil.rmtree(UNFINISHED, ignore_errors=True)
        finish_checkpoint(Path(folder), UNFINISHED)
    told = seen(stage, checkpoint)
    (UNFINISHED / "seen.json").write_text(json.dumps(told, indent=2) + "\n")
    print(f"{UNFINISHED}: {told['stage']}, {told['rows']:,} of {told['of']:,} rows")
    return 0


def status() -> int:
    os.chdir(ROOT)
    found = under_way()
    now = seen(*found) if found else {}
    rate, rows_left = now.get("rows_per_second"), 0
    for stage, place in STAGES.items():
        file = RECIPES / f"smollm2-{stage}.yaml"
        rows = yaml.safe_load(file.read_text())["stages"][0]["rows"] if file.exists() else 0
        if (CHECKPOINT / place / "adapter_config.json").exists():
            print(f"{stage:12} done      {rows:>8,} rows")
        elif now.get("stage") == stage:
            print(f"{stage:12} under way {now['rows']:>8,} of {rows:,} rows, {rate} rows/s")
            rows_left += rows - now["rows"]
        else:
            print(f"{stage:12} to do     {rows:>8,} rows")
            rows_left += rows
    if rate:
        print(f"About {rows_left / rate / 3600:.1f} hours are left at this speed.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
