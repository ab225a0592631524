"""One `transformers.Trainer` subclass: the weighted loss over packed rows, exact-match validation, honest progress.

Knows batches, losses and callbacks. Knows nothing about recipes or where problems come from. Everything else
(optimizer, DDP and FSDP through accelerate, checkpoints, resuming) is the Trainer's own.
"""

import contextlib
import time
from collections.abc import Callable, Sequence

import torch
from torch.utils.data import Dataset, SequentialSampler
from transformers import ProgressCallback, Trainer, TrainerCallback, TrainingArguments

from rim_probe.model import RiM
from rim_probe.packing import IGNORED, Row, pad_rows, row_mask

Weights = Callable[[float, torch.Tensor, torch.Tensor], torch.Tensor]
"""(progress, num_grounded [B], num_readouts [B]) -> weight of every readout [B, R]."""


class Rows(Dataset):
    """Training rows in their final order, made from problems when they are needed."""

    def __init__(self, problems: Sequence, order: Sequence[int], make_row: Callable[[object, int], Row]):
        self.problems, self.order, self.make_row = problems, order, make_row

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, place: int) -> Row:
        return self.make_row(self.problems[self.order[place]], place)


def bucketed_order(lengths: Sequence[int], rows: int, batch_size: int, seed: int) -> list[int]:
    """Indices of `rows` rows, over as many passes as it takes, so that batches hold rows of like length.

    Each pass is shuffled, cut into groups of 64 batches, sorted by length inside a group, and its batches shuffled.
    Every pass holds every index once; the batch in which one pass ends and the next begins is of mixed length.
    The order is decided here once, so a resumed run sees exactly what an uninterrupted one sees.
    """
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    group = 64 * batch_size
    while len(order) < rows:
        passed = torch.randperm(len(lengths), generator=generator).tolist()
        missing = -len(order) % batch_size  # or every batch of this pass would be cut in two
        order += passed[:missing]
        passed = passed[missing:]
        batches = []
        for start in range(0, len(passed), group):
            nearby = sorted(passed[start : start + group], key=lengths.__getitem__)
            batches += [nearby[i : i + batch_size] for i in range(0, len(nearby), batch_size)]
        full = [batch for batch in batches if len(batch) == batch_size]
        rest = [index for batch in batches if len(batch) < batch_size for index in batch]
        for place in torch.randperm(len(full), generator=generator).tolist():
            order += full[place]
        order += rest
    return order[:rows]


