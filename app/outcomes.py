"""Examples by failure: where memory and chain of thought came to different ends, counted and kept for the gallery.

`python -m app.outcomes CHECKPOINT DATA` asks every problem of a file by both methods and keeps a few questions of every
outcome, with the counts of all, in `recorded/<checkpoint name>-outcomes.json`. The page offers them as what they are:
outcomes when they were recorded.

Knows the file and the counting. Does not know Gradio, HTML or how answers are decoded.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rim_probe.errors import RiMError
from rim_probe.probing.reading_format import each, record, text, whole
from rim_probe.problems import Problem, is_correct, read_problems

FOLDER = Path(__file__).parent / "recorded"
OUTCOMES_FORMAT = "rim-probe-outcomes/1"
OUTCOMES = {  # (memory is right, chain of thought is right): what that is called
    (False, True): "RiM wrong, CoT right",
    (True, False): "RiM right, CoT wrong",
    (False, False): "both wrong",
    (True, True): "both right",
}
OFFERED = tuple(OUTCOMES.values())[:3]  # what is right both times is in the gallery by depth
KEPT = 3  # questions of every outcome
BATCH = 64


@dataclass(frozen=True)
class Outcomes:
    """How both methods did on a file of problems.

    Attributes:
        data, command, date: where it comes from.
        counts: problems by outcome, all of `OUTCOMES`; they add up to `n`.
        examples: a few problems of every outcome in `OFFERED`, of different depths where there are any.
    """

    checkpoint: str
    data: str
    command: str
    date: str
    counts: dict[str, int]
    examples: dict[str, list[Problem]] = field(default_factory=dict)

    @property
    def n(self) -> int:
        return sum(self.counts.values())


def load(checkpoint: str, folder: Path = FOLDER) -> Outcomes | None:
    """The outcomes recorded for a checkpoint, None where there are none.

    Raises:
        RiMError: a damaged file.
    """
    path = folder / f"{checkpoint}-outcomes.json"
    if not path.is_file():
        return None
    problem = record({"question": text, "steps": each(text), "answer": text})
    form = dict.fromkeys(("format", "checkpoint", "data", "command", "date"), text) | {
        "counts": record(dict.fromkeys(OUTCOMES.values(), whole(0, 10**9))),
        "examples": record(dict.fromkeys(OFFERED, each(problem))),
    }
    try:
        found = record(form)(json.loads(path.read_text(encoding="utf-8")), path.name)
        if found.pop("format") != OUTCOMES_FORMAT:
            raise RiMError(f"its format is not {OUTCOMES_FORMAT!r}")
    except (OSError, ValueError) as error:
        raise RiMError(
            f"The examples by outcome in {path.name} cannot be shown ({error}); "
            "make them again with `python -m app.outcomes`."
        ) from None
    for problems in found["examples"].values():
        problems[:] = [Problem(one["question"], tuple(one["steps"]), one["answer"]) for one in problems]
    return Outcomes(**found)


def save(outcomes: Outcomes, folder: Path = FOLDER) -> Path:
    """Writes `folder/<checkpoint name>-outcomes.json` and returns its path."""
    path = folder / f"{outcomes.checkpoint}-outcomes.json"
    folder.mkdir(parents=True, exist_ok=True)
    examples = {
        outcome: [{"question": p.question, "steps": list(p.steps), "answer": p.answer} for p in problems]
        for outcome, problems in outcomes.examples.items()
    }
    data = {"format": OUTCOMES_FORMAT} | vars(outcomes) | {"examples": examples}
    path.write_text(json.dumps(data, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    return path


def find(checkpoint: str, path: str, device: str | None = None, command: str = "") -> Outcomes:
    """Asks every problem of a file by memory and by chain of thought.

    Raises:
        RiMError: a checkpoint without a CoT model of its own, a file without problems that it can be asked.
    """
    from rim_probe.decoding import answer_batch
    from rim_probe.model import load_methods

    models = load_methods(checkpoint, device)
    if models["cot"] is models["memory"]:
        raise RiMError(f"{checkpoint} has no CoT model of its own, so there is nothing to compare; train one in cot/.")
    problems = [problem for problem in read_problems(path).problems if _can_be_asked(models, problem)]
    if not problems:
        raise RiMError(f"{path} holds no problem that {checkpoint} can be asked; choose one like its training data.")
    problems.sort(key=lambda problem: len(problem.question))  # like lengths together pad least
    by_outcome: dict[str, list[Problem]] = {name: [] for name in OUTCOMES.values()}
    for start in range(0, len(problems), BATCH):
        batch = problems[start : start + BATCH]
        asked = [problem.question for problem in batch]
        memory, cot = (answer_batch(models[method], asked, method) for method in ("memory", "cot"))
        for problem, one, other in zip(batch, memory, cot, strict=True):
            right = is_correct(one.value, problem.answer), is_correct(other.value, problem.answer)
            by_outcome[OUTCOMES[right]].append(problem)
    return Outcomes(
        Path(checkpoint).name,
        Path(path).name,
        command,
        datetime.datetime.now(datetime.UTC).date().isoformat(),
        {name: len(found) for name, found in by_outcome.items()},
        {name: _varied(by_outcome[name]) for name in OFFERED},
    )


def _can_be_asked(models: dict, problem: Problem) -> bool:
    try:
        for method in ("memory", "cot"):
            models[method].prompt_ids(problem.question, method)
    except RiMError:
        return False
    return True


def _varied(problems: Sequence[Problem]) -> list[Problem]:
    """`KEPT` problems, one of each depth first, the shortest question of it: they are to be read by people."""
    first_of_depth = {len(problem.steps): problem for problem in reversed(problems)}
    first = [first_of_depth[depth] for depth in sorted(first_of_depth)]
    rest = [problem for problem in problems if problem not in first]
    return sorted((first + rest)[:KEPT], key=lambda problem: len(problem.steps))


def main(arguments: list[str] | None = None, folder: Path = FOLDER) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m app.outcomes", description="Counts where memory and chain of thought fail; keeps examples."
    )
    parser.add_argument("checkpoint", help="a checkpoint folder with cot/, such as checkpoints/rim-tiny")
    parser.add_argument("data", help="a problem file, such as data/choose-heldout.txt; not one that tables report")
    parser.add_argument("--device", help="cpu or cuda (default: the GPU where there is one)")
    flags = parser.parse_args(arguments)
    command = shlex.join(["python", "-m", "app.outcomes", *(sys.argv[1:] if arguments is None else arguments)])
    try:
        outcomes = find(flags.checkpoint, flags.data, flags.device, command)
        for name, count in outcomes.counts.items():
            print(f"{name}: {count} of {outcomes.n} ({count / outcomes.n:.1%})")
        print(f"written: {save(outcomes, folder)}")
    except RiMError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
