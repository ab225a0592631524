"""Nearest explicit step: `formula` is the decode, `fit` what is fitted and chosen on which split, `results` the
report."""
