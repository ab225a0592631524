"""One `transformers.Trainer` subclass: the weighted loss over packed rows, exact-match validation, honest progress.

Knows batches, losses and callbacks. Knows nothing about recipes or where problems come from. Everything else
(optimizer, DDP and FSDP through accelerate, checkpoints, resuming) is the Trainer's own.
"""

import contextlib
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments

from rim_probe.decoding import answer_batch
from rim_probe.files import write_atomic
from rim_probe.model import RiM
from rim_probe.packing import IGNORED, PADDING, Row, flex_mask_mod, pad_rows, row_mask
from rim_probe.problems import Problem, is_correct
from rim_probe.training.backends import (
    ATTENTIONS,
    as_asked,
    check_flex,
    compile_layers,
    lean_adapters,
    length_multiple,
    narrow_base,
    set_attention,
)
from rim_probe.training.fused import fuse_adapter, has_frozen_head, head_losses
from rim_probe.training.rows import Batches
from rim_probe.training.slots import SlotReader, slot_targets
from rim_probe.training.speed import Meter

Weights = Callable[[float, torch.Tensor, torch.Tensor], torch.Tensor]
"""(progress, num_grounded [B], num_readouts [B]) -> weight of every readout [B, R]."""

_LONGEST_CHAIN = 128  # tokens decoded at a validation
_ASKED_AT_ONCE = {"cuda": 512, "cpu": 64}


