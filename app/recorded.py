"""Committed example runs and outcomes, which the page shows before any model is loaded.

One file per checkpoint, `recorded/<checkpoint name>.json.gz`: real runs and readings, made by `python -m app.record`.
Knows the file. Does not know models or Gradio.
"""

from __future__ import annotations

import copy
import functools
import gzip
import json
import zlib
from dataclasses import dataclass
from pathlib import Path

from app.runs import Run
from rim_probe.errors import RiMError
from rim_probe.files import write_atomic
from rim_probe.outcomes import Outcomes

FOLDER = Path(__file__).parent / "recorded"
RECORDED_FORMAT = "rim-probe-recorded/2"


@dataclass(frozen=True)
class Recording:
    """A finished run and what to call it, such as "3 steps"."""

    label: str
    run: Run


def load(checkpoint: str, folder: Path = FOLDER) -> list[Recording]:
    """The recordings of a checkpoint, [] where there is no file; runs that may be given other readings and experiments.

    Raises:
        RiMError: a damaged file.
    """
    path = _path(checkpoint, folder)
    if not path.is_file():
        return []
    return [Recording(entry.label, copy.copy(entry.run)) for entry in _load(path, path.stat().st_mtime_ns)]


def outcomes(checkpoint: str, folder: Path = FOLDER) -> Outcomes | None:
    """Where the methods of a checkpoint came to different ends; None where that was not recorded.

    Raises:
        RiMError: a damaged file.
    """
    path = folder / f"{checkpoint}-outcomes.json"
    return Outcomes.load(path) if path.is_file() else None


@functools.lru_cache(maxsize=8)
def _load(path: Path, written: int) -> list[Recording]:  # `written` makes a file that was replaced another one
    try:
        data = json.loads(gzip.decompress(path.read_bytes()))
        if data["format"] != RECORDED_FORMAT:
            raise RiMError(f"its format is {data['format']!r}, not {RECORDED_FORMAT!r}")
        recordings = [Recording(str(entry["label"]), Run.from_dict(entry["run"])) for entry in data["runs"]]
    except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError) as error:
        raise RiMError(
            f"The recorded runs in {path.name} cannot be shown ({error}); make them again with `python -m app.record`."
        ) from None
    return recordings


def save(checkpoint: str, recordings: list[Recording], command: str, folder: Path = FOLDER) -> Path:
    """Writes the recordings of a checkpoint and returns the file's path."""
    path = _path(checkpoint, folder)
    folder.mkdir(parents=True, exist_ok=True)
    runs = [{"label": recording.label, "run": recording.run.to_dict()} for recording in recordings]
    data = {"format": RECORDED_FORMAT, "command": command, "runs": runs}
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    write_atomic(path, gzip.compress(text.encode(), mtime=0))  # no time stamp: equal runs, equal file
    return path


def opening(recordings: list[Recording]) -> int:
    """Which recording greets a visitor: the last one (the deepest) that both methods got right, else the last one."""
    solved = [
        index
        for index, recording in enumerate(recordings)
        if all(lane.correct is not False for lane in recording.run.lanes.values())
    ]
    return solved[-1] if solved else len(recordings) - 1


def _path(checkpoint: str, folder: Path) -> Path:
    return folder / f"{checkpoint}.json.gz"
