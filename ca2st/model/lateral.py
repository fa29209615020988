"""Lateral connections: the layer-wise baseline of bottleneck cross-attention, a Linear of the other expert's tokens."""

from collections.abc import Mapping
from typing import cast

from jaxtyping import Float
from torch import Tensor, nn

from ca2st.model.bottleneck import Bottleneck
from ca2st.model.config import ModelConfig
from ca2st.model.initial import zero_linear
from ca2st.model.structure import Bridge, ExpertName
from ca2st.model.time_codes import TimeCodes
from ca2st.model.tokens import TokenGrid


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
        tokens: Mapping[ExpertName, Tensor],
        bottlenecks: Mapping[ExpertName, Bottleneck],  # noqa: ARG002  # as B-CA
        codes: TimeCodes | None,  # noqa: ARG002  # as B-CA
    ) -> dict[ExpertName, Tensor]:
        """Updates of the listening experts, to be added to their tokens `[batch, sequences, tokens, dim]`."""
        split = {name: grid.split(tokens[name]) for name, grid in self.grids.items()}
        updates: dict[ExpertName, Tensor] = {}
        for direction in self.bridge.directions:
            prefix, own = split[direction.queries]
            heard = _matched(split[direction.keys][1], own)
            update = self.directions[direction.name](heard).expand(*own.shape)
            updates[direction.queries] = self.grids[direction.queries].join(prefix.new_zeros(prefix.shape), update)
        return updates


def _matched(
    speaker: Float[Tensor, "batch frames patches dim"], listener: Float[Tensor, "batch own_frames own_patches own_dim"]
) -> Float[Tensor, "batch _ _ dim"]:
    for axis in (1, 2):
        if speaker.shape[axis] != listener.shape[axis]:
            speaker = speaker.mean(dim=axis, keepdim=True)
    return speaker
