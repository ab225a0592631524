"""Own words: what the model itself says after block k, and whether those words come from the memory.

Method:
1. The memory model's readouts, and those of the stage-1 model on the same questions: in stage 1 readout k is trained to
   state step k + 1 (the last one the answer). Share of readouts that state the gold step, white space aside, whole and
   exact. Control: the step k + 1 of another problem.
2. Patchscope (Ghandeharioun et al. 2024, arXiv:2401.06102): the memory model's states of blocks 1..k are put into a
   pass over a question with k blocks, in the same places, and readout k is decoded greedily: by the memory model or the
   stage-1 model, whichever states more steps on "choose" (a memory trained the paper's way forgets to). Readout k
   sees no other blocks, so at "every layer" all it can read in memory is the carried one. Carried are the slots, or the
   slots and the end tokens (which also choose the readout's first word).
3. Whose words are they? The states go into (a) the run on their own question, (b) the run on ANOTHER question, where
   words that come from memory state the donor's step and words that come from the question the asked problem's, (c) the
   run on one neutral question. Beside them the same model with nothing carried. The single layer, and the row
   that is summed up, are chosen on "choose" by (b).
4. Readouts of one problem are not independent of each other: intervals of carried words draw whole problems.

Knows readouts, hooks and gold steps. Knows nothing of probes, probabilities or attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from rim_probe.decoding import Answer, answer_batch
from rim_probe.errors import RiMError
from rim_probe.model import RiM
from rim_probe.probing.hooks import causal_lm, edit_residual, layers_told, spread_layers
from rim_probe.probing.results import Estimate, Report, Result, proportion_estimate, ratio_estimate

if TYPE_CHECKING:
    from rim_probe.probing.capture import Capture, CaptureSet
    from rim_probe.probing.study import Observation, Study
    from rim_probe.problems import Problem

BATCH = 64
CHOOSE_QUESTIONS = 150
REPORT_QUESTIONS = 500
MOST_BLOCKS = 3  # blocks whose carried words are decoded
FEWEST_PROBLEMS = 30
EVERY = "every layer"
CARRIED = ("slots", "slots and ends")
OWN, ANOTHER, NEUTRAL = "its own question", "another question", "a neutral question"  # what memory is carried into
STATES, CARRIED_STATES = "readout k states step k + 1", "memory carried into {}: the readout states"
SAME = "the same words as with nothing carried"
NAMES = {"memory": "memory model", "stage1": "stage-1 model"}


def same_words(first: str, second: str) -> bool:
    """Whether two texts are equal, white space aside."""
    return "".join(first.split()) == "".join(second.split())


def carry(
    rim: RiM,
    questions: Sequence[str],
    states: Mapping[int, np.ndarray | torch.Tensor],
    where: Mapping[int, Sequence[bool]] | None = None,
    *,
    max_new_tokens: int = 64,
) -> list[Answer]:
    """What `rim` answers behind k blocks whose states in the residual stream were replaced, with all k readouts.

    Readout j sees blocks 1..j alone: it is the one that it would be with these blocks carried and no others.

    Args:
        states: layer 0..L -> [n, k, P, d], the states of blocks 1..k: P = M for the slots, M + 1 with the end last.
        where: layer -> which of the n questions they are put into; all of them by default.

    Raises:
        RiMError: states of another shape than the questions and the layout ask for; questions that cannot be asked.
    """
    slots, length, width = rim.layout.slots_per_block, rim.layout.block_length, causal_lm(rim).config.hidden_size
    shapes = {tuple(given.shape) for given in states.values()}
    if len(shapes) != 1 or (shape := shapes.pop())[::3] != (len(questions), width) or shape[2] - slots not in (0, 1):
        raise RiMError(
            f"Carried states do not fit into {rim.name}: they must be [{len(questions)} questions, blocks, {slots} "
            f"slots (and 1 end), {width}] at every layer; take them from a model of its shape."
        )
    _, blocks, positions, _ = shape
    # Prompts are padded on the left, so the blocks of all rows end in the last columns.
    columns = torch.tensor([-(blocks - b) * length + 1 + place for b in range(blocks) for place in range(positions)])
    said: list[Answer] = []
    for start in range(0, len(questions), BATCH):
        batch, edits = slice(start, start + BATCH), {}
        for layer, given in states.items():
            rows = torch.as_tensor(where[layer][batch]).nonzero() if where else torch.arange(len(given[batch]))[:, None]
            if len(rows):
                edits[layer] = _once(torch.as_tensor(given[batch]).flatten(1, 2)[rows[:, 0]], rows, columns)
        with edit_residual(rim, edits):
            said += answer_batch(rim, questions[batch], "memory", num_blocks=blocks, max_new_tokens=max_new_tokens)
    return said


def _once(states: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """An edit of the first pass alone (later passes hold the readout's own tokens): states [rows, columns, d]."""
    left = [states]

    def edit(stream: torch.Tensor) -> torch.Tensor:
        if left:
            stream = stream.clone()
            stream[rows, columns] = left.pop().to(stream)
        return stream

    return edit


def carried_states(held: Capture | CaptureSet, blocks: int, layers: Sequence[int], ends: bool) -> dict[int, np.ndarray]:
    """The states of blocks 1..`blocks` of a capture as `carry` takes them: layer -> [n, blocks, P, d]."""
    places = [*range(1, held.M + 1), *(["end"] if ends else [])]
    return {
        layer: np.stack(
            [np.stack([held.cell(layer, block, place) for place in places], 1) for block in range(1, blocks + 1)], 1
        )
        for layer in layers
    }


# -------------------------------------------------------------------------------------------------------- one question


def carried_answers(
    rim: RiM, observation: Observation, variants: Sequence[Sequence[int]], *, max_new_tokens: int = 64
) -> list[Answer]:
    """What `rim` answers to one question with the slots of another run of it carried in, all variants in one batch.

    Args:
        observation: whose slots are carried, into the same question with as many blocks.
        variants: for each the layers 0..L at which slots are replaced; () carries nothing.

    Raises:
        RiMError: a question that this model cannot be asked, or slots of another shape than its own.
    """
    held = observation.capture
    if rim.layout.slots_per_block != held.M:
        raise RiMError(f"The slots do not fit into {rim.name}, which has others; take them from a model of its shape.")
    states = {layer: held.slots[:1, at].expand(len(variants), -1, -1, -1) for at, layer in enumerate(held.layers)}
    where = {layer: [layer in layers for layers in variants] for layer in states}
    return carry(rim, [observation.question] * len(variants), states, where, max_new_tokens=max_new_tokens)


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


# ------------------------------------------------------------------------------------------------------------- results


def score(study: Study) -> Report:
    """Match rates of readouts and of carried words on "report"; see the head of this module.

    Raises:
        RiMError: no problem with at least two steps.
    """
    problems = study.problems("report")
    if not any(len(problem.steps) > 1 for problem in problems):
        raise RiMError("No problem has two steps or more, so no readout can state one; give problems with their steps.")
    partners = _partners(problems, study.rng("words partners"))
    stated = {role: _stated(study, role, partners) for role in NAMES if role in study.models}
    carried = _Patchscope(study, max(stated, key=lambda role: _stating(study, role))).report()
    results = [*stated.pop("memory"), *carried.results, *(one for found in stated.values() for one in found)]
    return replace(carried, results=results, n=carried.n | {"report": len(problems)})


def _stating(study: Study, role: str) -> int:
    """How many readouts of a model state their step on "choose"."""
    problems, answers = study.problems("choose"), study.answers(role, "choose")
    return sum(
        same_words(readout.text, step)
        for problem, answer in zip(problems, answers, strict=True)
        for step, readout in zip(problem.steps[1:], answer.readouts, strict=False)
    )


def _stated(study: Study, role: str, partners: Sequence[int]) -> list[Result]:
    """What the readouts of a model state."""
    problems, results, cells = study.problems("report"), [], []
    answers, name = study.answers(role, "report"), NAMES[role]

    def share(words: Sequence[str], wanted: Mapping[int, str]) -> Estimate:
        return proportion_estimate(same_words(words[i], text) for i, text in wanted.items())

    steps = [
        {i: problem.steps[t] for i, problem in enumerate(problems) if len(problem.steps) > t}
        for t in range(max(len(problem.steps) for problem in problems))
    ]
    told = {t: held for t, held in enumerate(steps, start=1) if len(held) >= FEWEST_PROBLEMS}
    gold = told | {"answer": {i: problem.answer for i, problem in enumerate(problems)}}
    for k in range(1, study.K + 1):
        words = [answer.readouts[k - 1].text for answer in answers]
        if k + 1 in told:
            others = {i: problems[partners[i]].steps[k] for i in told[k + 1]}
            results.append(Result(STATES, name, share(words, told[k + 1]), place={"readout": k}))
            control = f"another problem's, {name}"
            results.append(Result(STATES, control, share(words, others), "control", place={"readout": k}))
        equation = proportion_estimate("=" in text for text in words)
        results.append(Result("readout k states an equation", name, equation, place={"readout": k}))
        cells += [
            Result("readout states", name, share(words, held), place={"readout": k, "gold step": t})
            for t, held in gold.items()
        ]
    return results + cells


def _partners(problems: Sequence[Problem], rng: np.random.Generator) -> list[int]:
    """For every problem another one with as many steps that shares none of them in the same place; itself if none."""
    found = list(range(len(problems)))
    for count in sorted({len(problem.steps) for problem in problems}):
        group = rng.permutation([i for i, problem in enumerate(problems) if len(problem.steps) == count])
        for place, i in enumerate(group):
            others = (int(other) for other in np.roll(group, -place)[1:])
            apart = (at for at in others if not any(map(same_words, problems[i].steps, problems[at].steps)))
            found[i] = next(apart, int(i))
    return found


class _Patchscope:
    """The memory model's states in the pass of another question (steps 2 to 4).

    Attributes:
        role: of the model that reads them.
        asked, donors: split -> problem numbers.
        cases: split -> (place in `asked`, k) of every readout that can state a step k + 1.
    """

    def __init__(self, study: Study, role: str):
        self.study, self.role, self.rim, self.blocks = study, role, study.models[role], min(MOST_BLOCKS, study.K)
        self.asked, self.donors, self.cases = {}, {}, {}
        for split, most in (("choose", CHOOSE_QUESTIONS), ("report", REPORT_QUESTIONS)):
            problems = study.problems(split)
            asked = [i for i, problem in enumerate(problems) if len(problem.steps) > 1][:most]
            partners = _partners([problems[i] for i in asked], study.rng(f"words donors {split}"))
            self.asked[split], self.donors[split] = asked, [asked[partner] for partner in partners]
            self.cases[split] = []
            for k in range(1, self.blocks + 1):
                able = [(at, k) for at, i in enumerate(asked) if len(problems[i].steps) > k]
                self.cases[split] += able if k == 1 or len(able) >= FEWEST_PROBLEMS else []
        longest = max(len(self.rim.encoder.step_ids(step)) for p in study.problems("report") for step in p.steps)
        self.limit = longest + 4  # what is longer is no step
        self.neutral = min((problem.question for problem in study.problems("fit")), key=len)

    def words(self, split: str, carried: str, layer: int | str, into: str) -> list[str]:
        """What the readouts say with memory carried at a layer into what question."""
        layers = self.study.layers if layer == EVERY else [layer]
        states = carried_states(self.study.capture("memory", split), self.blocks, layers, ends=carried != CARRIED[0])
        rows = self.donors[split] if into == ANOTHER else self.asked[split]
        questions = [self.study.problems(split)[i].question for i in self.asked[split]]
        questions = [self.neutral] * len(questions) if into == NEUTRAL else questions
        states = {at: cell[rows] for at, cell in states.items()}
        answers = carry(self.rim, questions, states, max_new_tokens=self.limit)
        return [answers[at].readouts[k - 1].text for at, k in self.cases[split]]

    def plain(self) -> list[str]:
        """What they say on "report" with nothing carried."""
        answers = [self.study.answers(self.role, "report")[i] for i in self.asked["report"]]
        readouts = [answers[at].readouts[k - 1] for at, k in self.cases["report"]]
        return [
            told.text if len(told.token_ids) <= self.limit else self.rim.decode(list(told.token_ids[: self.limit]))
            for told in readouts
        ]

    def states(self, split: str, words: Sequence[str], donor: bool = False) -> np.ndarray:
        """Which of the words are step k + 1 of the asked problem, or of its donor; bool [readouts]."""
        problems, whose = self.study.problems(split), (self.donors if donor else self.asked)[split]
        return _same(words, [problems[whose[at]].steps[k] for at, k in self.cases[split]])

    def share(self, split: str, outcomes: np.ndarray) -> Estimate:
        return _problem_share(outcomes, [at for at, _ in self.cases[split]])

    def report(self) -> Report:
        """Layers searched on "choose", and four variants on "report", the one that follows its donor most first."""
        # At the last layer a block's state is read by nothing, and at layer 0 they are the same for every question.
        between = range(1, self.study.layers[-1])
        layers, follows, curves = spread_layers(between), {}, []
        metric = CARRIED_STATES.format(ANOTHER)
        for carried in CARRIED:
            for layer in self.study.progress([*layers, EVERY], f"patchscope {carried}"):
                words = self.words("choose", carried, layer, ANOTHER)
                donor, own = self.states("choose", words, donor=True), self.states("choose", words)
                follows[carried, layer] = donor.mean(), -own.mean()
                for of, role, outcomes in (("the memory's step", "score", donor), ("the asked step", "control", own)):
                    more = {"split": "choose", "place": {"layer": layer}}
                    estimate = self.share("choose", outcomes)
                    curves.append(Result(f"{metric} (split choose)", f"{carried}: {of}", estimate, role, **more))
        variants = [
            variant
            for carried in CARRIED
            for variant in (
                *([(carried, max(layers, key=lambda at, c=carried: follows[c, at]))] if layers else ()),
                (carried, EVERY),
            )
        ]
        variants.sort(key=follows.get, reverse=True)
        plain, results = self.plain(), []
        for carried, layer in variants:
            own, another, neutral = (self.words("report", carried, layer, into) for into in (OWN, ANOTHER, NEUTRAL))
            donor, asked = self.states("report", another, donor=True), self.states("report", another)
            lead = donor.astype(float) - asked
            results += [
                Result(of_metric, of, self.share("report", outcomes), role, place={"carried": _variant(carried, layer)})
                for of_metric, of, role, outcomes in (
                    (metric, "the memory's step", "score", donor),
                    (metric, "the asked step", "control", asked),
                    (f"{metric} the memory's step less the asked one", "difference", "score", lead),
                    (CARRIED_STATES.format(OWN), "its step", "score", self.states("report", own)),
                    (CARRIED_STATES.format(OWN), "its step, nothing carried", "control", self.states("report", plain)),
                    (CARRIED_STATES.format(NEUTRAL), "the memory's step", "score", self.states("report", neutral)),
                    (SAME, f"into {OWN}", "score", _same(own, plain)),
                    (SAME, f"into {ANOTHER}", "score", _same(another, plain)),
                )
            ]
        lead = results[2].estimate
        source = "the memory carried" if lead.low > 0 else "the question, not the memory" if lead.high < 0 else ""
        said = f"the steps it states come from {source}" if source else "whether it follows either cannot be told"
        return Report(
            "words",
            results + curves,
            {"choose": len(self.asked["choose"]), "carried": lead.n},
            {
                "variants carried, chosen on choose": [_variant(*variant) for variant in variants],
                "single layers searched": layers_told(layers, between),
                "neutral question": self.neutral,
                "readouts carried": len(self.cases["report"]),
            },
            f"With another question's memory in the {NAMES[self.role]}, the memory's step less the asked one is "
            f"{100 * lead.value:+.0f} points ({100 * lead.low:+.0f} to {100 * lead.high:+.0f}): {said}.",
        )


def _same(words: Iterable[str], others: Iterable[str]) -> np.ndarray:
    return np.array([same_words(*pair) for pair in zip(words, others, strict=True)])


def _problem_share(outcomes: np.ndarray, problems: Sequence[int]) -> Estimate:
    """The mean over readouts, its interval by drawing whole problems; `problems` says which one each readout is of."""
    _, place = np.unique(problems, return_inverse=True)
    sums, counts = np.bincount(place, weights=outcomes), np.bincount(place)
    if outcomes.dtype == bool and outcomes.all() == outcomes.any():
        # Draws of equal outcomes do not vary: Wilson, each problem counted once.
        return proportion_estimate(sums > 0)
    return ratio_estimate(sums, counts)


def _variant(carried: str, layer: int | str) -> str:
    return f"{carried}, {layer if layer == EVERY else f'layer {layer}'}"
