"""The panels on the server's side: what every event makes of a visitor's runs, links, files and experiments."""

import asyncio
import copy
import gc
import json
import re
import shutil
import threading
import types
import weakref
from html import unescape
from pathlib import Path
from urllib.parse import parse_qsl

import pytest

from app import files
from app.demo import build_demo
from app.models import ModelShelf
from app.panels.inspect import Inspector
from app.panels.race import Race
from app.runs import Run
from app.serving import serve
from app.session import MAX_HISTORY, Session
from app.view import PANELS, Looking
from benchmarks.visitor import Visitor
from rim_probe.errors import RiMError
from rim_probe.plots import draw, view_of
from rim_probe.probing.reading import Reading
from rim_probe.problems import Problem

GLASS = Path(__file__).parent.parent / "checkpoints" / "glass-box"
DRAWN = [panel for panel in PANELS if panel not in ("race", "evidence")]


@pytest.fixture(scope="module")
def folder(small_checkpoint, tmp_path_factory) -> Path:
    """`glass-box`, where swaps work, and `small`: memory alone, random weights, no probes."""
    folder = tmp_path_factory.mktemp("inspected")
    (folder / "glass-box").symlink_to(GLASS)
    shutil.copytree(small_checkpoint, folder / "small")
    return folder


@pytest.fixture(scope="module")
def inspector(folder) -> Inspector:
    return Inspector(Race(ModelShelf(folder), folder))


@pytest.fixture(scope="module")
def asked(inspector):
    """The finished, read run of a question; a copy of its own for every test."""
    made: dict[tuple, Run] = {}

    def ask(name="glass-box", example=0, blocks=None, direct=False, problem=None) -> Run:
        key = (name, example, blocks, direct, problem)
        if key not in made:
            session = Session()
            problem = problem or inspector.race.shelf.examples(name)[example]
            for _ in inspector.ask(problem, name, session, Looking(), blocks, direct):
                pass
            made[key] = session.run
        return copy.copy(made[key])

    return ask


class Page:
    """One visitor without a server: the state that Gradio would keep, and what is on the screen."""

    def __init__(self, inspector: Inspector, *runs: Run, panel: str = "race"):
        self.inspector, self.session, self.looking = inspector, Session(), Looking(panel)
        for run in runs:
            self.session.add(run)
        self.name = runs[-1].checkpoint if runs else "glass-box"
        self.html = ""

    def choose(self, **wanted) -> str:
        event = types.SimpleNamespace(_data=wanted)
        (self.shown,) = self.inspector.change(self.session, self.looking, self.name, event)
        self.html, self.history = self.shown["panel"], self.shown.get("history", "")
        return self.html

    def do(self, act: str, **details) -> str:
        return self.choose(do={"act": act, **details})

    def show(self) -> str:
        return self.inspector.panel(self.session, self.looking, self.name)

    @property
    def address(self) -> str:
        return unescape(re.search(r'data-address="([^"]*)"', self.show())[1])

    def arrive(self, address: str, name="glass-box") -> dict:
        query = dict(parse_qsl(address.removeprefix("?"), keep_blank_values=True))
        request = types.SimpleNamespace(query_params=query)
        shown: dict = {}
        for changes in self.inspector.arrive(self.session, self.looking, name, request):
            shown |= changes
        return shown

    def load(self, path) -> str:
        """The notice that comes of a file."""
        (shown,) = self.inspector.load(str(path), self.session, self.looking, self.name)
        return shown["notice"]


def unknown(inspector: Inspector) -> Problem:
    """A question of which nothing is known, though the model sees the tokens of the first example."""
    return Problem(inspector.race.shelf.examples("glass-box")[0].question.replace(" ", "  "), (), "")


def figure(html: str) -> str:
    """The figures of a panel without the lines of Python and their button."""
    python = r'<pre class="pic-python".*?</pre>|<button[^>]*data-tool="python".*?</button>'
    return re.sub(python, "", "".join(re.findall(r"<figure.*?</figure>", html, re.S)), flags=re.S)


