"""Parity and speed of the GPU graphs, on drawn clips in memory, stored as the converter stores them.

The graphs of a device against the reference, stage by stage: how far pixels lie apart, and how far they may.

decode    a box of the crop's own size, so that nothing is resized
resize    pictures that are decoded already, through the graph's resize alone: no decoder's differences in it
pointwise, warp    the reference's views, augmented on the device
whole     everything together

Speed is clips per second of a device's graphs, from bytes in memory: by codec, distance of key frames, and threads.
"""

import math
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import accumulate, pairwise
from typing import Any, Literal

import av
import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from ca2st.spec import ClipSpec
from pipelines.augment.boxes import CropBox
from pipelines.augment.config import AugmentConfig
from pipelines.augment.formulas import augmented
from pipelines.augment.fused import finish_view
from pipelines.augment.rand_augment import GEOMETRIC, ImageAugment, Operation
from pipelines.benchmark.clips import DrawnClips, drawn_frames
from pipelines.decode.backends import make_backend
from pipelines.decode.reference import ReferenceBackend, decode_frames
from pipelines.decode.resizing import resized_crop
from pipelines.rendering import ClipFrames, JpegFrames, RenderRequest, VideoMember, ViewBackend
from pipelines.threads import StatsRecorder
from pipelines.views import ClipFacts, SamplingConfig, TrainDraws
from sharding.format.shard_set import VideoParameters
from sharding.media.codecs import stored_codec
from sharding.media.encode import ClipEncoder, EncodedVideo
from sharding.media.picture import PictureMaker
from sharding.media.video import TimedFrame

RAND_AUGMENT = "rand-m7-n4-mstd0.5-inc1"
"""As published."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredClip:
    """A clip as a shard holds it."""

    key: str
    codec: str
    num_gop_frames: int | None
    video: EncodedVideo

    def frames(self, indices: tuple[int, ...]) -> ClipFrames:
        """Return what a reader gets for these frames."""
        if not stored_codec(self.codec).has_frame_ranges:
            return VideoMember(self.video.mp4, self.codec, indices)
        edges = list(accumulate(self.video.frame_bytes, initial=self.video.frame_data_offset))
        jpegs = [self.video.mp4[begin:end] for begin, end in pairwise(edges)]
        return JpegFrames(tuple(jpegs[index] for index in indices))


def stored_clips(codec: str, drawn: DrawnClips, *, num_gop_frames: int | None, threads: int) -> list[StoredClip]:
    """Return drawn clips in a codec at its default quality; encoders work on `threads` threads, a clip each."""
    gop = None if stored_codec(codec).has_frame_ranges else num_gop_frames

    def one(seed: int) -> StoredClip:
        return StoredClip(key=f"drawn-{seed}", codec=codec, num_gop_frames=gop, video=_encoded(codec, drawn, seed, gop))

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(one, range(drawn.count)))


def _encoded(codec: str, drawn: DrawnClips, seed: int, gop: int | None) -> EncodedVideo:
    side, quality = min(drawn.width, drawn.height), stored_codec(codec).default_quality
    video = VideoParameters(codec=codec, short_side=side, quality=quality, num_gop_frames=gop)
    encoder = ClipEncoder(video, PictureMaker(video))
    step = Fraction(1, drawn.frames_per_second)
    for number, frame in enumerate(drawn_frames(drawn, seed=seed)):
        picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
        encoder.add(TimedFrame(picture=picture, seconds=number * step, duration=step))
    return encoder.finish()


def training_requests(
    clips: Sequence[StoredClip], spec: ClipSpec, *, count: int, rand_augment: bool
) -> list[RenderRequest]:
    """`count` training views of the clips, taking turns: random crop and flip, and RandAugment as published."""
    augment = AugmentConfig(rand_augment=RAND_AUGMENT if rand_augment else None)
    draws = TrainDraws(clip=spec, sampling=SamplingConfig(), augment=augment, seed=0, epoch=0)
    requests = []
    for number in range(count):
        clip = clips[number % len(clips)]
        ticks = np.arange(len(clip.video.frame_ticks), dtype=np.int32) * 3000  # 30 frames per second
        facts = ClipFacts(key=clip.key, frame_ticks=ticks, mel_rows=spec.mel_rows)
        (view,) = draws.views(facts, repeat=number // len(clips))
        requests.append(
            RenderRequest(
                frames=clip.frames(view.frame_indices),
                boxes=(view.crop.box(height=clip.video.height, width=clip.video.width),),
                flip=view.flip,
                augment=view.augment,
                where=f"drawn clip {clip.key} in {clip.codec}",
            )
        )
    return requests


def plain(request: RenderRequest) -> RenderRequest:
    """Return the same clip without flip, RandAugment and erasing."""
    return replace(request, flip=False, augment=None, erased=())


def backend_on(
    device: torch.device, codec: str, spec: ClipSpec, *, threads: int, stats: StatsRecorder | None = None
) -> ViewBackend:
    """Return what a loader would take for `codec` on `device`."""
    return make_backend(
        "auto",
        codecs=(codec,),
        num_frames=spec.num_frames,
        crop_size=spec.crop_size,
        views_per_clip=1,
        threads=threads,
        stats=stats or StatsRecorder(),
        device=device,
    )


Stage = Literal["decode", "resize", "pointwise", "warp", "whole"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Tolerance:
    """How far a stage may lie from the reference."""

    most_levels: int | None = None
    """Largest difference of a value of 0..255; None: any."""
    least_psnr_db: float | None = None
    """Smallest ratio of the peak to the noise; None: any."""

    def allows(self, levels: int, psnr_db: float | None) -> bool:
        """Return whether a largest difference and a ratio (None: no noise) are within."""
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
    """Return the distance of two tensors, judged by the stage's tolerance."""
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
    """Compare RandAugment of the reference's views on the device: operations that move no pixel, and those that do."""
    requests = training_requests(clips, spec, count=4 * len(clips), rand_augment=True)
    operations = [op for one in requests if one.augment is not None for op in one.augment.operations]
    views = ReferenceBackend(crop_size=spec.crop_size, stats=StatsRecorder()).render(
        [replace(requests[0], flip=False, augment=None)]
    )
    kinds: dict[Stage, list[Operation]] = {"pointwise": [], "warp": []}
    for operation in operations:
        kinds["warp" if operation.name in GEOMETRIC else "pointwise"].append(operation)
    return [_operation_parity(stage, kind, views[0], device) for stage, kind in kinds.items() if kind]


