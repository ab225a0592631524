"""Speed and memory of probing as ratios: our capture beside what TransformerLens and transformers offer, and the
patching sweep beside one forward pass per cell.

Method:
1. Every side gets the same questions in the same batches (like lengths together, padded on the right; causal text needs
   no mask) and starts from their text. `capture` keeps the rows of the memory; the others keep the tensors of the whole
   batch, in which those rows stand. That they say the same is checked on every batch: the largest difference is told.
2. Time: batch by batch, the sides in random order; a ratio is formed per batch. What a side holds is let go before the
   next one begins, which spares the others the memory of all questions.
3. Memory: of one batch, from nothing to what is held in the end, in a run of its own that is not timed. On a CPU the
   allocations and frees of torch's allocator are added up (so temporaries inside an operation count, and what a process
   keeps for later does not); on a GPU torch's own peak is read. What each side would hold of all questions is the sum
   over the batches.
4. A patching sweep fills a heat map of layers x blocks for one question and one answer; the rival runs one whole pass
   for each cell. Both give the same figures: the largest difference is told.

Knows the sides and the targets. Does not know how anything is captured or patched.
"""

import copy
import datetime
import gc
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rim_probe.bench import Timing, in_turns
from rim_probe.decoding import _keeps_logits
from rim_probe.evaluation import describe_machine, spread
from rim_probe.model import RiM
from rim_probe.probing.capture import Capture, capture
from rim_probe.probing.hooks import causal_lm, num_layers
from rim_probe.probing.sweep import Sweep, patching_naive, patching_sweep
from rim_probe.probing.transformer_lens import to_transformer_lens
from rim_probe.problems import Problem

PROBING_BENCH_FORMAT = "rim-probe-bench-probing/1"
ROUNDS = 3  # of all batches
SWEEPS = 3
OURS, EVERYTHING, FILTERED, TRANSFORMERS = (
    "capture",
    "run_with_cache",
    "run_with_cache with a names filter",
    "output_hidden_states + output_attentions",
)
MIB = 2**20


@dataclass(frozen=True)
class Held:
    """What a rival has after a batch: states by layer (0..L, pre-norm) [B, T, d], patterns by layer (1..L) [B, H, T, T],
    and all tensors it holds, these among them."""

    states: Mapping[int, torch.Tensor]
    patterns: Mapping[int, torch.Tensor]
    tensors: Sequence[torch.Tensor]


Side = Callable[[Sequence[str]], Capture | Held]


def run_probing_bench(
    rim: RiM,
    problems: Sequence[Problem],
    *,
    num_blocks: int | None = None,
    batch_size: int = 32,
    progress: bool = True,
) -> dict[str, Any]:
    """Measures (see the module docstring) and reports; the caller adds "checkpoint" and "command".

    Args:
        problems: captured; the first of them are patched.
        num_blocks: K, at least 1; None for the layout's own.
        batch_size: questions in a batch, of every side.

    Raises:
        RiMError: TransformerLens is not installed or lacks the architecture; a question that cannot be asked.
    """
    sides = _sides(rim, num_blocks)
    questions = sorted((problem.question for problem in problems), key=lambda q: len(rim.encode_question(q)))
    batches = [questions[start : start + batch_size] for start in range(0, len(questions), batch_size)]
    with torch.inference_mode():
        timed = {name: _timed(rim.device, side) for name, side in sides.items()}
        turns = in_turns(timed, batches * ROUNDS, batches[:1], "capture", "batch", progress)
        weighed = [_weigh(rim, sides, batch, num_blocks) for batch in batches]
    swept, sweeps = _sweeps(rim, problems, num_blocks, progress)
    seconds = {name: [turn[name].total for turn in turns] for name in sides}
    peaks = {name: [weights[name]["peak"] for weights in weighed] for name in sides}
    rows = [
        _ratio(f"speed: {OURS} / {rival}", OURS, rival, seconds[rival], seconds[OURS], goal)
        for rival, goal in ((EVERYTHING, ">= 3"), (FILTERED, ">= 1"), (TRANSFORMERS, None))
    ] + [
        _ratio(f"peak memory: {rival} / {OURS}", rival, OURS, peaks[rival], peaks[OURS], goal)
        for rival, goal in ((EVERYTHING, ">= 5"), (FILTERED, None), (TRANSFORMERS, None))
    ]
    cells = f"{swept['layers']} x {swept['blocks']}"
    one, all_at_once = ([turn[name].total for turn in sweeps] for name in ("one pass per cell", "batched sweep"))
    rows.append(
        _ratio(
            f"speed: batched sweep / one pass per cell ({cells} cells)",
            "batched sweep",
            "one pass per cell",
            one,
            all_at_once,
            ">= 5",
        )
    )
    return {
        "format": PROBING_BENCH_FORMAT,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": _machine(rim),
        "model": rim.name,
        "num_blocks": rim.layout.check_blocks(num_blocks),
        "questions": len(questions),
        "batch_size": batch_size,
        "sides": [
            {
                "name": name,
                "questions_per_second": spread(
                    [len(batch) / s for batch, s in zip(batches * ROUNDS, seconds[name], strict=True)]
                ),
                "peak_mib": spread([peak / MIB for peak in peaks[name]]),
                "held_mib": sum(weights[name]["held"] for weights in weighed) / MIB,
                "difference": None
                if name == OURS
                else {kind: max(weights[name][kind] for weights in weighed) for kind in ("states", "attention")},
            }
            for name in sides
        ],
        "sweep": swept | {"seconds": {"batched sweep": spread(all_at_once), "one pass per cell": spread(one)}},
        "ratios": rows,
    }


