"""What is measured, part by part; every part gives its rows as it finds them."""

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ca2st.benchmark.case import Case, CaseSpec, LocalCase
from ca2st.benchmark.config import ModelBenchConfig
from ca2st.benchmark.copies import measure_copies
from ca2st.benchmark.limits import Limit, measure_limit
from ca2st.benchmark.machine import machine
from ca2st.benchmark.model import benchmark_models
from pipelines.cuda_decoders import cuda_decoders
from pipelines.hardware.clips import StoredClip, stored_clips
from pipelines.hardware.damage import try_damages
from pipelines.hardware.parity import augment_parity, codec_parity, resize_parity
from pipelines.hardware.speed import measure_speed, speed_cases
from ray_jobs.gpu_check.settings import GpuCheckSettings, PartName
from sharding.codecs import stored_codec

Row = dict[str, Any]


def _device_rows(settings: GpuCheckSettings) -> Iterator[Row]:
    """The device, and what its video engines say of themselves."""
    yield asdict(machine(settings.device))
    if settings.is_dry:
        return
    device = torch.device("cuda")
    properties = torch.cuda.get_device_properties(device)
    yield {
        "memory_bytes": properties.total_memory,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
    }
    decoders = cuda_decoders(device)
    assert decoders is not None
    yield {"missing": decoders.missing, "decoders": {name: asdict(one) for name, one in decoders.video.items()}}


def _limit_rows(settings: GpuCheckSettings) -> Iterator[Row]:
    device = torch.device(settings.device)
    yield asdict(measure_copies(device, num_bytes=settings.copy_bytes))
    yield asdict(measure_limit(device, "fp32" if settings.is_dry else "bf16", size=settings.product_size))


def _clips(settings: GpuCheckSettings, codec: str, gop: int | None) -> list[StoredClip]:
    return stored_clips(codec, settings.drawn, num_gop_frames=gop, threads=settings.encoding_threads)


def _parity_rows(settings: GpuCheckSettings) -> Iterator[Row]:
    device, clips = torch.device(settings.device), list[StoredClip]()
    for codec in settings.codecs:
        clips = _clips(settings, codec, settings.usual_gop)
        for row in codec_parity(clips, settings.clip, device, threads=settings.usual_threads):
            yield asdict(row)
    yield asdict(resize_parity(clips, settings.clip, device))
    for row in augment_parity(clips, settings.clip, device):
        yield asdict(row)


def _speed_rows(settings: GpuCheckSettings) -> Iterator[Row]:
    device, stored = torch.device(settings.device), dict[tuple[str, int | None], list[StoredClip]]()
    cases = speed_cases(
        settings.codecs,
        gops=settings.gops,
        threads=settings.threads,
        usual_gop=settings.usual_gop,
        usual_threads=settings.usual_threads,
    )
    for case in cases:
        key = (case.codec, case.num_gop_frames)
        if key not in stored:
            stored[key] = _clips(settings, *key)
        report = measure_speed(
            case, stored[key], settings.clip, device, batch=settings.batch, seconds=settings.seconds_per_case
        )
        yield asdict(report)


def _damage_rows(settings: GpuCheckSettings) -> Iterator[Row]:
    with tempfile.TemporaryDirectory(prefix="ca2st-damage-") as folder:
        for codec in (name for name in settings.codecs if not stored_codec(name).has_frame_ranges):
            clip = _clips(settings, codec, settings.usual_gop)[0]
            trials = try_damages(
                clip,
                settings.clip,
                Path(folder),
                device=settings.device,
                damages=settings.damages,
                seconds=settings.damage_seconds,
                at_once=settings.damages_at_once,
            )
            for trial in trials:
                yield asdict(trial) | {"is_sound": trial.is_sound}


def _model_rows(settings: GpuCheckSettings) -> Iterator[Row]:
    """One benchmark a model, and at last the first one compiled, which is slow to start."""
    variants = [(name, False) for name in settings.models]
    if not settings.is_dry:
        variants.append((settings.models[0], True))
    for name, compiled in variants:
        config = ModelBenchConfig(
            models=(name,),
            size=settings.model_size,
            num_layers=settings.num_layers,
            per_device_batch_size=settings.model_batch,
            rounds=2 if settings.model_seconds is None else None,
            seconds=settings.model_seconds,
            device=settings.device,
            compiled=compiled,
            baseline=not compiled,
            clip=settings.clip,
        )
        yield asdict(benchmark_models(config, start_case=_small_case if settings.is_dry else None))


@contextlib.contextmanager
def _small_case(spec: CaseSpec) -> Iterator[Case]:
    yield _SmallCase(spec)


class _SmallCase(LocalCase):
    """A case in this process that does not measure the device's limit in earnest."""

    def limit(self) -> Limit:
        """The rate of a small product."""
        return measure_limit(torch.device("cpu"), "fp32", size=128)


PARTS: dict[PartName, Callable[[GpuCheckSettings], Iterator[Row]]] = {
    "device": _device_rows,
    "limits": _limit_rows,
    "parity": _parity_rows,
    "speed": _speed_rows,
    "damage": _damage_rows,
    "model": _model_rows,
}
"""In the order in which they are run."""
