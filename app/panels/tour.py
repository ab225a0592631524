"""The first visit: five steps that run one experiment, on a model whose memory is known and on one that was trained.

Every sentence with a figure in it is made from what has just been computed. Drives the same functions as the page's own
buttons (`Race.answer`, `Inspector`). Offered only where both checkpoints are there.
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
from app.panels.inspect import FAILED, Inspector
from app.panels.race import Race
from app.runs import Run
from app.session import Session
from app.view import Looking
from rim_probe.errors import RiMError
from rim_probe.plots.surgery_words import counterfactual_verdict, named
from rim_probe.probing.matches import spelled
from rim_probe.problems import Problem

log = logging.getLogger(__name__)

SCRIPT = (Path(__file__).parent.parent / "tour.js").read_text(encoding="utf-8")
KNOWN, TRAINED = "glass-box", "rim-tiny"
TITLES = (
    "Two ways to think",
    "What block 2 seems to hold",
    "A prediction",
    "The experiment",
    "The same on a trained model",
)
POINTS = (  # at what each step speaks of
    "#stage .lanes",
    "#panel [data-link~='block-2']",
    "#panel .surgery-part:has([data-do*='try_counterfactual'])",
    "#panel .surgery-result",
    "#panel .surgery-result",
)
START = '<button type="button" data-step="1" hidden></button>'  # the masthead's link presses it


@dataclass
class Tour:
    """What the tour needs of the page."""

    race: Race
    inspector: Inspector

    @property
    def offered(self) -> bool:
        return {KNOWN, TRAINED} <= set(self.race.shelf.names)

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
        name = TRAINED if number == len(TITLES) else KNOWN
        run = session.run
        if number == 1 or run is None or run.checkpoint != name or run.reading is None:
            looking.open("race")
            yield from self.inspector.ask(self._problem(name), name, session, looking)
            run = session.run
        if number >= 3 and (run.counterfactual is None or number == len(TITLES)):
            self.inspector.hands.test_claim(run, "2" if number < len(TITLES) else "")
            looking.views["surgery"] = view_of_done(run)
        shown = run.counterfactual
        if number == 3:  # the experiment itself is step 4: until then only its prediction is on the page
            run.surgery = run.counterfactual = None
            looking.views.pop("surgery", None)
        looking.open(("race", "blocks", "surgery", "surgery", "surgery")[number - 1])
        text = (_two_ways, _claim, _prediction, _outcome, _trained)[number - 1](run, shown)
        yield self.inspector.everything(session, looking, name) | {"tour": _card(number, text)}

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


def _two_ways(run: Run, shown: Any) -> str:
    return (
        f"Both were asked the same question and took real time. <b>CoT</b> wrote its steps down. <b>RiM</b> wrote "
        f"nothing: it read {figures.count(run.num_blocks, 'memory block')} after the question and answered. "
        "(Each cell shows what a block would answer by itself: an early one is on the way.) What did it think there? "
        "This model, the <i>glass box</i>, has weights written by hand, so we know: block k holds step k."
    )


def _claim(run: Run, shown: Any) -> str:
    blocks = {block["block"]: block for block in (run.reading or {})["probes"].get("steps", {"blocks": []})["blocks"]}
    if 2 not in blocks:
        raise RiMError("The nearest steps of this checkpoint are not fitted, so there is no claim to test.")
    best = blocks[2]["nearest"][0]
    return (
        "A probe compares each block with explicit steps. Block 2 lies nearest to "
        f"<b>{escape(spelled(best['step']))}</b> (cosine {best['cosine']:.2f}). That is a <b>claim</b>: to find "
        "something in a block does not show that the model uses it. How could one tell?"
    )


def _prediction(run: Run, shown: Any) -> str:
    return (
        f"Change one number of the question ({escape(shown['change'])}): then block 2 should hold "
        f"<b>{escape(spelled(shown['brought']))}</b> instead of <b>{escape(spelled(shown['claimed']))}</b>. "
        f"If the claim is true, then putting <i>that one block</i> into the old question must turn its answer "
        f"{escape(shown['own'])} into exactly <b>{escape(shown['expected'])}</b>. Nothing else is touched."
    )


def _outcome(run: Run, shown: Any) -> str:
    control = shown.get("control")
    beside = f" The control, {escape(control['what'])}, gives {escape(str(control['said']))}." if control else ""
    return (
        "Block 2 was taken from the second question, and the model answered again: predicted "
        f"{escape(shown['expected'])}, and it says <b>{escape(str(shown['said']) or 'nothing')}</b>.{beside} "
        f"{escape(counterfactual_verdict(shown)[0])}"
    )


def _trained(run: Run, shown: Any) -> str:
    blocks = shown["blocks"]
    control = shown.get("control")
    beside = f" (control: {escape(str(control['said']))})" if control else ""
    return (
        f"<b>{TRAINED}</b> learnt its weights. Its {named(blocks)} {'lies' if len(blocks) == 1 else 'lie'} nearest to "
        f"a step of its question, too: <b>{escape(spelled(shown['claimed']))}</b>. The same experiment: expected "
        f"{escape(shown['expected'])}, and it says <b>{escape(str(shown['said']) or 'nothing')}</b>{beside}. "
        f"{escape(counterfactual_verdict(shown)[0])} One trial proves little; <b>Evidence</b> has the test over many "
        "pairs. Now it is your turn: ask your own question, blank a block, and see what happens."
    )


def _card(number: int, text: str, busy: bool = False, failed: bool = False) -> str:
    last = number == len(TITLES)
    forward = str(number) if failed else "close" if last else str(number + 1)
    label = "Try again" if failed else "Finish" if last else "Run the experiment" if number == 3 else "Next"
    card = {"number": number, "of": len(TITLES), "title": TITLES[number - 1], "text": text, "point": POINTS[number - 1]}
    return figures.render("tour.html", **card, forward=forward, label=label, busy=busy)
