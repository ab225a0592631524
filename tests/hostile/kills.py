"""Trainings that are killed at random moments of their steps and of saving: resumed, they end in the same bytes.

A process is forked from one that has imported everything, so a try costs no more than its steps.
"""

import os
import random
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

import yaml

from . import Count

STEP, SAVE, WRITE = b"s", b"c", b"w"  # what a training tells as it goes: a step, a save, the finished checkpoint
STAGE = {"objective": "stage1", "rows": 32, "batch_size": 4, "learning_rate": 3e-3, "validate_every": 2}
RECIPE = {
    "scratch": {"layers": 1, "width": 16, "heads": 2, "inner": 32, "context": 256},
    "layout": {"num_blocks": 2},
    "data": {"world": {"max_steps": 2}, "rows": 40, "validation_rows": 4},
    "stages": [STAGE | {"name": "ground"}, STAGE | {"name": "refine", "objective": "stage2"}],
}


def start(folder: Path, resume: bool = False) -> tuple[int, int]:
    """Trains in a process of its own into `folder/out`: its number, and the pipe that it tells through."""
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"output": str(folder / "out")} | RECIPE), encoding="utf-8")
    reading, writing = os.pipe()
    if process := os.fork():
        os.close(writing)
        return process, reading
    try:
        os.close(reading)
        log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1), os.dup2(log, 2)
        from rim_probe.training import run
        from rim_probe.training.trainer import RiMTrainer

        for holder, name, what in (
            (RiMTrainer, "training_step", STEP),
            (RiMTrainer, "_save_checkpoint", SAVE),
            (run, "finish_checkpoint", WRITE),
        ):
            setattr(holder, name, telling(getattr(holder, name), writing, what))
        run.train(recipe, resume=resume, report=lambda line: None)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def telling(work, pipe: int, what: bytes):
    """A function that says through a pipe that it begins."""

    def tell(*arguments, **options):
        os.write(pipe, what)
        return work(*arguments, **options)

    return tell


def events(pipe: int) -> list[tuple[bytes, float]]:
    """What a training tells until it ends, each with its time, and its end."""
    told = []
    while one := os.read(pipe, 1):
        told.append((one, time.monotonic()))
    os.close(pipe)
    return [*told, (b"", time.monotonic())]


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def attempt(count: int, seed: int) -> Count:
    """Kills a training `count` times, at steps and while saving by turns, and resumes it each time."""
    import rim_probe.training.run  # noqa: F401 (imported before the forks)

    chance, found = random.Random(seed), Count()
    with tempfile.TemporaryDirectory() as work:
        (whole := Path(work) / "whole").mkdir()
        process, pipe = start(whole)
        told = events(pipe)
        if os.waitpid(process, 0)[1]:
            found.note("not trained at all", (whole / "log").read_text()[-500:])
            return found
        expected = content(whole / "out")
        for number in range(count):
            (folder := Path(work) / str(number)).mkdir()
            kinds = ((STEP,), (SAVE, WRITE))[number % 2]
            at = chance.choice([i for i, (kind, _) in enumerate(told) if kind in kinds])
            delay = chance.random() * (told[at + 1][1] - told[at][1])
            process, pipe = start(folder)
            for _ in range(at + 1):
                os.read(pipe, 1)
            time.sleep(delay)
            os.kill(process, signal.SIGKILL)
            os.close(pipe)
            killed = os.WIFSIGNALED(os.waitpid(process, 0)[1])
            what = f"killed {'at a step' if number % 2 == 0 else 'while saving'}" if killed else "ended before"
            process, pipe = start(folder, resume=True)
            events(pipe)
            if os.waitpid(process, 0)[1]:
                found.note(what, f"not resumed: {(folder / 'log').read_text()[-500:]}")
                continue
            out = content(folder / "out")
            wrong = sorted(name for name in expected.keys() | out.keys() if expected.get(name) != out.get(name))
            found.note(what, f"other bytes after resuming: {wrong}" if wrong else None)
    return found
