"""Which experts a kind of model has, which pairs of them exchange tokens, and in which layers.

The paper's X2Y always means: keys and values from X, queries from Y; so X2Y updates expert Y.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from ca2st.model.config import AudioVisualConfig, EncoderName, ModelConfig, ModelKind, Positions, Window

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
    """The expert that is listened to."""
    queries: ExpertName
    """The expert that listens and is updated."""
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
RESNET_STAGES = 4
_EXCHANGING = ("cross_attention", "lateral")


def encoder_of(config: ModelConfig, expert: ExpertName) -> EncoderName:
    """What the expert of a role is."""
    encoders: dict[ExpertName, EncoderName] = {
        "spatial": config.spatial_encoder,
        "temporal": config.temporal_encoder,
        "audio": "ast",
    }
    return encoders[expert]


def stage_of_layer(depth: int) -> Mapping[int, int]:
    """Layer (0 = first) -> the ResNet stage that runs in it: stages 1 to 4 in layers 3, 6, 9, 12 of 12, from 1."""
    return {depth * (stage + 1) // RESNET_STAGES - 1: stage for stage in range(RESNET_STAGES)}


def bridges_of_layer(config: ModelConfig, layer: int) -> tuple[Bridge, ...]:
    """The exchanges of layer `layer` (0 = first), in the order of the sequential combination."""
    if config.fusion not in _EXCHANGING:
        return ()
    return tuple(_bridge(config, name) for name in BRIDGES[config.kind] if layer in _layers_of(config, name))


def all_bridges(config: ModelConfig) -> tuple[Bridge, ...]:
    """Every bridge that at least one layer carries."""
    names = {bridge.name for layer in range(config.depth) for bridge in bridges_of_layer(config, layer)}
    return tuple(_bridge(config, name) for name in BRIDGES[config.kind] if name in names)


def uses_time_codes(config: ModelConfig) -> bool:
    """Whether any bridge reads time-interval codes."""
    return config.fusion == "cross_attention" and any(
        bridge.positions == "time_codes" for bridge in all_bridges(config)
    )


def _layers_of(config: ModelConfig, name: BridgeName) -> frozenset[int]:
    settings = getattr(config, name)
    if settings.layers is not None:
        wanted = frozenset(layer - 1 for layer in settings.layers)
    else:
        wanted = frozenset(range(config.depth - _num_last_layers(config, name), config.depth))
    if "spatial" in name and config.spatial_encoder == "resnet50":
        return wanted & frozenset(stage_of_layer(config.depth))
    return wanted


def _num_last_layers(config: ModelConfig, name: BridgeName) -> int:
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
