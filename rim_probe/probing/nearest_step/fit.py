"""Nearest explicit step: what is fitted on which split, and how the cell of a block is chosen.

Method:
1. Steps of "fit" are read at one layer, `READING_DEPTH` of the model's; the bank is every distinct one of them.
2. A source is where steps are looked for. Each has the same cells and the same features: at every layer K places of M
   states side by side, reduced to `MOST_FEATURES` components where that is more. Sources:
   - the memory: the slots of block k;
   - question tokens: the last M - 1 and one of the K before them (k = 1 are the last M);
   - lone block ends: M end tokens at the positions of block k's slots, each seeing the question and itself alone;
   - the base model's untrained memory; the matched direct model's prompt, its tokens taken as those of the question.
   The last question token alone, with fewer cells and features, is told besides.
3. Every cell has a map (`formula.StepMap`) for every step index, fitted on "fit". The best cell of a block, and of a
   source, is chosen on "choose" by top-1 among the problem's own steps and 20 hard distractors. Splits `fit-heldout`
   and `choose-heldout`, where a study has them, serve as well.
4. Block k is claimed to hold step t where its best cell is within noise of the best block's on "choose": the 95 %
   interval of the difference, place by place, holds zero.

Knows studies, cells and choices. Knows nothing of how a report is made (`results`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rim_probe.errors import RiMError
from rim_probe.probing.compact import is_large, packed, unpacked
from rim_probe.probing.hooks import num_layers, spread_layers
from rim_probe.probing.linear import MOST_FEATURES, Inputs, LinearMap
from rim_probe.probing.nearest_step.formula import (
    REFERENCES,
    Bank,
    Candidates,
    StepMap,
    StepSpace,
    places_of,
    read_places,
    step_space,
)
from rim_probe.probing.rows import Row, read_rows

if TYPE_CHECKING:
    from rim_probe.model import RiM
    from rim_probe.probing.section import Section
    from rim_probe.probing.study import Observation, Study
    from rim_probe.problems import Problem

READING_DEPTH = 2 / 3
FIT_PROBLEMS = 8_000
CHOOSE_PROBLEMS = 600  # to choose by; more cost time and change little
FEWEST_FITTED, FEWEST_ASKED = 30, 10
FIT_DISTRACTORS = 10
CONTEXTS = 12  # readings of each distinct step in its true place, where the data has them
SHOWN = 3  # nearest steps per block
READ_AT_ONCE = 512  # questions
MEMORY = "memory"

# ------------------------------------------------------------------------------------------------------------- sources


def splits_of(study: Study, part: str) -> tuple[str, ...]:
    """The splits that serve as "fit", "choose" or "report".

    Where a study has problems of the report's kind to fit and to choose on, they are used: a map that fails on other
    phrasings tells nothing of what the memory holds.
    """
    held_out = "fit-heldout" in study.splits and "choose-heldout" in study.splits
    if part == "fit":
        return ("fit", "fit-heldout") if held_out else ("fit",)
    return ("choose-heldout",) if part == "choose" and held_out else (part,)


def problems_of(study: Study, part: str) -> list[Problem]:
    """The problems of a part, in the order of its states."""
    return [problem for split in splits_of(study, part) for problem in study.problems(split)]


@dataclass(frozen=True)
class Source:
    """Where steps are looked for.

    Attributes:
        name: as the report has it.
        places: how many at every layer.
        place: what a place, from 1, is called.
        read: (part, layer, place) -> states [n, F].
    """

    name: str
    places: int
    place: Callable[[int], str]
    read: Callable[[str, int, int], np.ndarray]


def memory_source(study: Study, role: str = MEMORY) -> Source:
    """The slots of the blocks of a role."""

    def read(part: str, layer: int, place: int) -> np.ndarray:
        return np.concatenate([study.capture(role, s).cell(layer, place, "slots") for s in splits_of(study, part)])

    name = MEMORY if role == MEMORY else f"{role} model's untrained memory"
    return Source(name, study.K, "block {}".format, read)


def control_sources(study: Study) -> list[Source]:
    """The controls that have cells of their own."""
    rim, K, M = study.models["memory"], study.K, study.M
    tail = range(1 - M - K, 0)  # the last M - 1 + K tokens
    end = rim.encoder.block_ids[-1:]

    def question_row(question: str) -> Row:
        ids = rim.encode_question(question)
        slots = [slot for block in rim.layout.slot_positions(len(ids), K) for slot in block]
        return Row(ids, tail, [(slot, end) for slot in slots])

    def window(place: int) -> list[int]:
        """Which of the tail: the last M - 1 and the one that is `place` before them."""
        return [K - place, *range(K, K + M - 1)]

    def tokens(place: int) -> str:
        return f"token {1 - M - place}" + (f" and the last {M - 1}" if M > 1 else "")

    question = _states(study, "question", rim, question_row)
    sources = [
        Source("last question token", 1, "token -{}".format, lambda part, layer, _: question(part, layer, [K + M - 2])),
        Source(
            f"question tokens, {M} of the last {K + M - 1}",
            K,
            tokens,
            lambda part, layer, k: question(part, layer, window(k)),
        ),
        Source(
            f"lone block ends, {M} at a block's place",
            K,
            "place of block {}".format,
            lambda part, layer, k: question(part, layer, [len(tail) + (k - 1) * M + m for m in range(M)]),
        ),
    ]
    if "base" in study.models:
        sources.append(memory_source(study, "base"))
    if (direct := study.models.get("direct")) is not None:
        prompt = _states(study, "direct", direct, lambda text: Row(direct.prompt_ids(text, "direct"), tail))
        name = f"direct model, {M} of the prompt's last {K + M - 1} tokens"
        sources.append(Source(name, K, tokens, lambda part, layer, k: prompt(part, layer, window(k))))
    return sources


def _states(study: Study, name: str, rim: RiM, row_of: Callable[[str], Row]) -> Callable[..., np.ndarray]:
    """States read at all layers once, kept on disk: (part, layer, columns) -> [n, columns * d].

    Of a model of another depth than the memory's the layers are those as deep in proportion.
    """
    layers = spread_layers(study.layers)
    own = [round(layer * num_layers(rim) / study.layers[-1]) for layer in layers]

    @cache
    def held(part: str) -> np.ndarray:
        """[layers, n, columns, d]"""
        rows = [row_of(problem.question) for problem in problems_of(study, part)]
        file = None
        for start in study.progress(range(0, len(rows), READ_AT_ONCE), f"steps: {name}, {part}"):
            states = np.stack(read_rows(rim, rows[start : start + READ_AT_ONCE], own)).transpose(2, 0, 1, 3)
            if file is None:
                Path(study.folder).mkdir(parents=True, exist_ok=True)
                shape = (len(layers), len(rows), *states.shape[2:])
                file = np.lib.format.open_memmap(study.folder / f"steps-{name}-{part}.npy", "w+", "float32", shape)
            file[:, start : start + READ_AT_ONCE] = states
        return file

    def read(part: str, layer: int, columns: Sequence[int]) -> np.ndarray:
        states = held(part)[layers.index(layer)]
        return states[:, columns].reshape(len(states), -1)

    return read


# ------------------------------------------------------------------------------------------------------------- fitting


@dataclass(frozen=True)
class Task:
    """Step t as a retrieval task.

    Attributes:
        step: t, 1-based.
        rows [n], targets [n, d]: problems of "fit" with that step, and its vectors.
        asked: part -> its places.
    """

    step: int
    rows: np.ndarray
    targets: np.ndarray
    asked: dict[str, Candidates]


@dataclass(frozen=True)
class Cell:
    """A fitted cell.

    Attributes:
        source, layer, place: where its states are read.
        mapped: from these states to steps.
        hits: bool [places of "choose"], whether the nearest candidate is the true step.
        bank_top1: top-1 in the bank on "choose", of the steps that it holds.
    """

    source: Source
    layer: int
    place: int
    mapped: StepMap
    hits: np.ndarray
    bank_top1: float

    @property
    def top1(self) -> float:
        return float(self.hits.mean())

    def __str__(self) -> str:
        return f"layer {self.layer}, {self.source.place(self.place)}"


@dataclass
class Searched:
    """A source's cells.

    Attributes:
        cells: (place, step) -> the best of all layers on "choose".
        top1: step -> top-1 on "choose" [layers, places].
    """

    cells: dict[tuple[int, int], Cell] = field(default_factory=dict)
    top1: dict[int, np.ndarray] = field(default_factory=dict)

    def best(self, step: int) -> Cell:
        return max((cell for (_, t), cell in self.cells.items() if t == step), key=lambda cell: cell.top1)


@dataclass
class Fit:
    """What was read and searched: the tasks, the space, the bank of "fit", the memory's cells."""

    tasks: list[Task]
    space: StepSpace
    references: tuple[str, ...]
    reading_layer: int
    bank: Bank
    memory: Searched = field(default_factory=Searched)


