"""One layer of the whole model: each expert's attention, then the exchange between experts, then each expert's FFN.

For an expert with tokens X and an adapter pair of its own::

    Y  = X + A + up(GELU(down(A)))        A = MHSA(LN(X))                 serial adapter
    B  = Y + DropPath(B-CA(Y, the other experts' Y))
    X' = B + FFN(LN(B)) + DropPath(0.5 * Adapter(LN(B)))                  parallel adapter

The audio expert alone also drops its first sum: Y = X + DropPath(A + up(GELU(down(A)))).

Bottleneck cross-attention (B-CA) is how two experts l and r exchange tokens, with d = D * bottleneck_ratio::

    l~ = LN(down_l(Y_l))        r~ = LN(down_r(Y_r))
    B-CA_l = up_l(GELU(MHCA(queries from l~, keys and values from r~)))      and its mirror image for r

cls and prefix tokens are neither queries nor keys: their rows of l~ pass through GELU and up_l as they are. Position
codes are added to the patches of both sides after the LN, so values carry them too.
"""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ca2st.model.attention import CrossAttention, new_linear, with_zero_gradients, zero_linear
from ca2st.model.config import Bridge, BridgeName, Direction, ExpertName, ModelConfig, Positions, encoder_of
from ca2st.model.experts import Adapter, EncoderLayer, Expert
from ca2st.model.tokens import LearnedPositions, TimeCodes, TokenGrid

Tokens = dict[ExpertName, Tensor]
"""Tokens of each expert, `[batch, sequences, tokens, dim]`."""
_EPS = 1e-6
_PARALLEL_SCALE = 0.5


class DropPath(nn.Module):
    """In training, set the residual of a clip to zero with probability `rate` and scale the kept ones by 1/(1-rate).

    Draws come from torch's own generator, which the training loop seeds for every micro-batch. The rate is a buffer, so
    that a compiled layer serves all layers instead of being compiled anew for every rate.
    """

    keep: Float[Tensor, ""]

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.register_buffer("keep", torch.tensor(1 - rate, dtype=torch.float32), persistent=False)

    def forward(self, residual: Float[Tensor, "batch *rest"]) -> Float[Tensor, "batch *rest"]:
        """Drop or scale; the identity in evaluation."""
        if not self.training:
            return residual
        shape = (residual.shape[0],) + (1,) * (residual.ndim - 1)
        kept = torch.rand(shape, device=residual.device) < self.keep
        return residual * (kept / self.keep).to(residual.dtype)


def drop_path(rate: float) -> nn.Module:
    """Return a `DropPath`, or the identity at rate 0."""
    return DropPath(rate) if rate > 0 else nn.Identity()


class Bottleneck(nn.Module):
    """down (D -> d) and up (d -> D) of one expert; by default all B-CAs of the expert in a layer use the same one."""

    def __init__(self, dim: int, width: int, *, widens: bool) -> None:
        super().__init__()
        self.down = new_linear(dim, width)
        self.activation = nn.GELU()
        self.up = zero_linear(width, dim) if widens else None

    def widen(
        self, tokens: Float[Tensor, "batch sequences tokens width"]
    ) -> Float[Tensor, "batch sequences tokens dim"]:
        """Apply up(GELU(.)): the update of the expert's tokens. Only experts that a bridge updates have it."""
        assert self.up is not None
        widened: Tensor = self.up(self.activation(tokens))
        return widened


