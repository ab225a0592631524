"""Trajectory: the question's path through the space of memory states, over the cloud of known problems.

The space is that of the principal components of `probing.geometry`: the directions along which the states of many
questions differ most. A path goes either from block to block at one layer, or from layer to layer. The control is the
mean path of known problems: what the path shares with it says nothing about this question.

Knows what `probing.geometry` says of one question. Does not know what the axes mean; nobody does: they are directions
of most variance, and places near each other in two of them may be far apart in the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rim_probe.pictures import chart
from rim_probe.pictures.parts import Choice, Picture, Table, buttons, escape, menu, missing, percent

TITLE = "The path of the question"
PAIRS = {"12": "1 and 2", "13": "1 and 3", "23": "2 and 3"}
OVER = {"blocks": "blocks", "depth": "layers"}
COLOURS = {"right": "right or wrong", "steps": "number of steps", "none": "hidden"}
FRAMES = {"all": "all known problems", "path": "this path"}
STEP_LOOKS = (("dot", "soft"), ("triangle", "cot"), ("square", "ink"), ("cross", "memory"), ("ring", "soft"))


def _geometry(reading: Mapping[str, Any]) -> Mapping[str, Any]:
    return reading["probes"].get("geometry") or {}


def _over(reading: Mapping[str, Any]) -> dict[str, str]:
    geometry = _geometry(reading)
    return {name: label for name, label in OVER.items() if geometry.get(name)}


def _deep_blocks(reading: Mapping[str, Any]) -> dict[str, str]:
    depth = _geometry(reading).get("depth") or [[]]
    return {str(block): str(block) for block in range(1, len(depth[0]) + 1)}


def _cloud(reading: Mapping[str, Any]) -> dict[str, str]:
    return dict(COLOURS) if (_geometry(reading).get("cloud") or {}).get("points") else {}


VIEW = (
    Choice("over", "Path over", _over, lambda reading: next(iter(_over(reading)))),
    Choice(
        "axes", "Axes", lambda reading: dict(PAIRS) if _geometry(reading).get("blocks") else {}, lambda reading: "12"
    ),
    Choice("cloud", "Known problems by", _cloud, lambda reading: "right"),
    Choice("frame", "Frame", lambda reading: dict(FRAMES) if _cloud(reading) else {}, lambda reading: "all"),
    Choice("block", "Block", _deep_blocks, lambda reading: list(_deep_blocks(reading))[-1]),
)


def draw(
    reading: Mapping[str, Any],
    *,
    over: str = "blocks",
    axes: str = "12",
    cloud: str = "right",
    frame: str = "all",
    block: str = "1",
) -> Picture:
    """The panel; arguments are values of `VIEW`. `cloud` and `frame` are for a path over blocks in axes 1 and 2, where
    the cloud is known; `block` is whose path over depth is drawn."""
    view = {"over": over, "axes": axes, "cloud": cloud, "frame": frame, "block": block}
    geometry = _geometry(reading)
    if not geometry.get("blocks"):
        why = " ".join(["The geometry of this checkpoint's memory is missing.", *reading.get("complaints", ())])
        return missing("trajectory", TITLE, why, view)
    pair = [int(axis) - 1 for axis in axes]
    drawing = _depth(reading, pair, int(block)) if over == "depth" else _blocks(reading, pair, cloud, frame)
    over_choice, axes_choice, cloud_choice, frame_choice, block_choice = VIEW
    controls = buttons(over_choice, reading, view) + buttons(axes_choice, reading, view)
    controls += menu(block_choice, reading, view) if over == "depth" else ""
    if over == "blocks" and axes == "12":
        controls += buttons(cloud_choice, reading, view)
        controls += buttons(frame_choice, reading, view) if cloud != "none" else ""
    return Picture("trajectory", TITLE, *drawing, view=view, controls=controls)


# ---------------------------------------------------------------------------------------------------------- over blocks


def _blocks(reading: Mapping[str, Any], pair: Sequence[int], colour: str, frame: str) -> tuple[str, str, str, Table]:
    """Lead, what to look for, body and table of the path from block to block."""
    geometry = _geometry(reading)
    own, mean = _flat(geometry["blocks"], pair), _flat(mean_path(geometry), pair)
    cloud = geometry.get("cloud") or {}
    known, keys = _known(cloud, colour) if pair == [0, 1] and cloud.get("points") else ([], [])
    layers: list[chart.Layer] = list(known)
    if mean:
        layers.append(
            chart.Path(mean, _ends(range(1, len(mean) + 1)), "ink", dashed=True, tips=_mean_tips(mean, cloud))
        )
        keys.append(("dashes", "ink", "mean path of known problems"))
    tips = [_tip(reading, k, place) for k, place in enumerate(own, start=1)]
    numbers = [str(k) for k in range(1, len(own) + 1)]
    layers.append(chart.Path(own, numbers, "memory", tips=tips, links=[f"block-{number}" for number in numbers]))
    keys.append(("line", "memory", f"this question, block 1 to {len(own)}"))
    points = own + mean + ([point for group in known for point in group.points] if frame == "all" else [])
    plot = _plot(points, pair, geometry["explained_blocks"], layers, "Path of the question from block to block")
    lead = (
        f"Where the memory of this question is after each block, at layer {geometry['layer']}, in two of the "
        "directions along which questions differ most. "
        + (
            "The small marks show where known problems end."
            if known
            else "The dashed path is the mean of known problems."
        )
    )
    table = _table(geometry["blocks"], mean_path(geometry))
    look = _look_for(geometry, pair, colour if len(known) > 1 else "none")
    return lead, look, _board(plot, keys, _strip(reading)), table


def _look_for(geometry: Mapping[str, Any], pair: Sequence[int], colour: str) -> str:
    shown = percent(sum(geometry["explained_blocks"][axis] for axis in pair))
    said = {
        "right": "Where does the path end? Where dots and crosses mix, the place does not tell right from wrong. ",
        "steps": "Does the path end among problems of as many steps? ",
    }.get(colour, "")
    own, mean = geometry["blocks"], mean_path(geometry)
    if mean and len(own) > 1:
        shared = shared_movement(own, mean)
        said += (
            "The dashed path is the control: what every question does says nothing about this one. Here it accounts "
            f"for {percent(shared)} of the movement (over all three axes). "
        )
    return said + (
        f"These two axes hold {shown} of the variance, so what looks near may be far, and no axis has a meaning of its "
        "own."
    )


def mean_path(geometry: Mapping[str, Any]) -> list[Sequence[float]]:
    """The mean path for as many blocks as the question has; empty where it is unknown or has other axes."""
    mean = list(geometry.get("mean_path") or ())[: len(geometry["blocks"])]
    return mean if len(mean) == len(geometry["blocks"]) and all(len(point) == 3 for point in mean) else []


def shared_movement(own: Sequence[Sequence[float]], mean: Sequence[Sequence[float]]) -> float:
    """Share of the path's movement (squares of its places about their middle) that the mean path, moved to the same
    middle, accounts for; 0 where the mean path is no help at all."""

    def about_middle(path: Sequence[Sequence[float]]) -> list[list[float]]:
        middle = [sum(column) / len(path) for column in zip(*path, strict=True)]
        return [[a - b for a, b in zip(point, middle, strict=True)] for point in path]

    mine, common = about_middle(own), about_middle(mean)
    whole = sum(a * a for point in mine for a in point)
    left = sum((a - b) ** 2 for p, q in zip(mine, common, strict=True) for a, b in zip(p, q, strict=True))
    return max(0.0, 1 - left / whole) if whole else 0.0


def _known(cloud: Mapping[str, Any], colour: str) -> tuple[list[chart.Cloud], list[tuple[str, str, str]]]:
    """The cloud and its legend."""
    points: Sequence[Sequence[float]] = cloud["points"]
    layers: list[chart.Cloud] = []
    keys: list[tuple[str, str, str]] = []
    if colour == "right":
        groups = [("dot", "soft", "ends right", True), ("cross", "wrong", "ends wrong", False)]
        given = cloud["right"]
    elif colour == "steps":
        given = cloud["steps"]
        groups = [
            (*STEP_LOOKS[i % len(STEP_LOOKS)], f"{steps} step{'s' * (steps != 1)}", steps)
            for i, steps in enumerate(sorted(set(given)))
        ]
    else:
        return [], []
    for shape, tone, name, value in groups:
        members = [point for point, own in zip(points, given, strict=True) if own == value]
        if members:
            layers.append(chart.Cloud(members, tone, shape))
            keys.append((shape, tone, f"{name} ({len(members)})"))
    return layers, keys


def _tip(reading: Mapping[str, Any], block: int, place: Sequence[float]) -> str:
    readout = next((one for one in reading["readouts"] if one["block"] == block), None)
    said = f"Block {block} at {_pair(place)}"
    if not readout:
        return said
    right = {True: ", right", False: ", wrong", None: ""}[readout.get("right")]
    return f"{said} · answer so far {readout['value']} ({percent(readout['probability'])} sure{right})"


def _mean_tips(mean: Sequence[Sequence[float]], cloud: Mapping[str, Any]) -> list[str]:
    whose = f"{cloud['n']} known problems" if cloud.get("n") else "known problems"
    return [f"Mean of {whose} after block {k}: {_pair(place)}" for k, place in enumerate(mean, start=1)]


def _strip(reading: Mapping[str, Any]) -> str:
    """The answers along the path, so that places and answers are read together."""
    cells = "".join(
        f'<li data-link="block-{one["block"]}"><small>{one["block"]}</small>'
        f"<b>{escape('–' if one['value'] is None else one['value'])}</b>"
        f'<small class="{"" if one.get("right") is None else "right" if one["right"] else "wrong"}">'
        f"{'' if one.get('right') is None else '✓' if one['right'] else '✗'}</small></li>"
        for one in reading["readouts"]
    )
    return f'<p class="trajectory-strip-title">Answer so far, by block</p><ol class="trajectory-strip">{cells}</ol>'


# ----------------------------------------------------------------------------------------------------------- over depth


def _depth(reading: Mapping[str, Any], pair: Sequence[int], block: int) -> tuple[str, str, str, Table]:
    """The same for the path of one block from layer to layer; the mean of the other blocks' paths stands beside it."""
    geometry = _geometry(reading)
    layers, depth = geometry["depth_layers"], geometry["depth"]
    own = [points[block - 1] for points in depth]
    others = [[p for k, p in enumerate(points, start=1) if k != block] for points in depth]
    mean = [[sum(column) / len(points) for column in zip(*points, strict=True)] for points in others if points]
    points = [point for row in depth for point in _flat(row, pair)]
    drawn: list[chart.Layer] = [chart.Cloud([p for row in others for p in _flat(row, pair)])]
    keys: list[tuple[str, str, str]] = []
    if mean:
        keys.append(("dot", "soft", "the other blocks, all layers"))
        tips = [
            f"Mean of the other blocks at layer {layer}: {_pair(p)}"
            for layer, p in zip(layers, _flat(mean, pair), strict=True)
        ]
        drawn.append(chart.Path(_flat(mean, pair), _ends(layers), "ink", dashed=True, tips=tips))
        keys.append(("dashes", "ink", "mean of the question's other blocks"))
    flat = _flat(own, pair)
    tips = [f"Block {block} at layer {layer}: {_pair(p)}" for layer, p in zip(layers, flat, strict=True)]
    drawn.append(chart.Path(flat, [str(layer) for layer in layers], "memory", tips=tips))
    keys.append(("line", "memory", f"block {block}, layer {layers[0]} to {layers[-1]}"))
    plot = _plot(points, pair, geometry["explained_depth"], drawn, f"Path of block {block} from layer to layer")
    lead = (
        f"How the state of block {block} moves from layer to layer, in two of the directions along which states differ "
        "most. Each layer is brought to the same size first, since states grow with depth."
    )
    look = (
        "Where does the block leave the dashed path of the others? What both share is the work of the layers, not of "
        f"this block. These two axes hold {percent(sum(geometry['explained_depth'][axis] for axis in pair))} of the "
        "variance; a path says where a state goes, not what it holds."
    )
    rows = [
        [layer, k, *(f"{value:.3f}" for value in point)]
        for layer, points in zip(layers, depth, strict=True)
        for k, point in enumerate(points, start=1)
    ]
    return lead, look, _board(plot, keys), Table(("layer", "block", "axis 1", "axis 2", "axis 3"), rows)


