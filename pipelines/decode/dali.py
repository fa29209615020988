"""The DALI backends: one graph from the bytes of clips to their views, on DALI's own threads or on a GPU.

Bytes come in through external sources. Single frames come each as one image, with the box of its clip::

    jpeg ──> image_slice(box) ──> resize ──> uint8 HWC         on a CPU, one view per clip: only the box is decoded
    jpeg ──> image ──┬─> slice(box 0) ──> resize ──> flip      on a GPU, or several views: decoded once
                     └─> slice(box 1) ──> resize ──> flip

Videos come as whole members::

    member ──┐
    frames ──┴─> decoders.video ──┬─> slice(box 0) ──> resize ──> flip ──> uint8 THWC
                                  └─> slice(box 1) ──> resize ──> flip

There is no randomness in a graph: boxes and flips are data. (FrameGraph flips in the copy out of DALI's memory.)
RandAugment and erasing follow on the finished views, on threads of this module: on a CPU a clip costs a few
milliseconds there (augment/fused.py) where DALI's warps alone cost 20 to 30; on a GPU the formulas of
augment/formulas.py run on the device. Either gives the same bytes as the reference backend from the same view.

On a CPU, DALI decodes VP9 and no other video codec that shards are stored in. It decodes from the key frame before
each wanted frame, and takes every video for BT.601 in limited range, whatever its tags say: so that is how shards are
stored (`sharding.media.codecs`). Pixels decoded on a CPU equal the reference's bit for bit.

On a GPU (NVDEC, nvJPEG) outputs become torch tensors by DLPack, without a copy, and are put in order by one copy on the
device; nothing comes back to the host. Everything happens on a stream of this module's, asked for by the loader's
thread: the training step computes on its own stream meanwhile, and `render` returns when its views are finished. Held
on the device: `prefetch_steps` + 1 finished batches (2.4 MB per view of 16 frames at 224), and the decoded pictures of
at most two runs at their stored size (`MOST_FRAMES`). Pixels are not those of the CPU bit for bit: the engines decode
to YCbCr as the standards say, but colours are interpolated and rounded otherwise, nvJPEG has an inverse transform of
its own, and the resize rounds elsewhere. `make gpu` measures how far.
"""

import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import nvidia.dali.fn
import nvidia.dali.pipeline
import nvidia.dali.types
import torch
import torch.utils.dlpack
from einops import rearrange
from jaxtyping import UInt8
from numpy.typing import NDArray
from torch import Tensor

from ca2st.errors import CA2STError, UserInputError
from pipelines.augment.formulas import augmented, erase_in_place
from pipelines.augment.fused import augment_in_place
from pipelines.decode.reference import decode_frames
from pipelines.errors import LoaderClosedError
from pipelines.rendering import RenderRequest, VideoMember
from pipelines.threads import StatsRecorder

# DALI fills its modules at import, which its type stubs do not say.
fn: Any = nvidia.dali.fn
types: Any = nvidia.dali.types
Pipeline: Any = nvidia.dali.pipeline.Pipeline

MOST_FRAMES = 256
"""Frames of one run: bounds the decoded pictures at full size that wait for their resize, about 65 MB at 256 x 340."""
Fed = dict[str, list[NDArray[Any]]]
"""What goes into a run, by the name of the external source."""


def dali_backend(
    codec: str,
    *,
    num_frames: int,
    crop_size: int,
    views_per_clip: int,
    threads: int,
    stats: StatsRecorder,
    device: torch.device | None = None,
) -> "GraphBackend":
    """Return the backend for clips of `codec` on the CPU, or on the CUDA `device`; `threads` decode or feed it."""
    graph: ClipGraph
    if codec != "mjpeg":
        graph = VideoGraph(
            crop_size=crop_size, views_per_clip=views_per_clip, decoder="cpu" if device is None else "mixed"
        )
    elif device is None:
        graph = FrameGraph(num_frames=num_frames, crop_size=crop_size, views_per_clip=views_per_clip)
    else:
        graph = GpuFrameGraph(num_frames=num_frames, crop_size=crop_size, views_per_clip=views_per_clip)
    name, place = ("dali", OnCpu()) if device is None else ("dali-gpu", OnGpu(device))
    return GraphBackend(graph, name=name, num_frames=num_frames, threads=threads, stats=stats, place=place)


