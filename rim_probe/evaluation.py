"""How often each method is right, and how sure that figure is.

The methods memory, cot and direct are asked the same problems; one report (a JSON-ready dict) holds

1. accuracy with a 95 % Wilson interval, over all problems and by number of reasoning steps; for memory every block's
   readout, the final one, and "any block" (at least one readout is right: the ceiling of choosing among the blocks);
2. paired comparisons of memory with direct and with cot: discordant counts and the exact McNemar test;
3. the controls: memory blocks removed (K = 0), K swept at inference, and beside it the same places of the readout with
   other blocks (`decoding.PLACES`): what K gives beyond a later position;
4. an interval over chains: problems that share their steps are drawn together.

Knows the statistics and the report of one file. Does not know how a method answers (decoding), how a value is graded
(problems), what an answer costs (costs), or how a report looks (report).
"""

import datetime
import hashlib
import os
import platform
import random
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from scipy.stats import binomtest
from tqdm import tqdm

from rim_probe.decoding import PLACES, Place, answer_batch, answer_placed
from rim_probe.errors import QuestionError
from rim_probe.model import RiM
from rim_probe.precision import SMALL_MODEL
from rim_probe.problems import Problem, ProblemFile, is_correct
from rim_probe.report import EVALUATION_FORMAT as REPORT_FORMAT

BLOCK_SWEEP = tuple(range(17))
PLACED_BLOCKS = (1, 2, 4, 8, 16)  # K of the controls of place
PLACED_PROBLEMS = 300  # of them, drawn by the seed: every K and place is a pass of its own
CLUSTER_DRAWS = 1000
GPU_BATCH, SMALL_MODEL_BATCH, CPU_BATCH = 128, 64, 16  # problems asked at once, see `usual_batch`
GROUP_BATCHES = 4  # batches sorted by length together; an interrupted run loses at most so many
SHOWN_REJECTIONS = 20  # rejected data lines listed in a report; all are counted


def wilson_interval(right: int, n: int) -> tuple[float, float]:
    """95 % Wilson score interval of a proportion (Wilson 1927); 0 to 1 where n is 0."""
    if n == 0:
        return 0.0, 1.0
    interval = binomtest(right, n).proportion_ci(0.95, "wilson")
    return float(interval.low), float(interval.high)


def mcnemar_p(only_first: int, only_second: int) -> float:
    """Two-sided exact McNemar p: without a difference a discordant problem falls to either side with chance 1/2."""
    n = only_first + only_second
    return float(binomtest(only_first, n, 0.5).pvalue) if n else 1.0


def proportion(outcomes: Iterable[bool]) -> dict[str, Any]:
    """{"right", "n", "accuracy", "low", "high"}: a share and its 95 % Wilson interval; accuracy None if n is 0."""
    outcomes = list(outcomes)
    right, n = sum(outcomes), len(outcomes)
    low, high = wilson_interval(right, n)
    return {"right": right, "n": n, "accuracy": right / n if n else None, "low": low, "high": high}


def spread(values: Sequence[float]) -> dict[str, float]:
    """{"median", "q1", "q3", "mean"} of at least one value; quartiles by linear interpolation."""
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {"median": median, "q1": q1, "q3": q3, "mean": statistics.fmean(values)}


@dataclass(frozen=True)
class Arm:
    """One way in which every problem is asked: a method and, for memory, the number of blocks and their place."""

    method: str
    num_blocks: int | None = None
    place: Place | None = None


class Outcome(NamedTuple):
    """What became of one problem; `blocks` says of each memory readout whether it is right."""

    final: bool = False
    blocks: Sequence[bool] = ()
    truncated: bool = False  # stopped at max_new_tokens before the model ended its answer
    refused: bool = False  # too long for the context or with unknown words: never asked, counted as wrong


