"""The graphs of a device against the reference, stage by stage: how far pixels lie apart, and how far they may.

decode    a box of the crop's own size, so that nothing is resized
resize    pictures that are decoded already, through the graph's resize alone: no decoder's differences in it
pointwise, warp    the reference's views, augmented on the device
whole     everything together
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from ca2st.spec import ClipSpec
from pipelines.augment.finishing import finish_view
from pipelines.augment.operations import GEOMETRIC, ImageAugment, Operation
from pipelines.augment.pointwise import augmented
from pipelines.crops import CropBox
from pipelines.hardware.clips import StoredClip, backend_on, training_requests
from pipelines.reference import ReferenceBackend, decode_frames, resized_crop
from pipelines.rendering import RenderRequest
from pipelines.stats import StatsRecorder

Stage = Literal["decode", "resize", "pointwise", "warp", "whole"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Tolerance:
    """How far a stage may lie from the reference."""

    most_levels: int | None = None
    """Largest difference of a value of 0..255; None: any."""
    least_psnr_db: float | None = None
    """Smallest ratio of the peak to the noise; None: any."""

    def allows(self, levels: int, psnr_db: float | None) -> bool:
        """Whether a largest difference and a ratio (None: no noise) are within."""
        return (self.most_levels is None or levels <= self.most_levels) and (
            self.least_psnr_db is None or psnr_db is None or psnr_db >= self.least_psnr_db
        )


TOLERANCES: dict[Stage, Tolerance | None] = {
    "decode": Tolerance(most_levels=0),
    "resize": Tolerance(least_psnr_db=60.0),
    "pointwise": Tolerance(most_levels=2),
    "warp": Tolerance(least_psnr_db=60.0),
    "whole": None,
}
"""The design's; None: reported, not judged, since it follows from the others."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StageParity:
    """One stage of one codec."""

    codec: str
    """Codec, or ``any`` for stages behind the decoder."""
    stage: Stage
    max_levels: int
    """Largest difference."""
    mean_levels: float
    """Mean of the absolute differences."""
    psnr_db: float | None
    """None: no difference at all."""
    is_within: bool | None
    """Whether it is within the tolerance; None: there is none."""


def compare(codec: str, stage: Stage, ours: UInt8[Tensor, "*shape"], oracle: UInt8[Tensor, "*shape"]) -> StageParity:
    """The distance of two tensors, judged by the stage's tolerance."""
    difference = (ours.cpu().int() - oracle.cpu().int()).abs()
    noise = difference.double().square().mean().item()
    psnr, most, tolerance = (
        (10 * math.log10(255**2 / noise) if noise else None),
        int(difference.max()),
        TOLERANCES[stage],
    )
    within = None if tolerance is None else tolerance.allows(most, psnr)
    return StageParity(
        codec=codec,
        stage=stage,
        max_levels=most,
        mean_levels=difference.double().mean().item(),
        psnr_db=psnr,
        is_within=within,
    )


def codec_parity(
    clips: Sequence[StoredClip], spec: ClipSpec, device: torch.device, *, threads: int
) -> list[StageParity]:
    """Decoding of the clips' codec, and everything together."""
    codec, oracle = clips[0].codec, ReferenceBackend(crop_size=spec.crop_size, stats=StatsRecorder())
    requests = training_requests(clips, spec, count=len(clips), rand_augment=True)
    side = spec.crop_size
    corners = [replace(one, boxes=(CropBox(top=0, left=0, height=side, width=side),)) for one in requests]
    unchanged = [replace(one, flip=False, augment=None) for one in corners]
    backend = backend_on(device, codec, spec, threads=threads)
    try:
        decoded = compare(codec, "decode", backend.render(unchanged), oracle.render(unchanged))
        whole = compare(codec, "whole", backend.render(requests), oracle.render(requests))
    finally:
        backend.close()
    return [decoded, whole]


def augment_parity(clips: Sequence[StoredClip], spec: ClipSpec, device: torch.device) -> list[StageParity]:
    """RandAugment of the reference's views on the device: operations that move no pixel, and those that do."""
    requests = training_requests(clips, spec, count=4 * len(clips), rand_augment=True)
    operations = [op for one in requests if one.augment is not None for op in one.augment.operations]
    views = ReferenceBackend(crop_size=spec.crop_size, stats=StatsRecorder()).render(
        [replace(requests[0], flip=False, augment=None)]
    )
    kinds: dict[Stage, list[Operation]] = {"pointwise": [], "warp": []}
    for operation in operations:
        kinds["warp" if operation.name in GEOMETRIC else "pointwise"].append(operation)
    return [_operation_parity(stage, kind, views[0], requests[0], device) for stage, kind in kinds.items() if kind]


def _operation_parity(
    stage: Stage,
    operations: Sequence[Operation],
    view: UInt8[Tensor, "3 time size size"],
    request: RenderRequest,
    device: torch.device,
) -> StageParity:
    ours, oracle = [], []
    for operation in dict.fromkeys(operations):
        augment = ImageAugment((operation,))
        own = view.clone().to(device)
        finish_view(own, replace(request, augment=augment, erased=()))
        ours.append(own.cpu())
        oracle.append(augmented(view, augment))
    return compare("any", stage, torch.stack(ours), torch.stack(oracle))


def resize_parity(clips: Sequence[StoredClip], spec: ClipSpec, device: torch.device) -> StageParity:
    """DALI's resize on the device beside the reference's formula, on the same decoded pictures."""
    requests = training_requests(clips, spec, count=len(clips), rand_augment=False)
    frames = [decode_frames(request) for request in requests]
    boxes = [request.boxes[0] for request in requests]
    oracle = [resized_crop(clip, box, size=spec.crop_size) for clip, box in zip(frames, boxes, strict=True)]
    ours = _dali_resized([clip.permute(0, 2, 3, 1).numpy() for clip in frames], boxes, spec.crop_size, device)
    return compare("any", "resize", ours, torch.stack(oracle))


def _dali_resized(
    clips: Sequence[np.ndarray[Any, np.dtype[np.uint8]]], boxes: Sequence[CropBox], size: int, device: torch.device
) -> UInt8[Tensor, "clip time 3 size size"]:
    from pipelines import dali_engine
    from pipelines.dali_video import as_torch

    on_gpu = device.type == "cuda"
    pipeline = dali_engine.Pipeline(
        batch_size=len(clips), num_threads=1, device_id=(device.index or 0) if on_gpu else None, prefetch_queue_depth=1
    )
    with pipeline:
        pictures = dali_engine.fn.external_source(name="clips", dtype=dali_engine.types.UINT8, ndim=4, layout="FHWC")
        sources = dali_engine.box_sources(1)
        crops = dali_engine.crops_resized(pictures.gpu() if on_gpu else pictures, sources, size)
        pipeline.set_outputs(*crops)
    pipeline.build()
    pipeline.feed_input("clips", [np.ascontiguousarray(clip) for clip in clips])
    corners = [np.array([box.top, box.left, box.height, box.width], np.int32) for box in boxes]
    pipeline.feed_input("boxes_0", corners)
    (output,) = pipeline.run()
    return as_torch(output).cpu().clone().permute(0, 1, 4, 2, 3)
