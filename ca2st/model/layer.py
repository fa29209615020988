"""One layer of the whole model: each expert's attention, then the exchange between experts, then each expert's FFN.

For an expert with tokens X and an adapter pair of its own::

    Y  = X + A + up(GELU(down(A)))        A = MHSA(LN(X))                 serial adapter
    B  = Y + DropPath(B-CA(Y, the other experts' Y))
    X' = B + FFN(LN(B)) + DropPath(0.5 * Adapter(LN(B)))                  parallel adapter

The audio expert alone also drops its first sum: Y = X + DropPath(A + up(GELU(down(A)))).
"""

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ca2st.model.adapter import Adapter
from ca2st.model.bottleneck import Bottleneck, BottleneckCrossAttention
from ca2st.model.config import Fusion, ModelConfig
from ca2st.model.drop_path import drop_path
from ca2st.model.experts import EncoderLayer, Expert
from ca2st.model.lateral import LateralConnection
from ca2st.model.structure import Bridge, BridgeName, ExpertName
from ca2st.model.time_codes import TimeCodes
from ca2st.model.tokens import TokenGrid

_PARALLEL_SCALE = 0.5
EXCHANGES: dict[Fusion, type[BottleneckCrossAttention | LateralConnection]] = {
    "cross_attention": BottleneckCrossAttention,
    "lateral": LateralConnection,
}
"""The ways of fusion that exchange tokens between layers; the others have no bridges."""


class AdaptedHalves(nn.Module):
    """What is added to one expert's frozen layer: the halves before and after the exchange, with their adapters."""

    def __init__(self, config: ModelConfig, expert: Expert, *, drop_path_rate: float) -> None:
        super().__init__()
        self.serial = Adapter(config.dim, config.adapter_dim, skip=True) if config.adapters else None
        self.parallel = Adapter(config.dim, config.adapter_dim) if config.adapters else None
        self.drop_attended = drop_path(drop_path_rate if expert.drops_attended else 0.0)
        self.drop_parallel = drop_path(drop_path_rate)

    def attend(
        self, layer: nn.Module, tokens: Float[Tensor, "batch sequences tokens dim"]
    ) -> Float[Tensor, "batch sequences tokens dim"]:
        """Y from X; `layer` is an `EncoderLayer`."""
        assert isinstance(layer, EncoderLayer)
        attended: Tensor = layer.attention(layer.norm1(tokens))
        if self.serial is not None:
            attended = self.serial(attended)
        residual: Tensor = self.drop_attended(attended)
        return tokens + residual

    def feed_forward(
        self, layer: nn.Module, tokens: Float[Tensor, "batch sequences tokens dim"]
    ) -> Float[Tensor, "batch sequences tokens dim"]:
        """X' from B; `layer` is an `EncoderLayer`."""
        assert isinstance(layer, EncoderLayer)
        normed: Tensor = layer.norm2(tokens)
        out: Tensor = tokens + layer.mlp(normed)
        if self.parallel is not None:
            out = out + self.drop_parallel(_PARALLEL_SCALE * self.parallel(normed))
        return out


class WholeLayer(nn.Module):
    """An expert's layer that has no halves: it runs before the exchange, and nothing is added to it."""

    def attend(
        self, layer: nn.Module, tokens: Float[Tensor, "batch sequences tokens dim"]
    ) -> Float[Tensor, "batch new_sequences new_tokens new_dim"]:
        """The whole layer."""
        out: Tensor = layer(tokens)
        return out

    def feed_forward(
        self,
        layer: nn.Module,  # noqa: ARG002  # as `AdaptedHalves`
        tokens: Float[Tensor, "batch sequences tokens dim"],
    ) -> Float[Tensor, "batch sequences tokens dim"]:
        """Nothing is left to do."""
        return tokens


