"""Timings against plain renderings; run as ``python -m benchmarks.train`` from the repository."""
