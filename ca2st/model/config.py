"""What a model is made of: the configuration of CAST, CAVA, CA2ST and of one expert alone.

Standard library only, so that recipes can be checked without importing torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from ca2st.errors import UserInputError, did_you_mean
from ca2st.spec import ClipSpec

ModelKind = Literal["cast", "cava", "ca2st", "spatial", "temporal", "audio"]
Window = Literal["time", "space", "space_time"]
TimeCodeLayout = Literal["reference", "aligned"]
Combination = Literal["sequential", "parallel"]
LastLayers = int | Literal["published", "all"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TargetSpec:
    """One thing the model predicts: `verb`, `noun`, or the single label of a data set."""

    name: str
    """Name of the label space, as in the shard manifest. The pair `verb` and `noun` selects the heads of EK100."""
    num_classes: int
    """Classes of the label space."""

    def __post_init__(self) -> None:
        if self.num_classes < 1:
            raise UserInputError(f"target {self.name!r}: expected at least one class, found {self.num_classes}")
        if not self.name or "." in self.name:
            raise UserInputError(f"target {self.name!r}: expected a name that is not empty and has no dot")


@dataclass(frozen=True, kw_only=True, slots=True)
class SpatialTemporalConfig:
    """Bottleneck cross-attention between the spatial and the temporal expert (S&T)."""

    last_layers: LastLayers = "published"
    """How many layers, counted from the last, carry it; all of them where the experts have fewer. Published: all."""
    directions: Literal["both", "t2s", "s2t"] = "both"
    """`t2s` updates the spatial expert only, `s2t` the temporal expert only. Published: both (48.7 on EK100;
    S2T alone 43.7, T2S alone 46.7)."""
    t2s_window: Window = "time"
    """What a spatial query sees of the temporal tokens: `time` the same patch of every frame, `space` every patch of
    the same frame, `space_time` everything. Published: time."""
    s2t_window: Window = "space"
    """The same for a temporal query among the spatial tokens. Published: space."""
    positions: Literal["learned", "none"] = "learned"
    """Position codes added to queries and keys. Published: learned (none: 47.5 on EK100)."""

    def __post_init__(self) -> None:
        _check_last_layers("spatial_temporal.last_layers", self.last_layers)
        _check_choice("spatial_temporal.directions", self.directions, ("both", "t2s", "s2t"))
        _check_choice("spatial_temporal.t2s_window", self.t2s_window, get_args(Window))
        _check_choice("spatial_temporal.s2t_window", self.s2t_window, get_args(Window))
        _check_choice("spatial_temporal.positions", self.positions, ("learned", "none"))


@dataclass(frozen=True, kw_only=True, slots=True)
class AudioVisualConfig:
    """Bottleneck cross-attention between the audio expert and a visual expert (A&S, A&T); the window is global."""

    last_layers: LastLayers = "published"
    """How many layers, counted from the last, carry it; all of them where the experts have fewer.
    Published: all in CAVA, 3 in CA2ST."""
    directions: Literal["both", "from_audio", "to_audio"] = "both"
    """`from_audio` (A2S, A2T) updates the visual expert only, `to_audio` (S2A, T2A) the audio expert only."""
    positions: Literal["time_codes", "learned", "none"] = "time_codes"
    """Position codes added to queries and keys: codes of the time intervals (published), learned tables, or none."""

    def __post_init__(self) -> None:
        _check_last_layers("last_layers", self.last_layers)
        _check_choice("directions", self.directions, ("both", "from_audio", "to_audio"))
        _check_choice("positions", self.positions, ("time_codes", "learned", "none"))


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Structure of a model; sizes of the clip and the label spaces come separately."""

    kind: ModelKind = "ca2st"
    """`cast` = spatial + temporal, `cava` = audio + spatial, `ca2st` = all three; or one expert alone."""
    dim: int = 768
    """Width D of every expert. ViT-B: 768."""
    depth: int = 12
    """Layers of every expert. ViT-B: 12."""
    num_heads: int = 12
    """Attention heads, in the experts and in B-CA. ViT-B: 12."""
    patch_size: int = 16
    """Side of a patch in pixels, and of a spectrogram patch in rows and bins."""
    audio_stride: int = 10
    """Step from one spectrogram patch to the next on both axes; smaller than the patch, so patches overlap."""
    adapters: bool = True
    """False leaves the adapters out: with one expert alone, that is how an expert is pretrained."""
    adapter_ratio: float = 0.25
    """Width of an adapter as a fraction of `dim`. Published: 1/4."""
    bottleneck_ratio: float = 0.5
    """Width d of the bottleneck cross-attention as a fraction of `dim`. Published: 1/2 (ablations 1/8, 1/4, 1)."""
    drop_path_rate: float = 0.0
    """Rate in the last layer; it rises linearly from 0 in the first. Published: 0.2, Something-Something 0.3."""
    combination: Combination = "sequential"
    """Order inside a layer of CA2ST: S&T, then A&S, then A&T, each reading what the one before wrote; or `parallel`."""
    shared_bottleneck: bool = True
    """Each expert has one down and one up projection in a layer, used by all its B-CAs (published); or one for each."""
    spatial_temporal: SpatialTemporalConfig = field(default_factory=SpatialTemporalConfig)
    """S&T of CAST and CA2ST."""
    audio_spatial: AudioVisualConfig = field(default_factory=AudioVisualConfig)
    """A&S of CAVA and CA2ST."""
    audio_temporal: AudioVisualConfig = field(default_factory=AudioVisualConfig)
    """A&T of CA2ST."""
    time_code_layout: TimeCodeLayout = "reference"
    """Order of the audio time codes. `reference` repeats each column's code 12 times in a row although tokens are laid
    out row by row, as every published checkpoint expects; `aligned` gives each token its own column's code."""
    head_init_scale: float = 1.0
    """Factor on the initial weights of the classifiers. Published: 1."""

    def __post_init__(self) -> None:
        for name, choices in (
            ("kind", get_args(ModelKind)),
            ("combination", get_args(Combination)),
            ("time_code_layout", get_args(TimeCodeLayout)),
        ):
            _check_choice(name, getattr(self, name), choices)
        for name in ("dim", "depth", "num_heads", "patch_size", "audio_stride"):
            if getattr(self, name) < 1:
                raise UserInputError(f"{name}: expected at least 1, found {getattr(self, name)}")
        _check_width("dim", self.dim, self.num_heads)
        if not 0 <= self.drop_path_rate < 1:
            raise UserInputError(f"drop_path_rate: expected 0 <= rate < 1, found {self.drop_path_rate}")
        _check_width("dim * bottleneck_ratio", self.dim * self.bottleneck_ratio, self.num_heads)
        _check_width("dim * adapter_ratio", self.dim * self.adapter_ratio, 1)

    @property
    def adapter_dim(self) -> int:
        """Width of an adapter: 192 at ViT-B."""
        return int(self.dim * self.adapter_ratio)

    @property
    def bottleneck_dim(self) -> int:
        """Width d of the bottleneck: 384 at ViT-B."""
        return int(self.dim * self.bottleneck_ratio)

    def drop_path_rates(self) -> tuple[float, ...]:
        """Rate of each layer, rising linearly from 0 to `drop_path_rate`."""
        return tuple(self.drop_path_rate * index / max(self.depth - 1, 1) for index in range(self.depth))


