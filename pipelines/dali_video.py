"""The DALI backend for video members: one graph from the bytes of a file to finished views.

::

    member ──┐
    frames ──┴─> decoders.video ──┬─> slice(box 0) ──> resize ──> flip ──> uint8 THWC
                                  └─> slice(box 1) ──> resize ──> flip

DALI's CPU decoder takes VP9 and no other codec that shards are stored in; on a GPU it takes all of them
(pipelines/dali_gpu.py). It decodes from the key frame before each wanted frame, and takes every video for BT.601 in
limited range, whatever its tags say: so that is how shards are stored (`sharding.codecs`). Pixels decoded on the CPU
equal the reference's bit for bit; RandAugment and erasing follow on the finished views.
"""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.utils.dlpack
from einops import rearrange
from jaxtyping import UInt8
from torch import Tensor

from ca2st.errors import CA2STError
from pipelines.dali_engine import Fed, GraphBackend, OnCpu, box_sources, crops_resized, fed_boxes, fed_flips, fn
from pipelines.dali_engine import types as dali_types
from pipelines.rendering import RenderRequest, VideoMember
from pipelines.stats import StatsRecorder

Decoder = Literal["cpu", "mixed"]
"""DALI's words: on the CPU, or by a GPU's video engines."""


class DaliVideoBackend(GraphBackend):
    """Videos on the CPU."""

    def __init__(
        self, *, num_frames: int, crop_size: int, views_per_clip: int, threads: int, stats: StatsRecorder
    ) -> None:
        graph = VideoGraph(crop_size=crop_size, views_per_clip=views_per_clip, decoder="cpu")
        super().__init__(graph, name="dali", num_frames=num_frames, threads=threads, stats=stats, place=OnCpu())


class VideoGraph:
    """`ClipGraph` of video members; what follows the decoder runs where the decoder leaves its pictures."""

    oracle = "FFmpeg"
    samples_per_clip = 1

    def __init__(self, *, crop_size: int, views_per_clip: int, decoder: Decoder) -> None:
        self._crop_size, self._views, self._decoder = crop_size, views_per_clip, decoder

    def operators(self) -> list[Any]:
        """See `ClipGraph.operators`."""
        videos = fn.external_source(name="videos", dtype=dali_types.UINT8, ndim=1)
        frames = fn.external_source(name="frames", dtype=dali_types.INT32, ndim=1)
        flips = flip_source()
        # A frame that is not there is an error; by default it would be black.
        decoded = fn.decoders.video(videos, frames=frames, device=self._decoder, pad_mode="none")
        crops = crops_resized(decoded, box_sources(self._views), self._crop_size)
        return [fn.flip(crop, horizontal=flips, vertical=0) for crop in crops]

    def fed(self, requests: Sequence[RenderRequest]) -> Fed:
        """See `ClipGraph.fed`."""
        members = [_member(request) for request in requests]
        return {
            "videos": [np.frombuffer(member.data, np.uint8) for member in members],
            "frames": [np.array(member.frame_indices, np.int32) for member in members],
            **fed_flips(requests, times=1),
            **fed_boxes(requests, views_per_clip=self._views, times=1),
        }

    def views(
        self,
        outputs: Sequence[Any],
        requests: Sequence[RenderRequest],  # noqa: ARG002 - the graph flips
    ) -> UInt8[Tensor, "views 3 time height width"]:
        """One copy, in the order of the batch, on the device that the outputs are on."""
        return in_batch_order([as_torch(output) for output in outputs])


def flip_source() -> Any:
    """External source of what is mirrored."""
    return fn.external_source(name="flips", dtype=dali_types.INT32, ndim=0)


def as_torch(output: Any) -> UInt8[Tensor, "samples *shape"]:
    """An output of DALI's as a tensor on its device, in order with the current stream there: the same memory."""
    tensor: Tensor = torch.utils.dlpack.from_dlpack(output.as_tensor())
    return tensor


def in_batch_order(
    views: Sequence[UInt8[Tensor, "clip time height width 3"]],
) -> UInt8[Tensor, "views 3 time height width"]:
    """Clip by clip, a clip's views in order, as contiguous memory of torch's."""
    of_clip = views[0].unsqueeze(1) if len(views) == 1 else torch.stack([*views], dim=1)
    return rearrange(of_clip, "clip view t h w c -> (clip view) c t h w").contiguous()


def _member(request: RenderRequest) -> VideoMember:
    if not isinstance(request.frames, VideoMember):
        raise CA2STError(f"{request.where}: expected a video, found single frames; this backend renders videos")
    return request.frames
