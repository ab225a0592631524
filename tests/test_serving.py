"""The page as a server: flags, where model functions run, and what happens to visitors who leave."""

import asyncio
import json
import pickle
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import gradio as gr
import httpx
import pytest

from app import gpu, serving
from app.demo import build_demo
from app.models import ModelShelf
from app.runs import Run
from app.session import race
from benchmarks.visitor import ANSWERED, Visitor, Watch
from rim_probe.errors import RiMError, UnknownWordsError

APP = Path(__file__).parent.parent / "app.py"


# -------------------------------------------------------------------------------------------------- flags and addresses


def test_a_nonsense_port_in_the_environment_gives_one_sentence():
    environment = {"GRADIO_SERVER_PORT": "many", "PATH": ""}
    ended = subprocess.run([sys.executable, str(APP)], env=environment, timeout=30, capture_output=True, text=True)
    assert ended.returncode == 2 and "GRADIO_SERVER_PORT must be a number, not 'many'" in ended.stderr


def test_a_checkpoint_folder_that_is_not_there_gives_one_sentence():
    command = [sys.executable, str(APP), "--model", "/nonexistent/x"]
    ended = subprocess.run(command, timeout=30, capture_output=True, text=True)
    assert ended.returncode == 2 and "no checkpoint folder '/nonexistent/x'" in ended.stderr


def test_tools_without_their_package_give_one_sentence(monkeypatch):
    monkeypatch.setattr(serving.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RiMError, match=r"gradio\[mcp\]"):
        serving.serve(gr.Blocks(analytics_enabled=False), mcp=True)
    monkeypatch.setenv("GRADIO_MCP_SERVER", "True")
    with pytest.raises(RiMError, match=r"gradio\[mcp\]"):
        serving.serve(gr.Blocks(analytics_enabled=False))


@pytest.fixture(scope="module")
def demo(small_checkpoint):
    demo = build_demo(ModelShelf(small_checkpoint.parent))
    yield demo
    demo.close()


@pytest.fixture(scope="module")
def page(demo):
    return serving.serve(demo, "127.0.0.1").rstrip("/")


def test_a_body_that_no_event_has_is_refused(page):
    answer = httpx.post(f"{page}/gradio_api/call/run", json={"data": ["3 " * 10**6]})
    assert answer.status_code == 413


# ------------------------------------------------------------------------------------------------------------ visitors


@pytest.fixture
def decoding(monkeypatch):
    """Decoding that takes a while: events set when it has begun and when it has ended."""
    from rim_probe import decoding

    real, begun, ended = decoding.stream, threading.Event(), threading.Event()

    def stream(*arguments, **options):
        begun.set()
        try:
            for event in real(*arguments, **options):
                time.sleep(0.05)
                yield event
        finally:
            ended.set()

    monkeypatch.setattr(decoding, "stream", stream)
    return begun, ended


async def ask(visitor: Visitor, small_checkpoint, seen=None) -> None:
    problem = json.loads((small_checkpoint / "examples.json").read_text())[0]
    await visitor.load()
    visitor.put("question", problem["question"])
    await visitor.fire("run", "click", seen=seen)


def test_a_visitor_sees_the_answer(page, small_checkpoint):
    async def story():
        async with Visitor(page) as visitor:
            watch = Watch(ANSWERED)
            await ask(visitor, small_checkpoint, watch)
            return watch.seconds

    assert asyncio.run(story()) is not None


def test_a_session_does_not_grow_with_its_runs(demo, page, small_checkpoint):
    async def story():
        sizes = []
        async with Visitor(page) as visitor:
            for _ in range(4):
                await ask(visitor, small_checkpoint)
                session = demo.state_holder.session_data[visitor.session]
                sizes.append((len(session.blocks_config.blocks), len(session.config_values)))
        return sizes

    sizes = asyncio.run(story())
    assert sizes[1] == sizes[2] == sizes[3]


def test_a_closed_tab_stops_decoding_at_once(page, small_checkpoint, decoding):
    begun, ended = decoding

    async def story():
        async with Visitor(page) as visitor:
            running = asyncio.create_task(ask(visitor, small_checkpoint))
            await asyncio.to_thread(begun.wait, 20)
            running.cancel()

    asyncio.run(story())
    assert begun.is_set() and ended.wait(1)


