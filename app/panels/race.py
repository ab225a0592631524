"""The race panel: ask one question, watch memory, chain of thought and (if wanted) the direct answer race.

Builds its components and wires them to `app.session.race`: `Race.ask` makes a run, which then waits for its turn in
Gradio's queue and is answered by `Race.run`; after the memory was read, `Race.measure` times it again. Drawing is
`app.figures`' job, loading models `app.models`'. What an event changes is a dictionary by the names of `Parts`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from app import figures, recorded
from app.models import Loaded, ModelShelf
from app.runs import METHODS, RACERS, Lane, Run
from app.session import (
    MAX_BLOCKS,
    Session,
    caution,
    check_asked,
    check_blocks,
    check_gold,
    check_question,
    evaluate,
    measure,
    race,
)
from rim_probe.errors import RiMError, UnknownWordsError
from rim_probe.memory import MemoryLayout
from rim_probe.plots.frame import script
from rim_probe.problems import Problem
from rim_probe.trained_on import outside

STAGE_JS = script() + (Path(__file__).parent.parent / "stage.js").read_text(encoding="utf-8")
PRIVATE: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
# Gradio's queue lets one race through at a time. Everything else that uses a model waits for it in a thread; so that
# those who wait leave threads to those whose turn it is, no more than these do at the same time.
ONE_RACE: dict[str, Any] = {"concurrency_id": "race", "concurrency_limit": 1}
SOME: dict[str, Any] = {"concurrency_limit": 8}
PER_DEPTH = 2  # examples of each number of steps
Changes = dict[str, Any]  # of the page, by the names of its parts


@dataclass
class Race:
    """What all visitors share: the models, and the runs that are shown before one is loaded.

    Attributes:
        own_machine: the page runs on its visitor's own machine, so folders may be named.
    """

    shelf: ModelShelf
    recordings: Path = recorded.FOLDER
    own_machine: bool = False

    # ------------------------------------------------------------------------------------------------- what it shows

    def opening(
        self, name: str | None, index: int | None = None, session: Session | None = None
    ) -> tuple[str, Run | None]:
        """The stage with recording `index` of a checkpoint (default: the one that greets a visitor), and that run,
        which `session` is then showing.
        """
        try:
            recordings = recorded.load(name, self.recordings) if name in self.shelf.names else []
        except RiMError as error:
            return figures.stage(None) + figures.notice(str(error)), None
        if not recordings:
            return figures.stage(None), None
        shown = recorded.opening(recordings) if index is None else min(max(index, 0), len(recordings) - 1)
        runs, labels = [entry.run for entry in recordings], [entry.label for entry in recordings]
        if session is not None:
            session.show_recorded(runs[shown], shown)
            session.picked = (runs[shown].question, runs[shown].gold or "", runs[shown].steps)
        return figures.stage(runs[shown], True, figures.recorded_selector(runs, shown, labels)), runs[shown]

    def offered(self, name: str | None) -> list[tuple[Problem, str]]:
        """The examples to choose from, each with what it is: a few of every depth, then those of every outcome."""
        examples: list[Problem] = []
        found = None
        with contextlib.suppress(RiMError):  # the lines under the picker say so
            examples = self.shelf.examples(name) if name else []
        with contextlib.suppress(RiMError):
            found = recorded.outcomes(name, self.recordings) if name in self.shelf.names else None
        depths: dict[int, list[Problem]] = {}
        for problem in examples:
            depths.setdefault(len(problem.steps), []).append(problem)
        chosen = [(p, figures.count(depth, "step")) for depth in sorted(depths) for p in depths[depth][:PER_DEPTH]]
        outcomes = found.examples.items() if found else ()
        return chosen + [(problem, what) for what, problems in outcomes for problem in problems[:PER_DEPTH]]

    def dataset(self, name: str | None) -> dict[str, Any]:
        """The examples as Gradio's component takes them."""
        offered = self.offered(name)
        labels = [f"{what}: {problem.question}" for problem, what in offered]
        samples = [[problem.question] for problem, _ in offered]
        return {"samples": samples, "sample_labels": labels, "visible": bool(labels)}

    def gold_steps(self, name: str | None, question: str) -> tuple[str, ...]:
        """The gold steps of a question that is offered as an example; none of any other."""
        try:
            known = self.shelf.examples(name)
        except RiMError:
            known = []
        known = known + [problem for problem, _ in self.offered(name)]
        return next((problem.steps for problem in known if problem.question == question), ())

    def layout(self, name: str | None) -> MemoryLayout:
        """The layout for the slider; a damaged one is reported when the model is loaded."""
        try:
            return self.shelf.layout(name) if name else MemoryLayout()
        except RiMError:
            return MemoryLayout()

    def explain(self, error: RiMError, name: str | None, question: str) -> str:
        """An error as a sentence in the page; of unknown words, with another model and an example that can be asked."""
        if not isinstance(error, UnknownWordsError):
            return figures.notice(str(error))
        offered = [problem for problem, _ in self.offered(name)][:1]
        return figures.notice(str(error), offered, [one for one in self.shelf.names if self.shelf.is_open(one)][:1])

    def warn(self, name: str | None, question: str) -> str:
        """What a model was not trained for, before it answers."""
        try:
            sentence = caution(question, self.shelf.examples(name))
        except RiMError:
            sentence = ""
        return figures.notice(sentence, warning=True) if sentence else ""

    def chosen(self, name: str | None, blocks: int | None = None, direct: bool = False) -> Changes:
        """What goes with a checkpoint in the boxes."""
        own = self.layout(name).num_blocks
        return {
            "blocks": gr.Slider(value=own if blocks is None else blocks, maximum=max(MAX_BLOCKS, own)),
            "direct": gr.Checkbox(value=direct, visible=self.shelf.has(name, "direct")),
            "examples": gr.Dataset(**self.dataset(name)),
        }

    # --------------------------------------------------------------------------------------------------- what it does

    def prepare(
        self,
        question: Any,
        num_blocks: Any,
        gold: Any,
        name: str | None,
        *,
        steps: Sequence[str] = (),
        methods: Sequence[str] = RACERS,
        progress: gr.Progress | None = None,
    ) -> Run:
        """A run that can begin, when its model is there.

        Args:
            gold: the right answer; that of a mere sum ("what is 12 + 7?") is computed where none is given.
            steps: gold steps; where they are left out, those of the example that asks the same question, if any.
            methods: of `METHODS`; "direct" is left out where the checkpoint has no model of its own for it.
            progress: shows how far a model is that has to be loaded first.

        Raises:
            RiMError: bad input, or a model that cannot be loaded or asked.
        """
        question = check_question(question)
        gold = check_gold(gold) or evaluate(question)
        num_blocks = check_blocks(num_blocks, max(MAX_BLOCKS, self.layout(name).num_blocks))
        loaded = self.shelf.load(name, tell=_teller(name, progress))
        able = [one for one in methods if one in RACERS or loaded.models[one] is not loaded.models["memory"]]
        run = Run(name, question, gold, num_blocks, loaded.machine, matched=loaded.has_own_cot)
        run.outside = outside([loaded.models["memory"]], question)
        run.steps = tuple(steps) or self.gold_steps(name, question)
        run.lanes = {method: Lane() for method in METHODS if method in able}
        check_asked(loaded, run)
        return run

    def answer(self, run: Run) -> Iterator[Run]:
        """Answers a prepared run; yields it as it grows.

        Raises:
            RiMError: a model that cannot be loaded or fails.
        """
        return race(self.shelf.load(run.checkpoint), run)

    def ask(
        self,
        question: str,
        gold: str,
        num_blocks: float,
        name: str | None,
        session: Session,
        direct: bool = False,
        progress: gr.Progress = gr.Progress(),  # noqa: B008 (how Gradio is told)
    ) -> Iterator[Changes]:
        """The Run button: puts a run into `session.asked`, from where `run` takes it."""
        if is_stale(question, gold, session):  # a pasted question: the page clears the field after the run
            gold = ""
        session.asked = None
        waits = not self.shelf.is_ready(name)  # the line under the picker may still say that the last attempt failed
        yield {"notice": self.warn(name, question), "stop": gr.Button(visible=True)}
        try:
            methods, known = METHODS if direct else RACERS, session.steps_for(question)
            session.asked = self.prepare(
                question, num_blocks, gold, name, steps=known, methods=methods, progress=progress
            )
        except RiMError as error:
            yield {"notice": self.explain(error, name, question), "stop": gr.Button(visible=False)}
        else:
            changes = {"model_state": self.state(name, self.shelf.load(name))} if waits else {}
            yield changes | ({"notice": ""} if session.asked.outside else {})  # which the race itself says

    def run(self, session: Session) -> Iterator[Changes]:
        """When it is this run's turn in the queue."""
        run, session.asked = session.asked, None
        if run is None:  # refused, stopped, or another one was asked since
            yield {}
            return
        session.add(run)
        notice: Changes = {}
        try:
            for _ in self.answer(run):
                yield self.shown(run, run.status == "done")
        except RiMError as error:
            notice = {"notice": self.explain(error, run.checkpoint, run.question)}
        yield self.shown(run, run.status == "done") | notice | {"stop": gr.Button(visible=False), "session": session}

    def shown(self, run: Run, timing: bool = False) -> Changes:
        """What shows a race; `timing`: it will be measured."""
        return {"stage": figures.stage(run), "headline": figures.headline(run, timing)}

    def measure(self, session: Session) -> Iterator[Changes]:
        """Times a finished race again, for the comparison in the headline."""
        run = session.run
        if run is None or run.status != "done" or session.recorded is not None or run.lanes["cot"].repeats:
            yield {}
            return
        with contextlib.suppress(RiMError):  # the headline goes without
            measure(self.shelf.load(run.checkpoint), run)
        yield {"headline": figures.headline(run)} if session.run is run else {}

    def stop(self, session: Session) -> Iterator[Changes]:
        """The Stop button, which ends the events of a race."""
        session.asked, run = None, session.run
        over = {"notice": "", "stop": gr.Button(visible=False)}
        if run is not None and run.status in ("running", "stopped"):  # Gradio may have closed it already
            run.status = "stopped"
            over |= self.shown(run)
        yield over

    def watch_model(
        self,
        name: str | None,
        session: Session,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> Iterator[Changes]:
        """Loads the model; the lines under its picker, until it is ready or has failed, or another one is picked."""
        session.watched = name
        try:
            yield {
                "model_state": figures.model_state(
                    "Loading; the recorded runs can be looked at meanwhile.", "loading", self.shelf.about(name)
                )
            }
            loaded = self.shelf.load(name, tell=_teller(name, progress))
            said = loaded.note
            yield {"model_state": self.state(name, loaded)} if session.watched == name else {}
            self.shelf.load(name, readable=True)  # a race can begin meanwhile
            yield {"model_state": self.state(name, loaded)} if loaded.note != said and session.watched == name else {}
        except RiMError as error:
            other = self.shelf.greeting if self.shelf.greeting != name else ""
            state = figures.model_state(str(error), "failed", self.shelf.about(name), other)
            yield {"model_state": state} if session.watched == name else {}

    def state(self, name: str | None, loaded: Loaded) -> str:
        words = ["Ready.", loaded.note]
        try:
            self.shelf.examples(name or "")
            recorded.outcomes(name or "", self.recordings)
        except RiMError as error:  # the model itself is usable
            words.append(str(error))
        return figures.model_state(" ".join(filter(None, words)), "ready", self.shelf.about(name))

    def choose_model(self, name: str | None, question: str, session: Session) -> Iterator[Changes]:
        """Another checkpoint was picked.

        A question that was typed stays; an example of the model before, which this one may not understand, makes room
        for one of its own.
        """
        picked = session.picked
        stage, run = self.opening(name, session=session)
        boxes: Changes = {}
        if not question.strip() or (picked is not None and question == picked[0]):
            if run is None:
                session.picked = self.first_example(name)
            own = session.picked or ("", "", ())
            boxes = {"question": own[0], "gold": own[1]}
        yield {"stage": stage, "headline": figures.headline(run), "session": session} | self.chosen(name) | boxes

    def first_example(self, name: str | None) -> tuple[str, str, tuple[str, ...]] | None:
        """What a checkpoint without recorded runs begins with: question, answer and gold steps."""
        found = self.offered(name)
        return (found[0][0].question, found[0][0].answer, tuple(found[0][0].steps)) if found else None

    def choose_recording(self, name: str | None, session: Session, event: gr.EventData) -> Iterator[Changes]:
        """A recorded run was picked."""
        stage, run = self.opening(name, int(event._data["index"]), session)
        boxes = {"question": run.question, "gold": run.gold} if run else {}
        yield {"stage": stage, "headline": figures.headline(run), "session": session} | boxes

    def pick(self, index: int, name: str | None, session: Session) -> Iterator[Changes]:
        """An example was picked; it will be run."""
        problem, _ = self.offered(name)[index]
        yield self._picked(problem, session)

    def follow(self, session: Session, event: gr.EventData) -> Iterator[Changes]:
        """What a notice or the lines under the picker offer: a question, another model, the same model once more."""
        offered = event._data if isinstance(event._data, dict) else {}
        if isinstance(offered.get("question"), str):
            steps = tuple(map(str, offered.get("steps", ())))
            yield self._picked(Problem(offered["question"], steps, str(offered.get("answer", ""))), session)
        elif offered.get("model") in self.shelf.names:
            yield {"model": offered["model"], "notice": ""} | self.chosen(offered["model"])
        else:
            yield {}

    def _picked(self, problem: Problem, session: Session) -> Changes:
        session.picked = (problem.question, problem.answer, tuple(problem.steps))
        return {"question": problem.question, "gold": problem.answer, "session": session, "notice": ""}

    def bring(
        self,
        source: str,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> Iterator[Changes]:
        """A visitor's own checkpoint: loads it and says what it can do."""
        try:
            name = self.shelf.add(source, self.own_machine, _teller(source, progress))
            said = figures.notice(self.shelf.verdict(name), warning=True)
        except RiMError as error:
            yield {"own_state": figures.notice(str(error))}
            return
        yield {"own_state": said, "model": gr.Dropdown(self.shelf.names, value=name)} | self.chosen(name)


def _teller(name: str | None, progress: gr.Progress | None) -> Callable[[tuple | None], object]:
    """Shows how far a model is by Gradio's own bar."""

    def tell(stage: tuple[str, int, int | None] | None) -> None:
        if progress is not None and stage is None:
            progress(None, desc=f"Loading {name} …")
        elif progress is not None:
            what, done, total = stage
            progress((round(done / 1e6, 1), total and round(total / 1e6, 1)), desc=what, unit="MB")

    return tell


def is_stale(question: str, gold: str, session: Session) -> bool:
    """Whether the gold answer is that of an example whose question has since been edited."""
    picked = session.picked
    return picked is not None and gold == picked[1] and question != picked[0]


def forget_gold(question: str, gold: str, session: Session) -> str:
    """The gold answer of an example does not outlive an edit of its question; one typed by the visitor stays."""
    if not is_stale(question, gold, session):
        return gold
    session.picked = None  # so that the same answer, typed again, is the visitor's own
    return ""


@dataclass(frozen=True)
class Parts:
    """The components that ask."""

    question: gr.Textbox
    run: gr.Button
    stop: gr.Button
    notice: gr.HTML


@dataclass(frozen=True)
class Settings:
    """The components that say whom and what to ask."""

    model: gr.Dropdown
    model_state: gr.HTML
    examples: gr.Dataset
    gold: gr.Textbox
    blocks: gr.Slider
    direct: gr.Checkbox
    own: gr.Textbox
    bring: gr.Button
    own_state: gr.HTML


def build_ask(picked: tuple[str, str, tuple[str, ...]] | None) -> Parts:
    """The question, Run and Stop."""
    question = gr.Textbox(
        value=picked[0] if picked else "",
        label="A word problem, in your own words",
        placeholder="Ann has 3 apples. Ann buys 4 more apples. How many apples does Ann have now?",
        lines=3,
        max_lines=8,
        elem_id="question",
    )
    with gr.Row(elem_id="run-row"):
        run = gr.Button("Run", variant="primary", elem_id="run", scale=3, min_width=80)
        stop = gr.Button("Stop", elem_id="stop", visible=False, scale=1, min_width=80)
    return Parts(question, run, stop, gr.HTML(elem_id="notice", js_on_load=STAGE_JS, apply_default_css=False))


def build_settings(race_panel: Race, name: str | None, picked: tuple[str, str, tuple[str, ...]] | None) -> Settings:
    """The model, the examples, and what few change."""
    layout, shelf = race_panel.layout(name), race_panel.shelf
    model = gr.Dropdown(shelf.names, value=name, label="Model", elem_id="model", filterable=False)
    about = figures.model_state("", "", shelf.about(name))
    state = gr.HTML(about, elem_id="model-state", js_on_load=STAGE_JS, apply_default_css=False)
    examples = gr.Dataset(
        components=[gr.Textbox(visible=False)],
        label="Examples (picking one runs it)",
        type="index",
        samples_per_page=5,
        elem_id="examples",
        **race_panel.dataset(name),
    )
    with gr.Accordion("Settings, and your own checkpoint", open=False, elem_id="settings"):
        gold = gr.Textbox(
            value=picked[1] if picked else "",
            label="Correct answer, if known",
            max_lines=1,
            elem_id="gold",
        )
        most = max(MAX_BLOCKS, layout.num_blocks)
        blocks = gr.Slider(
            0, most, value=layout.num_blocks, step=1, label="Memory blocks K", elem_id="blocks", buttons=[]
        )
        direct = gr.Checkbox(
            label="A third lane: answer directly",
            info="by a model that neither writes nor has memory",
            visible=shelf.has(name, "direct"),
            elem_id="direct",
        )
        folders = " or a folder of this machine" if race_panel.own_machine else ""
        own = gr.Textbox(label=f"Your own checkpoint: Hugging Face id{folders}", max_lines=1, elem_id="own")
        bring = gr.Button("Load it", elem_id="bring")
        own_state = gr.HTML(elem_id="own-state", apply_default_css=False)
    return Settings(model, state, examples, gold, blocks, direct, own, bring, own_state)
