"""What a benchmark of the model measures, and how a model is made smaller without losing any of its parts."""

from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from ca2st.errors import UserInputError, did_you_mean
from ca2st.model.config import AudioVisualConfig, ModelConfig, ModelKind
from ca2st.model.presets import SIZES, find_preset
from ca2st.spec import ClipSpec
from ca2st.training.config import Precision

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
    """Layers of every expert. None: all on a GPU, 2 on a CPU, where the whole model takes minutes a step."""
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
            _check_choice("models", name, list(get_args(ModelKind)))
        _check_choice("size", self.size, list(SIZES))
        _check_choice("device", self.device, list(get_args(DeviceChoice)))
        if self.precision is not None:
            _check_choice("precision", self.precision, list(get_args(Precision)))
        for name in ("num_layers", "per_device_batch_size", "rounds"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserInputError(f"{name}: expected at least 1, found {value}")
        if self.seconds is not None and not 0 < self.seconds < float("inf"):
            raise UserInputError(f"seconds: expected a finite number > 0, found {self.seconds}")
        if self.rounds is not None and self.seconds is not None:
            raise UserInputError("expected either a number of steps or a number of seconds, found both")


def model_config(kind: str, size: str, *, num_layers: int | None) -> ModelConfig:
    """The published model `kind` at a size, with DropPath as the recipes have it.

    With fewer layers than published, the audio bridges of CA2ST keep their share of the layers (3 of 12), at least one.
    """
    whole = replace(find_preset(kind).config, **SIZES[size])  # type: ignore[index, arg-type]  # ModelBenchConfig checks the name; widths, depths and heads are ints
    config = whole if num_layers is None else replace(whole, depth=num_layers)
    if kind != "ca2st" or config.depth == whole.depth:
        return config
    audio = AudioVisualConfig(last_layers=max(1, round(_AUDIO_LAYERS_OF_CA2ST * config.depth / whole.depth)))
    return replace(config, audio_spatial=audio, audio_temporal=audio)


def _check_choice(name: str, value: str, known: list[str]) -> None:
    if value not in known:
        raise UserInputError(
            f"{name}: expected one of {', '.join(known)}, found {value!r}{did_you_mean(str(value), known)}"
        )
