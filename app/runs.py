"""A run: one question answered by every method, and what was read of its memory. The one thing all panels draw from.

Knows what belongs to a run and its dictionary form (`Run.to_dict`), which is at the same time what the page offers for
download, what the API returns and what is committed under `app/recorded/`. Does not know how a run is made
(`app.session`), nor how a dictionary from outside is checked (`app.run_format`).
"""

from __future__ import annotations

import functools
import json
import zlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rim_probe.decoding import Answer

RUN_FORMAT = "rim-probe-run/2"
METHODS = ("memory", "cot", "direct")  # in the order in which they run and are drawn
RACERS = ("memory", "cot")  # those that every run has


@dataclass
class Lane:
    """One method's part of a run.

    Attributes:
        events: dictionaries with `kind` ("prefill", "token", "readout"), `seconds` since this method started, and
            `text`; a readout also has `block` (1-based), `value` and `probability`.
        answer: `rim_probe.decoding.Answer.to_dict()`, or None while the method is running.
        correct: whether the answer equals the gold one; None where no gold answer is known.
        repeats: seconds to the answer of repeats of the same question (`app.session.measure`).
    """

    events: list[dict[str, Any]] = field(default_factory=list)
    answer: dict[str, Any] | None = None
    correct: bool | None = None
    repeats: list[float] = field(default_factory=list)

    @property
    def answered_seconds(self) -> float | None:
        """When the last token of the answer had come; None before the method has finished.

        For memory this may be earlier than `answer["total_seconds"]`: the readouts of the other blocks, which the page
        shows but an answer does not need, can take more tokens.
        """
        if self.answer is None:
            return None
        tokens = [event["seconds"] for event in self.events if event["kind"] == "token"]
        return self.answer["total_seconds"] if self.answer["cancelled"] or not tokens else tokens[-1]


@dataclass
class Run:
    """One question answered by several methods.

    Attributes:
        steps: the gold steps ("<<3+4=7>>") of an example; empty where they are not known.
        outside: what the question has that those of the training had not, in one sentence; None: nothing, or unknown.
        matched: chain of thought has weights of its own; else the memory model's are asked for it.
        lanes: by method; "memory" and "cot" always, "direct" where it was asked for.
        status: "running", "done", "stopped" or "loaded" (from a file).
        seed: of what is drawn at random in experiments on this run; the answers themselves are greedy.
        surgery, counterfactual: the last result of `rim_probe.probing.surgery` and `.trial` on this run, if any.
    """

    checkpoint: str
    question: str
    gold: str | None
    num_blocks: int
    machine: str = ""
    date: str = ""
    steps: tuple[str, ...] = ()
    outside: str | None = None
    matched: bool = True
    lanes: dict[str, Lane] = field(default_factory=lambda: {method: Lane() for method in RACERS})
    status: str = "running"
    seed: int = 0
    surgery: dict[str, Any] | None = None
    counterfactual: dict[str, Any] | None = None
    _packed: bytes | None = field(default=None, init=False, repr=False)

    @property
    def reading(self) -> dict[str, Any] | None:
        """What the probes say (`rim_probe.probing.reading`), filled in after the race; not to be changed in place."""
        return None if self._packed is None else _unpack(self._packed)

    @reading.setter
    def reading(self, reading: dict[str, Any] | None) -> None:
        text = json.dumps(reading, ensure_ascii=False)
        self._packed = None if reading is None else zlib.compress(text.encode(), level=1)

    def drawable(self) -> dict[str, Any] | None:
        """The reading with the experiments on it, as `rim_probe.plots.draw` takes it; None before it is there."""
        if self.reading is None:
            return None
        return self.reading | {"surgery": self.surgery, "counterfactual": self.counterfactual}

    def chain(self) -> Answer | None:
        """What chain of thought answered, for `rim_probe.probing.reading.read`, which would otherwise ask it again."""
        answer = self.lanes["cot"].answer
        if answer is None or answer["cancelled"] or not self.matched:
            return None
        from rim_probe.decoding import Answer

        return Answer(**answer | {"token_ids": tuple(answer["token_ids"]), "readouts": ()})

    def to_dict(self, whole: bool = True) -> dict[str, Any]:
        """The run as plain data; without reading and experiments, which are most of it, where not `whole`."""
        looked = {"reading": self.reading, "surgery": self.surgery, "counterfactual": self.counterfactual}
        return {
            "format": RUN_FORMAT,
            "checkpoint": self.checkpoint,
            "question": self.question,
            "gold": self.gold,
            "steps": list(self.steps),
            "outside": self.outside,
            "num_blocks": self.num_blocks,
            "seed": self.seed,
            "machine": self.machine,
            "date": self.date,
            "matched": self.matched,
            "status": self.status,
            **{
                method: {
                    "answer": lane.answer,
                    "answered_seconds": lane.answered_seconds,
                    "correct": lane.correct,
                    "repeats": lane.repeats,
                    "events": lane.events,
                }
                for method, lane in self.lanes.items()
            },
            **(looked if whole else dict.fromkeys(looked)),
        }

    @classmethod
    def from_dict(cls, data: Any) -> Run:
        """The finished run that `to_dict` came from, of this format or the one before; every entry is checked.

        Raises:
            RiMError: not such a run, or a damaged one.
        """
        from app.run_format import checked_run

        data = checked_run(data)
        reading = data.pop("reading")
        lanes = {method: Lane(**data.pop(method)) for method in METHODS if method in data}
        run = cls(**data | {"steps": tuple(data["steps"]), "lanes": lanes})
        run.reading = reading
        return run


@functools.lru_cache(maxsize=24)
def _unpack(packed: bytes) -> dict[str, Any]:
    """Visitors come and go, and Gradio keeps what they did for an hour and more; a packed reading takes 50 kB, an
    unpacked one 2 MB, so only those looked at last lie unpacked."""
    return json.loads(zlib.decompress(packed))
