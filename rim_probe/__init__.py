"""RiM Probe: train, run and measure Reasoning in Memory (arXiv:2605.30343).

Start at `rim_probe.model` (`RiM`, `load_methods`), `rim_probe.decoding` (`answer`, `stream`), `rim_probe.evaluation`
(`evaluate`) and `rim_probe.training` (`train`). Importing the package itself imports nothing heavy.
"""

__version__ = "0.1.0"