# ------------------------------------------------------------------------------------------------- every panel is drawn


@pytest.mark.parametrize("panel", PANELS)
@pytest.mark.parametrize(
    "run",
    [
        {},
        {"blocks": 0},
        {"direct": True},
        {"name": "small"},
        {"name": "small", "blocks": 0},
        {"name": "small", "blocks": 16},
        {"problem": None},
    ],
    ids=str,
)
def test_every_panel_is_drawn_for_every_kind_of_run(inspector, asked, panel, run):
    if "problem" in run:  # nothing is known of it: the question of an example, in another writing
        run = {"problem": unknown(inspector)}
    html = Page(inspector, asked(**run), panel=panel).show()
    assert "could not be drawn" not in html and "pending-panel" not in html
    assert panel == "race" or 'class="pic ' in html


@pytest.mark.parametrize("panel", DRAWN)
def test_nonsense_in_a_view_draws_the_default(inspector, asked, panel):
    page = Page(inspector, asked(), panel=panel)
    usual = figure(page.show())
    names = list(view_of(asked().drawable(), panel))
    for value in ("<script>", "-1", "99.99.99", "²", "9" * 4000, "None"):
        page.looking.views = {panel: dict.fromkeys([n for n in names if n != "partner"], value)}
        page.looking.views[panel] |= {"panel": "x", "reading": "x", "self": "x"}
        assert figure(page.show()) == usual


@pytest.mark.parametrize(
    "wanted",
    [
        {"panel": ["layers"]},
        {"panel": None, "view": [1]},
        {"view": {"cell": {"deep": [1]}, "mode": 3}},
        {"do": {"act": ["x"]}},
        {"do": {"act": "show", "index": "²"}},
        {"do": {"act": "show", "index": "99"}},
        {"do": {"act": "blocks", "k": "9" * 5000}},
        {"do": {"act": "blocks", "k": "²"}},
        {"do": {"act": "set", "block": "9" * 5000, "letter": "b"}},
        {"do": {"act": "set", "block": "1", "letter": "<img>"}},
        {"do": {"act": "operate_cell", "block": "x", "layer": "y", "action": "z"}},
        {"do": {"act": "try_counterfactual", "block": "77"}},
        {"do": {"act": "partner", "text": "zeppelin"}},
        {"do": "x"},
    ],
    ids=str,
)
def test_whatever_an_event_brings_the_page_stands(inspector, asked, wanted):
    page = Page(inspector, asked(), panel="surgery")
    html = page.choose(**wanted)
    assert "could not be drawn" not in html and "<img>" not in html and 'class="pic pic-surgery"' in html


# ------------------------------------------------------------------------------------------------------------ surgery


def test_what_is_done_by_hand_is_on_the_screen(inspector, asked):
    page = Page(inspector, asked(), panel="blocks")
    assert "Blanking block 2" in page.do("operate_here", block="2")
    assert "Blanking blocks 1 and 2" in page.do("set", block="1", letter="b")
    assert "layer 1" in page.do("operate_cell", block="2", layer="1", action="noise")
    assert "surgery-result good" in page.do("try_counterfactual", block="2")
    reset = page.do("operate", ops="", layers="")
    assert (
        "Nothing is changed yet" in reset and "surgery-result" not in reset and page.session.run.counterfactual is None
    )


def test_a_block_that_is_read_as_no_step_claims_nothing(inspector, asked):
    """Without fitted probes nothing is decoded, and a trial would test what nobody said."""
    html = Page(inspector, asked("small")).do("try_counterfactual", block="2")
    assert 'role="alert"' in html and "surgery-result" not in html


def test_a_question_without_known_steps_is_tried_by_those_of_its_chain(inspector, asked):
    page = Page(inspector, asked(problem=unknown(inspector)))
    assert not page.session.run.steps and page.session.run.reading["chain"]["steps"]
    assert "surgery-result" in page.do("try_counterfactual", block="2")


