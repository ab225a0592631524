"""Adaptive answering: by memory where a probe trusts the answer, else by chain of thought.

Method:
1. The memory method answers; forward hooks keep the states of its own prefix pass, so that judging costs no pass more.
2. A judge (`judge`, fitted by `correctness`; the best of those that need no readout but the final one) gives the chance
   that the final readout is right. At or above the threshold the answer stands; below it the question is asked again
   by chain of thought, and both are paid for.
3. Thresholds are chosen on one split (not the reported one), from 101 quantiles of the chance: `within a point` is the
   smallest mean latency at which accuracy is at most one point below chain of thought's; `half the time` is the highest
   accuracy at which mean latency is at most 45 % of chain of thought's (the goal is half; the rest is margin).
4. Latency at batch size 1: some problems are answered by every method in turn, in an order drawn anew each time. To
   choose, the seconds of a chain of thought are a line in its passes, fitted to the timed problems of that split, so
   that sending off the long ones is not taken for average. What is reported is clocked, on problems of the report.
   Of a slow model fewer problems are timed: as many as `MOST_SECONDS` allow, and never fewer than `FEWEST_TIMED`.

Compared with pure memory, pure chain of thought, the same rules on the readout's own probability (paired by problem;
its latency is put together from what was clocked), and random routing.
Knows routes and clocks. Knows nothing of how a judge is fitted or an answer decoded.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

from rim_probe.decoding import Answer, answer
from rim_probe.errors import RiMError
from rim_probe.model import RiM
from rim_probe.probing.capture import Capture
from rim_probe.probing.compact import is_large
from rim_probe.probing.correctness import CorrectnessProbe
from rim_probe.probing.hooks import read_residual
from rim_probe.probing.judge import Judge, own_probability, probability
from rim_probe.probing.section import Estimate, Figure, Section, Table, Target, bootstrap, proportion_estimate
from rim_probe.probing.study import Observation, Study
from rim_probe.problems import Problem, is_correct

WITHIN_POINT, HALF_TIME = "within a point", "half the time"
POINT, HALF, BUDGET = 0.01, 0.5, 0.45
QUANTILES = 101
WARM_UP_QUESTIONS = 3  # before the clock counts
TIMED_PROBLEMS = 200
MOST_SECONDS, FEWEST_TIMED = 120, 20  # of clocking one split
NEVER = 1.1  # a threshold no chance reaches: always chain of thought


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
    models: Mapping[str, RiM],
    question: str,
    probe: CorrectnessProbe | Judge,
    threshold: float,
    *,
    max_new_tokens: int = 256,
) -> AdaptiveAnswer:
    """Answers by memory, and by chain of thought where the judge gives that answer a chance below `threshold`.

    Args:
        models: `memory` and `cot`.

    Raises:
        RiMError: no `cot` model, or a question that cannot be asked.
    """
    if "cot" not in models:
        raise RiMError("Adaptive answering needs a chain-of-thought model; give one with the role “cot”.")
    judge = probe.quick_judge if isinstance(probe, CorrectnessProbe) else probe
    start = time.perf_counter()
    first, held = answer_observed(models["memory"], question, judge, max_new_tokens=max_new_tokens)
    chance = float(probability(judge.logits(held, [first]))[0, -1])
    shown = first
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
    return given, Capture(
        layers=layers,
        slots=states[:, :, slots],
        ends=states[:, :, ends],
        question=states[:, :, place - 1],
        to_question=None,
        to_memory=None,
        question_ids=[],
    )


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

    def seconds(self, threshold: float) -> np.ndarray:
        """Seconds of the adaptive answers, [n]."""
        return self.memory_seconds + self.sent(threshold) * self.cot_seconds

    def thresholds(self) -> np.ndarray:
        """Thresholds that send about 0 %, 1 % ... 100 % of the problems on, ascending."""
        inner = np.quantile(self.scores, np.linspace(0, 1, QUANTILES)[1:-1])
        return np.unique(np.concatenate([[-np.inf], inner, [np.inf]]))


def choose_threshold(outcomes: Outcomes, rule: str) -> float:
    """The threshold by one of the rules of step 3; where none qualifies, pure chain of thought (WITHIN_POINT), pure
    memory (HALF_TIME)."""
    candidates = outcomes.thresholds()
    accuracy = np.array([outcomes.right(threshold).mean() for threshold in candidates])
    seconds = np.array([outcomes.seconds(threshold).mean() for threshold in candidates])
    if rule == WITHIN_POINT:
        # A rounding error must not turn "exactly one point" into more.
        fit = accuracy >= outcomes.cot.mean() - POINT - 1e-9
        return float(candidates[fit][seconds[fit].argmin()])
    fit = seconds <= BUDGET * outcomes.cot_seconds.mean()
    return float(candidates[fit][accuracy[fit].argmax()]) if fit.any() else float(candidates[0])


@dataclass(frozen=True)
class AdaptivePolicy:
    """A judge with its thresholds.

    Attributes:
        judge: who judges the final readout.
        thresholds: by score (`judge`, `own`) and rule.
        splits: what the judge was fitted on; what the thresholds were chosen on.
        passes_to_seconds: slope and offset of a chain of thought's seconds in its passes.
        memory_seconds: mean of a judged memory answer, on the choosing split.
    """

    judge: Judge
    thresholds: Mapping[str, Mapping[str, float]]
    splits: tuple[str, str]
    passes_to_seconds: tuple[float, float]
    memory_seconds: float

    @classmethod
    def fit(
        cls, study: Study, probe: CorrectnessProbe | None = None, *, timed: int = TIMED_PROBLEMS // 2
    ) -> "AdaptivePolicy":
        """Chooses the thresholds on the split that the probe was chosen on (the probe is fitted where none is given).

        Raises:
            RiMError: the study has no `cot` model.
        """
        if "cot" not in study.models:
            raise RiMError("Adaptive answering needs a chain-of-thought model; put one into the folder cot/.")
        probe = probe or CorrectnessProbe.fit(study)
        split, judge = probe.splits[1], probe.quick_judge
        clock = _clock(study, judge, split, timed, -np.inf)
        passes = np.array([given.forward_passes for given in clock.cot])
        line = _line(passes, clock.seconds["chain of thought"])
        memory_seconds = float(clock.seconds["memory, judged"].mean())
        thresholds = {
            score: {
                rule: float(np.clip(choose_threshold(outcomes, rule), 0, NEVER)) for rule in (WITHIN_POINT, HALF_TIME)
            }
            for score, outcomes in _outcomes(study, judge, split, line, memory_seconds).items()
        }
        return cls(judge, thresholds, probe.splits, line, memory_seconds)

    def score(self, study: Study, *, timed: int = TIMED_PROBLEMS) -> Section:
        """Accuracy on all problems of the report split, clocked latency on some of them."""
        return _section(self, study, timed)

    def explain(self, observation: Observation) -> dict[str, Any]:
        """What the judge gives the memory answer and which way each rule would take."""
        chance = float(probability(self.judge.logits(observation.capture, [observation.answer]))[0, -1])
        return {
            "chance_right": round(chance, 4),
            "value": observation.answer.value,
            "rules": [
                {"rule": rule, "threshold": round(threshold, 4), "method": "cot" if chance < threshold else "memory"}
                for rule, threshold in self.thresholds["judge"].items()
            ],
        }

    def tensors(self) -> dict[str, np.ndarray]:
        """The judge's; of a large one, which lies beside it with the correctness probe, the biases alone."""
        stored = self.judge.tensors()
        return {"bias": stored["bias"]} if is_large([self.judge.weight]) else stored

    def settings(self) -> dict[str, Any]:
        return {
            "judge": self.judge.settings(),
            "thresholds": {score: dict(rules) for score, rules in self.thresholds.items()},
            "splits": list(self.splits),
            "passes_to_seconds": list(self.passes_to_seconds),
            "memory_seconds": self.memory_seconds,
        }

    @classmethod
    def restore(
        cls,
        tensors: Mapping[str, np.ndarray],
        settings: Mapping[str, Any],
        correctness: Callable[[], CorrectnessProbe] | None = None,
    ) -> "AdaptivePolicy":
        """The policy that `tensors` and `settings` came from.

        Args:
            correctness: gives the probe whose judge this is, where that was too large to be stored twice.

        Raises:
            RiMError: parts that are missing or do not fit together.
        """
        try:
            thresholds = {
                score: {rule: float(settings["thresholds"][score][rule]) for rule in (WITHIN_POINT, HALF_TIME)}
                for score in ("judge", "own")
            }
            if "weight" in tensors or correctness is None:
                judge = Judge.restore(tensors, settings["judge"])
            else:
                judge = correctness().quick_judge
                if not np.allclose(judge.bias, tensors["bias"]):
                    raise ValueError("the correctness probe beside it is another one")
            slope, offset = map(float, settings["passes_to_seconds"])
            return cls(judge, thresholds, tuple(settings["splits"]), (slope, offset), float(settings["memory_seconds"]))
        except (KeyError, ValueError, TypeError) as error:
            raise RiMError(f"The adaptive policy cannot be restored ({error}); fit it anew.") from None


