"""AST: a distilled DeiT with overlapping patches, on the log-mel spectrogram. The audio expert."""

import torch
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor, nn

from ca2st.model.config import ModelConfig
from ca2st.model.experts.expert import ClipInputs, Flavour, TransformerExpert
from ca2st.model.initial import new_table, start_patch_embedding
from ca2st.model.tokens import NUM_AUDIO_PREFIX, spectrogram_grid
from ca2st.spec import ClipSpec

_EPS = 1e-6


class ASTExpert(TransformerExpert):
    """cls and distillation token, then F' x T' patches of 16 x 16 with stride 10, row-major (frequency, then time)."""

    drops_attended = True

    def __init__(self, config: ModelConfig, clip: ClipSpec) -> None:
        grid = spectrogram_grid(config, clip)
        super().__init__(config, grid, Flavour(activation="gelu", bias="qkv", eps=_EPS))
        self.patch_embed = nn.Conv2d(1, config.dim, kernel_size=config.patch_size, stride=config.audio_stride)
        start_patch_embedding(self.patch_embed)
        self.class_token = new_table(config.dim)
        self.distillation_token = new_table(config.dim)
        self.positions = new_table(grid.num_tokens, config.dim)
        self.norm = nn.LayerNorm(config.dim, eps=_EPS)

    def embed(self, inputs: ClipInputs) -> Float[Tensor, "batch sequences tokens dim"]:
        """Prefix tokens and spectrogram patches, plus positions."""
        image = rearrange(inputs.mel, "b rows bins -> b 1 bins rows")
        patches = rearrange(self.patch_embed(image), "b d f t -> b 1 (f t) d")
        prefix = torch.stack((self.class_token, self.distillation_token))
        tokens: Tensor = torch.cat((repeat(prefix, "n d -> b 1 n d", b=patches.shape[0]), patches), dim=2)
        return tokens + self.positions

    def pool(self, tokens: Float[Tensor, "batch sequences tokens dim"]) -> Float[Tensor, "batch dim"]:
        """Mean of the cls and the distillation token after the final norm."""
        feature: Tensor = self.norm(tokens[:, 0, :NUM_AUDIO_PREFIX]).mean(dim=1)
        return feature
