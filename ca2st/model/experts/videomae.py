"""VideoMAE: a ViT over tubelets, on all frames. The published temporal expert."""

import math

from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from ca2st.model.config import ModelConfig
from ca2st.model.experts.expert import ClipInputs, Flavour, TransformerExpert
from ca2st.model.initial import start_patch_embedding
from ca2st.model.positions import resize_clip_table, sinusoid_table
from ca2st.model.tokens import clip_grid, pretrained_grid, tubelet_grid
from ca2st.spec import ClipSpec

_EPS = 1e-6


class VideoMAEExpert(TransformerExpert):
    """Tubelets of 2 frames x patch x patch, no cls token, fixed positions, no bias on the keys."""

    positions: Float[Tensor, "tokens dim"]

    def __init__(self, config: ModelConfig, clip: ClipSpec) -> None:
        grid = tubelet_grid(config, clip)
        super().__init__(config, grid, Flavour(activation="gelu", bias="qv", eps=_EPS))
        tubelet = (2, config.patch_size, config.patch_size)
        self.patch_embed = nn.Conv3d(3, config.dim, kernel_size=tubelet, stride=tubelet)
        start_patch_embedding(self.patch_embed)
        self.register_buffer("positions", _positions(config, clip), persistent=False)
        self.norm = nn.LayerNorm(config.dim, eps=_EPS)

    def embed(self, inputs: ClipInputs) -> Float[Tensor, "batch sequences tokens dim"]:
        """Tubelets in the order time, row, column, plus positions."""
        patches: Tensor = rearrange(self.patch_embed(inputs.video), "b d t h w -> b 1 (t h w) d")
        return patches + self.positions

    def pool(self, tokens: Float[Tensor, "batch sequences tokens dim"]) -> Float[Tensor, "batch dim"]:
        """LN of the mean of all tokens."""
        feature: Tensor = self.norm(tokens.mean(dim=(1, 2)))
        return feature


def _positions(config: ModelConfig, clip: ClipSpec) -> Float[Tensor, "tokens dim"]:
    """The fixed table of the grid that the encoder was pretrained on, interpolated to the clip's."""
    known, wanted = pretrained_grid(config, clip), clip_grid(config, clip)
    return resize_clip_table(sinusoid_table(math.prod(known), config.dim), from_grid=known, to_grid=wanted)
