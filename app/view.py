"""What a visitor is looking at, and the address that says so: panel, what is selected in it, the question, the model.

Knows addresses and their limits. Does not know Gradio, models or what a panel makes of a view. An address is all there
is: it holds the question itself rather than a key to something kept on the server, so that it survives a restart.
Whatever it holds came from a stranger: it is cut to size here, checked where it is used and escaped where it is drawn.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlencode

from app.runs import Run

PANELS = {
    "race": "Race",
    "blocks": "Blocks",
    "attention": "Attention",
    "layers": "Layers",
    "trajectory": "Trajectory",
    "surgery": "Surgery",
    "evidence": "Evidence",
}
LONGEST = 4000  # characters of one value of an address
MOST_KEYS = 12  # of a view


@dataclass
class Looking:
    """Attributes:
    panel: one of `PANELS`.
    views: for every panel, what was selected there by hand; the rest is its own default.
    compared: the run of the history that is shown beside the current one, if any.
    """

    panel: str = "race"
    views: dict[str, dict[str, str]] = field(default_factory=dict)
    compared: Run | None = None

    def __post_init__(self) -> None:
        # One change after the other: two that come close together are computed by two threads.
        self.lock = threading.Lock()

    def __deepcopy__(self, memo: dict[int, Any]) -> Looking:
        """What Gradio starts a visitor with; locks cannot be copied."""
        return Looking(self.panel, {panel: dict(view) for panel, view in self.views.items()}, self.compared)

    @property
    def view(self) -> dict[str, str]:
        """What is selected in the panel that is open."""
        return self.views.setdefault(self.panel, {})

    def open(self, panel: Any) -> None:
        """Another panel; one that does not exist changes nothing."""
        if panel in PANELS:
            self.panel = panel

    def select(self, change: Any) -> None:
        """Changes the view of the open panel."""
        if isinstance(change, Mapping):
            for name, value in list(change.items())[:MOST_KEYS]:
                if len(self.view) < MOST_KEYS or name in self.view:
                    self.view[str(name)[:40]] = str(value)[:LONGEST]


@dataclass(frozen=True)
class Address:
    """The parts of a shared link; texts as they came, not yet checked."""

    model: str = ""
    question: str = ""
    gold: str = ""
    blocks: int | None = None
    direct: bool = False
    recorded: int | None = None
    looking: Looking = field(default_factory=Looking)

    @classmethod
    def read(cls, query: Mapping[str, str]) -> Address:
        """From the query of an address. Unknown keys are what the open panel makes of them; nothing raises."""
        known = {key: str(query.get(key, ""))[:LONGEST] for key in ("model", "q", "gold", "k", "direct", "recorded")}
        looking = Looking()
        looking.open(query.get("panel"))
        prefix = "v."
        looking.select({key[len(prefix) :]: value for key, value in query.items() if key.startswith(prefix)})
        return cls(
            known["model"],
            known["q"],
            known["gold"],
            _number(known["k"]),
            known["direct"] == "1",
            _number(known["recorded"]),
            looking,
        )


def query(run: Run | None, looking: Looking, model: str | None, recorded: int | None = None) -> str:
    """The query that brings all this back: "?model=rim-tiny&q=…&panel=layers&v.mode=tuned+lens"."""
    parts: dict[str, Any] = {"model": model or (run.checkpoint if run else "")}
    if recorded is not None:
        parts["recorded"] = recorded
    elif run is not None and run.status in ("done", "loaded"):
        parts |= {"q": run.question, "gold": run.gold or "", "k": run.num_blocks}
        parts |= {"direct": 1} if "direct" in run.lanes else {}
    if looking.panel != "race":
        parts["panel"] = looking.panel
        parts |= {f"v.{name}": value for name, value in looking.view.items()}
    return "?" + urlencode({key: value for key, value in parts.items() if value not in ("", None)})


def _number(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 4 else None
