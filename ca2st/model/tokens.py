"""How an expert's tokens are laid out, and the codes of their places: learned and sinusoid tables, codes of time.

A table belongs to a grid. Where an expert was pretrained on another grid than the clip's, its table is interpolated
between the centres of the cells (`align_corners=False`, no smoothing), so a table keeps its place in the picture and
in the clip whatever the grid. A table whose grid stays the same is returned as it is, bit for bit.

Codes of time say when a token happens, for the cross-attention that involves audio: intervals are (start, end) in
seconds from the first moment of the sample, so video and audio share one clock.
"""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple, cast

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import interpolate

from ca2st.errors import UserInputError
from ca2st.model.attention import new_linear, new_table
from ca2st.model.config import ExpertName, ModelConfig, TimeCodeLayout, Window, all_bridges
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
    num_prefix: int
    """cls and distillation tokens at the head of every sequence; they take no part in cross-attention."""
    num_frames: int
    """Token times: T for the visual experts; 1 for the audio expert, whose patches are one global set."""
    num_patches: int
    """Patches of a token time: H' W' for the visual experts, F' T' for the audio expert."""
    dim: int

    @property
    def num_tokens(self) -> int:
        """Return the tokens of one sequence, prefix included."""
        return self.num_prefix + self.num_frames * self.num_patches // self.num_sequences

    def prefix(
        self, tokens: Float[Tensor, "batch sequences tokens dim"]
    ) -> Float[Tensor, "batch sequences prefix dim"]:
        """Return the prefix tokens."""
        return tokens[:, :, : self.num_prefix]

    def split(
        self, tokens: Float[Tensor, "batch sequences tokens dim"]
    ) -> tuple[Float[Tensor, "batch sequences prefix dim"], Float[Tensor, "batch frames patches dim"]]:
        """Return prefix tokens, and patch tokens as a grid of frames x patches."""
        patches = rearrange(tokens[:, :, self.num_prefix :], "b s (t p) d -> b (s t) p d", p=self.num_patches)
        return self.prefix(tokens), patches

    def join(
        self,
        prefix: Float[Tensor, "batch sequences prefix dim"],
        patches: Float[Tensor, "batch frames patches dim"],
    ) -> Float[Tensor, "batch sequences tokens dim"]:
        """Return the inverse of `split`."""
        rows = rearrange(patches, "b (s t) p d -> b s (t p) d", s=self.num_sequences)
        return torch.cat((prefix, rows), dim=2) if self.num_prefix else rows


def audio_patches(config: ModelConfig, clip: ClipSpec) -> tuple[int, int]:
    """Return (F', T'): rows and columns of spectrogram patches; 12 x 39 for 128 bins and 400 rows."""
    return (
        (clip.num_mel_bins - config.patch_size) // config.audio_stride + 1,
        (clip.mel_rows - config.patch_size) // config.audio_stride + 1,
    )


def clip_grid(config: ModelConfig, clip: ClipSpec) -> tuple[int, int, int]:
    """Return (T, H', W') of the visual tokens of a clip: (8, 14, 14) for 16 frames of 224 pixels."""
    side = clip.crop_size // config.patch_size
    return clip.num_frames // 2, side, side


def pretrained_grid(config: ModelConfig, clip: ClipSpec) -> tuple[int, int, int]:
    """Return (T, H', W') that the visual experts' position tables were made for: `config`'s, else the clip's own."""
    frames, crop_size = config.pretrained_num_frames, config.pretrained_crop_size
    known = replace(clip, num_frames=frames or clip.num_frames, crop_size=crop_size or clip.crop_size)
    return clip_grid(config, known)