@runtime_checkable
class ClipGraph(Protocol):
    """From the stored bytes of clips to their views, before RandAugment and erasing."""

    samples_per_clip: int
    """What DALI counts as samples."""
    oracle: str
    """Who decodes, one by one, the clips of a run that DALI fails on."""

    def operators(self) -> list[Any]:
        """Define the graph in the current pipeline; return its outputs, one per view."""
        ...

    def fed(self, requests: Sequence[RenderRequest]) -> Fed:
        """Return what the external sources get for these clips."""
        ...

    def views(
        self, outputs: Sequence[Any], requests: Sequence[RenderRequest]
    ) -> UInt8[Tensor, "views 3 time height width"]:
        """Return the outputs of a run as contiguous memory of torch, clip by clip; DALI writes over its own."""
        ...


@runtime_checkable
class Placement(Protocol):
    """Where a graph runs."""

    device_id: int | None
    """Number of the CUDA device; None: the CPU."""

    def inside(self) -> AbstractContextManager[object]:
        """Return what everything that touches pixels happens in, on any thread."""
        ...

    def run(self, pipeline: Any) -> Sequence[Any]:
        """Return the outputs of the next run, in order with `inside`."""
        ...

    def hand_over(self, views: UInt8[Tensor, "views 3 time height width"]) -> None:
        """Wait until the views are finished, and let the consumer have them."""
        ...


class OnCpu:
    """DALI's own threads."""

    device_id: int | None = None

    def inside(self) -> AbstractContextManager[object]:
        """See `Placement.inside`: nothing to enter."""
        return nullcontext()

    def run(self, pipeline: Any) -> Sequence[Any]:
        """See `Placement.run`."""
        outputs: Sequence[Any] = pipeline.run()
        return outputs

    def hand_over(self, views: UInt8[Tensor, "views 3 time height width"]) -> None:
        """See `Placement.hand_over`: they are finished."""


class OnGpu:
    """A CUDA device, on a stream of this module's."""

    def __init__(self, device: torch.device) -> None:
        """Views are handed to the stream that is current here: the consumer's."""
        self.device_id: int | None = torch.cuda.current_device() if device.index is None else device.index
        self._stream = torch.cuda.Stream(self.device_id)  # type: ignore[no-untyped-call]  # torch's own
        self._consumer = torch.cuda.current_stream(self.device_id)

    def inside(self) -> AbstractContextManager[object]:
        """See `Placement.inside`: the stream, which is a thread's own affair, and its device."""
        return torch.cuda.stream(self._stream)

    def run(self, pipeline: Any) -> Sequence[Any]:
        """See `Placement.run`: the stream waits for the outputs, the host does not."""
        outputs: Sequence[Any] = pipeline.run(self._stream)
        return outputs

    def hand_over(self, views: UInt8[Tensor, "views 3 time height width"]) -> None:
        """Wait for the stream; the memory is not used again before the consumer's stream is done with it."""
        self._stream.synchronize()
        views.record_stream(self._consumer)


