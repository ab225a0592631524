"""`python -m benchmarks.load`: many visitors at once on one server, for some minutes.

Every visitor opens the page, asks examples, looks at panels, does one intervention, thinks 2 to 6 seconds in between;
some close the tab in the middle of an answer and come back as somebody new. Measured at the visitor: from the click
to the message that shows RiM's answer, waiting in the queue included, and from a panel switch to the panel.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass, field

from benchmarks.visitor import ANSWERED, Visitor, Watch, examples, memory, quantile, ready, server
from rim_probe.evaluation import cpu_name
from rim_probe.options import open_card
from rim_probe.report import table

PANELS = ("blocks", "attention", "layers", "trajectory", "surgery", "evidence", "race")
THINKING = (2.0, 6.0)  # seconds
LEAVING = 0.1  # chance to close the tab in the middle of an answer
CHECKPOINT = "rim-tiny"


@dataclass
class Tally:
    answers: list[float] = field(default_factory=list)  # seconds
    races: list[float] = field(default_factory=list)
    switches: list[float] = field(default_factory=list)
    surgeries: list[float] = field(default_factory=list)
    left: int = 0
    errors: Counter[str] = field(default_factory=Counter)


async def visit(url: str, until: float, tally: Tally, dice: random.Random) -> None:
    """One person, in as many tabs one after the other as it takes."""
    problems = examples(CHECKPOINT)
    await asyncio.sleep(dice.uniform(0, THINKING[1]))  # people do not all come in the same instant
    while time.monotonic() < until:
        try:
            async with Visitor(url) as visitor:
                await visitor.load()
                await _use(visitor, problems, until, tally, dice)
        except _Left:
            tally.left += 1
        except Exception as error:  # whatever goes wrong is what is measured here
            tally.errors[f"{type(error).__name__}: {error}"[:200]] += 1
            await asyncio.sleep(1)


class _Left(Exception):
    """The tab was closed."""


async def _use(visitor: Visitor, problems: list, until: float, tally: Tally, dice: random.Random) -> None:
    while time.monotonic() < until:
        problem = dice.choice(problems)
        visitor.put("question", problem["question"])
        visitor.put("gold", problem["answer"])
        visitor.put("model", CHECKPOINT)
        watch, start = Watch(ANSWERED), time.perf_counter()
        running = visitor.fire("run", "click", seen=watch)
        if dice.random() < LEAVING:
            task = asyncio.create_task(running)
            await asyncio.sleep(dice.uniform(0.05, 1.0))
            task.cancel()
            raise _Left
        await running
        tally.races.append(time.perf_counter() - start)
        if watch.seconds is None:
            raise RuntimeError("a run ended without RiM's answer")
        tally.answers.append(watch.seconds)
        for panel in dice.sample(PANELS, 2):
            await asyncio.sleep(dice.uniform(*THINKING))
            tally.switches.append(await switch(visitor, panel))
        await asyncio.sleep(dice.uniform(*THINKING))
        tally.surgeries.append(await operate(visitor, f"{dice.randint(1, 8)}b"))
        await asyncio.sleep(dice.uniform(*THINKING))


async def switch(visitor: Visitor, panel: str) -> float:
    """Seconds from the click on a panel's tab until it has come."""
    start = time.perf_counter()
    shown = await visitor.fire("tabs", "select", {"panel": panel})
    if not any(f'data-open="{panel}"' in html for html in shown):
        raise RuntimeError(f"the panel {panel} did not come")
    return time.perf_counter() - start


async def operate(visitor: Visitor, ops: str) -> float:
    """Seconds from a switch in Surgery to its result."""
    start = time.perf_counter()
    shown = await visitor.fire("panel", "select", {"do": {"act": "operate", "ops": ops}})
    if not any('data-open="surgery"' in html for html in shown):
        raise RuntimeError("Surgery did not come")
    return time.perf_counter() - start


async def measure(url: str, visitors: int, minutes: float, seed: int) -> Tally:
    """Everybody at once."""
    tally, until = Tally(), time.monotonic() + 60 * minutes
    people = [visit(url, until, tally, random.Random(f"{seed} {number}")) for number in range(visitors)]
    await asyncio.gather(*people)
    return tally


def report(tally: Tally, visitors: int, minutes: float, before: int, after: int) -> str:
    def row(name: str, seconds: list[float]) -> list[str]:
        if not seconds:
            return [name, "0", "–", "–", "–"]
        return [name, str(len(seconds)), *(f"{1000 * quantile(seconds, share):,.0f}" for share in (0.5, 0.95, 1.0))]

    rows = [
        row("click to RiM's answer, queue included", tally.answers),
        row("click to the end of the race and its reading", tally.races),
        row("panel switch", tally.switches),
        row("switch in Surgery to its result", tally.surgeries),
    ]
    errors = "".join(f"\n  - {count} × {text}" for text, count in tally.errors.most_common())
    return (
        f"{visitors} visitors, {minutes:g} minutes, `{CHECKPOINT}`, thinking {THINKING[0]:g} to {THINKING[1]:g} s, "
        f"all on one {cpu_name()}, {time.strftime('%Y-%m-%d')}.\n\n"
        + table(["ms", "n", "median", "p95", "slowest"], rows)
        + f"\n\n- Errors: {sum(tally.errors.values())}.{errors}\n"
        f"- {tally.left} tabs were closed in the middle of an answer.\n"
        f"- Memory of the server (RSS): {before / 1e6:,.0f} MB before, {after / 1e6:,.0f} MB after.\n"
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.load", description=__doc__.split("\n\n")[0])
    parser.add_argument("--visitors", type=int, default=20, help="how many at once (default: 20)")
    parser.add_argument("--minutes", type=float, default=3, help="for how long (default: 3)")
    parser.add_argument("--port", type=int, default=7889, help="port of the server it starts (default: 7889)")
    parser.add_argument("--seed", type=int, default=0, help="of the visitors' choices (default: 0)")
    parser.add_argument("--card", help="put the table between <!-- load --> and <!-- /load --> of a Markdown file")
    flags = parser.parse_args(arguments)
    card = open_card(flags.card, "load") if flags.card else None
    with server(flags.port) as (url, process):
        asyncio.run(_first(url))
        before = memory(process)
        tally = asyncio.run(measure(url, flags.visitors, flags.minutes, flags.seed))
        text = report(tally, flags.visitors, flags.minutes, before, memory(process))
    if card:
        card(text)
    print(text, end="")
    return 1 if tally.errors else 0


async def _first(url: str) -> None:
    """One run, so that memory is compared with a server that has everything loaded."""
    async with ready(url) as visitor:
        problem = examples(CHECKPOINT)[0]
        visitor.put("question", problem["question"])
        visitor.put("model", CHECKPOINT)
        await visitor.fire("run", "click")


if __name__ == "__main__":
    sys.exit(main())
