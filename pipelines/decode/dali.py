"""The DALI backends: from the bytes of clips to their views, on DALI's own threads and ours, or on a GPU.

Bytes come in through external sources. On a CPU, DALI decodes; threads of this module do all that follows, a view
after the other: libswscale resizes it in a third of the time that DALI's resize takes (decode/resizing.py)::

    jpeg ──> image_slice(box around the boxes)       only that part is decoded
    member, frames ──> decoders.video

On a GPU all of it is one graph, and one for videos::

    jpeg ──> image ──┬─> slice(box 0) ──> resize ──> flip
                     └─> slice(box 1) ──> resize ──> flip
    member, frames ──> decoders.video ──┬─> slice(box 0) ──> resize ──> flip
                                        └─> slice(box 1) ──> resize ──> flip

There is no randomness in a graph: boxes and flips are data. RandAugment and erasing follow on the finished views, on
threads of this module: on a CPU a clip costs a few milliseconds there (augment/fused.py) where DALI's warps alone cost
20 to 30; on a GPU the formulas of augment/formulas.py run on the device. Either gives the same bytes as the reference
backend from the same view.

On a CPU, DALI decodes VP9 and no other video codec that shards are stored in. It decodes from the key frame before
each wanted frame, and takes every video for BT.601 in limited range, whatever its tags say: so that is how shards are
stored (`sharding.media.codecs`). Pixels decoded on a CPU equal the reference's bit for bit.

On a GPU (NVDEC, nvJPEG) outputs become torch tensors by DLPack, without a copy, and are put in order by one copy on the
device; nothing comes back to the host. Everything happens on a stream of this module's, asked for by the loader's
thread: the training step computes on its own stream meanwhile, and `render` returns when its views are finished. Held
on the device: `prefetch_steps` + 2 finished batches (2.4 MB per view of 16 frames at 224), and the decoded pictures of
at most two runs at their stored size (`MOST_FRAMES`). Pixels are not those of the CPU bit for bit: the engines decode
to YCbCr as the standards say, but colours are interpolated and rounded otherwise, nvJPEG has an inverse transform of
its own, and the resize rounds elsewhere. `make gpu` measures how far.
"""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

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
from pipelines.augment.boxes import CropBox
from pipelines.augment.fused import finish_view
from pipelines.decode.reference import decode_frames
from pipelines.decode.resizing import Picture, resize_into
from pipelines.errors import DecoderMemoryError, LoaderClosedError
from pipelines.rendering import RenderRequest, VideoMember
from pipelines.threads import StatsRecorder

# DALI fills its modules at import, which its type stubs do not say.
fn: Any = nvidia.dali.fn
types: Any = nvidia.dali.types
Pipeline: Any = nvidia.dali.pipeline.Pipeline