def test_the_control_is_not_the_question_in_another_writing(inspector, asked):
    page = Page(inspector, asked(problem=unknown(inspector)))
    html = page.do("operate_here", block="1")
    unrelated = page.session.run.surgery["unrelated"]
    assert 'role="alert"' not in html and unrelated.split() != page.session.run.question.split()


def test_the_control_has_another_answer(inspector, asked):
    examples = inspector.race.shelf.examples("glass-box")
    answers = {problem.question: problem.answer for problem in examples}
    for number in (0, 4, 8):
        page = Page(inspector, asked(example=number))
        page.do("operate_here", block="1")
        assert answers[page.session.run.surgery["unrelated"]] != examples[number].answer


def test_another_number_of_blocks_is_another_run(inspector, asked):
    page = Page(inspector, asked(), panel="surgery")
    html = page.do("blocks", k="2")
    assert "With K = 2 the answer is" in html and [run.num_blocks for run in page.session.runs] == [3, 2]


def test_a_shown_run_shows_its_own_operation(inspector, asked):
    page = Page(inspector, asked(), panel="surgery")
    page.do("operate_here", block="2")
    page.session.add(asked(example=4))
    assert "result is not here yet" in page.show()
    page.do("show", index="0")
    page.do("show", index="1")
    assert "Nothing is changed yet" in page.html
    assert "Blanking block 2 (" in page.do("show", index="0")


# --------------------------------------------------------------------------------------------------- history, comparing


def test_two_runs_stand_side_by_side_and_only_one_is_operated_on(inspector, asked):
    page = Page(inspector, asked(), asked(example=4), panel="blocks")
    html = page.do("compare", index="0")
    assert html.count("<figure") == 2 and "Stop comparing" in page.history
    own, other = html.split('<section class="compared">')[1:]
    assert "disabled data-do" not in own and ' data-do="' not in other.replace("disabled data-do", "")
    page.do("operate_here", block="1")
    assert page.html.count("<figure") == 2 and page.session.runs[0].surgery is None
    assert page.do("apart", index="0").count("<figure") == 1


@pytest.mark.parametrize("panel", PANELS)
def test_two_runs_are_compared_in_every_panel(inspector, asked, panel):
    page = Page(inspector, asked("small"), asked(), panel=panel)
    page.do("compare", index="0")
    shown = page.shown["stage"] if panel == "race" else page.html
    assert shown.count('<section class="compared">') == 2
    page.do("apart", index="0")
    assert 'class="compared"' not in (page.shown["stage"] if panel == "race" else page.html)


def test_the_history_tells_what_came_of_each_run(inspector, asked):
    run = asked()
    page = Page(inspector, run)
    page.choose(panel="blocks")
    value = run.lanes["memory"].answer["value"]
    assert f"RiM {value} ✓" in page.history and "CoT" in page.history and run.question in unescape(page.history)


def test_back_and_forward_bring_panels_and_questions(inspector, asked):
    page = Page(inspector, asked(), asked(example=4), panel="blocks")
    places = [page.address]
    page.choose(panel="layers")
    places.append(page.address)
    page.do("show", index="0")
    places.append(page.address)
    for place, panel, number in zip(places, ("blocks", "layers", "layers"), (1, 1, 0), strict=True):
        page.choose(go=place)
        assert page.looking.panel == panel and page.session.run is page.session.runs[number]
        assert page.address == place
    page.choose(go="?model=glass-box&q=what+is+1+%2B+1+%3F")
    assert "data-reload" in page.html, "what is no longer kept is loaded anew"
    assert page.session.run is page.session.runs[0]


def test_a_run_is_not_compared_with_itself(inspector, asked):
    page = Page(inspector, asked(), asked(example=4), panel="blocks")
    page.do("compare", index="0")
    assert page.do("show", index="0").count("<figure") == 1
    assert page.do("compare", index="0").count("<figure") == 1


