"""Benchmarks: one command for each table in `results/`."""
