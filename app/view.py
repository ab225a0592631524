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

GROUPS = {
    "Watch": {"race": "Race"},
    "Look": {"blocks": "Blocks", "attention": "Attention", "layers": "Layers", "trajectory": "Trajectory"},
    "Test": {"surgery": "Surgery", "evidence": "Evidence"},
}
PANELS = {name: label for panels in GROUPS.values() for name, label in panels.items()}
LONGEST = 4000  # characters of one value of an address
MOST_KEYS = 12  # of a view
MOST_STEPS = 20
VIEW, COMPARED = "v.", "c."  # before the keys of the open panel's view, and of the run beside the current one


class Looking:
    """What one visitor looks at. No dataclass, for the reason that `app.session.Session` gives.

    Attributes:
        panel: one of `PANELS`.
        views: for every panel, what was selected there by hand; the rest is its own default.
        compared: the run of the history that is shown beside the current one, if any.
        unread: a run whose memory could not be read, and why.
        lock: one change after the other, since two that come close together are computed by two threads.
    """

    def __init__(self, panel: str = "race", views: Mapping[str, Mapping[str, str]] | None = None):
        self.panel = panel
        self.views = {name: dict(view) for name, view in (views or {}).items()}
        self.compared: Run | None = None
        self.unread: tuple[Run, str] | None = None
        self.lock = threading.Lock()

    def __deepcopy__(self, memo: dict[int, Any]) -> Looking:
        """What Gradio starts a visitor with; locks cannot be copied."""
        return Looking(self.panel, self.views)

    @property
    def view(self) -> dict[str, str]:
        """What is selected in the panel that is open."""
        return self.views.setdefault(self.panel, {})

    def open(self, panel: Any) -> None:
        """Another panel; one that does not exist changes nothing."""
        if isinstance(panel, str) and panel in PANELS:
            self.panel = panel

    def select(self, change: Any) -> None:
        """Changes the view of the open panel; what is no text changes nothing."""
        if isinstance(change, Mapping):
            for name, value in list(change.items())[:MOST_KEYS]:
                if isinstance(value, str) and (len(self.view) < MOST_KEYS or name in self.view):
                    self.view[str(name)[:40]] = value[:LONGEST]


@dataclass(frozen=True)
class Address:
    """The parts of a shared link; texts as they came, not yet checked.

    Attributes:
        steps: gold steps ("<<3+4=7>>").
        recorded: the number of a recorded run, which is not recomputed.
        compared: the run beside this one.
    """

    model: str = ""
    question: str = ""
    gold: str = ""
    blocks: int | None = None
    direct: bool = False
    seed: int = 0
    steps: tuple[str, ...] = ()
    recorded: int | None = None
    looking: Looking = field(default_factory=Looking)
    compared: Address | None = None

    @property
    def asked(self) -> tuple:
        """What it asks for; empty parts are left to the page."""
        return self.model, self.question, self.gold, self.blocks, self.direct, self.seed, self.steps, self.recorded

    @classmethod
    def read(cls, query: Mapping[str, str]) -> Address:
        """From the query of an address. Unknown keys are what the open panel makes of them; nothing raises."""
        text = {key: str(query.get(key, ""))[:LONGEST] for key in ("model", "q", "gold", "k", "direct", "steps")}
        looking = Looking()
        looking.open(query.get("panel"))
        looking.select(_under(VIEW, query))
        beside = _without(COMPARED, _under(COMPARED, query))  # one run beside another, not a chain of them
        return cls(
            text["model"],
            text["q"],
            text["gold"],
            _number(text["k"]),
            text["direct"] == "1",
            _number(str(query.get("seed", "")), 10) or 0,
            tuple(f"<<{step}>>" for step in text["steps"].split(";")[:MOST_STEPS] if step),
            _number(str(query.get("recorded", ""))),
            looking,
            cls.read(_without(COMPARED, query) | beside) if beside else None,
        )


def query(run: Run | None, looking: Looking, model: str | None, recorded: int | None = None) -> str:
    """The query that brings all this back: "?model=rim-tiny&q=…&panel=layers&v.mode=tuned+lens".

    Args:
        model: the checkpoint that is chosen, for what shows no run.
        recorded: the number of the recorded run that `run` is, if it is one.
    """
    # The evidence is that of the chosen checkpoint, which may have asked nothing yet.
    shown = run is not None and (looking.panel != "evidence" or model in (None, run.checkpoint))
    asked = _asked(run) if run is not None and shown else {}
    parts: dict[str, Any] = asked or {"model": model}
    if asked and run is not None and recorded is not None:
        parts = {"model": run.checkpoint, "recorded": recorded}
    said = {key: value for key, value in parts.items() if value not in ("", None)}
    beside = _asked(looking.compared) if asked and looking.compared is not None else {}
    # What the link says of the one run holds for the other, too, where it says nothing else.
    said |= {COMPARED + key: value for key, value in beside.items() if value != parts.get(key, "")}
    if looking.panel != "race":
        said["panel"] = looking.panel
        said |= {VIEW + name: value for name, value in looking.view.items() if value}
    return "?" + urlencode(said)


def is_of(run: Run, address: Address) -> bool:
    """Whether an address asks for this very run."""
    own = {key: str(value) for key, value in _asked(run).items()}
    return bool(address.question) and address.asked == Address.read(own).asked


def _asked(run: Run) -> dict[str, Any]:
    """The keys from which a run can be computed again; none of a run that is not over, or too long for an address."""
    steps = [step.removeprefix("<<").removesuffix(">>") for step in run.steps]
    if run.status not in ("done", "loaded") or len(run.question) > LONGEST:
        return {}
    return {
        "model": run.checkpoint,
        "q": run.question,
        "gold": run.gold or "",
        "k": run.num_blocks,
        "direct": 1 if "direct" in run.lanes else "",
        "seed": run.seed or "",
        "steps": ";".join(steps) if not any(";" in step for step in steps) else "",
    }


def _under(prefix: str, query: Mapping[str, str]) -> dict[str, str]:
    return {key[len(prefix) :]: value for key, value in query.items() if key.startswith(prefix)}


def _without(prefix: str, query: Mapping[str, str]) -> dict[str, str]:
    return {key: value for key, value in query.items() if not key.startswith(prefix)}


def _number(text: str, digits: int = 3) -> int | None:
    return int(text) if text.isascii() and text.isdigit() and len(text) <= digits else None
