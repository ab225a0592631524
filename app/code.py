"""The lines of Python that draw a figure again, for "copy as Python". Knows a run and the library's names;
does not know what a panel shows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pprint import pformat
from typing import Any

from app.hands import claimed
from app.runs import Run


def python(run: Run, panel: str, view: Mapping[str, str], place_of: Callable[[str], str]) -> str:
    """A script that reproduces one figure.

    Args:
        view: what is selected; empty values are left out.
        place_of: gives a checkpoint's folder or Hub id.
    """
    place = place_of(run.checkpoint)
    asked = {"num_blocks": run.num_blocks, "gold": run.gold, "steps": list(run.steps)}
    chosen = {name: value for name, value in view.items() if value}
    if panel != "surgery" or (run.surgery is None and run.counterfactual is None):
        return (
            "from rim_probe.plots import draw\n"
            "from rim_probe.probing.reading import read_checkpoint\n\n"
            f"reading = read_checkpoint({_call([place, run.question], asked)})\n"
            f"draw({_call(['reading', panel], chosen, plain=1)}).save({panel + '.html'!r})\n"
        )
    imports = ["from rim_probe.plots import draw", "from rim_probe.probing.reading import Readers, read"]
    imports.append("from rim_probe.probing.study import load_models")
    lines = [
        f"models = load_models({place!r})",
        f"question = {run.question!r}",
        f"readers = Readers.load({place!r}, models)",
        f"reading = read({_call(['models', 'readers', 'question'], asked, plain=3)}).to_dict()",
    ]
    if run.surgery is not None:
        imports.append("from rim_probe.probing.surgery import operate")
        done = run.surgery
        options = {key: done[key] for key in ("partner", "unrelated", "num_blocks", "gold", "seed") if key in done}
        options["layers"] = tuple(done["layers"])
        actions = {int(block): action for block, action in done["actions"].items()}
        called = _call(["models['memory']", "question", repr(actions)], options, plain=3)
        lines.append(f"reading['surgery'] = operate({called})")
    if run.counterfactual is not None:
        imports += ["from rim_probe.probing.trial import try_counterfactual", "from rim_probe.problems import Problem"]
        tried = run.counterfactual
        block = int(tried["asked"]) if tried.get("asked", "all").isdecimal() else None
        options = {"block": block, "num_blocks": run.num_blocks, "seed": run.seed}
        options["unrelated"] = tried["surgery"].get("unrelated")
        lines.append(f"problem = Problem(question, {tuple(run.steps)!r}, {run.gold or ''!r})")
        called = _call(["models['memory']", "problem", repr(claimed(run.reading, block))], options, plain=3)
        called += ", steps=reading['chain']"
        named = {"checkpoint": tried.get("checkpoint"), "rate": tried.get("rate")}
        lines.append(f"reading['counterfactual'] = try_counterfactual({called}) | {pformat(named, width=100)}")
        if beside := tried.get("beside"):
            lines.append(f"beside = {pformat(beside | {'found': None}, width=100)}")
            if beside["found"]:
                block = tried["blocks"][0]
                options = {"block": block, "num_blocks": run.num_blocks, "seed": run.seed}
                given = ["models['memory']", "problem", repr(claimed(run.reading, block))]
                lines.append(f"models = load_models({place_of(beside['checkpoint'])!r})")
                called = _call(given, options, plain=3) + ", steps=reading['chain']"
                lines.append(f"beside['found'] = try_counterfactual({called})")
            lines.append("reading['counterfactual']['beside'] = beside")
    lines.append(f"draw({_call(['reading', panel], chosen, plain=1)}).save({panel + '.html'!r})")
    return "\n".join([*imports, "", *lines]) + "\n"


def evidence(place: str) -> str:
    """A script that draws a checkpoint's report again."""
    return (
        "from rim_probe.plots.evidence import draw_evidence\n"
        "from rim_probe.probing.evidence import load_evidence\n\n"
        f"draw_evidence(load_evidence({place!r})).save('evidence.html')\n"
    )


def _call(arguments: list[str], options: Mapping[str, Any], plain: int = 0) -> str:
    """The inside of a call's parentheses; the first `plain` arguments are names, the others texts to be quoted."""
    given = [text if index < plain else repr(text) for index, text in enumerate(arguments)]
    given += [f"{name}={pformat(value, width=100)}" for name, value in options.items() if value not in (None, [], "")]
    return ", ".join(given)
