"""The interchange test: block t is claimed to hold step t; its slots, taken from a partner problem, must change the
answer to what the problem's own equations predict. And the bypass test: which routes lead to the answer at all.

Method (interchange intervention: Geiger et al. 2021, arXiv:2106.02997; attention knockout: Geva et al. 2023,
arXiv:2304.14767):
1. Pairs: for each problem a partner with one number of the question changed, which enters step t; t is drawn evenly
   (`equations.counterfactual`). Only pairs count in which the model answers both problems right, after the last block.
2. The slots of block t get the partner's states, at all layers; the question stays. Success: the model says exactly the
   answer that the equations give with the partner's result of step t.
3. Controls on the same pairs: the slots from a random other problem. Strict pairs: a second number differs in a later
   step, so that whoever copies the partner's answer fails. On these as many other blocks are swapped, none of them
   claimed for step t nor for a step between the two changes, whose result is the predicted one by right.
4. For comparison the end of block t alone, single layers, each block at each step, and the same test on the stage-1
   model and on a memory of the paper's two stages where they are.
5. Bypass: routes to the answer's tokens are cut by the attention mask in all layers (`patching.CUTS`). An answer that
   survives without the memory has another route. With the question cut, the swap of step 2 is made once more, and so
   is that of the whole memory (all that the cut hides): a copy nobody reads shows only then. Controls: a random
   problem's states, and both routes cut.
6. The verdict is computed from these (`route`).

Knows pairs, swaps, cuts and their outcomes. Knows nothing of how claims are found (see the nearest-step decoder).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from rim_probe.equations import Partner, counterfactual, value_bounds
from rim_probe.errors import RiMError
from rim_probe.evaluation import can_ask
from rim_probe.model import RiM
from rim_probe.probing.hooks import layers_told, spread_layers
from rim_probe.probing.patching import Edit, Patcher
from rim_probe.probing.results import Estimate, Goal, Report, Result, is_clear, mean_estimate, proportion_estimate
from rim_probe.probing.study import Study
from rim_probe.problems import Problem

PAIRS = 1000
COMPARED_PAIRS = 300  # of the models beside the memory model
FEWEST_PAIRS = 20  # with fewer nothing is said of routes
LEAST_EXCESS = 0.1  # a route that keeps fewer answers right than this is none worth the name
COMPARED = {"stage1": "stage-1 model", "paper": "paper's two stages"}
PREDICTED, KEPT, COPIED = "says the predicted answer", "keeps its own answer", "says the partner's answer"
WHOLE, CUT = f"{PREDICTED}, whole memory", f"{PREDICTED}, question cut from the answer"
RIGHT, EXCESS = "answers right", "answers right, more than with both routes cut"
ONE, STRICT = "one number changed", "a second, later number changed"
SWAP, RANDOM, WRONG = "slots of block t", "slots of block t from a random problem", "slots of as many other blocks"
MEMORY, MEMORY_RANDOM = "whole memory", "whole memory from a random problem"
FLOORS = {name: f"{name}, both cut from the answer" for name in (SWAP, MEMORY)}
CONTROLS = {RANDOM, MEMORY_RANDOM, WRONG, *FLOORS.values()}
ROUTES_CUT = {  # what is cut, as the results call it -> names of `patching.CUTS`
    "nothing cut": (),
    "memory cut from the answer": ("memory",),
    "question cut from the answer": ("question",),
    "both cut from the answer": ("question", "memory"),
    "slots hidden": ("slots",),
    "block ends hidden": ("ends",),
}
BOTH = "both cut from the answer"
GOALS = {
    (PREDICTED, SWAP, ONE): Goal(">=", 0.95),
    (PREDICTED, SWAP, STRICT): Goal(">=", 0.85),
    (PREDICTED, WRONG, STRICT): Goal("<=", 0.03),
    (RIGHT, "slots hidden", "all"): Goal("<=", 0.45),
}
GOAL_MIDDLE = Goal(">=", 0.75)  # at step 2 of 3

Said = np.ndarray
"""bool [3]: whether the predicted, its own, the partner's answer is said."""


