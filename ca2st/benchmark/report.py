"""What a benchmark of the model says."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from ca2st.benchmark.case import PassKind, Variant
from ca2st.benchmark.limits import Limit
from ca2st.training.config import Precision


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A configuration with everything decided that depends on the device."""

    models: tuple[str, ...]
    """Kinds of model."""
    size: str
    """Name of the size."""
    num_layers: int | None
    """Layers of every expert; None: all."""
    per_device_batch_size: int
    """Clips of a pass."""
    rounds: int
    """Measured passes of each variant, where `seconds` does not say otherwise."""
    seconds: float | None
    """Time for each model's forward pass, and again for its training step."""
    device: str
    """`cpu` or `cuda`."""
    precision: Precision
    """Of the passes and of the limit."""
    variants: tuple[Variant, ...]
    """Ours first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """Several measurements of one thing."""

    median: float
    """The number that is reported."""
    lowest: float
    """Smallest of them."""
    highest: float
    """Largest of them; far from the median on a busy machine."""
    count: int
    """How many."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PassReport:
    """One kind of pass of one variant."""

    clips_per_second: float
    """From the median time."""
    seconds: Spread
    """Of a pass."""
    peak_memory_bytes: int
    """Highest memory, weights included: of the CUDA allocator, or (CPU) of the process since before the model."""
    tflops: float | None
    """10^12 floating-point operations a second, from the model's multiply-adds; known for the forward pass."""
    share_of_limit: float | None
    """`tflops` over the device's limit, measured in the same run."""
    speedup: Spread | None
    """Baseline's time over this one's, round by round; None without a baseline and for itself."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelReport:
    """One model."""

    model: str
    """Its kind."""
    num_layers: int
    """Layers of every expert that were measured."""
    all_layers: int
    """Layers it has at this size."""
    bridges: dict[str, int]
    """How many of the layers carry each bottleneck cross-attention."""
    gmacs: float
    """10^9 multiply-adds of one view with these layers."""
    trainable: int
    """Trained parameters."""
    total: int
    """Parameters."""
    variants: dict[Variant, dict[PassKind, PassReport]]
    """`ours`, and `baseline` and `compiled` where they were asked for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelBenchmark:
    """All models, with the headline of the first."""

    clips_per_second: float
    """Training step of the first model, ours."""
    baseline_clips_per_second: float | None
    """The same by the plain formulation; None without a baseline."""
    plan: Plan
    """What was measured, how."""
    limit: Limit
    """The highest rate of a large matrix product that any of the measuring processes saw."""
    load_before: float
    """The machine's load average over the minute before: well below one a core, or others were computing too, and the
    rates are too low. Ratios suffer less, since variants take turns."""
    models: tuple[ModelReport, ...]
    """In the order they were asked for."""


def spread(values: Sequence[float]) -> Spread:
    """Median and range of at least one value."""
    return Spread(median=statistics.median(values), lowest=min(values), highest=max(values), count=len(values))
