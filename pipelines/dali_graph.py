"""The DALI backend for single frames: one graph from JPEG bytes to finished views, spread over DALI's own threads.

Frames come in through external sources, each as a single image, with the box of its clip::

    jpeg ──> image_slice(box) ──> resize ──> uint8 HWC         one view a clip: only the box is decoded
    jpeg ──> image ──┬─> slice(box 0) ──> resize               several views: decoded once
                     └─> slice(box 1) ──> resize

A flip is made by the copy out of DALI's memory. RandAugment and erasing follow on the finished views
(pipelines/augment/finishing.py), to the byte as the reference has them. There is no randomness in the graph: boxes are
data.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import UInt8
from torch import Tensor

from ca2st.errors import UserInputError
from pipelines.dali_engine import Fed, GraphBackend, OnCpu, box_sources, crops_resized, fed_boxes, fn, region, resized
from pipelines.dali_engine import types as dali_types
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
