"""The panels that look inside: tabs, the open panel, what is done by hand in it, history, comparison, files, addresses.

Wires the page to `rim_probe.probing` (what is computed) and `rim_probe.pictures` (how it is drawn). A run's reading is
computed once, after its race; every panel is drawn from it, so switching computes nothing. Does no maths.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gradio as gr

from app import code, figures, gpu, shell
from app.models import ModelShelf
from app.panels.race import Race
from app.runs import METHODS, RACERS, Run
from app.session import Session
from app.view import Address, Looking, query
from rim_probe.errors import RiMError
from rim_probe.pictures import draw, view_of
from rim_probe.pictures.parts import script
from rim_probe.pictures.surgery import ACTIONS, parse, write
from rim_probe.problems import Problem

log = logging.getLogger(__name__)

AT_ONCE = 2  # interventions computed at the same time; more would only slow each other down
LARGEST_UPLOAD = 16_000_000  # bytes
PANEL_JS = script() + (Path(__file__).parent.parent / "panel.js").read_text(encoding="utf-8")
NO_RUN = "Ask a question first, or pick an example: this panel then shows what the model's memory holds for it."


@dataclass
class Inspector:
    """What all visitors share: the checkpoints and the race that makes the runs."""

    shelf: ModelShelf
    race: Race
    _hands: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(AT_ONCE))

    # -------------------------------------------------------------------------------------------------------- drawing

    def panel(self, session: Session, looking: Looking, name: str | None, sentence: str = "") -> str:
        """The open panel as HTML. The address that brings it back goes along as an attribute."""
        run = session.run
        notice = figures.notice(sentence) if sentence else ""
        try:
            body = notice + self._body(run, looking, name)
        except RiMError as error:
            body = notice + figures.notice(str(error))
        except Exception:  # a picture that fails must not take the page with it
            log.exception("drawing %s failed", looking.panel)
            body = notice + figures.notice("This panel could not be drawn; the server's log has the details.")
        return shell.panel(looking.panel, body, query(run, looking, name, session.recorded), run)

    def _body(self, run: Run | None, looking: Looking, name: str | None) -> str:
        if looking.panel == "race":
            return ""
        if looking.panel == "evidence":
            return self._evidence(name)
        if run is None:
            return figures.notice(NO_RUN)
        if run.reading is None:
            return shell.pending("Reading the memory blocks …" if run.status == "done" else "The race is still on …")
        others = [looking.compared] if looking.compared is not None and looking.compared.reading else []
        return shell.side_by_side([(shown, self._picture(shown, looking)) for shown in [run, *others]])

    def _picture(self, run: Run, looking: Looking) -> str:
        picture = draw(run.drawable(), looking.panel, **looking.view)
        return picture.html(code.python(run, looking.panel, picture.view, self._place(run.checkpoint)))

    def _place(self, name: str) -> str:
        """What a researcher would load: the checkpoint's path as far as this page may tell it."""
        return f"checkpoints/{name}"

    def _evidence(self, name: str | None) -> str:
        from rim_probe.pictures.evidence import draw_evidence
        from rim_probe.probing.evidence import load_evidence

        evidence = load_evidence(self.shelf.path(name))
        return draw_evidence(evidence).html()

    # --------------------------------------------------------------------------------------------------------- asking

    def ask(
        self,
        problem: Problem,
        name: str,
        session: Session,
        looking: Looking,
        cancel: threading.Event,
        num_blocks: int | None = None,
        direct: bool = False,
    ) -> Iterator[dict[str, Any]]:
        """Runs a race that the page itself starts, reads the memory, and yields what changes, by the names of parts.

        Raises:
            RiMError: as `Race.answer`.
        """
        blocks = self.race.layout(name).num_blocks if num_blocks is None else num_blocks
        methods = METHODS if direct else RACERS
        yield {"question": problem.question, "gold": problem.answer, "model": name}
        yield {"blocks": gr.Slider(value=blocks), "examples": self.race.gallery(name)}
        answering = self.race.answer(
            problem.question, blocks, problem.answer, name, cancel, steps=problem.steps, methods=methods
        )
        session.picked = (problem.question, problem.answer, tuple(problem.steps))
        run = None
        for step in answering:
            if isinstance(step, Run):
                if run is None:
                    session.add(step)
                run = step
                yield {"stage": figures.stage(run)}
            else:
                yield {"notice": figures.model_state(step, "loading")}
        if run is not None and run.status == "done":
            self.complete(run)
            if looking.panel == "surgery" and looking.view.get("ops"):
                self.operate(run, looking)
        yield self.everything(session, looking, name) | {"notice": ""}

    def arrive(
        self, session: Session, looking: Looking, model: str | None, request: gr.Request
    ) -> Iterator[dict[str, Any]]:
        """A visitor comes, perhaps by a shared link: does again what the link says. Yields what changes."""
        address = Address.read(dict(request.query_params))
        name = address.model if address.model in self.shelf.names else model
        looking.panel, looking.views = address.looking.panel, address.looking.views
        cancel = self.race.cancellations.start(request.session_hash)
        sentence = ""
        if address.model and name != address.model:
            sentence = f"The link asks for the model {address.model[:60]!r}, which is not here; this is {name}."
        try:
            if address.question:
                problem = Problem(address.question, (), address.gold)
                yield from self.ask(problem, name, session, looking, cancel, address.blocks, address.direct)
            elif name != model or address.recorded is not None:
                stage, run = self.race.opening(name, address.recorded, session)
                yield {"stage": stage, "model": name, "examples": self.race.gallery(name)} | (
                    {"question": run.question, "gold": run.gold or ""} if run else {}
                )
        except RiMError as error:
            yield {"notice": self.race.explain(error, name, address.question)}
        finally:
            self.race.cancellations.finish(request.session_hash, cancel)
        yield self.everything(session, looking, name) | ({"notice": figures.notice(sentence)} if sentence else {})

    def everything(self, session: Session, looking: Looking, name: str | None) -> dict[str, Any]:
        """All that shows a run."""
        stage = {} if session.run is None or session.recorded is not None else {"stage": figures.stage(session.run)}
        return stage | {
            "panel": self.panel(session, looking, name),
            "history": shell.history(session, looking),
            "session": session,
            "looking": looking,
        }

    # -------------------------------------------------------------------------------------------------------- reading

    def read(self, session: Session, looking: Looking, name: str | None) -> Iterator[list[Any]]:
        """After a race: computes the reading and yields [panel, history, session, looking]."""
        run = session.run
        if run is None or run.reading is not None or run.status != "done":
            yield [self.panel(session, looking, name), shell.history(session, looking), session, looking]
            return
        looking.views.pop("surgery", None)  # what was done to another question's memory
        yield [self.panel(session, looking, name), shell.history(session, looking), gr.skip(), gr.skip()]
        sentence = ""
        try:
            self.complete(run)
        except RiMError as error:
            sentence = str(error)
        yield [self.panel(session, looking, name, sentence), shell.history(session, looking), session, looking]

    def complete(self, run: Run) -> None:
        """Fills `run.reading`.

        Raises:
            RiMError: the models cannot be loaded or read.
        """
        from rim_probe.probing.reading import read

        models, readers = self.readers(run.checkpoint)
        options = {"num_blocks": run.num_blocks, "gold": run.gold, "steps": run.steps, "chain": run.chain()}
        with self._hands:
            run.reading = gpu.call(read, models, readers, run.question, **options).to_dict()

    def readers(self, name: str) -> tuple[Mapping[str, Any], Any]:
        """The models of a checkpoint by role, and its fitted decoders; waits until they are loaded."""
        found, patience = None, threading.Event()
        while found is None:
            found = self.shelf.wait_readers(name, patience)
        return found

    # ---------------------------------------------------------------------------------------------------------- hands

    def change(
        self, session: Session, looking: Looking, name: str | None, request: gr.Request, event: gr.EventData
    ) -> list[Any]:
        """Anything chosen in the tabs, the panel or the history: [panel, history, stage, session, looking]."""
        wanted = event._data if isinstance(event._data, Mapping) else {}
        with looking.lock:
            sentence, stage = self._changed(session, looking, wanted, request)
            drawn = self.panel(session, looking, name, sentence)
        return [drawn, shell.history(session, looking), stage, session, looking]

    def _changed(
        self, session: Session, looking: Looking, wanted: Mapping[str, Any], request: gr.Request
    ) -> tuple[str, Any]:
        """Does what was chosen; a sentence for the visitor, and what the stage becomes."""
        action = wanted.get("do")
        looking.open(wanted.get("panel"))
        looking.select(wanted.get("view"))
        try:
            if isinstance(action, Mapping):
                action = {str(key): str(value) for key, value in action.items()}
                if action.get("act") == "blocks":
                    return self._with_blocks(session, looking, action.get("k", ""), request), figures.stage(session.run)
                return "", self.act(session, looking, action)
            if looking.panel == "surgery" and "view" in wanted and session.run is not None:
                self.operate(session.run, looking)
        except RiMError as error:
            return str(error), gr.skip()
        except Exception:  # whatever a model can raise, a visitor gets a sentence and the log gets the rest
            log.exception("%s failed", wanted)
            return "This did not work; the server's log has the details.", gr.skip()
        return "", gr.skip()

    def act(self, session: Session, looking: Looking, action: Mapping[str, str]) -> Any:
        """One deed. Returns what the stage becomes, mostly `gr.skip()`.

        Raises:
            RiMError: it cannot be done.
        """
        act, run = action.get("act"), session.run
        if act in ("show", "compare", "apart"):
            return self._history(session, looking, act, action.get("index", ""))
        if run is None or run.reading is None:
            raise RiMError(NO_RUN)
        looking.open("surgery")
        if act == "try_counterfactual":
            self.counterfactual(run, looking, action.get("block", ""))
            return gr.skip()
        if act == "partner":
            looking.select({"partner": action.get("text", "").strip()})
        elif act == "set":
            # Into what is on the table now, which the page may not have drawn yet.
            ops = view_of(run.drawable(), "surgery", looking.view)["ops"]
            actions = parse(ops, run.num_blocks) or {}
            block = action.get("block", "")
            changed = {int(block): action.get("letter", "")} if block.isdigit() else {}
            looking.select({"ops": write(actions | changed)})
        elif act == "operate":
            looking.select({key: action[key] for key in ("ops", "layers") if key in action})
        elif act == "operate_here":
            looking.select({"ops": f"{action.get('block', '')}b"})
        elif act == "operate_cell":
            letter = {word: letter for letter, word in ACTIONS.items()}.get(action.get("action", ""), "b")
            layer = action.get("layer", "")
            looking.select({"ops": f"{action.get('block', '')}{letter}", "layers": f"{layer}-{layer}"})
        self.operate(run, looking)
        return gr.skip()

    def operate(self, run: Run, looking: Looking) -> None:
        """Does what the view of Surgery says, into `run.surgery`.

        Raises:
            RiMError: a block, layer or second question that it cannot be done with.
        """
        from rim_probe.probing.surgery import operate

        view = view_of(run.drawable(), "surgery", looking.view)
        low, high = view["layers"].split("-")
        actions = {block: ACTIONS[letter] for block, letter in (parse(view["ops"], run.num_blocks) or {}).items()}
        models, _ = self.readers(run.checkpoint)
        options = {
            "partner": view["partner"] or None,
            "unrelated": self._unrelated(run, view["partner"]),
            "layers": (int(low), int(high)),
            "num_blocks": run.num_blocks,
            "gold": run.gold,
            "seed": run.seed,
        }
        with self._hands:
            run.surgery = gpu.call(operate, models["memory"], run.question, actions, **options)

    def counterfactual(self, run: Run, looking: Looking, block: str = "") -> None:
        """Tests the claim that a block holds its decoded step, into `run.counterfactual`, and shows it on the table.

        Raises:
            RiMError: there is no claim to test, or no partner to test it with.
        """
        from rim_probe.probing.trial import problem_from, try_counterfactual

        reading = run.reading or {}
        problem = problem_from(run.question, run.steps, reading.get("chain"), run.gold)
        told = reading.get("probes", {}).get("steps", {"blocks": []})["blocks"]
        claims = {entry["block"]: entry["step"] for entry in told} or None
        models, _ = self.readers(run.checkpoint)
        options = {"block": int(block) if block.isdigit() else None, "num_blocks": run.num_blocks, "seed": run.seed}
        with self._hands:
            found = gpu.call(try_counterfactual, models["memory"], problem, claims, **options)
        run.counterfactual, run.surgery = found, found["surgery"]
        low, high = found["layers"]
        looking.views["surgery"] = {
            "ops": "".join(f"{block}s" for block in found["blocks"]),
            "layers": f"{low}-{high}",
            "partner": found["partner"]["question"],
        }

    def _unrelated(self, run: Run, partner: str) -> str | None:
        """An example that is neither of the two questions: its memory is as good as any, and knows nothing of them."""
        examples = [problem.question for problem in self.shelf.examples(run.checkpoint)]
        return next((question for question in examples if question not in (run.question, partner)), None)

    def _with_blocks(self, session: Session, looking: Looking, number: str, request: gr.Request) -> str:
        """The same question with another number of blocks, as a new run; what came of it in a sentence."""
        before = session.run
        if before is None:
            raise RiMError(NO_RUN)
        cancel = self.race.cancellations.start(request.session_hash)
        try:
            blocks = int(number) if number.isdigit() else None
            methods = tuple(before.lanes)
            for step in self.race.answer(
                before.question, blocks, before.gold, before.checkpoint, cancel, steps=before.steps, methods=methods
            ):
                if isinstance(step, Run):
                    run = step
        finally:
            self.race.cancellations.finish(request.session_hash, cancel)
        self.complete(run)
        session.add(run)
        if looking.view.get("ops"):
            self.operate(run, looking)
        was, now = (one.lanes["memory"].answer["value"] or "nothing" for one in (before, run))
        return f"With K = {run.num_blocks} the answer is {now}; with K = {before.num_blocks} it was {was}."

    def _history(self, session: Session, looking: Looking, act: str, index: str) -> Any:
        runs = list(session.runs)
        if act == "apart":
            looking.compared = None
        elif index.isdigit() and int(index) < len(runs):
            chosen = runs[int(index)]
            if act == "compare":
                looking.compared = None if chosen is session.run else chosen
            else:
                session.show(int(index))
                return figures.stage(chosen)
        return gr.skip()

    # ---------------------------------------------------------------------------------------------------------- files

    def export(self, session: Session, looking: Looking) -> str:
        """The current run as a file for `shell`'s script to save."""
        if session.run is None:
            return figures.notice(NO_RUN)
        data = session.run.to_dict() | {"view": {"panel": looking.panel, **looking.view}}
        return shell.file(f"rim-probe-{session.run.checkpoint}.json", json.dumps(data, ensure_ascii=False))

    def load(self, path: str | None, session: Session, looking: Looking, name: str | None) -> list[Any]:
        """A run from a visitor's file: [stage, panel, history, notice, session, looking]."""
        try:
            if path is None or Path(path).stat().st_size > LARGEST_UPLOAD:
                raise RiMError(f"A run to load must be a JSON file of at most {LARGEST_UPLOAD // 1_000_000} MB.")
            try:
                data = json.loads(Path(path).read_text(encoding="utf-8"), parse_constant=_refuse)
            except (ValueError, RecursionError):
                raise RiMError("This file is not JSON; load one that “Save this run” has made.") from None
            run = Run.from_dict(data)
        except RiMError as error:
            return [gr.skip(), gr.skip(), gr.skip(), figures.notice(str(error)), session, looking]
        run.status = "loaded"
        session.add(run)
        saved = data.get("view")
        if isinstance(saved, Mapping):
            looking.open(saved.get("panel"))
            looking.select({key: value for key, value in saved.items() if key != "panel"})
        drawn = self.panel(session, looking, name)
        return [figures.stage(run), drawn, shell.history(session, looking), "", session, looking]


def _refuse(constant: str) -> float:
    raise ValueError(constant)  # NaN and infinities are not JSON and cannot be drawn
