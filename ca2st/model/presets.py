"""Configurations by name: the published models, each published row of their ablations, and sizes.

Standard library only, so that recipes can be checked without importing torch. A recipe says `[model] preset = "..."`
and changes what it likes beside it.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

from ca2st.errors import check_choice
from ca2st.model.config import ModelConfig, SpatialTemporalConfig

SizeName = Literal["vit_s", "vit_b", "vit_l"]
SIZES: dict[SizeName, dict[str, int]] = {
    "vit_s": {"dim": 384, "depth": 12, "num_heads": 6},
    "vit_b": {"dim": 768, "depth": 12, "num_heads": 12},
    "vit_l": {"dim": 1024, "depth": 24, "num_heads": 16},
}
"""Widths, depths and heads of the usual vision transformers; the published models are ViT-B."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """One configuration."""

    config: ModelConfig
    """Structure."""
    says: str
    """What it is, in a few words."""
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


def _cast(**changes: Any) -> ModelConfig:
    return replace(ModelConfig(kind="cast", drop_path_rate=0.2), **changes)


def _cast_bca(**changes: Any) -> ModelConfig:
    return _cast(spatial_temporal=SpatialTemporalConfig(**changes))


def _kind(kind: Any, **changes: Any) -> ModelConfig:
    return replace(ModelConfig(kind=kind, drop_path_rate=0.2), **changes)


PRESETS: dict[str, Preset] = {
    "cast": Preset(config=_cast(), says="CAST as published: CLIP and VideoMAE", published_top1=49.3),
    "cava": Preset(config=_kind("cava"), says="CAVA as published: AST and CLIP"),
    "ca2st": Preset(config=_kind("ca2st"), says="CA2ST as published: CLIP, VideoMAE and AST"),
    "cast_resnet50": Preset(
        config=_cast(spatial_encoder="resnet50"), says="ResNet-50 as spatial expert", published_top1=43.8
    ),
    "spatial": Preset(config=_kind("spatial"), says="CLIP alone with adapters"),
    "temporal": Preset(config=_kind("temporal"), says="VideoMAE alone with adapters"),
    "audio": Preset(config=_kind("audio"), says="AST alone with adapters"),
    "cast_s2t_only": Preset(config=_cast_bca(directions="s2t"), says="S2T alone", published_top1=43.7),
    "cast_t2s_only": Preset(config=_cast_bca(directions="t2s"), says="T2S alone", published_top1=46.7),
    "cast_ratio_1_8": Preset(config=_cast(bottleneck_ratio=1 / 8), says="bottleneck D/8", published_top1=47.4),
    "cast_ratio_1_4": Preset(config=_cast(bottleneck_ratio=1 / 4), says="bottleneck D/4", published_top1=47.4),
    "cast_ratio_1_2": Preset(config=_cast(bottleneck_ratio=1 / 2), says="bottleneck D/2", published_top1=48.7),
    "cast_ratio_1": Preset(config=_cast(bottleneck_ratio=1.0), says="no bottleneck, D", published_top1=48.6),
    "cast_windows_space_time": Preset(
        config=_cast_bca(t2s_window="space_time", s2t_window="space_time"),
        says="space-time windows in both directions",
        published_top1=47.2,
    ),
    "cast_windows_time_space": Preset(
        config=_cast_bca(t2s_window="time", s2t_window="space"), says="T2S in time, S2T in space", published_top1=48.7
    ),
    "cast_layers_10_12": Preset(config=_cast_bca(last_layers=3), says="B-CA in layers 10-12", published_top1=47.4),
    "cast_layers_7_12": Preset(config=_cast_bca(last_layers=6), says="B-CA in layers 7-12", published_top1=47.9),
    "cast_layers_4_12": Preset(config=_cast_bca(last_layers=9), says="B-CA in layers 4-12", published_top1=48.2),
    "cast_layers_1_12": Preset(config=_cast_bca(last_layers="all"), says="B-CA in all layers", published_top1=48.7),
    "cast_no_positions": Preset(config=_cast_bca(positions="none"), says="no position codes", published_top1=47.5),
    "cast_clip_clip": Preset(config=_cast(temporal_encoder="clip"), says="CLIP and CLIP", published_top1=46.0),
    "cast_videomae_clip": Preset(
        config=_cast(spatial_encoder="videomae", temporal_encoder="clip"), says="roles swapped: VideoMAE and CLIP"
    ),
    "cast_videomae_videomae": Preset(
        config=_cast(spatial_encoder="videomae"), says="VideoMAE and VideoMAE", published_top1=40.3
    ),
    "cast_identity": Preset(
        config=_cast(fusion="independent"),
        says="experts with adapters and no exchange (also: independent adapters)",
        published_top1=41.7,
    ),
    "cast_independent": Preset(
        config=_cast(fusion="independent", adapters=False), says="independent experts without adapters"
    ),
    "cast_late_add": Preset(config=_cast(fusion="late_add"), says="features added", published_top1=44.2),
    "cast_late_concat": Preset(config=_cast(fusion="late_concat"), says="features side by side", published_top1=44.5),
    "cast_lateral": Preset(config=_cast(fusion="lateral"), says="lateral connections in all layers"),
    "ca2st_parallel": Preset(config=_kind("ca2st", combination="parallel"), says="B-CAs of a layer side by side"),
    "ca2st_aligned_time_codes": Preset(
        config=_kind("ca2st", time_code_layout="aligned"), says="each spectrogram patch with its own time code"
    ),
    "ca2st_separate_bottlenecks": Preset(
        config=_kind("ca2st", shared_bottleneck=False), says="each B-CA with its own down and up"
    ),
    "ca2st_late_add": Preset(config=_kind("ca2st", fusion="late_add"), says="features of all three added"),
    "ca2st_late_concat": Preset(config=_kind("ca2st", fusion="late_concat"), says="features of all three side by side"),
}
"""By name. `cast_identity` stands for two published rows with one figure, "identity" and "independent adapters": B-CA
replaced by the identity is what experts with adapters and no exchange are."""
