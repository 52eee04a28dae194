"""Benchmarks: tasks and their quality, timing, peers, reports."""
