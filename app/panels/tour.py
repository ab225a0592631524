"""The first visit: five steps that run one experiment, on the model trained by interchange and on the paper's.

Every sentence with a figure in it is made from what has just been computed. Drives the same functions as the page's own
buttons (`Race.answer`, `Inspector`, `Hands`). Offered only where both checkpoints are there.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from app import figures
from app.hands import view_of_done
from app.models import VARIANT
from app.panels.inspect import FAILED, Inspector
from app.panels.race import Race
from app.runs import Run
from app.session import Session
from app.view import Looking
from rim_probe.errors import RiMError
from rim_probe.plots.surgery_words import counterfactual_verdict, outcome_said
from rim_probe.probing.matches import decodes, spelled, thought
from rim_probe.problems import Problem

log = logging.getLogger(__name__)

SCRIPT = (Path(__file__).parent.parent / "tour.js").read_text(encoding="utf-8")
TRAINED = "rim-tiny"
TITLES = (
    "Two ways to think",
    "What a block seems to hold",
    "A prediction",
    "The experiment",
    "The same, trained the paper’s way",
)
POINTS = (  # at what each step speaks of
    "#stage .lanes",
    "#panel [data-link~='block-{block}']",
    "#panel .surgery-prediction",
    "#panel .surgery-result",
    "#panel .surgery-sides > :last-child",
)
START = '<button type="button" data-step="1" hidden></button>'  # the masthead's link presses it


@dataclass
class Tour:
    """What the tour needs of the page."""

    race: Race
    inspector: Inspector

    @property
    def offered(self) -> bool:
        return {TRAINED, f"{TRAINED}-{VARIANT}"} <= set(self.race.shelf.names)

    def step(self, session: Session, looking: Looking, event: gr.EventData) -> Iterator[dict[str, Any]]:
        """One step of the tour; yields what changes on the page, by the names of its parts."""
        wanted = str(event._data.get("step", "")) if isinstance(event._data, dict) else ""
        if wanted not in [str(number) for number in range(1, len(TITLES) + 1)]:
            yield {"tour": START}
            return
        number, over = int(wanted), {"notice": "", "stop": gr.Button(interactive=False)}
        yield {"tour": _card(number, "…", busy=True)}
        try:
            yield from self._step(number, session, looking)
        except RiMError as error:
            yield {"tour": _card(number, escape(str(error)), failed=True), **over}
        except Exception:  # whatever a model can raise, a visitor gets a sentence and the log gets the rest
            log.exception("step %s of the tour failed", number)
            yield {"tour": _card(number, FAILED, failed=True), **over}

    def _step(self, number: int, session: Session, looking: Looking) -> Iterator[dict[str, Any]]:
        run = session.run
        if number == 1 or run is None or run.checkpoint != TRAINED or run.reading is None:
            looking.open("race")
            yield from self.inspector.ask(self._problem(TRAINED), TRAINED, session, looking)
            run = session.run
        hands = self.inspector.hands
        if number >= 2 and run.predicted is None:
            hands.write_down(run, "")
        if number <= 3:  # the experiment itself is step 4: until then only its prediction is on the page
            run.surgery = run.counterfactual = None
        elif number == 4 or run.counterfactual is None:
            hands.try_it(run)
        if number == 5:
            hands.try_beside(run)
        looking.views["surgery"] = view_of_done(run)
        looking.open(("race", "blocks", "surgery", "surgery", "surgery")[number - 1])
        text = (_two_ways, _claim, _prediction, _outcome, _paper)[number - 1](run)
        block = run.predicted["blocks"][0] if run.predicted else 0
        yield self.inspector.everything(session, looking, TRAINED) | {"tour": _card(number, text, block)}

    def _problem(self, name: str) -> Problem:
        """The checkpoint's first example of the greatest depth.

        Raises:
            RiMError: it brings none.
        """
        examples = self.race.shelf.examples(name)
        if not examples:
            raise RiMError(f"The checkpoint {name} brings no examples, so there is nothing to show.")
        return max(examples, key=lambda problem: len(problem.steps))


# ----------------------------------------------------------------------------------------------------- what each says


def _two_ways(run: Run) -> str:
    return (
        "Both were asked the same question and took real time. <b>Chain of thought</b> wrote its steps down. "
        f"<b>RiM</b> wrote nothing: it read {figures.count(run.num_blocks, 'memory block')} after the question and "
        "answered. (Each cell shows what a block would answer by itself: an early one is on the way.) Does it think in "
        "there?"
    )


def _claim(run: Run) -> str:
    (block, *_), step = run.predicted["blocks"], spelled(run.predicted["claimed"])
    read = decodes(run.reading).get(block)
    told = next(one for one in run.reading["readouts"] if one["block"] == block)
    seen = (
        f"A probe compares each block with explicit steps. Block {block} lies nearest to "
        f"<b>{escape(spelled(read.nearest[0][0]))}</b> (cosine {read.nearest[0][1]:.2f})."
        if read
        else f"Asked now, block {block} would say <b>{escape(thought(told) or 'nothing')}</b>."
    )
    return (
        f"{seen} Step {run.predicted['step']} of the solution is <b>{escape(step)}</b>: block {block} is where the "
        "model should keep it. That is a <b>claim</b>: to find something in a block does not show that the model uses "
        "it. How could one tell?"
    )


def _prediction(run: Run) -> str:
    shown = run.predicted
    return (
        f"Change one number of the question ({escape(shown['change'])}): then the block should hold "
        f"<b>{escape(spelled(shown['brought']))}</b> instead of <b>{escape(spelled(shown['claimed']))}</b>. "
        f"If the claim is true, then putting <i>that one block</i> into the old question must turn its answer "
        f"{escape(shown['own'])} into exactly <b>{escape(shown['expected'])}</b>. Nothing else is touched."
    )


def _outcome(run: Run) -> str:
    shown = run.counterfactual
    control = shown["control"]
    beside = f" The control, {escape(control['what'])}, gives {escape(str(control['said']))}." if control else ""
    return (
        f"The block was taken from the second question, and the model answered again: predicted "
        f"{escape(shown['expected'])}, and it says <b>{escape(str(shown['said']) or 'nothing')}</b>.{beside} "
        f"{escape(counterfactual_verdict(shown)[0])}"
    )


def _paper(run: Run) -> str:
    beside = run.counterfactual["beside"]
    start = f"<b>{escape(beside['checkpoint'])}</b> is the same model, trained on the same problems as in the paper. "
    if (found := beside["found"]) is None:
        told = f"Here the experiment cannot be made: {escape(beside['why'])} "
    else:
        memory = next(route for route in found["routes"] if route["cut"] == "memory")
        told = (
            f"The same experiment: predicted {escape(found['expected'])}, and it says "
            f"<b>{escape(str(found['said']) or 'nothing')}</b>. {escape(counterfactual_verdict(found)[0])} With its "
            f"whole memory cut from the answer it says {escape(outcome_said(found, memory['clean']))}. "
        )
    return (
        f"{start}{told}One trial proves little: <b>Evidence</b> has the test over many pairs. Now it is your turn: ask "
        "your own question and press “Test it on this question”."
    )


def _card(number: int, text: str, block: int = 0, busy: bool = False, failed: bool = False) -> str:
    last = number == len(TITLES)
    forward = str(number) if failed else "close" if last else str(number + 1)
    label = "Try again" if failed else "Finish" if last else "Run the experiment" if number == 3 else "Next"
    point = POINTS[number - 1].format(block=block)
    card = {"number": number, "of": len(TITLES), "title": TITLES[number - 1], "text": text, "point": point}
    return figures.render("tour.html", **card, forward=forward, label=label, busy=busy)
