"""Clips a second of a device's graphs, from bytes in memory: by codec, distance of key frames, and threads."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ca2st.spec import ClipSpec
from pipelines.hardware.clips import StoredClip, backend_on, training_requests
from pipelines.stats import StatsRecorder
from sharding.codecs import stored_codec


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


@dataclass(frozen=True, kw_only=True, slots=True)
class SpeedReport:
    """What it gave."""

    case: SpeedCase
    backend: str
    """Name of the backend that was measured."""
    clips_per_second: float
    """By wall time, without reading of shards."""
    decode_ms: float
    """Milliseconds a clip until the last run's pixels are asked for: decoding, and what goes on beside it."""
    augment_ms: float
    """Milliseconds a clip until the views are finished, behind that."""
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
    """Every codec at each distance of key frames and at each number of threads, the other as usual; then augmented."""
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
        cases.append(SpeedCase(codec=codec, num_gop_frames=usual, threads=usual_threads, rand_augment=True))
    return cases
