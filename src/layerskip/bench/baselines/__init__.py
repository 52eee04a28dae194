"""Baselines: other programs on the same checkpoint and prompts, each in a process of its own."""

from layerskip.bench.baselines.process import BASELINES, BaselineProcess, start_baselines

__all__ = ["BASELINES", "BaselineProcess", "start_baselines"]
