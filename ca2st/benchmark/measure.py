"""What benches measure with: the limit of a device, peak memory, facts of the machine, the spread of several values.

A device's limit is the rate of one large matrix product, measured. Its peak is what the datasheet says.
"""

import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ca2st.model.attention import token_linear
from ca2st.processes import num_cores
from ca2st.training.config import Precision

_SIZE = {"cuda": 8192, "cpu": 3072}
"""Rows and columns of both factors. On two slow cores 3072 takes about half a second."""
_REPEATS = {"cuda": 20, "cpu": 3}
_DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True, slots=True)
class Limit:
    """The highest rate that was seen."""

    tflops: float
    """10^12 floating-point operations per second."""
    size: int
    """Both factors are `size` x `size`."""
    dtype: str
    product: str
    """Which of torch's products gave it."""


def measure_limit(device: torch.device, precision: Precision, *, size: int | None = None) -> Limit:
    """Multiply two large matrices with every product the model uses; the fastest single run counts."""
    size = size or _SIZE[device.type]
    dtype = _DTYPES[precision]
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    products: Mapping[str, Callable[[], Tensor]] = {
        "mm": lambda: left @ right,
        "token_linear": lambda: token_linear(left[None], right, None),
    }
    best: dict[str, float] = {}
    for name, product in products.items():
        timings = []
        for _ in range(_REPEATS[device.type]):
            synchronise(device)
            start = time.perf_counter()
            product()
            synchronise(device)
            timings.append(time.perf_counter() - start)
        best[name] = min(timings)
    name = min(best, key=best.__getitem__)
    return Limit(
        tflops=2 * size**3 / best[name] / 1e12, size=size, dtype=str(dtype).removeprefix("torch."), product=name
    )


@dataclass(frozen=True, slots=True)
class Peak:
    """The datasheet's dense peak in 10^12 floating-point operations per second."""

    bf16: float
    """Of its matrix units, sums in float32."""
    fp32: float
    """Without TF32, which torch leaves off."""


PEAKS: dict[str, Peak] = {
    "A10": Peak(125, 31.2),
    "A30": Peak(165, 10.3),
    "A40": Peak(149.7, 37.4),
    "A100": Peak(312, 19.5),
    "B200": Peak(2250, 75),
    "GH200": Peak(989, 67),
    "H100": Peak(989, 67),
    "H100 NVL": Peak(835, 60),
    "H100 PCIe": Peak(756, 51),
    "H200": Peak(989, 67),
    "L4": Peak(121, 30.3),
    "L40": Peak(181, 90.5),
    "L40S": Peak(362, 91.6),
    "RTX 3090": Peak(71, 35.6),
    "RTX 4090": Peak(165.2, 82.6),
    "RTX 5090": Peak(209.5, 104.8),
    "RTX 6000 Ada": Peak(364, 91.1),
    "RTX A6000": Peak(154.8, 38.7),
}
"""By the part of the name that torch gives which tells them apart. Source: NVIDIA's datasheets."""


def find_peak(name: str) -> str | None:
    """Return the entry of `PEAKS` for torch's name of a GPU, the longest that fits; None: none does."""
    if "laptop" in name.lower():
        return None
    words = re.sub(r"[^a-z0-9]+", " ", name.lower())
    fitting = [known for known in PEAKS if re.search(rf"\b{known.lower()}\b", words)]
    return max(fitting, key=len, default=None)


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


_CPU_INFO = Path("/proc/cpuinfo")


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """The device, and the processor beside it."""

    device: str
    """`cpu` or `cuda`."""
    gpu: str | None
    """Name of the GPU, where that is the device."""
    processor: str
    num_cores: int
    """Processors this process may use."""
    num_threads: int
    """Threads torch computes with."""


def machine(device: str) -> Machine:
    """Return facts about this machine."""
    lines = _CPU_INFO.read_text().splitlines() if _CPU_INFO.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return Machine(
        device=device,
        gpu=torch.cuda.get_device_name() if device == "cuda" else None,
        processor=next(names, platform.machine()),
        num_cores=num_cores(),
        num_threads=torch.get_num_threads(),
    )


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
        """Return the highest memory since the last reset."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return max(_resident("VmHWM") - self._before, 0)


def _resident(name: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise LookupError(f"{_STATUS}: expected a line {name}, found none")


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """Several measurements of one thing."""

    median: float
    """The number that is reported."""
    lowest: float
    highest: float
    """Largest of them; far from the median on a busy machine."""
    count: int


def spread(values: Sequence[float]) -> Spread:
    """Return median and range of at least one value."""
    return Spread(median=statistics.median(values), lowest=min(values), highest=max(values), count=len(values))