class GraphBackend:
    """Renders clips through one pipeline; calls from several threads take turns.

    Views of a run are augmented while the next run decodes.
    """

    def __init__(
        self, graph: ClipGraph, *, name: str, num_frames: int, threads: int, stats: StatsRecorder, place: Placement
    ) -> None:
        """`threads` decode, and as many others augment."""
        self.name = name
        self._graph, self._place, self._threads, self._stats = graph, place, threads, stats
        self._clips_per_run = max(1, MOST_FRAMES // num_frames)
        self._lock = threading.Lock()
        self._finishers = ThreadPoolExecutor(threads, thread_name_prefix="clip-augment")
        self._pipeline: Any = self._build()

    def render(self, requests: Sequence[RenderRequest]) -> UInt8[Tensor, "views 3 time height width"]:
        """See `ViewBackend.render`."""
        parts: list[Tensor] = []
        unfinished: list[Future[None]] = []
        with self._place.inside():
            with self._lock, self._stats.timed("decode_seconds"):
                if self._pipeline is None:
                    raise LoaderClosedError(f"backend {self.name}: closed; make a new loader")
                for start in range(0, len(requests), self._clips_per_run):
                    part = requests[start : start + self._clips_per_run]
                    parts.append(self._run(part))
                    unfinished += self._finished_soon(parts[-1], part)
            with self._stats.timed("augment_seconds"):
                for future in unfinished:
                    future.result()
                views = parts[0] if len(parts) == 1 else torch.cat(parts)
                self._place.hand_over(views)
        return views

    def close(self) -> None:
        """End DALI's threads and ours."""
        with self._lock:
            self._pipeline = None
        self._finishers.shutdown(wait=True, cancel_futures=True)

    def _build(self) -> Any:
        pipeline = Pipeline(
            batch_size=self._clips_per_run * self._graph.samples_per_clip,
            num_threads=self._threads,
            device_id=self._place.device_id,
            prefetch_queue_depth=1,  # a run is asked for, not guessed: the loader's thread is ahead of the step
        )
        with pipeline:
            pipeline.set_outputs(*self._graph.operators())
        pipeline.build()
        return pipeline

    def _run(self, requests: Sequence[RenderRequest]) -> UInt8[Tensor, "views 3 time height width"]:
        try:
            outputs = self._outputs(requests)
        except RuntimeError as error:
            # One clip fails the whole run and ends the pipeline: the oracle says which one it was, or DALI itself.
            self._pipeline = self._build()
            for request in requests:
                decode_frames(request)
            culprits = [request for request in requests if len(requests) > 1 and not self._runs_alone(request)]
            names = ", ".join(request.where for request in culprits or requests)
            raise CA2STError(
                f"backend {self.name}: DALI failed on clips that {self._graph.oracle} decodes ({names}): {error}"
            ) from error
        return self._graph.views(outputs, requests)

    def _outputs(self, requests: Sequence[RenderRequest]) -> Sequence[Any]:
        for name, arrays in self._graph.fed(requests).items():
            self._pipeline.feed_input(name, arrays)
        return self._place.run(self._pipeline)

    def _runs_alone(self, request: RenderRequest) -> bool:
        try:
            self._outputs([request])
        except RuntimeError:
            self._pipeline = self._build()
            return False
        return True

    def _finished_soon(
        self, views: UInt8[Tensor, "views 3 time size size"], requests: Sequence[RenderRequest]
    ) -> list[Future[None]]:
        """Begin to augment and erase the views of the requests, equally many each, in place."""
        per_clip = len(views) // len(requests)
        return [
            self._finishers.submit(self._finish, views[clip * per_clip + view], request)
            for clip, request in enumerate(requests)
            for view in range(per_clip)
            if request.augment is not None or request.erased
        ]

    def _finish(self, view: UInt8[Tensor, "3 time size size"], request: RenderRequest) -> None:
        with self._place.inside():
            finish_view(view, request)


def finish_view(view: UInt8[Tensor, "3 time size size"], request: RenderRequest) -> None:
    """Augment and erase one contiguous view in place."""
    if request.augment is not None:
        if view.device.type == "cpu":
            augment_in_place(view.numpy(), request.augment)
        else:
            view.copy_(augmented(view, request.augment))
    erase_in_place(view, request.erased)


class FrameGraph:
    """`ClipGraph` of JPEG frames, decoded on the CPU."""

    oracle = "Pillow"

    def __init__(self, *, num_frames: int, crop_size: int, views_per_clip: int) -> None:
        self.samples_per_clip = num_frames
        self._crop_size, self._views = crop_size, views_per_clip

    def operators(self) -> list[Any]:
        """See `ClipGraph.operators`."""
        jpegs, boxes = _jpeg_source(), box_sources(self._views)
        if self._views > 1:
            images = fn.decoders.image(jpegs, device="cpu", output_type=types.RGB)
            return crops_resized(images, boxes, self._crop_size)
        crop = fn.decoders.image_slice(jpegs, **_region(boxes[0]), device="cpu", output_type=types.RGB)
        return [_resized(crop, self._crop_size)]

    def fed(self, requests: Sequence[RenderRequest]) -> Fed:
        """See `ClipGraph.fed`."""
        return _fed_jpegs(requests) | _fed_boxes(requests, views_per_clip=self._views, times=self.samples_per_clip)

    def views(
        self, outputs: Sequence[Any], requests: Sequence[RenderRequest]
    ) -> UInt8[Tensor, "views 3 time height width"]:
        """Make one copy, in the order of the batch, by NumPy.

        It turns pixels into planes four times as fast as torch, and mirrors on the way at no cost.
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


class GpuFrameGraph:
    """`ClipGraph` of JPEG frames, decoded by nvJPEG."""

    oracle = "Pillow"

    def __init__(self, *, num_frames: int, crop_size: int, views_per_clip: int) -> None:
        self.samples_per_clip = num_frames
        self._crop_size, self._views = crop_size, views_per_clip

    def operators(self) -> list[Any]:
        """See `ClipGraph.operators`."""
        images = fn.decoders.image(
            _jpeg_source(),
            device="mixed",
            output_type=types.RGB,
            hw_decoder_load=1.0,  # all on the JPEG engines, where there are some: CUDA cores round otherwise
            jpeg_fancy_upsampling=True,  # interpolates colours as the CPU's decoder does
        )
        return _flipped(crops_resized(images, box_sources(self._views), self._crop_size))

    def fed(self, requests: Sequence[RenderRequest]) -> Fed:
        """See `ClipGraph.fed`."""
        times = self.samples_per_clip
        boxes = _fed_boxes(requests, views_per_clip=self._views, times=times)
        return _fed_jpegs(requests) | _fed_flips(requests, times=times) | boxes

    def views(
        self,
        outputs: Sequence[Any],
        requests: Sequence[RenderRequest],  # noqa: ARG002 - the graph flips
    ) -> UInt8[Tensor, "views 3 time height width"]:
        """Make one copy on the device, in the order of the batch."""
        pictures = [as_torch(output) for output in outputs]
        time = self.samples_per_clip
        return _in_batch_order([rearrange(view, "(clip t) h w c -> clip t h w c", t=time) for view in pictures])


class VideoGraph:
    """`ClipGraph` of video members; what follows the decoder runs where the decoder leaves its pictures."""

    oracle = "FFmpeg"
    samples_per_clip = 1

    def __init__(self, *, crop_size: int, views_per_clip: int, decoder: Literal["cpu", "mixed"]) -> None:
        """`decoder` is DALI's word: on the CPU, or by a GPU's video engines."""
        self._crop_size, self._views, self._decoder = crop_size, views_per_clip, decoder

    def operators(self) -> list[Any]:
        """See `ClipGraph.operators`."""
        videos = fn.external_source(name="videos", dtype=types.UINT8, ndim=1)
        frames = fn.external_source(name="frames", dtype=types.INT32, ndim=1)
        # A frame that is not there is an error; by default it would be black.
        decoded = fn.decoders.video(videos, frames=frames, device=self._decoder, pad_mode="none")
        return _flipped(crops_resized(decoded, box_sources(self._views), self._crop_size))

    def fed(self, requests: Sequence[RenderRequest]) -> Fed:
        """See `ClipGraph.fed`."""
        members = [_member(request) for request in requests]
        return {
            "videos": [np.frombuffer(member.data, np.uint8) for member in members],
            "frames": [np.array(member.frame_indices, np.int32) for member in members],
            **_fed_flips(requests, times=1),
            **_fed_boxes(requests, views_per_clip=self._views, times=1),
        }

    def views(
        self,
        outputs: Sequence[Any],
        requests: Sequence[RenderRequest],  # noqa: ARG002 - the graph flips
    ) -> UInt8[Tensor, "views 3 time height width"]:
        """Make one copy, in the order of the batch, on the device that the outputs are on."""
        return _in_batch_order([as_torch(output) for output in outputs])


def as_torch(output: Any) -> UInt8[Tensor, "samples *shape"]:
    """Return an output of DALI as a tensor on its device, in order with the current stream there: the same memory."""
    tensor: Tensor = torch.utils.dlpack.from_dlpack(output.as_tensor())
    return tensor


def box_sources(views_per_clip: int) -> list[Any]:
    """Return the external sources of the boxes, one per view."""
    return [fn.external_source(name=f"boxes_{view}", dtype=types.INT32, ndim=1) for view in range(views_per_clip)]


def crops_resized(pictures: Any, boxes: Sequence[Any], crop_size: int) -> list[Any]:
    """Return operators that cut each box out of decoded pictures and resize it."""
    return [_resized(fn.slice(pictures, **_region(box)), crop_size) for box in boxes]


def _resized(crop: Any, crop_size: int) -> Any:
    """Return the resize that the reference has a formula for."""
    return fn.resize(crop, size=[crop_size, crop_size], interp_type=types.INTERP_LINEAR, antialias=True)


def _region(box: Any) -> dict[str, Any]:
    """Return the arguments of a slice for a box that is data."""
    return {"start": box[0:2], "shape": box[2:4], "axis_names": "HW"}


def _flipped(crops: Sequence[Any]) -> list[Any]:
    flips = fn.external_source(name="flips", dtype=types.INT32, ndim=0)
    return [fn.flip(crop, horizontal=flips, vertical=0) for crop in crops]


def _jpeg_source() -> Any:
    return fn.external_source(name="jpegs", dtype=types.UINT8, ndim=1)


def _fed_jpegs(requests: Sequence[RenderRequest]) -> Fed:
    """Return the frames of the requests, clip by clip.

    Raises:
        UserInputError: a clip is stored as a video.
    """
    frames: list[NDArray[Any]] = []
    for request in requests:
        if isinstance(request.frames, VideoMember):
            raise UserInputError(
                f"{request.where}: expected JPEG frames, found codec {request.frames.codec!r}, which the graph for "
                "frames does not decode; use backend 'reference', or convert the set with --codec mjpeg"
            )
        frames += [np.frombuffer(data, np.uint8) for data in request.frames.frames]
    return {"jpegs": frames}


def _member(request: RenderRequest) -> VideoMember:
    if not isinstance(request.frames, VideoMember):
        raise CA2STError(f"{request.where}: expected a video, found single frames; this backend renders videos")
    return request.frames


def _fed_boxes(requests: Sequence[RenderRequest], *, views_per_clip: int, times: int) -> Fed:
    """Return the boxes of the requests, each `times` times."""
    return {
        f"boxes_{view}": [
            np.array([box.top, box.left, box.height, box.width], np.int32)
            for box in (request.boxes[view] for request in requests)
            for _ in range(times)
        ]
        for view in range(views_per_clip)
    }


def _fed_flips(requests: Sequence[RenderRequest], *, times: int) -> Fed:
    """Return whether each request is mirrored, each `times` times."""
    return {"flips": [np.array(request.flip, np.int32) for request in requests for _ in range(times)]}


def _in_batch_order(
    views: Sequence[UInt8[Tensor, "clip time height width 3"]],
) -> UInt8[Tensor, "views 3 time height width"]:
    """Return the views clip by clip, a clip's views in order, as contiguous memory of torch."""
    of_clip = views[0].unsqueeze(1) if len(views) == 1 else torch.stack([*views], dim=1)
    return rearrange(of_clip, "clip view t h w c -> (clip view) c t h w").contiguous()
