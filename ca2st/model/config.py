"""What a model is made of: the configuration of CAST, CAVA, CA2ST and of one expert alone.

And what follows from it: which experts there are, which pairs of them exchange tokens, and in which layers. The paper's
X2Y always means: keys and values from X, queries from Y; so X2Y updates expert Y. At the end the published models, each
published row of their ablations, and sizes, by name.

Standard library only.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from ca2st.errors import UserInputError, check_choice, check_literals, did_you_mean
from ca2st.spec import ClipSpec

Trainable = str | Sequence[str]
"""A set of `TRAINABLE_SETS` by its name, or patterns of whole parameter names."""
TRAINABLE_SETS = ("added", "head", "adapters", "all")
"""`added`: what the method adds to the experts, the published set; `head`: classifiers and last adapters; `adapters`:
the layers' adapters and the head; `all`: every parameter."""
HeldPrecision = Literal["fp32", "bf16"]
ExpertPrecision = Literal["auto", "fp32", "bf16"]


def check_trainable(which: Trainable) -> None:
    """Raise UserInputError for a name that is no set, and for an empty list; there need not be a model yet."""
    if isinstance(which, str):
        if which not in TRAINABLE_SETS:
            hint = did_you_mean(which, list(TRAINABLE_SETS))
            raise UserInputError(
                f"trainable: expected one of {', '.join(TRAINABLE_SETS)} or a list of patterns of parameter names, "
                f"found {which!r}{hint}"
            )
    elif not which:
        raise UserInputError("trainable: expected at least one pattern of parameter names, found an empty list")


def check_expert_precision(wanted: ExpertPrecision, *, training: str) -> None:
    """Raise UserInputError for experts in bfloat16 beside float32 computation, which cannot read them."""
    if wanted == "bf16" and training != "bf16":
        raise UserInputError(
            'experts.precision: "bf16" is read under bfloat16 autocast only, found training.precision = '
            f'"{training}"; set training.precision = "bf16", or experts.precision = "auto"'
        )


ModelKind = Literal["cast", "cava", "ca2st", "spatial", "temporal", "audio"]
Window = Literal["time", "space", "space_time"]
TimeCodeLayout = Literal["reference", "aligned"]
LastLayers = int | Literal["published", "all"]
EncoderName = Literal["clip", "videomae", "ast", "resnet50"]
SpatialEncoder = Literal["clip", "videomae", "resnet50"]
TemporalEncoder = Literal["videomae", "clip"]
Fusion = Literal["cross_attention", "lateral", "late_add", "late_concat", "independent"]
Positions = Literal["learned", "time_codes", "none"]


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
    layers: tuple[int, ...] | None = None
    """Exactly these layers carry it, 1 = first; None: as `last_layers` says."""
    directions: Literal["both", "t2s", "s2t"] = "both"
    """`t2s` updates the spatial expert only, `s2t` the temporal expert only. Published: both (48.7 on EK100;
    S2T alone 43.7, T2S alone 46.7)."""
    t2s_window: Window = "time"
    """What a spatial query sees of the temporal tokens: `time` the same patch of every frame, `space` every patch of
    the same frame, `space_time` everything. Published: time."""
    s2t_window: Window = "space"
    """The same for a temporal query among the spatial tokens. Published: space."""
    positions: Positions = "learned"
    """Position codes added to queries and keys: learned tables (published), codes of the time intervals, or none
    (47.5 on EK100)."""

    def __post_init__(self) -> None:
        _check_layers("spatial_temporal", self.last_layers, self.layers)
        check_literals(self, prefix="spatial_temporal.")


