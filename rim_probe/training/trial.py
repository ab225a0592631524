"""A trial of a recipe: every stage for a few steps of a few rows, so that anybody can check it on a CPU in minutes.

Knows recipes and the log of a stage. What it makes is no trained model, and it says so.
"""

from dataclasses import dataclass, replace

from rim_probe.training.recipe import Recipe

_SHOWN = 5  # steps whose mean loss is shown, and every how many the loss is logged
_VALIDATION_ROWS = 8


@dataclass(frozen=True)
class Trial:
    """How long: `steps` of `batch` rows for every stage."""

    steps: int = 30
    batch: int = 4

    def __str__(self) -> str:
        return f"{self.steps} steps of {self.batch} rows a stage"

    @property
    def log_every(self) -> int:
        """Steps between two logs."""
        return min(_SHOWN, self.steps)

    def of(self, plan: Recipe) -> Recipe:
        """The same objectives, rates, layout and adapter, with so many steps and rows, and one validation a stage.

        The rate is constant after a warm-up of two steps: a schedule made for thousands of steps would hardly begin.
        """
        stages = tuple(
            replace(
                stage,
                rows=self.steps * self.batch,
                batch_size=self.batch,
                batch_tokens=None,
                accumulation=1,
                schedule="constant",
                warmup=min(1.0, 2 / self.steps),
                validate_every=self.steps,
            )
            for stage in plan.stages
        )
        few = min(plan.data.validation_rows, _VALIDATION_ROWS)
        return replace(plan, stages=stages, data=replace(plan.data, validation_rows=few))

    def told(self, history: list[dict]) -> str:
        """First and last loss of a stage, means of 5 steps, and how right the validation was."""
        losses = [entry["loss"] for entry in history if "loss" in entry]
        held = [entry for entry in history if "eval_accuracy" in entry]
        rights = [f"{entry['eval_accuracy'] * entry['eval_n']:.0f} of {entry['eval_n']}" for entry in held]
        text = f"loss {losses[0]:.3f} -> {losses[-1]:.3f} (means of {self.log_every} steps)"
        return text + (f", right at the end {rights[-1]}" if rights else "")
