"""Adaptive answering: by memory where a probe trusts the answer, else by chain of thought.

Method:
1. The memory method answers; forward hooks keep the states of its own prefix pass, so that judging costs no pass more.
2. A judge (`judge`, fitted by `correctness`; the best of those that need no readout but the final one) gives the chance
   that the final readout is right. At or above the threshold the answer stands; below it the question is asked again
   by chain of thought, and both are paid for.
3. Thresholds are chosen on one split (not the reported one), from 101 quantiles of the chance: `within a point` is the
   smallest mean latency at which accuracy is at most one point below chain of thought's; `half the time` is the highest
   accuracy at which mean latency is at most 45 % of chain of thought's (the goal is half; the rest is margin).
4. Latency at batch size 1: some problems are answered by memory, by memory with the judge, and by chain of thought, in
   an order drawn anew each time. A rule costs the first and, where it sends on, the chain of thought of that problem.
   For thresholds, the seconds of the chains that were not timed are a line in their passes, so that sending off the
   long ones is not taken for average. Of a slow model fewer problems are timed: as many as `MOST_SECONDS` allow, and
   never fewer than `FEWEST_TIMED`.
5. A rule that sends nothing on is pure memory, whose latency says nothing of routing. Latency has a goal only where a
   rule routes (some problems sent on, and some not), the gain over random routing only where there could be one.

Compared with pure memory, pure chain of thought, random routing, and the same rules on the readout's own probability
(which costs nothing to read), paired by problem.
Knows routes and clocks. Knows nothing of how a judge is fitted or an answer decoded.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from rim_probe.decoding import Answer, answer
from rim_probe.errors import RiMError
from rim_probe.model import RiM
from rim_probe.numbers import format_interval
from rim_probe.probing.capture import Capture
from rim_probe.probing.correctness import CorrectnessProbe
from rim_probe.probing.hooks import read_residual
from rim_probe.probing.judge import Judge, own_probability
from rim_probe.probing.results import Cloud, Goal, Report, Result, mean_estimate, proportion_estimate, ratio_estimate
from rim_probe.probing.study import Observation, Study
from rim_probe.problems import is_correct

WITHIN_POINT, HALF_TIME = "within a point", "half the time"
RULES = (WITHIN_POINT, HALF_TIME)
POINT, HALF, BUDGET = 0.01, 0.5, 0.45
QUANTILES = 101
WARM_UP_QUESTIONS = 3  # before the clock counts
TIMED_PROBLEMS = 200
MOST_SECONDS, FEWEST_TIMED = 120, 20  # of clocking one split
NEVER = 1.1  # a threshold no chance reaches: always chain of thought
MEMORY, JUDGED, CHAIN = "memory", "memory, judged", "chain of thought"
FIRST = {"judge": JUDGED, "own": MEMORY}  # what a score costs
OWN, RANDOM = "own probability", "random routing at the judge's rate"
GAIN, RELATIVE = "right, minus chain of thought", "latency, relative to chain of thought"


@dataclass(frozen=True)
class AdaptiveAnswer:
    """One adaptively answered question.

    Attributes:
        answer: the answer that stands; its `method` says which way was taken.
        memory: the answer by memory, which always comes first.
        chance: what the judge gave the memory answer.
        seconds: all of it, judging included.
    """

    answer: Answer
    memory: Answer
    chance: float
    seconds: float


def answer_adaptive(
    models: Mapping[str, RiM], question: str, judge: Judge, threshold: float, *, max_new_tokens: int = 256
) -> AdaptiveAnswer:
    """Answers by memory, and by chain of thought where the judge gives that answer a chance below `threshold`.

    Args:
        models: `memory` and `cot`.

    Raises:
        RiMError: no `cot` model, or a question that cannot be asked.
    """
    if "cot" not in models:
        raise RiMError("Adaptive answering needs a chain-of-thought model; give one with the role “cot”.")
    start = time.perf_counter()
    first, held = answer_observed(models["memory"], question, judge, max_new_tokens=max_new_tokens)
    chance, shown = float(judge.chances(held, [first])[0, -1]), first
    if chance < threshold:
        shown = answer(models["cot"], question, "cot", max_new_tokens=max_new_tokens)
    return AdaptiveAnswer(shown, first, chance, time.perf_counter() - start)


def answer_observed(rim: RiM, question: str, judge: Judge, *, max_new_tokens: int = 256) -> tuple[Answer, Capture]:
    """The memory answer and, out of the same pass, the states that a judge reads (only the layers it sees)."""
    num_blocks, layout, layers = judge.num_blocks, rim.layout, judge.seen_layers
    found: dict[int, torch.Tensor] = {}

    def read(layer: int, states: torch.Tensor) -> None:
        found.setdefault(layer, states)  # the first pass is the one over the prompt

    with read_residual(rim, layers, read):
        readouts = "all" if judge.readouts == "all" else "final"
        given = answer(rim, question, "memory", num_blocks=num_blocks, max_new_tokens=max_new_tokens, readouts=readouts)
    states = torch.stack([found[layer] for layer in layers], dim=1)  # [1, layers, T, d]
    place = states.shape[2] - num_blocks * layout.block_length
    slots = torch.tensor(layout.slot_positions(place, num_blocks))
    ends = torch.tensor(layout.end_positions(place, num_blocks))
    states = states.cpu()
    return given, Capture(layers, states[:, :, slots], states[:, :, ends], states[:, :, place - 1], None, None, [])


# ------------------------------------------------------------------------------------------------------------ routing


@dataclass(frozen=True)
class Outcomes:
    """What routing n problems is decided and judged by.

    Attributes:
        scores [n]: the higher, the more the memory answer is trusted.
        memory, cot [n]: whether each method is right.
        memory_seconds: mean of a judged memory answer; cot_seconds [n]: of a chain of thought.
    """

    scores: np.ndarray
    memory: np.ndarray
    cot: np.ndarray
    memory_seconds: float
    cot_seconds: np.ndarray

    def sent(self, threshold: float) -> np.ndarray:
        """Which problems go on to chain of thought, bool [n]."""
        return self.scores < threshold

    def right(self, threshold: float) -> np.ndarray:
        """Whether the adaptive answers are right, bool [n]."""
        return np.where(self.sent(threshold), self.cot, self.memory)

    def random(self, threshold: float) -> np.ndarray:
        """The chance of being right by random routing at the same rate, [n]."""
        rate = self.sent(threshold).mean()
        return rate * self.cot + (1 - rate) * self.memory

    def seconds(self, threshold: float) -> np.ndarray:
        """Seconds of the adaptive answers, [n]."""
        return self.memory_seconds + self.sent(threshold) * self.cot_seconds

    def frontier(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Thresholds that send about 0 %, 1 % ... 100 % of the problems on, ascending; mean seconds and accuracy."""
        inner = np.quantile(self.scores, np.linspace(0, 1, QUANTILES)[1:-1])
        thresholds = np.unique(np.concatenate([[-np.inf], inner, [np.inf]]))
        means = [(self.seconds(threshold).mean(), self.right(threshold).mean()) for threshold in thresholds]
        return thresholds, *np.array(means).T