def usual_batch(methods: Mapping[str, RiM]) -> int:
    """Problems asked at once where nobody says how many.

    On a CPU a model of 135 million parameters is busy with 16 (SmolLM2 on one core, answers of four tokens: 5.2
    problems a second, 4.9 in batches of 32, 4.3 of 64); padding and caches make more of them slower.
    """
    rim = next(iter(methods.values()))
    if rim.device.type != "cpu":
        return GPU_BATCH
    return SMALL_MODEL_BATCH if rim.model.num_parameters() <= SMALL_MODEL else CPU_BATCH


@dataclass
class Journal:
    """What has been asked so far: with it a run that was broken off goes on where it was.

    Attributes:
        outcomes: by arm and index of the problem, whole groups only.
        after_group: called when a group has been added.
    """

    outcomes: dict[Arm, dict[int, Outcome]] = field(default_factory=dict)
    after_group: Callable[[], object] = lambda: None


def evaluate(
    methods: Mapping[str, RiM],
    problems: Sequence[Problem],
    *,
    num_blocks: int | None = None,
    batch_size: int = 64,
    max_new_tokens: int = 256,
    block_sweep: Sequence[int] = BLOCK_SWEEP,
    placed: int = 0,
    seed: int = 0,
    progress: bool = True,
    label: str = "accuracy",
    journal: Journal | None = None,
) -> dict[str, Any]:
    """Asks every method every problem and reports (see the module docstring); the caller adds `report["run"]`.

    Ctrl-C ends the measurement, not the report: what is done by then is returned with `interrupted` true and the number
    `done`. All methods have then seen the same problems.

    Args:
        methods: the model of each method to be compared, as `load_methods` returns them, or some of them.
        num_blocks: K for memory; None is the layout's own.
        batch_size: problems per batch of the accuracy part.
        max_new_tokens: an answer that is longer is cut and counted as truncated.
        block_sweep: the values of K for which the final block's accuracy is reported; empty skips the sweep.
        placed: so many problems are asked with the controls of place, too.
        seed: of the order of batches, and of the draw of those problems.
        label: of the progress bar.
        journal: is filled; what it holds of an earlier run with the same arguments is not asked again.
    """
    memory = methods.get("memory")
    if memory is not None:
        num_blocks = memory.layout.check_blocks(num_blocks)
        block_sweep = sorted({memory.layout.check_blocks(count) for count in block_sweep})
    else:
        num_blocks, block_sweep = None, []
    own = num_blocks or 0
    arms = {name: Arm(name, num_blocks if name == "memory" else None) for name in methods}
    # Readout k sees the question and blocks 1..k, whatever K is: a run at K holds the final readout of every smaller K
    # but 0.
    most = max([own, *block_sweep])
    sweep_arms = {k: arms["memory"] if 1 <= k <= own else Arm("memory", most if k else 0) for k in block_sweep}

    asked = dict.fromkeys([*arms.values(), *sweep_arms.values()])
    journal = journal or Journal()
    interrupted = _ask_all(
        methods, problems, asked, batch_size, max_new_tokens, seed, label if progress else None, journal
    )
    results = journal.outcomes
    placed_arms = [Arm("memory", k, place) for place in PLACES for k in PLACED_BLOCKS if k <= most and k in block_sweep]
    few = random.Random(seed).sample(range(len(problems)), min(placed, len(problems))) if placed_arms else []
    if few and not interrupted:
        interrupted = _ask_all(methods, problems, placed_arms, batch_size, max_new_tokens, seed, None, journal, few)
    done = sorted(results[next(iter(arms.values()))])
    steps = [len(problems[i].steps) for i in done]
    outcomes = {name: [results[arm][i] for i in done] for name, arm in arms.items()}

    return {
        "format": REPORT_FORMAT,
        "interrupted": interrupted,
        "requested": len(problems),
        "done": len(done),
        "settings": {
            "num_blocks": num_blocks,
            "batch_size": batch_size,
            "max_new_tokens": max_new_tokens,
            "block_sweep": list(block_sweep),
            "seed": seed,
        },
        "models": {
            name: {
                "name": rim.name,
                "shares_memory_weights": name != "memory" and rim is memory,
                "dtype": str(rim.dtype).removeprefix("torch."),
            }
            for name, rim in methods.items()
        },
        "accuracy": {name: _accuracy(outcomes[name], steps) for name in methods},
        "paired": [
            _paired("memory", other, outcomes) for other in ("direct", "cot") if {"memory", other} <= set(methods)
        ],
        "sweep": [_sweep_entry(k, [results[arm][i] for i in done]) for k, arm in sweep_arms.items()],
        "placed": [
            {"place": arm.place, "num_blocks": arm.num_blocks, **proportion(one.final for one in results[arm].values())}
            for arm in placed_arms
            if results.get(arm)
        ],
        "chains": {
            name: cluster_interval([one.final for one in told], [" ".join(problems[i].steps) for i in done])
            for name, told in outcomes.items()
            if any(steps)
        },
    }


