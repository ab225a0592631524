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

from app import api, recorded, shell
from app.models import ModelShelf
from app.panels import inspect, race, tour
from app.panels.race import PRIVATE, SOME
from app.session import Session
from app.view import Looking

HERE = Path(__file__).parent
HEADER = """
<header class="masthead">
  <h1>RiM Probe</h1>
  <p><b class="memory">RiM</b> reads memory blocks and answers; <b class="cot">CoT</b> writes a chain of thought first.
  Ask both, compare answers and time, and look inside the memory.</p>
</header>
"""
PARTED = {"apply_default_css": False}


def build_demo(shelf: ModelShelf, recordings: Path = recorded.FOLDER) -> gr.Blocks:
    """The page over the checkpoints of `shelf`, opening with the runs in the folder `recordings`. Loads no model."""
    asking = race.Race(shelf, recordings)
    looker = inspect.Inspector(asking)
    guide = tour.Tour(asking, looker)
    name = next(iter(shelf.names), None)
    first, looked = Session(), Looking()
    opening, opening_run = asking.opening(name, session=first)
    with gr.Blocks(title="RiM Probe", analytics_enabled=False, delete_cache=(600, 600)) as demo:
        api.register(asking)
        session, looking = gr.State(first), gr.State(looked)
        gr.HTML(HEADER, **PARTED)
        tour_card = gr.HTML(
            tour.INVITATION if guide.offered else "",
            elem_id="tour",
            js_on_load=tour.SCRIPT,
            visible=guide.offered,
            **PARTED,
        )
        with gr.Row(elem_id="page"):
            with gr.Column(elem_id="ask"):
                parts = race.build_ask(asking, name, opening_run)
            with gr.Column(elem_id="stage-column"):
                tabs = gr.HTML(shell.tabs(), elem_id="tabs", js_on_load=inspect.PANEL_JS, **PARTED)
                stage = gr.HTML(opening, elem_id="stage", js_on_load=race.STAGE_JS, **PARTED)
                panel = gr.HTML(
                    looker.panel(first, looked, name), elem_id="panel", js_on_load=inspect.PANEL_JS, **PARTED
                )
                history = gr.HTML(
                    shell.history(first, looked), elem_id="history", js_on_load=inspect.PANEL_JS, **PARTED
                )
                load = gr.UploadButton("Load a saved run (JSON)", file_types=[".json"], elem_id="load-run")
                export = gr.HTML(elem_id="export", js_on_load=inspect.PANEL_JS, **PARTED)
                export_button = gr.Button("Save", elem_id="export-button")

        shown = [panel, history, session, looking]
        after = {"fn": looker.read, "inputs": [session, looking, parts.model], "outputs": shown}
        after |= SOME | PRIVATE
        changed = {"fn": looker.change, "inputs": [session, looking, parts.model], **SOME, **PRIVATE}
        shows = [panel, history, stage, session, looking, parts.question, parts.gold, parts.blocks, parts.model]
        for chooser in (tabs, panel, history):
            chooser.select(outputs=shows, trigger_mode="multiple", **changed)
        export_button.click(looker.export, [session, looking], [export], **PRIVATE)
        loaded = [stage, panel, history, parts.notice, session, looking]
        load.upload(looker.load, [load, session, looking, parts.model], loaded, **PRIVATE)

        named = {"stage": stage, "panel": panel, "history": history, "session": session, "looking": looking}
        named |= {key: getattr(parts, key) for key in ("question", "gold", "blocks", "direct", "model", "examples")}
        named |= {"notice": parts.notice, "stop": parts.stop, "tour": tour_card}
        together = {"outputs": list(named.values()), **SOME, **PRIVATE}
        tour_card.select(_by_name(guide.step, named), [session, looking], **together)
        arrived = demo.load(_by_name(looker.arrive, named), [session, looking, parts.model], **together)
        race.wire(asking, parts, stage, session, demo, after, [arrived])
    return demo


def _by_name(function: Callable[..., Iterator[dict[str, Any]]], parts: dict[str, Any]) -> Callable[..., Any]:
    """An event's function that names the parts it changes, as one that gives Gradio the components."""

    @functools.wraps(function)  # Gradio reads from the signature which function wants the request and the event
    def visit(*given: Any) -> Iterator[dict[Any, Any]]:
        for changes in function(*given):
            found = {parts[name]: value for name, value in changes.items()}
            yield found or {next(iter(parts.values())): gr.skip()}  # Gradio takes an empty one for a mistake

    return visit