def read_fit(study: Study) -> Fit:
    """Reads the steps of "fit" and "choose".

    Raises:
        RiMError: too few problems with steps.
    """
    rim, rng = study.models["memory"], study.rng("steps")
    layer = round(READING_DEPTH * study.layers[-1])
    rows, to_choose = _drawn(study, "fit", FIT_PROBLEMS), _drawn(study, "choose", CHOOSE_PROBLEMS)
    if len(rows) < FEWEST_FITTED or len(to_choose) < FEWEST_ASKED:
        raise RiMError(
            f"The nearest step needs at least {FEWEST_FITTED} problems with steps to fit and {FEWEST_ASKED} to choose "
            f"by, but there are {len(rows)} and {len(to_choose)}; give more problems with steps."
        )
    problems = problems_of(study, "fit")
    texts = tuple(dict.fromkeys(step for i in rows for step in problems[i].steps))
    references = tuple(texts[i] for i in rng.permutation(len(texts))[:REFERENCES])
    places = places_of(problems, _covering(problems, rng.permutation(rows)), texts, rng, FIT_DISTRACTORS)
    space = step_space(places, read_places(rim, problems, places, references, layer))
    fit = Fit([], space, references, layer, Bank(texts, space.matrix(texts)))
    asked = _asked(study, fit, "choose", to_choose, rng)
    while True:
        step = len(fit.tasks) + 1
        own = np.array([i for i in rows if len(problems[i].steps) >= step], dtype=int)
        candidates = asked(step)
        if len(own) < FEWEST_FITTED or len(candidates.rows) < FEWEST_ASKED:
            return fit
        targets = space.matrix([problems[i].steps[step - 1] for i in own])
        fit.tasks.append(Task(step, own, targets, {"choose": candidates}))


