"""“Copy as Python”: the lines are run, and give the figure they stand under; they name what a researcher would load."""

import ast
import copy
import functools
import re
from html import unescape

import pytest

from app import code
from app.models import CHECKPOINTS, ModelShelf
from app.panels.inspect import Inspector
from app.panels.race import Race
from app.runs import Run
from app.session import Session
from app.view import Looking
from rim_probe.plots import PANELS, Panel
from rim_probe.probing import reading, study

VIEWS = {
    "blocks": {"step": "2"},
    "attention": {"layer": "2", "head": "max", "block": "3"},
    "layers": {"mode": "tuned lens", "minus": "on", "cell": "1.2.1"},
    "trajectory": {"axes": "13", "cloud": "steps"},
    "surgery": {"ops": "1b2n3s", "layers": "0-2", "partner": "what is 1 + 1 ?"},
}


@pytest.fixture(scope="module")
def inspector() -> Inspector:
    return Inspector(Race(ModelShelf(CHECKPOINTS)))


@pytest.fixture(scope="module")
def finished(inspector):
    """The read run of an example; a copy of its own for every test."""
    made: dict[int, Run] = {}

    def run(blocks: int = 3) -> Run:
        if blocks not in made:
            session, problem = Session(), inspector.race.shelf.examples("glass-box")[0]
            for _ in inspector.ask(problem, "glass-box", session, Looking(), blocks):
                pass
            made[blocks] = session.run
        return copy.copy(made[blocks])

    return run


@pytest.fixture(scope="module")
def load_once():
    return functools.cache(study.load_models)


@pytest.fixture
def drawn_by(monkeypatch, load_once):
    """What the lines of a panel save when they are run where the repository lies: the figure as HTML."""

    def run(html: str) -> str:
        lines = unescape(re.search(r'<pre class="pic-python"[^>]*>(.*?)</pre>', html, re.S)[1])
        saved: dict[str, str] = {}
        monkeypatch.setattr(Panel, "save", lambda self, path: saved.setdefault(path, self.html()))
        monkeypatch.chdir(CHECKPOINTS.parent)
        monkeypatch.setattr(study, "load_models", load_once)
        monkeypatch.setattr(reading, "load_models", load_once)
        exec(compile(lines, "copied", "exec"), {})
        ((path, figure),) = saved.items()
        assert path == re.search(r'data-panel="(\w+)"', html)[1] + ".html"
        return figure

    return run


def shown(inspector: Inspector, run: Run, panel: str, view=()) -> str:
    session, looking = Session(), Looking(panel, {panel: dict(view)})
    session.add(run)
    if panel == "surgery" and view:
        inspector.hands.operate(run, looking.view)
    return re.search(r"<figure.*</figure>", inspector.panel(session, looking, run.checkpoint), re.S)[0]


def bare(html: str) -> str:
    return re.sub(r'<pre class="pic-python".*?</pre>|<button[^>]*data-tool="python".*?</button>', "", html, flags=re.S)


@pytest.mark.parametrize("panel", PANELS)
@pytest.mark.parametrize("kind", ["as it opens", "chosen", "without blocks"])
def test_the_lines_draw_the_figure_again(inspector, finished, drawn_by, panel, kind):
    html = shown(
        inspector, finished(0 if kind == "without blocks" else 3), panel, VIEWS[panel] if kind == "chosen" else ()
    )
    assert drawn_by(html) == bare(html)


def test_the_lines_of_a_counterfactual_make_it_again(inspector, finished, drawn_by):
    run = finished()
    assert list(inspector.hands.test_claim(run, "2")) == [None], "one thing to draw before the outcome"
    html = shown(inspector, run, "surgery")
    assert "surgery-result good" in html and drawn_by(html) == bare(html)


def test_the_lines_of_the_evidence_draw_it_again(inspector, drawn_by):
    html = inspector.panel(Session(), Looking("evidence"), "glass-box")
    figure = re.search(r"<figure.*</figure>", html, re.S)[0]
    assert drawn_by(figure) == bare(figure)


@pytest.mark.parametrize(
    ("preferred", "named"),
    [
        (None, "checkpoints/glass-box"),
        ("/elsewhere/glass-box", "/elsewhere/glass-box"),
        ("../my/glass-box", "../my/glass-box"),
        ("someone/glass-box", "someone/glass-box"),
    ],
)
def test_the_lines_name_what_was_loaded(finished, preferred, named):
    html = shown(Inspector(Race(ModelShelf(CHECKPOINTS, preferred))), finished(), "blocks")
    assert f"read_checkpoint({named!r}, " in unescape(html)


def test_a_run_of_a_checkpoint_that_is_not_here_names_it(inspector, finished):
    run = finished()
    run.checkpoint = "another's"
    assert 'read_checkpoint("another\'s", ' in unescape(shown(inspector, run, "blocks"))


@pytest.mark.parametrize("panel", PANELS)
def test_no_text_of_a_visitor_becomes_code(panel):
    evil = "'''\"\"\"\\\n); import os; os.abort() #"
    run = Run(evil, evil, evil, 3, steps=(evil,), status="done")
    tree = ast.parse(code.python(run, panel, {"partner": evil, "cell": evil}, lambda name: evil))
    imported = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert all(name.startswith("rim_probe.") for name in imported)
    assert not any(isinstance(node, ast.Import) for node in ast.walk(tree))