class DirectedAttention(nn.Module):
    """One direction X2Y: position codes on both sides, then MHCA with queries from Y, keys and values from X."""

    def __init__(
        self,
        config: ModelConfig,
        direction: Direction,
        grids: Mapping[ExpertName, TokenGrid],
        *,
        positions: Positions,
    ) -> None:
        super().__init__()
        self.direction = direction
        self.uses_time_codes = positions == "time_codes"
        width, num_heads = config.bottleneck_dim, config.num_heads
        # A finer ResNet map is grouped over the tokens by squares; over a coarser one the tokens are, as configured.
        finer = max((direction.queries, direction.keys), key=lambda expert: grids[expert].num_patches)
        square = encoder_of(config, finer) == "resnet50" or config.resnet_grouping == "square"
        self.attention = CrossAttention(
            width, num_heads, window=direction.window, grouping="square" if square else "raster"
        )
        self.query_positions: LearnedPositions | None = None
        self.key_positions: LearnedPositions | None = None
        if positions == "learned":
            self.query_positions, self.key_positions = (
                LearnedPositions(grids[expert], width, num_heads, window=direction.window)
                for expert in (direction.queries, direction.keys)
            )

    def forward(
        self,
        queries: Float[Tensor, "batch query_frames query_patches width"],
        keys: Float[Tensor, "batch key_frames key_patches width"],
        codes: TimeCodes | None,
    ) -> Float[Tensor, "batch query_frames query_patches width"]:
        """Return what each patch of Y gathers from the patches of X."""
        if self.query_positions is not None and self.key_positions is not None:
            queries, keys = self.query_positions(queries), self.key_positions(keys)
        if self.uses_time_codes:
            assert codes is not None
            queries = queries + codes.of(self.direction.queries)
            keys = keys + codes.of(self.direction.keys)
        attended: Tensor = self.attention(queries, keys)
        return attended


class BottleneckCrossAttention(nn.Module):
    """B-CA between two experts, in both directions or in one."""

    def __init__(self, config: ModelConfig, bridge: Bridge, grids: Mapping[ExpertName, TokenGrid]) -> None:
        super().__init__()
        self.bridge = bridge
        self.grids = {name: grids[name] for name in bridge.experts}
        self.norms = nn.ModuleDict({name: nn.LayerNorm(config.bottleneck_dim, eps=_EPS) for name in bridge.experts})
        self.directions = cast(
            "Mapping[str, DirectedAttention]",
            nn.ModuleDict(
                {
                    direction.name: DirectedAttention(config, direction, grids, positions=bridge.positions)
                    for direction in bridge.directions
                }
            ),
        )

    def forward(
        self,
        tokens: Tokens,
        bottlenecks: Mapping[ExpertName, Bottleneck],
        codes: TimeCodes | None,
        live: Set[str] | None = None,
    ) -> Tokens:
        """Return what is to be added to the listening experts' tokens; `tokens` are the experts' Y.

        The update of a direction that is not `live` (None: all are) is that of the prefix tokens alone.
        """
        directions = self.bridge.directions
        whole = {name for d in directions if live is None or d.name in live for name in (d.queries, d.keys)}
        narrow: Tokens = {}
        for name in whole | self.bridge.updated:
            rows = tokens[name] if name in whole else self.grids[name].prefix(tokens[name])
            narrow[name] = self.norms[name](bottlenecks[name].down(rows))
        updates: Tokens = {}
        for direction in directions:
            listener, speaker = direction.queries, direction.keys
            grid, module = self.grids[listener], self.directions[direction.name]
            if live is None or direction.name in live:
                prefix, queries = grid.split(narrow[listener])
                heard = grid.join(prefix, module(queries, self.grids[speaker].split(narrow[speaker])[1], codes))
            else:
                idle = (module, self.norms[speaker], bottlenecks[speaker])
                unheard = [codes.of(side) for side in (listener, speaker)] if codes and module.uses_time_codes else []
                heard = with_zero_gradients(grid.prefix(narrow[listener]), idle, unheard)
            updates[listener] = bottlenecks[listener].widen(heard)
        return updates