def _outcomes(
    study: Study, judge: Judge, split: str, line: tuple[float, float], memory_seconds: float
) -> dict[str, Outcomes]:
    """The outcomes of a split under both scores, `judge` and `own`."""
    memory, cot = study.answers("memory", split), study.answers("cot", split)
    scores = {
        "judge": probability(judge.logits(study.capture("memory", split), memory)),
        "own": own_probability(memory, judge.num_blocks),
    }
    problems = study.problems(split)
    right = np.array([is_correct(given.value, problem.answer) for given, problem in zip(cot, problems, strict=True)])
    seconds = line[0] * np.array([given.forward_passes for given in cot]) + line[1]
    return {
        name: Outcomes(score[:, -1], study.right(split)[:, -1], right, memory_seconds, seconds)
        for name, score in scores.items()
    }


def _line(passes: np.ndarray, seconds: np.ndarray) -> tuple[float, float]:
    """Slope and offset of seconds in passes; flat where all passes are alike."""
    if np.ptp(passes) == 0:
        return 0.0, float(seconds.mean())
    slope, offset = np.polyfit(passes, seconds, 1)
    return float(slope), float(offset)


# ------------------------------------------------------------------------------------------------------------- clocks


@dataclass(frozen=True)
class _Clock:
    """Seconds [n] by what was done, and the chains of thought, of the problems that were timed."""

    seconds: dict[str, np.ndarray]
    cot: list[Answer]
    problems: list[int]


