"""What an answer costs, alone and in a batch of 32: time to its first token and to its end, passes, tokens, KV cache.

Method:
1. The methods answer the same questions in turn within one run, in an order drawn anew for every turn, so that drift of
   the machine and caches left warm favour nobody. Memory decodes its final readout alone.
2. A turn is one question (batch size 1) or one batch of 32; one batch is measured for every 8 single questions.
   Questions are drawn at random, for a batch with repetition where there are fewer than 32.
3. Times come from the decoding loop's own clock, read when the tokens of a pass have been copied back from the device,
   which waits for it. Both batch sizes are warmed up.
4. Ratios are formed turn by turn and reported as their median with its distribution-free 95 % interval.

Knows what to time and how to sum it up. Does not know files, nor how a method answers (decoding).
"""

import math
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from scipy.stats import quantile_test
from tqdm import tqdm

from rim_probe.decoding import time_batch
from rim_probe.evaluation import can_ask, describe_machine, spread
from rim_probe.model import RiM
from rim_probe.problems import Problem

BATCH_SIZES = (1, 32)
SINGLES_PER_BATCH = 8
WARM_UP_TURNS = 2
WARM_UP_TOKENS = 16
RATIOS = (("ttft_ms", "cot", "memory"), ("ttft_ms", "memory", "direct"), ("total_ms", "cot", "memory"))

Turn = dict[str, dict[str, Any]]  # by method: what one turn of it cost, see `_measure`


def measure_costs(
    methods: Mapping[str, RiM],
    problems: Sequence[Problem],
    *,
    samples: int,
    num_blocks: int | None,
    max_new_tokens: int,
    seed: int,
    turns: list[list[Turn]],
    after_turn: Callable[[], object] = lambda: None,
    label: str | None = None,
) -> tuple[dict[str, Any] | None, bool]:
    """The costs of every method, and whether Ctrl-C came; the costs are None where no turn was measured.

    Args:
        problems: what questions are drawn from; those that a method cannot be asked are left out.
        samples: single questions.
        num_blocks: K of memory, None for the layout's own.
        max_new_tokens: bound on an answer.
        turns: [batch size][turn], is filled; what it holds of an earlier run with the same arguments is not measured
            again.
        after_turn: called when a turn has been added.
        label: of the progress bar, None for no bar.
    """
    askable = [problem for problem in problems if _can_be_asked(methods, problem, num_blocks)]
    plan = _plan(askable, samples, seed)
    turns += [[] for _ in range(len(plan) - len(turns))]

    def measure(method: str, asked: Sequence[Problem], bound: int) -> dict[str, Any]:
        return _measure(methods[method], method, asked, num_blocks if method == "memory" else None, bound)

    interrupted = False
    with tqdm(total=sum(map(len, plan)), desc=label or "", unit="turn", disable=label is None) as bar:
        bar.update(sum(map(len, turns)))
        try:
            for place, (wanted, done) in enumerate(zip(plan, turns, strict=True)):
                if len(done) < len(wanted):
                    for asked in wanted[: WARM_UP_TURNS if place == 0 else 1]:
                        for method in methods:
                            measure(method, asked, min(WARM_UP_TOKENS, max_new_tokens))
                for i in range(len(done), len(wanted)):
                    order = random.Random(f"{seed} {place} {i}").sample(list(methods), len(methods))
                    turn = {method: measure(method, wanted[i], max_new_tokens) for method in order}
                    done.append({method: turn[method] for method in methods})
                    after_turn()
                    bar.update(1)
        except KeyboardInterrupt:
            interrupted = True
    if not any(turns):
        return None, interrupted
    rim = next(iter(methods.values()))
    report = {
        "device": str(rim.device),
        "dtype": str(rim.dtype).removeprefix("torch."),
        "machine": describe_machine(rim.device),
        "batches": [_summary(size, done) for size, done in zip(BATCH_SIZES, turns, strict=True) if done],
    }
    return report, interrupted


def _plan(problems: Sequence[Problem], samples: int, seed: int) -> list[list[list[Problem]]]:
    """[batch size][turn][row] questions."""
    rng, plan = random.Random(seed), []
    singles = min(samples, len(problems))
    for size in BATCH_SIZES:
        if size == 1:
            plan.append([[problem] for problem in rng.sample(list(problems), singles)])
            continue
        draw = rng.sample if len(problems) >= size else rng.choices
        plan.append([draw(list(problems), k=size) for _ in range(math.ceil(singles / SINGLES_PER_BATCH))])
    return plan


def _can_be_asked(methods: Mapping[str, RiM], problem: Problem, num_blocks: int | None) -> bool:
    return all(
        can_ask(rim, problem.question, method, num_blocks if method == "memory" else None)
        for method, rim in methods.items()
    )


def _measure(rim: RiM, method: str, problems: Sequence[Problem], num_blocks: int | None, bound: int) -> dict[str, Any]:
    """One batch: ms, passes of the model, mean tokens per answer, bytes of the whole batch.

    TTFT is the median over the rows that show an answer, None where none does; `unanswered` counts the others.
    """
    questions = [problem.question for problem in problems]
    batch = time_batch(rim, questions, method, num_blocks=num_blocks, max_new_tokens=[bound] * len(questions))
    known = [seconds for seconds in batch.ttft_seconds if seconds is not None]
    return {
        "ttft_ms": 1000 * statistics.median(known) if known else None,
        "unanswered": len(questions) - len(known),
        "total_ms": 1000 * batch.total_seconds,
        "forward_passes": len(batch.pass_seconds),
        "generated_tokens": statistics.fmean(given.generated_tokens for given in batch.answers),
        "kv_cache_bytes": batch.kv_cache_bytes,
    }


def _summary(batch_size: int, turns: Sequence[Turn]) -> dict[str, Any]:
    return {
        "batch_size": batch_size,
        "n": len(turns),
        "methods": {method: _spreads([turn[method] for turn in turns]) for method in turns[0]},
        "ratios": [
            {"of": of, "first": first, "second": second, **_ratio(turns, of, first, second)}
            for of, first, second in RATIOS
            if {first, second} <= set(turns[0])
        ],
    }


def _spreads(costs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Per measure its spread over the turns; TTFT with its own `n`, None where no turn showed an answer."""
    firsts = [cost["ttft_ms"] for cost in costs if cost["ttft_ms"] is not None]
    others = ("total_ms", "forward_passes", "generated_tokens", "kv_cache_bytes")
    return {
        "n": len(costs),
        "unanswered": sum(cost["unanswered"] for cost in costs),
        "ttft_ms": {"n": len(firsts), **spread(firsts)} if firsts else None,
        **{measure: spread([cost[measure] for cost in costs]) for measure in others},
    }


def _ratio(turns: Sequence[Turn], of: str, first: str, second: str) -> dict[str, Any]:
    pairs = [(turn[first][of], turn[second][of]) for turn in turns]
    ratios = sorted(a / b for a, b in pairs if a is not None and b is not None)
    low, high = median_interval(ratios)
    return {"n": len(ratios), "median": statistics.median(ratios) if ratios else None, "low": low, "high": high}


def median_interval(values: Sequence[float]) -> tuple[float | None, float | None]:
    """The distribution-free 95 % interval of a median, by order statistics; None, None below 6 values."""
    if len(values) < 6:  # not even the whole range reaches that level
        return None, None
    low, high = quantile_test(values, p=0.5).confidence_interval(0.95)
    return float(low), float(high)
