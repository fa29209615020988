"""Bottleneck cross-attention (B-CA): how two experts listen to each other.

Between experts l and r, with d = D * bottleneck_ratio::

    l~ = LN(down_l(Y_l))        r~ = LN(down_r(Y_r))
    B-CA_l = up_l(GELU(MHCA(queries from l~, keys and values from r~)))      and its mirror image for r

cls and prefix tokens are neither queries nor keys: their rows of l~ pass through GELU and up_l as they are. Position
codes are added to the patches of both sides after the LN, so values carry them too.
"""

from collections.abc import Mapping
from typing import cast

from jaxtyping import Float
from torch import Tensor, nn

from ca2st.model.attention import CrossAttention, Grouping, new_linear, zero_linear
from ca2st.model.config import ModelConfig, Positions
from ca2st.model.positions import LearnedPositions, TimeCodes
from ca2st.model.structure import Bridge, Direction, ExpertName, encoder_of
from ca2st.model.tokens import TokenGrid

_EPS = 1e-6


class Bottleneck(nn.Module):
    """down (D -> d) and up (d -> D) of one expert; by default all B-CAs of the expert in a layer use the same one."""

    def __init__(self, dim: int, width: int, *, widens: bool) -> None:
        super().__init__()
        self.down = new_linear(dim, width)
        self.activation = nn.GELU()
        self.up = zero_linear(width, dim) if widens else None

    def narrow(
        self, tokens: Float[Tensor, "batch sequences tokens dim"]
    ) -> Float[Tensor, "batch sequences tokens width"]:
        """down: what cross-attention works on."""
        narrowed: Tensor = self.down(tokens)
        return narrowed

    def widen(
        self, tokens: Float[Tensor, "batch sequences tokens width"]
    ) -> Float[Tensor, "batch sequences tokens dim"]:
        """up(GELU(.)): the update of the expert's tokens. Only experts that a bridge updates have it."""
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
        grouping = _grouping(config, direction, grids)
        self.attention = CrossAttention(width, num_heads, window=direction.window, grouping=grouping)
        learned = positions == "learned"
        self.query_positions = _positions(grids[direction.queries], config, direction) if learned else None
        self.key_positions = _positions(grids[direction.keys], config, direction) if learned else None

    def forward(
        self,
        queries: Float[Tensor, "batch query_frames query_patches width"],
        keys: Float[Tensor, "batch key_frames key_patches width"],
        codes: TimeCodes | None,
    ) -> Float[Tensor, "batch query_frames query_patches width"]:
        """What each patch of Y gathers from the patches of X."""
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
        self, tokens: Mapping[ExpertName, Tensor], bottlenecks: Mapping[ExpertName, Bottleneck], codes: TimeCodes | None
    ) -> dict[ExpertName, Tensor]:
        """Updates of the listening experts, to be added to their tokens.

        `tokens` are the experts' Y, `[batch, sequences, tokens, dim]` each; so are the updates.
        """
        narrow = {name: self.norms[name](bottlenecks[name].narrow(tokens[name])) for name in self.bridge.experts}
        split = {name: grid.split(narrow[name]) for name, grid in self.grids.items()}
        updates: dict[ExpertName, Tensor] = {}
        for direction in self.directions.values():
            listener, speaker = direction.direction.queries, direction.direction.keys
            prefix, queries = split[listener]
            attended = direction(queries, split[speaker][1], codes)
            updates[listener] = bottlenecks[listener].widen(self.grids[listener].join(prefix, attended))
        return updates


def _positions(grid: TokenGrid, config: ModelConfig, direction: Direction) -> LearnedPositions:
    return LearnedPositions(grid, config.bottleneck_dim, config.num_heads, window=direction.window)


def _grouping(config: ModelConfig, direction: Direction, grids: Mapping[ExpertName, TokenGrid]) -> Grouping:
    """A finer ResNet map lies over the tokens square by square; for a coarser one the tokens group as configured."""
    sides = (direction.queries, direction.keys)
    finer = max(sides, key=lambda expert: grids[expert].num_patches)
    if encoder_of(config, finer) == "resnet50" or config.resnet_grouping == "square":
        return "square"
    return "raster"
