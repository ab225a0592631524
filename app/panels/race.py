"""The race panel: ask one question, watch memory, chain of thought and (if wanted) the direct answer race.

Builds its components and wires them to `app.session.race`: `Race.ask` makes a run, which then waits for its turn in
Gradio's queue and is answered by `Race.run`. Drawing is `app.figures`' job, loading models `app.models`'.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from app import figures, recorded
from app.models import Loaded, ModelShelf
from app.runs import METHODS, RACERS, Lane, Run
from app.session import MAX_BLOCKS, Session, check_asked, check_blocks, check_gold, check_question, race
from rim_probe.errors import RiMError, UnknownWordsError
from rim_probe.memory import MemoryLayout
from rim_probe.plots.frame import script
from rim_probe.trained_on import outside

STAGE_JS = script() + (Path(__file__).parent.parent / "stage.js").read_text(encoding="utf-8")
PRIVATE: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
# Gradio's queue lets one race through at a time. Everything else that uses a model waits for it in a thread; so that
# those who wait leave threads to those whose turn it is, no more than these do at the same time.
ONE_RACE: dict[str, Any] = {"concurrency_id": "race", "concurrency_limit": 1}
SOME: dict[str, Any] = {"concurrency_limit": 8}


@dataclass
class Race:
    """What all visitors share: the models, and the runs that are shown before one is loaded."""

    shelf: ModelShelf
    recordings: Path = recorded.FOLDER

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
            recorded_outcomes = recorded.outcomes(name, self.recordings) if name in self.shelf.names else None
        except RiMError as error:
            complaint = figures.notice(str(error))
        return figures.gallery(examples, recorded_outcomes) + complaint

    def gold_steps(self, name: str | None, question: str) -> tuple[str, ...]:
        """The gold steps of a question that is offered as an example; none of any other."""
        try:
            known = self.shelf.examples(name)
            found = recorded.outcomes(name, self.recordings)
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
            steps: gold steps; where they are left out, those of the example that asks the same question, if any.
            methods: of `METHODS`; "direct" is left out where the checkpoint has no model of its own for it.
            progress: shows how far a model is that has to be loaded first.

        Raises:
            RiMError: bad input, or a model that cannot be loaded or asked.
        """
        question, gold = check_question(question), check_gold(gold)
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
    ) -> Iterator[list[Any]]:
        """The Run button: puts a run into `session.asked`, from where `run` takes it; yields
        [notice, stop button, model state]."""
        if is_stale(question, gold, session):  # a pasted question: the page clears the field after the run
            gold = ""
        session.asked, sentence, state = None, "", gr.skip()
        waits = not self.shelf.is_ready(name)  # the line under the picker may still say that the last attempt failed
        yield ["", gr.Button(interactive=True), state]
        try:
            methods, known = METHODS if direct else RACERS, session.steps_for(question)
            session.asked = self.prepare(
                question, num_blocks, gold, name, steps=known, methods=methods, progress=progress
            )
            state = self.state(self.shelf.load(name)) if waits else state
        except RiMError as error:
            sentence = self.explain(error, name, question)
        yield [sentence, gr.Button(interactive=not sentence), state]

    def run(self, session: Session) -> Iterator[list[Any]]:
        """When it is this run's turn in the queue: yields [stage, notice, stop button, session]."""
        run, session.asked = session.asked, None
        if run is None:  # refused, stopped, or another one was asked since
            yield [gr.skip()] * 4
            return
        session.add(run)
        sentence: Any = gr.skip()
        try:
            for _ in self.answer(run):
                yield [figures.stage(run), "", gr.skip(), gr.skip()]
        except RiMError as error:
            sentence = self.explain(error, run.checkpoint, run.question)
        yield [figures.stage(run), sentence, gr.Button(interactive=False), session]

    def stop(self, session: Session) -> list[Any]:
        """The Stop button, which ends the events of a race: [stage, notice, stop button]."""
        session.asked, run = None, session.run
        if run is None or run.status not in ("running", "stopped"):  # Gradio may have closed it already
            return [gr.skip(), "", gr.Button(interactive=False)]
        run.status = "stopped"
        return [figures.stage(run), "", gr.Button(interactive=False)]

    def watch_model(
        self,
        name: str | None,
        session: Session,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> Iterator[str]:
        """Loads the model; the line under its picker, until it is ready or has failed, or another one is picked."""
        session.watched = name
        try:
            loaded = self.shelf.load(name, tell=_teller(name, progress))
            said = loaded.note
            yield self.state(loaded) if session.watched == name else gr.skip()
            self.shelf.load(name, readable=True)  # a race can begin meanwhile
            if loaded.note != said and session.watched == name:
                yield self.state(loaded)
        except RiMError as error:
            yield figures.model_state(str(error), "failed") if session.watched == name else gr.skip()

    def state(self, loaded: Loaded) -> str:
        return figures.model_state(f"Ready: {loaded.machine}. {loaded.note}".strip(), "ready")

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


def _teller(name: str | None, progress: gr.Progress | None) -> Callable[[tuple | None], object]:
    """Shows how far a model is by Gradio's own bar."""

    def tell(stage: tuple[str, int, int | None] | None) -> None:
        if progress is not None and stage is None:
            progress(None, desc=f"Loading {name} …")
        elif progress is not None:
            what, done, total = stage
            progress((round(done / 1e6, 1), total and round(total / 1e6, 1)), desc=what, unit="MB")

    return tell


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


def wire(
    race_panel: Race,
    parts: Parts,
    stage: gr.HTML,
    session: gr.State,
    demo: gr.Blocks,
    after: dict,
    others: Sequence[Any],
) -> None:
    """Connects the components.

    Args:
        after: the event that follows whatever changes the shown run.
        others: events that hold races, too, and end with them.
    """
    ask: dict[str, Any] = {
        "fn": race_panel.ask,
        "inputs": [parts.question, parts.gold, parts.blocks, parts.model, session, parts.direct],
        "outputs": [parts.notice, parts.stop, parts.model_state],
        "show_progress_on": parts.notice,
        "trigger_mode": "multiple",
        **PRIVATE,
        **SOME,
        "show_progress": "full",
    }
    run: dict[str, Any] = {
        "fn": race_panel.run,
        "inputs": [session],
        "outputs": [stage, parts.notice, parts.stop, session],
        "trigger_mode": "multiple",
        "show_progress_on": parts.notice,
        **PRIVATE,
        **ONE_RACE,
        "show_progress": "minimal",  # the place in the queue
    }
    fields = [parts.question, parts.gold, session]
    asked = [parts.run.click(**ask)]
    for offering in (parts.examples, parts.notice):
        asked.append(offering.select(pick, [session], fields, **PRIVATE).then(**ask))
    races = [event.then(**run) for event in asked]
    races[0].then(forget_gold, fields, [parts.gold], **PRIVATE).then(**after)
    for event in races[1:]:
        event.then(**after)
    for trigger in (parts.run.click, parts.examples.select, parts.notice.select):  # one race for each visitor
        trigger(None, cancels=[*races, *others])
    parts.stop.click(None, cancels=[*asked, *races, *others])  # first, so that nothing comes after what `stop` draws
    stopping = parts.stop.click(race_panel.stop, [session], [stage, parts.notice, parts.stop], queue=False, **PRIVATE)
    stopping.then(**after)
    parts.question.input(forget_gold, fields, [parts.gold], trigger_mode="always_last", **PRIVATE)
    stage.select(race_panel.choose_recording, [parts.model, session], [stage, *fields], **PRIVATE).then(**after)
    shown = [stage, parts.examples, parts.blocks, parts.direct, session, parts.question, parts.gold]
    # `input`, not `change`: the page sets the model itself where a link or the tour names another one.
    asked = [parts.model, parts.question, session]
    parts.model.input(race_panel.choose_model, asked, shown, **PRIVATE).then(**after)
    watched = {"fn": race_panel.watch_model, "inputs": [parts.model, session], "outputs": [parts.model_state]}
    watched |= PRIVATE | SOME | {"show_progress": "full"}
    parts.model.change(trigger_mode="multiple", **watched)
    parts.model_state.select(**watched)
    demo.load(**watched)
