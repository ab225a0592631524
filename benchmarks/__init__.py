"""Measurements of the page: not tests, nothing here passes or fails. Each is a command, `python -m benchmarks.NAME`."""
