"""The race panel: ask one question, watch memory, chain of thought and (if wanted) the direct answer race.

Builds its components and wires them to `app.session.race`. Drawing is `app.figures`' job, loading models `app.models`'.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gradio as gr

from app import figures, outcomes, recorded
from app.models import ModelShelf, Stage, describe_machine, has_own_cot
from app.runs import METHODS, RACERS, Run
from app.session import (
    MAX_BLOCKS,
    Cancellations,
    Session,
    Turnstile,
    check_blocks,
    check_gold,
    check_question,
    race,
)
from rim_probe.errors import RiMError, UnknownWordsError
from rim_probe.memory import MemoryLayout
from rim_probe.plots.frame import script

STAGE_JS = script() + (Path(__file__).parent.parent / "stage.js").read_text(encoding="utf-8")
LOOK_SECONDS = 0.5  # between two looks at a model that is being loaded
PRIVATE: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}


@dataclass(frozen=True)
class Waiting:
    """A question waits for its model, whose base may have to be fetched."""

    name: str
    stage: Stage | None

    def notice(self) -> str:
        """Under the question."""
        words = f"Loading {self.name} first; your question starts by itself."
        return figures.model_state(words, "loading", self.stage)

    def state(self) -> str:
        """Under the model picker."""
        return figures.model_state(f"Loading {self.name} …", "loading", self.stage)


@dataclass
class Race:
    """What all visitors share: the models, the queue in front of them, the switches of runs and of watched models."""

    shelf: ModelShelf
    recordings: Path = recorded.FOLDER
    turnstile: Turnstile = field(default_factory=Turnstile)
    cancellations: Cancellations = field(default_factory=Cancellations)
    watches: Cancellations = field(default_factory=Cancellations)

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

    def gallery(self, name: str | None) -> str:
        """Examples by depth and by outcome; what is damaged gives a sentence, and the rest is still offered."""
        examples, recorded_outcomes, complaint = [], None, ""
        try:
            examples = self.shelf.examples(name) if name else []
            recorded_outcomes = outcomes.load(name, self.recordings) if name in self.shelf.names else None
        except RiMError as error:
            complaint = figures.notice(str(error))
        return figures.gallery(examples, recorded_outcomes) + complaint

    def gold_steps(self, name: str | None, question: str) -> tuple[str, ...]:
        """The gold steps of a question that is offered as an example; none of any other."""
        try:
            known = self.shelf.examples(name)
            found = outcomes.load(name, self.recordings)
        except RiMError:
            return ()  # the gallery says so
        if found is not None:
            known = known + [problem for problems in found.examples.values() for problem in problems]
        return next((problem.steps for problem in known if problem.question == question), ())

    def layout(self, name: str | None) -> MemoryLayout:
        """The layout for the slider; a damaged one is reported when the model is loaded."""
        try:
            return self.shelf.layout(name) if name else MemoryLayout()
        except RiMError:
            return MemoryLayout()

    def explain(self, error: RiMError, name: str | None, question: str) -> str:
        """An error as a sentence in the page; unknown words come with the nearest example."""
        example = None
        if isinstance(error, UnknownWordsError):
            try:
                examples = self.shelf.examples(name)
                if examples:
                    from rim_probe.gallery import nearest_example

                    example = nearest_example(question, examples)
            except RiMError:
                pass  # the first error is the one to show
        return figures.notice(str(error), example)

    # --------------------------------------------------------------------------------------------------- what it does

    def answer(
        self,
        question: Any,
        num_blocks: Any,
        gold: Any,
        name: str | None,
        cancel: threading.Event,
        *,
        steps: Sequence[str] = (),
        methods: Sequence[str] = RACERS,
    ) -> Iterator[Run | Waiting]:
        """Answers with every method; yields the run as it grows, and before it what the model still waits for.

        Args:
            steps: gold steps; where they are left out, those of the example that asks the same question, if any.
            methods: of `METHODS`; "direct" is left out where the checkpoint has no model of its own for it.

        Raises:
            RiMError: bad input, or a model that cannot be loaded or fails.
        """
        question, gold = check_question(question), check_gold(gold)
        num_blocks = check_blocks(num_blocks, max(MAX_BLOCKS, self.layout(name).num_blocks))
        loading = self.shelf.start(name)
        models = self.shelf.wait(loading, cancel, seconds=0)
        while models is None and not cancel.is_set():
            yield Waiting(name, loading.stage)
            models = self.shelf.wait(loading, cancel, seconds=LOOK_SECONDS)
        if models is not None:
            run = Run(name, question, gold, num_blocks, describe_machine(models), matched=has_own_cot(models))
            run.steps = tuple(steps) or self.gold_steps(name, question)
            able = [method for method in methods if method in RACERS or models[method] is not models["memory"]]
            yield from race(models, run, cancel, self.turnstile, able)

    def run(
        self,
        question: str,
        gold: str,
        num_blocks: float,
        name: str | None,
        session: Session,
        request: gr.Request,
        direct: bool = False,
    ) -> Iterator[list[Any]]:
        """The Run button: yields [stage, notice, stop button, session, model state]."""
        self.cancellations.stop(request.session_hash)
        cancel = self.cancellations.start(request.session_hash)
        run, sentence, waited = None, "", False
        if is_stale(question, gold, session):  # a pasted question: the page clears the field after the run
            gold = ""
        # With every step, because the browser may see only the last of several that come close together.
        stoppable = gr.Button(interactive=True)
        try:
            yield [gr.skip(), sentence, stoppable, gr.skip(), gr.skip()]
            known = session.steps_for(question)
            methods = METHODS if direct else RACERS
            for step in self.answer(question, num_blocks, gold, name, cancel, steps=known, methods=methods):
                if isinstance(step, Waiting):
                    waited = True  # the line under the picker may still say that the last attempt failed
                    yield [gr.skip(), step.notice(), stoppable, gr.skip(), step.state()]
                else:
                    if run is None:
                        session.add(step)
                    run = step
                    yield [figures.stage(run), "", stoppable, gr.skip(), self._state(name) if waited else gr.skip()]
        except RiMError as error:
            sentence = self.explain(error, name, question)
            if run is not None:
                run.status = "stopped"
        finally:
            # Also reached when the tab is closed: Gradio then closes this generator.
            self.cancellations.finish(request.session_hash, cancel)
        # Without a run the page keeps the race it showed before.
        shown = gr.skip() if run is None else figures.stage(run)
        yield [shown, sentence, gr.Button(interactive=False), session, self._state(name) if waited else gr.skip()]

    def stop(self, request: gr.Request) -> None:
        self.cancellations.stop(request.session_hash)

    def leave(self, request: gr.Request) -> None:
        """The tab was closed."""
        self.cancellations.stop(request.session_hash)
        self.watches.stop(request.session_hash)

    def watch_model(self, name: str | None, request: gr.Request | None = None) -> Iterator[str]:
        """The line under the model picker, until the model is ready or has failed, or another one is watched."""
        session = request.session_hash if request is not None else ""
        self.watches.stop(session)
        cancel = self.watches.start(session)
        try:
            loading = self.shelf.start(name)
            models = self.shelf.wait(loading, cancel, seconds=0)
            while models is None and not cancel.is_set():
                yield Waiting(name, loading.stage).state()
                models = self.shelf.wait(loading, cancel, seconds=LOOK_SECONDS)
            if models is None:
                return
            said = loading.note
            yield self._state(name)
            while self.shelf.wait_readers(loading, cancel, seconds=LOOK_SECONDS) is None and not cancel.is_set():
                pass  # a race can begin meanwhile
            if loading.note != said and not cancel.is_set():
                yield self._state(name)
        except RiMError as error:
            if not cancel.is_set():
                yield figures.model_state(str(error), "failed")
        finally:
            self.watches.finish(session, cancel)

    def _state(self, name: str | None) -> str:
        """The line under the model picker, as things are; begins nothing."""
        loading = self.shelf.loading(name)
        if loading is None or loading.error is not None:
            return "" if loading is None else figures.model_state(str(loading.error), "failed")
        if loading.models is None:
            return Waiting(name, loading.stage).state()
        return figures.model_state(f"Ready: {describe_machine(loading.models)}. {loading.note}".strip(), "ready")

    def choose_model(self, name: str | None, question: str, session: Session) -> list[Any]:
        """Another checkpoint was picked: [stage, gallery, slider, direct, session, question, gold].

        A question that was typed stays; an example of the model before, which this one may not understand, makes room
        for one of its own.
        """
        blocks, picked = self.layout(name).num_blocks, session.picked
        stage, run = self.opening(name, session=session)
        boxes = [gr.skip(), gr.skip()]
        if not question.strip() or (picked is not None and question == picked[0]):
            if run is None:
                session.picked = self.first_example(name)
            boxes = list(session.picked[:2]) if session.picked is not None else ["", ""]
        return [
            stage,
            self.gallery(name),
            gr.Slider(value=blocks, maximum=max(MAX_BLOCKS, blocks)),
            gr.Checkbox(visible=self.shelf.has(name, "direct")),
            session,
            *boxes,
        ]

    def first_example(self, name: str | None) -> tuple[str, str, tuple[str, ...]] | None:
        """What a checkpoint without recorded runs begins with: question, answer and gold steps."""
        try:
            found = self.shelf.examples(name)
        except RiMError:
            return None  # the gallery says so
        return (found[0].question, found[0].answer, tuple(found[0].steps)) if found else None

    def choose_recording(self, name: str | None, session: Session, event: gr.EventData) -> list[Any]:
        """A recorded run was picked: [stage, question, gold, session]."""
        stage, run = self.opening(name, int(event._data["index"]), session)
        if run is None:
            return [stage, gr.skip(), gr.skip(), gr.skip()]
        return [stage, run.question, run.gold, session]


def pick(session: Session, event: gr.EventData) -> list[Any]:
    """An example was picked: [question, gold, session]."""
    data = event._data
    question, answer, steps = str(data["question"]), str(data["answer"]), data.get("steps")
    session.picked = (question, answer, tuple(str(step) for step in steps) if isinstance(steps, list) else ())
    return [question, answer, session]


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
    """The components that ask, and the stage they fill."""

    question: gr.Textbox
    run: gr.Button
    stop: gr.Button
    notice: gr.HTML
    examples: gr.HTML
    gold: gr.Textbox
    blocks: gr.Slider
    direct: gr.Checkbox
    model: gr.Dropdown
    model_state: gr.HTML


def build_ask(race_panel: Race, name: str | None, opening_run: Run | None) -> Parts:
    """The column of boxes and buttons."""
    layout = race_panel.layout(name)
    question = gr.Textbox(
        value=opening_run.question if opening_run else "",
        label="A word problem",
        placeholder="Ann has 3 apples. Ann buys 4 more apples. How many apples does Ann have now?",
        lines=4,
        max_lines=10,
        elem_id="question",
    )
    with gr.Row(elem_id="run-row"):
        run = gr.Button("Run", variant="primary", elem_id="run", scale=2, min_width=80)
        stop = gr.Button("Stop", elem_id="stop", interactive=False, scale=1, min_width=80)
    notice = gr.HTML(elem_id="notice", js_on_load=STAGE_JS, apply_default_css=False)
    examples = gr.HTML(race_panel.gallery(name), elem_id="examples", js_on_load=STAGE_JS, apply_default_css=False)
    gold = gr.Textbox(
        value=opening_run.gold if opening_run else "",
        label="Correct answer, if known",
        max_lines=1,
        elem_id="gold",
    )
    blocks = gr.Slider(
        0,
        max(MAX_BLOCKS, layout.num_blocks),
        value=layout.num_blocks,
        step=1,
        label="Memory blocks K",
        elem_id="blocks",
        buttons=[],
    )
    direct = gr.Checkbox(
        label="A third lane: answer directly",
        info="by a model that neither writes nor has memory",
        visible=race_panel.shelf.has(name, "direct"),
        elem_id="direct",
    )
    names = race_panel.shelf.names
    model = gr.Dropdown(names, value=name, label="Model", elem_id="model", filterable=False)
    model_state = gr.HTML(elem_id="model-state", js_on_load=STAGE_JS, apply_default_css=False)
    return Parts(question, run, stop, notice, examples, gold, blocks, direct, model, model_state)


def wire(race_panel: Race, parts: Parts, stage: gr.HTML, session: gr.State, demo: gr.Blocks, after: dict) -> None:
    """Connects the components. `after` is the event that follows whatever changes the shown run."""
    run_event: dict[str, Any] = {
        "fn": race_panel.run,
        "inputs": [parts.question, parts.gold, parts.blocks, parts.model, session, parts.direct],
        "outputs": [stage, parts.notice, parts.stop, session, parts.model_state],
        # The turnstile in `session` queues the runs, and says so in the page.
        "concurrency_limit": None,
        **PRIVATE,
    }
    fields = [parts.question, parts.gold, session]
    parts.run.click(**run_event).then(forget_gold, fields, [parts.gold], **PRIVATE).then(**after)
    for offering in (parts.examples, parts.notice):
        offering.select(pick, [session], fields, **PRIVATE).then(**run_event).then(**after)
    parts.stop.click(race_panel.stop, queue=False, **PRIVATE)
    parts.question.input(forget_gold, fields, [parts.gold], trigger_mode="always_last", **PRIVATE)
    stage.select(race_panel.choose_recording, [parts.model, session], [stage, *fields], **PRIVATE).then(**after)
    shown = [stage, parts.examples, parts.blocks, parts.direct, session, parts.question, parts.gold]
    # `input`, not `change`: the page sets the model itself where a link or the tour names another one.
    asked = [parts.model, parts.question, session]
    parts.model.input(race_panel.choose_model, asked, shown, **PRIVATE).then(**after)
    watched = {"inputs": [parts.model], "outputs": [parts.model_state], "concurrency_limit": None, **PRIVATE}
    parts.model.change(race_panel.watch_model, trigger_mode="multiple", **watched)  # each ends the one before
    parts.model_state.select(race_panel.watch_model, **watched)
    demo.load(race_panel.watch_model, **watched)
    demo.unload(race_panel.leave)
