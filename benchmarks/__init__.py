"""Measures what trackagent promises to cost: `python -m benchmarks`; one file a subject."""
