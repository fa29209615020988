"""What a benchmark of the model measures, and how a model is made smaller without losing any of its parts."""

import time
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal, Protocol, get_args, runtime_checkable

import torch
from torch import Tensor

from ca2st.benchmark.measure import Limit, PeakMemory, measure_limit, synchronise
from ca2st.benchmark.plain import plain_model
from ca2st.errors import UserInputError, check_choice
from ca2st.model.config import AudioVisualConfig, ModelConfig, ModelKind, TargetSpec
from ca2st.model.network import HolisticModel, compile_layers
from ca2st.model.parameters import build_model, held_precision, hold_experts, layer_index, no_weight_decay
from ca2st.model.presets import SIZES, find_preset
from ca2st.spec import ClipSpec
from ca2st.training.config import OptimConfig, Precision
from ca2st.training.losses import loss_per_clip
from ca2st.training.optim import ParameterRules, build_optimizer, set_learning_rate

DeviceChoice = Literal["auto", "cpu", "cuda"]
_AUDIO_LAYERS_OF_CA2ST = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelBenchConfig:
    """A benchmark of one or more models. None means: what suits the device (`ca2st.benchmark.model.settle`)."""

    models: tuple[str, ...] = ("cast", "cava", "ca2st")
    """Kinds of model, measured one after the other."""
    size: str = "vit_b"
    """One of `ca2st.model.presets.SIZES`."""
    num_layers: int | None = None
    """Layers of every expert. None: all on a GPU, 2 on a CPU, where the whole model takes minutes per step."""
    per_device_batch_size: int | None = None
    """Clips of a pass. None: 6 on a GPU (the recipes'), 1 on a CPU."""
    rounds: int | None = None
    """Measured passes of each variant. None: 20 on a GPU, 3 on a CPU."""
    seconds: float | None = None
    """Instead of `rounds`: go on for this long with each model's forward pass and again with its training step."""
    device: DeviceChoice = "auto"
    """`auto`: a GPU where there is one."""
    precision: Precision | None = None
    """None: bf16 autocast on a GPU, fp32 on a CPU."""
    compiled: bool | None = None
    """Measure the compiled layers too. None: on a GPU; on a CPU compiling takes longer than measuring."""
    baseline: bool = True
    """Measure the plain formulation too (`ca2st.benchmark.plain`)."""
    clip: ClipSpec = field(default_factory=ClipSpec)
    """Sizes of a clip. Default: 16 frames of 224 pixels, 4 s of sound."""

    def __post_init__(self) -> None:
        if not self.models:
            raise UserInputError("models: expected at least one, found none")
        for name in self.models:
            check_choice("models", name, get_args(ModelKind))
        check_choice("size", self.size, SIZES)
        check_choice("device", self.device, get_args(DeviceChoice))
        if self.precision is not None:
            check_choice("precision", self.precision, get_args(Precision))
        for name in ("num_layers", "per_device_batch_size", "rounds"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserInputError(f"{name}: expected at least 1, found {value}")
        if self.seconds is not None and not 0 < self.seconds < float("inf"):
            raise UserInputError(f"seconds: expected a finite number > 0, found {self.seconds}")
        if self.rounds is not None and self.seconds is not None:
            raise UserInputError("expected either a number of steps or a number of seconds, found both")


def model_config(kind: str, size: str, *, num_layers: int | None) -> ModelConfig:
    """Return the published model `kind` at a size, with DropPath as the recipes have it.

    With fewer layers than published, the audio bridges of CA2ST keep their share of the layers (3 of 12), at least one.
    """
    whole = replace(find_preset(kind).config, **SIZES[size])  # type: ignore[index, arg-type]  # ModelBenchConfig checks the name; widths, depths and heads are ints
    config = whole if num_layers is None else replace(whole, depth=num_layers)
    if kind != "ca2st" or config.depth == whole.depth:
        return config
    audio = AudioVisualConfig(last_layers=max(1, round(_AUDIO_LAYERS_OF_CA2ST * config.depth / whole.depth)))
    return replace(config, audio_spatial=audio, audio_temporal=audio)


Variant = Literal["ours", "baseline", "compiled"]
PassKind = Literal["forward", "training"]
TARGETS = (TargetSpec(name="label", num_classes=400),)
_RATE = 1e-4


@dataclass(frozen=True, kw_only=True, slots=True)
class CaseSpec:
    """What one case is made from; equal specs but for the variant give equal weights and inputs."""

    config: ModelConfig
    """Structure of the model."""
    clip: ClipSpec
    """Sizes of a clip."""
    per_device_batch_size: int
    """Clips of a pass."""
    device: str
    """torch's word for the device: `cpu` or `cuda`."""
    precision: Precision
    """`fp32`, or `bf16` autocast."""
    variant: Variant
    """`ours`, the plain `baseline`, or ours with `compiled` layers."""


@runtime_checkable
class Case(Protocol):
    """A case, here or in another process."""

    def seconds(self, kind: PassKind) -> float:
        """Run one pass; how long it took. The first one of a kind warms up and is not to be counted."""
        ...

    def peak_bytes(self) -> int:
        """Return highest memory since the last `reset_peak`, weights included."""
        ...

    def reset_peak(self) -> None:
        """Forget earlier peaks."""
        ...

    def limit(self) -> Limit:
        """Return the device's limit, in the precision of the case."""
        ...


class LocalCase:
    """A case in this process."""

    def __init__(self, spec: CaseSpec) -> None:
        self._spec = spec
        self._device = torch.device(spec.device)
        _wake(self._device)
        self._memory = PeakMemory(self._device)
        self._model = _model(spec).to(self._device)
        self._inputs = _inputs(spec, self._device)
        self._labels = torch.zeros(spec.per_device_batch_size, 1, dtype=torch.long, device=self._device)
        rules = ParameterRules(
            layer_index=partial(layer_index, depth=spec.config.depth),
            num_layers=spec.config.depth,
            no_weight_decay=no_weight_decay(self._model),
        )
        self._optimizer = build_optimizer(self._model, OptimConfig(), rules=rules)
        set_learning_rate(self._optimizer, _RATE)

    def seconds(self, kind: PassKind) -> float:
        """Run one pass; how long it took."""
        run = self.forward if kind == "forward" else self.training_step
        self._model.train(kind == "training")
        synchronise(self._device)
        start = time.perf_counter()
        run()
        synchronise(self._device)
        return time.perf_counter() - start

    def forward(self) -> None:
        """Logits without gradients."""
        with torch.no_grad(), self._autocast():
            self._model(*self._inputs)

    def training_step(self) -> None:
        """Forward, loss, backward, and an AdamW step of the published trained set."""
        with self._autocast():
            logits = self._model(*self._inputs).logits
        loss_per_clip(logits, self._labels, targets=("label",), smoothing=0.1).mean().backward()  # type: ignore[no-untyped-call]  # torch's own
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def peak_bytes(self) -> int:
        """Return highest memory since the last `reset_peak`, weights included."""
        return self._memory.num_bytes()

    def reset_peak(self) -> None:
        """Forget earlier peaks."""
        self._memory.reset()

    def limit(self) -> Limit:
        """Return the device's limit, in the precision of the case."""
        return measure_limit(self._device, self._spec.precision)

    def _autocast(self) -> AbstractContextManager[object]:
        return torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=self._spec.precision == "bf16")


def _model(spec: CaseSpec) -> HolisticModel:
    model = build_model(spec.config, spec.clip, TARGETS)
    if spec.variant == "baseline":
        return plain_model(model)
    hold_experts(model, held_precision("auto", training=spec.precision, device=spec.device))
    if spec.variant == "compiled":
        compile_layers(model)
    return model


def _inputs(spec: CaseSpec, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    batch, clip = spec.per_device_batch_size, spec.clip
    video = torch.randn(batch, 3, clip.num_frames, clip.crop_size, clip.crop_size, generator=generator)
    mel = torch.randn(batch, clip.mel_rows, clip.num_mel_bins, generator=generator)
    starts = torch.rand(batch, 1 + clip.num_frames // 2, 1, generator=generator)
    return video.to(device), mel.to(device), torch.cat((starts, starts + 0.5), dim=-1).to(device)


def _wake(device: torch.device) -> None:
    """Let torch load its libraries and start its threads before memory is counted."""
    square = torch.ones(256, 256, device=device)
    (square @ square).sum().item()