def _clock(study: Study, judge: Judge, split: str, timed: int, *thresholds: float) -> _Clock:
    """Answers some problems of a split in every way in turn (cf. `evaluation`), among them adaptively."""
    models, rng = study.models, study.rng(f"adaptive/clock/{split}")
    problems: Sequence[Problem] = study.problems(split)
    chosen = rng.permutation(len(problems))[:timed].tolist()
    names = ["memory", "chain of thought", *(f"adaptive {i}" for i in range(len(thresholds)))]
    seconds: dict[str, list[float]] = {name: [] for name in names}
    cot: list[Answer] = []
    done: list[int] = []

    def ask(name: str, question: str) -> tuple[float, Answer]:
        if name == "memory":
            given = answer(models["memory"], question, "memory", num_blocks=study.K, readouts="final")
            return given.total_seconds, given
        if name == "chain of thought":
            given = answer(models["cot"], question, "cot")
            return given.total_seconds, given
        given = answer_adaptive(models, question, judge, thresholds[int(name.split()[1])])
        return given.seconds, given.answer

    for i in chosen[:WARM_UP_QUESTIONS]:
        for name in names:
            ask(name, problems[i].question)
    start = time.perf_counter()
    for i in study.progress(chosen, f"latency {split}"):
        if len(done) >= FEWEST_TIMED and time.perf_counter() - start > MOST_SECONDS:
            break
        done.append(i)
        for place in rng.permutation(len(names)):
            spent, given = ask(names[place], problems[i].question)
            seconds[names[place]].append(spent)
            if names[place] == "chain of thought":
                cot.append(given)
    found = {name: np.array(values) for name, values in seconds.items()}
    found["memory, judged"] = found.pop("adaptive 0") if thresholds else found["memory"]
    return _Clock(found, cot, done)


# ------------------------------------------------------------------------------------------------------------- report


