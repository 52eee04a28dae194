"""Baselines: other programs on the same checkpoint and prompts, each in processes of its own."""

from layerskip.bench.baselines.process import BASELINES, Baseline, start_baselines

__all__ = ["BASELINES", "Baseline", "start_baselines"]
