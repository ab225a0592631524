"""A visitor without a browser: opens the page, fires its events over HTTP and reads what the server streams back.

Knows Gradio's protocol (config, queue, heartbeat) and the page's element ids. Draws nothing, so that one core is enough
for many visitors beside the server that they measure.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil

ROOT = Path(__file__).parent.parent
ANSWERED = "answered-memory"  # stands in the stage as soon as RiM's answer is shown
START_SECONDS = 120


class Visitor:
    """One browser tab. Use it in `async with`; leaving that closes the tab, whatever is still going on."""

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        self.session = uuid.uuid4().hex
        self.values: dict[int, Any] = {}
        self._client = httpx.AsyncClient(timeout=httpx.Timeout(60, connect=20), trust_env=False)
        self._heart: asyncio.Task | None = None

    async def __aenter__(self) -> Visitor:
        page = await self._client.get(f"{self.url}/")
        page.raise_for_status()
        self.config = (await self._client.get(f"{self.url}/config")).json()
        self.values = {part["id"]: part["props"].get("value") for part in self.config["components"]}
        self._ids = {part["props"].get("elem_id"): part["id"] for part in self.config["components"]}
        self._heart = asyncio.create_task(self._beat())
        return self

    async def __aexit__(self, *_: Any) -> None:
        if self._heart is not None:
            self._heart.cancel()
        await self._client.aclose()

    async def load(self) -> None:
        """What the page does by itself when it has come."""
        for event in self._events(None, "load"):
            await self._chain(event)

    def put(self, element: str, value: Any) -> None:
        """Types into a field."""
        self.values[self._ids[element]] = value

    async def fire(
        self, element: str, what: str, data: Any = None, seen: Callable[[str], None] | None = None
    ) -> list[str]:
        """An event of an element, and all that follows from it. Returns the last HTML of every output, newest last.

        Args:
            seen: called with each message as it comes.

        Raises:
            RuntimeError: the page has no such event, or the server answers with an error.
        """
        events = self._events(self._ids.get(element), what)
        if not events:
            raise RuntimeError(f"The page has no event {what!r} of #{element}.")
        shown: list[str] = []
        for event in events:
            shown += await self._chain(event, data, seen)
        return shown

    def _events(self, component: int | None, what: str) -> list[dict[str, Any]]:
        def starts(event: dict[str, Any]) -> bool:
            return any(name == what and (component is None or target == component) for target, name in event["targets"])

        return [event for event in self.config["dependencies"] if starts(event)]

    async def _chain(
        self, event: dict[str, Any], data: Any = None, seen: Callable[[str], None] | None = None
    ) -> list[str]:
        shown = []
        if event.get("backend_fn", True):
            async for message, text in self._ask(event, data):
                if seen is not None:
                    seen(text)
                if message["msg"] == "process_completed":
                    if not message["success"]:
                        raise RuntimeError(str(message["output"].get("error")))
                    shown += self._take(event, message["output"]["data"])
        for after in self.config["dependencies"]:
            if after.get("trigger_after") == event["id"]:
                shown += await self._chain(after, None, seen)
        return shown

    def _take(self, event: dict[str, Any], outputs: list[Any]) -> list[str]:
        shown = []
        for component, output in zip(event["outputs"], outputs, strict=True):
            if isinstance(output, dict) and output.get("__type__") == "update":
                if "value" not in output:
                    continue
                output = output["value"]
            self.values[component] = output
            if isinstance(output, str):
                shown.append(output)
        return shown

    async def _ask(self, event: dict[str, Any], data: Any) -> AsyncIterator[tuple[dict[str, Any], str]]:
        """The messages of one event, until it is complete."""
        states = {part["id"] for part in self.config["components"] if part["type"] == "state"}
        body = {
            "data": [None if one in states else self.values.get(one) for one in event["inputs"]],
            "event_data": data,
            "fn_index": event["id"],
            "trigger_id": event["targets"][0][0] if event["targets"] else None,
            "session_hash": self.session,
        }
        base = f"{self.url}{self.config.get('api_prefix', '')}"
        joined = await self._client.post(f"{base}/queue/join", json=body)
        joined.raise_for_status()
        wanted = joined.json()["event_id"]
        async with self._client.stream("GET", f"{base}/queue/data", params={"session_hash": self.session}) as stream:
            async for line in stream.aiter_lines():
                if not line.startswith("data:"):
                    continue
                message = json.loads(line[5:])
                if message["msg"] == "close_stream":
                    return
                if message.get("event_id") == wanted:
                    yield message, line
                elif message["msg"] in ("unexpected_error", "server_stopped"):
                    raise RuntimeError(str(message.get("message")))

    async def _beat(self) -> None:
        url = f"{self.url}{self.config.get('api_prefix', '')}/heartbeat/{self.session}"
        async with self._client.stream("GET", url, timeout=None) as stream:
            async for _ in stream.aiter_lines():
                pass


class Watch:
    """Says when a message first held some text: seconds since the watch was made, None before."""

    def __init__(self, text: str):
        self._text, self._start, self.seconds = text, time.perf_counter(), None

    def __call__(self, message: str) -> None:
        if self.seconds is None and self._text in message:
            self.seconds = time.perf_counter() - self._start


@contextmanager
def server(port: int, *flags: str):
    """The page in a process of its own, ended afterwards: (address, process).

    Raises:
        RuntimeError: it did not start.
    """
    command = [sys.executable, str(ROOT / "app.py"), "--port", str(port), *flags]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        for line in process.stdout:
            if found := re.search(r"http://[^\s]+", line):
                break
        else:
            raise RuntimeError("The page did not start.")
        yield found.group().rstrip("/"), psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(timeout=20)


def memory(process: psutil.Process) -> int:
    """Bytes that the server and its children hold in memory."""
    return sum(one.memory_info().rss for one in [process, *process.children(recursive=True)])


@asynccontextmanager
async def ready(url: str):
    """A visitor who has waited until the page can answer."""
    async with Visitor(url) as visitor:
        await asyncio.wait_for(visitor.load(), START_SECONDS)
        yield visitor


def examples(checkpoint: str) -> list[dict[str, Any]]:
    return json.loads((ROOT / "checkpoints" / checkpoint / "examples.json").read_text(encoding="utf-8"))


def quantile(values: list[float], share: float) -> float:
    """The value below which `share` of the values lie; the nearest one that was measured."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, round(share * (len(ordered) - 1)))]
