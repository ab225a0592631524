"""Trajectory: the question's path through the space of memory states, over the cloud of known problems.

The space is that of the principal components of `probing.geometry`: the directions along which the states of many
questions differ most. A path goes either from block to block at one layer, or from layer to layer. The control is the
mean path of known problems (of the question's other blocks): what a path shares with it says nothing about this one.

Knows what `probing.geometry` says of one question. Does not know what the axes mean; nobody does: they are directions
of most variance, and places near each other in two of them may be far apart in the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rim_probe.numbers import percent
from rim_probe.plots.colours import colour
from rim_probe.plots.frame import Choice, Panel, Table, buttons, missing

TITLE = "The path of the question"
PAIRS = {"12": "1 and 2", "13": "1 and 3", "23": "2 and 3"}
OVER = {"blocks": "blocks", "depth": "layers"}
COLOURS = {"right": "right or wrong", "steps": "number of steps", "none": "hidden"}
LOOKS = (("circle", "soft"), ("triangle-up", "cot"), ("square", "ink"), ("x", "memory"), ("circle-open", "soft"))
Points = Sequence[Sequence[float]]


def _geometry(reading: Mapping[str, Any]) -> Mapping[str, Any]:
    return reading["probes"].get("geometry") or {}


def _over(reading: Mapping[str, Any]) -> dict[str, str]:
    return {name: label for name, label in OVER.items() if _geometry(reading).get(name)}


def _deep_blocks(reading: Mapping[str, Any]) -> dict[str, str]:
    depth = _geometry(reading).get("depth") or [[]]
    return {str(block): str(block) for block in range(1, len(depth[0]) + 1)}


def _cloud(reading: Mapping[str, Any]) -> dict[str, str]:
    return COLOURS if (_geometry(reading).get("cloud") or {}).get("points") else {}


VIEW = (
    Choice("over", "Path over", _over, lambda reading: next(iter(_over(reading)))),
    Choice("axes", "Axes", lambda reading: PAIRS if _geometry(reading).get("blocks") else {}, lambda reading: "12"),
    Choice("cloud", "Known problems by", _cloud, lambda reading: "right"),
    Choice("block", "Block", _deep_blocks, lambda reading: list(_deep_blocks(reading))[-1]),
)


def draw(
    reading: Mapping[str, Any], *, over: str = "blocks", axes: str = "12", cloud: str = "right", block: str = "1"
) -> Panel:
    """The panel; arguments are values of `VIEW`.

    Args:
        cloud: for a path over blocks in axes 1 and 2, where the cloud is known.
        block: whose path over depth is drawn.
    """
    view = {"over": over, "axes": axes, "cloud": cloud, "block": block}
    geometry = _geometry(reading)
    if not geometry.get("blocks"):
        why = " ".join(["The geometry of this checkpoint's memory is missing.", *reading.get("complaints", ())])
        return missing("trajectory", TITLE, why, view)
    pair = [int(axis) - 1 for axis in axes]
    deep = over == "depth"
    own, mean = paths(geometry, int(block) if deep else None)
    explained = geometry["explained_depth" if deep else "explained_blocks"]
    data = {
        "geometry": geometry,
        "shared": shared_movement(own, mean) if mean and len(own) > 1 and not deep else None,
        "explained": sum(explained[axis] for axis in pair),
        "readouts": [] if deep else reading["readouts"],
        "clouded": not deep and axes == "12" and bool(_cloud(reading)) and cloud != "none",
    }
    figures = {"path": figure(reading, view)}
    choices = [VIEW[0], VIEW[1], *([VIEW[3]] if deep else [VIEW[2]] if axes == "12" else [])]
    controls = [buttons(choice, reading, view) for choice in choices]
    return Panel("trajectory", TITLE, data, _table(geometry, deep, own, mean), view, figures, controls)


def paths(geometry: Mapping[str, Any], block: int | None = None) -> tuple[Points, Points]:
    """A path and its control, [points][3] each: over blocks, or of one block over depth.

    The control is empty where it is unknown or has other axes.
    """
    if block is None:
        own = geometry["blocks"]
        mean = list(geometry.get("mean_path") or ())[: len(own)]
        return own, mean if len(mean) == len(own) and all(len(point) == 3 for point in mean) else []
    others = [[p for k, p in enumerate(points, start=1) if k != block] for points in geometry["depth"]]
    mean = [[sum(column) / len(points) for column in zip(*points, strict=True)] for points in others if points]
    return [points[block - 1] for points in geometry["depth"]], mean


def shared_movement(own: Points, mean: Points) -> float:
    """Share of the path's movement that the mean path accounts for; 0 where the mean path is no help at all.

    Movement: squares of a path's places about their middle. The mean path is moved to the same middle first.
    """

    def about_middle(path: Points) -> list[list[float]]:
        middle = [sum(column) / len(path) for column in zip(*path, strict=True)]
        return [[a - b for a, b in zip(point, middle, strict=True)] for point in path]

    mine, common = about_middle(own), about_middle(mean)
    whole = sum(a * a for point in mine for a in point)
    left = sum((a - b) ** 2 for p, q in zip(mine, common, strict=True) for a, b in zip(p, q, strict=True))
    return max(0.0, 1 - left / whole) if whole else 0.0


def figure(reading: Mapping[str, Any], view: Mapping[str, str]) -> Any:
    """The path, its control and the known problems, as a `plotly.graph_objects.Figure`."""
    from rim_probe.plots import theme

    geometry, deep = _geometry(reading), view["over"] == "depth"
    pair = [int(axis) - 1 for axis in view["axes"]]
    own, mean = (_flat(path, pair) for path in paths(geometry, int(view["block"]) if deep else None))
    stops = geometry["depth_layers"] if deep else list(range(1, len(own) + 1))
    what = f"Block {view['block']} at layer" if deep else "Block"
    whose = "the question's other blocks" if deep else f"{(geometry.get('cloud') or {}).get('n', '')} known problems"
    traces = []
    for name, shape, tone, points in _known(geometry, view, pair):
        marker = {"symbol": shape, "size": 5, "color": colour(tone), "opacity": 0.4}
        traces.append(_scatter(points, mode="markers", name=f"{name} ({len(points)})", marker=marker, hoverinfo="name"))
    if mean:
        texts = [f"mean of {whose}, {'layer' if deep else 'block'} {stop}" for stop in stops]
        grey = {"color": colour("ink"), "dash": "dot", "width": 1.6}
        look = {"line": grey, "marker": {"color": colour("ink"), "size": 6, "symbol": "circle-open"}}
        traces.append(_scatter(mean, mode="lines+markers", name=f"mean path of {whose}", hovertext=texts, **look))
    told = {one["block"]: one for one in reading["readouts"]}
    texts = [theme.hover(f"{what} {stop}", "" if deep else _said(told.get(stop))) for stop in stops]
    ink = colour("memory")
    name = f"block {view['block']}, layer by layer" if deep else "this question, block by block"
    look = {"line": {"color": ink, "width": 2.4}, "marker": {"color": ink, "size": 9}, "textfont": {"color": ink}}
    numbers = {"text": [f"<b>{stop}</b>" for stop in stops], "textposition": "top right"}
    traces.append(_scatter(own, mode="lines+markers+text", name=name, hovertext=texts, **numbers, **look))
    explained = geometry["explained_depth" if deep else "explained_blocks"]
    x, y = ({"title": f"axis {axis + 1} ({percent(explained[axis])} of the variance)"} for axis in pair)
    return theme.figure(traces, x, y | {"scaleanchor": "x"}, 560)


def _scatter(points: Points, **look: Any) -> Any:
    import plotly.graph_objects as go

    look = {"hoverinfo": "text"} | look
    return go.Scatter(x=[point[0] for point in points], y=[point[1] for point in points], **look)


def _known(
    geometry: Mapping[str, Any], view: Mapping[str, str], pair: Sequence[int]
) -> list[tuple[str, str, str, Points]]:
    """Name, symbol, tone and places of what lies under the path."""
    if view["over"] == "depth":
        block = int(view["block"])
        rest = [p for points in geometry["depth"] for k, p in enumerate(points, start=1) if k != block]
        return [("the other blocks, all layers", "circle", "soft", _flat(rest, pair))] if rest else []
    cloud = geometry.get("cloud") or {}
    if pair != [0, 1] or not cloud.get("points") or view["cloud"] == "none":
        return []
    if view["cloud"] == "right":
        groups = [("ends right", "circle", "soft", True), ("ends wrong", "x", "wrong", False)]
    else:
        counts = sorted(set(cloud["steps"]))
        groups = [(f"{n} step{'s' * (n != 1)}", *LOOKS[i % len(LOOKS)], n) for i, n in enumerate(counts)]
    given = list(zip(cloud["points"], cloud[view["cloud"]], strict=True))
    found = [(name, shape, tone, [p for p, own in given if own == value]) for name, shape, tone, value in groups]
    return [group for group in found if group[3]]


def _said(readout: Mapping[str, Any] | None) -> str:
    if readout is None:
        return ""
    right = {True: ", right", False: ", wrong", None: ""}[readout.get("right")]
    return f"answer so far {readout['value']} ({percent(readout['probability'])} sure{right})"


def _flat(points: Points, pair: Sequence[int]) -> Points:
    """The two components that are shown; a point without one of them is left out."""
    return [[point[axis] for axis in pair] for point in points if len(point) > max(pair)]


def _table(geometry: Mapping[str, Any], deep: bool, own: Points, mean: Points) -> Table:
    if deep:
        rows = [
            [layer, k, *(f"{value:.3f}" for value in point)]
            for layer, points in zip(geometry["depth_layers"], geometry["depth"], strict=True)
            for k, point in enumerate(points, start=1)
        ]
        return Table(("layer", "block", "axis 1", "axis 2", "axis 3"), rows)
    header = ["block", "axis 1", "axis 2", "axis 3"] + [f"mean of known problems, axis {n}" for n in (1, 2, 3) if mean]
    rows = [
        [k, *(f"{value:.2f}" for value in [*point, *(mean[k - 1] if mean else ())])]
        for k, point in enumerate(own, start=1)
    ]
    return Table(header, rows)