# -------------------------------------------------------------------------------------------------------------- pieces


def _plot(
    points: Sequence[Sequence[float]],
    pair: Sequence[int],
    explained: Sequence[float],
    layers: Sequence[chart.Layer],
    label: str,
) -> str:
    x, y = (
        chart.axis(
            [point[i] for point in points], f"axis {axis + 1} ({percent(explained[axis])} of the variance)", ticks=6
        )
        for i, axis in enumerate(pair)
    )
    return f'<div class="trajectory-plot">{chart.chart(x, y, layers, label, equal=1.35)}</div>'


def _board(plot: str, keys: Sequence[tuple[str, str, str]], beside: str = "") -> str:
    return f'<div class="trajectory-board">{plot}<div>{chart.legend(keys)}{beside}</div></div>'


def _flat(points: Sequence[Sequence[float]], pair: Sequence[int]) -> list[list[float]]:
    """The two components that are shown; a point without one of them is left out."""
    return [[point[axis] for axis in pair] for point in points if len(point) > max(pair)]


def _ends(numbers: Sequence[int]) -> list[str]:
    """Numbers at both ends of a path only: those between would crowd the question's own."""
    return [str(number) if number in (numbers[0], numbers[-1]) else "" for number in numbers]


def _pair(place: Sequence[float]) -> str:
    return f"({place[0]:.1f}, {place[1]:.1f})".replace("-", "−")


def _table(blocks: Sequence[Sequence[float]], mean: Sequence[Sequence[float]]) -> Table:
    header = ["block", "axis 1", "axis 2", "axis 3"] + [f"mean of known problems, axis {n}" for n in (1, 2, 3) if mean]
    rows = [
        [k, *(f"{value:.2f}" for value in point), *(f"{value:.2f}" for value in (mean[k - 1] if mean else ()))]
        for k, point in enumerate(blocks, start=1)
    ]
    return Table(header, rows)
