"""Peers set up for one comparison: the same checkpoint, tokenizer, precision, and rules."""

import contextlib
import dataclasses
import importlib
import importlib.util
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from layerskip.bench.peers.job import Job
from layerskip.bench.peers.process import PEERS, PeerProcess
from layerskip.decoding import LayerSkipModel
from layerskip.model import native, resolve


@contextlib.contextmanager
def start_peers(
    model: LayerSkipModel,
    names: Sequence[str],
    *,
    source: str,
    drafts: Sequence[tuple[int, int]],
    context: int,
    stop: Sequence[str],
    ignore_eos: bool,
    gguf_weights: str,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[list[PeerProcess]]:
    """Start a process for each peer; all of them end with the context.

    A peer that cannot take part (not installed, a file that it cannot read) is in the list as well, and
    says so when it is asked for an answer.

    Args:
        model: this package's own, whose precision, device and end tokens hold for all.
        names: of `PEERS`.
        source: the checkpoint's name.
        drafts: pairs (E, d) of self-speculative decoding to compare with.
        context: tokens of the longest prompt and its answer.
        stop: texts that end an answer.
        ignore_eos: answers go on after an end token.
        gguf_weights: how llama.cpp's file keeps weights, see `export.GGUF_WEIGHTS`.
        progress: told how many have started, and of how many.
    """
    with contextlib.ExitStack() as stack:
        peers = []
        if names:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="layerskip-peers-"))
            job = Job(
                model=str(resolve(source)),
                tokenizer=None if model.tokenizer is None else folder,
                gguf=str(Path(folder) / "model.gguf"),
                dtype=model.decoder.dtype_name,
                device=str(model.decoder.device),
                threads=native.usable(),  # as many as the kernels take here
                context=context,
                end_tokens=() if ignore_eos else sorted(model.end_tokens),
                stop=tuple(stop),
            )
            if model.tokenizer is not None:
                model.tokenizer.save_pretrained(folder)
        for number, name in enumerate(names):
            progress(number, len(names))
            failure = _prepare(name, job, gguf_weights)
            settings = importlib.import_module(PEERS[name].module).settings(drafts)
            peer = PeerProcess(name, dataclasses.replace(job, settings=settings), failure)
            peers.append(stack.enter_context(peer))
            progress(number + 1, len(names))
        yield peers


def _prepare(name: str, job: Job, gguf_weights: str) -> str | None:
    """Make what a peer needs on top of the checkpoint; returns why it cannot take part, or None."""
    kind = PEERS[name]
    if importlib.util.find_spec(kind.package) is None:
        return f"{kind.distribution} is not installed; run: pip install 'layerskip[baselines]'"
    if name == "llama.cpp":
        from layerskip.export import open_source, to_gguf

        assert job.gguf is not None
        try:
            to_gguf(open_source(job.model), Path(job.gguf), weights=gguf_weights)
        except ValueError as error:
            return f"no GGUF file can be made of this checkpoint: {error}"
    return None