def _section(policy: AdaptivePolicy, study: Study, timed: int) -> Section:
    rules = policy.thresholds["judge"]
    clock = _clock(study, policy.judge, "report", timed, -np.inf, *rules.values())
    line = _line(np.array([given.forward_passes for given in clock.cot]), clock.seconds["chain of thought"])
    judged = float(clock.seconds["memory, judged"].mean())
    by = _outcomes(study, policy.judge, "report", line, judged)
    # A readout's own probability costs nothing to read: only the memory answer is paid.
    by["own"] = replace(by["own"], memory_seconds=float(clock.seconds["memory"].mean()))
    memory, cot, n = by["judge"].memory, by["judge"].cot, len(by["judge"].cot)
    clocked = {rule: clock.seconds[f"adaptive {i}"] for i, rule in enumerate(rules, start=1)}
    reference = clock.seconds["chain of thought"]

    def row(name: str, right: np.ndarray, sent: float, seconds: np.ndarray | None) -> list:
        gain = bootstrap(right.astype(float) - cot, seed=study.seed)
        spent = [None, None] if seconds is None else [_milliseconds(seconds, study.seed), _ratio(seconds, reference)]
        return [name, _accuracy(right), gain, f"{sent:.0%}", *spent]

    rows = [
        row("memory", memory, 0, clock.seconds["memory"]),
        row("memory, judged (nothing sent on)", memory, 0, clock.seconds["memory, judged"]),
        row("chain of thought", cot, 1, reference),
    ]
    targets, data, duels, parts = [], {}, [], []
    for rule, threshold in rules.items():
        sent, right = by["judge"].sent(threshold), by["judge"].right(threshold)
        rows.append(row(f"adaptive, {rule}", right, sent.mean(), clocked[rule]))
        other = policy.thresholds["own"][rule]
        other_right, other_sent = by["own"].right(other), by["own"].sent(other)
        spent = clock.seconds["memory"] + other_sent[clock.problems] * reference
        rows.append(row(f"control: own probability, {rule}", other_right, other_sent.mean(), spent))
        # The expected accuracy of random routing at the judge's rate, problem by problem.
        rate = sent.mean()
        rows.append(row(f"control: random routing at {rule}'s rate", rate * cot + (1 - rate) * memory, rate, None))
        gain = bootstrap(right.astype(float) - cot, seed=study.seed)
        ratio = _ratio(clocked[rule], reference)
        over_own = bootstrap(right.astype(float) - other_right, seed=study.seed)
        extra = _milliseconds(clocked[rule] - spent, study.seed)
        duels.append([rule, f"{rate:.0%}", f"{other_sent.mean():.0%}", over_own, extra])
        parts.append(_rule_summary(rule, by, threshold, other, gain, ratio, over_own, _ratio(spent, reference)))
        targets += [
            Target(f"accuracy of “{rule}” minus chain of thought's", ">= -0.01", gain, gain.value >= -POINT),
            Target(f"mean latency of “{rule}” relative to chain of thought", "< 0.5", ratio, ratio.value < HALF),
        ]
        data[rule] = {
            "threshold": threshold,
            "sent": float(rate),
            "accuracy": float(right.mean()),
            "own probability": {
                "threshold": other,
                "sent": float(other_sent.mean()),
                "accuracy": float(other_right.mean()),
            },
            "accuracy minus own probability": asdict(over_own),
        }
    ceiling = np.where(memory, memory, cot)
    rows.append(row("ceiling: sends on exactly what memory gets wrong", ceiling, 1 - memory.mean(), None))
    return Section(
        name="adaptive",
        title="Answer by memory when sure, else think aloud",
        question="Does it pay to answer by memory where the probe trusts the answer, and by chain of thought where it "
        "does not?",
        summary=_summary(memory, cot, parts),
        n={
            policy.splits[0]: len(study.problems(policy.splits[0])),
            policy.splits[1]: len(study.problems(policy.splits[1])),
        }
        | {"report": n, "timed": len(clock.problems)},
        settings={
            "judge": f"{policy.judge.view}, readouts {policy.judge.readouts}",
            "thresholds": {score: dict(found) for score, found in policy.thresholds.items()},
            "chosen on": policy.splits[1],
            WITHIN_POINT: f"smallest mean latency with accuracy on {policy.splits[1]} at most one point below chain of "
            "thought's",
            HALF_TIME: f"highest accuracy on {policy.splits[1]} with mean latency at most {BUDGET:.0%} of chain of "
            "thought's",
            "candidates": QUANTILES,
        },
        tables=[
            Table(
                f"Accuracy (n = {n}) and latency at batch size 1 (n = {len(clock.problems)}, clocked in turn)",
                ["method", "right", "minus chain of thought", "sent on", "mean ms", "latency relative to CoT"],
                rows,
                note="Adaptive answers pay for memory, for the judge and, where sent on, for the chain of thought. "
                "Rows of the control “own probability” are put together from the clocked parts.",
            ),
            Table(
                "Routing by the judge minus routing by the readout's own probability, paired by problem",
                ["rule", "judge sends on", "own probability sends on", "right", "milliseconds"],
                duels,
                note="Each has a threshold of its own, so they spend different times: compare both columns.",
            ),
        ],
        figures=[_frontier(policy, by, clock)],
        targets=targets,
        data=data,
    )


def _accuracy(right: np.ndarray) -> Estimate:
    return proportion_estimate(right) if right.dtype == bool else bootstrap(right)


def _milliseconds(seconds: np.ndarray, seed: int) -> Estimate:
    return bootstrap(1000 * seconds, seed=seed)


