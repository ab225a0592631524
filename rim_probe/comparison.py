"""Several files of problems and what an answer costs, in one report: the paper's table for one checkpoint.

Each file gets the report of `evaluation.evaluate`; costs are measured once per device, on the first file. Such a run
can take hours on a CPU, so what is done is kept beside the report (`Kept`): whole groups of questions, and every turn
of the costs. The same command goes on from there, if weights, data and settings are the same.

Knows the JSON of a comparison. Does not know how answers are counted (evaluation), timed (costs) or shown
(comparison_report, plots.comparison).
"""

import datetime
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rim_probe.comparison_report import COMPARISON_FORMAT
from rim_probe.costs import measure_costs
from rim_probe.errors import RiMError
from rim_probe.evaluation import Arm, Journal, Outcome, describe_machine, describe_run, evaluate
from rim_probe.files import write_atomic
from rim_probe.model import RiM, placement
from rim_probe.problems import Problem, ProblemFile
from rim_probe.untrained import Untrained

_KEPT_FORMAT = "rim-probe-comparison-kept/1"


@dataclass(frozen=True)
class DataFile:
    """One file of a comparison; `problems` are those of `data` that are asked."""

    name: str
    path: str
    data: ProblemFile
    problems: Sequence[Problem]


class Kept:
    """What an unfinished comparison has done so far, in a file beside its output.

    Args:
        output: the report's path; what is kept lies in `<output>.partial`. None: nothing is kept.
        key: all that the figures depend on. What was kept under another key is left unread, and written over.
    """

    def __init__(self, output: Path | None, key: Mapping[str, Any]):
        self.path = None if output is None else _partial(output)
        self._data: dict[str, Any] = {"format": _KEPT_FORMAT, "key": dict(key), "files": {}, "costs": {}}
        if self.path is not None and self.path.exists():
            try:
                found = json.loads(self.path.read_text(encoding="utf-8"))
            except (OSError, ValueError):  # cut off when the machine went down
                found = None
            if isinstance(found, dict) and {k: found.get(k) for k in ("format", "key")} == {
                k: self._data[k] for k in ("format", "key")
            }:
                self._data = found

    def journal(self, name: str) -> Journal:
        """The journal of one file, kept again after every group."""
        told = self._data["files"].get(name, [])
        journal = Journal(
            {_arm(entry): {int(i): _outcome(cells) for i, cells in entry["outcomes"].items()} for entry in told},
            {_arm(entry): entry["seconds"] for entry in told},
        )

        def keep() -> None:
            self._data["files"][name] = [
                {
                    "method": arm.method,
                    "num_blocks": arm.num_blocks,
                    "seconds": journal.seconds[arm],
                    "outcomes": {i: _cells(outcome) for i, outcome in outcomes.items()},
                }
                for arm, outcomes in journal.outcomes.items()
            ]
            self.save()

        journal.after_group = keep
        return journal

    def turns(self, device: str) -> list:
        """The measured turns of one device, a list to be filled further; kept by `save`."""
        return self._data["costs"].setdefault(device, [])

    def save(self) -> None:
        if self.path is not None:
            write_atomic(self.path, json.dumps(self._data).encode())


def _partial(output: Path) -> Path:
    return output.with_name(output.name + ".partial")


def forget(output: Path | None) -> None:
    """Removes what was kept for a report that is written now."""
    if output is not None:
        _partial(output).unlink(missing_ok=True)


def _arm(entry: Mapping[str, Any]) -> Arm:
    return Arm(entry["method"], entry["num_blocks"])


def _cells(outcome: Outcome) -> list:
    """An outcome, short: final, a digit per block, truncated, refused."""
    flags = (outcome.final, outcome.truncated, outcome.refused)
    return [*map(int, flags), "".join(str(int(block)) for block in outcome.blocks)]