def sinusoid_table(num_positions: int, dim: int) -> Float[Tensor, "positions dim"]:
    """Return fixed codes over the flattened token index, computed in float64.

    angle = position / 10000^(2 floor(j / 2) / dim); sine at even j, cosine at odd j.
    """
    columns = np.arange(dim)
    angles = np.arange(num_positions)[:, None] / np.power(10000.0, 2 * (columns // 2) / dim)
    table = np.where(columns % 2 == 0, np.sin(angles), np.cos(angles))
    return torch.tensor(table, dtype=torch.float32)


_INTERPOLATION = {1: "linear", 2: "bicubic", 3: "trilinear"}
"""By the number of a grid's axes."""


def resize_table(
    table: Float[Tensor, "positions dim"], *, from_grid: tuple[int, ...], to_grid: tuple[int, ...]
) -> Float[Tensor, "resized dim"]:
    """Return the codes of a grid's cells, the last axis fastest, for another grid of as many axes.

    Grids are (times,), (rows, columns) of a picture, whose learned codes are resized bicubically, or (times, rows,
    columns): (8, 14, 14) is 16 frames of 224 pixels. The result has the type of `table`; the arithmetic is float32.

    Raises:
        UserInputError: `table` is not one of `from_grid`.
    """
    if table.shape[0] != math.prod(from_grid):
        told = " x ".join(str(size) for size in from_grid)
        raise UserInputError(
            f"position table: expected the {math.prod(from_grid)} rows of {told}, found {table.shape[0]}"
        )
    if from_grid == to_grid:
        return table
    cells = rearrange(table.float(), "n d -> 1 d n").view(1, -1, *from_grid)
    resized = interpolate(cells, size=to_grid, mode=_INTERPOLATION[len(from_grid)], align_corners=False)
    return rearrange(resized.flatten(2), "1 d n -> n d").to(table.dtype)


class LearnedPositions(nn.Module):
    """Learned codes of one expert's patches in one direction of B-CA, one table for each axis the window spans.

    Window `time`: T x d; `space`: patches x d; `space_time`: both, added. They start with standard deviation
    (d / heads)^-0.5.
    """

    def __init__(self, grid: TokenGrid, dim: int, num_heads: int, *, window: Window) -> None:
        super().__init__()
        deviation = (dim / num_heads) ** -0.5
        self.time_table = new_table(grid.num_frames, dim, standard_deviation=deviation) if window != "space" else None
        self.space_table = new_table(grid.num_patches, dim, standard_deviation=deviation) if window != "time" else None

    def forward(self, patches: Float[Tensor, "batch frames patches dim"]) -> Float[Tensor, "batch frames patches dim"]:
        """Add the codes."""
        if self.time_table is not None:
            patches = patches + self.time_table[:, None]
        if self.space_table is not None:
            patches = patches + self.space_table
        return patches


class TimeCodes(NamedTuple):
    """Codes that are added to the patches of each side."""

    video: Float[Tensor, "batch frames 1 width"]
    """One code per token time, the same for its patches; read by the spatial and the temporal expert."""
    audio: Float[Tensor, "batch 1 patches width"] | None
    """One code per spectrogram patch; None where no exchange with audio reads it."""

    def of(self, expert: ExpertName) -> Tensor:
        """Return the codes of an expert's patches; every expert but audio keeps the video's time."""
        if expert != "audio":
            return self.video
        assert self.audio is not None
        return self.audio


def parts_of_tokens(num_rows: int, num_columns: int, num_parts: int, *, layout: TimeCodeLayout) -> list[int]:
    """Return the time interval whose code each audio patch carries, in token order (row-major: token = f T' + t).

    The columns are shared out to `num_parts` equal intervals, column // (T' // num_parts + 1): the last ones may be
    short or empty. `aligned` follows the token's own column t. `reference` lays the codes out column-major, each
    column's code F' times in a row, so token n carries the code of column n // F'.
    """
    columns_per_part = num_columns // num_parts + 1
    tokens = range(num_rows * num_columns)
    columns = (n // num_rows if layout == "reference" else n % num_columns for n in tokens)
    return [column // columns_per_part for column in columns]


def cut_interval(interval: Float[Tensor, "batch 2"], num_parts: int) -> Float[Tensor, "batch parts 2"]:
    """Cut (start, end) into equal parts, each a (start, end)."""
    start, end = interval[:, :1], interval[:, 1:]
    shares = torch.arange(num_parts + 1, device=interval.device, dtype=interval.dtype) / num_parts
    edges = start + (end - start) * shares
    return torch.stack((edges[:, :-1], edges[:, 1:]), dim=-1)


class TimeEncoder(nn.Module):
    """The two MLPs, shared by all layers: 2 -> d -> d -> d with ReLU after each Linear, then LayerNorm."""

    audio_parts: Int[Tensor, " patches"]

    def __init__(self, config: ModelConfig, clip: ClipSpec) -> None:
        super().__init__()
        self.video = _interval_mlp(config.bottleneck_dim)
        with_audio = any(b.positions == "time_codes" and "audio" in b.experts for b in all_bridges(config))
        self.audio = _interval_mlp(config.bottleneck_dim) if with_audio else None
        rows, columns = audio_patches(config, clip)
        parts = parts_of_tokens(rows, columns, clip.num_frames // 2, layout=config.time_code_layout)
        self.register_buffer("audio_parts", torch.tensor(parts), persistent=False)

    def forward(self, intervals_seconds: Float[Tensor, "batch intervals 2"]) -> TimeCodes:
        """Row 0 is the spectrogram's interval, the others are those of the video token times."""
        spectrogram, video = intervals_seconds[:, 0], intervals_seconds[:, 1:]
        codes = rearrange(self.video(video), "b t d -> b t 1 d")
        if self.audio is None:
            return TimeCodes(video=codes, audio=None)
        parts = cast("Tensor", self.audio(cut_interval(spectrogram, video.shape[1])))
        return TimeCodes(video=codes, audio=rearrange(parts[:, self.audio_parts], "b n d -> b 1 n d"))


def _interval_mlp(width: int) -> nn.Sequential:
    linears = [module for num_in in (2, width, width) for module in (new_linear(num_in, width), nn.ReLU())]
    return nn.Sequential(*linears, nn.LayerNorm(width))
