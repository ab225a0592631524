"""Speed and memory of probing as ratios: our capture beside what TransformerLens and transformers offer, and the
patching sweep beside one forward pass per cell.

Method:
1. Every side gets the same questions in the same batches (like lengths together, padded on the right; causal text needs
   no mask), starts from their text and ends with the same `Capture`. The rivals make whole tensors and take the rows of
   the memory out of them, then let go of the rest, which costs them less than keeping it. All captures are compared:
   the largest difference is told.
2. Time: batch by batch, the sides in random order; a ratio is formed per batch.
3. Peak memory: of one batch, from nothing to its capture, in a run of its own that is not timed. On a CPU the
   allocations and frees of torch's allocator are added up (so temporaries inside an operation count, and what a process
   keeps for later does not); on a GPU torch's own peak is read.
4. A patching sweep fills a heat map of layers x blocks for one question and one answer; the rival runs one whole pass
   for each cell. Both give the same figures: the largest difference is told.

Knows the sides and the targets. Does not know how anything is captured or patched.
"""

import copy
import datetime
import gc
import os
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import torch

from rim_probe.bench import Timing, in_turns
from rim_probe.decoding import keeps_logits
from rim_probe.evaluation import describe_machine, spread
from rim_probe.model import RiM
from rim_probe.probing.capture import Capture, capture
from rim_probe.probing.hooks import decoder_layers, num_layers
from rim_probe.probing.sweep import Sweep, patching_naive, patching_sweep
from rim_probe.probing.transformer_lens import to_transformer_lens
from rim_probe.problems import Problem

PROBING_BENCH_FORMAT = "rim-probe-bench-probing/1"
ROUNDS = 3  # of all batches
SWEEPS = 3  # questions patched
OURS = "capture"
EVERYTHING, FILTERED, TRANSFORMERS = "TransformerLens, everything", "TransformerLens, filtered", "transformers, eager"
SWEEP, CELLS = "batched sweep", "one pass per cell"
TARGET_LAYERS = 30
MIB = 2**20

Side = Callable[[Sequence[str]], Capture]


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
    rim = RiM(rim.model, rim.tokenizer, rim.layout, rim.name)  # one of `load_bench_models` may never end an answer
    sides = _sides(rim, num_blocks)
    questions = sorted((problem.question for problem in problems), key=lambda q: len(rim.encode_question(q)))
    batches = [questions[start : start + batch_size] for start in range(0, len(questions), batch_size)]
    with torch.inference_mode():
        timed = {name: _timed(rim.device, side) for name, side in sides.items()}
        turns = in_turns(timed, batches * ROUNDS, batches[:1], "capture", "batch", progress)
        weighed = [_weigh(rim.device, sides, batch) for batch in batches]
    swept, sweeps = _sweeps(rim, problems, num_blocks, progress)

    rates = {
        name: [len(batch) / turn[name].total for batch, turn in zip(batches * ROUNDS, turns, strict=True)]
        for name in sides
    }
    peaks = {name: [weights[name]["peak"] / MIB for weights in weighed] for name in sides}
    cells = {name: [swept["layers"] * swept["blocks"] / turn[name].total for turn in sweeps] for name in (SWEEP, CELLS)}
    return {
        "format": PROBING_BENCH_FORMAT,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": _machine(rim),
        "model": rim.name,
        "num_blocks": rim.layout.check_blocks(num_blocks),
        "questions": len(questions),
        "batch_size": batch_size,
        "differences": {
            name: {kind: max(weights[name][kind] for weights in weighed) for kind in ("states", "attention")}
            for name in sides
            if name != OURS
        },
        "sweep": swept,
        "ratios": [
            _ratio("speed", "questions/s", rates, OURS, EVERYTHING, ">= 3"),
            _ratio("speed", "questions/s", rates, OURS, FILTERED, ">= 1"),
            _ratio("speed", "questions/s", rates, OURS, TRANSFORMERS, None),
            _ratio("peak memory", "MiB", peaks, EVERYTHING, OURS, ">= 5"),
            _ratio("peak memory", "MiB", peaks, FILTERED, OURS, None),
            _ratio("peak memory", "MiB", peaks, TRANSFORMERS, OURS, None),
            # The target is for a large map: with 6 layers there is little below a cell to save.
            _ratio("speed", "cells/s", cells, SWEEP, CELLS, ">= 5" if swept["layers"] >= TARGET_LAYERS else None),
        ],
    }