class LateralConnection(nn.Module):
    """Each listening expert adds W(Y) of the speaker's tokens Y; W starts at zero and is D -> D, no bottleneck.

    What the two grids share is matched, patch by patch and frame by frame; along an axis where they differ (audio has
    no frames, a ResNet map other patches) the speaker's mean is added everywhere. cls and prefix tokens get nothing.
    """

    def __init__(self, config: ModelConfig, bridge: Bridge, grids: Mapping[ExpertName, TokenGrid]) -> None:  # noqa: ARG002  # as B-CA
        super().__init__()
        self.bridge = bridge
        self.grids = {name: grids[name] for name in bridge.experts}
        self.directions = cast(
            "Mapping[str, nn.Linear]",
            nn.ModuleDict({d.name: zero_linear(grids[d.keys].dim, grids[d.queries].dim) for d in bridge.directions}),
        )

    def forward(
        self,
        tokens: Tokens,
        bottlenecks: Mapping[ExpertName, Bottleneck],  # noqa: ARG002  # as B-CA
        codes: TimeCodes | None,  # noqa: ARG002  # as B-CA
        live: Set[str] | None = None,
    ) -> Tokens:
        """Return what is to be added to the listening experts' tokens, as `BottleneckCrossAttention`."""
        updates: Tokens = {}
        for direction in self.bridge.directions:
            grid, module = self.grids[direction.queries], self.directions[direction.name]
            nothing = torch.zeros_like(grid.prefix(tokens[direction.queries]))
            if live is None or direction.name in live:
                own = grid.split(tokens[direction.queries])[1]
                heard = _matched(self.grids[direction.keys].split(tokens[direction.keys])[1], own)
                updates[direction.queries] = grid.join(nothing, module(heard).expand(*own.shape))
            else:
                updates[direction.queries] = with_zero_gradients(nothing, (module,))
        return updates


def _matched(
    speaker: Float[Tensor, "batch frames patches dim"], listener: Float[Tensor, "batch own_frames own_patches own_dim"]
) -> Float[Tensor, "batch _ _ dim"]:
    for axis in (1, 2):
        if speaker.shape[axis] != listener.shape[axis]:
            speaker = speaker.mean(dim=axis, keepdim=True)
    return speaker


class AdaptedHalves(nn.Module):
    """What is added to one expert's frozen layer: the halves before and after the exchange, with their adapters."""

    def __init__(self, config: ModelConfig, expert: Expert, *, drop_path_rate: float) -> None:
        super().__init__()
        self.serial = Adapter(config.dim, config.adapter_dim, skip=True) if config.adapters else None
        self.parallel = Adapter(config.dim, config.adapter_dim) if config.adapters else None
        self.drop_attended = drop_path(drop_path_rate if expert.drops_attended else 0.0)
        self.drop_parallel = drop_path(drop_path_rate)

    def attend(
        self, layer: nn.Module, tokens: Float[Tensor, "batch sequences tokens dim"], *, num_rows: int | None = None
    ) -> Float[Tensor, "batch sequences rows dim"]:
        """Return Y from X, or the first `num_rows` of each sequence of it; `layer` is an `EncoderLayer`."""
        assert isinstance(layer, EncoderLayer)
        attended: Tensor = layer.attention(layer.norm1(tokens), num_queries=num_rows)
        if self.serial is not None:
            attended = self.serial(attended)
        residual: Tensor = self.drop_attended(attended)
        return tokens[:, :, :num_rows] + residual

    def feed_forward(
        self, layer: nn.Module, tokens: Float[Tensor, "batch sequences tokens dim"]
    ) -> Float[Tensor, "batch sequences tokens dim"]:
        """Return X' from B; `layer` is an `EncoderLayer`."""
        assert isinstance(layer, EncoderLayer)
        normed: Tensor = layer.norm2(tokens)
        out: Tensor = tokens + layer.mlp(normed)
        if self.parallel is not None:
            out = out + self.drop_parallel(_PARALLEL_SCALE * self.parallel(normed))
        return out