class Pair(NamedTuple):
    """A problem, its partner, and which problem of the split it is."""

    index: int
    problem: Problem
    partner: Partner


class Run(NamedTuple):
    """A pair answered right both times: both clean runs, and what is said to each swap by its name."""

    pair: Pair
    clean: Patcher
    donor: Patcher

    def cut(self, *routes: str) -> Patcher:
        """The problem's clean run with routes cut."""
        return Patcher(self.clean.rim, self.clean.question, self.clean.targets, num_blocks=self.clean.K, cut=routes)

    def says(self, swaps: Mapping, clean: Patcher | None = None) -> dict:
        """What is said under each swap (lists of edits), by the problem's clean run or another one of it."""
        found = (clean or self.clean).score(list(swaps.values())).says.numpy()
        return dict(zip(swaps, found, strict=True))


def score(study: Study, claims: Mapping[int, Sequence[int]] | None = None, *, pairs: int = PAIRS) -> Report:
    """Both tests on the split `report`; nothing is fitted or chosen.

    Args:
        claims: step t (1-based) -> the blocks claimed to hold it; by default block t for step t.
        pairs: how many pairs of each kind at most, and how many problems of the bypass test.

    Raises:
        RiMError: claims about blocks that do not exist, or no pair whose problems are both answered right.
    """
    claims = _checked(claims, study)
    rim = study.models["memory"]
    results = measure(study, rim, claims, pairs)
    results += _where(study, rim, claims, min(pairs, COMPARED_PAIRS))
    if not results[0].estimate.n:
        raise RiMError("No pair of problems is answered right both times, so there is nothing to interchange.")
    for role, name in COMPARED.items():
        if role in study.models:
            results += measure(study, study.models[role], claims, min(pairs, COMPARED_PAIRS), f"{name}: ")
    found = route(results)
    counts = {group: _of(results, PREDICTED, SWAP, group).n for group in (ONE, STRICT)}
    return Report(
        "interchange",
        results,
        {"problems": min(pairs, len(study.problems("report")))} | {f"pairs, {group}": n for group, n in counts.items()},
        {
            "claims": {str(t): list(blocks) for t, blocks in claims.items()},
            "readout": study.K,
            "layers": "all",
            "single layers": layers_told(_layers(study), study.layers[1:-1]),
            "route": found,
            "seed": study.seed,
        },
        verdict=tell(found, results),
    )


# ---------------------------------------------------------------------------------------------------------- the routes


def signs(results: Sequence[Result]) -> dict[str, bool]:
    """What the tests show.

    claim     on strict pairs the slots of block t give the predicted answer more often than other blocks' do
    follows   a swap (block t's slots, or the whole memory) gives the predicted answer more often than that from a
              random problem does
    holds     so it does with the question cut, also more often than with both routes cut
    alone     with the question cut more answers stay right than with both routes cut
    bypass    with the memory cut more answers stay right than with both routes cut
    closed    so few that there is no bypass: less than `LEAST_EXCESS`

    The first three compare shares, whose intervals have to lie apart, the others the interval of the paired difference.
    """

    def beats(metric: str, swap: str, control: str, group: str = ONE) -> bool:
        return is_clear(_of(results, metric, swap, group), _of(results, metric, control, group))

    alone, bypass = (
        _of(results, EXCESS, f"{cut} cut from the answer", "answered right") for cut in ("question", "memory")
    )
    pairs = {SWAP: RANDOM, MEMORY: MEMORY_RANDOM}
    return {
        "claim": beats(PREDICTED, SWAP, WRONG, STRICT),
        "follows": beats(PREDICTED, SWAP, RANDOM) or beats(WHOLE, MEMORY, MEMORY_RANDOM),
        "holds": any(beats(CUT, swap, control) and beats(CUT, swap, FLOORS[swap]) for swap, control in pairs.items()),
        "alone": alone.low > 0,
        "bypass": bypass.low > 0,
        "closed": bypass.high < LEAST_EXCESS,
    }


