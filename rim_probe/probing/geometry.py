"""Geometry: which shape the states of the memory blocks have, and whether training made it.

Method (the PCA analysis of arXiv:2605.30343: untrained blocks collapsed, trained ones on smooth, block-specific,
question-dependent paths):
1. The state of a block at a layer is its M slots side by side, [M * d].
2. Two bases of principal components, fitted on the fit split: over blocks (penultimate layer) and over depth (layers
   1..L, each layer divided by its root mean square, since the residual stream grows).
3. On the report split, trained (`memory`) beside untrained (`base`):
   - displacement |s_K - s_1| over the mean norm of a state, and over the length of the path s_1..s_K (straightness);
   - shares of variance: between blocks (their means over questions), between questions (their means over blocks), and
     the rest, which is what makes a path both block-specific and question-dependent;
   - participation ratio (sum of eigenvalues)^2 / sum of squares of the covariance over questions, block means removed:
     how many directions questions spread over;
   - similarity of blocks j and k: cosine of their states after removal of the block means, the same question; the
     control is the cosine across different questions. Beside it the cosine of the states as they are, means kept.
   Differences trained - untrained are paired: both answer the same questions, which are drawn together.
4. The published claim (untrained blocks collapsed) predicts the sign of five differences (`CLAIM`); it counts as
   confirmed where all five intervals lie on its side of 0. Each is named, for it or against it.
Intervals: bootstrap over questions; for the participation ratio the jackknife (Efron & Tibshirani 1993, ch. 11), since
questions drawn twice would count as parallel and pull it down.

Knows states. Knows nothing of what they mean; right and wrong only colour the picture.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rim_probe.errors import RiMError
from rim_probe.probing.capture import Capture, CaptureSet
from rim_probe.probing.results import Cloud, Estimate, Report, Result, bootstrap, mean_estimate
from rim_probe.probing.study import Observation, Study

COMPONENTS = 3
FIT_PROBLEMS = 1000
REPORT_PROBLEMS = 500  # the participation ratio compares all pairs
CLOUD_PROBLEMS = 500
DRAWS = 500
ROLES = {"memory": "trained", "base": "untrained"}
DISPLACEMENT, STRAIGHTNESS = "displacement first to last block, in norms", "straightness: displacement over path length"
DIMENSIONS, TOGETHER = "participation ratio over questions", "share of variance of block and question together"

BY_LAYER = (DISPLACEMENT, DIMENSIONS, TOGETHER)
ACROSS = "cosine between blocks, different questions"
BETWEEN, BETWEEN_KEPT = "cosine between blocks, same question", "cosine between blocks, same question, block means kept"
# The sign of trained - untrained where untrained blocks are collapsed, and how the measure is said.
CLAIM = {
    DISPLACEMENT: (1, "movement from first to last block"),
    BETWEEN_KEPT: (-1, "cosine between blocks (means kept)"),
    BETWEEN: (-1, "cosine between blocks (means removed)"),
    DIMENSIONS: (1, "participation ratio"),
    TOGETHER: (1, "variance of block and question together"),
}


def block_states(capture: Capture | CaptureSet, layer: int, rows: np.ndarray | slice = slice(None)) -> np.ndarray:
    """States of all blocks at a layer, float32 [n, K, M * d]."""
    return np.stack([capture.cell(layer, block, "slots")[rows] for block in range(1, capture.K + 1)], axis=1)


@dataclass(frozen=True)
class Basis:
    """Principal components: mean [F], components [3, F], share of variance each explains [3]."""

    mean: np.ndarray
    components: np.ndarray
    explained: np.ndarray

    @classmethod
    def fit(cls, states: np.ndarray) -> "Basis":
        """Of states [..., F]."""
        from sklearn.decomposition import PCA

        flat = states.reshape(-1, states.shape[-1])
        found = PCA(min(COMPONENTS, *flat.shape), random_state=0).fit(flat)
        components, explained = found.components_, np.nan_to_num(found.explained_variance_ratio_)
        # The sign of a component is arbitrary: its largest entry is made positive.
        largest = np.abs(components).argmax(axis=1)
        components = components * np.sign(components[np.arange(len(components)), largest])[:, None]
        missing = COMPONENTS - len(components)
        return cls(
            found.mean_.astype(np.float32),
            np.pad(components, ((0, missing), (0, 0))).astype(np.float32),
            np.pad(explained, (0, missing)).astype(np.float32),
        )

    def project(self, states: np.ndarray) -> np.ndarray:
        """[..., F] -> [..., 3]."""
        return (states - self.mean) @ self.components.T


@dataclass(frozen=True)
class Geometry:
    """Bases of principal components and a cloud of known questions.

    Attributes:
        layer: the layer of the basis over blocks.
        over_blocks, over_depth: the bases.
        scale [L + 1]: root mean square of a state by layer, which the basis over depth divides by.
        cloud [c, K, 3]: questions of the report split in the basis over blocks.
        cloud_right [c]: whether the final readout is right; cloud_steps [c]: number of gold steps.
    """

    layer: int
    over_blocks: Basis
    over_depth: Basis
    scale: np.ndarray
    cloud: np.ndarray
    cloud_right: np.ndarray
    cloud_steps: np.ndarray

    @classmethod
    def fit(cls, study: Study) -> "Geometry":
        layer = study.layers[max(len(study.layers) - 2, 0)]
        capture = study.capture("memory", "fit")
        rows = _some(study, "fit", FIT_PROBLEMS)
        scale = np.ones(len(study.layers), dtype=np.float32)
        deep = []
        for number in study.progress(study.layers, "geometry"):
            states = block_states(capture, number, rows)
            scale[number] = max(float(np.sqrt((states**2).mean())), 1e-12)
            if number > 0:  # embeddings of slots are the same for every question
                deep.append(states[::3] / scale[number])
            if number == layer:
                over_blocks = Basis.fit(states)
        over_depth = Basis.fit(np.stack(deep))
        shown = _some(study, "report", CLOUD_PROBLEMS)
        cloud = over_blocks.project(block_states(study.capture("memory", "report"), layer, shown))
        steps = np.array([len(study.problems("report")[i].steps) for i in shown])
        right = study.right("report")[shown, -1]
        return cls(layer, over_blocks, over_depth, scale, cloud.astype(np.float32), right, steps)

    def score(self, study: Study) -> Report:
        """Trained beside untrained on the report split, layer by layer and at `layer`."""
        rows = _some(study, "report", REPORT_PROBLEMS)
        roles = {role: name for role, name in ROLES.items() if role in study.models}
        states = {role: block_states(study.capture(role, "report"), self.layer, rows) for role in roles}
        results, apart = [], {}
        if len(roles) == 2:
            apart = differences(states["memory"], states["base"], study.seed)
            results += [_result(f"{name}, trained - untrained", "paired", found) for name, found in apart.items()]
        for role, name in roles.items():
            for layer in study.progress(study.layers[1:], f"geometry {role}"):
                found = measure(block_states(study.capture(role, "report"), layer, rows), study.seed)
                if layer == max(self.layer, 1):
                    results = [_result(metric, name, one, role) for metric, one in found.items()] + results
                results += [_result(metric, name, found[metric], role, {"layer": layer}) for metric in BY_LAYER]
            results += [
                _result("cosine between blocks", name, one, role, {"block": j + 1, "other block": k + 1})
                for (j, k), one in pairwise_cosines(states[role]).items()
            ]
        return Report(
            "geometry",
            results,
            {"fit": min(FIT_PROBLEMS, len(study.problems("fit"))), "report": len(rows)},
            {
                "state": "the slots of a block side by side",
                "layer": self.layer,
                "intervals": "over questions: bootstrap, participation ratio: jackknife",
                "variance explained, over blocks": _rounded(self.over_blocks.explained),
                "variance explained, over depth": _rounded(self.over_depth.explained),
            },
            verdict=_verdict(apart) if apart else "",
            clouds=self._clouds(study, rows),
        )

    def explain(self, observation: Observation) -> dict[str, Any]:
        """The question's path through both bases; JSON-ready.

        Returns:
            {"layer", "blocks" [K][3], "depth_layers", "depth" [layers 1..L][K][3], "explained_blocks" [3],
            "explained_depth" [3], "cloud" {"points" [c][2], "right" [c], "steps" [c], "n"}: known questions at the last
            block that the geometry was fitted with, in the first two components; "mean_path" [blocks][3]: their mean}.
        """
        capture = observation.capture
        over_blocks = self.over_blocks.project(block_states(capture, self.layer))[0]
        layers = [layer for layer in capture.layers if layer > 0]
        depth = [self.over_depth.project(block_states(capture, layer)[0] / self.scale[layer]) for layer in layers]
        return {
            "layer": self.layer,
            "blocks": _rounded(over_blocks),
            "depth_layers": layers,
            "depth": [_rounded(points) for points in depth],
            "explained_blocks": _rounded(self.over_blocks.explained),
            "explained_depth": _rounded(self.over_depth.explained),
            "cloud": {
                "points": _rounded(self.cloud[:, -1, :2]),
                "right": self.cloud_right.tolist(),
                "steps": self.cloud_steps.tolist(),
                "n": len(self.cloud),
            },
            "mean_path": _rounded(self.cloud.mean(axis=0)),
        }

    def tensors(self) -> dict[str, np.ndarray]:
        bases = {
            f"{name}.{part}": getattr(basis, part)
            for name, basis in (("over_blocks", self.over_blocks), ("over_depth", self.over_depth))
            for part in ("mean", "components", "explained")
        }
        return bases | {
            "scale": self.scale,
            "cloud": self.cloud,
            "cloud_right": self.cloud_right.astype(np.uint8),
            "cloud_steps": self.cloud_steps.astype(np.int32),
        }

    def settings(self) -> dict[str, Any]:
        return {"layer": self.layer}

    @classmethod
    def restore(cls, tensors: Mapping[str, np.ndarray], settings: Mapping[str, Any]) -> "Geometry":
        """The geometry that `tensors` and `settings` came from.

        Raises:
            RiMError: parts that are missing or do not fit together.
        """
        try:
            bases = [
                Basis(*(np.asarray(tensors[f"{name}.{part}"]) for part in ("mean", "components", "explained")))
                for name in ("over_blocks", "over_depth")
            ]
            if any(basis.components.shape != (COMPONENTS, len(basis.mean)) for basis in bases):
                raise ValueError("components of another size than their mean")
            cloud = np.asarray(tensors["cloud"])
            right, steps = np.asarray(tensors["cloud_right"]).astype(bool), np.asarray(tensors["cloud_steps"])
            return cls(int(settings["layer"]), *bases, np.asarray(tensors["scale"]), cloud, right, steps)
        except (KeyError, ValueError, TypeError) as error:
            raise RiMError(f"The geometry cannot be restored ({error}); fit it anew.") from None

    def _clouds(self, study: Study, rows: np.ndarray) -> dict[str, Cloud]:
        """Final blocks of questions, and mean paths over the blocks and over the layers, in two components each."""
        last, capture = self.cloud[:, -1], study.capture("memory", "report")
        deep = np.stack(
            [self.over_depth.project(block_states(capture, x, rows) / self.scale[x]) for x in study.layers[1:]], axis=2
        ).mean(axis=0)  # [K, L, 3]
        finals = {"right": last[self.cloud_right], "wrong": last[~self.cloud_right]}
        paths = {f"{t} steps": self.cloud[self.cloud_steps == t].mean(axis=0) for t in np.unique(self.cloud_steps)}
        return {
            f"Final block of {len(last)} questions, layer {self.layer}": _cloud(self.over_blocks, finals),
            f"Mean path from block 1 to {study.K} by number of steps, layer {self.layer}": _cloud(
                self.over_blocks, paths
            ),
            f"Mean path of each block from layer 1 to {study.layers[-1]}": _cloud(
                self.over_depth, {f"block {k + 1}": path for k, path in enumerate(deep)}
            ),
        }


def _cloud(basis: Basis, points: Mapping[str, np.ndarray]) -> Cloud:
    x, y = (f"component {i + 1} ({basis.explained[i]:.0%} of variance)" for i in (0, 1))
    return Cloud(x, y, {name: (_rounded(at[:, 0]), _rounded(at[:, 1])) for name, at in points.items()})


def _result(
    metric: str, of: str, found: Estimate, role: str = "memory", place: Mapping[str, int] | None = None
) -> Result:
    control = role == "base" or metric == ACROSS
    share = metric.startswith("share of variance")
    return Result(metric, of, found, "control" if control else "score", share, place=place or {})


# ----------------------------------------------------------------------------------------------------------- measures


def measure(states: np.ndarray, seed: int = 0) -> dict[str, Estimate]:
    """The measures of step 3 for states [n, K, F], each with its interval over questions."""
    found = {
        name: bootstrap(arrays, statistic, seed=seed, draws=DRAWS)
        for name, (arrays, statistic) in _statistics(states).items()
    }
    return _with_dimensions(found, *_leave_one_out(states))


def differences(trained: np.ndarray, untrained: np.ndarray, seed: int = 0) -> dict[str, Estimate]:
    """The measures of `trained` less those of `untrained`, states [n, K, F] of the same questions drawn together."""
    found, base = {}, _statistics(untrained)
    for name, (arrays, statistic) in _statistics(trained).items():
        count = len(arrays)

        def apart(*drawn, count=count, statistic=statistic) -> float:
            return statistic(*drawn[:count]) - statistic(*drawn[count:])

        found[name] = bootstrap((*arrays, *base[name][0]), apart, seed=seed, draws=DRAWS)
    (value, without), (base_value, base_without) = _leave_one_out(trained), _leave_one_out(untrained)
    return _with_dimensions(found, value - base_value, without - base_without)


def _statistics(states: np.ndarray) -> dict[str, tuple[tuple[np.ndarray, ...], Callable[..., float]]]:
    """By measure (all but the participation ratio): each question's numbers [n], and the statistic of them."""
    states = states.astype(np.float64)
    norm = np.linalg.norm(states, axis=2).mean(axis=1)
    moved = np.linalg.norm(states[:, -1] - states[:, 0], axis=1)
    path = np.linalg.norm(np.diff(states, axis=1), axis=2).sum(axis=1)
    between, across = _cosines(states - states.mean(axis=0))

    def ratio(above: np.ndarray, below: np.ndarray) -> float:
        return float(above.mean() / below.mean()) if below.mean() else float("nan")

    squares = _variance_parts(states)
    return {
        DISPLACEMENT: ((moved, norm), ratio),
        STRAIGHTNESS: ((moved, path), ratio),
        **{
            f"share of variance {name}": (squares, lambda *parts, i=i: parts[i].mean() / _total(parts))
            for i, name in enumerate(("between blocks", "between questions", "of block and question together"))
        },
        BETWEEN: ((between,), np.mean),
        ACROSS: ((across,), np.mean),
        BETWEEN_KEPT: ((_cosines(states)[0],), np.mean),
    }


