"""The glass box: a transformer written by hand whose memory is known; `box` is the model, `problems` its world.

`python -m rim_probe.glassbox` writes it as a checkpoint; it is the ruler that probes are measured with.
"""

from rim_probe.glassbox.box import GlassBox, glassbox
from rim_probe.glassbox.problems import all_problems, draw_problems, parts, swapped_answer

__all__ = ["GlassBox", "all_problems", "draw_problems", "glassbox", "parts", "swapped_answer"]