def route(results: Sequence[Result]) -> str:
    """Which route to the answer the memory is: "only", "one of two", "none", or "unknown"."""
    if _of(results, PREDICTED, SWAP, ONE).n < FEWEST_PAIRS:
        return "unknown"
    shown = signs(results)
    if shown["closed"] and shown["follows"]:
        return "only"
    if shown["bypass"] and (shown["follows"] or shown["holds"]):
        return "one of two"
    return "none" if shown["bypass"] and not shown["alone"] else "unknown"


def tell(found: str, results: Sequence[Result]) -> str:
    """The verdict in one or two sentences."""

    def share(metric: str, of: str, group: str = ONE) -> str:
        estimate = _of(results, metric, of, group)
        return f"{estimate.value:.1%}" if estimate.n else "no pair"

    def swapped(slots: str, memory: str) -> str:
        told = f"the slots of block t in {share(slots, SWAP)} (random {share(slots, RANDOM)})"
        return f"{told}, the whole memory in {share(memory, MEMORY)} (random {share(memory, MEMORY_RANDOM)})"

    most = max(_of(results, PREDICTED, SWAP, ONE).value, _of(results, WHOLE, MEMORY, ONE).value)
    start = {
        "only": "The memory is the only route to the answer",
        "one of two": "The memory is one of two routes to the answer, which takes the "
        + ("memory" if most >= 0.5 else "question"),
        "none": "The memory is not a route to the answer",
        "unknown": "The test is too weak to tell which routes lead to the answer",
    }[found]
    right = [share(RIGHT, of, "answered right") for of in ("memory cut from the answer", BOTH)]
    return (
        f"{start}: taken from a partner, these give the predicted answer: {swapped(PREDICTED, WHOLE)}; with the "
        f"question cut, {swapped(CUT, CUT)}. With the memory cut {right[0]} of right answers stay right (both cut "
        f"{right[1]})."
    )


def _of(results: Sequence[Result], metric: str, of: str, group: str) -> Estimate:
    """The estimate of the memory model that stands at no place."""
    key = metric, of, group
    return next(r.estimate for r in results if (r.metric, r.of, r.group) == key and not r.place)


# ----------------------------------------------------------------------------------------------------------- the tests


def whole(clean: Patcher, states: Tensor) -> list[Edit]:
    """All memory tokens but the answer's own, the end of the last block, put in at all layers."""
    every, last = range(clean.block_length), clean.K
    return clean.edits(states, range(1, last), positions=every) + clean.edits(states, [last], positions=every[:-1])


def measure(
    study: Study, rim: RiM, claims: Mapping[int, Sequence[int]], pairs: int = PAIRS, model: str = ""
) -> list[Result]:
    """The interchange and the bypass test of one model, as `score`; `model` begins the names of what is measured."""
    return _interchange(study, rim, claims, pairs, model) + _bypass(study, rim, pairs, model)


