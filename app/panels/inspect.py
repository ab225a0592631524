"""The panels that look inside: tabs, the open panel, what is done by hand in it, history, comparison, files, addresses.

Wires the page to `app.hands` (what is computed) and `rim_probe.plots` (how it is drawn). A run's reading is computed
once, after its race; every panel is drawn from it, so switching computes nothing.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import gradio as gr

from app import code, figures, files, shell
from app.hands import LETTERS, Hands, view_of_done
from app.models import CHECKPOINTS, VARIANT
from app.panels.race import Changes, Race
from app.runs import METHODS, RACERS, Run
from app.session import MAX_BLOCKS, Session, check_blocks
from app.view import Address, Looking, is_of, query
from rim_probe.errors import RiMError
from rim_probe.plots import draw, view_of
from rim_probe.plots.frame import script
from rim_probe.plots.surgery import parse, write
from rim_probe.problems import Problem

log = logging.getLogger(__name__)

PANEL_JS = script() + (Path(__file__).parent.parent / "panel.js").read_text(encoding="utf-8")
NO_RUN = "Ask a question first, or pick an example: this panel then shows what the model's memory holds for it."
FAILED = "This did not work; the server's log has the details."
UNREAD = {  # what a panel says of a run without a reading, by the run's status
    "stopped": "This race was stopped before its end, so its memory was not read; press Run to ask again.",
    "loaded": "This file holds the race alone and not what was read in memory; press Run to ask its question again.",
}


class Inspector:
    """What all visitors share: the checkpoints and the race that makes the runs."""

    def __init__(self, race: Race):
        self.race, self.hands = race, Hands(race.shelf)

    # -------------------------------------------------------------------------------------------------------- drawing

    def panel(self, session: Session, looking: Looking, name: str | None, sentence: str = "") -> str:
        """The open panel as HTML. The address that brings it back goes along as an attribute."""
        run = session.run
        if not any(looking.compared is other for other in session.runs) or looking.compared is run:
            looking.compared = None  # it has fallen out of the history, or has taken the place of the other one
        notice = figures.notice(sentence) if sentence else ""
        try:
            body = notice + self._body(run, looking, name)
        except RiMError as error:
            body = notice + figures.notice(str(error))
        except Exception:  # a picture that fails must not take the page with it
            log.exception("drawing %s failed", looking.panel)
            body = notice + figures.notice("This panel could not be drawn; the server's log has the details.")
        beside = looking.compared is not None and looking.panel not in ("race", "evidence")
        return shell.panel(looking.panel, body, query(run, looking, name, session.recorded), run, beside)

    def stage(self, session: Session, looking: Looking) -> str:
        """The race of the run that is shown, beside that of the one it is compared with."""
        run, other = session.run, looking.compared
        if run is None or other is None or other is run:
            return figures.stage(run, session.recorded is not None)
        both = [(run, "", figures.stage(run, session.recorded is not None)), (other, "", figures.stage(other))]
        return shell.side_by_side(both)

    def think(self, name: str | None) -> str:
        """Whether the answers of a checkpoint are made from what is decoded of its memory, as far as was tested."""
        both = [one for one in (name, f"{name}-{VARIANT}") if one in self.race.shelf.names]
        tests = [(one, self.race.shelf.interchange(one)) for one in both]
        found = [("Trained the paper’s way" if one != name else "", *told) for one, told in tests if told]
        return figures.render("think.html", tests=found)

    def _body(self, run: Run | None, looking: Looking, name: str | None) -> str:
        if looking.panel == "race":
            return ""
        other = looking.compared
        if looking.panel == "evidence":
            names = dict.fromkeys([name, *([other.checkpoint] if other is not None else [])])
            return shell.side_by_side([(None, one or "", self._evidence(one)) for one in names])
        if run is None:
            return figures.notice(NO_RUN)
        if run.reading is None:
            if looking.unread is not None and looking.unread[0] is run:
                return figures.notice(looking.unread[1])
            if run.status in UNREAD:
                return figures.notice(UNREAD[run.status])
            return shell.pending("Reading the memory blocks …" if run.status == "done" else "The race is still on …")
        pictures = [(run, "", self._picture(run, looking.panel, looking.view))]
        if other is not None and other.reading is not None:
            view = looking.view if looking.panel != "surgery" else view_of_done(other)  # to each its own operation
            pictures.append((other, "", self._picture(other, looking.panel, view)))
        return shell.side_by_side(pictures)

    def _picture(self, run: Run, panel: str, view: Mapping[str, str]) -> str:
        picture = draw(run.drawable(), panel, **view_of(run.drawable(), panel, view))
        return picture.html(code.python(run, panel, picture.view, self._place(run.checkpoint)))

    def _place(self, name: str) -> str:
        """What a researcher would load: a path from the repository's folder, or a Hub id; no other folder is told."""
        if name not in self.race.shelf.names:  # of a run from a file
            return name
        path = self.race.shelf.path(name)
        if Path(path).is_relative_to(CHECKPOINTS):
            return str(Path(path).relative_to(CHECKPOINTS.parent))
        return name if Path(path).is_dir() else path

    def _evidence(self, name: str | None) -> str:
        from rim_probe.plots.evidence import draw_evidence

        picture = draw_evidence(self.race.shelf.evidence(name))
        return picture.html(code.evidence(self._place(name or "")))

    # --------------------------------------------------------------------------------------------------------- asking

    def ask(
        self,
        problem: Problem,
        name: str,
        session: Session,
        looking: Looking,
        num_blocks: int | None = None,
        direct: bool = False,
        seed: int = 0,
    ) -> Iterator[Changes]:
        """Runs a race that the page itself starts, reads the memory, and yields what changes, by the names of parts.

        Raises:
            RiMError: as `Race.prepare`; the memory cannot be read; what the view of Surgery says cannot be done.
        """
        layout = self.race.layout(name)
        blocks = layout.num_blocks if num_blocks is None else num_blocks
        check_blocks(blocks, max(MAX_BLOCKS, layout.num_blocks))
        yield {"question": problem.question, "gold": problem.answer, "model": name} | self.race.chosen(
            name, blocks, direct
        )
        session.picked = (problem.question, problem.answer, tuple(problem.steps))
        if not self.race.shelf.is_ready(name):
            words = f"Loading {name} first; the question starts by itself."
            yield {"notice": figures.model_state(words, "loading"), "stop": gr.Button(visible=True)}
        methods = METHODS if direct else RACERS
        run = self.race.prepare(problem.question, blocks, problem.answer, name, steps=problem.steps, methods=methods)
        run.seed = seed
        session.add(run)
        for _ in self.race.answer(run):
            yield self.race.shown(run) | {"notice": self.race.warn(name, run.question), "stop": gr.Button(visible=True)}
        self.read_memory(run, looking)
        self._redo(run, looking)
        yield self.everything(session, looking, name)

    def _redo(self, run: Run, looking: Looking) -> None:
        """Does to a run what the view of Surgery says, where that is the open panel."""
        if looking.panel != "surgery":
            return
        wanted = dict(looking.view)
        if wanted.get("try"):
            self.hands.test_claim(run, wanted["try"])
        done = view_of_done(run)
        looking.views["surgery"] = done | wanted
        if wanted.get("ops") and any(done.get(key, "") != wanted.get(key, "") for key in ("ops", "layers", "partner")):
            self.hands.operate(run, looking.view)

    def arrive(self, session: Session, looking: Looking, model: str | None, request: gr.Request) -> Iterator[Changes]:
        """A visitor comes, perhaps by a shared link: does again what the link says. Yields what changes."""
        address = Address.read(dict(request.query_params))
        if not any(address.asked) and address.recorded is None and address.looking.panel == "race":
            name = self.race.shelf.greeting  # another one than the page was built with, where that cannot be loaded
            yield from self._opening(name, None, session) if name != model else [{}]
            return
        name = address.model if address.model in self.race.shelf.names else model
        looking.panel, looking.views = address.looking.panel, address.looking.views
        notice = ""
        if address.model and name != address.model:
            sentence = f"The link asks for the model {address.model[:60]!r}, which is not here"
            notice = figures.notice(sentence + (f"; this is {name}." if name else "."))
        try:
            if address.compared is not None:
                yield from self._beside(address.compared, name, session, looking)
            if address.question:
                problem = Problem(address.question, address.steps, address.gold)
                options = (address.blocks, address.direct, address.seed)
                yield from self.ask(problem, name, session, looking, *options)
            else:
                if name != model or address.recorded is not None:
                    yield from self._opening(name, address.recorded, session)
                if session.run is not None:
                    self._redo(session.run, looking)
        except RiMError as error:
            notice += self.race.explain(error, name, address.question)
        except Exception:
            log.exception("arriving by %s failed", request.query_params)
            notice += figures.notice(FAILED)
        yield self.everything(session, looking, name) | {"notice": notice}

    def _opening(self, name: str | None, recorded: int | None, session: Session) -> Iterator[Changes]:
        """The recorded run of a link, with the checkpoint it is of."""
        stage, run = self.race.opening(name, recorded, session)
        yield {"stage": stage, "headline": figures.headline(run), "model": name, "session": session} | self.race.chosen(
            name
        )
        if run is not None:
            yield {"question": run.question, "gold": run.gold or ""}

    def _beside(self, address: Address, name: str, session: Session, looking: Looking) -> Iterator[Changes]:
        """The run that a link lays beside its own one."""
        name = address.model if address.model in self.race.shelf.names else name
        problem, race_alone = Problem(address.question, address.steps, address.gold), Looking()
        options = (address.blocks, address.direct, address.seed)
        for changes in self.ask(problem, name, session, race_alone, *options):
            yield {key: value for key, value in changes.items() if key in ("stage", "headline", "notice", "stop")}
        looking.compared = session.run

    def everything(self, session: Session, looking: Looking, name: str | None) -> Changes:
        """All that shows a run."""
        shown = {} if session.run is None or session.recorded is not None else self._shown(session, looking)
        return shown | {
            "panel": self.panel(session, looking, name),
            "history": shell.history(session, looking),
            "notice": "",
            "stop": gr.Button(visible=False),
            "session": session,
            "looking": looking,
        }

    def _shown(self, session: Session, looking: Looking) -> Changes:
        return {"stage": self.stage(session, looking), "headline": figures.headline(session.run)}

    # -------------------------------------------------------------------------------------------------------- reading

    def read(self, session: Session, looking: Looking, name: str | None) -> Iterator[Changes]:
        """After a race: computes the reading."""
        run = session.run
        if run is not None and run.reading is None and run.status == "done":
            looking.views.pop("surgery", None)  # what was done to another question's memory
            yield {"panel": self.panel(session, looking, name), "history": shell.history(session, looking)}
            with contextlib.suppress(RiMError):  # the panel says it
                self.read_memory(run, looking)
        compared = {"stage": self.stage(session, looking)} if looking.compared is not None else {}
        drawn = {"panel": self.panel(session, looking, name), "history": shell.history(session, looking)}
        yield drawn | {"session": session, "looking": looking} | compared

    def read_memory(self, run: Run, looking: Looking) -> None:
        """Fills `run.reading`, or says in `looking` why not.

        Raises:
            RiMError: as `Hands.read`.
        """
        try:
            self.hands.read(run)
        except RiMError as error:
            looking.unread = run, str(error)
            raise

    # ---------------------------------------------------------------------------------------------------------- hands

    def change(self, session: Session, looking: Looking, name: str | None, event: gr.EventData) -> Iterator[Changes]:
        """Anything chosen in the tabs, the panel or the history, or by the browser's Back and Forward; the boxes follow
        the run that is shown.
        """
        wanted = event._data if isinstance(event._data, Mapping) else {}
        with looking.lock:
            before, sentence = (session.run, looking.compared), ""
            try:
                if isinstance(wanted.get("go"), str) and not self._go(wanted["go"], session, looking, name):
                    yield {"panel": shell.away()}
                    return
                sentence = self._changed(session, looking, wanted)
            except RiMError as error:
                sentence = str(error)
            except Exception:  # whatever a model can raise, a visitor gets a sentence and the log gets the rest
                log.exception("%s failed", str(wanted)[:400])
                sentence = FAILED
            run, changes = session.run, {"session": session, "looking": looking}
            if run is not None and run is not before[0]:
                known = run.checkpoint in self.race.shelf.names  # a loaded run may be of a model that is not here
                boxes = {"question": run.question, "gold": run.gold or "", "blocks": gr.Slider(value=run.num_blocks)}
                changes |= boxes | {"model": run.checkpoint} if known else boxes
                name = run.checkpoint if known else name
            changes["panel"] = self.panel(session, looking, name, sentence)
            if (run, looking.compared) != before:
                changes |= self._shown(session, looking)
        yield changes | {"history": shell.history(session, looking)}

    def _go(self, place: str, session: Session, looking: Looking, name: str | None) -> bool:
        """Shows what an address says, as far as it is still here; whether it was."""
        address = Address.read(dict(parse_qsl(place.removeprefix("?"))))
        if address.question:
            index = next((i for i, run in enumerate(session.runs) if is_of(run, address)), None)
            if index is None:
                return False
            session.show(index)
        elif address.looking.panel != "evidence" or address.recorded is not None:
            number = address.recorded
            shown = address.model if address.model in self.race.shelf.names else self.race.shelf.greeting
            if session.recorded is None or session.recorded != number:
                self.race.opening(shown, number, session)
        looking.panel = address.looking.panel
        looking.views |= address.looking.views
        if address.compared is None:
            looking.compared = None
        return True

    def _changed(self, session: Session, looking: Looking, wanted: Mapping[str, Any]) -> str:
        """Does what was chosen; a sentence for the visitor.

        Raises:
            RiMError: it cannot be done.
        """
        looking.open(wanted.get("panel"))
        looking.select(wanted.get("view"))
        action = wanted.get("do")
        if not isinstance(action, Mapping):
            if looking.panel == "surgery" and "view" in wanted and session.run is not None:
                self.hands.operate(session.run, looking.view)
            return ""
        action = {str(key): str(value) for key, value in action.items()}
        act, run = action.get("act"), session.run
        if act in ("show", "compare", "apart"):
            self._history(session, looking, act, action.get("index", ""))
            return ""
        if run is None:
            raise RiMError(NO_RUN)
        if act == "blocks":
            return self._with_blocks(run, session, looking, action.get("k", ""))
        looking.open("surgery")
        if act == "try_counterfactual":
            self.hands.test_claim(run, action.get("block", ""))
            looking.views["surgery"] = view_of_done(run)
        else:
            looking.select(self._operation(run, looking, action))
            self.hands.operate(run, looking.view)
            if act == "operate" and not run.surgery["actions"]:  # the table is cleared
                run.counterfactual = None
                looking.view.pop("try", None)
        return ""

    def _operation(self, run: Run, looking: Looking, action: Mapping[str, str]) -> dict[str, str]:
        """What an act changes in the view of Surgery."""
        act, block = action.get("act"), action.get("block", "")
        if act == "partner":
            return {"partner": action.get("text", "").strip()}
        if act == "set" and block.isdecimal():
            # Into what is on the table now, which the page may not have drawn yet.
            ops = view_of(run.drawable(), "surgery", looking.view)["ops"] if run.reading else ""
            actions = parse(ops, run.num_blocks) or {}
            return {"ops": write(actions | {int(block): action.get("letter", "")})}
        if act == "operate":
            return {key: action[key] for key in ("ops", "layers") if key in action}
        if act == "operate_here":
            return {"ops": f"{block}{LETTERS['blank']}"}
        if act == "operate_cell":
            letter, layer = LETTERS.get(action.get("action", ""), LETTERS["blank"]), action.get("layer", "")
            return {"ops": f"{block}{letter}", "layers": f"{layer}-{layer}"}
        return {}

    def _with_blocks(self, before: Run, session: Session, looking: Looking, number: str) -> str:
        """The same question with another number of blocks, as a new run; what came of it in a sentence."""
        blocks = int(number) if number.isdecimal() else None
        asked = (before.question, blocks, before.gold, before.checkpoint)
        run = self.race.prepare(*asked, steps=before.steps, methods=tuple(before.lanes))
        run.seed = before.seed
        for _ in self.race.answer(run):
            pass
        session.add(run)
        self.read_memory(run, looking)
        looking.view.pop("try", None)
        if looking.view.get("ops"):
            self.hands.operate(run, looking.view)
        was, now = (_said(one) for one in (before, run))
        return f"With K = {run.num_blocks} the answer is {now}; with K = {before.num_blocks} it was {was}."

    def _history(self, session: Session, looking: Looking, act: str, index: str) -> None:
        shown = session.run
        if act == "apart":
            looking.compared = None
        elif not index.isdecimal() or int(index) >= len(session.runs):
            raise RiMError("This run is no longer in the history; ask its question again.")
        elif act == "compare":
            looking.compared = session.runs[int(index)]
        elif session.show(int(index)) is not shown:
            looking.views["surgery"] = view_of_done(session.run)

    # ---------------------------------------------------------------------------------------------------------- files

    def export(self, session: Session, looking: Looking) -> str:
        """The current run as a file for `shell`'s script to save."""
        if session.run is None or session.run.status in ("waiting", "running"):
            return figures.notice(NO_RUN if session.run is None else "The race is still on; save it when it is over.")
        return shell.file(f"rim-probe-{session.run.checkpoint}.json", files.text(session.run, looking))

    def load(self, path: str | None, session: Session, looking: Looking, name: str | None) -> Iterator[Changes]:
        """A run from a visitor's file."""
        try:
            run, saved = files.load(path)
        except RiMError as error:
            yield {"notice": figures.notice(str(error)), "session": session, "looking": looking}
            return
        finally:
            if path is not None:
                Path(path).unlink(missing_ok=True)  # a copy that Gradio would keep
        session.add(run)
        looking.views["surgery"] = view_of_done(run)
        if isinstance(saved, Mapping):
            looking.open(saved.get("panel"))
            looking.select({key: value for key, value in saved.items() if key != "panel"})
        yield self.everything(session, looking, name)


def _said(run: Run) -> str:
    answer = run.lanes["memory"].answer
    return "nothing" if answer is None else answer["value"] or "nothing"
