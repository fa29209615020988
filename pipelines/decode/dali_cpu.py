"""The DALI backends on a CPU: single frames, and video members.

The DALI backend for single frames: one graph from JPEG bytes to finished views, spread over DALI's own threads.

Frames come in through external sources, each as a single image, with the box of its clip::

    jpeg ──> image_slice(box) ──> resize ──> uint8 HWC         one view a clip: only the box is decoded
    jpeg ──> image ──┬─> slice(box 0) ──> resize               several views: decoded once
                     └─> slice(box 1) ──> resize

A flip is made by the copy out of DALI's memory. RandAugment and erasing follow on the finished views
(pipelines/decode/dali_engine.py), to the byte as the reference has them. There is no randomness in the graph: boxes are
data.

The DALI backend for video members: one graph from the bytes of a file to finished views.

::

    member ──┐
    frames ──┴─> decoders.video ──┬─> slice(box 0) ──> resize ──> flip ──> uint8 THWC
                                  └─> slice(box 1) ──> resize ──> flip

DALI's CPU decoder takes VP9 and no other codec that shards are stored in; on a GPU it takes all of them
(pipelines/decode/dali_gpu.py). It decodes from the key frame before each wanted frame, and takes every video for
BT.601 in limited range, whatever its tags say: so that is how shards are stored (`sharding.media.codecs`). Pixels
decoded on the CPU equal the reference's bit for bit; RandAugment and erasing follow on the finished views.
"""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.utils.dlpack
from einops import rearrange
from jaxtyping import UInt8
from torch import Tensor

from ca2st.errors import CA2STError, UserInputError
from pipelines.decode.dali_engine import (
    Fed,
    GraphBackend,
    OnCpu,
    box_sources,
    crops_resized,
    fed_boxes,
    fed_flips,
    fn,
    region,
    resized,
)
from pipelines.decode.dali_engine import types as dali_types
from pipelines.rendering import RenderRequest, VideoMember
from pipelines.stats import StatsRecorder


class DaliBackend(GraphBackend):
    """Single frames on the CPU."""

    def __init__(
        self, *, num_frames: int, crop_size: int, views_per_clip: int, threads: int, stats: StatsRecorder
    ) -> None:
        graph = FrameGraph(num_frames=num_frames, crop_size=crop_size, views_per_clip=views_per_clip)
        super().__init__(graph, name="dali", num_frames=num_frames, threads=threads, stats=stats, place=OnCpu())


class FrameGraph:
    """`ClipGraph` of JPEG frames, decoded on the CPU."""

    oracle = "Pillow"

    def __init__(self, *, num_frames: int, crop_size: int, views_per_clip: int) -> None:
        self.samples_per_clip = num_frames
        self._crop_size, self._views = crop_size, views_per_clip

    def operators(self) -> list[Any]:
        """See `ClipGraph.operators`."""
        jpegs, boxes = jpeg_source(), box_sources(self._views)
        if self._views > 1:
            images = fn.decoders.image(jpegs, device="cpu", output_type=dali_types.RGB)
            return crops_resized(images, boxes, self._crop_size)
        crop = fn.decoders.image_slice(jpegs, **region(boxes[0]), device="cpu", output_type=dali_types.RGB)
        return [resized(crop, self._crop_size)]

    def fed(self, requests: Sequence[RenderRequest]) -> Fed:
        """See `ClipGraph.fed`."""
        return fed_jpegs(requests) | fed_boxes(requests, views_per_clip=self._views, times=self.samples_per_clip)

    def views(
        self, outputs: Sequence[Any], requests: Sequence[RenderRequest]
    ) -> UInt8[Tensor, "views 3 time height width"]:
        """One copy, in the order of the batch, by NumPy.

        It turns pixels into planes four times as fast as torch, and mirrors on the way for nothing.
        """
        views = [
            rearrange(np.asarray(output.as_tensor()), "(clip t) h w c -> clip c t h w", t=self.samples_per_clip)
            for output in outputs
        ]
        ordered = np.empty((len(requests), self._views, *views[0].shape[1:]), np.uint8)
        for number, view in enumerate(views):
            for clip, request in enumerate(requests):
                ordered[clip, number] = view[clip, ..., ::-1] if request.flip else view[clip]
        return torch.from_numpy(rearrange(ordered, "clip view c t h w -> (clip view) c t h w"))


def jpeg_source() -> Any:
    """External source of JPEGs."""
    return fn.external_source(name="jpegs", dtype=dali_types.UINT8, ndim=1)


def fed_jpegs(requests: Sequence[RenderRequest]) -> Fed:
    """The frames of the requests, clip by clip.

    Raises:
        UserInputError: a clip is stored as a video.
    """
    return {"jpegs": [np.frombuffer(data, np.uint8) for request in requests for data in _jpegs(request)]}


def _jpegs(request: RenderRequest) -> tuple[bytes, ...]:
    if isinstance(request.frames, VideoMember):
        raise UserInputError(
            f"{request.where}: expected JPEG frames, found codec {request.frames.codec!r}, which the graph for frames "
            "does not decode; use backend 'reference', or convert the set with --codec mjpeg"
        )
    return request.frames.frames


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
