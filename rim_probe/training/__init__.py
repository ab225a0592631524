"""Training RiM: recipes, schedules, and one Trainer subclass on top of transformers."""

from rim_probe.training.run import train

__all__ = ["train"]