def _interchange(study, rim: RiM, claims, limit: int, model: str) -> list[Result]:
    """Swap and controls on pairs that differ in one number, strict pairs, and the swap with routes cut."""
    problems, bounds = study.problems("report"), value_bounds(study.problems("fit"))
    names = SWAP, RANDOM, MEMORY, MEMORY_RANDOM
    one, cut, strict, steps = _Outcomes(*names), _Outcomes(*names, *FLOORS.values()), _Outcomes(SWAP, WRONG), {}
    for run in _runs(study, rim, _pairs(study, rim, claims, bounds, limit)):
        index, problem, partner = run.pair
        blocks, rng = claims[partner.step], np.random.default_rng([study.seed, index])
        stranger = Patcher(rim, problems[_another(len(problems), index, rng)].question, num_blocks=study.K)
        swaps = {
            SWAP: run.clean.edits(run.donor.memory, blocks),
            RANDOM: run.clean.edits(stranger.memory, blocks),
            MEMORY: whole(run.clean, run.donor.memory),
            MEMORY_RANDOM: whole(run.clean, stranger.memory),
        }
        one.add(said := run.says(swaps))
        steps.setdefault((len(problem.steps), partner.step), []).append(said[SWAP][0])
        cut.add(run.says(swaps, run.cut("question")))
        floors = run.says({name: swaps[name] for name in FLOORS}, run.cut("question", "memory"))
        cut.add({FLOORS[name]: row for name, row in floors.items()})
    for run in _runs(study, rim, _pairs(study, rim, claims, bounds, limit, two_numbers=True)):
        index, _, partner = run.pair
        by_right = {block for t in range(partner.step, partner.second.step) for block in claims.get(t, ())}
        chosen = {SWAP: claims[partner.step], WRONG: _others(study.K, by_right, len(claims[partner.step]), index)}
        swaps = {name: run.clean.edits(run.donor.memory, blocks) for name, blocks in chosen.items() if blocks}
        strict.add(run.says(swaps))
    results = one.results(model + PREDICTED, ONE, 0, (SWAP, RANDOM)) + strict.results(model + PREDICTED, STRICT, 0)
    results += one.results(model + WHOLE, ONE, 0, (MEMORY, MEMORY_RANDOM)) + cut.results(model + CUT, ONE, 0)
    results += one.results(model + KEPT, ONE, 1) + strict.results(model + KEPT, STRICT, 1)
    results += strict.results(model + COPIED, STRICT, 2)
    for (count, step), found in sorted(steps.items()):
        goal = GOAL_MIDDLE if (count, step) == (3, 2) and not model else None
        told, place = f"{count} steps" if count > 1 else "1 step", {"changed step": step}
        results.append(Result(model + PREDICTED, SWAP, proportion_estimate(found), group=told, place=place, goal=goal))
    return results


def _where(study, rim: RiM, claims, limit: int) -> list[Result]:
    """The end of block t alone, single layers, and every block at every step."""
    outcomes: dict[tuple[str, tuple], list[bool]] = {}
    for run in _runs(study, rim, _pairs(study, rim, claims, value_bounds(study.problems("fit")), limit)):
        step, clean, memory = run.pair.partner.step, run.clean, run.donor.memory
        end = clean.block_length - 1
        # The end of the last block is the answer's own token: written, it would bring the partner's answer along.
        ends = [block for block in claims[step] if block < study.K]
        swaps = {("end of block t", ()): clean.edits(memory, ends, positions=[end])} if ends else {}
        for layer in _layers(study):
            swaps[SWAP, (("layer", layer),)] = clean.edits(memory, claims[step], [layer])
        for block in range(1, study.K + 1):
            swaps["slots of one block", (("changed step", step), ("block", block))] = clean.edits(memory, [block])
        for key, said in run.says(swaps).items():
            outcomes.setdefault(key, []).append(said[0])
    return [
        Result(PREDICTED, of, proportion_estimate(found), group=ONE, place=dict(place))
        for (of, place), found in sorted(outcomes.items(), key=lambda item: item[0][1])
    ]


def _bypass(study, rim: RiM, limit: int, model: str) -> list[Result]:
    """Accuracy with routes cut, of all problems and of those answered right with nothing cut."""
    said = []
    for problem in study.progress(study.problems("report")[:limit], f"bypass {model}".strip(": ")):
        target = [rim.encoder.answer_ids(problem.answer)]
        cuts = (Patcher(rim, problem.question, target, num_blocks=study.K, cut=cut) for cut in ROUTES_CUT.values())
        said.append([bool(clean.says[0]) for clean in cuts])
    right, results = np.array(said).reshape(-1, len(ROUTES_CUT)), []
    for group, rows in (("all", right), ("answered right", right[right[:, 0]])):
        for name, column in zip(ROUTES_CUT, rows.T, strict=True):
            role, goal = "control" if name == BOTH else "score", GOALS.get((model + RIGHT, name, group))
            if group == "all" or name != "nothing cut":
                results.append(Result(model + RIGHT, name, proportion_estimate(column), role, group=group, goal=goal))
    column = {name: rows[:, i].astype(float) for i, name in enumerate(ROUTES_CUT)}
    return results + [
        Result(model + EXCESS, name, mean_estimate(column[name] - column[BOTH]), group="answered right")
        for name in ("memory cut from the answer", "question cut from the answer")
    ]


