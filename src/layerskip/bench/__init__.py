"""Benchmarks: tasks and measures of quality, interleaved timing, baselines, reports."""
