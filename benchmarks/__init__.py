"""Comparisons with peers, one command each: `python -m benchmarks`, `python -m benchmarks.quality`."""
