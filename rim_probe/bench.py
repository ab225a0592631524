"""Speed as ratios: what memory, chain of thought, our loop and packed training rows cost, each next to its rival.

Method:
1. Both sides of a ratio are measured in turn within one run, on the same problem, in random order; the ratio is
   formed per problem (per step, for training) and reported as median with quartiles. Load of the machine hits both.
2. A method generates at most as many tokens as its gold text has (steps and answer for cot, answer for memory and
   direct).
3. Training: the packed row of stage 2 against the K separate causal rows it stands for, forward, backward and one
   optimizer step. Both sides compute the same loss (the difference is reported), and logits only in columns that hold a
   label. The separate rows run in K batches, row k of every problem together, so that they pad no more than the packed
   ones and need no mask.

Knows what to time and the targets. Does not know how methods answer (decoding) or how rows are packed (packing).
"""

import datetime
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from rim_probe.decoding import answer
from rim_probe.errors import RiMError
from rim_probe.evaluation import describe_machine, spread
from rim_probe.model import RiM
from rim_probe.packing import IGNORED, Row, pack_text, pad_rows, row_mask, stage2_row
from rim_probe.problems import Problem

BENCH_FORMAT = "rim-probe-bench/1"
DEFAULT_BLOCKS = 8
WARM_UP_QUESTIONS = 2
WARM_UP_STEPS = 1


@dataclass(frozen=True)
class Timing:
    """One side, measured once, in seconds; a training step has neither tokens nor a first token."""

    total: float
    ttft: float | None = None
    token_ids: tuple[int, ...] = ()


Turn = dict[str, Timing]  # the sides measured on one problem (or training step)


def run_bench(
    methods: Mapping[str, RiM],
    problems: Sequence[Problem],
    *,
    num_blocks: int = DEFAULT_BLOCKS,
    train_batch: int = 4,
    train_steps: int = 5,
    progress: bool = True,
) -> dict[str, Any]:
    """Measure the five ratios (see the module docstring) and report; the caller adds "checkpoint" and "command".

    Args:
        methods: the model of each of memory, cot and direct; their weights are left as they are.
        problems: asked one by one for the decoding ratios; their first `train_batch` make the training batch.
        num_blocks: K of memory, at least 1.
        train_batch: problems per training step.
        train_steps: timed training steps of each side.
        progress: whether bars are drawn.
    """
    asked = _in_turns(
        _decoding_sides(methods, num_blocks), problems, problems[:WARM_UP_QUESTIONS], "decoding", "problem", progress
    )
    batch = list(problems[:train_batch])
    step = _TrainingStep(methods["memory"], batch, num_blocks)
    trained = _in_turns(
        {"packed": step.packed, "separate": step.separate},
        [batch] * train_steps,
        [batch] * WARM_UP_STEPS,
        "training",
        "step",
        progress,
    )
    same = [turn for turn in asked if turn["cot"].token_ids == turn["generate"].token_ids]
    k = num_blocks
    return {
        "format": BENCH_FORMAT,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": describe_machine(methods["memory"].device),
        "models": {name: rim.name for name, rim in methods.items()},
        "num_blocks": num_blocks,
        "problems": len(problems),
        "generate_same_tokens": len(same),
        "train_batch": len(batch),
        "loss_difference": step.loss_difference(),
        "ratios": [
            _ratio(f"first token: memory (K = {k}) / direct", asked, "memory", "direct", "<= 1.15", "ttft"),
            _ratio(f"memory: all {k} readouts / final readout", asked, "all readouts", "memory", "<= 1.5"),
            _ratio("full answer: chain of thought / memory", asked, "cot", "memory", None),
            _ratio(f"training step: {k} separate rows / packed row", trained, "separate", "packed", ">= 2.5"),
            _ratio("same tokens: our loop / transformers generate", same, "cot", "generate", "<= 1.0"),
        ],
    }


def _in_turns(
    sides: Mapping[str, Callable[[Any], Timing]],
    items: Sequence[Any],
    warm_up: Sequence[Any],
    label: str,
    unit: str,
    progress: bool,
) -> list[Turn]:
    """Every side on every item, in an order drawn anew each time; the warm-up items are not counted."""
    for item in warm_up:
        for measure in sides.values():
            measure(item)
    # Drawn rather than rotated: a side must not always follow the same neighbour, whose weights are still in the cache.
    rng = random.Random(0)
    return [
        {name: sides[name](item) for name in rng.sample(list(sides), len(sides))}
        for item in tqdm(items, desc=label, unit=unit, disable=not progress)
    ]


def _ratio(
    what: str, turns: Sequence[Turn], first: str, second: str, target: str | None, of: str = "total"
) -> dict[str, Any]:
    """One line of the report; turns in which a side gave no figure (no answer token, so no TTFT) are left out."""
    pairs = [(getattr(turn[first], of), getattr(turn[second], of)) for turn in turns]
    kept = [i for i, pair in enumerate(pairs) if None not in pair]
    ratio = spread([pairs[i][0] / pairs[i][1] for i in kept]) if kept else None
    met = None
    if target and ratio:
        sign, bound = target.split()
        met = ratio["median"] <= float(bound) if sign == "<=" else ratio["median"] >= float(bound)

    def side(name: str, place: int) -> dict[str, Any]:
        tokens = [len(turns[i][name].token_ids) for i in kept]
        return {
            "name": name,
            "ms": spread([1000 * pairs[i][place] for i in kept]) if kept else None,
            "tokens": spread(tokens) if any(tokens) else None,
        }

    return {
        "what": what,
        "target": target,
        "met": met,
        "n": len(kept),
        "ratio": ratio,
        "first": side(first, 0),
        "second": side(second, 1),
    }