def _leave_one_out(states: np.ndarray) -> tuple[float, np.ndarray]:
    """The participation ratio of all questions, and without each of them [n] (block means as they are)."""
    states = states.astype(np.float64)
    trace, overlap = _overlaps(states - states.mean(axis=0))
    traces = trace.sum() - trace
    totals = overlap.sum() - 2 * overlap.sum(axis=1) + np.diag(overlap)
    value = float(trace.sum() ** 2 / overlap.sum()) if overlap.sum() > 0 else float("nan")
    return value, np.divide(traces**2, totals, out=np.full(len(trace), np.nan), where=totals > 0)


def _with_dimensions(found: dict[str, Estimate], value: float, without: np.ndarray) -> dict[str, Estimate]:
    """`found` and the participation ratio with its 95 % jackknife interval, from its values without each question."""
    n = len(without)
    half = 1.96 * float(np.sqrt((n - 1) * without.var()))
    return found | {DIMENSIONS: Estimate(value, value - half, value + half, n)}


def pairwise_cosines(states: np.ndarray) -> dict[tuple[int, int], Estimate]:
    """Mean cosine of blocks j and k (from 0) of the same question, block means removed, each with its interval."""
    unit = _unit(states - states.mean(axis=0))
    cosines = np.einsum("njf,nkf->njk", unit, unit)
    return {(j, k): mean_estimate(cosines[:, j, k]) for j, k in np.ndindex(cosines.shape[1:])}


