"""What a measurement ran on, in words that name no host."""

import platform
from dataclasses import dataclass
from pathlib import Path

import torch

from ca2st.cores import num_cores

_CPU_INFO = Path("/proc/cpuinfo")


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """The device, and the processor beside it."""

    device: str
    """`cpu` or `cuda`."""
    gpu: str | None
    """Name of the GPU, where that is the device."""
    processor: str
    """Name of the processor."""
    num_cores: int
    """Processors this process may use."""
    num_threads: int
    """Threads torch computes with."""


def machine(device: str) -> Machine:
    """Facts about this machine."""
    return Machine(
        device=device,
        gpu=torch.cuda.get_device_name() if device == "cuda" else None,
        processor=_processor(),
        num_cores=num_cores(),
        num_threads=torch.get_num_threads(),
    )


def _processor() -> str:
    lines = _CPU_INFO.read_text().splitlines() if _CPU_INFO.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
