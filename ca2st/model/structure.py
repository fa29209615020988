"""Which experts a kind of model has, which pairs of them exchange tokens, and in which layers.

The paper's X2Y always means: keys and values from X, queries from Y; so X2Y updates expert Y.
"""

from dataclasses import dataclass
from typing import Literal

from ca2st.model.config import AudioVisualConfig, ModelConfig, ModelKind, Window

ExpertName = Literal["spatial", "temporal", "audio"]
BridgeName = Literal["spatial_temporal", "audio_spatial", "audio_temporal"]
PositionKind = Literal["learned", "time_codes", "none"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Direction:
    """One direction of a bottleneck cross-attention."""

    name: str
    """`t2s`, `s2t`, `a2s`, `s2a`, `a2t`, `t2a`."""
    keys: ExpertName
    """The expert that is listened to."""
    queries: ExpertName
    """The expert that listens and is updated."""
    window: Window
    """Which keys a query sees."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Bridge:
    """A bottleneck cross-attention between two experts in one layer."""

    name: BridgeName
    """S&T, A&S or A&T."""
    directions: tuple[Direction, ...]
    """Both directions, or the one that the configuration keeps."""
    positions: PositionKind
    """Where the position codes come from."""

    @property
    def experts(self) -> tuple[ExpertName, ExpertName]:
        """The two experts."""
        first = self.directions[0]
        return first.queries, first.keys

    @property
    def updated(self) -> frozenset[ExpertName]:
        """The experts that this bridge writes to."""
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
_CA2ST_AUDIO_LAYERS = 3


def bridges_of_layer(config: ModelConfig, layer: int) -> tuple[Bridge, ...]:
    """The bottleneck cross-attentions of layer `layer` (0 = first), in the order of the sequential combination."""
    return tuple(
        _bridge(config, name) for name in BRIDGES[config.kind] if layer >= config.depth - _num_layers(config, name)
    )


def all_bridges(config: ModelConfig) -> tuple[Bridge, ...]:
    """Every bridge that at least one layer carries (bridges join from the last layer backwards)."""
    return bridges_of_layer(config, config.depth - 1)


def uses_time_codes(config: ModelConfig) -> bool:
    """Whether any bridge reads time-interval codes."""
    return any(bridge.positions == "time_codes" for bridge in all_bridges(config))


def _num_layers(config: ModelConfig, name: BridgeName) -> int:
    wanted = getattr(config, name).last_layers
    if wanted == "published":
        is_audio_of_ca2st = config.kind == "ca2st" and name != "spatial_temporal"
        wanted = _CA2ST_AUDIO_LAYERS if is_audio_of_ca2st else "all"
    return config.depth if wanted == "all" else min(int(wanted), config.depth)


def _bridge(config: ModelConfig, name: BridgeName) -> Bridge:
    if name == "spatial_temporal":
        settings = config.spatial_temporal
        pair = (
            Direction(name="t2s", keys="temporal", queries="spatial", window=settings.t2s_window),
            Direction(name="s2t", keys="spatial", queries="temporal", window=settings.s2t_window),
        )
        kept = tuple(direction for direction in pair if settings.directions in ("both", direction.name))
        return Bridge(name=name, directions=kept, positions=settings.positions)
    if name == "audio_spatial":
        return _audio_bridge(name, "spatial", config.audio_spatial)
    return _audio_bridge(name, "temporal", config.audio_temporal)


def _audio_bridge(name: BridgeName, visual: ExpertName, settings: AudioVisualConfig) -> Bridge:
    letter = visual[0]
    from_audio = Direction(name=f"a2{letter}", keys="audio", queries=visual, window="space_time")
    to_audio = Direction(name=f"{letter}2a", keys=visual, queries="audio", window="space_time")
    kept = {"both": (from_audio, to_audio), "from_audio": (from_audio,), "to_audio": (to_audio,)}
    return Bridge(name=name, directions=kept[settings.directions], positions=settings.positions)
