"""`python -m app.record CHECKPOINT`: answers one example of every depth, times it, reads its memory, keeps all that."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from app import figures, recorded
from app.hands import Hands
from app.models import ModelShelf
from app.panels.race import Race
from app.session import measure
from rim_probe.errors import RiMError


def record(checkpoint: str, device: str | None = None, folder: Path = recorded.FOLDER, command: str = "") -> Path:
    """Runs the first example of every depth and writes `folder/<checkpoint name>.json.gz`.

    Raises:
        RiMError: a checkpoint that cannot be loaded or brings no examples.
    """
    shelf = ModelShelf(preferred=checkpoint, device=device)
    name, race, hands = shelf.names[0], Race(shelf, folder), Hands(shelf)
    first_of_depth = {len(problem.steps): problem for problem in reversed(shelf.examples(name))}
    if not first_of_depth:
        raise RiMError(f"{checkpoint} brings no examples.json, so there is nothing to record.")
    recordings = []
    for depth in sorted(first_of_depth):
        problem = first_of_depth[depth]
        blocks = shelf.layout(name).num_blocks
        run = race.prepare(problem.question, blocks, problem.answer, name, steps=problem.steps)
        for _ in race.answer(run):
            pass
        measure(shelf.load(name), run)
        hands.read(run)
        print(f"{figures.count(depth, 'step')}: {figures.verdict(run)}")
        recordings.append(recorded.Recording(figures.count(depth, "step"), run))
    return recorded.save(name, recordings, command, folder)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m app.record", description=__doc__.split(": ", 1)[1])
    parser.add_argument("checkpoint", help="a checkpoint folder, such as checkpoints/rim-tiny")
    parser.add_argument("--device", help="cpu or cuda (default: the GPU where there is one)")
    flags = parser.parse_args(arguments)
    command = shlex.join(["python", "-m", "app.record", *(sys.argv[1:] if arguments is None else arguments)])
    try:
        print(f"written: {record(flags.checkpoint, flags.device, command=command)}")
    except RiMError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
