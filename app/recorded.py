"""Committed example runs, which the page shows before any model is loaded.

One file per checkpoint, `recorded/<checkpoint name>.json`, made from real runs by `python -m app.record`.
Knows the file. Does not know models or Gradio.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from app.session import Run
from rim_probe.errors import RiMError

FOLDER = Path(__file__).parent / "recorded"
RECORDED_FORMAT = "rim-probe-recorded/1"


@dataclass(frozen=True)
class Recording:
    """A finished run and what to call it, such as "3 steps"."""

    label: str
    run: Run


def load(checkpoint: str, folder: Path = FOLDER) -> list[Recording]:
    """The recordings of a checkpoint, [] where there is no file.

    Raises:
        RiMError: a damaged file.
    """
    path = folder / f"{checkpoint}.json"
    if not path.is_file():
        return []
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["format"] != RECORDED_FORMAT:
            raise RiMError(f"its format is {data['format']!r}, not {RECORDED_FORMAT!r}")
        return [Recording(str(entry["label"]), Run.from_dict(entry["run"])) for entry in data["runs"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RiMError(
            f"The recorded runs in {path.name} cannot be shown ({error}); make them again with `python -m app.record`."
        ) from None


def save(checkpoint: str, recordings: list[Recording], command: str, folder: Path = FOLDER) -> Path:
    """Writes the recordings of a checkpoint and returns the file's path."""
    path = folder / f"{checkpoint}.json"
    folder.mkdir(parents=True, exist_ok=True)
    runs = [{"label": recording.label, "run": recording.run.to_dict()} for recording in recordings]
    data = {"format": RECORDED_FORMAT, "command": command, "runs": runs}
    path.write_text(json.dumps(data, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    return path


def opening(recordings: list[Recording]) -> int:
    """Which recording greets a visitor: the last one (the deepest) that both methods got right, else the last one."""
    solved = [
        index
        for index, recording in enumerate(recordings)
        if all(lane.correct is not False for lane in recording.run.lanes.values())
    ]
    return solved[-1] if solved else len(recordings) - 1
