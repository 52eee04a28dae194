"""Other systems on the same checkpoint and the same prompts, each in a process of its own."""

from layerskip.bench.baselines.process import PEERS, PeerProcess, start_peers

__all__ = ["PEERS", "PeerProcess", "start_peers"]