def test_a_compared_run_that_falls_out_of_the_history_is_put_apart_and_forgotten(inspector, asked):
    page = Page(inspector, asked(), asked(example=4), panel="blocks")
    page.do("compare", index="0")
    forgotten = weakref.ref(page.session.runs[0])
    for _ in range(MAX_HISTORY):
        page.session.add(asked(example=4))
    assert page.show().count("<figure") == 1 and page.looking.compared is None
    gc.collect()
    assert forgotten() is None, "the history is all that holds a run"


def test_two_threads_may_change_one_visitors_view(inspector, asked):
    page, broken = Page(inspector, asked(), panel="surgery"), []

    def work(block: int):
        for letter in "bnb":
            broken.append("could not" in page.do("set", block=str(block), letter=letter))

    threads = [threading.Thread(target=work, args=(block,)) for block in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not any(broken) and page.looking.views["surgery"]["ops"] == "1b2b3b"
    assert page.session.run.surgery["actions"] == dict.fromkeys("123", "blank")


# -------------------------------------------------------------------------------------------------- what may go wrong


@pytest.mark.parametrize("error", [RiMError("No such memory."), RuntimeError("CUDA error"), KeyError("x")])
def test_a_reading_that_fails_leaves_the_race_and_says_so_in_every_panel(inspector, asked, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("rim_probe.probing.reading.read", fail)
    page = Page(inspector, asked(), panel="blocks")
    page.session.run.reading = None
    shown = list(inspector.read(page.session, page.looking, page.name))[-1]
    panel, history = shown["panel"], shown["history"]
    words = "No such memory." if isinstance(error, RiMError) else "could not be read"
    assert (
        words in panel and "Reading the memory blocks" not in panel and page.session.run.question in unescape(history)
    )
    for panel in DRAWN:
        html = page.choose(panel=panel)
        assert words in html and "pending-panel" not in html
    assert 'role="alert"' in page.do("operate_here", block="1")


@pytest.mark.parametrize(("status", "words"), [("stopped", "was stopped"), ("loaded", "holds the race alone")])
def test_a_run_that_will_never_be_read_does_not_promise_it(inspector, asked, status, words):
    page = Page(inspector, asked(), panel="layers")
    page.session.run.reading, page.session.run.status = None, status
    assert words in page.show() and "pending-panel" not in page.show()


def test_a_run_under_way_is_not_saved(inspector, asked):
    page = Page(inspector, asked())
    page.session.run.status = "running"
    assert "still on" in inspector.export(page.session, page.looking)
    assert "Ask a question" in inspector.export(Session(), Looking())


# --------------------------------------------------------------------------------------------------------------- links


@pytest.mark.parametrize("panel", ["blocks", "layers"])
def test_a_link_brings_back_the_same_figure(inspector, asked, panel):
    page = Page(inspector, asked(direct=True, blocks=2), panel=panel)
    page.choose(view={"layer": "2", "minus": "on", "cell": "1.1.1", "axes": "13"})
    again = Page(inspector)
    again.arrive(page.address)
    assert figure(again.show()) == figure(page.show())
    run = again.session.run
    assert list(run.lanes) == ["memory", "cot", "direct"] and run.steps and run.num_blocks == 2 and run.gold


def test_a_link_brings_back_an_operation(inspector, asked):
    page = Page(inspector, asked(), panel="surgery")
    page.choose(view={"partner": inspector.race.shelf.examples("glass-box")[2].question})
    page.do("set", block="2", letter="s")
    again = Page(inspector)
    again.arrive(page.address)
    assert again.session.run.surgery == page.session.run.surgery and figure(again.show()) == figure(page.show())


def test_a_link_brings_back_a_counterfactual_and_what_was_done_after_it(inspector, asked):
    page = Page(inspector, asked())
    page.do("try_counterfactual", block="2")
    assert "v.try=2" in page.address
    again = Page(inspector)
    again.arrive(page.address)
    assert again.session.run.counterfactual == page.session.run.counterfactual
    assert figure(again.show()) == figure(page.show())
    page.do("operate_here", block="1")
    again = Page(inspector)
    again.arrive(page.address)
    assert figure(again.show()) == figure(page.show()) and "Blanking block 1" in again.show()


def test_a_link_brings_back_what_stands_beside(inspector, asked):
    page = Page(inspector, asked(blocks=2), asked(), panel="blocks")
    page.do("compare", index="0")
    assert "c.k=2" in page.address and "c.q" not in page.address, "only what differs"
    again = Page(inspector)
    again.arrive(page.address)
    assert again.show().count("<figure") == 2 and figure(again.show()) == figure(page.show())


def test_a_link_keeps_steps_and_seed_of_a_run_from_a_file(inspector, asked):
    question = inspector.race.shelf.examples("glass-box")[0].question
    page = Page(inspector, asked(), panel="surgery")
    run = page.session.run
    run.status, run.seed, run.question = "loaded", 7, question + " "
    again = Page(inspector)
    again.arrive(page.address)
    assert again.session.run.steps == run.steps and again.session.run.seed == 7


def test_a_link_names_the_model_of_the_run_and_not_the_one_picked_since(inspector, asked):
    page = Page(inspector, asked(), panel="blocks")
    page.name = "small"
    assert page.address.startswith("?model=glass-box&q=")
    page.choose(panel="evidence")
    assert page.address == "?model=small&panel=evidence"


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("?model=gone&panel=blocks", "gone"),
        ("?model=gone&q=zeppelin", "which is not here"),
        ("?model=gone&q=zeppelin", "never seen"),
        ("?model=glass-box&q=3&k=999", "from 0 to 16"),
        ("?q=a%07b", "control character"),
        ("?model=glass-box&q=3&gold=" + "9" * 300, "correct answer"),
        ("?model=<script>alert(1)</script>", "&lt;script&gt;"),
        ("?c.q=zeppelin&q=3", "never seen"),
        ("?" + "c." * 900 + "q=3", ""),
        ("?panel=surgery&v.try=zzz&v.ops=99b&v.layers=9-1&recorded=7", ""),
    ],
)
def test_a_link_that_cannot_be_followed_is_a_sentence(inspector, address, words):
    page = Page(inspector)
    shown = page.arrive(address)
    notice = shown.get("notice", "")
    assert words in notice and "<script>" not in notice
    assert "could not be drawn" not in shown.get("panel", "")


