"""The experiments of LayerSkip (arXiv 2404.16710) at a small scale: one module a regime.

Run from the root of the repository, as in `PYTHONPATH=benchmarks python -m paper.pretrain --help`. Each
module writes one file of `benchmarks/results/paper/`; `python -m paper.page` writes docs/paper.md from
these files and from nothing else.
"""
