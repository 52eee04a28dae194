"""How much memory one answer needs at its peak."""

import contextlib
from pathlib import Path
from typing import Literal

import torch

from layerskip.training.memory import peak_memory_bytes

Scope = Literal["row", "process", "unknown"]
_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


class PeakMemory:
    """The highest memory since `reset`.

    On a GPU it is what PyTorch had allocated there. On a CPU it is what the process had resident, the
    weights and all other systems' leftovers in the process included.

    Attributes:
        scope: "row" where the mark can be set back (CUDA, Linux); "process" where it only ever rises,
            so that it says nothing about one row; "unknown" where the system does not tell.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.scope: Scope = "row"
        if device.type != "cuda" and not self._set_back():
            self.scope = "process" if peak_memory_bytes(device) else "unknown"

    def reset(self) -> None:
        """Forget the peak so far, where that is possible."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        elif self.scope == "row":
            self._set_back()

    def read(self) -> int | None:
        """Bytes; None where the system does not tell."""
        return peak_memory_bytes(self._device) or None

    @staticmethod
    def _set_back() -> bool:
        with contextlib.suppress(OSError):
            if "VmHWM" in _STATUS.read_text():
                _CLEAR.write_text("5")  # proc(5): sets the high-water mark to what is resident now
                return True
        return False