def choose_threshold(outcomes: Outcomes, rule: str) -> float:
    """The threshold by one of the rules of step 3; where none qualifies, pure chain of thought (WITHIN_POINT), pure
    memory (HALF_TIME)."""
    thresholds, seconds, accuracy = outcomes.frontier()
    if rule == WITHIN_POINT:
        # A rounding error must not turn "exactly one point" into more.
        fit = accuracy >= outcomes.cot.mean() - POINT - 1e-9
        return float(thresholds[fit][seconds[fit].argmin()])
    fit = seconds <= BUDGET * outcomes.cot_seconds.mean()
    return float(thresholds[fit][accuracy[fit].argmax()]) if fit.any() else float(thresholds[0])


@dataclass(frozen=True)
class AdaptivePolicy:
    """A judge with its thresholds.

    Attributes:
        judge: who judges the final readout.
        thresholds: by score (`judge`, `own`) and rule.
        splits: what the judge was fitted on; what the thresholds were chosen on.
    """

    judge: Judge
    thresholds: Mapping[str, Mapping[str, float]]
    splits: tuple[str, str]

    @classmethod
    def fit(cls, study: Study, probe: CorrectnessProbe) -> "AdaptivePolicy":
        """Chooses the thresholds on the split that the probe was chosen on.

        Raises:
            RiMError: the study has no `cot` model.
        """
        if "cot" not in study.models:
            raise RiMError("Adaptive answering needs a chain-of-thought model; put one into the folder cot/.")
        split, judge = probe.splits[1], probe.quick_judge
        clock = _clock(study, judge, split, TIMED_PROBLEMS // 2)
        thresholds = {
            score: {rule: float(np.clip(choose_threshold(outcomes, rule), 0, NEVER)) for rule in RULES}
            for score, outcomes in _outcomes(study, judge, split, clock).items()
        }
        return cls(judge, thresholds, probe.splits)

    def score(self, study: Study) -> Report:
        """Accuracy on all problems of the report split, clocked latency on some of them."""
        clock = _clock(study, self.judge, "report", TIMED_PROBLEMS)
        by = _outcomes(study, self.judge, "report", clock)
        settings = {
            "judge": f"{self.judge.view}, readouts {self.judge.readouts}",
            "thresholds": self.thresholds,
            "thresholds tried": QUANTILES,
            "chosen on": self.splits[1],
            WITHIN_POINT: {"most accuracy below chain of thought's": POINT},
            HALF_TIME: {"most mean latency, relative to chain of thought's": BUDGET},
        }
        counts = {split: len(study.problems(split)) for split in (*self.splits, "report")}
        verdict = " ".join(_verdict(rule, by["judge"], self.thresholds["judge"][rule]) for rule in RULES)
        clouds = {"Accuracy against mean latency as the threshold moves": _frontier(by, self.thresholds["judge"])}
        results = list(_results(by, self.thresholds, clock))
        return Report("adaptive", results, counts | {"timed": len(clock.problems)}, settings, verdict, clouds)

    def explain(self, observation: Observation) -> dict[str, Any]:
        """What the judge gives the memory answer and which way each rule would take."""
        chance = float(self.judge.chances(observation.capture, [observation.answer])[0, -1])
        return {
            "chance_right": round(chance, 4),
            "value": observation.answer.value,
            "rules": [
                {"rule": rule, "threshold": round(threshold, 4), "method": "cot" if chance < threshold else "memory"}
                for rule, threshold in self.thresholds["judge"].items()
            ],
        }

    def tensors(self) -> dict[str, np.ndarray]:
        """The biases of the judge, which lies beside it with the correctness probe."""
        return {"bias": self.judge.tensors()["bias"]}

    def settings(self) -> dict[str, Any]:
        return {"thresholds": self.thresholds, "splits": list(self.splits)}

    @classmethod
    def restore(
        cls,
        tensors: Mapping[str, np.ndarray],
        settings: Mapping[str, Any],
        correctness: Callable[[], CorrectnessProbe],
    ) -> "AdaptivePolicy":
        """The policy that `tensors` and `settings` came from; `correctness` gives the probe whose judge this is.

        Raises:
            RiMError: parts that are missing or do not fit together.
        """
        try:
            thresholds = {
                score: {rule: float(settings["thresholds"][score][rule]) for rule in RULES} for score in FIRST
            }
            judge = correctness().quick_judge
            if not np.allclose(judge.bias, tensors["bias"]):
                raise ValueError("the correctness probe beside it is another one")
            return cls(judge, thresholds, tuple(settings["splits"]))
        except (KeyError, ValueError, TypeError) as error:
            raise RiMError(f"The adaptive policy cannot be restored ({error}); fit it anew.") from None


def _outcomes(study: Study, judge: Judge, split: str, clock: "_Clock") -> dict[str, Outcomes]:
    """The outcomes of a split under both scores, `judge` and `own`; seconds by the clock of some of its problems."""
    memory, cot = study.answers("memory", split), study.answers("cot", split)
    scores = {
        "judge": judge.chances(study.capture("memory", split), memory),
        "own": own_probability(memory, judge.num_blocks),
    }
    right = [is_correct(given.value, one.answer) for given, one in zip(cot, study.problems(split), strict=True)]
    seconds = clock.chain_seconds(np.array([given.forward_passes for given in cot]))
    return {
        name: Outcomes(
            score[:, -1], study.right(split)[:, -1], np.array(right), clock.seconds[FIRST[name]].mean(), seconds
        )
        for name, score in scores.items()
    }


# ------------------------------------------------------------------------------------------------------------- clocks


@dataclass(frozen=True)
class _Clock:
    """Seconds [timed] by what was done, and the indices [timed] of the problems it was done with."""

    seconds: Mapping[str, np.ndarray]
    problems: np.ndarray

    def chain_seconds(self, passes: np.ndarray) -> np.ndarray:
        """Seconds of all chains of thought [n]: a line in their passes, flat where those timed are alike."""
        timed = passes[self.problems]
        return np.polyval(np.polyfit(timed, self.seconds[CHAIN], 1 if np.ptp(timed) else 0), passes)


def _clock(study: Study, judge: Judge, split: str, timed: int) -> _Clock:
    """Answers some problems of a split in every way in turn (cf. `evaluation`)."""
    models, rng, problems = study.models, study.rng(f"adaptive/clock/{split}"), study.problems(split)
    chosen = rng.permutation(len(problems))[:timed]
    memory = {"num_blocks": study.K, "readouts": "final"}
    ways: dict[str, Callable[[str], float]] = {
        MEMORY: lambda question: answer(models["memory"], question, "memory", **memory).total_seconds,
        JUDGED: lambda question: answer_adaptive(models, question, judge, -np.inf).seconds,
        CHAIN: lambda question: answer(models["cot"], question, "cot").total_seconds,
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for i in chosen[:WARM_UP_QUESTIONS]:
        for way in ways.values():
            way(problems[i].question)
    start, done = time.perf_counter(), 0
    for i in study.progress(chosen, f"latency {split}"):
        if done >= FEWEST_TIMED and time.perf_counter() - start > MOST_SECONDS:
            break
        for name in rng.permutation(list(ways)):
            seconds[name].append(ways[name](problems[i].question))
        done += 1
    return _Clock({name: np.array(values) for name, values in seconds.items()}, chosen[:done])


# ------------------------------------------------------------------------------------------------------------ results


def _results(
    by: Mapping[str, Outcomes], thresholds: Mapping[str, Mapping[str, float]], clock: _Clock
) -> Iterator[Result]:
    """Rules beside their controls, then what they choose between and the most that routing could gain."""
    judge, own, chain = by["judge"], by["own"], clock.seconds[CHAIN]

    def told(name, role, right=None, seconds=None, place=None, goals=None) -> Iterator[Result]:
        """One way of answering: right [n], or the chance of it, and seconds [timed]."""
        found = {}
        if right is not None:
            gain = {GAIN: mean_estimate(right - 1.0 * judge.cot)} if name != CHAIN else {}
            found = gain | {"right": proportion_estimate(right) if right.dtype == bool else mean_estimate(right)}
        if seconds is not None:
            found |= {RELATIVE: ratio_estimate(seconds, chain), "latency, ms": mean_estimate(1000 * seconds)}
        for metric, estimate in found.items():
            share, goal = metric in (GAIN, "right"), (goals or {}).get(metric)
            yield Result(metric, name, estimate, role, share, place=place or {}, goal=goal)

    for rule in RULES:
        at, own_at, place = thresholds["judge"][rule], thresholds["own"][rule], {"rule": rule}
        routes = 0 < judge.sent(at).sum() < len(judge.cot)  # where nothing is sent on, only memory is measured
        goals = {GAIN: Goal(">=", -POINT), RELATIVE: Goal("<=", HALF)} if routes else {}
        spent = clock.seconds[JUDGED] + judge.sent(at)[clock.problems] * chain
        own_spent = clock.seconds[MEMORY] + own.sent(own_at)[clock.problems] * chain
        yield from told("judge", "score", judge.right(at), spent, place, goals)
        yield from told(OWN, "control", own.right(own_at), own_spent, place)
        yield from told(RANDOM, "control", judge.random(at), None, place)
        for name, role, sent in (("judge", "score", judge.sent(at)), (OWN, "control", own.sent(own_at))):
            yield Result("sent on to chain of thought", name, proportion_estimate(sent), role, place=place)
        lead = judge.right(at) - judge.random(at)
        goal = None if np.allclose(lead, 0) else Goal(">=", 0.0, whole=True)
        yield Result("right, judge minus it", RANDOM, mean_estimate(lead), place=place, goal=goal)
        lead = judge.right(at) - 1.0 * own.right(own_at)
        yield Result("right, judge minus it", OWN, mean_estimate(lead), place=place)
        extra = mean_estimate(1000 * (spent - own_spent))
        yield Result("latency, ms, judge minus it", OWN, extra, share=False, place=place)
    for name, right in ((MEMORY, judge.memory), (JUDGED, None), (CHAIN, judge.cot)):
        yield from told(name, "control", right, clock.seconds[name])
    yield from told("sends on exactly what memory gets wrong", "positive control", judge.memory | judge.cot)


def _frontier(by: Mapping[str, Outcomes], chosen: Mapping[str, float]) -> Cloud:
    """Mean milliseconds and accuracy at every threshold (the first is pure memory), and at those chosen."""
    judge = by["judge"]
    points = {
        "pure chain of thought": ([judge.cot_seconds.mean()], [judge.cot.mean()]),
        f"by {OWN}": by["own"].frontier()[1:],
        "by the judge": judge.frontier()[1:],
    }
    for rule, at in chosen.items():
        points[f"chosen: {rule}"] = [judge.seconds(at).mean()], [judge.right(at).mean()]
    groups = {name: ([1000 * float(x) for x in xs], [float(y) for y in ys]) for name, (xs, ys) in points.items()}
    return Cloud("mean milliseconds of an answer, batch size 1", "right", groups)


def _verdict(rule: str, judge: Outcomes, threshold: float) -> str:
    """What one rule routes, and what that is worth beside random routing at the same rate."""
    sent = judge.sent(threshold)
    if sent.all() or not sent.any():
        return f"“{rule}” sends {'everything' if sent.all() else 'nothing'} on, so it shows nothing about routing."
    lead = mean_estimate(judge.right(threshold) - judge.random(threshold))
    points = format_interval(lead.value, lead.low, lead.high, share=True)
    return f"“{rule}” sends {sent.mean():.0%} on and gains {points} points over random routing at that rate."
