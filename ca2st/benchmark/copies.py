"""How fast a device copies: from and to pinned memory of the host, and inside itself."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ca2st.benchmark.limits import synchronise

_REPEATS = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class CopyLimits:
    """Highest rates seen, in 10^9 bytes copied a second; inside the device a byte is read and written."""

    host_to_device: float
    device_to_host: float
    device_to_device: float
    num_bytes: int
    """Of one copy."""


def measure_copies(device: torch.device, *, num_bytes: int) -> CopyLimits:
    """Copy blocks of `num_bytes`; the fastest single copy counts. On a CPU all three are copies in its memory."""
    host = torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
    here, there = (torch.zeros(num_bytes, dtype=torch.uint8, device=device) for _ in range(2))

    def rate(copy: Callable[[], object]) -> float:
        return num_bytes / min(_seconds(copy, device) for _ in range(_REPEATS)) / 1e9

    return CopyLimits(
        host_to_device=rate(lambda: here.copy_(host, non_blocking=True)),
        device_to_host=rate(lambda: host.copy_(here, non_blocking=True)),
        device_to_device=rate(lambda: there.copy_(here)),
        num_bytes=num_bytes,
    )


def _seconds(copy: Callable[[], object], device: torch.device) -> float:
    synchronise(device)
    begin = time.perf_counter()
    copy()
    synchronise(device)
    return time.perf_counter() - begin
