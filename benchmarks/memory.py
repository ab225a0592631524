"""`python -m benchmarks.memory`: many runs in one tab; the server's memory must stay flat.

Method: after the first 100 runs, in which histories and caches fill up, a line is fitted to the memory over the runs.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import time

import psutil

from benchmarks.load import CHECKPOINT
from benchmarks.visitor import examples, memory, ready, server
from rim_probe.options import open_card

WARM_UP = 100  # runs
EVERY = 25  # runs


async def measure(url: str, process: psutil.Process, runs: int) -> list[tuple[int, int]]:
    """(runs so far, bytes) from time to time."""
    problems, points = examples(CHECKPOINT), []
    async with ready(url) as visitor:
        visitor.put("model", CHECKPOINT)
        for number in range(1, runs + 1):
            problem = problems[number % len(problems)]
            visitor.put("question", problem["question"])
            visitor.put("gold", problem["answer"])
            await visitor.fire("run", "click")
            if number % EVERY == 0:
                points.append((number, memory(process)))
                print(f"{number:5} runs  {points[-1][1] / 1e6:7,.1f} MB", flush=True)
    return points


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__.split("\n\n")[0])
    parser.add_argument("--runs", type=int, default=1000, help="how many (default: 1000)")
    parser.add_argument("--port", type=int, default=7889, help="port of the server it starts (default: 7889)")
    parser.add_argument("--card", help="put the result between <!-- memory --> and <!-- /memory --> of a Markdown file")
    flags = parser.parse_args(arguments)
    card = open_card(flags.card, "memory") if flags.card else None
    with server(flags.port) as (url, process):
        points = asyncio.run(measure(url, process, flags.runs))
    text = report(points)
    if card:
        card(text)
    print(text, end="")
    return 0


def report(points: list[tuple[int, int]]) -> str:
    late = [(number, size) for number, size in points if number > WARM_UP]
    if len(late) < 2:
        return f"Fewer than {WARM_UP + 2 * EVERY} runs tell nothing.\n"
    slope = statistics.linear_regression(*zip(*late, strict=True)).slope
    first, last = late[0], late[-1]
    return (
        f"Memory of the server (RSS) after {first[0]} runs {first[1] / 1e6:,.0f} MB, after {last[0]:,} runs "
        f"{last[1] / 1e6:,.0f} MB: {slope / 1e3:+.1f} kB a run; {time.strftime('%Y-%m-%d')}.\n"
    )


if __name__ == "__main__":
    sys.exit(main())
