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
from app.models import ModelShelf, describe_machine, has_own_cot
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
from rim_probe.pictures.parts import script

STAGE_JS = script() + (Path(__file__).parent.parent / "stage.js").read_text(encoding="utf-8")
PRIVATE: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}


@dataclass
class Race:
    """What all visitors share: the models, the queue in front of them, the cancel switches."""

    shelf: ModelShelf
    recordings: Path = recorded.FOLDER
    turnstile: Turnstile = field(default_factory=Turnstile)
    cancellations: Cancellations = field(default_factory=Cancellations)

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
    ) -> Iterator[Run | str]:
        """Answers with every method; yields the run as it grows, or a sentence while the model is still being loaded.

        Args:
            steps: gold steps; where they are left out, those of the example that asks the same question, if any.
            methods: of `METHODS`; "direct" is left out where the checkpoint has no model of its own for it.

        Raises:
            RiMError: bad input, or a model that cannot be loaded or fails.
        """
        question, gold = check_question(question), check_gold(gold)
        num_blocks = check_blocks(num_blocks, max(MAX_BLOCKS, self.layout(name).num_blocks))
        models = self.shelf.wait(name, cancel, seconds=0)
        while models is None and not cancel.is_set():
            yield f"Loading {name} first; your question starts by itself."
            models = self.shelf.wait(name, cancel)
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
        """The Run button: yields [stage, notice, stop button, session]."""
        self.cancellations.stop(request.session_hash)
        cancel = self.cancellations.start(request.session_hash)
        run, sentence = None, ""
        if is_stale(question, gold, session):  # a pasted question: the page clears the field after the run
            gold = ""
        # With every step, because the browser may see only the last of several that come close together.
        stoppable = gr.Button(interactive=True)
        try:
            yield [gr.skip(), sentence, stoppable, gr.skip()]
            known = session.steps_for(question)
            methods = METHODS if direct else RACERS
            for step in self.answer(question, num_blocks, gold, name, cancel, steps=known, methods=methods):
                if isinstance(step, str):
                    yield [gr.skip(), figures.model_state(step, "loading"), stoppable, gr.skip()]
                else:
                    if run is None:
                        session.add(step)
                    run = step
                    yield [figures.stage(run), "", stoppable, gr.skip()]
        except RiMError as error:
            sentence = self.explain(error, name, question)
            if run is not None:
                run.status = "stopped"
        finally:
            # Also reached when the tab is closed: Gradio then closes this generator.
            self.cancellations.finish(request.session_hash, cancel)
        # Without a run the page keeps the race it showed before.
        yield [gr.skip() if run is None else figures.stage(run), sentence, gr.Button(interactive=False), session]

    def stop(self, request: gr.Request) -> None:
        self.cancellations.stop(request.session_hash)

    def watch_model(self, name: str | None) -> Iterator[str]:
        """The line under the model picker, until the model is ready or has failed."""
        cancel = threading.Event()
        try:
            models = self.shelf.wait(name, cancel, seconds=0)
            while models is None:
                yield figures.model_state(f"Loading {name} …", "loading")
                models = self.shelf.wait(name, cancel, seconds=0.5)
            loading = self.shelf.start(name)
            said = loading.note
            yield figures.model_state(f"Ready: {describe_machine(models)}. {said}".strip(), "ready")
            while self.shelf.wait_readers(name, cancel, seconds=0.5) is None:
                pass  # a race can begin meanwhile
            if loading.note != said:
                yield figures.model_state(f"Ready: {describe_machine(models)}. {loading.note}", "ready")
        except RiMError as error:
            yield figures.model_state(str(error), "failed")

    def choose_model(self, name: str | None, session: Session) -> list[Any]:
        """Another checkpoint was picked: [stage, gallery, slider, direct, session]."""
        blocks = self.layout(name).num_blocks
        return [
            self.opening(name, session=session)[0],
            self.gallery(name),
            gr.Slider(value=blocks, maximum=max(MAX_BLOCKS, blocks)),
            gr.Checkbox(visible=self.shelf.has(name, "direct")),
            session,
        ]

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
    model_state = gr.HTML(elem_id="model-state", apply_default_css=False)
    return Parts(question, run, stop, notice, examples, gold, blocks, direct, model, model_state)


def wire(race_panel: Race, parts: Parts, stage: gr.HTML, session: gr.State, demo: gr.Blocks, after: dict) -> None:
    """Connects the components. `after` is the event that follows whatever changes the shown run."""
    run_event: dict[str, Any] = {
        "fn": race_panel.run,
        "inputs": [parts.question, parts.gold, parts.blocks, parts.model, session, parts.direct],
        "outputs": [stage, parts.notice, parts.stop, session],
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
    shown = [stage, parts.examples, parts.blocks, parts.direct, session]
    # `input`, not `change`: the page sets the model itself where a link or the tour names another one.
    parts.model.input(race_panel.choose_model, [parts.model, session], shown, **PRIVATE).then(**after)
    watched = {"inputs": [parts.model], "outputs": [parts.model_state], "concurrency_limit": None, **PRIVATE}
    parts.model.change(race_panel.watch_model, **watched)
    demo.load(race_panel.watch_model, **watched)
    demo.unload(race_panel.stop)
