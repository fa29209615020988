"""RandAugment and erasing of rendered views: the last stage of every backend but the reference, on threads of its own.

Decoding, cropping and resizing are a graph's business; these operations are cheaper outside of it. On the CPU a clip
costs a few milliseconds here (fused.py) where DALI's warps alone cost 20 to 30; on a GPU the formulas of pointwise.py
run on the device. Either gives the same bytes as the reference backend does from the same view.
"""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, runtime_checkable

import numpy as np
import nvidia.dali.fn
import nvidia.dali.pipeline
import nvidia.dali.types
import torch
from jaxtyping import UInt8
from numpy.typing import NDArray
from torch import Tensor

from ca2st.errors import CA2STError
from pipelines.augment.formulas import augmented, erase_in_place
from pipelines.augment.fused import augment_in_place
from pipelines.decode.reference import decode_frames
from pipelines.errors import LoaderClosedError
from pipelines.rendering import RenderRequest
from pipelines.stats import StatsRecorder


class Finisher:
    """Finishes views in place, several at once."""

    def __init__(
        self, *, threads: int, inside: Callable[[], AbstractContextManager[object]] = lambda: nullcontext()
    ) -> None:
        """`inside` is entered around each view on the thread that finishes it: the device's stream."""
        self._inside = inside
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="clip-augment")

    def finish(self, views: UInt8[Tensor, "views 3 time size size"], requests: Sequence[RenderRequest]) -> None:
        """Augment and erase `views`, which must be contiguous: those of the requests in order, equally many each."""
        self.begin(views, requests)()

    def begin(
        self, views: UInt8[Tensor, "views 3 time size size"], requests: Sequence[RenderRequest]
    ) -> Callable[[], None]:
        """Start what `finish` does; the call that is returned waits until it is done."""
        views_per_clip = len(views) // len(requests)
        wanted = [
            (views[clip * views_per_clip + view], request)
            for clip, request in enumerate(requests)
            for view in range(views_per_clip)
            if request.augment is not None or request.erased
        ]
        futures = [self._pool.submit(self._finish_one, view, request) for view, request in wanted]

        def wait() -> None:
            for future in futures:
                future.result()

        return wait

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _finish_one(self, view: UInt8[Tensor, "3 time size size"], request: RenderRequest) -> None:
        with self._inside():
            finish_view(view, request)


def finish_view(view: UInt8[Tensor, "3 time size size"], request: RenderRequest) -> None:
    """Augment and erase one contiguous view in place."""
    if request.augment is not None:
        if view.device.type == "cpu":
            augment_in_place(view.numpy(), request.augment)
        else:
            view.copy_(augmented(view, request.augment))
    erase_in_place(view, request.erased)


# DALI fills its modules at import, which its type stubs do not tell.
fn: Any = nvidia.dali.fn
types: Any = nvidia.dali.types
Pipeline: Any = nvidia.dali.pipeline.Pipeline

MOST_FRAMES = 256
"""Frames of one run: bounds the decoded pictures at full size that wait for their resize, about 65 MB at 256 x 340."""
Fed = dict[str, list[NDArray[Any]]]
"""What goes into a run, by the name of the external source."""


@runtime_checkable
class ClipGraph(Protocol):
    """From the stored bytes of clips to their views, before RandAugment and erasing."""

    samples_per_clip: int
    """What DALI counts as samples."""
    oracle: str
    """Who decodes, one by one, the clips of a run that DALI fails on."""

    def operators(self) -> list[Any]:
        """Define the graph in the current pipeline; its outputs, one a view."""
        ...

    def fed(self, requests: Sequence[RenderRequest]) -> Fed:
        """What the external sources get for these clips."""
        ...

    def views(
        self, outputs: Sequence[Any], requests: Sequence[RenderRequest]
    ) -> UInt8[Tensor, "views 3 time height width"]:
        """The outputs of a run as contiguous memory of torch's, clip by clip; DALI writes over its own."""
        ...


@runtime_checkable
class Placement(Protocol):
    """Where a graph runs."""

    device_id: int | None
    """Number of the CUDA device; None: the CPU."""

    def inside(self) -> AbstractContextManager[object]:
        """What everything that touches pixels happens in, on any thread."""
        ...

    def run(self, pipeline: Any) -> Sequence[Any]:
        """Outputs of the next run, in order with `inside`."""
        ...

    def hand_over(self, views: UInt8[Tensor, "views 3 time height width"]) -> None:
        """Wait until the views are finished, and let the consumer have them."""
        ...


class OnCpu:
    """DALI's own threads."""

    device_id: int | None = None

    def inside(self) -> AbstractContextManager[object]:
        """Nothing to enter."""
        return nullcontext()

    def run(self, pipeline: Any) -> Sequence[Any]:
        """See `Placement.run`."""
        outputs: Sequence[Any] = pipeline.run()
        return outputs

    def hand_over(self, views: UInt8[Tensor, "views 3 time height width"]) -> None:
        """They are finished."""


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
        self._finisher = Finisher(threads=threads, inside=place.inside)
        self._pipeline: Any = self._build()

    def render(self, requests: Sequence[RenderRequest]) -> UInt8[Tensor, "views 3 time height width"]:
        """See `ViewBackend.render`."""
        parts, waits = [], []
        with self._place.inside():
            with self._lock, self._stats.timed("decode_seconds"):
                if self._pipeline is None:
                    raise LoaderClosedError(f"backend {self.name}: closed; make a new loader")
                for start in range(0, len(requests), self._clips_per_run):
                    part = requests[start : start + self._clips_per_run]
                    parts.append(self._run(part))
                    waits.append(self._finisher.begin(parts[-1], part))
            with self._stats.timed("augment_seconds"):
                for wait in waits:
                    wait()
                views = parts[0] if len(parts) == 1 else torch.cat(parts)
                self._place.hand_over(views)
        return views

    def close(self) -> None:
        """End DALI's threads and ours."""
        with self._lock:
            self._pipeline = None
        self._finisher.close()

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


def crops_resized(pictures: Any, boxes: Sequence[Any], crop_size: int) -> list[Any]:
    """Operators that cut each box out of decoded pictures and resize it."""
    return [resized(fn.slice(pictures, **region(box)), crop_size) for box in boxes]


def resized(crop: Any, crop_size: int) -> Any:
    """The resize that the reference has a formula for."""
    return fn.resize(crop, size=[crop_size, crop_size], interp_type=types.INTERP_LINEAR, antialias=True)


def region(box: Any) -> dict[str, Any]:
    """Arguments of a slice for a box that is data."""
    return {"start": box[0:2], "shape": box[2:4], "axis_names": "HW"}


def box_sources(views_per_clip: int) -> list[Any]:
    """External sources of the boxes, one a view."""
    return [fn.external_source(name=f"boxes_{view}", dtype=types.INT32, ndim=1) for view in range(views_per_clip)]


def fed_boxes(requests: Sequence[RenderRequest], *, views_per_clip: int, times: int) -> Fed:
    """The boxes of the requests, each `times` times."""
    return {
        f"boxes_{view}": [
            np.array([box.top, box.left, box.height, box.width], np.int32)
            for box in (request.boxes[view] for request in requests)
            for _ in range(times)
        ]
        for view in range(views_per_clip)
    }


def fed_flips(requests: Sequence[RenderRequest], *, times: int) -> Fed:
    """Whether each request is mirrored, each `times` times."""
    return {"flips": [np.array(request.flip, np.int32) for request in requests for _ in range(times)]}
