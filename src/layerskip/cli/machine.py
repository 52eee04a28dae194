"""What a command takes of this machine: its threads, and a word where a GPU would stay idle."""

import warnings

import torch

from layerskip.cli.terminal import tell
from layerskip.model import Decoder, native


def set_threads(asked: int | None = None) -> None:
    """Have PyTorch use so many threads; None: no more than a container's share of the processors.

    PyTorch counts the processors alone. With more threads than its share a container is stopped for the
    rest of each period, and all threads wait for those that are.
    """
    threads = native.usable() if asked is None else asked
    if threads != torch.get_num_threads():
        torch.set_num_threads(threads)


def note_idle_gpu() -> None:
    """A line on stderr where a GPU is here; for commands that nobody told which device to take."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a driver that is too old: then there is none to name
        is_here = torch.cuda.is_available()
    if is_here:
        tell("a GPU is here: --device cuda uses it")


def note_weights(decoder: Decoder) -> None:
    """A line on stderr where quantized weights save no memory, in two layouts on a GPU, or no time."""
    on_gpu, in_bfloat16 = decoder.device.type == "cuda", decoder.dtype == torch.bfloat16
    if on_gpu and in_bfloat16 and decoder.weights == "int8":
        tell("in bfloat16 on a GPU --weights int8 takes more memory than 16bit; int4 takes less")
    if decoder.weights != "16bit" and decoder.kernels == "pytorch" and not (on_gpu or in_bfloat16):
        tell(f"without the compiled kernels --weights {decoder.weights} is slower than 16bit")