def _machine(rim: RiM) -> dict[str, Any]:
    from importlib.metadata import version

    machine = describe_machine(rim.device)
    machine["versions"]["transformer-lens"] = version("transformer-lens")
    return machine


def _ratio(
    what: str, first: str, second: str, above: Sequence[float], below: Sequence[float], target: str | None
) -> dict[str, Any]:
    """One line of the report: the ratio above / below per turn, judged by its median (targets are `>=`)."""
    ratio = spread([a / b for a, b in zip(above, below, strict=True)])
    met = None if target is None else ratio["median"] >= float(target.removeprefix(">= "))
    return {
        "what": what,
        "first": first,
        "second": second,
        "n": len(above),
        "ratio": ratio,
        "target": target,
        "met": met,
    }


# ------------------------------------------------------------------------------------------------------------ the sides


def _sides(rim: RiM, num_blocks: int | None) -> dict[str, Side]:
    bridge = to_transformer_lens(rim)
    eager = copy.deepcopy(rim)
    causal_lm(eager).set_attn_implementation("eager")
    layers = num_layers(rim)
    states = {0: "blocks.0.hook_resid_pre"} | {i + 1: f"blocks.{i}.hook_resid_post" for i in range(layers)}
    patterns = {i + 1: f"blocks.{i}.attn.hook_pattern" for i in range(layers)}
    wanted = {*states.values(), *patterns.values()}

    def lens(names_filter):
        def hold(questions):
            _, cache = bridge.run_with_cache(_batch(rim, questions, num_blocks), names_filter=names_filter)
            return Held(
                {layer: cache[name] for layer, name in states.items()},
                {layer: cache[name] for layer, name in patterns.items()},
                list(cache.values()),
            )

        return hold

    def transformers(questions):
        keep = {"logits_to_keep": 1} if _keeps_logits(eager.model) else {}
        out = eager.model(
            input_ids=_batch(rim, questions, num_blocks),
            use_cache=False,
            output_hidden_states=True,
            output_attentions=True,
            **keep,
        )
        # The last of its hidden states is already normalised, so it is held but not compared.
        return Held(
            dict(enumerate(out.hidden_states[:-1])),
            dict(enumerate(out.attentions, 1)),
            [*out.hidden_states, *out.attentions],
        )

    return {
        OURS: lambda questions: capture(rim, questions, num_blocks=num_blocks, batch_size=len(questions)),
        EVERYTHING: lens(None),
        FILTERED: lens(wanted.__contains__),
        TRANSFORMERS: transformers,
    }


def _batch(rim: RiM, questions: Sequence[str], num_blocks: int | None) -> torch.Tensor:
    """Prompts [B, T], padded on the right."""
    prompts = [rim.prompt_ids(question, "memory", num_blocks) for question in questions]
    length = max(map(len, prompts))
    return torch.tensor([ids + [rim.eos_id] * (length - len(ids)) for ids in prompts], device=rim.device)


def _timed(device: torch.device, side: Side) -> Callable[[Sequence[str]], Timing]:
    def measure(questions):
        start = time.perf_counter()
        held = side(questions)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - start
        del held  # not timed
        return Timing(seconds)

    return measure


