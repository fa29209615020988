"""What a device can do at best: the rate of one large matrix product, measured, not read from a datasheet."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ca2st.model.token_linear import token_linear
from ca2st.training.config import Precision

_SIZE = {"cuda": 8192, "cpu": 3072}
"""Rows and columns of both factors. On two slow cores 3072 takes about half a second."""
_REPEATS = {"cuda": 20, "cpu": 3}
_DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True, slots=True)
class Limit:
    """The highest rate that was seen."""

    tflops: float
    """10^12 floating-point operations a second."""
    size: int
    """Both factors are `size` x `size`."""
    dtype: str
    """Type of the numbers."""
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
    best = {name: _fastest(product, device) for name, product in products.items()}
    name = min(best, key=best.__getitem__)
    return Limit(
        tflops=2 * size**3 / best[name] / 1e12, size=size, dtype=str(dtype).removeprefix("torch."), product=name
    )


def _fastest(product: Callable[[], Tensor], device: torch.device) -> float:
    timings = []
    for _ in range(_REPEATS[device.type]):
        synchronise(device)
        start = time.perf_counter()
        product()
        synchronise(device)
        timings.append(time.perf_counter() - start)
    return min(timings)


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