MOST_FRAMES = 256
"""Frames of one run: bounds the decoded pictures at full size that wait for their resize, about 65 MB at 256 x 340."""
_REFUSED_ALLOCATIONS = (
    "CUDA allocation failed",  # DALI's own
    "cudaErrorMemoryAllocation",
    "CUDA_ERROR_OUT_OF_MEMORY",
    "CUDA error: out of memory",
    "NVJPEG_STATUS_ALLOCATOR_FAILURE",
    "bad_alloc",
)
_FINISHERS_ON_GPU = 2
Fed = dict[str, list[NDArray[Any]]]
"""What goes into a run, by the name of the external source."""
Job = Callable[[], None]
"""What is left to do for one view."""


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
    graph = ClipGraph(
        is_video=codec != "mjpeg",
        on_gpu=device is not None,
        num_frames=num_frames,
        crop_size=crop_size,
        views_per_clip=views_per_clip,
    )
    name, place = ("dali", OnCpu()) if device is None else ("dali-gpu", OnGpu(device))
    return GraphBackend(graph, name=name, threads=threads, stats=stats, place=place)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipGraph:
    """From the stored bytes of clips to their views, as the module's text draws it."""

    is_video: bool
    """Clips are video members; else JPEG frames."""
    on_gpu: bool
    num_frames: int
    crop_size: int
    views_per_clip: int

    @property
    def samples_per_clip(self) -> int:
        """What DALI counts as samples."""
        return 1 if self.is_video else self.num_frames

    def operators(self) -> list[Any]:
        """Define the graph in the current pipeline; return its outputs."""
        if self.is_video:
            videos = fn.external_source(name="videos", dtype=types.UINT8, ndim=1)
            frames = fn.external_source(name="frames", dtype=types.INT32, ndim=1)
            device = "mixed" if self.on_gpu else "cpu"
            # A missing frame is an error, never black.
            pictures = fn.decoders.video(videos, frames=frames, device=device, pad_mode="none")
        else:
            jpegs = fn.external_source(name="jpegs", dtype=types.UINT8, ndim=1)
            if not self.on_gpu:
                (box,) = box_sources(1)
                return [fn.decoders.image_slice(jpegs, **_region(box), device="cpu", output_type=types.RGB)]
            pictures = fn.decoders.image(
                jpegs,
                device="mixed",
                output_type=types.RGB,
                hw_decoder_load=1.0,  # all on the JPEG engines, where there are some: CUDA cores round otherwise
                jpeg_fancy_upsampling=True,  # interpolates colours as the CPU's decoder does
            )
        if not self.on_gpu:
            return [pictures]
        flips = fn.external_source(name="flips", dtype=types.INT32, ndim=0)
        crops = crops_resized(pictures, box_sources(self.views_per_clip), self.crop_size)
        return [fn.flip(crop, horizontal=flips, vertical=0) for crop in crops]

    def fed(self, requests: Sequence[RenderRequest]) -> Fed:
        """Return what the external sources get for these clips.

        Raises:
            CA2STError: a clip is stored in the other of the two forms.
        """
        fed = _fed_clips(requests, is_video=self.is_video)
        boxes: list[list[CropBox]] = []  # per view, those of the clips
        if self.on_gpu:
            fed["flips"] = [np.array(one.flip, np.int32) for one in requests for _ in range(self.samples_per_clip)]
            boxes = [[one.boxes[view] for one in requests] for view in range(self.views_per_clip)]
        elif not self.is_video:
            boxes = [[box_around(one.boxes) for one in requests]]
        for view, of_clips in enumerate(boxes):
            arrays = [np.array([box.top, box.left, box.height, box.width], np.int32) for box in of_clips]
            fed[f"boxes_{view}"] = [array for array in arrays for _ in range(self.samples_per_clip)]
        return fed

    def views(
        self, outputs: Sequence[Any], requests: Sequence[RenderRequest]
    ) -> tuple[UInt8[Tensor, "views 3 time size size"], list[Job]]:
        """Return contiguous memory of torch for the views of a run, clip by clip, and the jobs that finish them.

        What the jobs read may be DALI's memory: a run takes its own, and it lasts as long as anything of it is held.
        """
        jobs: list[Job] = []
        if self.on_gpu:
            crops = [as_torch(output) for output in outputs]
            if not self.is_video:
                crops = [rearrange(crop, "(clip t) h w c -> clip t h w c", t=self.num_frames) for crop in crops]
            of_clip = crops[0].unsqueeze(1) if len(crops) == 1 else torch.stack(crops, dim=1)
            # One copy on the device, in the order of the batch.
            views = rearrange(of_clip, "clip view t h w c -> (clip view) c t h w").contiguous()
            owners = [one for one in requests for _ in one.boxes]
            for view, one in zip(views, owners, strict=True):
                if one.augment is not None or one.erased:
                    jobs.append(partial(finish_view, view, one.augment, one.erased))
            return views, jobs
        num_views, time, size = sum(len(one.boxes) for one in requests), self.num_frames, self.crop_size
        views = torch.empty(num_views, 3, time, size, size, dtype=torch.uint8)
        for clip, one in enumerate(requests):
            if self.is_video:
                top, left, pictures = 0, 0, [*np.asarray(outputs[0][clip])]
            else:
                around = box_around(one.boxes)
                top, left = around.top, around.left
                pictures = [np.asarray(outputs[0][clip * time + at]) for at in range(time)]
            for box in one.boxes:
                rows = slice(box.top - top, box.top - top + box.height)
                columns = slice(box.left - left, box.left - left + box.width)
                crop = [picture[rows, columns] for picture in pictures]
                jobs.append(partial(_resize_and_finish, views[len(jobs)], crop, one))
        return views, jobs


