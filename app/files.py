"""A run as a visitor's file: what is saved, and what may be loaded again.

Knows files and their limits. Does not know Gradio or models; what a run's dictionary must be like is in
`app.run_format`.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from app import figures
from app.hands import view_of_done
from app.runs import Run
from app.view import Looking
from rim_probe.errors import RiMError
from rim_probe.plots import PANELS, draw, view_of

log = logging.getLogger(__name__)

LARGEST = 16_000_000  # bytes; an exported run is a tenth of that


def text(run: Run, looking: Looking) -> str:
    """A run with all that was read of it, and what is looked at, as JSON."""
    return json.dumps(run.to_dict() | {"view": {"panel": looking.panel, **looking.view}}, ensure_ascii=False)


def load(path: str | None) -> tuple[Run, Any]:
    """The run of a file, and what was looked at when it was saved.

    Raises:
        RiMError: no such file, or one that cannot be shown.
    """
    if path is None or Path(path).stat().st_size > LARGEST:
        raise RiMError(f"A run to load must be a JSON file of at most {LARGEST // 1_000_000} MB.")
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"), parse_constant=_refuse)
    except (ValueError, RecursionError):
        raise RiMError("This file is not JSON; load one that “Save this run” has made.") from None
    run = Run.from_dict(data)
    run.status = "loaded"
    try:
        _draw_all(run)
    except Exception:  # each entry is as it should be, but they do not fit together
        log.info("a file that cannot be drawn", exc_info=True)
        raise RiMError("This run is damaged: its parts do not fit together; save it again.") from None
    return run, data.get("view")


def _draw_all(run: Run) -> None:
    figures.stage(run)
    for panel in PANELS if run.reading is not None else ():
        view = view_of_done(run) if panel == "surgery" else {}
        draw(run.drawable(), panel, **view_of(run.drawable(), panel, view)).html()


def _refuse(constant: str) -> float:
    raise ValueError(constant)  # NaN and infinities are not JSON and cannot be drawn