def _ask_all(
    methods: Mapping[str, RiM],
    problems: Sequence[Problem],
    arms: Iterable[Arm],
    batch_size: int,
    max_new_tokens: int,
    seed: int,
    label: str | None,
    journal: Journal,
    chosen: Sequence[int] | None = None,
) -> bool:
    """Fills the journal with the outcomes of every arm; says whether Ctrl-C came.

    `label`: of the bar, None for none; `chosen`: indices of the problems to ask, all where there are none.
    Problems come in random groups of a few batches, sorted by length inside a group (little padding), and only whole
    groups count: what an interrupted run has done is then a random sample. Single batches would not be one, since
    problems of like length tend to have the same number of steps.
    """
    order = list(chosen or random.Random(seed).sample(range(len(problems)), len(problems)))
    arms = list(arms)
    for arm in arms:
        journal.outcomes.setdefault(arm, {})
    groups = _split(order, GROUP_BATCHES * batch_size)
    missing = [group for group in groups if not all(i in journal.outcomes[arm] for arm in arms for i in group)]
    known = len(order) - sum(map(len, missing))
    with tqdm(total=len(order), initial=known, desc=label, unit="problem", disable=label is None) as bar:
        try:
            for group in missing:
                found: dict[Arm, dict[int, Outcome]] = {arm: {} for arm in arms}
                for batch in _split(sorted(group, key=lambda i: len(problems[i].question)), batch_size):
                    asked = [problems[i] for i in batch]
                    for arm, outcomes in found.items():
                        outcomes.update(zip(batch, _ask(methods[arm.method], arm, asked, max_new_tokens), strict=True))
                    bar.update(len(batch))
                for arm, outcomes in found.items():
                    journal.outcomes[arm] |= outcomes
                journal.after_group()
        except KeyboardInterrupt:
            return True
    return False


