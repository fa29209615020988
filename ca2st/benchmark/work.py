"""What training a clip computes, counted, and what devices compute per second by their datasheets."""

import re
from dataclasses import dataclass

from ca2st.model.inspect import ModelInfo

FLOP_PER_MULTIPLY_ADD = 2


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


def train_tflop(info: ModelInfo, *, again: bool) -> float:
    """Return 10^12 operations to train a clip: forward, backward to the first trained part, their weights' gradients.

    `again`: layers are computed again for their gradients.
    """
    computed = info.computed_gmacs / info.gmacs  # of the last layer only what reaches an output
    whole = info.computed_gmacs
    trained = computed * sum(part.gmacs * part.trainable / part.total for part in info.parts)
    head = sum(part.gmacs for part in info.parts if part.name == "head")
    only_head = all(part.trainable == 0 for part in info.parts if part.name != "head")
    backward = (head if only_head else whole) + trained
    return FLOP_PER_MULTIPLY_ADD * (whole + backward + (whole if again and not only_head else 0)) / 1e3
