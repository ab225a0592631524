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
from app.models import ModelShelf, describe_machine
from app.runs import Run
from app.session import Turnstile, race
from benchmarks.visitor import ANSWERED, Visitor, Watch
from rim_probe.errors import QuestionError, RiMError, UnknownWordsError

APP = Path(__file__).parent.parent / "app.py"


# -------------------------------------------------------------------------------------------------- flags and addresses


def test_a_nonsense_port_in_the_environment_gives_one_sentence():
    environment = {"GRADIO_SERVER_PORT": "many", "PATH": ""}
    ended = subprocess.run([sys.executable, str(APP)], env=environment, timeout=30, capture_output=True, text=True)
    assert ended.returncode == 2 and "GRADIO_SERVER_PORT must be a number, not 'many'" in ended.stderr


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


def test_the_page_names_no_other_host(page):
    assert "fonts.googleapis" not in httpx.get(f"{page}/").text


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


# ------------------------------------------------------------------------------------------------- where functions run


def counts(models, end, cancel):
    for number in range(end):
        if cancel.is_set():
            return
        yield {"number": number, "models": len(models)}


def refuse(models, words):
    raise UnknownWordsError(words)


def double(models, number, plus=0):
    return 2 * number + plus + len(models)


@pytest.fixture
def lent(monkeypatch):
    """A ZeroGPU Space with a `spaces` that sends everything through pickle, as its forked processes do."""
    state = types.SimpleNamespace(durations=[], closed=0, error=None)

    def decorate(duration):
        state.durations.append(duration)

        def wrap(task):
            def handler(*arguments):
                if state.error:
                    raise gr.Error(state.error)
                try:
                    for item in task(*pickle.loads(pickle.dumps(arguments))):
                        yield pickle.loads(pickle.dumps(item))
                finally:
                    state.closed += 1

            return handler

        return wrap

    monkeypatch.setitem(sys.modules, "spaces", types.SimpleNamespace(GPU=decorate, __spec__=True))
    monkeypatch.setenv("SPACES_ZERO_GPU", "true")
    monkeypatch.setattr(gpu, "_lent", None)
    monkeypatch.setattr(gpu, "_staying", {})
    gpu.prepare()
    gpu.prepare()  # decorates once
    return state


class Unsendable(dict):
    def __reduce__(self):
        raise TypeError("cannot pickle a model")


def test_a_lent_gpu_gets_names_for_models_and_gives_copies_back(lent):
    models = Unsendable(memory=1, cot=2)
    gpu.stay(models)
    assert lent.durations == [gpu.SECONDS]
    assert gpu.call(double, models, 20, plus=1) == 43
    assert list(gpu.stream(counts, models, 2, cancel=threading.Event())) == [
        {"number": 0, "models": 2},
        {"number": 1, "models": 2},
    ]


def test_a_cancelled_stream_gives_the_lent_gpu_back(lent):
    cancel, models = threading.Event(), Unsendable(memory=1)
    gpu.stay(models)
    stream = gpu.stream(counts, models, 1000, cancel=cancel)
    next(stream)
    cancel.set()
    assert list(stream) == [] and lent.closed == 1


def test_sentences_come_back_from_a_lent_gpu(lent):
    with pytest.raises(UnknownWordsError, match="zeppelin") as error:
        gpu.call(refuse, {}, ["zeppelin"])
    assert error.value.words == ["zeppelin"]
    lent.error = "You have exceeded your <a href='x'>GPU quota</a>."
    with pytest.raises(RiMError, match="No GPU could be had: You have exceeded your GPU quota."):
        gpu.call(double, {}, 1)


def test_a_race_on_a_lent_gpu(lent, small_checkpoint):
    shelf, cancel = ModelShelf(small_checkpoint.parent, device="cpu"), threading.Event()
    shelf.place()
    models = shelf.wait("small", cancel, seconds=0)  # there at once, for it was loaded before the page is served
    roles, readers = shelf.wait_readers("small", cancel, seconds=0)
    assert {id(models), id(roles), id(readers), id(models["memory"])} <= set(gpu._staying)
    assert "lent by ZeroGPU" in describe_machine(models)
    run = Run("small", shelf.examples("small")[0].question, None, 3)
    steps = list(race(models, run, cancel, Turnstile()))
    assert steps[-1] is run and run.status == "done" and lent.closed == 1
    assert all(lane.answer is not None for lane in run.lanes.values())


def test_elsewhere_functions_run_as_they_are(monkeypatch):
    monkeypatch.delenv("SPACES_ZERO_GPU", raising=False)
    gpu.prepare()
    thing = object()
    gpu.stay(thing)
    assert gpu._lent is None and id(thing) not in gpu._staying
    assert gpu.call(double, Unsendable(memory=1), 20) == 41
    assert len(list(gpu.stream(counts, {}, 3, cancel=threading.Event()))) == 3


class OnGpu:
    device = types.SimpleNamespace(type="cuda")


def test_one_function_at_a_time_uses_a_model_on_a_gpu():
    models = {"memory": OnGpu()}
    first = gpu.stream(counts, models, 9, cancel=threading.Event())
    next(first)
    cancel, done = threading.Event(), []
    threads = [
        threading.Thread(target=lambda: done.append(gpu.call(double, models, 1))),
        threading.Thread(target=lambda: done.extend(gpu.stream(counts, models, 1, cancel=cancel))),
    ]
    for thread in threads:
        thread.start()
    cancel.set()
    threads[1].join(5)
    assert done == [] and not threads[1].is_alive()  # the cancelled one has left the line
    assert gpu.call(double, {"memory": OnGpu()}, 1) == 3  # another model is free
    first.close()
    threads[0].join(5)
    assert done == [3]


def test_each_call_has_the_threads_that_its_model_can_use(monkeypatch):
    import torch

    monkeypatch.setattr(gpu, "SMALL_MODEL", 10)
    monkeypatch.setattr(gpu, "_cores", 4)
    used = []
    monkeypatch.setattr(torch, "set_num_threads", used.append)
    small, large = (
        {"memory": types.SimpleNamespace(device=torch.device("cpu"), model=torch.nn.Linear(width, 1))}
        for width in (2, 20)
    )
    gpu.call(double, {"memory": 1}, 1)
    streams = [gpu.stream(counts, models, 2, cancel=threading.Event()) for models in (small, large)]
    for _ in range(2):
        for stream in streams:
            next(stream)
    assert used == [1, 4, 1, 4]


def test_a_base_that_cannot_be_fetched_does_not_keep_a_lent_gpu_from_serving(lent, small_checkpoint, monkeypatch):
    def fail(*_):
        raise RiMError("The base cannot be fetched; go online.")

    monkeypatch.setattr("app.models._load_somewhere", fail)
    shelf = ModelShelf(small_checkpoint.parent, device="cpu")
    shelf.place()
    with pytest.raises(RiMError, match="go online"):
        shelf.wait("small", threading.Event())


@pytest.mark.parametrize("error", [QuestionError("Too long."), UnknownWordsError(["zeppelin"])])
def test_errors_survive_pickling(error):
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error) and str(again) == str(error)