def check_clip(config: ModelConfig, clip: ClipSpec) -> None:
    """Refuse a clip whose sizes the patches of `config` cannot cover.

    Raises:
        UserInputError: the crop is no multiple of the patch, or the spectrogram is smaller than one patch.
    """
    patch = config.patch_size
    if clip.crop_size % patch:
        lower = max(clip.crop_size // patch, 1) * patch
        raise UserInputError(
            f"crop_size: expected a multiple of the patch size {patch}, found {clip.crop_size}; "
            f"use for example {lower} or {lower + patch}"
        )
    for name in ("mel_rows", "num_mel_bins"):
        if getattr(clip, name) < patch:
            raise UserInputError(f"{name}: expected at least one patch of {patch}, found {getattr(clip, name)}")


def check_targets(targets: Sequence[TargetSpec]) -> None:
    """Refuse an empty list of targets or one that names a target twice.

    Raises:
        UserInputError: as said.
    """
    names = [target.name for target in targets]
    if not names or len(set(names)) != len(names):
        raise UserInputError(f"targets: expected at least one, each with its own name, found {names}")


def _check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    if value not in choices:
        hint = did_you_mean(str(value), list(choices))
        raise UserInputError(f"{name}: expected one of {', '.join(choices)}, found {value!r}{hint}")


def _check_last_layers(name: str, value: LastLayers) -> None:
    if value not in ("published", "all") and not (isinstance(value, int) and value >= 0):
        raise UserInputError(f"{name}: expected a number of layers >= 0, 'all' or 'published', found {value!r}")


def _check_width(name: str, value: int | float, divisor: int) -> None:
    if value < 1 or value % divisor:
        what = "a whole number" if divisor == 1 else f"a multiple of num_heads ({divisor})"
        raise UserInputError(f"{name}: expected {what}, at least {divisor}, found {value:g}")
