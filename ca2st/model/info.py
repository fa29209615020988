"""Size and cost of a model without building it: parameters and multiply-adds, part by part, on the meta device."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ca2st.model.build import build_model
from ca2st.model.choices import Trainable
from ca2st.model.config import ModelConfig, TargetSpec
from ca2st.model.holistic import HolisticModel
from ca2st.model.parameters import set_trainable
from ca2st.spec import ClipSpec

_FLOP_PER_MULTIPLY_ADD = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class PartInfo:
    """One part of a model."""

    name: str
    """`spatial expert`, `adapters`, `bottleneck cross-attention`, ..."""
    trainable: int
    """Trained parameters."""
    total: int
    """Parameters."""
    gmacs: float
    """10^9 multiply-adds of the forward pass of one view."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelInfo:
    """A model and its parts; the numbers of the parts add up to those of the model."""

    trainable: int
    """Trained parameters (without the LayerNorm that the reference trains and never uses)."""
    total: int
    """Parameters."""
    gmacs: float
    """10^9 multiply-adds of the forward pass of one view: convolutions, Linears and attention."""
    parts: tuple[PartInfo, ...]
    """Experts first, then what is added."""


def model_info(
    config: ModelConfig, clip: ClipSpec, targets: Sequence[TargetSpec], *, trainable: Trainable = "added"
) -> ModelInfo:
    """Count parameters and multiply-adds without allocating weights, when what `trainable` names is trained.

    Raises:
        UserInputError: sizes of clip and model do not fit, or the targets or what is to be trained are not usable.
    """
    with torch.device("meta"):
        model = build_model(config, clip, targets)
        set_trainable(model, trainable)
        macs = _multiply_adds(model)
    trained: Counter[str | None] = Counter()
    total: Counter[str | None] = Counter()
    for name, parameter in model.named_parameters():
        total[_part_of(name)] += parameter.numel()
        trained[_part_of(name)] += parameter.numel() if parameter.requires_grad else 0
    parts = tuple(
        PartInfo(name=part, trainable=trained[part], total=total[part], gmacs=macs[part] / 1e9)
        for part in _PARTS
        if total[part]
    )
    return ModelInfo(
        trainable=sum(trained.values()), total=sum(total.values()), gmacs=sum(macs.values()) / 1e9, parts=parts
    )


_PARTS = {
    "spatial expert": re.compile(r"experts\.spatial\b"),
    "temporal expert": re.compile(r"experts\.temporal\b"),
    "audio expert": re.compile(r"experts\.audio\b"),
    "adapters": re.compile(r"layers\.\d+\.adapters\b"),
    "bottleneck cross-attention": re.compile(r"layers\.\d+\.(?:bottlenecks|bridges)\b"),
    "time codes": re.compile(r"time_codes\b"),
    "head": re.compile(r"head\b"),
}
"""Parts, in the order of printing, and how the names of their modules and parameters begin."""


def _part_of(name: str) -> str | None:
    return next((part for part, pattern in _PARTS.items() if pattern.match(name)), None)


class _Meter:
    """Charges the multiply-adds done since the last event to the innermost part that is running."""

    def __init__(self, counter: FlopCounterMode) -> None:
        self.macs: Counter[str] = Counter()
        self._counter = counter
        self._seen = 0
        self._running: list[str] = []

    def enter(self, part: str) -> None:
        self._charge()
        self._running.append(part)

    def leave(self) -> None:
        self._charge()
        self._running.pop()

    def _charge(self) -> None:
        now = self._counter.get_total_flops() // _FLOP_PER_MULTIPLY_ADD
        if now > self._seen:
            self.macs[self._running[-1]] += now - self._seen
        self._seen = now


def _multiply_adds(model: HolisticModel) -> Counter[str]:
    clip, frames = model.clip, model.clip.num_frames
    counter = FlopCounterMode(display=False)
    meter = _Meter(counter)
    for name, module in model.named_modules():
        if (part := _part_of(name)) is not None:
            _watch(module, meter, part)
    with counter, torch.no_grad():
        model(
            torch.empty(1, 3, frames, clip.crop_size, clip.crop_size),
            torch.empty(1, clip.mel_rows, clip.num_mel_bins),
            torch.empty(1, 1 + frames // 2, 2),
        )
    return meter.macs


def _watch(module: nn.Module, meter: _Meter, part: str) -> None:
    module.register_forward_pre_hook(lambda _module, _inputs: meter.enter(part))
    module.register_forward_hook(lambda _module, _inputs, _output: meter.leave())