def box_around(boxes: Sequence[CropBox]) -> CropBox:
    """Return the smallest box that holds all of them."""
    top, left = min(box.top for box in boxes), min(box.left for box in boxes)
    bottom, right = max(box.top + box.height for box in boxes), max(box.left + box.width for box in boxes)
    return CropBox(top=top, left=left, height=bottom - top, width=right - left)


def _resize_and_finish(
    view: UInt8[Tensor, "3 time size size"], crop: Sequence[Picture], request: RenderRequest
) -> None:
    resize_into(view.numpy()[..., :: -1 if request.flip else 1], crop)
    finish_view(view, request.augment, request.erased)


def _fed_clips(requests: Sequence[RenderRequest], *, is_video: bool) -> Fed:
    clips, frames = list[NDArray[Any]](), list[NDArray[Any]]()
    for request in requests:
        stored = request.frames
        if isinstance(stored, VideoMember):
            if not is_video:
                raise UserInputError(
                    f"{request.where}: expected JPEG frames, found codec {stored.codec!r}, which the graph for frames "
                    "does not decode; use backend 'reference', or convert the set with --codec mjpeg"
                )
            clips.append(np.frombuffer(stored.data, np.uint8))
            frames.append(np.array(stored.frame_indices, np.int32))
        elif is_video:
            raise CA2STError(f"{request.where}: expected a video, found single frames; this backend renders videos")
        else:
            clips += [np.frombuffer(data, np.uint8) for data in stored.frames]
    return {"videos": clips, "frames": frames} if is_video else {"jpegs": clips}


def as_torch(output: Any) -> UInt8[Tensor, "samples *shape"]:
    """Return an output of DALI as a tensor on its device, in order with the current stream there: the same memory."""
    tensor: Tensor = torch.utils.dlpack.from_dlpack(output.as_tensor())
    return tensor


def box_sources(views_per_clip: int) -> list[Any]:
    """Return the external sources of the boxes, one per view."""
    return [fn.external_source(name=f"boxes_{view}", dtype=types.INT32, ndim=1) for view in range(views_per_clip)]


def crops_resized(pictures: Any, boxes: Sequence[Any], crop_size: int) -> list[Any]:
    """Return operators that cut each box out of decoded pictures and resize it, as the reference has a formula for."""
    return [
        fn.resize(
            fn.slice(pictures, **_region(box)),
            size=[crop_size, crop_size],
            interp_type=types.INTERP_LINEAR,
            antialias=True,
        )
        for box in boxes
    ]


def _region(box: Any) -> dict[str, Any]:
    """Return the arguments of a slice for a box that is data."""
    return {"start": box[0:2], "shape": box[2:4], "axis_names": "HW"}


class OnCpu:
    """Where a graph runs: DALI's own threads."""

    device_id: int | None = None
    """Number of the CUDA device; None: the CPU."""

    def inside(self) -> AbstractContextManager[object]:
        """Return what everything that touches pixels happens in, on any thread."""
        return nullcontext()

    def run(self, pipeline: Any) -> Sequence[Any]:
        """Return the outputs of the next run, in order with `inside`."""
        outputs: Sequence[Any] = pipeline.run()
        return outputs

    def hand_over(self, views: UInt8[Tensor, "views 3 time height width"]) -> None:
        """Wait until the views are finished, and let the consumer have them."""


class OnGpu:
    """A CUDA device, on a stream of this module's; methods as of `OnCpu`."""

    def __init__(self, device: torch.device) -> None:
        """Views are handed to the stream that is current here: the consumer's."""
        self.device_id: int | None = torch.cuda.current_device() if device.index is None else device.index
        self._stream = torch.cuda.Stream(self.device_id)  # type: ignore[no-untyped-call]  # torch's own
        self._consumer = torch.cuda.current_stream(self.device_id)

    def inside(self) -> AbstractContextManager[object]:
        """Return the device and the stream, which are a thread's own affair."""
        torch.cuda.set_device(self.device_id)  # threads start on device 0, and would leave a context there
        return torch.cuda.stream(self._stream)

    def run(self, pipeline: Any) -> Sequence[Any]:
        """Return outputs that the stream waits for, and the host does not."""
        outputs: Sequence[Any] = pipeline.run(self._stream)
        return outputs

    def hand_over(self, views: UInt8[Tensor, "views 3 time height width"]) -> None:
        """Wait for the stream; the memory is not used again before the consumer's stream is done with it."""
        self._stream.synchronize()
        views.record_stream(self._consumer)