def _drawn(study: Study, part: str, count: int) -> np.ndarray:
    """At most `count` problems of a part that have steps, by number."""
    numbers = np.array([i for i, problem in enumerate(problems_of(study, part)) if problem.steps], dtype=int)
    return np.sort(study.rng(f"steps {part}").permutation(numbers)[:count])


def _covering(problems: Sequence[Problem], order: Sequence[int]) -> list[int]:
    """Of the problems in this order those with which every step occurs `CONTEXTS` times, or as often as it can."""
    seen: dict[str, int] = {}
    chosen = []
    for number in order:
        steps = problems[number].steps
        if any(seen.get(step, 0) < CONTEXTS for step in steps):
            chosen.append(int(number))
            for step in steps:
                seen[step] = seen.get(step, 0) + 1
    return chosen


def _asked(study: Study, fit: Fit, part: str, numbers: Sequence[int], rng) -> Callable[[int], Candidates]:
    """From a step index to the places of a part, read in the problems' own contexts."""
    problems = problems_of(study, part)
    places = places_of(problems, numbers, fit.bank.texts, rng)
    read = read_places(study.models["memory"], problems, places, fit.references, fit.reading_layer)
    return lambda step: Candidates.at(step, places, read, fit.space)


def read_report(study: Study, fit: Fit) -> None:
    """Gives the tasks their places of "report"; those that are asked too seldom are dropped.

    Raises:
        RiMError: none is left.
    """
    numbers = [i for i, problem in enumerate(study.problems("report")) if problem.steps]
    asked = _asked(study, fit, "report", numbers, study.rng("steps report"))
    for task in fit.tasks:
        task.asked["report"] = asked(task.step)
    fit.tasks = [task for task in fit.tasks if len(task.asked["report"].rows) >= FEWEST_ASKED]
    if not fit.tasks:
        raise RiMError(
            f"Fewer than {FEWEST_ASKED} problems of the reported split have steps; give more problems with steps."
        )


def search(study: Study, source: Source, fit: Fit) -> Searched:
    """Fits every cell of a source for every task: the same function for the memory and its controls."""
    layers, found = spread_layers(study.layers), Searched()
    found.top1 = {task.step: np.zeros((len(layers), source.places)) for task in fit.tasks}
    cells = [(i, place) for i in range(len(layers)) for place in range(1, source.places + 1)]
    for i, place in study.progress(cells, f"steps: {source.name}"):
        inputs = Inputs([source.read("fit", layers[i], place)], MOST_FEATURES, study.seed)
        states = source.read("choose", layers[i], place)
        for task in fit.tasks:
            cell = fit_cell(source, layers[i], place, inputs, states, task, fit.bank)
            found.top1[task.step][i, place - 1] = cell.top1
            best = found.cells.get((place, task.step))
            if best is None or cell.top1 > best.top1:
                found.cells[place, task.step] = cell
    return found