class HolisticLayer(nn.Module):
    """Layer `index` of all experts together; owns everything that is added, not the experts' own layers."""

    def __init__(
        self, config: ModelConfig, experts: Mapping[ExpertName, Expert], bridges: Sequence[Bridge], *, index: int
    ) -> None:
        super().__init__()
        rate = config.drop_path_rates()[index]
        grids = {name: expert.grid_at(index) for name, expert in experts.items()}
        self.parallel = config.combination == "parallel"
        self.shared_bottleneck = config.shared_bottleneck
        self.adapters = cast(
            "Mapping[ExpertName, AdaptedHalves | WholeLayer]",
            nn.ModuleDict(
                {
                    name: AdaptedHalves(config, expert, drop_path_rate=rate) if expert.adaptable else WholeLayer()
                    for name, expert in experts.items()
                }
            ),
        )
        exchange = EXCHANGES[config.fusion] if bridges else BottleneckCrossAttention
        narrowed = bridges if exchange is BottleneckCrossAttention else ()
        self.bottlenecks = cast("Mapping[str, Bottleneck]", _bottlenecks(config, narrowed, grids))
        self.bridges = cast(
            "Mapping[BridgeName, BottleneckCrossAttention | LateralConnection]",
            nn.ModuleDict({bridge.name: exchange(config, bridge, grids) for bridge in bridges}),
        )
        self.drop_update = drop_path(rate)

    def forward(
        self, tokens: dict[ExpertName, Tensor], layers: dict[ExpertName, nn.Module], codes: TimeCodes | None
    ) -> dict[ExpertName, Tensor]:
        """Tokens of the next layer. `layers` are the experts' own layers of this index."""
        attended = {name: halves.attend(layers[name], tokens[name]) for name, halves in self.adapters.items()}
        exchanged = self._parallel(attended, codes) if self.parallel else self._sequential(attended, codes)
        return {name: halves.feed_forward(layers[name], exchanged[name]) for name, halves in self.adapters.items()}

    def bottlenecks_of(self, bridge: Bridge) -> dict[ExpertName, Bottleneck]:
        """The down/up pairs that the two experts of `bridge` use in this layer; lateral connections have none."""
        names = {name: bottleneck_name(bridge.name, name, shared=self.shared_bottleneck) for name in bridge.experts}
        return {name: self.bottlenecks[pair] for name, pair in names.items() if pair in self.bottlenecks}

    def _sequential(self, tokens: dict[ExpertName, Tensor], codes: TimeCodes | None) -> dict[ExpertName, Tensor]:
        for bridge in self.bridges.values():
            updates = bridge(tokens, self.bottlenecks_of(bridge.bridge), codes)
            tokens = tokens | {name: tokens[name] + self.drop_update(update) for name, update in updates.items()}
        return tokens

    def _parallel(self, tokens: dict[ExpertName, Tensor], codes: TimeCodes | None) -> dict[ExpertName, Tensor]:
        gathered: dict[ExpertName, list[Tensor]] = {}
        for bridge in self.bridges.values():
            for name, update in bridge(tokens, self.bottlenecks_of(bridge.bridge), codes).items():
                gathered.setdefault(name, []).append(update)
        means = {name: torch.stack(updates).mean(dim=0) for name, updates in gathered.items()}
        return tokens | {name: tokens[name] + self.drop_update(mean) for name, mean in means.items()}


def bottleneck_name(bridge: BridgeName, expert: ExpertName, *, shared: bool) -> str:
    """Name of the down/up pair that `expert` uses in `bridge`: one for all its bridges, or one for each."""
    return expert if shared else f"{expert}_in_{bridge}"


def _bottlenecks(
    config: ModelConfig, bridges: Sequence[Bridge], grids: Mapping[ExpertName, TokenGrid]
) -> nn.ModuleDict:
    experts: dict[str, ExpertName] = {}
    widens: dict[str, bool] = {}
    for bridge in bridges:
        for expert in bridge.experts:
            name = bottleneck_name(bridge.name, expert, shared=config.shared_bottleneck)
            experts[name] = expert
            widens[name] = widens.get(name, False) or expert in bridge.updated
    return nn.ModuleDict(
        {
            name: Bottleneck(grids[expert].dim, config.bottleneck_dim, widens=widens[name])
            for name, expert in experts.items()
        }
    )
