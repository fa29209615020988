"""Time-interval codes: when a token happens, in seconds, for the cross-attention that involves audio.

Intervals are (start, end) from the first moment of the sample, so video and audio share one clock.
"""

from typing import NamedTuple, cast

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from ca2st.model.config import ModelConfig, TimeCodeLayout
from ca2st.model.initial import new_linear
from ca2st.model.structure import ExpertName, all_bridges
from ca2st.model.tokens import audio_patches
from ca2st.spec import ClipSpec


class TimeCodes(NamedTuple):
    """Codes that are added to the patches of each side."""

    video: Float[Tensor, "batch frames 1 width"]
    """One code a token time, the same for its patches; read by the spatial and the temporal expert."""
    audio: Float[Tensor, "batch 1 patches width"] | None
    """One code a spectrogram patch; None where no exchange with audio reads it."""

    def of(self, expert: ExpertName) -> Tensor:
        """The codes of an expert's patches; every expert but audio keeps the video's time."""
        if expert != "audio":
            return self.video
        assert self.audio is not None
        return self.audio


def part_of_column(column: int, *, num_columns: int, num_parts: int) -> int:
    """Which of `num_parts` equal time intervals a column of spectrogram patches belongs to.

    column // (num_columns // num_parts + 1): the last parts may be short or empty.
    """
    return column // (num_columns // num_parts + 1)


def parts_of_tokens(num_rows: int, num_columns: int, num_parts: int, *, layout: TimeCodeLayout) -> list[int]:
    """The time interval whose code each audio patch carries, in token order (row-major: token = f T' + t).

    `aligned` follows the token's own column t. `reference` lays the codes out column-major, each column's code
    `num_rows` times in a row, so token n carries the code of column n // F'.
    """
    tokens = range(num_rows * num_columns)
    columns = (n // num_rows if layout == "reference" else n % num_columns for n in tokens)
    return [part_of_column(column, num_columns=num_columns, num_parts=num_parts) for column in columns]


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
    return nn.Sequential(
        new_linear(2, width),
        nn.ReLU(),
        new_linear(width, width),
        nn.ReLU(),
        new_linear(width, width),
        nn.ReLU(),
        nn.LayerNorm(width),
    )