def _outcome(cells: Sequence[Any]) -> Outcome:
    final, truncated, refused, blocks = cells
    return Outcome(bool(final), tuple(block == "1" for block in blocks), bool(truncated), bool(refused))


def compare(
    methods: Mapping[str, RiM],
    files: Sequence[DataFile],
    *,
    load: Callable[[str], Mapping[str, RiM]],
    checkpoint: str,
    fingerprints: Mapping[str, str],
    output: Path | None = None,
    cost_devices: Sequence[str] = (),
    num_blocks: int | None = None,
    batch_size: int = 64,
    max_new_tokens: int = 256,
    latency_samples: int = 50,
    limit: int | None = None,
    seed: int = 0,
    command: str = "",
    progress: bool = True,
) -> dict[str, Any]:
    """Evaluates every file, measures the costs, and reports; an interrupted run reports what is done.

    Args:
        methods: as `evaluate` takes them.
        files: with names of their own; costs are measured on the first.
        load: the same methods on another device, for `cost_devices`.
        checkpoint: as the user named it.
        fingerprints: of the methods' weights.
        output: where the report will lie, if anywhere; what is done is kept beside it until all is.
        cost_devices: where costs are measured, as "cpu" or "cuda"; empty: where `methods` are.
        limit: as `describe_run` tells it.
        num_blocks, batch_size, max_new_tokens, latency_samples, seed: as in `evaluate`.

    Raises:
        RiMError: a device that is not here; as `evaluate`.
    """
    device = next(iter(methods.values())).device
    places = list(dict.fromkeys(cost_devices)) or [device.type]
    for place in places:
        if not str(placement(place, None)[0]).startswith(place):  # it falls back to the CPU
            raise RiMError(f"There is no {place} on this machine; leave it out of --cost-devices.")
    settings = {
        "num_blocks": num_blocks,
        "batch_size": batch_size,
        "max_new_tokens": max_new_tokens,
        "latency_samples": latency_samples,
        "limit": limit,
        "seed": seed,
    }
    runs = [describe_run(checkpoint, file.data, file.path, limit, device, command) for file in files]
    # The order of the files counts, since costs belong to the first; and so does the machine, since times are its own.
    key = {
        "fingerprints": dict(fingerprints),
        "data": [[file.name, run["data"]["sha256"]] for file, run in zip(files, runs, strict=True)],
        "settings": settings,
        "machine": describe_machine(device),
    }
    kept = Kept(output, key)

    reports, costs, interrupted = [], [], False
    for file, run in zip(files, runs, strict=True):
        if interrupted:
            break
        journal = kept.journal(file.name)
        report = evaluate(
            methods,
            file.problems,
            num_blocks=num_blocks,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            latency_samples=0,
            seed=seed,
            progress=progress,
            label=file.name,
            journal=journal,
        )
        interrupted = report["interrupted"]
        report["run"] = run
        seconds = [
            {"method": arm.method, "num_blocks": arm.num_blocks, "seconds": spent}
            for arm, spent in journal.seconds.items()
        ]
        reports.append({"name": file.name, "report": report, "seconds": seconds})
    for place in [] if interrupted or not latency_samples else places:
        here = methods if place == device.type else load(place)
        measured, interrupted = measure_costs(
            here,
            files[0].problems,
            samples=latency_samples,
            num_blocks=num_blocks,
            max_new_tokens=max_new_tokens,
            seed=seed,
            turns=kept.turns(place),
            after_turn=kept.save,
            label=f"costs on {place}" if progress else None,
        )
        costs += [measured] if measured else []
        if interrupted:
            break
    return {
        "format": COMPARISON_FORMAT,
        "interrupted": interrupted,
        "run": {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "command": command,
            "checkpoint": checkpoint,
            "untrained": any(isinstance(rim, Untrained) for rim in methods.values()),
            "fingerprints": dict(fingerprints),
            "machine": describe_machine(device),
        },
        "settings": settings,
        "files": reports,
        "costs": costs,
    }
