"""Panels of a reading: plain data in, HTML with plotly charts out, the same in the app, a notebook and a file.

    from rim_probe.plots import draw
    from rim_probe.probing.reading import read_checkpoint

    reading = read_checkpoint("checkpoints/rim-tiny", "Ann has 3 apples. ...")
    draw(reading, "layers", mode="tuned lens").save("layers.html")
    draw(reading, "attention").figures["map"].write_image("attention.svg")  # plotly, with kaleido

Knows which panels there are. Knows no model, no tensor and no web framework.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

from rim_probe.errors import RiMError
from rim_probe.plots.frame import Panel, caption, missing, resolve

PANELS = ("blocks", "attention", "layers", "trajectory", "surgery")
"""Panels that are drawn from one reading, in the order of the page; `evidence` is drawn from a checkpoint's reports."""


def draw(reading: Any, panel: str, **view: str) -> Panel:
    """One panel of one reading.

    Args:
        reading: a `rim_probe.probing.reading.Reading`, its dictionary, or that of a run which the page has saved (the
            content of its JSON file).
        panel: one of `PANELS`.
        view: what is selected, as strings (`view_of` lists the names and values); a value that this reading does not
            have becomes the default, since views come from addresses that people edit and share.

    Raises:
        RiMError: no such panel, or not a reading.
    """
    if panel not in PANELS:
        raise RiMError(f"There is no panel {panel!r}; choose one of {', '.join(PANELS)}.")
    data = _plain(reading)
    if data.get("num_blocks") == 0 and panel != "surgery":
        why = "This question was answered without memory blocks, so there is nothing to look into; choose at least one."
        return missing(panel, panel.capitalize(), why)
    module, made = import_module(f"rim_probe.plots.{panel}"), data.get("provenance") or {}
    under = caption(
        Path(made.get("checkpoint", "")).name, data["num_blocks"], data["question"], made.get("fingerprint", "")
    )
    return replace(module.draw(data, **resolve(module.VIEW, data, view)), caption=under)


def view_of(reading: Any, panel: str, view: Mapping[str, Any] | None = None) -> dict[str, str]:
    """The complete, valid view nearest to `view`: what `draw` would show."""
    data = _plain(reading)
    return resolve(import_module(f"rim_probe.plots.{panel}").VIEW, data, view or {})


def _plain(reading: Any) -> Mapping[str, Any]:
    """A reading as its dictionary, with the experiments of a saved run beside it."""
    data = reading.to_dict() if hasattr(reading, "to_dict") else reading
    if isinstance(data, Mapping) and isinstance(data.get("reading"), Mapping):
        data = data["reading"] | {name: data.get(name) for name in ("surgery", "counterfactual")}
    if not isinstance(data, Mapping) or "probes" not in data:
        raise RiMError("This is not a reading; give what `rim_probe.probing.reading.read` returns, or a saved run.")
    return data


__all__ = ["PANELS", "Panel", "draw", "view_of"]
