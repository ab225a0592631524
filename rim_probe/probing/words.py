"""Own words: what the model itself says after block k, and whether those words come from the memory.

Method:
1. The memory model's readouts, and those of the stage-1 model on the same questions: in stage 1 readout k is trained to
   state step k + 1 (the last one the answer). Share of readouts that state the gold step, white space aside, whole and
   exact. Control: the step k + 1 of another problem.
2. Patchscope (Ghandeharioun et al. 2024, arXiv:2401.06102): the memory model's states of blocks 1..k are put into the
   stage-1 model's pass over a question with k blocks, in the same places, and readout k is decoded greedily. Readout k
   sees no other blocks, so at "every layer" all it can read in memory is the carried one. Carried are the slots, or the
   slots and the end tokens (which also choose the readout's first word).
3. Whose words are they? The states go into (a) the run on their own question, (b) the run on ANOTHER question, where
   words that come from memory state the donor's step and words that come from the question the asked problem's, (c) the
   run on one neutral question. Beside them the unpatched stage-1 model. The single layer, and the row
   that is summed up, are chosen on "choose" by (b).
4. Readouts of one problem are not independent of each other: intervals of carried words draw whole problems.

Knows readouts, hooks and gold steps. Knows nothing of probes, probabilities or attention.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from rim_probe.decoding import Answer, answer_batch
from rim_probe.errors import RiMError
from rim_probe.model import RiM
from rim_probe.probing.curves import curve
from rim_probe.probing.hooks import causal_lm, edit_residual, layers_told, spread_layers
from rim_probe.probing.section import Estimate, Figure, Section, Table, bootstrap, proportion_estimate

if TYPE_CHECKING:
    from rim_probe.probing.study import Observation, Study
    from rim_probe.problems import Problem

BATCH = 64
CHOOSE_QUESTIONS = 150
REPORT_QUESTIONS = 500
MOST_BLOCKS = 3  # blocks whose carried words are decoded
FEWEST_PROBLEMS = 30
EVERY = "every layer"
CARRIED = ("slots", "slots and ends")


def same_words(first: str, second: str) -> bool:
    """Whether two texts are equal, white space aside."""
    return "".join(first.split()) == "".join(second.split())


def carried_words(
    rim: RiM,
    questions: Sequence[str],
    states: Mapping[int, np.ndarray | torch.Tensor],
    *,
    max_new_tokens: int = 64,
) -> list[str]:
    """What `rim` says after k blocks whose states in the residual stream were replaced.

    Args:
        states: layer 0..L -> [n, k, P, d], the states of blocks 1..k: P = M for the slots, M + 1 with the end last.

    Returns:
        Readout k of every question.

    Raises:
        RiMError: states of another shape than the questions and the layout ask for; questions that cannot be asked.
    """
    slots, length = rim.layout.slots_per_block, rim.layout.block_length
    shapes = {tuple(given.shape[:3]) for given in states.values()}
    if len(shapes) != 1 or (shape := shapes.pop())[0] != len(questions) or shape[2] not in (slots, slots + 1):
        raise RiMError(
            f"Carried states must be [{len(questions)} questions, blocks, {slots} slots (and 1 end), width] at every "
            "layer; take them from a capture of as many questions."
        )
    blocks, positions = shape[1:]
    # Prompts are padded on the left, so the blocks of all rows end in the last columns.
    columns = [-(blocks - block) * length + 1 + place for block in range(blocks) for place in range(positions)]
    said = []
    for start in range(0, len(questions), BATCH):
        part = questions[start : start + BATCH]
        held = {layer: torch.as_tensor(given[start : start + BATCH]).flatten(1, 2) for layer, given in states.items()}
        with edit_residual(rim, {layer: _once(given, columns, range(len(part))) for layer, given in held.items()}):
            answers = answer_batch(rim, part, "memory", num_blocks=blocks, max_new_tokens=max_new_tokens)
        said += [answer.text for answer in answers]
    return said


def _once(states: torch.Tensor, columns: list[int], rows: Sequence[int]):
    """An edit of the first pass alone (later passes hold the readout's own tokens): states [rows, columns, d]."""
    left = [states]

    def edit(stream: torch.Tensor) -> torch.Tensor:
        if left:
            stream = stream.clone()
            stream[torch.tensor(rows)[:, None], torch.tensor(columns)] = left.pop().to(stream)
        return stream

    return edit


def carried_states(held, blocks: int, layers: Sequence[int], ends: bool) -> dict[int, np.ndarray]:
    """The states of blocks 1..`blocks` of a capture as `carried_words` takes them: layer -> [n, blocks, P, d]."""
    places = [*range(1, held.M + 1), *(["end"] if ends else [])]
    return {
        layer: np.stack(
            [np.stack([held.cell(layer, block, place) for place in places], 1) for block in range(1, blocks + 1)], 1
        )
        for layer in layers
    }


# ----------------------------------------------------------------------------------------------------- one question


def carried_answers(
    rim: RiM, observation: Observation, variants: Sequence[Sequence[int]], *, max_new_tokens: int = 64
) -> list[Answer]:
    """What `rim` answers to one question with the slots of another run of it carried in, all variants in one batch.

    Readout k sees blocks 1..k alone, so with all K blocks carried it is the one that `carried_words` gives for blocks
    1..k, and one row per variant tells all K.

    Args:
        observation: whose slots are carried, into the same question with as many blocks.
        variants: for each the layers 0..L at which slots are replaced; () carries nothing.

    Returns:
        One answer per variant, with all K readouts.

    Raises:
        RiMError: a question that this model cannot be asked, or slots of another shape than its own.
    """
    held = observation.capture
    if rim.layout.slots_per_block != held.M or held.slots.shape[-1] != causal_lm(rim).config.hidden_size:
        raise RiMError(f"The slots do not fit into {rim.name}, which has others; take them from a model of its shape.")
    columns = [
        column - held.K * rim.layout.block_length for block in rim.layout.slot_positions(0, held.K) for column in block
    ]
    said: list[Answer] = []
    for start in range(0, len(variants), BATCH):
        part = variants[start : start + BATCH]
        edits = {}
        for layer in sorted({layer for layers in part for layer in layers}):
            rows = [row for row, layers in enumerate(part) if layer in layers]
            slots = held.slots[0, held.layers.index(layer)].flatten(0, 1)
            edits[layer] = _once(slots.expand(len(rows), -1, -1), columns, rows)
        with edit_residual(rim, edits):
            said += answer_batch(
                rim, [observation.question] * len(part), "memory", num_blocks=held.K, max_new_tokens=max_new_tokens
            )
    return said


def explain(observation: Observation, plain: Answer | None = None, carried: Answer | None = None) -> dict[str, Any]:
    """What is said after every block of one question.

    Args:
        plain, carried: by the stage-1 model where there is one (`carried_answers`): as it is, and with this model's
            slots at every layer.

    Returns:
        {"blocks": [{"block", "memory", "stage1", "carried"}]}: the readouts as text; None where there is none.
    """
    given = {"memory": observation.answer, "stage1": plain, "carried": carried}
    texts = {
        name: {} if told is None else {readout.block: readout.text.strip() for readout in told.readouts}
        for name, told in given.items()
    }
    return {
        "blocks": [
            {"block": block, **{name: said.get(block) for name, said in texts.items()}}
            for block in range(1, observation.capture.K + 1)
        ]
    }


# --------------------------------------------------------------------------------------------------------- the section


def score(study: Study) -> Section:
    """Match rates of readouts and of carried words on "report"; see the head of this module.

    Raises:
        RiMError: no problem with at least two steps.
    """
    problems = study.problems("report")
    if not any(len(problem.steps) > 1 for problem in problems):
        raise RiMError("No problem has two steps or more, so no readout can state one; give problems with their steps.")
    said = {"memory": [[r.text for r in answer.readouts] for answer in study.answers("memory", "report")]}
    if "stage1" in study.models:
        said["stage1"] = _readouts(study, "stage1", [problem.question for problem in problems])
    tables, figures, data, summary = [], [], {}, []
    donors = _partners(problems, study.rng("words partners"))
    tables.append(_readout_table(study, said, problems, donors))
    for role, texts in said.items():
        figures.append(_said_heatmap(study, role, texts, problems))
        steps = [same_words(own[0], p.steps[1]) for own, p in zip(texts, problems, strict=True) if len(p.steps) > 1]
        summary.append(
            f"Readout 1 of the {_NAMES[role]} states step 2 for {np.mean(steps):.0%} of the problems that have one."
        )
    n = {"report": len(problems)}
    settings: dict[str, Any] = {}
    if "stage1" in study.models:
        patch = _Patchscope(study)
        tables.append(patch.table())
        figures.append(patch.figure())
        summary.append(patch.summary())
        n |= {"choose": len(patch.asked["choose"]), "carried": len(patch.asked["report"])}
        settings = {
            "layer chosen on choose": patch.chosen,
            "variant chosen on choose": _variant(*patch.best),
            "variants searched": len(patch.by_layer),
            **({} if patch.looked == "all layers" else {"single layers searched": patch.looked}),
        }
        data["carried"] = patch.data()
    return Section(
        name="words",
        title="Own words",
        question="What does the model itself say after block k, is it the step, and do the words come from the memory?",
        summary=" ".join(summary),
        n=n,
        settings=settings,
        tables=tables,
        figures=figures,
        data=data,
    )


_NAMES = {"memory": "memory model", "stage1": "stage-1 model"}


def _readouts(study: Study, role: str, questions: Sequence[str]) -> list[list[str]]:
    """All K readouts of every question by a model of memory blocks, [n][K]."""
    order = sorted(range(len(questions)), key=lambda i: len(questions[i]))
    said: dict[int, list[str]] = {}
    for batch in study.progress([order[i : i + BATCH] for i in range(0, len(order), BATCH)], f"words {role}"):
        answers = answer_batch(study.models[role], [questions[i] for i in batch], "memory", num_blocks=study.K)
        said |= {i: [r.text for r in answer.readouts] for i, answer in zip(batch, answers, strict=True)}
    return [said[i] for i in range(len(questions))]


def _partners(problems: Sequence[Problem], rng: np.random.Generator) -> list[int]:
    """For every problem another one with as many steps that shares none of them in the same place; itself if none."""
    found = list(range(len(problems)))
    for count in sorted({len(problem.steps) for problem in problems}):
        group = rng.permutation([i for i, problem in enumerate(problems) if len(problem.steps) == count])
        for place, i in enumerate(group):
            turned = (int(group[(place + shift) % len(group)]) for shift in range(1, len(group)))
            own = problems[i].steps
            apart = (
                other
                for other in turned
                if not any(same_words(a, b) for a, b in zip(own, problems[other].steps, strict=True))
            )
            found[i] = next(apart, int(i))
    return found


def _readout_table(
    study: Study, said: dict[str, list[list[str]]], problems: Sequence[Problem], donors: Sequence[int]
) -> Table:
    rows = []
    for role, texts in said.items():
        for k in range(1, study.K + 1):
            stated = [i for i, problem in enumerate(problems) if len(problem.steps) > k]
            words = [own[k - 1] if len(own) >= k else "" for own in texts]
            few = len(stated) < FEWEST_PROBLEMS
            rows.append(
                [
                    f"{_NAMES[role]}, readout {k}",
                    len(stated),
                    None if few else proportion_estimate(same_words(words[i], problems[i].steps[k]) for i in stated),
                    None
                    if few
                    else proportion_estimate(same_words(words[i], problems[donors[i]].steps[k]) for i in stated),
                    proportion_estimate("=" in text for text in words),
                    proportion_estimate(
                        same_words(text, problem.answer) for text, problem in zip(words, problems, strict=True)
                    ),
                ]
            )
    return Table(
        "What the readouts state",
        [
            "readout k",
            "n with step k + 1",
            "states step k + 1, %",
            "control: another problem's step k + 1, %",
            "any equation, % of all",
            "the gold answer, % of all",
        ],
        rows,
        note="In stage 1 readout k is trained to state step k + 1, in stage 2 the answer (a share of the training rows "
        "may keep the steps).",
    )


def _said_heatmap(study: Study, role: str, texts: list[list[str]], problems: Sequence[Problem]) -> Figure:
    most = max(len(problem.steps) for problem in problems)
    steps = [t for t in range(most) if sum(len(p.steps) > t for p in problems) >= FEWEST_PROBLEMS]
    z, n = [], {}
    for k in range(study.K):
        words = [own[k] if len(own) > k else "" for own in texts]
        row = []
        for t in steps:
            asked = [(text, p.steps[t]) for text, p in zip(words, problems, strict=True) if len(p.steps) > t]
            n[f"step {t + 1}"] = len(asked)
            row.append(float(np.mean([same_words(*pair) for pair in asked])))
        row.append(float(np.mean([same_words(text, p.answer) for text, p in zip(words, problems, strict=True)])))
        z.append(row)
    return Figure(
        "heatmap",
        f"What each readout of the {_NAMES[role]} states",
        "gold step",
        "readout",
        {
            "x": [*(f"step {t + 1}" for t in steps), "answer"],
            "y": [str(k + 1) for k in range(study.K)],
            "z": z,
            "hover": None,
            "z_title": "share",
            "low": 0.0,
            "high": 1.0,
            "diverging": False,
        },
        note="n of “report”: "
        + ", ".join(f"{label} {count}" for label, count in n.items())
        + f", answer {len(problems)}.",
    )


class _Patchscope:
    """Carried words of both splits: chosen on "choose", counted on "report".

    Attributes:
        asked: split -> indices of the problems asked (at least two steps).
        by_layer: (carried, layer) -> condition -> outcomes on "choose".
        layers: the single layers carried; looked: how many of how many.
        chosen: carried -> the single layer; best: the (carried, layer) that is summed up, every layer among them.
        counts: (carried, layer) -> condition -> outcomes on "report".
        Outcomes are bools over blocks and problems; "problem" holds which problem each is of.
    """

    def __init__(self, study: Study):
        self.study, self.rim = study, study.models["stage1"]
        # At layer L slots are read by nothing, and at layer 0 they are the same for every question.
        between = range(1, study.layers[-1])
        self.layers = spread_layers(between)
        self.looked = layers_told(self.layers, between)
        most = {"choose": CHOOSE_QUESTIONS, "report": REPORT_QUESTIONS}
        self.asked = {
            split: [i for i, problem in enumerate(study.problems(split)) if len(problem.steps) > 1][:count]
            for split, count in most.items()
        }
        longest = max(len(self.rim.encoder.step_ids(step)) for p in study.problems("report") for step in p.steps)
        self._limit = longest + 4  # what is longer is no step
        self.neutral = min((problem.question for problem in study.problems("fit")), key=len)
        self.by_layer, self.chosen, self.counts = {}, {}, {}
        self._partners = {
            split: _partners([study.problems(split)[i] for i in rows], study.rng(f"words donors {split}"))
            for split, rows in self.asked.items()
        }
        self._plain = {split: self._unpatched(split) for split in self.asked}
        for carried in CARRIED:
            for layer in study.progress([*self.layers, EVERY], f"patchscope {carried}"):
                self.by_layer[carried, layer] = self._outcomes("choose", carried, layer, ("another",))
            self.chosen[carried] = max(self.layers, key=lambda layer, carried=carried: self._follows(carried, layer))
            for layer in (self.chosen[carried], EVERY):
                self.counts[carried, layer] = self._outcomes("report", carried, layer, ("same", "another", "neutral"))

        self.best = max(self.counts, key=lambda variant: self._follows(*variant))

    def _follows(self, carried: str, layer) -> tuple[float, float]:
        """On "choose": most words that follow the donor; where none does, fewest that stay with the question."""
        found = self.by_layer[carried, layer]
        return float(np.mean(found["another: donor's step"])), -float(np.mean(found["another: own step"]))

    def _blocks(self, split: str) -> dict[int, list[int]]:
        """Block k -> places in `asked` of the problems with a step k + 1."""
        problems = self.study.problems(split)
        rows = self.asked[split]
        found = {
            k: [place for place, i in enumerate(rows) if len(problems[i].steps) > k]
            for k in range(1, min(MOST_BLOCKS, self.study.K) + 1)
        }
        return {k: places for k, places in found.items() if k == 1 or len(places) >= FEWEST_PROBLEMS}

    def _unpatched(self, split: str) -> dict[int, list[str]]:
        """Block k -> the stage-1 model's own words after k blocks."""
        problems = self.study.problems(split)
        found = {}
        for k, places in self._blocks(split).items():
            questions = [problems[self.asked[split][place]].question for place in places]
            found[k] = []
            for start in range(0, len(questions), BATCH):
                part = questions[start : start + BATCH]
                answers = answer_batch(self.rim, part, "memory", num_blocks=k, max_new_tokens=self._limit)
                found[k] += [answer.text for answer in answers]
        return found

    def _outcomes(self, split: str, carried: str, layer, conditions: Sequence[str]) -> dict[str, list]:
        study, problems, rows = self.study, self.study.problems(split), self.asked[split]
        layers = study.layers if layer == EVERY else [layer]
        held = study.capture("memory", split)
        found: dict[str, list] = {"problem": []}

        def count(name: str, outcomes) -> None:
            found.setdefault(name, []).extend(bool(outcome) for outcome in outcomes)

        for k, places in self._blocks(split).items():
            states = carried_states(held, k, layers, ends=carried != CARRIED[0])
            own = np.array([rows[place] for place in places])
            donors = np.array([rows[self._partners[split][place]] for place in places])
            questions, plain = [problems[i].question for i in own], self._plain[split][k]
            steps = [problems[i].steps[k] for i in own]
            found["problem"] += own.tolist()
            donor_steps = [problems[i].steps[k] for i in donors]
            if "same" in conditions:
                words = self._say(questions, {at: given[own] for at, given in states.items()})
                count("same: own step", map(same_words, words, steps))
                count("same: as unpatched", map(same_words, words, plain))
                count("unpatched: own step", map(same_words, plain, steps))
            if "another" in conditions:
                words = self._say(questions, {at: given[donors] for at, given in states.items()})
                count("another: donor's step", map(same_words, words, donor_steps))
                count("another: own step", map(same_words, words, steps))
                count("another: as unpatched", map(same_words, words, plain))
            if "neutral" in conditions:
                words = self._say([self.neutral] * len(own), {at: given[own] for at, given in states.items()})
                count("neutral: own step", map(same_words, words, steps))
        return found

    def _say(self, questions: Sequence[str], states: dict[int, np.ndarray]) -> list[str]:
        return carried_words(self.rim, questions, states, max_new_tokens=self._limit)

    def table(self) -> Table:
        rows = []
        for (carried, layer), found in self.counts.items():
            keys = ("unpatched: own step", "same: own step", "same: as unpatched")
            keys += ("another: donor's step", "another: own step", "another: as unpatched", "neutral: own step")
            shares = (_problem_share(found[key], found["problem"]) for key in keys)
            rows.append([_variant(carried, layer), len(found["problem"]), *shares])
        looked = len(self.layers) if self.looked == "all layers" else self.looked
        return Table(
            "Memory carried into the stage-1 model: whose step is stated?",
            [
                "carried",
                "n readouts",
                "control: nothing carried, own step, %",
                "into its own question: own step, %",
                "the same words as without, %",
                "into another question: the step of the memory's problem, %",
                "the step of the asked problem, %",
                "the same words as without it, %",
                "into a neutral question: the memory's step, %",
            ],
            rows,
            note=f"Readouts 1 to {max(self._blocks('report'))} of problems that have a step k + 1; blocks 1..k are "
            "carried. Words that come from memory follow the memory's problem. The single layer is the best of "
            f"{looked} on split “choose”. Intervals: bootstrap over problems. Neutral question: "
            f"“{self.neutral}”",
        )

    def figure(self) -> Figure:
        series = []
        for carried in CARRIED:
            found = [self.by_layer[carried, layer] for layer in self.layers]
            for key, label in (("another: donor's step", "the memory's step"), ("another: own step", "the asked step")):
                estimates = [_problem_share(outcomes[key], outcomes["problem"]) for outcomes in found]
                series.append(curve(f"{carried}: {label}", self.layers, estimates, control=key.endswith("own step")))
        return Figure(
            "lines",
            "Memory of another question: whose step is stated, by layer",
            "layer",
            "share",
            {"series": series},
            note=f"n = {len(next(iter(self.by_layer.values()))['another: own step'])} readouts of split “choose”.",
        )

    def summary(self) -> str:
        found = self.counts[self.best]
        donor, own, plain = (
            _problem_share(found[key], found["problem"])
            for key in ("another: donor's step", "another: own step", "unpatched: own step")
        )
        lead = np.array(found["another: own step"], float) - np.array(found["another: donor's step"], float)
        lead = _problem_share(lead, found["problem"])
        stay = [
            f"{_told(_problem_share(every['another: as unpatched'], every['problem']))} with {carried} replaced"
            for carried in CARRIED
            for every in [self.counts[carried, EVERY]]
        ]
        if lead.low > 0:
            verdict = "the steps it states come from the question, not from the memory carried"
        elif lead.high < 0:
            verdict = "the steps it states come from the memory carried"
        else:
            verdict = "whether question or memory is followed cannot be told"
        return (
            f"With another question's memory carried into the stage-1 model ({_variant(*self.best)}, chosen on "
            f"“choose”), {_told(donor)} of its readouts state that memory's step and {_told(own)} the step of the "
            f"question asked ({plain.value:.0%} with nothing carried), a difference of {100 * lead.value:+.0f} points "
            f"({100 * lead.low:+.0f} to {100 * lead.high:+.0f}, bootstrap over {lead.n} problems): {verdict}. At every "
            f"layer the readouts stay word for word what they were for {' and '.join(stay)}."
        )

    def data(self) -> dict[str, Any]:
        return {
            f"{carried}, {layer}": {
                key: float(np.mean(outcomes)) for key, outcomes in found.items() if key != "problem"
            }
            for (carried, layer), found in self.counts.items()
        }


def _problem_share(outcomes: Sequence, problems: Sequence[int]) -> Estimate:
    """The mean over readouts, its interval by drawing whole problems; `problems` says which one each readout is of."""
    if set(outcomes) in ({False}, {True}) and set(map(type, outcomes)) == {bool}:
        # Draws of equal outcomes do not vary: Wilson, each problem counted once.
        return proportion_estimate([outcomes[0]] * len(set(problems)))
    _, place = np.unique(problems, return_inverse=True)
    total, count = np.bincount(place, weights=np.asarray(outcomes, dtype=float)), np.bincount(place)
    return bootstrap((total, count), lambda total, count: total.sum() / count.sum())


def _variant(carried: str, layer) -> str:
    return f"{carried} at {layer if layer == EVERY else f'layer {layer}'}"


def _told(estimate: Estimate) -> str:
    return f"{estimate.value:.1%} ({estimate.low:.1%} to {estimate.high:.1%})"