def _machine(rim: RiM) -> dict[str, Any]:
    machine = describe_machine(rim.device)
    machine["versions"]["transformer-lens"] = version("transformer-lens")
    return machine


def _ratio(
    what: str, unit: str, measured: Mapping[str, Sequence[float]], first: str, second: str, target: str | None
) -> dict[str, Any]:
    """One line of the report: first / second, formed per turn and judged by its median (targets are lower bounds)."""
    ratio = spread([a / b for a, b in zip(measured[first], measured[second], strict=True)])
    return {
        "what": f"{what}: {first} / {second}",
        "unit": unit,
        "target": target,
        "met": None if target is None else ratio["median"] >= float(target.removeprefix(">= ")),
        "n": len(measured[first]),
        "ratio": ratio,
        **{
            side: {"name": name, "value": spread(measured[name])}
            for side, name in (("first", first), ("second", second))
        },
    }


# ------------------------------------------------------------------------------------------------------------ the sides


def _sides(rim: RiM, num_blocks: int | None) -> dict[str, Side]:
    bridge = to_transformer_lens(rim)
    model = copy.deepcopy(rim.model)
    model.set_attn_implementation("eager")
    count = num_layers(rim)
    states = ["blocks.0.hook_resid_pre", *(f"blocks.{i}.hook_resid_post" for i in range(count))]
    patterns = [f"blocks.{i}.attn.hook_pattern" for i in range(count)]

    def lens(names_filter):
        def take(questions):
            ids, lengths = _batch(rim, questions, num_blocks)
            _, cache = bridge.run_with_cache(ids, names_filter=names_filter)
            return _rows(
                rim, ids, lengths, [cache[name] for name in states], [cache[name] for name in patterns], num_blocks
            )

        return take

    def transformers(questions):
        ids, lengths = _batch(rim, questions, num_blocks)
        last, kept = {}, {"logits_to_keep": 1} if keeps_logits(model) else {}
        # The last of its hidden states is already normalised: the one before that norm needs a hook.
        hook = decoder_layers(RiM(model, rim.tokenizer, rim.layout))[-1].register_forward_hook(
            lambda module, args, output: last.update(states=output)
        )
        try:
            out = model(input_ids=ids, use_cache=False, output_hidden_states=True, output_attentions=True, **kept)
        finally:
            hook.remove()
        return _rows(rim, ids, lengths, [*out.hidden_states[:-1], last["states"]], out.attentions, num_blocks)

    return {
        OURS: lambda questions: capture(rim, questions, num_blocks=num_blocks, batch_size=len(questions)),
        EVERYTHING: lens(None),
        FILTERED: lens({*states, *patterns}.__contains__),
        TRANSFORMERS: transformers,
    }