def test_a_question_too_long_for_a_link_is_not_cut_to_another_one(inspector, asked):
    page = Page(inspector, asked(), panel="blocks")
    page.session.run.question = "3 " * 5000
    assert "q=" not in page.address


# --------------------------------------------------------------------------------------------------------------- files


@pytest.fixture
def saved(inspector, asked, tmp_path):
    """A run with a counterfactual, saved while its Surgery was open."""
    page = Page(inspector, asked())
    page.do("try_counterfactual", block="2")
    path = tmp_path / "run.json"
    html = inspector.export(page.session, page.looking)
    path.write_text(unescape(re.search(r"<template[^>]*>(.*)</template>", html, re.S)[1]), encoding="utf-8")
    return page, path


def test_a_saved_run_loads_to_the_same_figures(inspector, saved):
    page, path = saved
    again = Page(inspector)
    assert again.load(path) == "" and again.looking.panel == "surgery"
    for panel in DRAWN:
        page.choose(panel=panel), again.choose(panel=panel)
        assert figure(again.html) == figure(page.html), panel


def test_a_saved_run_loads_in_the_library_to_the_same_figures(saved):
    page, path = saved
    reading = Reading.load(path)
    for panel in DRAWN:
        page.choose(panel=panel)
        assert draw(reading, panel, **page.looking.view).html() == figure(page.html), panel
    assert reading.to_dict()["counterfactual"]["came"]
    assert Reading.from_dict(reading.to_dict()).to_dict() == reading.to_dict()