def _operation_parity(
    stage: Stage,
    operations: Sequence[Operation],
    view: UInt8[Tensor, "3 time size size"],
    device: torch.device,
) -> StageParity:
    ours, oracle = [], []
    for operation in dict.fromkeys(operations):
        augment = ImageAugment((operation,))
        own = view.clone().to(device)
        finish_view(own, augment, ())
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
    from pipelines.decode import dali
    from pipelines.decode.dali import as_torch

    on_gpu = device.type == "cuda"
    pipeline = dali.Pipeline(
        batch_size=len(clips), num_threads=1, device_id=(device.index or 0) if on_gpu else None, prefetch_queue_depth=1
    )
    with pipeline:
        pictures = dali.fn.external_source(name="clips", dtype=dali.types.UINT8, ndim=4, layout="FHWC")
        sources = dali.box_sources(1)
        crops = dali.crops_resized(pictures.gpu() if on_gpu else pictures, sources, size)
        pipeline.set_outputs(*crops)
    pipeline.build()
    pipeline.feed_input("clips", [np.ascontiguousarray(clip) for clip in clips])
    corners = [np.array([box.top, box.left, box.height, box.width], np.int32) for box in boxes]
    pipeline.feed_input("boxes_0", corners)
    (output,) = pipeline.run()
    return as_torch(output).cpu().clone().permute(0, 1, 4, 2, 3)


@dataclass(frozen=True, kw_only=True, slots=True)
class SpeedCase:
    """What is measured."""

    codec: str
    num_gop_frames: int | None
    """Frames from key frame to key frame; None: every frame stands alone."""
    threads: int
    """Threads that feed the decoders: of a GPU's video engines one each, others wait."""
    rand_augment: bool
    """With RandAugment as published, or crop, resize and flip alone."""
    is_uneven: bool = False
    """Pictures whose width is no multiple of 16, as older sets have them: does the device reuse its decoders?"""


@dataclass(frozen=True, kw_only=True, slots=True)
class SpeedReport:
    """What it gave."""

    case: SpeedCase
    backend: str
    """Name of the backend that was measured."""
    clips_per_second: float
    """By wall time, without reading of shards."""
    decode_ms: float
    """Milliseconds per clip until the last run's pixels are asked for: decoding, and what goes on beside it."""
    augment_ms: float
    """Milliseconds per clip until the views are finished, behind that."""
    num_clips: int
    """Clips that were rendered."""


def measure_speed(
    case: SpeedCase, clips: Sequence[StoredClip], spec: ClipSpec, device: torch.device, *, batch: int, seconds: float
) -> SpeedReport:
    """Render batches of `batch` clips for at least `seconds`, after one that warms up and is not counted."""
    stats = StatsRecorder()
    requests = training_requests(clips, spec, count=batch, rand_augment=case.rand_augment)
    backend = backend_on(device, case.codec, spec, threads=case.threads, stats=stats)
    try:
        backend.render(requests)
        before, begin, done = stats.snapshot(), time.perf_counter(), 0
        while time.perf_counter() - begin < seconds or not done:
            backend.render(requests)
            done += len(requests)
        passed, spent = time.perf_counter() - begin, stats.snapshot() - before
    finally:
        backend.close()
    return SpeedReport(
        case=case,
        backend=backend.name,
        clips_per_second=done / passed,
        decode_ms=1000 * spent.decode_seconds / done,
        augment_ms=1000 * spent.augment_seconds / done,
        num_clips=done,
    )


def speed_cases(
    codecs: Sequence[str], *, gops: Sequence[int], threads: Sequence[int], usual_gop: int, usual_threads: int
) -> list[SpeedCase]:
    """Return a case per distance of key frames and per number of threads, the other as usual.

    Then one of uneven pictures for every video codec, and one augmented.
    """
    cases = []
    for codec in codecs:
        has_gops = not stored_codec(codec).has_frame_ranges
        of_codec: list[int | None] = [*gops] if has_gops else [None]
        usual = usual_gop if has_gops else None
        pairs = [(gop, usual_threads) for gop in of_codec] + [(usual, count) for count in threads]
        cases += [
            SpeedCase(codec=codec, num_gop_frames=gop, threads=count, rand_augment=False)
            for gop, count in dict.fromkeys(pairs)
        ]
        last = SpeedCase(codec=codec, num_gop_frames=usual, threads=usual_threads, rand_augment=True)
        cases += [replace(last, rand_augment=False, is_uneven=True), last] if has_gops else [last]
    return cases