def _decoding_sides(methods: Mapping[str, RiM], num_blocks: int) -> dict[str, Callable[[Problem], Timing]]:
    def ours(method: str, readouts: str = "final") -> Callable[[Problem], Timing]:
        rim = methods[method]

        def measure(problem: Problem) -> Timing:
            given = answer(
                rim,
                problem.question,
                method,
                num_blocks=num_blocks if method == "memory" else None,
                max_new_tokens=_gold_length(rim, problem, method),
                readouts=readouts,
            )
            return Timing(given.total_seconds, given.ttft_seconds, given.token_ids)

        return measure

    return {
        "memory": ours("memory"),
        "all readouts": ours("memory", "all"),
        "direct": ours("direct"),
        "cot": ours("cot"),
        "generate": lambda problem: _generate(methods["cot"], problem),
    }


def _gold_length(rim: RiM, problem: Problem, method: str) -> int:
    """Tokens of the gold text with EOS: steps, marker and answer for cot, the answer for memory and direct."""
    return len(rim.encoder.chain_ids(problem) if method == "cot" else rim.encoder.answer_ids(problem.answer))


@torch.inference_mode()
def _generate(rim: RiM, problem: Problem) -> Timing:
    """The rival of our loop: chain of thought through `transformers.generate`, tokenising included as on our side."""
    eos = rim.encoder.eos_id
    start = time.perf_counter()
    prompt = torch.tensor([rim.prompt_ids(problem.question, "cot")], device=rim.device)
    output = rim.model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=_gold_length(rim, problem, "cot"),
        do_sample=False,
        eos_token_id=eos,
        pad_token_id=eos,
    )
    token_ids = tuple(output[0, prompt.shape[1] :].tolist())
    rim.decode(list(token_ids))
    return Timing(time.perf_counter() - start, token_ids=token_ids)


class _TrainingStep:
    """One optimizer step on a batch of problems, its rows packed or separate.

    The learning rate is 0: a step costs the same and the weights stay as they are, so the order of steps is free.
    """

    def __init__(self, rim: RiM, problems: Sequence[Problem], num_blocks: int):
        self._rim = rim
        encoder = rim.encoder
        self._packed = [_Batch(rim, [stage2_row(encoder, problem, num_blocks) for problem in problems])]
        self._separate = [
            _Batch(
                rim,
                [
                    pack_text(
                        encoder.question_ids(problem.question) + encoder.block_ids * k,
                        encoder.answer_ids(problem.answer),
                    )
                    for problem in problems
                ],
            )
            for k in range(1, num_blocks + 1)
        ]
        self._losses: dict[str, float] = {}
        parameters = [parameter for parameter in rim.model.parameters() if parameter.requires_grad]
        if not parameters:
            raise RiMError(f"{rim.name}: every weight of the memory model is frozen, so no training step can be timed.")
        self._optimizer = torch.optim.AdamW(parameters, lr=0.0)

    def packed(self, _: Any) -> Timing:
        return self._step("packed", self._packed)

    def separate(self, _: Any) -> Timing:
        return self._step("separate", self._separate)

    def loss_difference(self) -> float:
        """Relative difference of the two sides' losses: rounding, if the rows are the same."""
        return abs(self._losses["packed"] / self._losses["separate"] - 1)

    def _step(self, name: str, batches: Sequence["_Batch"]) -> Timing:
        self._rim.model.train()
        start = time.perf_counter()
        loss = 0.0
        for batch in batches:
            part = batch.loss()
            part.backward()
            loss += part.item()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        if self._rim.device.type == "cuda":
            torch.cuda.synchronize(self._rim.device)
        seconds = time.perf_counter() - start
        self._rim.model.eval()
        self._losses[name] = loss
        return Timing(seconds)


class _Batch:
    """Rows as tensors on the model's device, with the loss: the sum of the labels' cross entropies."""

    def __init__(self, rim: RiM, rows: Sequence[Row]):
        tensors = {name: tensor.to(rim.device) for name, tensor in pad_rows(rows, pad_id=rim.encoder.eos_id).items()}
        self._model = rim.model
        self._inputs = {"input_ids": tensors["input_ids"], "use_cache": False}
        mask = row_mask(tensors["readouts"], rim.dtype)
        if mask is not None:  # plain causal rows take the model's own mask and positions, the fastest path there is
            self._inputs |= {"attention_mask": mask, "position_ids": tensors["position_ids"]}
        columns = (tensors["labels"] != IGNORED).any(dim=0).nonzero().squeeze(1)
        self._inputs["logits_to_keep"] = columns
        self._labels = tensors["labels"][:, columns]

    def loss(self) -> torch.Tensor:
        logits = self._model(**self._inputs).logits
        return torch.nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), self._labels.flatten(), ignore_index=IGNORED, reduction="sum"
        )