@dataclass(frozen=True, kw_only=True, slots=True)
class Reads:
    """What of a layer is read by anybody."""

    live: frozenset[str] | None = None
    """Names of the directions that reach an output by their listener's patches; None: all."""
    returned: dict[ExpertName, int] = field(default_factory=dict)
    """How many rows at the head of each sequence the layer returns of an expert; those not named return all."""
    attended: dict[ExpertName, int] = field(default_factory=dict)
    """The same for the first half of the layer: fewer rows only where the patches speak in no live direction either."""


class HolisticLayer(nn.Module):
    """Layer `index` of all experts together; owns everything that is added, not the experts' own layers.

    CLIP and AST are pooled over their prefix tokens alone: in the last layer their patches' FFN, parallel adapter and
    the directions that feed nothing but these patches reach no output. They are not computed, unless `whole` is set.
    """

    def __init__(
        self, config: ModelConfig, experts: Mapping[ExpertName, Expert], bridges: Sequence[Bridge], *, index: int
    ) -> None:
        super().__init__()
        rate = config.drop_path_rate * index / max(config.depth - 1, 1)
        grids = {name: expert.grid_at(index) for name, expert in experts.items()}
        self.parallel = config.combination == "parallel"
        self.shared_bottleneck = config.shared_bottleneck
        adaptable = {name: expert for name, expert in experts.items() if expert.adaptable}
        self.adapters = cast(
            "Mapping[ExpertName, AdaptedHalves]",
            nn.ModuleDict({name: AdaptedHalves(config, x, drop_path_rate=rate) for name, x in adaptable.items()}),
        )
        lateral = config.fusion == "lateral"
        exchange: type[BottleneckCrossAttention | LateralConnection] = (
            LateralConnection if lateral else BottleneckCrossAttention
        )
        self.bottlenecks = cast("Mapping[str, Bottleneck]", _bottlenecks(config, () if lateral else bridges, grids))
        self.bridges = cast(
            "Mapping[BridgeName, BottleneckCrossAttention | LateralConnection]",
            nn.ModuleDict({bridge.name: exchange(config, bridge, grids) for bridge in bridges}),
        )
        self.drop_update = drop_path(rate)
        self.whole = False
        self.everything = Reads()
        pooled = {name: grids[name].num_prefix for name, expert in experts.items() if expert.pools_prefix}
        self.needed = _reads(bridges, pooled, parallel=self.parallel) if index == config.depth - 1 else self.everything

    def forward(
        self,
        tokens: Tokens,
        layers: dict[ExpertName, nn.Module],
        codes: TimeCodes | None,
        audio_keys: Bool[Tensor, " batch"] | None = None,
    ) -> Tokens:
        """Return the tokens of the next layer, or those that are pooled. `layers`: the experts' own of this index.

        `audio_keys`: the clips whose sound the visual experts hear; for the others nothing of the audio expert reaches
        them, as if its bridges were not there. None: all.
        """
        reads = self.everything if self.whole else self.needed
        # A layer that has no halves runs whole before the exchange, and nothing is added to it.
        attended = {
            name: self.adapters[name].attend(layer, tokens[name], num_rows=reads.attended.get(name))
            if name in self.adapters
            else layer(tokens[name])
            for name, layer in layers.items()
        }
        exchange = self._parallel if self.parallel else self._sequential
        exchanged = exchange(attended, codes, reads.live, audio_keys)
        read = {name: rows[:, :, : reads.returned.get(name)] for name, rows in exchanged.items()}
        return read | {name: halves.feed_forward(layers[name], read[name]) for name, halves in self.adapters.items()}

    def bottlenecks_of(self, bridge: Bridge) -> dict[ExpertName, Bottleneck]:
        """Return the down/up pairs that the experts of `bridge` use in this layer; lateral connections have none."""
        names = {name: bottleneck_name(bridge.name, name, shared=self.shared_bottleneck) for name in bridge.experts}
        return {name: self.bottlenecks[pair] for name, pair in names.items() if pair in self.bottlenecks}

    def _sequential(
        self, tokens: Tokens, codes: TimeCodes | None, live: Set[str] | None, audio_keys: Tensor | None
    ) -> Tokens:
        for bridge in self.bridges.values():
            updates = bridge(tokens, self.bottlenecks_of(bridge.bridge), codes, live)
            if audio_keys is not None and "audio" in bridge.bridge.experts:
                updates |= {name: only_where(audio_keys, update) for name, update in updates.items() if name != "audio"}
            tokens = tokens | {name: self._updated(tokens[name], update) for name, update in updates.items()}
        return tokens

    def _parallel(
        self, tokens: Tokens, codes: TimeCodes | None, live: Set[str] | None, audio_keys: Tensor | None
    ) -> Tokens:
        gathered: dict[ExpertName, list[Tensor]] = {}
        apart: dict[ExpertName, list[Tensor]] = {}
        """What comes without sound."""
        for bridge in self.bridges.values():
            for name, update in bridge(tokens, self.bottlenecks_of(bridge.bridge), codes, live).items():
                gathered.setdefault(name, []).append(update)
                if name == "audio" or "audio" not in bridge.bridge.experts:
                    apart.setdefault(name, []).append(update)
        means = {name: torch.stack(updates).mean(dim=0) for name, updates in gathered.items()}
        if audio_keys is not None:
            silent = {name: torch.stack(updates).mean(dim=0) for name, updates in apart.items()}
            means = {name: only_where(audio_keys, mean, silent.get(name)) for name, mean in means.items()}
        return tokens | {name: self._updated(tokens[name], mean) for name, mean in means.items()}

    def _updated(self, tokens: Tensor, update: Tensor) -> Tensor:
        """Return tokens + DropPath(update), of the rows that `update` has."""
        added: Tensor = self.drop_update(update)
        return tokens[:, :, : added.shape[2]] + added


