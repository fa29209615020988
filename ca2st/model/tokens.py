"""How an expert's tokens are laid out, and the way from there to a grid of frames and patches and back."""

from dataclasses import dataclass, replace

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from ca2st.model.config import ModelConfig
from ca2st.spec import ClipSpec

NUM_AUDIO_PREFIX = 2
"""Tokens of the audio expert before its patches: cls and distillation."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenGrid:
    """Layout of one expert's tokens `[batch, num_sequences, prefix + patches, dim]`.

    An expert attends inside a sequence only: CLIP and ResNet have one sequence for each of their T images, VideoMAE
    and AST have one sequence for the whole clip.
    """

    num_sequences: int
    """Sequences of a clip."""
    num_prefix: int
    """cls and distillation tokens at the head of every sequence; they take no part in cross-attention."""
    num_frames: int
    """Token times: T for the visual experts; 1 for the audio expert, whose patches are one global set."""
    num_patches: int
    """Patches of a token time: H' W' for the visual experts, F' T' for the audio expert."""
    dim: int
    """Width of a token."""

    @property
    def num_tokens(self) -> int:
        """Tokens of one sequence, prefix included."""
        return self.num_prefix + self.num_frames * self.num_patches // self.num_sequences

    def split(
        self, tokens: Float[Tensor, "batch sequences tokens dim"]
    ) -> tuple[Float[Tensor, "batch sequences prefix dim"], Float[Tensor, "batch frames patches dim"]]:
        """Prefix tokens, and patch tokens as a grid of frames x patches."""
        prefix, patches = tokens[:, :, : self.num_prefix], tokens[:, :, self.num_prefix :]
        return prefix, rearrange(patches, "b s (t p) d -> b (s t) p d", p=self.num_patches)

    def join(
        self,
        prefix: Float[Tensor, "batch sequences prefix dim"],
        patches: Float[Tensor, "batch frames patches dim"],
    ) -> Float[Tensor, "batch sequences tokens dim"]:
        """The inverse of `split`."""
        rows = rearrange(patches, "b (s t) p d -> b s (t p) d", s=self.num_sequences)
        return torch.cat((prefix, rows), dim=2) if self.num_prefix else rows


def image_grid(config: ModelConfig, clip: ClipSpec) -> TokenGrid:
    """T = num_frames / 2 images of one cls token and H' W' patches each."""
    frames = clip.num_frames // 2
    return TokenGrid(
        num_sequences=frames, num_prefix=1, num_frames=frames, num_patches=_num_patches(config, clip), dim=config.dim
    )


def tubelet_grid(config: ModelConfig, clip: ClipSpec) -> TokenGrid:
    """One sequence of T tubelet times with H' W' patches each, no cls token."""
    frames = clip.num_frames // 2
    return TokenGrid(
        num_sequences=1, num_prefix=0, num_frames=frames, num_patches=_num_patches(config, clip), dim=config.dim
    )


def spectrogram_grid(config: ModelConfig, clip: ClipSpec) -> TokenGrid:
    """One sequence of cls, distillation and F' T' spectrogram patches, row-major (frequency, then time)."""
    rows, columns = audio_patches(config, clip)
    return TokenGrid(
        num_sequences=1, num_prefix=NUM_AUDIO_PREFIX, num_frames=1, num_patches=rows * columns, dim=config.dim
    )


def map_grid(clip: ClipSpec, *, stride: int, dim: int) -> TokenGrid:
    """T feature maps of a convolutional expert, each crop_size / `stride` on a side."""
    frames = clip.num_frames // 2
    return TokenGrid(
        num_sequences=frames, num_prefix=0, num_frames=frames, num_patches=(clip.crop_size // stride) ** 2, dim=dim
    )


def audio_patches(config: ModelConfig, clip: ClipSpec) -> tuple[int, int]:
    """(F', T'): rows and columns of spectrogram patches; 12 x 39 for 128 bins and 400 rows."""
    return (
        (clip.num_mel_bins - config.patch_size) // config.audio_stride + 1,
        (clip.mel_rows - config.patch_size) // config.audio_stride + 1,
    )


def clip_grid(config: ModelConfig, clip: ClipSpec) -> tuple[int, int, int]:
    """(T, H', W') of the visual tokens of a clip: (8, 14, 14) for 16 frames of 224 pixels."""
    side = clip.crop_size // config.patch_size
    return clip.num_frames // 2, side, side


def pretrained_grid(config: ModelConfig, clip: ClipSpec) -> tuple[int, int, int]:
    """(T, H', W') that the visual experts' position tables were made for; the clip's own unless `config` says so."""
    known = replace(
        clip,
        num_frames=config.pretrained_num_frames or clip.num_frames,
        crop_size=config.pretrained_crop_size or clip.crop_size,
    )
    return clip_grid(config, known)


def _num_patches(config: ModelConfig, clip: ClipSpec) -> int:
    return (clip.crop_size // config.patch_size) ** 2
