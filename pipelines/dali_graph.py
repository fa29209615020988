"""The DALI backend on the CPU: one graph from JPEG bytes to finished views, spread over DALI's own threads.

Frames come in through external sources, each as a single image, with the box and flip of its clip::

    jpeg ──> image_slice(box) ──> resize ──> flip ──> uint8 HWC         one view a clip: only the box is decoded
    jpeg ──> image ──┬─> slice(box 0) ──> resize ──> flip               several views: decoded once
                     └─> slice(box 1) ──> resize ──> flip

There is no randomness in the graph: boxes and flips are data. This is the only module that imports nvidia.*.
"""

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import nvidia.dali.fn
import nvidia.dali.pipeline
import nvidia.dali.types
import torch
from einops import rearrange
from jaxtyping import UInt8
from torch import Tensor

from ca2st.errors import CA2STError
from pipelines.errors import LoaderClosedError
from pipelines.reference import decode_frames
from pipelines.rendering import RenderRequest
from pipelines.stats import StatsRecorder

# DALI fills its modules at import, which its type stubs do not tell.
fn: Any = nvidia.dali.fn
types: Any = nvidia.dali.types
Pipeline: Any = nvidia.dali.pipeline.Pipeline

_MOST_IMAGES = 256
"""Frames of one DALI run: bounds the decoded pictures that wait for their resize."""


class DaliBackend:
    """Renders clips through one DALI pipeline; calls from several threads take turns."""

    name = "dali"

    def __init__(
        self, *, num_frames: int, crop_size: int, views_per_clip: int, threads: int, stats: StatsRecorder
    ) -> None:
        self._num_frames, self._crop_size, self._views = num_frames, crop_size, views_per_clip
        self._threads, self._stats = threads, stats
        self._clips_per_run = max(1, _MOST_IMAGES // num_frames)
        self._lock = threading.Lock()
        self._pipeline: Any = self._build()

    def render(self, requests: Sequence[RenderRequest]) -> UInt8[Tensor, "views 3 time height width"]:
        """See `ViewBackend.render`."""
        with self._lock, self._stats.timed("decode_seconds"):
            if self._pipeline is None:
                raise LoaderClosedError("backend dali: closed; make a new loader")
            runs = range(0, len(requests), self._clips_per_run)
            parts = [self._run(requests[start : start + self._clips_per_run]) for start in runs]
            return parts[0] if len(parts) == 1 else torch.cat(parts)

    def close(self) -> None:
        """End DALI's threads."""
        with self._lock:
            self._pipeline = None

    def _build(self) -> Any:
        pipeline = Pipeline(
            batch_size=self._clips_per_run * self._num_frames,
            num_threads=self._threads,
            device_id=None,
            prefetch_queue_depth=1,
        )
        with pipeline:
            pipeline.set_outputs(*_graph(self._views, self._crop_size))
        pipeline.build()
        return pipeline

    def _run(self, requests: Sequence[RenderRequest]) -> UInt8[Tensor, "views 3 time height width"]:
        try:
            outputs = self._feed_and_run(requests)
        except RuntimeError as error:
            self._pipeline = self._build()
            for request in requests:
                decode_frames(request)
            names = ", ".join(request.where for request in requests)
            raise CA2STError(f"DALI failed on frames that Pillow decodes ({names}): {error}") from error
        # DALI will write over its own memory: one copy, in the order of the batch.
        views = [torch.from_numpy(np.asarray(output.as_tensor())) for output in outputs]
        ordered = [rearrange(view, "(clip t) h w c -> clip c t h w", t=self._num_frames) for view in views]
        return rearrange(torch.stack(ordered, dim=1), "clip view c t h w -> (clip view) c t h w").contiguous()

    def _feed_and_run(self, requests: Sequence[RenderRequest]) -> Any:
        frames = [np.frombuffer(data, np.uint8) for request in requests for data in request.frames]
        flips = [np.int32(request.flip) for request in requests for _ in request.frames]
        self._pipeline.feed_input("jpegs", frames)
        self._pipeline.feed_input("flips", [np.array(flip) for flip in flips])
        for view in range(self._views):
            boxes = [request.boxes[view] for request in requests for _ in request.frames]
            corners = [np.array([box.top, box.left, box.height, box.width], np.int32) for box in boxes]
            self._pipeline.feed_input(f"boxes_{view}", corners)
        return self._pipeline.run()


def _graph(views_per_clip: int, crop_size: int) -> list[Any]:
    jpegs = fn.external_source(name="jpegs", dtype=types.UINT8, ndim=1)
    flips = fn.external_source(name="flips", dtype=types.INT32, ndim=0)
    boxes = [fn.external_source(name=f"boxes_{view}", dtype=types.INT32, ndim=1) for view in range(views_per_clip)]
    if views_per_clip == 1:
        crops = [fn.decoders.image_slice(jpegs, **_region(boxes[0]), device="cpu", output_type=types.RGB)]
    else:
        images = fn.decoders.image(jpegs, device="cpu", output_type=types.RGB)
        crops = [fn.slice(images, **_region(box)) for box in boxes]
    return [
        fn.flip(
            fn.resize(crop, size=[crop_size, crop_size], interp_type=types.INTERP_LINEAR, antialias=True),
            horizontal=flips,
            vertical=0,
        )
        for crop in crops
    ]


def _region(box: Any) -> dict[str, Any]:
    return {"start": box[0:2], "shape": box[2:4], "axis_names": "HW"}