def _reads(bridges: Sequence[Bridge], pooled: dict[ExpertName, int], *, parallel: bool) -> Reads:
    """Return what is read when nothing but the first `pooled` rows of these experts is.

    A direction is live if its listener's patches are read or, one bridge after the other, speak in a later live one.
    """
    live: set[str] = set()
    speaking: set[ExpertName] = set()
    for bridge in reversed(bridges):
        later = frozenset() if parallel else frozenset(speaking)
        found = [d for d in bridge.directions if d.queries not in pooled or d.queries in later]
        live.update(direction.name for direction in found)
        speaking.update(direction.keys for direction in found)
    silent = {name: rows for name, rows in pooled.items() if name not in speaking}
    return Reads(live=frozenset(live), returned=pooled, attended=silent)


def only_where(mask: Bool[Tensor, " batch"], value: Tensor, other: Tensor | None = None) -> Tensor:
    """Return `value` of the clips that `mask` is true for, `other` (None: zero) of the rest; nothing is multiplied."""
    return torch.where(mask.view(-1, *[1] * (value.ndim - 1)), value, value.new_zeros(()) if other is None else other)


def bottleneck_name(bridge: BridgeName, expert: ExpertName, *, shared: bool) -> str:
    """Return the name of the down/up pair that `expert` uses in `bridge`: one for all its bridges, or one for each."""
    return expert if shared else f"{expert}_in_{bridge}"


def _bottlenecks(
    config: ModelConfig, bridges: Sequence[Bridge], grids: Mapping[ExpertName, TokenGrid]
) -> nn.ModuleDict:
    experts: dict[str, ExpertName] = {}
    widening: set[str] = set()
    for bridge in bridges:
        for expert in bridge.experts:
            name = bottleneck_name(bridge.name, expert, shared=config.shared_bottleneck)
            experts[name] = expert
            if expert in bridge.updated:
                widening.add(name)
    return nn.ModuleDict(
        {
            name: Bottleneck(grids[expert].dim, config.bottleneck_dim, widens=name in widening)
            for name, expert in experts.items()
        }
    )
