"""Where memory and chain of thought come to different ends on the same problems: counted, with a few examples of each.

`python -m rim_probe.outcomes CHECKPOINT DATA --output FILE` asks every problem of a file by both methods. The page
offers the examples of `app/recorded/<checkpoint name>-outcomes.json` as what they are: outcomes when they were
recorded.
"""

from __future__ import annotations

import argparse
import datetime
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, NonNegativeInt, ValidationError, model_validator

from rim_probe.errors import RiMError
from rim_probe.files import begins_with, check_file, write_atomic
from rim_probe.problems import Problem, is_correct, read_problems

OUTCOMES = {  # (memory is right, chain of thought is right): what that is called
    (False, True): "RiM wrong, CoT right",
    (True, False): "RiM right, CoT wrong",
    (False, False): "both wrong",
    (True, True): "both right",
}
OFFERED = tuple(OUTCOMES.values())[:3]  # what is right both times is in the gallery by depth
KEPT = 3  # questions of every outcome
BATCH = 64
LARGEST = 2**22  # bytes of a file


class Outcomes(BaseModel):
    """How both methods did on a file of problems.

    Attributes:
        data, command, date: where it comes from.
        counts: problems by outcome, all of `OUTCOMES`; they add up to `n`.
        examples: a few problems of every outcome in `OFFERED`, of different depths where there are any.
    """

    model_config = ConfigDict(strict=True, frozen=True)

    format: Literal["rim-probe-outcomes/1"] = "rim-probe-outcomes/1"
    checkpoint: str
    data: str
    command: str
    date: str
    counts: dict[str, NonNegativeInt]
    examples: dict[str, list[Problem]]

    @model_validator(mode="after")
    def _complete(self) -> Outcomes:
        if set(self.counts) != set(OUTCOMES.values()) or not set(self.examples) <= set(OFFERED):
            raise ValueError("its outcomes are others")
        return self

    @property
    def n(self) -> int:
        """Problems in all."""
        return sum(self.counts.values())

    @classmethod
    def load(cls, path: Path) -> Outcomes:
        """Reads a file that `save` wrote.

        Raises:
            RiMError: a damaged file.
        """
        try:
            if path.stat().st_size > LARGEST:
                raise RiMError(f"{path.name} is too large for examples by outcome; make it again.")
            return cls.model_validate_json(path.read_bytes())
        except (OSError, ValidationError) as error:
            reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
            raise RiMError(
                f"The examples by outcome in {path.name} cannot be shown ({str(reason)[:200]}); "
                "make them again with `python -m rim_probe.outcomes`."
            ) from None

    def save(self, path: Path) -> None:
        """Writes the file, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, (self.model_dump_json(indent=1) + "\n").encode())


def find(checkpoint: str, path: str, device: str | None = None, command: str = "") -> Outcomes:
    """Asks every problem of a file by memory and by chain of thought.

    Raises:
        RiMError: a checkpoint without a CoT model of its own, a file without problems that it can be asked.
    """
    from rim_probe.decoding import answer_batch
    from rim_probe.evaluation import can_ask
    from rim_probe.model import load_methods

    models = load_methods(checkpoint, device)
    if models["cot"] is models["memory"]:
        raise RiMError(f"{checkpoint} has no CoT model of its own, so there is nothing to compare; train one in cot/.")
    methods = ("memory", "cot")
    problems = [
        problem
        for problem in read_problems(path).problems
        if all(can_ask(models[method], problem.question, method) for method in methods)
    ]
    if not problems:
        raise RiMError(f"{path} holds no problem that {checkpoint} can be asked; choose one like its training data.")
    problems.sort(key=lambda problem: len(problem.question))  # like lengths together pad least
    by_outcome: dict[str, list[Problem]] = {name: [] for name in OUTCOMES.values()}
    for start in range(0, len(problems), BATCH):
        batch = problems[start : start + BATCH]
        asked = [problem.question for problem in batch]
        memory, cot = (answer_batch(models[method], asked, method) for method in methods)
        for problem, one, other in zip(batch, memory, cot, strict=True):
            right = is_correct(one.value, problem.answer), is_correct(other.value, problem.answer)
            by_outcome[OUTCOMES[right]].append(problem)
    return Outcomes(
        checkpoint=Path(checkpoint).name,
        data=Path(path).name,
        command=command,
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        counts={name: len(found) for name, found in by_outcome.items()},
        examples={name: varied(by_outcome[name]) for name in OFFERED},
    )


def varied(problems: Sequence[Problem]) -> list[Problem]:
    """`KEPT` problems, one of each depth first, the shortest question of it: they are to be read by people."""
    first_of_depth = {len(problem.steps): problem for problem in reversed(problems)}
    first = [first_of_depth[depth] for depth in sorted(first_of_depth)]
    rest = [problem for problem in problems if problem not in first]
    return sorted((first + rest)[:KEPT], key=lambda problem: len(problem.steps))


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m rim_probe.outcomes", description=__doc__.partition(":")[0] + ".")
    parser.add_argument("checkpoint", help="a checkpoint folder with cot/, such as checkpoints/rim-tiny")
    parser.add_argument("data", help="a problem file, such as data/choose-heldout.txt; not one that tables report")
    parser.add_argument("--output", type=Path, required=True, help="such as app/recorded/rim-tiny-outcomes.json")
    parser.add_argument("--device", help="cpu or cuda (default: the GPU where there is one)")
    flags = parser.parse_args(arguments)
    own = begins_with('{"format": "rim-probe-outcomes/')
    command = shlex.join(["python", "-m", "rim_probe.outcomes", *(sys.argv[1:] if arguments is None else arguments)])
    try:
        check_file(flags.output, own, "a file of outcomes")
        outcomes = find(flags.checkpoint, flags.data, flags.device, command)
        for name, count in outcomes.counts.items():
            print(f"{name}: {count} of {outcomes.n} ({count / outcomes.n:.1%})")
        outcomes.save(flags.output)
        print(f"written: {flags.output}")
    except RiMError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