def _split(items: Sequence[int], size: int) -> list[Sequence[int]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def _ask(rim: RiM, arm: Arm, problems: Sequence[Problem], max_new_tokens: int) -> list[Outcome]:
    """Outcomes of one batch of one arm, in the order of `problems`."""
    outcomes = [Outcome(refused=True)] * len(problems)
    taken = [i for i, problem in enumerate(problems) if can_ask(rim, problem.question, arm.method, arm.num_blocks)]
    if taken:
        questions = [problems[i].question for i in taken]
        if arm.place is not None:
            answers = answer_placed(rim, questions, arm.place, arm.num_blocks or 0, max_new_tokens=max_new_tokens)
        else:
            answers = answer_batch(rim, questions, arm.method, num_blocks=arm.num_blocks, max_new_tokens=max_new_tokens)
        for i, given in zip(taken, answers, strict=True):
            gold = problems[i].answer
            outcomes[i] = Outcome(
                final=is_correct(given.value, gold),
                blocks=tuple(is_correct(readout.value, gold) for readout in given.readouts if readout.block),
                truncated=given.truncated,
            )
    return outcomes


def can_ask(rim: RiM, question: str, method: str, num_blocks: int | None = None) -> bool:
    """Whether a model takes a question: neither empty nor too long, and of known words (`RiM.prompt_ids`)."""
    try:
        rim.prompt_ids(question, method, num_blocks)
    except QuestionError:
        return False
    return True


def _accuracy(outcomes: Sequence[Outcome], steps: Sequence[int]) -> dict[str, Any]:
    """Figures over all problems and by number of steps ("0" where a problem states none)."""
    cells: dict[int, list[Outcome]] = {}
    for outcome, count in zip(outcomes, steps, strict=True):
        cells.setdefault(count, []).append(outcome)
    return {
        "all": _cell(outcomes),
        "by_steps": {str(count): _cell(cells[count]) for count in sorted(cells)},
        "refused": sum(outcome.refused for outcome in outcomes),
        "truncated": sum(outcome.truncated for outcome in outcomes),
    }


def _cell(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """{"final"} of a method, and {"any_block", "blocks": [K]} for memory; each a `proportion` of the same problems."""
    cell: dict[str, Any] = {"final": proportion(outcome.final for outcome in outcomes)}
    num_blocks = max((len(outcome.blocks) for outcome in outcomes), default=0)
    if num_blocks:
        cell["any_block"] = proportion(any(outcome.blocks) for outcome in outcomes)
        cell["blocks"] = [proportion(_block(outcome, k) for outcome in outcomes) for k in range(1, num_blocks + 1)]
    return cell


def _block(outcome: Outcome, k: int) -> bool:
    """Whether readout k (1-based) is right; a refused question has no readouts and counts as wrong."""
    return k <= len(outcome.blocks) and outcome.blocks[k - 1]


def cluster_interval(outcomes: Sequence[bool], keys: Sequence[str]) -> dict[str, Any]:
    """{"clusters", "low", "high"}: 95 % percentile bootstrap of a share, problems of one key drawn together."""
    found, index = np.unique(keys, return_inverse=True)
    if not len(found):
        return {"clusters": 0, "low": 0.0, "high": 1.0}
    right, size = np.bincount(index, weights=np.asarray(outcomes, float)), np.bincount(index)
    drawn = np.random.default_rng(0).multinomial(len(found), np.full(len(found), 1 / len(found)), size=CLUSTER_DRAWS)
    low, high = np.quantile(drawn @ right / (drawn @ size), [0.025, 0.975])
    return {"clusters": len(found), "low": float(low), "high": float(high)}


def _sweep_entry(k: int, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    right = (_block(outcome, k) if k else outcome.final for outcome in outcomes)
    return {"num_blocks": k, **proportion(right), "refused": sum(outcome.refused for outcome in outcomes)}


def _paired(first: str, second: str, outcomes: Mapping[str, Sequence[Outcome]]) -> dict[str, Any]:
    """The two methods on the same problems; `p_value` of the exact McNemar test."""
    pairs = [(a.final, b.final) for a, b in zip(outcomes[first], outcomes[second], strict=True)]
    only_first, only_second = pairs.count((True, False)), pairs.count((False, True))
    return {
        "first": first,
        "second": second,
        "n": len(pairs),
        "both_right": pairs.count((True, True)),
        "only_first": only_first,
        "only_second": only_second,
        "both_wrong": pairs.count((False, False)),
        "p_value": mcnemar_p(only_first, only_second),
    }


def describe_machine(device: torch.device) -> dict[str, Any]:
    """What a figure of speed depends on: processor, threads, device and library versions."""
    return {
        "cpu": f"{cpu_name()} ({os.cpu_count()} cores)",
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def describe_run(
    checkpoint: str, data: ProblemFile, data_file: str | Path, limit: int | None, device: torch.device, command: str
) -> dict[str, Any]:
    """Where a report comes from: the `run` entry that `python -m rim_probe eval` adds."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command,
        "checkpoint": checkpoint,
        "data": {
            "file": str(data_file),
            "sha256": hashlib.sha256(Path(data_file).read_bytes()).hexdigest(),
            "problems": len(data.problems),
            "rejected": len(data.rejected),
            "first_rejected": [str(line) for line in data.rejected[:SHOWN_REJECTIONS]],
        },
        "limit": limit,
        "machine": describe_machine(device),
    }


def cpu_name() -> str:
    """The processor's model, such as "AMD EPYC"; its architecture where the system does not tell."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:  # not Linux
        pass
    return platform.processor() or platform.machine()
