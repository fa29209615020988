"""What a benchmark of the model measures, how a model is made smaller without losing a part of it, and the baseline.

The baseline is the same model with every formula computed the way it is written, by torch's ordinary operations.
"""

import copy
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, Protocol, cast, get_args, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ca2st.benchmark.measure import Limit, PeakMemory, measure_limit, synchronise
from ca2st.errors import CA2STError, UserInputError, check_choice
from ca2st.model import network
from ca2st.model.attention import Attend, SelfAttention, TokenLinear
from ca2st.model.config import SIZES, AudioVisualConfig, ModelConfig, ModelKind, TargetSpec, Trainable, find_preset
from ca2st.model.experts import QuickGELU
from ca2st.model.layers import HolisticLayer
from ca2st.spec import ClipSpec
from ca2st.training import attention_kernel
from ca2st.training.config import AttentionChoice, OptimConfig, Precision
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
    """One of `ca2st.model.config.SIZES`."""
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
    """Measure the plain formulation too (`plain_model`)."""
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
    clip: ClipSpec
    per_device_batch_size: int
    """Clips of a pass."""
    device: str
    """torch's word for the device: `cpu` or `cuda`."""
    precision: Precision
    """`fp32`, or `bf16` or `fp16` autocast."""
    variant: Variant
    """`ours`, the plain `baseline`, or ours with `compiled` layers."""
    targets: tuple[TargetSpec, ...] = TARGETS
    trainable: Trainable = "added"
    """What is trained; of the baseline always what is published."""
    activation_checkpointing: bool = False
    attention: AttentionChoice = "auto"
    """Kernel of all attentions but the baseline's, as `TrainingConfig.attention`."""


@runtime_checkable
class Case(Protocol):
    """A case, here or in another process."""

    def seconds(self, kind: PassKind) -> float:
        """Run one pass; return the seconds it took. The first one of a kind warms up and is not to be counted."""

    def peak_bytes(self) -> int:
        """Return the highest memory since the last `reset_peak`, weights included."""

    def reset_peak(self) -> None:
        """Forget earlier peaks."""

    def limit(self) -> Limit:
        """Return the device's limit, in the precision of the case."""


class LocalCase:
    """A case in this process."""

    def __init__(self, spec: CaseSpec) -> None:
        self._spec = spec
        self._device = torch.device(spec.device)
        square = torch.ones(256, 256, device=self._device)
        (square @ square).sum().item()  # torch loads its libraries and starts its threads before memory is counted
        self._memory = PeakMemory(self._device)
        self._model = _model(spec).to(self._device)
        self._inputs = _inputs(spec, self._device)
        self._targets = tuple(target.name for target in spec.targets)
        shape = (spec.per_device_batch_size, len(spec.targets))
        self._labels = torch.zeros(*shape, dtype=torch.long, device=self._device)
        rules = ParameterRules(
            layer_index=partial(network.layer_index, depth=spec.config.depth),
            num_layers=spec.config.depth,
            no_weight_decay=network.no_weight_decay(self._model),
        )
        self._optimizer = build_optimizer(self._model, OptimConfig(), rules=rules)
        set_learning_rate(self._optimizer, _RATE)

    def seconds(self, kind: PassKind) -> float:
        """Run one pass: logits without gradients, or a training step with AdamW of what is trained."""
        self._model.train(kind == "training")
        synchronise(self._device)
        start = time.perf_counter()
        with torch.set_grad_enabled(kind == "training"), self._autocast():
            logits = self._model(*self._inputs).logits
        if kind == "training":
            losses = loss_per_clip(logits, self._labels, targets=self._targets, smoothing=0.1)
            losses.mean().backward()  # type: ignore[no-untyped-call]  # torch's own
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)
        synchronise(self._device)
        return time.perf_counter() - start

    def peak_bytes(self) -> int:
        """Return the highest memory, as `Case` says."""
        return self._memory.num_bytes()

    def reset_peak(self) -> None:
        """Forget earlier peaks."""
        self._memory.reset()

    def limit(self) -> Limit:
        """Return the device's limit, as `Case` says."""
        return measure_limit(self._device, self._spec.precision)

    def _autocast(self) -> AbstractContextManager[object]:
        dtype = torch.float16 if self._spec.precision == "fp16" else torch.bfloat16
        return torch.autocast(self._device.type, dtype=dtype, enabled=self._spec.precision != "fp32")