class GraphBackend:
    """Renders clips through one pipeline, in which calls from several threads take turns.

    Views of a run are finished while the next run decodes, of the same call or of another.
    """

    def __init__(
        self, graph: ClipGraph, *, name: str, threads: int, stats: StatsRecorder, place: OnCpu | OnGpu
    ) -> None:
        """`threads` decode, and as many others finish views: on a GPU, which computes these, at most two."""
        self.name = name
        self._graph, self._place, self._threads, self._stats = graph, place, threads, stats
        self._clips_per_run = max(1, MOST_FRAMES // graph.num_frames)
        self._lock = threading.Lock()
        self._finishers = ThreadPoolExecutor(
            threads if place.device_id is None else min(threads, _FINISHERS_ON_GPU), thread_name_prefix="clip-augment"
        )
        self._is_closed = False
        self._pipeline: Any = self._build()
        """None after a failure: the next run makes another."""

    def render(self, requests: Sequence[RenderRequest]) -> UInt8[Tensor, "views 3 time height width"]:
        """See `ViewBackend.render`."""
        parts: list[Tensor] = []
        unfinished: list[Future[None]] = []
        with self._place.inside():
            with self._lock, self._stats.timed("decode_seconds"):
                if self._is_closed:
                    raise LoaderClosedError(f"backend {self.name}: closed; make a new loader")
                for start in range(0, len(requests), self._clips_per_run):
                    part = requests[start : start + self._clips_per_run]
                    views, jobs = self._run(part)
                    parts.append(views)
                    unfinished += [self._finishers.submit(self._finish, job) for job in jobs]
            with self._stats.timed("augment_seconds"):
                for future in unfinished:
                    future.result()
                views = parts[0] if len(parts) == 1 else torch.cat(parts)
                self._place.hand_over(views)
        return views

    def close(self) -> None:
        """End DALI's threads and ours."""
        with self._lock:
            self._is_closed, self._pipeline = True, None
        self._finishers.shutdown(wait=True, cancel_futures=True)

    def _build(self) -> Any:
        pipeline = Pipeline(
            batch_size=self._clips_per_run * self._graph.samples_per_clip,
            num_threads=self._threads,
            device_id=self._place.device_id,
            exec_dynamic=True,  # outputs are not written over by later runs
            prefetch_queue_depth=1,  # a run is asked for, not guessed: the loader's thread is ahead of the step
        )
        with pipeline:
            pipeline.set_outputs(*self._graph.operators())
        pipeline.build()
        return pipeline

    def _run(self, requests: Sequence[RenderRequest]) -> tuple[UInt8[Tensor, "views 3 time height width"], list[Job]]:
        try:
            outputs = self._outputs(requests)
        except (RuntimeError, MemoryError) as error:
            self._pipeline = None  # before another is made: there may be no memory for two
            if isinstance(error, MemoryError) or any(words in str(error) for words in _REFUSED_ALLOCATIONS):
                raise DecoderMemoryError(self.name, num_clips=len(requests)) from error
            # One clip fails the whole run and ends the pipeline: the oracle says which one it was, or DALI itself.
            for request in requests:
                decode_frames(request)
            culprits = [request for request in requests if len(requests) > 1 and not self._runs_alone(request)]
            names = ", ".join(request.where for request in culprits or requests)
            oracle = "FFmpeg" if self._graph.is_video else "Pillow"
            raise CA2STError(
                f"backend {self.name}: DALI failed on clips that {oracle} decodes ({names}): {error}"
            ) from error
        return self._graph.views(outputs, requests)

    def _outputs(self, requests: Sequence[RenderRequest]) -> Sequence[Any]:
        if self._pipeline is None:
            self._pipeline = self._build()
        for name, arrays in self._graph.fed(requests).items():
            self._pipeline.feed_input(name, arrays)
        return self._place.run(self._pipeline)

    def _runs_alone(self, request: RenderRequest) -> bool:
        try:
            self._outputs([request])
        except RuntimeError:
            self._pipeline = None
            return False
        return True

    def _finish(self, job: Job) -> None:
        with self._place.inside():
            job()