def fit_cell(
    source: Source, layer: int, place: int, inputs: Inputs, states: np.ndarray, task: Task, bank: Bank
) -> Cell:
    """One cell and task; `inputs` are its states of "fit", `states` those of "choose"."""
    mapped, asked = StepMap.fit(inputs, task.rows, task.targets), task.asked["choose"]
    hits = asked.ranks(mapped.recalled(states[asked.rows], bank.vectors)) <= 0
    in_bank = bank.ranks(mapped, states[asked.rows], asked.texts)
    known = in_bank[~np.isnan(in_bank)]
    return Cell(source, layer, place, mapped, hits, float((known <= 0).mean()) if len(known) else 0.0)


def claimed(cells: Mapping[tuple[int, int], Cell]) -> dict[int, list[int]]:
    """Step -> blocks that are as near as the nearest one, noise aside; `cells` by (block, step)."""
    claims = {}
    for step in sorted({step for _, step in cells}):
        own = {block: cell.hits.astype(float) for (block, t), cell in cells.items() if t == step}
        nearest = max(own.values(), key=np.mean)
        short = {block: nearest - hits for block, hits in own.items()}
        claims[step] = sorted(b for b, lost in short.items() if lost.mean() <= 1.96 * lost.std() / np.sqrt(len(lost)))
    return claims


# --------------------------------------------------------------------------------------------------------- the decoder


@dataclass(frozen=True)
class BlockMap:
    """How step t is read in block k.

    Attributes:
        layer, mapped: where, and the map of its slots.
        accuracy: top-1 in the bank on "choose", of the problems whose step it holds.
        alignment: top-1 among own steps and distractors on "choose".
        coverage: the share of the problems of "choose" with that step whose step the bank holds.
    """

    layer: int
    mapped: StepMap
    accuracy: float
    alignment: float
    coverage: float