def test_a_question_that_is_stopped_in_the_queue_is_never_asked(demo, page, small_checkpoint, monkeypatch):
    """Even where the server is not told to take its event out of the queue (gradio#13323)."""
    from rim_probe import decoding

    real, asked, released = decoding.stream, [], threading.Event()

    def stream(rim, question, *arguments, **options):
        asked.append(question)
        released.wait(60)
        yield from real(rim, question, *arguments, **options)

    problems = json.loads((small_checkpoint / "examples.json").read_text())
    first, second = (problem["question"] for problem in problems[:2])

    async def once():
        async with Visitor(page) as visitor:
            await ask(visitor, small_checkpoint)  # the model is loaded and warm before anybody has to wait

    async def until(holds):
        while not holds():
            await asyncio.sleep(0.05)

    async def story():
        async with Visitor(page) as one, Visitor(page) as other:
            for visitor, question in ((one, first), (other, second)):
                await visitor.load()
                visitor.put("question", question)
            running = asyncio.create_task(one.fire("run", "click"))
            await until(lambda: asked)
            queued = asyncio.create_task(other.fire("run", "click"))
            await until(lambda: demo._queue.event_queue_per_concurrency_id["race"].queue)
            # What follows the stop draws panels, which wait for the model: the first race has to go on.
            await other.fire("stop", "click", seen=lambda text: "process_completed" in text and released.set())
            await running
            await once()  # its turn comes after that of the one who stopped
            queued.cancel()

    asyncio.run(once())
    monkeypatch.setattr(decoding, "stream", stream)
    asyncio.run(asyncio.wait_for(story(), 120))
    assert first in asked and second not in asked


# ------------------------------------------------------------------------------------------------- where functions run


def refuse(loaded, words):
    raise UnknownWordsError(words)


@pytest.fixture
def lent(monkeypatch):
    """A ZeroGPU Space with a `spaces.GPU` that sends everything through pickle, as its forked processes do."""
    state, work = types.SimpleNamespace(closed=0, error=None), gpu._work

    def handler(*arguments):
        if state.error:
            raise gr.Error(state.error)
        try:
            for item in work(*pickle.loads(pickle.dumps(arguments))):
                yield pickle.loads(pickle.dumps(item))
        finally:
            state.closed += 1

    monkeypatch.setattr(gpu, "_work", handler)
    monkeypatch.setattr(gpu, "LENT", True)
    return state


def test_a_race_on_a_lent_gpu(lent, small_checkpoint):
    shelf = ModelShelf(small_checkpoint.parent, device="cpu")
    shelf.place()
    assert shelf.is_ready("small")  # for it was loaded before the page is served
    loaded = shelf.load("small", readable=True)
    assert pickle.loads(pickle.dumps(loaded)) is loaded and len(pickle.dumps(loaded)) < 100
    assert "lent by ZeroGPU" in loaded.machine
    run = Run("small", shelf.examples("small")[0].question, None, 3)
    assert list(race(loaded, run))[-1] is run and run.status == "done" and lent.closed == 1
    assert all(lane.answer is not None for lane in run.lanes.values())
    closed = race(loaded, Run("small", shelf.examples("small")[0].question, None, 3))
    next(closed), next(closed)
    closed.close()
    assert lent.closed == 2


def test_sentences_come_back_from_a_lent_gpu(lent, small_checkpoint):
    loaded = ModelShelf(small_checkpoint.parent).load("small")
    with pytest.raises(UnknownWordsError, match="zeppelin") as error:
        gpu.call(refuse, loaded, ["zeppelin"])
    assert error.value.words == ["zeppelin"]
    lent.error = "You have exceeded your <a href='x'>GPU quota</a>."
    with pytest.raises(RiMError, match="No GPU could be had: You have exceeded your GPU quota."):
        gpu.call(refuse, loaded, [])


def test_a_base_that_cannot_be_fetched_does_not_keep_a_lent_gpu_from_serving(lent, small_checkpoint, monkeypatch):
    def fail(*_):
        raise RiMError("The base cannot be fetched; go online.")

    monkeypatch.setattr("app.models._load_somewhere", fail)
    shelf = ModelShelf(small_checkpoint.parent, device="cpu")
    shelf.place()
    with pytest.raises(RiMError, match="go online"):
        shelf.load("small")