class _Outcomes(dict[str, list[Said]]):
    """What was said under each swap, by its name."""

    def __init__(self, *names: str):
        super().__init__({name: [] for name in names})

    def add(self, said: Mapping[str, Said]) -> None:
        for name, row in said.items():
            self[name].append(row)

    def results(self, metric: str, group: str, column: int, names: Iterable[str] = ()) -> list[Result]:
        """The share of pairs in which answer `column` was said; goals are those of the memory model's own metrics."""
        return [
            Result(
                metric,
                name,
                proportion_estimate(row[column] for row in self[name]),
                "control" if name in CONTROLS else "score",
                group=group,
                goal=GOALS.get((metric, name, group)),
            )
            for name in names or self
        ]


# ----------------------------------------------------------------------------------------------------------- the pairs


def _checked(claims: Mapping[int, Sequence[int]] | None, study: Study) -> dict[int, tuple[int, ...]]:
    if claims is None:
        longest = max(len(problem.steps) for problem in study.problems("report"))
        if longest == 0:
            raise RiMError("The problems have no steps, so nothing is claimed about blocks; give problems with steps.")
        claims = {t: [t] for t in range(1, min(longest, study.K) + 1)}
    if not claims or not all(blocks and set(blocks) <= set(range(1, study.K + 1)) for blocks in claims.values()):
        raise RiMError(f"A claim names for each step the blocks, 1 to {study.K}, that are said to hold it.")
    return {t: tuple(sorted(set(blocks))) for t, blocks in claims.items()}


def _pairs(study, rim: RiM, claims, bounds, limit: int, *, two_numbers: bool = False) -> list[Pair]:
    """At most `limit` pairs whose changed number enters at a claimed step, in the order of the split."""
    found: list[Pair] = []
    for index, problem in enumerate(study.problems("report")):
        if len(found) == limit:
            break
        rng = np.random.default_rng([study.seed, index, two_numbers])
        steps = rng.permutation([t for t in claims if t <= len(problem.steps)]).tolist()
        drawn = (counterfactual(problem, rng, bounds, step=t, two_numbers=two_numbers) for t in steps)
        partner = next((one for one in drawn if one is not None), None)
        if partner and can_ask(rim, partner.problem.question, "memory", study.K):
            found.append(Pair(index, problem, partner))
    return found


def _runs(study, rim: RiM, pairs: Sequence[Pair]) -> Iterator[Run]:
    """The clean runs of every pair whose problems are both answered right; targets: predicted, own, partner's."""
    for pair in study.progress(pairs, "interchange"):
        _, problem, partner = pair
        answers = partner.predicted, problem.answer, partner.problem.answer
        targets = [rim.encoder.answer_ids(answer) for answer in answers]
        clean = Patcher(rim, problem.question, targets, num_blocks=study.K)
        if clean.says[1]:
            donor = Patcher(rim, partner.problem.question, targets[2:], num_blocks=study.K)
            if donor.says[0]:
                yield Run(pair, clean, donor)


def _layers(study) -> list[int]:
    """Layers of 1..L-1 (see `spread_layers`): states are read by later layers alone, so the last is no place."""
    return spread_layers(range(1, study.layers[-1]))


def _another(count: int, index: int, rng: np.random.Generator) -> int:
    """A problem other than this one, where there is one."""
    return (index + int(rng.integers(1, max(count, 2)))) % count


def _others(last: int, spared: set[int], count: int, seed: int) -> list[int]:
    """As many blocks of 1..`last` as are swapped, drawn from those not spared; none where there are not so many."""
    others = [block for block in range(1, last + 1) if block not in spared]
    drawn = np.random.default_rng(seed).permutation(others)[:count].tolist() if len(others) >= count else []
    return sorted(drawn)