@dataclass(frozen=True, kw_only=True, slots=True)
class AudioVisualConfig:
    """Bottleneck cross-attention between the audio expert and a visual expert (A&S, A&T); the window is global."""

    last_layers: LastLayers = "published"
    """How many layers, counted from the last, carry it; all of them where the experts have fewer.
    Published: all in CAVA, 3 in CA2ST."""
    layers: tuple[int, ...] | None = None
    """Exactly these layers carry it, 1 = first; None: as `last_layers` says."""
    directions: Literal["both", "from_audio", "to_audio"] = "both"
    """`from_audio` (A2S, A2T) updates the visual expert only, `to_audio` (S2A, T2A) the audio expert only."""
    positions: Positions = "time_codes"
    """Position codes added to queries and keys: codes of the time intervals (published), learned tables, or none."""

    def __post_init__(self) -> None:
        _check_layers("audio", self.last_layers, self.layers)
        check_literals(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Structure of a model; sizes of the clip and the label spaces come separately."""

    kind: ModelKind = "ca2st"
    """`cast` = spatial + temporal, `cava` = audio + spatial, `ca2st` = all three; or one expert alone."""
    spatial_encoder: SpatialEncoder = "clip"
    """What the spatial expert is. Published: clip (ablations videomae, resnet50, whose four stages run in layers
    3, 6, 9 and 12 of 12)."""
    temporal_encoder: TemporalEncoder = "videomae"
    """What the temporal expert is. Published: videomae (ablation clip)."""
    fusion: Fusion = "cross_attention"
    """How experts are joined: bottleneck cross-attention (published), or a baseline: `lateral` adds a Linear of the
    other expert's tokens in the same layers, `late_add` and `late_concat` join the pooled features only, `independent`
    gives the verb to the temporal and the noun to the spatial expert."""
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
    combination: Literal["sequential", "parallel"] = "sequential"
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
    resnet_grouping: Literal["reference", "square"] = "reference"
    """Which four tokens of the temporal expert a place of ResNet's coarsest map meets in T2S: four neighbours in a row
    (`reference`), or the 2 x 2 `square` that lies under it."""
    pretrained_num_frames: int | None = None
    """Frames that VideoMAE's position table was made for; None: the clip's. Another number is interpolated in time."""
    pretrained_crop_size: int | None = None
    """Pixels that the position tables of CLIP and VideoMAE were made for; None: the clip's. Another size is
    interpolated."""
    head_init_scale: float = 1.0
    """Factor on the initial weights of the classifiers. Published: 1."""

    def __post_init__(self) -> None:
        check_literals(self)
        frames, crop = self.pretrained_num_frames, self.pretrained_crop_size
        if frames is not None and (frames < 2 or frames % 2):
            raise UserInputError(f"pretrained_num_frames: expected an even number >= 2, found {frames}")
        if crop is not None and (crop < self.patch_size or crop % self.patch_size):
            raise UserInputError(f"pretrained_crop_size: expected a multiple of {self.patch_size}, found {crop}")
        for name in ("dim", "depth", "num_heads", "patch_size", "audio_stride"):
            if getattr(self, name) < 1:
                raise UserInputError(f"{name}: expected at least 1, found {getattr(self, name)}")
        if not (math.isfinite(self.head_init_scale) and self.head_init_scale >= 0):
            raise UserInputError(f"head_init_scale: expected a finite number >= 0, found {self.head_init_scale}")
        _check_width("dim", self.dim, self.num_heads)
        if not 0 <= self.drop_path_rate < 1:
            raise UserInputError(f"drop_path_rate: expected 0 <= rate < 1, found {self.drop_path_rate}")
        _check_width("dim * bottleneck_ratio", self.dim * self.bottleneck_ratio, self.num_heads)
        _check_width("dim * adapter_ratio", self.dim * self.adapter_ratio, 1)
        self._check_encoders()

    def _check_encoders(self) -> None:
        with_stages = {layer + 1 for layer in stage_of_layer(self.depth)}
        for name in ("spatial_temporal", "audio_spatial", "audio_temporal"):
            layers = set(getattr(self, name).layers or ())
            if layers and max(layers) > self.depth:
                raise UserInputError(f"{name}.layers: expected layers 1..{self.depth}, found {max(layers)}")
            if self.spatial_encoder == "resnet50" and "spatial" in name and layers - with_stages:
                raise UserInputError(
                    f"{name}.layers: expected layers in which a stage of ResNet-50 runs ({sorted(with_stages)}), "
                    f"found {sorted(layers - with_stages)}"
                )
        if self.spatial_encoder == "resnet50" and (self.depth % 4 or self.patch_size != 16):
            raise UserInputError(
                "spatial_encoder resnet50: expected a depth that its four stages divide and patches of 16 pixels, "
                f"found depth {self.depth} and patch_size {self.patch_size}"
            )
        if self.fusion == "independent" and self.kind != "cast":
            raise UserInputError(
                f"fusion independent: expected kind cast (noun from space, verb from time), found {self.kind}; "
                "train the experts alone instead: kind spatial, temporal or audio"
            )

    @property
    def adapter_dim(self) -> int:
        """Return the width of an adapter: 192 at ViT-B."""
        return int(self.dim * self.adapter_ratio)

    @property
    def bottleneck_dim(self) -> int:
        """Return the width d of the bottleneck: 384 at ViT-B."""
        return int(self.dim * self.bottleneck_ratio)


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
    if config.spatial_encoder == "resnet50" and clip.crop_size % (2 * patch):
        raise UserInputError(
            f"crop_size: expected a multiple of {2 * patch}, the coarsest map of ResNet-50, found {clip.crop_size}"
        )
    for name in ("mel_rows", "num_mel_bins"):
        if getattr(clip, name) < patch:
            raise UserInputError(f"{name}: expected at least one patch of {patch}, found {getattr(clip, name)}")


def check_targets(targets: Sequence[TargetSpec]) -> None:
    """Raise UserInputError for an empty list of targets or one that names a target twice."""
    names = [target.name for target in targets]
    if not names or len(set(names)) != len(names):
        raise UserInputError(f"targets: expected at least one, each with its own name, found {names}")


ExpertName = str
"""`spatial`, `temporal`, `audio`: the place of an expert in the model, whatever encoder fills it."""
BridgeName = str
"""`spatial_temporal`, `audio_spatial`, `audio_temporal`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Direction:
    """One direction of a bottleneck cross-attention."""

    name: str
    """`t2s`, `s2t`, `a2s`, `s2a`, `a2t`, `t2a`."""
    keys: ExpertName
    """The expert whose tokens are read."""
    queries: ExpertName
    """The expert that reads and is updated."""
    window: Window
    """Which keys a query sees."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Bridge:
    """An exchange between two experts in one layer."""

    name: BridgeName
    """S&T, A&S or A&T."""
    directions: tuple[Direction, ...]
    """Both directions, or the one that the configuration keeps."""
    positions: Positions
    """Where the position codes come from."""

    @property
    def experts(self) -> tuple[ExpertName, ExpertName]:
        """Return the two experts."""
        first = self.directions[0]
        return first.queries, first.keys

    @property
    def updated(self) -> frozenset[ExpertName]:
        """Return the experts that this bridge writes to."""
        return frozenset(direction.queries for direction in self.directions)


EXPERTS: dict[ModelKind, tuple[ExpertName, ...]] = {
    "cast": ("spatial", "temporal"),
    "cava": ("spatial", "audio"),
    "ca2st": ("spatial", "temporal", "audio"),
    "spatial": ("spatial",),
    "temporal": ("temporal",),
    "audio": ("audio",),
}
BRIDGES: dict[ModelKind, tuple[BridgeName, ...]] = {
    "cast": ("spatial_temporal",),
    "cava": ("audio_spatial",),
    "ca2st": ("spatial_temporal", "audio_spatial", "audio_temporal"),
    "spatial": (),
    "temporal": (),
    "audio": (),
}
"""In the order of the sequential combination."""
RESNET_STAGES = 4


def encoder_of(config: ModelConfig, expert: ExpertName) -> EncoderName:
    """Return the encoder that fills the place of an expert."""
    encoders: dict[ExpertName, EncoderName] = {
        "spatial": config.spatial_encoder,
        "temporal": config.temporal_encoder,
        "audio": "ast",
    }
    return encoders[expert]


def stage_of_layer(depth: int) -> Mapping[int, int]:
    """Return, by layer (0 = first), the ResNet stage that runs in it: the last of each quarter of the layers."""
    return {depth * (stage + 1) // RESNET_STAGES - 1: stage for stage in range(RESNET_STAGES)}


def bridges_of_layer(config: ModelConfig, layer: int) -> tuple[Bridge, ...]:
    """Return the exchanges of layer `layer` (0 = first), in the order of the sequential combination."""
    if config.fusion not in ("cross_attention", "lateral"):
        return ()
    return tuple(_bridge(config, name) for name in BRIDGES[config.kind] if layer in _layers_of(config, name))


def all_bridges(config: ModelConfig) -> tuple[Bridge, ...]:
    """Return every bridge that at least one layer carries."""
    names = {bridge.name for layer in range(config.depth) for bridge in bridges_of_layer(config, layer)}
    return tuple(_bridge(config, name) for name in BRIDGES[config.kind] if name in names)


def uses_time_codes(config: ModelConfig) -> bool:
    """Return whether any bridge reads time-interval codes."""
    return config.fusion == "cross_attention" and any(
        bridge.positions == "time_codes" for bridge in all_bridges(config)
    )


def _layers_of(config: ModelConfig, name: BridgeName) -> set[int]:
    settings = getattr(config, name)
    if settings.layers is not None:
        layers = {layer - 1 for layer in settings.layers}
    else:
        wanted = settings.last_layers
        if wanted == "published":
            wanted = 3 if config.kind == "ca2st" and name != "spatial_temporal" else "all"
        first = 0 if wanted == "all" else max(config.depth - wanted, 0)
        layers = set(range(first, config.depth))
    if "spatial" in name and config.spatial_encoder == "resnet50":
        layers &= stage_of_layer(config.depth).keys()
    return layers


def _bridge(config: ModelConfig, name: BridgeName) -> Bridge:
    settings: SpatialTemporalConfig | AudioVisualConfig = getattr(config, name)
    if isinstance(settings, SpatialTemporalConfig):
        by_setting = {
            "t2s": Direction(name="t2s", keys="temporal", queries="spatial", window=settings.t2s_window),
            "s2t": Direction(name="s2t", keys="spatial", queries="temporal", window=settings.s2t_window),
        }
    else:
        visual = name.removeprefix("audio_")
        letter = visual[0]
        by_setting = {
            "from_audio": Direction(name=f"a2{letter}", keys="audio", queries=visual, window="space_time"),
            "to_audio": Direction(name=f"{letter}2a", keys=visual, queries="audio", window="space_time"),
        }
    kept = tuple(direction for setting, direction in by_setting.items() if settings.directions in ("both", setting))
    return Bridge(name=name, directions=kept, positions=settings.positions)


def _check_layers(name: str, last_layers: LastLayers, layers: tuple[int, ...] | None) -> None:
    if last_layers not in ("published", "all") and not (isinstance(last_layers, int) and last_layers >= 0):
        raise UserInputError(
            f"{name}.last_layers: expected a number of layers >= 0, 'all' or 'published', found {last_layers!r}"
        )
    if layers is not None and (not layers or min(layers) < 1 or len(set(layers)) != len(layers)):
        raise UserInputError(f"{name}.layers: expected different layers from 1 on, found {list(layers)}")
    if layers is not None and last_layers != "published":
        raise UserInputError(f"{name}: expected either layers or last_layers, found both")


def _check_width(name: str, value: int | float, divisor: int) -> None:
    if value < 1 or value % divisor:
        what = "a whole number" if divisor == 1 else f"a multiple of num_heads ({divisor})"
        raise UserInputError(f"{name}: expected {what}, at least {divisor}, found {value:g}")


SizeName = Literal["vit_s", "vit_b", "vit_l"]
SIZES: dict[SizeName, dict[str, int]] = {
    "vit_s": {"dim": 384, "depth": 12, "num_heads": 6},
    "vit_b": {"dim": 768, "depth": 12, "num_heads": 12},
    "vit_l": {"dim": 1024, "depth": 24, "num_heads": 16},
}
"""Widths, depths and heads of the usual vision transformers; the published models are ViT-B."""


@dataclass(frozen=True, slots=True)
class Preset:
    """A configuration, and what it is in a few words."""

    config: ModelConfig
    says: str
    published_top1: float | None = None
    """EPIC-KITCHENS-100 action top-1 in percent that the paper gives for it, or None. The ablations' own default run
    has 48.7 (layer-wise decay 0.8, accumulation 2), the main table 49.3."""


def find_preset(name: str) -> Preset:
    """Return the preset of this name.

    Raises:
        UserInputError: there is none; the message names the nearest.
    """
    check_choice("preset", name, PRESETS)
    return PRESETS[name]


_published = partial(ModelConfig, drop_path_rate=0.2)
_cast = partial(_published, kind="cast")
_ca2st = partial(_published, kind="ca2st")


def _cast_bca(**changes: Any) -> ModelConfig:
    return _cast(spatial_temporal=SpatialTemporalConfig(**changes))


PRESETS: dict[str, Preset] = {
    "cast": Preset(_cast(), "CAST as published: CLIP and VideoMAE", 49.3),
    "cava": Preset(_published(kind="cava"), "CAVA as published: AST and CLIP"),
    "ca2st": Preset(_ca2st(), "CA2ST as published: CLIP, VideoMAE and AST"),
    "cast_resnet50": Preset(_cast(spatial_encoder="resnet50"), "ResNet-50 as spatial expert", 43.8),
    "spatial": Preset(_published(kind="spatial"), "CLIP alone with adapters"),
    "temporal": Preset(_published(kind="temporal"), "VideoMAE alone with adapters"),
    "audio": Preset(_published(kind="audio"), "AST alone with adapters"),
    "cast_s2t_only": Preset(_cast_bca(directions="s2t"), "S2T alone", 43.7),
    "cast_t2s_only": Preset(_cast_bca(directions="t2s"), "T2S alone", 46.7),
    "cast_ratio_1_8": Preset(_cast(bottleneck_ratio=1 / 8), "bottleneck D/8", 47.4),
    "cast_ratio_1_4": Preset(_cast(bottleneck_ratio=1 / 4), "bottleneck D/4", 47.4),
    "cast_ratio_1_2": Preset(_cast(bottleneck_ratio=1 / 2), "bottleneck D/2", 48.7),
    "cast_ratio_1": Preset(_cast(bottleneck_ratio=1.0), "no bottleneck, D", 48.6),
    "cast_windows_space_time": Preset(
        _cast_bca(t2s_window="space_time", s2t_window="space_time"), "space-time windows in both directions", 47.2
    ),
    "cast_windows_time_space": Preset(
        _cast_bca(t2s_window="time", s2t_window="space"), "T2S in time, S2T in space", 48.7
    ),
    "cast_layers_10_12": Preset(_cast_bca(last_layers=3), "B-CA in layers 10-12", 47.4),
    "cast_layers_7_12": Preset(_cast_bca(last_layers=6), "B-CA in layers 7-12", 47.9),
    "cast_layers_4_12": Preset(_cast_bca(last_layers=9), "B-CA in layers 4-12", 48.2),
    "cast_layers_1_12": Preset(_cast_bca(last_layers="all"), "B-CA in all layers", 48.7),
    "cast_no_positions": Preset(_cast_bca(positions="none"), "no position codes", 47.5),
    "cast_clip_clip": Preset(_cast(temporal_encoder="clip"), "CLIP and CLIP", 46.0),
    "cast_videomae_clip": Preset(
        _cast(spatial_encoder="videomae", temporal_encoder="clip"), "roles swapped: VideoMAE and CLIP"
    ),
    "cast_videomae_videomae": Preset(_cast(spatial_encoder="videomae"), "VideoMAE and VideoMAE", 40.3),
    "cast_identity": Preset(
        _cast(fusion="independent"), "experts with adapters and no exchange (also: independent adapters)", 41.7
    ),
    "cast_independent": Preset(_cast(fusion="independent", adapters=False), "independent experts without adapters"),
    "cast_late_add": Preset(_cast(fusion="late_add"), "features added", 44.2),
    "cast_late_concat": Preset(_cast(fusion="late_concat"), "features side by side", 44.5),
    "cast_lateral": Preset(_cast(fusion="lateral"), "lateral connections in all layers"),
    "ca2st_parallel": Preset(_ca2st(combination="parallel"), "B-CAs of a layer side by side"),
    "ca2st_aligned_time_codes": Preset(
        _ca2st(time_code_layout="aligned"), "each spectrogram patch with its own time code"
    ),
    "ca2st_separate_bottlenecks": Preset(_ca2st(shared_bottleneck=False), "each B-CA with its own down and up"),
    "ca2st_late_add": Preset(_ca2st(fusion="late_add"), "features of all three added"),
    "ca2st_late_concat": Preset(_ca2st(fusion="late_concat"), "features of all three side by side"),
}
"""By name. `cast_identity` stands for two published rows with one figure, "identity" and "independent adapters": B-CA
replaced by the identity is what experts with adapters and no exchange are."""