class StepDecoder:
    """Maps from memory blocks to explicit steps; see the head of this module.

    Attributes:
        bank: the distinct steps it retrieves from, and their vectors.
        maps: (block, step) -> how it is read.
        claims: step t (1-based) -> the blocks claimed to hold it.
        reading_layer: where explicit steps are read.
    """

    def __init__(
        self, bank: Bank, maps: Mapping[tuple[int, int], BlockMap], claims: Mapping[int, list[int]], reading_layer: int
    ):
        self.bank, self.maps, self.claims, self.reading_layer = bank, dict(maps), dict(claims), reading_layer
        self._fit: Fit | None = None

    @classmethod
    def fit(cls, study: Study) -> StepDecoder:
        """Searches the memory's cells and chooses by "choose".

        Raises:
            RiMError: too few problems with steps.
        """
        fit = read_fit(study)
        fit.memory = search(study, memory_source(study), fit)
        held, maps = set(fit.bank.texts), {}
        coverage = {t.step: float(np.mean([text in held for text in t.asked["choose"].texts])) for t in fit.tasks}
        for (block, step), cell in sorted(fit.memory.cells.items()):
            maps[block, step] = BlockMap(cell.layer, cell.mapped, cell.bank_top1, cell.top1, coverage[step])
        decoder = cls(fit.bank, maps, claimed(fit.memory.cells), fit.reading_layer)
        decoder._fit = fit
        return decoder

    def score(self, study: Study) -> Section:
        """The report; of a restored decoder everything is fitted anew first.

        Raises:
            RiMError: too few problems with steps in split "report".
        """
        from rim_probe.probing.nearest_step.results import report

        return report(study, self, self._fit or StepDecoder.fit(study)._fit)

    def explain(self, observation: Observation, steps: Sequence[str] | None = None) -> dict[str, Any]:
        """Nearest explicit steps of every block.

        Args:
            steps: the question's gold steps, where they are known.

        Returns:
            `bank`: how many steps it was retrieved from; `reading_layer`; `blocks`, one dict per block: `block`;
            `step`, the index it is decoded for (the one that the block lies nearest to beside the other blocks);
            `cell`; `accuracy` and `coverage`, see `BlockMap`; `nearest`, the `SHOWN` nearest steps with `step`,
            `cosine` and `gold` (the 1-based gold step it equals, 0 for none, None where no gold steps are known);
            `match`, whether the nearest one is the gold step of that index (None without it); `others`, the same for
            the other indices.
        """
        blocks = []
        for block in sorted({block for block, _ in self.maps if block <= observation.capture.K}):
            decodes = {t: self._decode(observation, block, t, steps) for own, t in self.maps if own == block}
            headline = decodes.pop(self.headline(block))
            blocks.append({"block": block, **headline, "others": list(decodes.values())})
        return {"bank": len(self.bank.texts), "reading_layer": self.reading_layer, "blocks": blocks}

    def _decode(self, observation: Observation, block: int, t: int, steps: Sequence[str] | None) -> dict[str, Any]:
        one = self.maps[block, t]
        states = observation.capture.cell(one.layer, block, "slots")
        cosines = one.mapped.cosines(states, self.bank.vectors)[0]
        nearest = [
            {"step": self.bank.texts[i], "cosine": float(cosines[i]), "gold": _gold(self.bank.texts[i], steps)}
            for i in np.argsort(-cosines, kind="stable")[:SHOWN]
        ]
        return {
            "step": t,
            "cell": f"layer {one.layer}, block {block}, slots",
            "accuracy": one.accuracy,
            "coverage": one.coverage,
            "nearest": nearest,
            "match": nearest[0]["step"] == steps[t - 1] if steps and t <= len(steps) else None,
        }

    def headline(self, block: int) -> int:
        """The step that a block lies nearest to: where it falls least short of the best block, then where it is nearest
        in itself, then the earlier one."""

        def shortfall(step: int) -> tuple[float, float]:
            own = self.maps[block, step].alignment
            return max(one.alignment for (_, t), one in self.maps.items() if t == step) - own, -own

        return min(sorted(step for own, step in self.maps if own == block), key=shortfall)

    # ------------------------------------------------------------------------------------------------------- artifacts

    def tensors(self) -> dict[str, np.ndarray]:
        """What `restore` needs: the bank's vectors, one map per block and step; in 8 bits where they are large."""
        arrays = {"bank": self.bank.vectors}
        for (block, step), one in self.maps.items():
            to = one.mapped.to_directions
            arrays |= {f"{block}.{step}.weights": to.weights, f"{block}.{step}.keys": one.mapped.keys}
        large = is_large(arrays.values())
        stored = {}
        for name, array in arrays.items():
            stored |= packed(name, array) if large else {name: array}
        return stored | {f"{k}.{t}.bias": one.mapped.to_directions.bias for (k, t), one in self.maps.items()}

    def settings(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "texts": list(self.bank.texts),
            "reading_layer": self.reading_layer,
            "claims": {str(step): blocks for step, blocks in self.claims.items()},
            "maps": [
                {"block": block, "step": step}
                | {name: getattr(one, name) for name in ("layer", "accuracy", "alignment", "coverage")}
                for (block, step), one in self.maps.items()
            ],
        }

    @classmethod
    def restore(cls, tensors: Mapping[str, np.ndarray], settings: Mapping[str, Any]) -> StepDecoder:
        """A decoder from `tensors` and `settings`.

        Raises:
            RiMError: parts that are missing, or of another version.
        """
        try:
            maps = {}
            for one in settings["maps"]:
                at = (one["block"], one["step"])
                weights, bias, keys = (
                    unpacked(tensors, f"{at[0]}.{at[1]}.{part}") for part in ("weights", "bias", "keys")
                )
                told = [one[name] for name in ("accuracy", "alignment", "coverage")]
                maps[at] = BlockMap(one["layer"], StepMap(LinearMap(weights, bias), keys), *told)
            bank = Bank(tuple(settings["texts"]), unpacked(tensors, "bank"))
            claims = {int(step): list(blocks) for step, blocks in settings["claims"].items()}
            return cls(bank, maps, claims, settings["reading_layer"])
        except (KeyError, ValueError, TypeError) as error:
            raise RiMError(f"The nearest-step decoder cannot be restored ({error!r}); fit it anew.") from None


def _gold(text: str, steps: Sequence[str] | None) -> int | None:
    """Which gold step (1-based) the text is, 0 for none, None where none are known."""
    if not steps:
        return None
    return next((t for t, step in enumerate(steps, start=1) if step == text), 0)