# --------------------------------------------------------------------------------------------------------------- memory


def _weigh(
    rim: RiM, sides: Mapping[str, Side], questions: Sequence[str], num_blocks: int | None
) -> dict[str, dict[str, float]]:
    """Of every side on one batch: `peak` and `held` in bytes; of the rivals how far they are from the capture, too:
    `states` as a share of the largest state, `attention` in weight."""
    ours, peak = _peak_bytes(rim.device, lambda: sides[OURS](questions))
    tensors = (ours.slots, ours.ends, ours.question, ours.answer, ours.to_question, ours.to_memory)
    weights = {OURS: {"peak": peak, "held": _bytes(tensors)}}
    for name, side in sides.items():
        if name != OURS:
            held, peak = _peak_bytes(rim.device, lambda side=side: side(questions))
            weights[name] = {"peak": peak, "held": _bytes(held.tensors)} | _difference(rim, ours, held)
            del held
    return weights


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Of the storages behind the tensors, each counted once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def _peak_bytes(device: torch.device, work: Callable[[], Any]) -> tuple[Any, int]:
    """The result of `work`, and the most bytes of tensors that were alive meanwhile beyond those before it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        return work(), torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else the profiler prints two lines each time
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = work()
    changes = [(e.start_ns(), e.nbytes()) for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for _, change in sorted(changes, key=lambda moment: moment[0]):
        live += change
        peak = max(peak, live)
    return result, peak


def _difference(rim: RiM, ours: Capture, held: Held) -> dict[str, float]:
    states = attention = 0.0
    largest = max(float(ours.slots.abs().max()), float(ours.ends.abs().max()))
    for n, question_ids in enumerate(ours.question_ids):
        first, layout = len(question_ids), rim.layout
        slots = torch.tensor(layout.slot_positions(first, ours.K))
        ends = torch.tensor(layout.end_positions(first, ours.K))
        queries = torch.cat([slots, ends[:, None]], dim=1).flatten()
        for layer, stream in held.states.items():
            own = stream[n].cpu()
            pairs = ((ours.slots, slots), (ours.ends, ends), (ours.question, first - 1), (ours.answer, ends[-1]))
            for kept, places in pairs:
                states = max(states, _farthest(kept[n, layer], own[places]))
        for layer, pattern in held.patterns.items():
            own = pattern[n][:, queries].cpu()
            end = first + ours.K * layout.block_length
            for kept, part in (
                (ours.to_question[..., :first], own[..., :first]),
                (ours.to_memory, own[..., first:end]),
            ):
                attention = max(attention, _farthest(kept[n, layer - 1], part))
    return {"states": states / largest, "attention": attention}


def _farthest(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.float() - other.float()).abs().max())


# ------------------------------------------------------------------------------------------------------------- patching


def _sweeps(
    rim: RiM, problems: Sequence[Problem], num_blocks: int | None, progress: bool
) -> tuple[dict[str, Any], list[dict[str, Timing]]]:
    """Every side on the first questions, each patched with states of the next one, following its own answer."""
    given: dict[str, list[Sweep]] = {"batched sweep": [], "one pass per cell": []}

    def side(name: str, sweep: Callable[..., Sweep]) -> Callable[[tuple[Problem, Problem, bool]], Timing]:
        def measure(pair):
            problem, source, whole = pair
            part = {} if whole else {"layers": [1], "blocks": [1]}
            start = time.perf_counter()
            found = sweep(rim, problem.question, source.question, [problem.answer], num_blocks=num_blocks, **part)
            seconds = time.perf_counter() - start
            if whole:
                given[name].append(found)
            return Timing(seconds)

        return measure

    pairs = [(problem, problems[(i + 1) % len(problems)]) for i, problem in enumerate(problems[:SWEEPS])]
    turns = in_turns(
        {
            "batched sweep": side("batched sweep", patching_sweep),
            "one pass per cell": side("one pass per cell", patching_naive),
        },
        [(*pair, True) for pair in pairs],
        [(*pairs[0], False)],
        "sweep",
        "question",
        progress,
    )
    couples = list(zip(*given.values(), strict=True))
    return {
        "layers": len(couples[0][0].layers),
        "blocks": len(couples[0][0].blocks),
        "questions": len(couples),
        "difference": max(float(abs(a.log_probability - b.log_probability).max()) for a, b in couples),
    }, turns