class RiMTrainer(Trainer):
    """Trains the readouts of packed rows.

    Loss: the mean over all labelled tokens of a batch, each weighted by its readout's weight (lambda of stage 1, alpha
    of stage 2, 1 for text rows). Logits are computed at labelled positions only.
    """

    def __init__(self, rim: RiM, args: TrainingArguments, train_rows: Rows, valid_rows: list[Row], weights: Weights):
        self.rim, self.weights, self.valid_rows = rim, weights, valid_rows
        super().__init__(
            model=rim.model,
            args=args,
            train_dataset=train_rows,
            eval_dataset=valid_rows or None,
            data_collator=self._collate,
        )
        self.loss_is_scaled_for_ga = False
        sample = valid_rows or [train_rows[i] for i in range(min(64, len(train_rows)))]
        self._banned = torch.tensor(rim.banned_ids)
        self._longest = max(sample, key=lambda row: (row.num_grounded, row.num_readouts))

    @property
    def progress(self) -> float:
        """s of the schedules: 0 at the start of the stage, 1 at its end."""
        return self.state.global_step / max(1, self.state.max_steps)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        logits, labels, readouts, row_of = self._label_logits(model, inputs)
        weights = self.weights(self.progress, inputs["num_grounded"], inputs["num_readouts"])
        token_weights = weights[row_of, readouts - 1]
        losses = torch.nn.functional.cross_entropy(logits.float(), labels, reduction="none")
        loss = (losses * token_weights).sum() / token_weights.sum().clamp_min(1e-6)
        return (loss, logits) if return_outputs else loss

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float]:
        """Exact match of every readout on the validation rows, and of each row's last one as `accuracy`.

        A readout is right when the best token that may be generated is its label at every one of its positions, which
        is precisely when greedy decoding would write it. For chain of thought that is the whole chain, a lower bound of
        answer accuracy.
        """
        self.model.eval()
        banned = self._banned.to(self.args.device)
        right: dict[int, list[bool]] = {}
        final: list[bool] = []
        losses = []
        with torch.inference_mode():
            for start in range(0, len(self.valid_rows), 64):
                rows = self.valid_rows[start : start + 64]
                batch = {key: value.to(self.args.device) for key, value in self._collate(rows).items()}
                with self.compute_loss_context_manager():
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
        metrics = {f"{metric_key_prefix}_accuracy": sum(final) / len(final)}
        metrics[f"{metric_key_prefix}_loss"] = sum(losses) / len(losses)
        if len(right) > 1:
            metrics |= {f"{metric_key_prefix}_readout_{k}": sum(hits) / len(hits) for k, hits in sorted(right.items())}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict, start_time: float | None = None) -> None:
        """Adds rows per second and the current weights of a row with most readouts to every training log."""
        if "loss" in logs:
            logs |= self.profile()
        super().log(logs, start_time)

    def profile(self) -> dict[str, float]:
        """The readout weights at this moment for a row with most readouts, e.g. lambda_1 .. lambda_T."""
        if self._longest.num_readouts < 2:
            return {}
        pair = (torch.tensor([self._longest.num_grounded]), torch.tensor([self._longest.num_readouts]))
        return {f"weight_{k}": round(w, 4) for k, w in enumerate(self.weights(self.progress, *pair)[0].tolist(), 1)}

    def _label_logits(self, model, inputs):
        """Logits [N, vocab], labels [N], readout numbers [N] and batch rows [N] of the N labelled positions."""
        labelled = inputs["labels"] != IGNORED
        mask = row_mask(inputs["readouts"], self.rim.dtype)
        if mask is None:  # plain causal text; padding stands right of everything and needs no mask
            mask = torch.ones_like(inputs["input_ids"])
        with _only_at(self.rim.model.get_output_embeddings(), labelled):
            logits = model(
                input_ids=inputs["input_ids"],
                position_ids=inputs["position_ids"],
                attention_mask=mask,
                use_cache=False,
            ).logits
        return logits, inputs["labels"][labelled], inputs["label_readouts"][labelled], labelled.nonzero()[:, 0]

    def _collate(self, rows: list[Row]) -> dict[str, torch.Tensor]:
        pad = self.rim.tokenizer.pad_token_id
        return pad_rows(rows, self.rim.eos_id if pad is None else pad)

    def _get_train_sampler(self, train_dataset=None):
        return SequentialSampler(self.train_dataset)  # `Rows` come in their final order

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves a RiM checkpoint, which can be asked and evaluated as it is; to be called on every process."""
        # Gathering the shards of FSDP takes all processes, writing only one.
        state_dict = self.accelerator.get_state_dict(self.model) if self.is_fsdp_enabled else None
        if self.args.should_save:
            self.rim.save_pretrained(output_dir or self.args.output_dir, state_dict=state_dict)


class StopAfter(TrainerCallback):
    """Saves and stops all processes when the minutes are over on the first; `stopped` says that it did."""

    def __init__(self, minutes: float):
        self.deadline = time.monotonic() + 60 * minutes
        self.stopped = False

    def on_step_end(self, args, state, control, **kwargs):
        over = torch.tensor(time.monotonic() >= self.deadline, dtype=torch.int, device=args.device)
        if args.world_size > 1:  # each would look at its own clock and stop at a step of its own
            torch.distributed.broadcast(over, src=0)
        if over and state.global_step < state.max_steps:
            self.stopped = True
            control.should_save = control.should_training_stop = True


class Progress(ProgressCallback):
    """The Trainer's bar with rows per second since the (re)start, the loss and the current readout weights."""

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self._start, self._first = time.monotonic(), state.global_step

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or self.training_bar is None or not logs:
            return
        if "loss" in logs:
            rows = (state.global_step - self._first) * args.train_batch_size * args.gradient_accumulation_steps
            speed = rows * args.world_size / max(1e-9, time.monotonic() - self._start)
            weights = " ".join(f"{value:.1f}" for key, value in logs.items() if key.startswith("weight_"))
            text = f"loss {logs['loss']:.3f}, {speed:.0f} rows/s" + (f", weights {weights}" if weights else "")
            self.training_bar.set_postfix_str(text)
        elif "eval_accuracy" in logs:
            each = " ".join(f"{value:.3f}" for key, value in logs.items() if "_readout_" in key)
            line = f"step {state.global_step}: exact match {logs['eval_accuracy']:.3f}" + (f" ({each})" if each else "")
            self.training_bar.write(line)


@contextlib.contextmanager
def _only_at(head: torch.nn.Module, places: torch.Tensor):
    """Lets the output head see the hidden states at `places` [B, L] only: [B, L, d] -> [N, d].

    A hook, because it works for every family, under PEFT, DDP and FSDP, where calling the body alone would not.
    """
    handle = head.register_forward_pre_hook(lambda module, inputs: (inputs[0][places],))
    try:
        yield
    finally:
        handle.remove()
