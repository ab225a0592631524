"""What watches a training: stopping in time or on a signal, and the progress bar.

Knows clocks, signals and the Trainer's callbacks. Knows nothing about losses or rows.
"""

import contextlib
import math
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator

import torch
from transformers import ProgressCallback, TrainerCallback

from rim_probe.training.speed import told

_FIRST_SAVE = 5.0  # seconds that a save is taken to last until one was timed


class StopAfter(TrainerCallback):
    """Saves and stops all processes in time: before a step that, with what follows it, would end too late.

    It does so, too, after the step in which this process gets SIGTERM or SIGINT; a second SIGINT interrupts at once.
    At least one step is taken in any case. What follows a step is judged by the longest of its kind so far: a
    validation where one is due, and a save. The clock of the first process counts; `stopped` says that it stopped.

    Attributes:
        deadline: in seconds of `time.monotonic`.
        validation_steps: until one was timed, a validation is taken to last as long as so many steps.
    """

    def __init__(self, minutes: float = math.inf):
        self.begun = time.monotonic()
        self.deadline = self.begun + 60 * minutes
        self.stopped = self.signalled = False
        self.validation_steps = 0.0
        self._save, self._validation, self._starting = _FIRST_SAVE, None, 0.0
        self._steps: deque[float] = deque(maxlen=20)

    @contextlib.contextmanager
    def on_signals(self) -> Iterator[None]:
        """Listens for signals inside; only the main thread may, in another one nothing changes."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

        def note(number, frame) -> None:
            self.signalled = True
            signal.signal(signal.SIGINT, before[signal.SIGINT])

        for number in before:
            signal.signal(number, note)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @property
    def why(self) -> str:
        """Why the run stopped, as a sentence says it."""
        return "by a signal" if self.signalled else f"after {(self.deadline - self.begun) / 60:g} minutes"

    def too_late_for_a_stage(self, device: torch.device) -> bool:
        """Whether loading, compiling and one step, as long as they took before, would not end in time."""
        late = time.monotonic() + self._starting + self._save >= self.deadline
        return self._agreed(late or self.signalled, device)

    def on_train_begin(self, args, state, control, **kwargs):
        """Starts the clock."""
        self._last, self._fresh = time.monotonic(), True
        self._steps.clear()

    def on_step_end(self, args, state, control, **kwargs):
        """Stops where the next steps would come too late."""
        step = self._passed()
        if self._fresh:  # with loading and compiling
            self._fresh, self._starting = False, self._starting or self._last - self.begun
        else:
            self._steps.append(step)
        ahead = max(self._steps, default=step) + self._save
        if args.eval_strategy != "no" and (state.global_step + 1) % args.eval_steps == 0:
            guess = self.validation_steps * max(self._steps, default=0.0)
            # Twice, because it is not asked again before the step after that validation.
            ahead = 2 * ahead + (guess if self._validation is None else self._validation)
        over = self._agreed(self.signalled or self._last + ahead >= self.deadline, args.device)
        if over and state.global_step < state.max_steps:
            self.stopped = True
            control.should_save = control.should_training_stop = True

    def on_evaluate(self, args, state, control, **kwargs):
        """Takes the time of a validation."""
        self._validation = max(self._validation or 0.0, self._passed())

    def on_save(self, args, state, control, **kwargs):
        """Takes the time of a save."""
        self._save = max(self._save if self._save != _FIRST_SAVE else 0.0, self._passed())

    def _passed(self) -> float:
        """Seconds since this was asked last."""
        last, self._last = self._last, time.monotonic()
        return self._last - last

    @staticmethod
    def _agreed(over: bool, device: torch.device) -> bool:
        """What the first process says; each would look at its own clock and stop at a step of its own."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return over
        said = torch.tensor(over, dtype=torch.int, device=device)
        torch.distributed.broadcast(said, src=0)
        return bool(said)


class Progress(ProgressCallback):
    """The Trainer's bar with the loss, the speed since the last log, and the current readout weights."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Shows what was logged."""
        if not state.is_world_process_zero or self.training_bar is None or not logs:
            return
        if "loss" in logs:
            weights = " ".join(f"{value:.1f}" for key, value in logs.items() if key.startswith("weight_"))
            parts = [f"loss {logs['loss']:.3f}", told(logs, args), f"weights {weights}" if weights else ""]
            self.training_bar.set_postfix_str(", ".join(filter(None, parts)))
        elif "eval_accuracy" in logs:
            each = " ".join(f"{value:.3f}" for key, value in logs.items() if "_readout_" in key)
            if "eval_exact_match" in logs:
                kind, each = "answers right", f"whole chain as written {logs['eval_exact_match']:.3f}"
            else:
                kind = "exact match"
            line = f"step {state.global_step}: {kind} {logs['eval_accuracy']:.3f} of {logs['eval_n']}"
            self.training_bar.write(line + (f" ({each})" if each else ""))