def _ratio(seconds: np.ndarray, reference: np.ndarray) -> Estimate:
    return bootstrap((seconds, reference), lambda first, second: first.mean() / second.mean())


def _frontier(policy: AdaptivePolicy, by: Mapping[str, Outcomes], clock: _Clock) -> Figure:
    series = []
    for score, name in (("judge", "by the judge"), ("own", "by the readout's own probability")):
        thresholds = by[score].thresholds()
        series.append(
            {
                "name": name,
                "x": [1000 * float(by[score].seconds(threshold).mean()) for threshold in thresholds],
                "y": [float(by[score].right(threshold).mean()) for threshold in thresholds],
                "low": None,
                "high": None,
                "control": score == "own",
            }
        )
    outcomes = by["judge"]
    memory_ms, cot_ms = 1000 * outcomes.memory_seconds, 1000 * float(outcomes.cot_seconds.mean())
    memory, cot = float(outcomes.memory.mean()), float(outcomes.cot.mean())
    points = {
        "random routing": ([memory_ms, memory_ms + cot_ms], [memory, cot]),
        "pure memory": ([1000 * float(clock.seconds["memory"].mean())], [memory]),
        "pure chain of thought": ([cot_ms], [cot]),
    }
    for rule, threshold in policy.thresholds["judge"].items():
        points[f"chosen: {rule}"] = (
            [1000 * float(outcomes.seconds(threshold).mean())],
            [float(outcomes.right(threshold).mean())],
        )
    for name, (x, y) in points.items():
        control = name == "random routing"
        series.append({"name": name, "x": x, "y": y, "low": None, "high": None, "control": control})
    return Figure(
        "lines",
        f"Accuracy against mean latency as the threshold moves (report, n = {len(outcomes.cot)})",
        "mean milliseconds of an answer, batch size 1",
        "right",
        {"series": series},
        note="Seconds of a chain of thought: a line in its passes, fitted to the timed problems.",
    )


def _summary(memory: np.ndarray, cot: np.ndarray, parts: Sequence[str]) -> str:
    pure = ""
    if memory.mean() >= cot.mean() - POINT:
        pure = " Pure memory alone is within a point of chain of thought here, so only a gain above it counts."
    return (
        f"Memory is right in {memory.mean():.1%}, chain of thought in {cot.mean():.1%} of the problems. "
        f"{' '.join(parts)}{pure}"
    )


def _rule_summary(
    rule: str,
    by: Mapping[str, Outcomes],
    threshold: float,
    other: float,
    gain: Estimate,
    ratio: Estimate,
    over_own: Estimate,
    own_ratio: Estimate,
) -> str:
    """Sentences on one rule: what it sends on, its control, random routing, and by how much a target is missed."""
    outcomes, own = by["judge"], by["own"]
    sent, right = outcomes.sent(threshold).mean(), outcomes.right(threshold).mean()
    random = sent * outcomes.cot.mean() + (1 - sent) * outcomes.memory.mean()
    sends = {0.0: "nothing on (it is pure memory)", 1.0: "everything on"}.get(float(sent), f"{sent:.0%} on")
    own_sent = own.sent(other).mean()
    own_sends = "sends nothing on" if own_sent == 0 else f"sends {own_sent:.0%} on"
    if over_own.low > 0 or over_own.high < 0:
        duel = "the judge is better" if over_own.low > 0 else "the judge is worse"
    else:
        duel = "no difference is shown"
    missed = []
    if gain.value < -POINT:
        missed.append(f"its accuracy goal by {_short(100 * (-POINT - gain.value))} points")
    if ratio.value >= HALF:
        missed.append(f"its latency goal by {_short(ratio.value - HALF)} of chain of thought's latency")
    return (
        f"“{rule}” sends {sends} and is right in {right:.1%} (random routing at that rate: {random:.1%}) at "
        f"{ratio.value:.2f} of chain of thought's latency; "
        + (f"it misses {' and '.join(missed)}. " if missed else "it meets both its goals. ")
        + f"By the readout's own probability the same rule {own_sends} and is right in {own.right(other).mean():.1%} "
        f"at {own_ratio.value:.2f} of that latency: {duel} (judge minus own {100 * over_own.value:+.1f} points, "
        f"{100 * over_own.low:+.1f} to {100 * over_own.high:+.1f})."
    )


def _short(amount: float) -> str:
    """How much is missing, never as a zero."""
    return f"{amount:.2f}" if amount >= 0.01 else "less than 0.01"