def _variance_parts(states: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each question's part [n] in the three sums of squares of the two-way layout question x block.

    The part between blocks is the same for every question: it is fixed by all of them.
    """
    grand = states.mean(axis=(0, 1))
    blocks, questions = states.mean(axis=0) - grand, states.mean(axis=1) - grand
    rest = states - grand - blocks - questions[:, None]
    sums = (
        np.full(len(states), (blocks**2).sum(axis=1).mean()),
        (questions**2).sum(axis=1),
        (rest**2).sum(axis=2).mean(axis=1),
    )
    return sums


def _total(parts: Sequence[np.ndarray]) -> float:
    return max(sum(part.mean() for part in parts), 1e-30)


def _overlaps(centred: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For the participation ratio (tr C)^2 / tr C^2: each question's part in tr C [n] and each pair's in tr C^2."""
    n, blocks, _ = centred.shape
    flat = centred.reshape(n * blocks, -1)
    gram = flat @ flat.T
    pairs = (gram**2).reshape(n, blocks, n, blocks).sum(axis=(1, 3))
    return (centred**2).sum(axis=(1, 2)), pairs


def _cosines(centred: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean cosine over pairs of different blocks [n]: of the same question, and of each question with the next one."""
    unit = _unit(centred)
    blocks = unit.shape[1]
    if blocks == 1:
        return np.full(len(unit), np.nan), np.full(len(unit), np.nan)
    other = ~np.eye(blocks, dtype=bool)
    same = np.einsum("njf,nkf->njk", unit, unit)[:, other].mean(axis=1)
    across = np.einsum("njf,nkf->njk", unit, np.roll(unit, 1, axis=0))[:, other].mean(axis=1)
    return same, across


def _unit(states: np.ndarray) -> np.ndarray:
    return states / np.maximum(np.linalg.norm(states, axis=-1, keepdims=True), 1e-30)


def _some(study: Study, split: str, count: int) -> np.ndarray:
    """Indices of at most `count` problems of a split, ascending."""
    total = len(study.problems(split))
    return np.sort(study.rng(f"geometry/{split}").permutation(total)[:count])


def _rounded(values: np.ndarray) -> list:
    return np.round(np.asarray(values, dtype=float), 4).tolist()


def _verdict(apart: Mapping[str, Estimate]) -> str:
    """Whether the published claim holds, measure by measure."""
    sides: dict[str, list[str]] = {"for it": [], "against it": [], "undecided": []}
    for name, (sign, words) in CLAIM.items():
        low, high = sorted((sign * apart[name].low, sign * apart[name].high))
        side = "for it" if low > 0 else "against it" if high < 0 else "undecided"
        sides[side].append(f"{words} (trained - untrained {apart[name].value:+.2f})")
    confirmed = "confirmed" if len(sides["for it"]) == len(CLAIM) else "not confirmed"
    told = "; ".join(f"{side}: {', '.join(names)}" for side, names in sides.items() if names)
    return f"The published claim that untrained blocks are collapsed is {confirmed} here; {told}."
