"""The DALI backends on a GPU: bytes go in from the host, finished views come out on the device.

::

    h264, hevc, vp9   member, frames ──> decoders.video (NVDEC) ──┬─> slice ──> resize ──> flip ──> uint8 THWC
    mjpeg             jpegs ──> decoders.image (nvJPEG) ──────────┘

The outputs become tensors of torch's by DLPack, without a copy, and are put in order by one copy on the device.
RandAugment and erasing are the formulas of pipelines/augment/formulas.py, on the device: to the byte those of the
CPU. Nothing comes back to the host.

Everything happens on a stream of our own, asked for by the loader's thread: the training step computes on its stream
meanwhile, and `render` returns when its views are finished. Held on the device: `prefetch_steps` + 1 finished batches
(2.4 MB a view of 16 frames at 224), and the decoded pictures of at most two runs at their stored size
(`dali_engine.MOST_FRAMES`: one that decodes, one that is resized).

Not equal to the CPU bit for bit: the engines decode to YCbCr as the standards say, but colours are interpolated and
rounded otherwise, nvJPEG has an inverse transform of its own, and the resize rounds elsewhere. `make gpu` measures
how far.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from jaxtyping import UInt8
from torch import Tensor

from pipelines.decode.dali_cpu import VideoGraph, as_torch, fed_jpegs, flip_source, in_batch_order, jpeg_source
from pipelines.decode.dali_engine import Fed, GraphBackend, box_sources, crops_resized, fed_boxes, fed_flips, fn
from pipelines.decode.dali_engine import types as dali_types
from pipelines.rendering import RenderRequest
from pipelines.stats import StatsRecorder

NAME = "dali-gpu"


@dataclass(frozen=True, kw_only=True, slots=True)
class NvJpegOptions:
    """How nvJPEG decodes. The defaults make a picture independent of its place in the batch, and near the CPU's."""

    hardware_load: float = 1.0
    """Share of the pictures that the JPEG engines get, the rest goes to the CUDA cores, which round otherwise: 0 or 1
    where a picture's pixels must not depend on its neighbours. Without engines everything is on the cores."""
    fancy_upsampling: bool = True
    """Interpolate colours as the CPU decoder does."""


class GpuFrameGraph:
    """`ClipGraph` of JPEG frames, decoded by nvJPEG."""

    oracle = "Pillow"

    def __init__(
        self, *, num_frames: int, crop_size: int, views_per_clip: int, options: NvJpegOptions | None = None
    ) -> None:
        self.samples_per_clip = num_frames
        self._crop_size, self._views, self._options = crop_size, views_per_clip, options or NvJpegOptions()

    def operators(self) -> list[Any]:
        """See `ClipGraph.operators`."""
        images = fn.decoders.image(
            jpeg_source(),
            device="mixed",
            output_type=dali_types.RGB,
            hw_decoder_load=self._options.hardware_load,
            jpeg_fancy_upsampling=self._options.fancy_upsampling,
        )
        flips = flip_source()
        crops = crops_resized(images, box_sources(self._views), self._crop_size)
        return [fn.flip(crop, horizontal=flips, vertical=0) for crop in crops]

    def fed(self, requests: Sequence[RenderRequest]) -> Fed:
        """See `ClipGraph.fed`."""
        times = self.samples_per_clip
        boxes = fed_boxes(requests, views_per_clip=self._views, times=times)
        return fed_jpegs(requests) | fed_flips(requests, times=times) | boxes

    def views(
        self,
        outputs: Sequence[Any],
        requests: Sequence[RenderRequest],  # noqa: ARG002 - the graph flips
    ) -> UInt8[Tensor, "views 3 time height width"]:
        """One copy on the device, in the order of the batch."""
        pictures = [as_torch(output) for output in outputs]
        time = self.samples_per_clip
        return in_batch_order([rearrange(view, "(clip t) h w c -> clip t h w c", t=time) for view in pictures])


class OnGpu:
    """A CUDA device, on a stream of our own."""

    def __init__(self, device: torch.device) -> None:
        """Views are handed to the stream that is current here: the consumer's."""
        self.device_id: int | None = torch.cuda.current_device() if device.index is None else device.index
        self._stream = torch.cuda.Stream(self.device_id)  # type: ignore[no-untyped-call]  # torch's own
        self._consumer = torch.cuda.current_stream(self.device_id)

    def inside(self) -> AbstractContextManager[object]:
        """Our stream, which is a thread's own affair, and its device."""
        return torch.cuda.stream(self._stream)

    def run(self, pipeline: Any) -> Sequence[Any]:
        """Outputs bound to our stream: it waits for them, the host does not."""
        outputs: Sequence[Any] = pipeline.run(self._stream)
        return outputs

    def hand_over(self, views: UInt8[Tensor, "views 3 time height width"]) -> None:
        """Wait for our stream; their memory is not used again before the consumer's stream is through with them."""
        self._stream.synchronize()
        views.record_stream(self._consumer)


def gpu_backend(
    codec: str,
    *,
    device: torch.device,
    num_frames: int,
    crop_size: int,
    views_per_clip: int,
    threads: int,
    stats: StatsRecorder,
    nvjpeg: NvJpegOptions | None = None,
) -> GraphBackend:
    """The backend for clips of `codec` on `device`; `threads` feed its decoders."""
    graph = (
        GpuFrameGraph(num_frames=num_frames, crop_size=crop_size, views_per_clip=views_per_clip, options=nvjpeg)
        if codec == "mjpeg"
        else VideoGraph(crop_size=crop_size, views_per_clip=views_per_clip, decoder="mixed")
    )
    return GraphBackend(graph, name=NAME, num_frames=num_frames, threads=threads, stats=stats, place=OnGpu(device))