def _model(spec: CaseSpec) -> network.HolisticModel:
    model = network.build_model(spec.config, spec.clip, spec.targets)
    if spec.variant == "baseline":
        return plain_model(model)
    network.set_trainable(model, spec.trainable)
    model.activation_checkpointing = spec.activation_checkpointing
    network.hold_experts(model, network.held_precision("auto", training=spec.precision, device=spec.device))
    if spec.attention != "auto" or spec.device == "cuda":
        shapes = attention_kernel.attention_shapes(model, num_clips=spec.per_device_batch_size)
        of_shape: dict[str, str] = {str(shape): spec.attention for shape in shapes.values()}
        if spec.attention == "auto":
            device = torch.device(spec.device)
            stopwatch = partial(attention_kernel.kernel_seconds, precision=spec.precision, device=device)
            of_shape = attention_kernel.fastest(shapes.values(), stopwatch, deterministic=False)
        attention_kernel.set_kernels(model, shapes, of_shape)
    if spec.variant == "compiled":
        network.compile_layers(model)
    return model


def _inputs(spec: CaseSpec, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    batch, clip = spec.per_device_batch_size, spec.clip
    video = torch.randn(batch, 3, clip.num_frames, clip.crop_size, clip.crop_size, generator=generator)
    mel = torch.randn(batch, clip.mel_rows, clip.num_mel_bins, generator=generator)
    starts = torch.rand(batch, 1 + clip.num_frames // 2, 1, generator=generator)
    return video.to(device), mel.to(device), torch.cat((starts, starts + 0.5), dim=-1).to(device)


class PlainAttend(nn.Module):
    """softmax(q k^T / sqrt(head_dim)) v, with the scores as a tensor."""

    def forward(
        self,
        q: Float[Tensor, "windows heads queries head_dim"],
        k: Float[Tensor, "windows heads keys head_dim"],
        v: Float[Tensor, "windows heads keys head_dim"],
    ) -> Float[Tensor, "windows heads queries head_dim"]:
        """Let every query gather from all keys of its window."""
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        attended: Tensor = scores.softmax(dim=-1) @ v
        return attended


class PlainQuickGELU(nn.Module):
    """QuickGELU as its formula says."""

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Apply it to every element."""
        return x * torch.sigmoid(1.702 * x)


def plain_model(model: network.HolisticModel) -> network.HolisticModel:
    """Return a copy of `model`, weights included, that computes everything the plain way.

    Raises:
        CA2STError: the model has none of the parts that are to be replaced: model and baseline have grown apart.
    """
    plain = copy.deepcopy(model)
    cast("HolisticLayer", plain.layers[-1]).whole = True
    if not any(isinstance(module, Attend) for module in plain.modules()):
        raise CA2STError("baseline: expected self-attention of ca2st.model.attention in the model, found none")
    for parent in list(plain.modules()):
        if isinstance(parent, SelfAttention):
            parent.linear = nn.functional.linear  # type: ignore[assignment]  # the same signature, names aside
        for name, child in list(parent.named_children()):
            if type(child) in _PLAIN:
                setattr(parent, name, _PLAIN[type(child)](child))
    return plain


def _plain_linear(ours: TokenLinear) -> nn.Linear:
    linear = nn.Linear(ours.in_features, ours.out_features, bias=ours.bias is not None, device="meta")
    linear.weight, linear.bias = ours.weight, ours.bias
    return linear


_PLAIN: Mapping[type[nn.Module], Callable[[Any], nn.Module]] = {
    Attend: lambda _ours: PlainAttend(),
    TokenLinear: _plain_linear,
    QuickGELU: lambda _ours: PlainQuickGELU(),
}
"""Ours, and what replaces it."""