def _batch(rim: RiM, questions: Sequence[str], num_blocks: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts [B, T], padded on the right, and the lengths of the questions in them [B]."""
    prompts = [rim.prompt_ids(question, "memory", num_blocks) for question in questions]
    length = max(map(len, prompts))
    tail = rim.layout.check_blocks(num_blocks) * rim.layout.block_length
    ids = [prompt + [rim.eos_id] * (length - len(prompt)) for prompt in prompts]
    return torch.tensor(ids, device=rim.device), torch.tensor([len(prompt) - tail for prompt in prompts])


def _rows(
    rim: RiM,
    ids: torch.Tensor,
    lengths: torch.Tensor,
    states: Sequence[torch.Tensor],
    patterns: Sequence[torch.Tensor],
    num_blocks: int | None,
) -> Capture:
    """The rows of the memory out of whole tensors: states [B, T, d] of layers 0..L, patterns [B, H, T, T]."""
    layout, rows = rim.layout, torch.arange(len(ids))[:, None]
    blocks = layout.check_blocks(num_blocks)
    slots = (lengths[:, None] + torch.tensor(layout.slot_positions(0, blocks)).flatten()).to(ids.device)
    ends = (lengths[:, None] + torch.tensor(layout.end_positions(0, blocks))).to(ids.device)
    last = lengths[:, None].to(ids.device) - 1
    queries = torch.cat([slots.unflatten(1, (blocks, -1)), ends[:, :, None]], dim=2).flatten(1)
    tail = torch.arange(blocks * layout.block_length, device=ids.device)

    def at(places):
        return torch.stack([stream[rows.to(places.device), places] for stream in states], dim=1).cpu()

    width = int(lengths.max())
    inside = torch.arange(width, device=ids.device) <= last
    to_question, to_memory = [], []
    for pattern in patterns:
        asked = pattern[rows.to(ids.device), :, queries]  # [B, Q, H, T]
        to_question.append((asked[..., :width] * inside[:, None, None]).transpose(1, 2))
        columns = (last + 1 + tail)[:, None, None].expand(*asked.shape[:3], -1)
        to_memory.append(asked.gather(3, columns).transpose(1, 2))
    return Capture(
        layers=tuple(range(len(states))),
        slots=at(slots).unflatten(2, (blocks, -1)),
        ends=at(ends),
        question=at(last).squeeze(2),
        answer=at(ends[:, -1:]).squeeze(2),
        to_question=torch.stack(to_question, dim=1).cpu(),
        to_memory=torch.stack(to_memory, dim=1).cpu(),
        question_ids=[row[:length] for row, length in zip(ids.tolist(), lengths.tolist(), strict=True)],
    )


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


def _weigh(device: torch.device, sides: Mapping[str, Side], questions: Sequence[str]) -> dict[str, dict[str, float]]:
    """Of every side on one batch: `peak` in bytes, and how far it is from the first one: `states` as a share of the
    largest state, `attention` in weight."""
    weighed, first = {}, None
    for name, side in sides.items():
        held, peak = _peak_bytes(device, lambda side=side: side(questions))
        first = first or held
        states = [
            _farthest(getattr(held, part), getattr(first, part)) for part in ("slots", "ends", "question", "answer")
        ]
        weights = [_farthest(getattr(held, part), getattr(first, part)) for part in ("to_question", "to_memory")]
        weighed[name] = {
            "peak": peak,
            "states": max(states) / float(first.slots.abs().max()),
            "attention": max(weights),
        }
    return weighed


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


def _farthest(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.float() - other.float()).abs().max())


# ------------------------------------------------------------------------------------------------------------- patching


def _sweeps(
    rim: RiM, problems: Sequence[Problem], num_blocks: int | None, progress: bool
) -> tuple[dict[str, Any], list[dict[str, Timing]]]:
    """What was swept, and the turns: each of the first questions patched with states of the next one, following its
    own answer."""
    given: dict[str, list[Sweep]] = {SWEEP: [], CELLS: []}

    def side(name: str, sweep: Callable[..., Sweep]) -> Callable[[Any], Timing]:
        def measure(item):
            problem, source, part = item
            start = time.perf_counter()
            found = sweep(rim, problem.question, source.question, [problem.answer], num_blocks=num_blocks, **part)
            seconds = time.perf_counter() - start  # the figures are numpy's by now, so the device has finished
            if not part:
                given[name].append(found)
            return Timing(seconds)

        return measure

    pairs = [(problem, problems[(i + 1) % len(problems)]) for i, problem in enumerate(problems[:SWEEPS])]
    turns = in_turns(
        {SWEEP: side(SWEEP, patching_sweep), CELLS: side(CELLS, patching_naive)},
        [(*pair, {}) for pair in pairs],
        [(*pairs[0], {"layers": [1], "blocks": [1]})],
        "sweep",
        "question",
        progress,
    )
    couples = list(zip(given[SWEEP], given[CELLS], strict=True))
    return {
        "layers": len(couples[0][0].layers),
        "blocks": len(couples[0][0].blocks),
        "questions": len(couples),
        "difference": max(float(abs(one.log_probability - other.log_probability).max()) for one, other in couples),
    }, turns