DAMAGES = {
    "nothing": lambda data: "",
    "no JSON": lambda data: "{",
    "NaN": lambda data: json.dumps(data).replace('"seed": 0', '"seed": NaN'),
    "deeply nested": lambda data: "[" * 200_000 + "]" * 200_000,
    "deeply nested view": lambda data: (
        json.dumps(data | {"view": {"panel": "layers"}})[:-1] + ', "other": ' + "[" * 100_000 + "}"
    ),
    "a list": lambda data: "[]",
    "foreign": lambda data: '{"format": "other"}',
    "endless number": lambda data: json.dumps(data).replace('"seed": 0', '"seed": ' + "9" * 5000),
    "another question": lambda data: json.dumps(data | {"question": "3 + 4 = ?"}),
    "half an experiment": lambda data: json.dumps(data | {"surgery": data["surgery"] | {"after": {}}}),
    "an experiment on fewer blocks": lambda data: json.dumps(
        data | {"surgery": data["surgery"] | {"before": data["surgery"]["before"] | {"readouts": []}}}
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_one_sentence_and_the_page_stays(inspector, asked, saved, damage):
    _, path = saved
    path.write_text(DAMAGES[damage](json.loads(path.read_text())), encoding="utf-8")
    page = Page(inspector, asked(example=4), panel="layers")
    before = page.show()
    notice = page.load(path)
    assert notice.count('role="alert"') == 1 and len(notice) < 500
    assert len(page.session.runs) == 1 and figure(page.show()) == figure(before)


def test_a_file_that_is_too_large_or_no_text_is_one_sentence(inspector, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LARGEST", 10)
    (tmp_path / "large").write_text("[0, 1, 2, 3, 4, 5]")
    (tmp_path / "binary").write_bytes(b"\xff\x00")
    page = Page(inspector)
    assert "at most" in page.load(tmp_path / "large") and "not JSON" in page.load(tmp_path / "binary")


def test_texts_of_a_file_are_escaped_and_its_view_is_only_text(inspector, saved):
    _, path = saved
    evil = "<img src=x onerror=alert(1)>"
    data = json.loads(path.read_text())
    for part in (data, data["reading"], data["surgery"], data["counterfactual"]["surgery"]):
        part["question"] = evil
    data |= {"checkpoint": evil, "view": {"panel": "surgery", "partner": evil, "ops": ["1b"], "layers": {"a": [1]}}}
    data["surgery"]["partner"] = data["counterfactual"]["change"] = evil
    path.write_text(json.dumps(data), encoding="utf-8")
    page = Page(inspector)
    assert page.load(path) == ""
    for panel in DRAWN:
        page.choose(panel=panel)
        assert "<img" not in page.html + page.history
    page.choose(panel="surgery")
    assert 'role="alert"' in page.do("operate_here", block="1"), "a checkpoint that is not here"


# ------------------------------------------------------------------------------------------------------ two visitors


def test_what_one_visitor_does_no_other_sees(folder, inspector):
    """Over the real server, both starting from the same opening state."""
    shelf = ModelShelf(folder)
    mine, yours = shelf.examples("glass-box")[:2]
    demo = build_demo(shelf, folder)
    url = serve(demo, "127.0.0.1")

    async def story() -> None:
        async with Visitor(url) as me, Visitor(url) as you:
            for visitor, problem in ((me, mine), (you, yours)):
                await visitor.load()
                visitor.put("question", problem.question)
                await visitor.fire("run", "click")
            await me.fire("panel", "select", {"panel": "blocks"})
            shown = await me.fire("panel", "select", {"do": {"act": "operate_here", "block": "2"}})
            assert any("Blanking block 2" in html for html in shown)
            before = await you.fire("tabs", "select", {"panel": "surgery"})
            assert any(yours.question in unescape(html) for html in before)
            assert not any(mine.question in unescape(html) or "Blanking" in html for html in before)
        async with Visitor(url) as third:
            await third.load()
            shown = await third.fire("tabs", "select", {"panel": "surgery"})
            assert any("Ask a question first" in html for html in shown)

    try:
        asyncio.run(story())
    finally:
        demo.close()
