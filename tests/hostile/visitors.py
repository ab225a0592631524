"""Visitors at the same time, whose connections are cut, slow or vanish: the page goes on for everybody else."""

import asyncio
import random
import tempfile
import threading
import time
from pathlib import Path

import httpx

from app import serving
from app.demo import build_demo
from app.models import ModelShelf
from benchmarks.visitor import ANSWERED, Visitor, Watch
from rim_probe.options import silence_transformers

from . import Count
from .checkpoints import QUESTION, make

SLOW = 0.2  # seconds over each message
SECONDS = 300  # until everybody has been served, on a busy machine
KINDS = ("stays", "is cut", "is slow", "vanishes")


async def visit(url: str, kind: str, wait: float) -> str | None:
    """One visitor's story; what went wrong."""
    async with Visitor(url) as visitor:
        await visitor.load()
        visitor.put("question", QUESTION)
        watch = Watch(ANSWERED)

        def seen(text: str) -> None:
            watch(text)
            if kind == "is slow":
                time.sleep(SLOW)

        asking = asyncio.create_task(visitor.fire("run", "click", seen=seen))
        if kind == "is cut":  # in the middle of a message
            await asyncio.sleep(wait)
            asking.cancel()
        elif kind == "vanishes":  # without a word: the socket is closed under it
            await asyncio.sleep(wait)
            await visitor._client.aclose()
            await asyncio.gather(asking, return_exceptions=True)
        else:
            await asyncio.wait_for(asking, SECONDS)
            return None if watch.seconds is not None else "it never saw the answer"
        await asyncio.gather(asking, return_exceptions=True)
    return None


async def slow_request(url: str) -> None:
    """Sends a request byte by byte, does not end it, and goes."""
    host, port = url.removeprefix("http://").split(":")
    _, writer = await asyncio.open_connection(host, int(port))
    for byte in b"GET / HTTP/1.1\r\nHost: x\r\n":
        writer.write(bytes([byte]))
        await writer.drain()
        await asyncio.sleep(0.05)
    writer.transport.abort()


async def story(url: str, count: int, chance: random.Random, found: Count) -> None:
    kinds = [KINDS[number % len(KINDS)] for number in range(count)]
    waits = [chance.uniform(0, 2) for _ in kinds]
    # A visitor who sleeps over every message has a thread, so as not to make the others wait.
    visits = [
        asyncio.to_thread(asyncio.run, visit(url, kind, wait)) if kind == "is slow" else visit(url, kind, wait)
        for kind, wait in zip(kinds, waits, strict=True)
    ]
    slow = [slow_request(url) for _ in range(count // 4)]
    ended = await asyncio.gather(*visits, *slow, return_exceptions=True)
    for kind, end in zip(kinds, ended, strict=False):
        found.note(f"visitor {kind}", None if end is None else repr(end))
    last = await asyncio.wait_for(visit(url, "stays", 0), SECONDS)
    found.note("one who comes afterwards", last)


def attempt(count: int, seed: int) -> Count:
    """`count` visitors at the same time, and one afterwards."""
    found, chance = Count(), random.Random(seed)
    silence_transformers()
    with tempfile.TemporaryDirectory() as work:
        shelf = ModelShelf(make(Path(work) / "small").parent)
        demo = build_demo(shelf)
        url = serving.serve(demo, "127.0.0.1").rstrip("/")
        shelf.load("small", readable=True)
        threads = threading.active_count()
        try:
            asyncio.run(story(url, count, chance, found))
            answer = httpx.get(f"{url}/", timeout=60).status_code
            found.note("page afterwards", None if answer == 200 else f"status {answer}")
            grown = threading.active_count() - threads
            found.note("threads afterwards", None if grown <= serving.THREADS else f"{grown} more than before")
        finally:
            demo.close()
    return found