class RiMTrainer(Trainer):
    """Trains the readouts of packed rows.

    Loss: the mean over all labelled tokens of a batch, each weighted by its readout's weight (lambda of stage 1, alpha
    of stage 2, 1 for text rows), in float32; with `slot_labels` the loss of what slots name is added, see `slots`.
    Logits are computed at labelled positions only.

    Args:
        asked: the problems of `valid_rows`, where they are to be answered by chain of thought, see `evaluate`.
        slot_labels: after how many layers at most slots are read; 0 for rows without slot labels.
        attention: `sdpa`, `eager`, or `flex` for packed rows on a GPU; text rows, plain causal, then take sdpa.
        compile: compile the decoder layers.

    Raises:
        RecipeError: `flex` where it cannot be trained.
    """

    def __init__(
        self,
        rim: RiM,
        args: TrainingArguments,
        train_batches: Batches,
        valid_rows: list[Row],
        weights: Weights,
        *,
        asked: Sequence[Problem] = (),
        slot_labels: int = 0,
        attention: str = "sdpa",
        compile: bool = False,
    ):
        self.rim, self.weights, self.valid_rows, self.asked = rim, weights, valid_rows, asked
        if attention == "flex":
            check_flex(rim.model)
        super().__init__(
            model=rim.model,
            args=args,
            train_dataset=train_batches,
            eval_dataset=valid_rows or None,
            data_collator=lambda batches: self._collate([row for batch in batches for row in batch]),
        )
        self.loss_is_scaled_for_ga = False
        self._head_is_fused = self._head_is_checked = False
        if args.bf16:
            lean_adapters(rim.model)
            if not self.is_fsdp_enabled:  # whose shards hold weights of one precision
                narrow_base(rim.model)
                if not compile:
                    fuse_adapter(rim.model)
                self._head_is_fused = has_frozen_head(rim.model.get_output_embeddings())
        sample = valid_rows or [row for i in range(min(2, len(train_batches))) for row in train_batches[i]]
        self._banned = torch.tensor(rim.banned_ids)
        self._longest = max(sample, key=lambda row: (row.num_grounded, row.num_readouts))
        self.attention = "sdpa" if attention == "flex" and not any(any(row.readouts) for row in sample) else attention
        set_attention(rim.model, self.attention)
        if compile:
            compile_layers(rim.model)
        # Under autocast attention computes in bfloat16, where the lowest float32 number would become minus infinity.
        self._mask_dtype = torch.bfloat16 if args.bf16 else rim.dtype
        self._multiple = length_multiple(args.device)
        self.meter = Meter(rim.model, args.device, torch.bfloat16 if args.bf16 else torch.float32)
        self._slots = SlotReader(rim.model, slot_labels) if slot_labels else None
        self._loss_so_far = _LossSoFar(self)
        self.add_callback(self._loss_so_far)

    @property
    def rows_per_batch(self) -> float:
        """Mean over the stage."""
        return sum(map(len, self.train_dataset.batches)) / len(self.train_dataset)

    @property
    def progress(self) -> float:
        """The s of the schedules: 0 at the start of the stage, 1 at its end."""
        return self.state.global_step / max(1, self.state.max_steps)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The weighted loss of a batch, and the losses of its labels [N] on request."""
        self.meter.count(inputs)
        weights = self.weights(self.progress, inputs["num_grounded"], inputs["num_readouts"])
        losses, readouts, row_of = self._label_losses(model, inputs)
        count = len(readouts)
        loss = _weighted_mean(losses[:count], weights[row_of, readouts - 1])
        if "slot_places" in inputs:
            loss = loss + _weighted_mean(losses[count:], inputs["slot_weights"])
        return (loss, losses) if return_outputs else loss

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float]:
        """How many of the validation problems are right, as `accuracy`, with their number `n`.

        Memory and direct: exact match of every readout, and of each row's last one as `accuracy`. A readout is right
        when the best token that may be generated is its label at every one of its positions, which is precisely when
        greedy decoding would write it.

        Chain of thought: `asked` are answered by greedy decoding and graded on the answer, for many chains lead there;
        the match of the whole gold chain, a lower bound, is `exact_match`. Weights in shards (FSDP) cannot be decoded
        with here, so there `accuracy` is that lower bound.

        Draws no random number, and training goes on as if it had not been.
        """
        start = time.perf_counter()
        with as_asked(self.model):
            metrics = self._exact_match()
            if self.asked and not self.is_fsdp_enabled:
                metrics = {"exact_match": metrics["accuracy"], **metrics, "accuracy": self._greedy_accuracy()}
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self.meter.skip(time.perf_counter() - start)
        return metrics

    @torch.inference_mode()
    def _exact_match(self) -> dict[str, float]:
        """`accuracy` of the last readout, `n`, `loss`, and `readout_k` for each of several."""
        banned = self._banned.to(self.args.device)
        right: dict[int, list[bool]] = {}
        final: list[bool] = []
        losses = []
        for start in range(0, len(self.valid_rows), 64):
            rows = self.valid_rows[start : start + 64]
            batch = {key: value.to(self.args.device) for key, value in self._collate(rows).items()}
            logits, labels, readouts, row_of = self._label_logits(self.model, batch)
            losses.append(torch.nn.functional.cross_entropy(logits.float(), labels).item())
            wrong = (logits.index_fill(-1, banned, -torch.inf).argmax(-1) != labels).tolist()
            places = zip(row_of.tolist(), readouts.tolist(), wrong, strict=True)
            missed = {(i, k) for i, k, bad in places if bad}
            for i, row in enumerate(rows):
                hits = [(i, k) not in missed for k in range(1, row.num_readouts + 1)]
                final.append(hits[-1])
                for k, hit in enumerate(hits, start=1):
                    right.setdefault(k, []).append(hit)
        metrics = {"accuracy": sum(final) / len(final), "n": len(final), "loss": sum(losses) / len(losses)}
        if len(right) > 1:
            metrics |= {f"readout_{k}": sum(hits) / len(hits) for k, hits in sorted(right.items())}
        return metrics

    def _greedy_accuracy(self) -> float:
        """The share of `asked` whose chain, as greedy decoding writes it, ends in the right answer.

        A chain may be half as long again as the longest gold one, and 128 tokens at most.
        """
        longest = max(sum(label != IGNORED for label in row.labels) for row in self.valid_rows)
        bound = min(_LONGEST_CHAIN, math.ceil(1.5 * longest))
        nearby = sorted(self.asked, key=lambda problem: len(problem.question))
        batch = _ASKED_AT_ONCE[self.args.device.type]
        right = 0
        for start in range(0, len(nearby), batch):
            problems = nearby[start : start + batch]
            answers = answer_batch(self.rim, [problem.question for problem in problems], "cot", max_new_tokens=bound)
            right += sum(is_correct(a.value, problem.answer) for a, problem in zip(answers, problems, strict=True))
        return right / len(nearby)

    def log(self, logs: dict, start_time: float | None = None) -> None:
        """Adds speed and the current weights of a row with most readouts to every training log."""
        if "loss" in logs:
            logs |= self.meter.read(self.accelerator) | self.profile()
        super().log(logs, start_time)

    def profile(self) -> dict[str, float]:
        """The readout weights at this moment for a row with most readouts, e.g. lambda_1 .. lambda_T."""
        if self._longest.num_readouts < 2:
            return {}
        pair = (torch.tensor([self._longest.num_grounded]), torch.tensor([self._longest.num_readouts]))
        return {f"weight_{k}": round(w, 4) for k, w in enumerate(self.weights(self.progress, *pair)[0].tolist(), 1)}

    def floating_point_ops(self, inputs) -> int:
        """Nothing: `meter` counts what is needed, and the Trainer's own count walks over every weight in every step."""
        return 0

    def _label_losses(self, model, inputs):
        """Cross entropy [N + A] in float32, readout numbers [N] and batch rows [N]; see `_label_logits`."""
        head = self.rim.model.get_output_embeddings()
        if self._head_is_fused and not self._head_is_checked:  # some families do more to a logit than the head does
            self._head_is_checked = True
            model.eval()  # dropout would draw random numbers, and other ones in a run that is resumed
            with torch.no_grad():
                plain, fused = (self._mean_loss(model, inputs, fuse) for fuse in (False, True))
            model.train()
            self._head_is_fused = abs(plain - fused) < 0.02 * abs(plain)
        if not self._head_is_fused:
            logits, labels, readouts, row_of = self._label_logits(model, inputs)
            return torch.nn.functional.cross_entropy(logits.float(), labels, reduction="none"), readouts, row_of
        with _without(head):
            hidden, labels, readouts, row_of = self._label_logits(model, inputs)
        return head_losses(head, hidden, labels), readouts, row_of

    def _mean_loss(self, model, inputs, fused: bool) -> float:
        self._head_is_fused = fused
        return self._label_losses(model, inputs)[0].mean().item()

    def _label_logits(self, model, inputs):
        """Logits [N + A, vocab] and labels [N + A], readout numbers [N] and batch rows [N] of the N labelled positions.

        The A last are those of slots, where rows have slot labels.
        """
        places, slots = inputs["places"], inputs.get("slot_places")
        with contextlib.ExitStack() as reading:
            if slots is not None:
                reading.enter_context(self._slots.reading(slots))
            also = None if slots is None else self._slots.head_inputs
            reading.enter_context(_only_at(self.rim.model.get_output_embeddings(), places, also))
            logits = model(
                input_ids=inputs["input_ids"],
                position_ids=inputs["position_ids"],
                attention_mask=self._mask(inputs["readouts"], inputs.get("segments"), inputs.get("audience")),
                use_cache=False,
            ).logits
        labels, readouts = inputs["labels"].flatten()[places], inputs["label_readouts"].flatten()[places]
        if slots is not None:
            labels = torch.cat([labels, inputs["slot_targets"]])
        return logits, labels, readouts, places // inputs["labels"].shape[1]

    def _mask(self, readouts: torch.Tensor, *worlds: torch.Tensor | None):
        """What the model is given as its mask for rows with these readout numbers [B, L], segments and audiences."""
        if self.rim.model.config._attn_implementation == ATTENTIONS["flex"]:
            rows, length = readouts.shape
            rule = flex_mask_mod(readouts, *worlds)
            return create_block_mask(rule, rows, None, length, length, device=readouts.device)
        mask = row_mask(readouts, self._mask_dtype, *worlds)
        # Plain causal text: padding stands right of everything and needs no mask.
        return torch.ones_like(readouts) if mask is None else mask

    def _collate(self, rows: list[Row]) -> dict[str, torch.Tensor]:
        """A batch as `pad_rows` makes it, of a length that suits the device, and the labelled `places` [N] in [B * L].

        Places are found here, where the rows are: found on a GPU they would make every step wait for the one before.
        """
        pad = self.rim.tokenizer.pad_token_id
        pad = self.rim.eos_id if pad is None else pad
        batch = pad_rows(rows, pad)
        if missing := -batch["labels"].shape[1] % self._multiple:
            fill = {"input_ids": pad, "readouts": PADDING, "labels": IGNORED, "slot_labels": IGNORED}
            for key, values in batch.items():
                if values.dim() == 2:
                    batch[key] = torch.nn.functional.pad(values, (0, missing), value=fill.get(key, 0))
        if "slot_labels" in batch:
            batch |= slot_targets(batch.pop("slot_labels"), batch.pop("slot_depths"), self._slots.count)
        return batch | {"places": (batch["labels"].flatten() != IGNORED).nonzero()[:, 0]}

    def _get_train_sampler(self, train_dataset=None):
        return SequentialSampler(self.train_dataset)  # `Batches` come in their final order

    def _save_checkpoint(self, model, trial) -> None:
        start = time.perf_counter()
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        folder.mkdir(parents=True, exist_ok=True)
        self._loss_so_far.save(folder)
        super()._save_checkpoint(model, trial)
        self.meter.skip(time.perf_counter() - start)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves a RiM checkpoint, which can be asked and evaluated as it is; to be called on every process."""
        # Gathering the shards of FSDP takes all processes, writing only one.
        state_dict = self.accelerator.get_state_dict(self.model) if self.is_fsdp_enabled else None
        if self.args.should_save:
            self.rim.save_pretrained(output_dir or self.args.output_dir, state_dict=state_dict)


class _LossSoFar(TrainerCallback):
    """Carries the losses that no log has told yet over a stop, so that a resumed run logs the same means."""

    def __init__(self, trainer: RiMTrainer):
        self._trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        file = self._file(Path(args.output_dir) / f"checkpoint-{state.global_step}")
        if state.global_step and file.exists():
            told = json.loads(file.read_text(encoding="utf-8"))
            self._trainer._tr_loss.fill_(told["sum"])
            self._trainer._globalstep_last_logged = told["logged"]
        self._trainer.meter.restart()

    def save(self, folder: Path) -> None:
        told = {"sum": self._trainer._tr_loss.item(), "logged": self._trainer._globalstep_last_logged}
        write_atomic(self._file(folder), json.dumps(told).encode())

    def _file(self, folder: Path) -> Path:
        return folder / f"loss_so_far_{self._trainer.args.process_index}.json"


def _weighted_mean(losses: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return (losses * weights).sum() / weights.sum().clamp_min(1e-6)


@contextlib.contextmanager
def _without(head: torch.nn.Module):
    """Lets a model return what its output head is given in the place of logits."""
    head.forward = lambda hidden: hidden
    try:
        yield
    finally:
        del head.forward


@contextlib.contextmanager
def _only_at(head: torch.nn.Module, places: torch.Tensor, also: Callable[[], torch.Tensor] | None):
    """Lets the output head see the hidden states at `places` [N] of [B * L] only: [B, L, d] -> [N, d].

    After them come the states that `also` gives, [A, d]. A hook, because it works for every family, under PEFT, DDP and
    FSDP, where calling the body alone would not.
    """

    def chosen(module, inputs):
        states = inputs[0].flatten(0, 1)[places]
        return (torch.cat([states, also().to(states.dtype)]) if also else states,)

    handle = head.register_forward_pre_hook(chosen)
    try:
        yield
    finally:
        handle.remove()
