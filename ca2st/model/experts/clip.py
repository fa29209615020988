"""CLIP: the visual half of its ViT, on every second frame. The published spatial expert."""

import torch
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor, nn

from ca2st.model.config import ModelConfig
from ca2st.model.experts.expert import ClipInputs, Flavour, TransformerExpert
from ca2st.model.initial import new_table, start_patch_embedding
from ca2st.model.tokens import image_grid
from ca2st.spec import ClipSpec

_EPS = 1e-5
_FINAL_EPS_WITH_AUDIO_ONLY = 1e-6


class ClipExpert(TransformerExpert):
    """Each of the frames 1, 3, 5, ... (the second of each tubelet) is an image of one cls token and its patches."""

    def __init__(self, config: ModelConfig, clip: ClipSpec) -> None:
        grid = image_grid(config, clip)
        super().__init__(config, grid, Flavour(activation="quick_gelu", bias="qkv", eps=_EPS))
        patch = config.patch_size
        self.patch_embed = nn.Conv2d(3, config.dim, kernel_size=patch, stride=patch, bias=False)
        start_patch_embedding(self.patch_embed)
        self.class_token = new_table(config.dim)
        self.positions = new_table(1 + grid.num_patches, config.dim)
        self.norm_pre = nn.LayerNorm(config.dim, eps=_EPS)
        self.norm = nn.LayerNorm(config.dim, eps=_FINAL_EPS_WITH_AUDIO_ONLY if config.kind == "cava" else _EPS)

    def embed(self, inputs: ClipInputs) -> Float[Tensor, "batch sequences tokens dim"]:
        """Patches and cls of each image, positions, norm."""
        images = rearrange(inputs.video[:, :, 1::2], "b c t h w -> (b t) c h w")
        batch = inputs.video.shape[0]
        patches = rearrange(self.patch_embed(images), "(b t) d h w -> b t (h w) d", b=batch)
        cls = repeat(self.class_token, "d -> b t 1 d", b=batch, t=patches.shape[1])
        tokens: Tensor = self.norm_pre(torch.cat((cls, patches), dim=2) + self.positions)
        return tokens

    def pool(self, tokens: Float[Tensor, "batch sequences tokens dim"]) -> Float[Tensor, "batch dim"]:
        """LN of the mean over frames of the cls token."""
        feature: Tensor = self.norm(tokens[:, :, 0].mean(dim=1))
        return feature
