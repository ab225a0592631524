"""Runs the groups and prints what came of each; ends with 1 where anything failed."""

import argparse
import contextlib
import importlib
import io
import os
import sys
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

GROUPS = {  # tries of the whole run and of the quick one
    "questions": (10_000, 400),
    "checkpoints": (500, 30),
    "runs": (500, 100),
    "api": (400, 30),
    "visitors": (20, 4),
    "kills": (20, 2),
    "disk": (20, 4),
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.hostile", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few tries of each group: about two minutes")
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=list(GROUPS), metavar="GROUP", help=str([*GROUPS]))
    parser.add_argument("--count", type=int, help="so many tries of each group")
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    failed = 0
    for group in flags.only:
        begun, count = time.monotonic(), flags.count or GROUPS[group][flags.quick]
        module = importlib.import_module(f".{group}", __package__)
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            found = module.attempt(count, flags.seed)  # what servers and trainings print would bury the counts
        failed += len(found.failures)
        print(f"{group}: {found}, {time.monotonic() - begun:.0f} s", flush=True)
        for failure in found.failures[:10]:
            print(f"  {failure}", flush=True)
    print(f"failures: {failed}")
    return bool(failed)


sys.exit(main())
