"""One report of `eval`: accuracy on each file of problems, and what an answer costs.

Each file gets the report of `evaluation.evaluate`; costs are measured once per device, on the first file. Such a run
can take hours on a CPU, so what is done is kept beside the report (`Kept`): whole groups of questions, and every turn
of the costs. The same command goes on from there, if weights, data and settings are the same.

Knows the JSON of a comparison. Does not know how answers are counted (evaluation), timed (costs) or shown (report).
"""

import datetime
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rim_probe.baselines import baselines
from rim_probe.costs import measure_costs
from rim_probe.errors import RiMError
from rim_probe.evaluation import (
    PLACED_PROBLEMS,
    Arm,
    Journal,
    Outcome,
    describe_machine,
    describe_run,
    evaluate,
    proportion,
)
from rim_probe.files import begins_with, check_file, write_atomic
from rim_probe.model import RiM, placement
from rim_probe.problems import Problem, ProblemFile, is_correct
from rim_probe.report import COMPARISON_FORMAT

_KEPT_FORMAT = "rim-probe-comparison-kept/3"


@dataclass(frozen=True)
class DataFile:
    """One file of a comparison; `problems` are those of `data` that are asked."""

    name: str
    path: str
    data: ProblemFile
    problems: Sequence[Problem]


class Kept:
    """What an unfinished comparison has done so far, in `<output>.partial`; without an output nothing is kept.

    What was kept under another `key` (all that the figures depend on) is left unread, and written over.
    """

    def __init__(self, output: Path | None, key: Mapping[str, Any]):
        self.path = None if output is None else output.with_name(output.name + ".partial")
        head = {"format": _KEPT_FORMAT, "key": json.loads(json.dumps(key))}
        self._data: dict[str, Any] = {**head, "files": {}, "costs": {}}
        if self.path is not None and self.path.exists():
            check_file(self.path, begins_with('{"format": "rim-probe-comparison-kept/'), "what `eval` keeps")
            try:
                found = json.loads(self.path.read_text(encoding="utf-8"))
            except (OSError, ValueError):
                found = None
            if isinstance(found, dict) and head.items() <= found.items():
                self._data = found

    def journal(self, name: str) -> Journal:
        """The journal of one file, kept again after every group."""
        journal = Journal(
            {
                Arm(*arm): {int(i): Outcome(*cells) for i, cells in outcomes.items()}
                for arm, outcomes in self._data["files"].get(name, [])
            }
        )

        def keep() -> None:
            self._data["files"][name] = [[[*vars(arm).values()], told] for arm, told in journal.outcomes.items()]
            self.save()

        journal.after_group = keep
        return journal

    def turns(self, device: str) -> list:
        """The measured turns of one device, a list to be filled further; kept by `save`."""
        return self._data["costs"].setdefault(device, [])

    def save(self) -> None:
        """Writes what is done, if there is a file for it."""
        if self.path is not None:
            write_atomic(self.path, json.dumps(self._data).encode())

    def forget(self) -> None:
        """Removes the file: the report is written now."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


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
    placed: int = PLACED_PROBLEMS,
    train: Sequence[Problem] = (),
    limit: int | None = None,
    seed: int = 0,
    command: str = "",
    progress: bool = True,
) -> tuple[dict[str, Any], Kept]:
    """Evaluates every file, measures the costs, and reports; an interrupted run reports what is done.

    Args:
        methods: as `evaluate` takes them.
        files: with names of their own; costs are measured on the first.
        load: the same methods on another device, for `cost_devices`.
        checkpoint: as the user named it.
        fingerprints: of the methods' weights.
        output: where the report will lie, if anywhere; what is done is kept beside it until all is.
        cost_devices: where costs are measured, as "cpu" or "cuda"; empty: where `methods` are.
        num_blocks: as in `evaluate`.
        batch_size: as in `evaluate`.
        max_new_tokens: as in `evaluate`.
        latency_samples: questions timed one by one; 0 measures no costs.
        placed: as in `evaluate`.
        train: problems that the shallow baselines are fitted on (`baselines`).
        limit: as `describe_run` tells it.
        seed: as in `evaluate`, and of the choice of timed questions.
        command: as typed.
        progress: whether bars are drawn.

    Returns:
        The report, and what was kept on the way, to be forgotten when the report is written.

    Raises:
        RiMError: a device that is not here; as `evaluate`.
    """
    device = next(iter(methods.values())).device
    places = list(dict.fromkeys(cost_devices)) or [device.type]
    for place in places:
        if not str(placement(place, None)[0]).startswith(place):  # it falls back to the CPU
            raise RiMError(f"There is no {place} on this machine; leave it out of --cost-devices.")
    asking = {"num_blocks": num_blocks, "max_new_tokens": max_new_tokens, "seed": seed}
    settings = {
        **asking,
        "placed": placed,
        "batch_size": batch_size,
        "latency_samples": latency_samples,
        "limit": limit,
    }
    runs = [describe_run(checkpoint, file.data, file.path, limit, device, command) for file in files]
    # The order of the files counts, since costs belong to the first; and so does the machine, since times are its own.
    machine = describe_machine(device)
    data = [[file.name, run["data"]["sha256"]] for file, run in zip(files, runs, strict=True)]
    kept = Kept(output, {"fingerprints": fingerprints, "data": data, "settings": settings, "machine": machine})

    reports, costs, interrupted = [], [], False
    rules = baselines(train)
    for file, run in zip(files, runs, strict=True):
        if interrupted:
            break
        report = evaluate(
            methods,
            file.problems,
            **asking,
            placed=placed,
            batch_size=batch_size,
            progress=progress,
            label=file.name,
            journal=kept.journal(file.name),
        )
        interrupted = report["interrupted"]
        shallow = {
            name: proportion(
                is_correct(given, one.answer)
                for given, one in zip(answer([p.question for p in file.problems]), file.problems, strict=True)
            )
            for name, answer in rules.items()
        }
        reports.append({"name": file.name, "report": report | {"run": run, "baselines": shallow}})
    for place in [] if interrupted or not latency_samples else places:
        measured, interrupted = measure_costs(
            methods if place == device.type else load(place),
            files[0].problems,
            **asking,
            samples=latency_samples,
            turns=kept.turns(place),
            after_turn=kept.save,
            label=f"costs on {place}" if progress else None,
        )
        costs += [measured] if measured else []
        if interrupted:
            break
    report = {
        "format": COMPARISON_FORMAT,
        "interrupted": interrupted,
        "run": {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "command": command,
            "checkpoint": checkpoint,
            "fingerprints": dict(fingerprints),
            "machine": machine,
        },
        "settings": settings,
        "files": reports,
        "costs": costs,
    }
    return report, kept
