"""Other systems on the same checkpoint and the same prompts, each in a process of its own."""

from layerskip.bench.peers.process import PEERS, PeerProcess
from layerskip.bench.peers.start import start_peers

__all__ = ["PEERS", "PeerProcess", "start_peers"]
