"""The race panel: ask one question, watch memory and chain of thought answer it.

Builds its components and wires them to `app.session.race`. Drawing is `app.figures`' job, loading models `app.models`'.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gradio as gr

from app import figures, recorded
from app.models import ModelShelf, describe_machine, has_own_cot
from app.session import (
    MAX_BLOCKS,
    Cancellations,
    Run,
    Session,
    Turnstile,
    check_blocks,
    check_gold,
    check_question,
    race,
)
from rim_probe.errors import RiMError, UnknownWordsError
from rim_probe.memory import MemoryLayout

STAGE_JS = (Path(__file__).parent.parent / "stage.js").read_text(encoding="utf-8")
PRIVATE: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}


@dataclass
class Race:
    """What all visitors share: the models, the queue in front of them, the cancel switches."""

    shelf: ModelShelf
    recordings: Path = recorded.FOLDER
    turnstile: Turnstile = field(default_factory=Turnstile)
    cancellations: Cancellations = field(default_factory=Cancellations)

    # ------------------------------------------------------------------------------------------------- what it shows

    def opening(self, name: str | None, index: int | None = None) -> tuple[str, Run | None]:
        """The stage with recording `index` of a checkpoint (default: the one that greets a visitor), and that run."""
        try:
            recordings = recorded.load(name, self.recordings) if name in self.shelf.names else []
        except RiMError as error:
            return figures.stage(None) + figures.notice(str(error)), None
        if not recordings:
            return figures.stage(None), None
        shown = recorded.opening(recordings) if index is None else min(max(index, 0), len(recordings) - 1)
        runs, labels = [entry.run for entry in recordings], [entry.label for entry in recordings]
        return figures.stage(runs[shown], True, figures.recorded_selector(runs, shown, labels)), runs[shown]

    def gallery(self, name: str | None) -> str:
        try:
            return figures.gallery(self.shelf.examples(name)) if name else ""
        except RiMError as error:
            return figures.notice(str(error))

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
        self, question: Any, num_blocks: Any, gold: Any, name: str | None, cancel: threading.Event
    ) -> Iterator[Run | str]:
        """Answers with both methods; yields the run as it grows, or a sentence while the model is still being loaded.

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
            yield from race(models, run, cancel, self.turnstile)

    def run(
        self, question: str, gold: str, num_blocks: float, name: str | None, session: Session, request: gr.Request
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
            for step in self.answer(question, num_blocks, gold, name, cancel):
                if isinstance(step, str):
                    yield [gr.skip(), figures.model_state(step, "loading"), stoppable, gr.skip()]
                else:
                    run = session.run = step
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

    def run_api(
        self, request: gr.Request, question: str, num_blocks: int | None = None, gold: str | None = None
    ) -> dict:
        """Answer one word problem by memory and by chain of thought.

        Returns the run as JSON: for "memory" and "cot" the answer, whether it is right (where `gold` is given) and
        every event with its time in seconds; "summary" is the race in one sentence. `num_blocks` is the number of
        memory blocks, 0 to 16 (default: the checkpoint's own).
        """
        name = next(iter(self.shelf.names), None)
        cancel = self.cancellations.start(request.session_hash)
        try:
            if num_blocks is None:
                num_blocks = self.layout(name).num_blocks
            run = None
            for run in self.answer(question, num_blocks, gold, name, cancel):  # noqa: B007 (the last one is wanted)
                pass
            if not isinstance(run, Run):
                raise RiMError("The run was stopped before it began.")
            return run.to_dict() | {"summary": figures.verdict(run)}
        except RiMError as error:
            raise gr.Error(str(error), print_exception=False) from None
        finally:
            self.cancellations.finish(request.session_hash, cancel)

    def watch_model(self, name: str | None) -> Iterator[str]:
        """The line under the model picker, until the model is ready or has failed."""
        cancel = threading.Event()
        try:
            models = self.shelf.wait(name, cancel, seconds=0)
            while models is None:
                yield figures.model_state(f"Loading {name} …", "loading")
                models = self.shelf.wait(name, cancel, seconds=0.5)
            note = self.shelf.start(name).note
            yield figures.model_state(f"Ready: {describe_machine(models)}. {note}".strip(), "ready")
        except RiMError as error:
            yield figures.model_state(str(error), "failed")

    def choose_model(self, name: str | None) -> list[Any]:
        """Another checkpoint was picked: [stage, gallery, slider]."""
        blocks = self.layout(name).num_blocks
        return [self.opening(name)[0], self.gallery(name), gr.Slider(value=blocks, maximum=max(MAX_BLOCKS, blocks))]

    def choose_recording(self, name: str | None, session: Session, event: gr.EventData) -> list[Any]:
        """A recorded run was picked: [stage, question, gold, session]."""
        stage, run = self.opening(name, int(event._data["index"]))
        if run is None:
            return [stage, gr.skip(), gr.skip(), gr.skip()]
        session.picked = (run.question, run.gold or "")
        return [stage, run.question, run.gold, session]


def pick(session: Session, event: gr.EventData) -> list[Any]:
    """An example was picked: [question, gold, session]."""
    question, answer = str(event._data["question"]), str(event._data["answer"])
    session.picked = (question, answer)
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


def build(race_panel: Race, demo: gr.Blocks) -> None:
    """Adds the panel to `demo`, which is under construction."""
    names = race_panel.shelf.names
    name = names[0] if names else None
    stage_html, opening_run = race_panel.opening(name)
    layout = race_panel.layout(name)
    picked = (opening_run.question, opening_run.gold or "") if opening_run else None
    # First of all, or a page event whose function happens to be called `run` takes the name.
    gr.api(race_panel.run_api, api_name="run", concurrency_limit=None)
    session = gr.State(Session(picked=picked))
    with gr.Row(elem_id="page"):
        with gr.Column(elem_id="ask"):
            question = gr.Textbox(
                value=opening_run.question if opening_run else "",
                label="A word problem",
                placeholder="Ann has 3 apples. Ann buys 4 more apples. How many apples does Ann have now?",
                lines=4,
                max_lines=10,
                elem_id="question",
            )
            with gr.Row(elem_id="run-row"):
                run_button = gr.Button("Run", variant="primary", elem_id="run", scale=2, min_width=80)
                stop_button = gr.Button("Stop", elem_id="stop", interactive=False, scale=1, min_width=80)
            notice = gr.HTML(elem_id="notice", js_on_load=STAGE_JS, apply_default_css=False)
            examples = gr.HTML(
                race_panel.gallery(name), elem_id="examples", js_on_load=STAGE_JS, apply_default_css=False
            )
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
            model = gr.Dropdown(names, value=name, label="Model", elem_id="model", filterable=False)
            model_state = gr.HTML(elem_id="model-state", apply_default_css=False)
        with gr.Column(elem_id="stage-column"):
            stage = gr.HTML(stage_html, elem_id="stage", js_on_load=STAGE_JS, apply_default_css=False)

    run_event: dict[str, Any] = {
        "fn": race_panel.run,
        "inputs": [question, gold, blocks, model, session],
        "outputs": [stage, notice, stop_button, session],
        # The turnstile in `session` queues the runs, and says so in the page.
        "concurrency_limit": None,
        **PRIVATE,
    }
    run_button.click(**run_event).then(forget_gold, [question, gold, session], [gold], **PRIVATE)
    for offering in (examples, notice):
        offering.select(pick, [session], [question, gold, session], **PRIVATE).then(**run_event)
    stop_button.click(race_panel.stop, queue=False, **PRIVATE)
    question.input(forget_gold, [question, gold, session], [gold], trigger_mode="always_last", **PRIVATE)
    stage.select(race_panel.choose_recording, [model, session], [stage, question, gold, session], **PRIVATE)
    model.change(race_panel.choose_model, [model], [stage, examples, blocks], **PRIVATE)
    model.change(race_panel.watch_model, [model], [model_state], concurrency_limit=None, **PRIVATE)
    demo.load(race_panel.watch_model, [model], [model_state], concurrency_limit=None, **PRIVATE)
    demo.unload(race_panel.stop)
