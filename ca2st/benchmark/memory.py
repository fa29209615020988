"""Peak memory of a pass: the CUDA allocator's own count, or the highest resident memory of this process."""

from pathlib import Path

import torch

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"


class PeakMemory:
    """Counts from when it is made: make it before the model, so that weights are in the count.

    On a CPU the process must be measuring nothing else: what counts is what the system gave it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before = 0 if device.type == "cuda" else _resident("VmRSS")

    def reset(self) -> None:
        """Forget earlier peaks; what is held now stays in the count."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            _RESET.write_text(_RESET_PEAK)

    def num_bytes(self) -> int:
        """Highest memory since the last reset."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return max(_resident("VmHWM") - self._before, 0)


def _resident(name: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise LookupError(f"{_STATUS}: expected a line {name}, found none")
