"""Assembles the panels into one page.

Knows Gradio's page and which part of it an event changes. Does not know what is in a panel, nor how the page is served
(`app.serving`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from app import api, figures, recorded, shell
from app.models import ModelShelf
from app.panels import inspect, race, tour
from app.panels.race import ONE_RACE, PRIVATE, SOME
from app.session import Session
from app.view import Looking

PARTED = {"apply_default_css": False}


def build_demo(shelf: ModelShelf, recordings: Path = recorded.FOLDER, own_machine: bool = False) -> gr.Blocks:
    """The page over the checkpoints of `shelf`, opening with the runs in the folder `recordings`. Loads no model.

    Args:
        own_machine: the page is served to this machine alone, so its visitor may name folders.
    """
    asking = race.Race(shelf, recordings, own_machine)
    looker = inspect.Inspector(asking)
    guide = tour.Tour(asking, looker)
    name = shelf.greeting
    first, looked = Session(), Looking()
    opening, opening_run = asking.opening(name, session=first)
    if opening_run is None:
        first.picked = asking.first_example(name)
    panel_html: dict[str, Any] = {"js_on_load": inspect.PANEL_JS, **PARTED}
    with gr.Blocks(title="RiM Probe", analytics_enabled=False, delete_cache=(600, 600)) as demo:
        api.register(asking)
        session, looking = gr.State(first), gr.State(looked)
        gr.HTML(shell.masthead(), **PARTED)
        tour_card = gr.HTML(tour.START, elem_id="tour", js_on_load=tour.SCRIPT, visible=guide.offered, **PARTED)
        with gr.Row(elem_id="page"):
            with gr.Column(elem_id="ask"):
                parts = race.build_ask(first.picked)
            with gr.Column(elem_id="stage-column"):
                headline = gr.HTML(figures.headline(opening_run), elem_id="headline", **PARTED)
                tabs = gr.HTML(shell.tabs(), elem_id="tabs", **panel_html)
                stage = gr.HTML(opening, elem_id="stage", js_on_load=race.STAGE_JS, **PARTED)
                panel = gr.HTML(looker.panel(first, looked, name), elem_id="panel", **panel_html)
                think = gr.HTML(figures.render("think.html"), elem_id="think", **panel_html)
                history = gr.HTML(shell.history(first, looked), elem_id="history", **panel_html)
                load = gr.UploadButton("Load a saved run (JSON)", file_types=[".json"], elem_id="load-run")
                export = gr.HTML(elem_id="export", **panel_html)
                export_button = gr.Button("Save", elem_id="export-button")
            with gr.Column(elem_id="more"):
                settings = race.build_settings(asking, name, first.picked)

        named = {"stage": stage, "headline": headline, "panel": panel, "think": think, "history": history}
        named |= (
            {"session": session, "looking": looking, "tour": tour_card, "load": load} | vars(parts) | vars(settings)
        )

        def on(
            function: Callable[..., Iterator[race.Changes]], given: str, changes: str, **options: Any
        ) -> dict[str, Any]:
            """An event of the page: what it is given and what it may change, by the names of parts."""
            inputs, outputs = ([named[name] for name in names.split()] for names in (given, changes))
            visit = _by_name(function, dict(zip(changes.split(), outputs, strict=True)))
            return {"fn": visit, "inputs": inputs, "outputs": outputs} | PRIVATE | options

        everything = " ".join(name for name in named if name != "load")
        boxes, shown = "question gold blocks direct model examples", "stage headline session"
        looked_at = "panel history session looking"

        # Asking: a run is made, waits for its turn, is answered, its memory is read, and its time is measured again.
        progress = {"show_progress": "full", "show_progress_on": parts.notice, "trigger_mode": "multiple"}
        ask = on(asking.ask, "question gold blocks model session direct", "notice stop model_state", **progress, **SOME)
        run = on(asking.run, "session", f"{shown} notice stop", **progress, **ONE_RACE)
        run["show_progress"] = "minimal"  # the place in the queue
        read = on(looker.read, "session looking model", f"{looked_at} stage", **SOME)
        measure = on(asking.measure, "session", "headline", **SOME)
        forget = {"fn": race.forget_gold, "outputs": [settings.gold], **PRIVATE}
        forget["inputs"] = [parts.question, settings.gold, session]

        picked = settings.examples.select(**on(asking.pick, "examples model session", "question gold session notice"))
        followed = parts.notice.select(**on(asking.follow, "session", f"{boxes} session notice"))
        asked = [parts.run.click(**ask), picked.then(**ask), followed.then(**ask)]
        races = [event.then(**run) for event in asked]
        measured = [event.then(**read).then(**measure) for event in races]
        races[0].then(**forget)
        arrived = demo.load(**on(looker.arrive, "session looking model", everything, **SOME))
        toured = tour_card.select(**on(guide.step, "session looking", everything, **SOME))
        long = [*races, *measured, arrived, toured]
        for trigger in (parts.run.click, settings.examples.select, parts.notice.select):  # one race for each visitor
            trigger(None, cancels=long)
        parts.stop.click(None, cancels=[*asked, *long])  # first, so that nothing comes after what `stop` draws
        parts.stop.click(**on(asking.stop, "session", "stage headline notice stop", queue=False)).then(**read)
        parts.question.input(**forget, trigger_mode="always_last")

        # Looking.
        changed = on(
            looker.change, "session looking model", f"{looked_at} stage headline question gold blocks model", **SOME
        )
        changed["trigger_mode"] = "multiple"
        for chooser in (tabs, panel, history, think):
            chooser.select(**changed)
        stage.select(**on(asking.choose_recording, "model session", f"{shown} question gold")).then(**read)
        export_button.click(looker.export, [session, looking], [export], **PRIVATE)
        load.upload(**on(looker.load, "load session looking model", f"{looked_at} stage headline notice stop"))

        # The model. `input`, not `change`: the page sets it itself where a link or the tour names another one.
        settings.model.input(**on(asking.choose_model, "model question session", f"{boxes} {shown}")).then(**read)
        watched = on(asking.watch_model, "model session", "model_state", **SOME)
        watched |= {"show_progress": "full", "show_progress_on": settings.model_state}
        settings.model.change(**watched, trigger_mode="multiple")
        for trigger in (
            demo.load,
            settings.model.change,
        ):  # it takes what loading a model takes to import, so not before
            trigger(looker.think, [settings.model], [think], **PRIVATE)
        settings.model_state.select(**on(asking.follow, "session", f"{boxes} session notice")).then(**watched)
        demo.load(**watched)
        bring = on(asking.bring, "own", f"{boxes} own_state") | {
            "show_progress": "full",
            "show_progress_on": settings.own_state,
        }
        for trigger in (settings.bring.click, settings.own.submit):
            trigger(**bring, **SOME)
        settings.blocks.release(
            lambda k: figures.notice(f"Press Run to ask with K = {k}.", warning=True),
            [settings.blocks],
            [parts.notice],
            **PRIVATE,
        )
    return demo


def _by_name(function: Callable[..., Iterator[dict[str, Any]]], parts: dict[str, Any]) -> Callable[..., Any]:
    """An event's function that names the parts it changes, as one that gives Gradio the components."""

    @functools.wraps(function)  # Gradio reads from the signature which function wants the request and the event
    def visit(*given: Any) -> Iterator[dict[Any, Any]]:
        for changes in function(*given):
            found = {parts[name]: value for name, value in changes.items()}
            yield found or {next(iter(parts.values())): gr.skip()}  # Gradio takes an empty one for a mistake

    return visit
