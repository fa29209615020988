"""Is it data or compute? The loader alone, the consumer alone on one batch again and again, and both together."""

import time

import torch

from ca2st.batch import ClipBatch
from pipelines.benchmark.case import Consumer, OwnCase
from pipelines.benchmark.report import Headspace
from pipelines.loader import TrainLoader

NORMALISE = "normalise: to the device, as the normalised float frames that the experts read"


def normalise(batch: ClipBatch) -> None:
    """What every step does with a batch first, on the GPU where there is one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch.to(device).normalised_video()
    if device.type == "cuda":
        torch.cuda.synchronize()


def measure_headspace(
    loader: TrainLoader, consumer: Consumer, *, name: str, loader_clips_per_second: float, seconds: float
) -> Headspace:
    """Measure the consumer alone and behind the loader, each for about `seconds`.

    `loader_clips_per_second` is the loader's rate with nobody behind it, measured already.
    """
    alone = _alone(loader, consumer, seconds)
    together = OwnCase(loader, consumer=consumer).turn(seconds)
    return Headspace(
        consumer=name,
        loader_clips_per_second=loader_clips_per_second,
        consumer_clips_per_second=alone,
        together_clips_per_second=together.clips_per_second,
        data_wait_fraction=together.stage_seconds["wait"] / together.seconds,
        limited_by="data" if loader_clips_per_second < alone else "compute",
    )


def _alone(loader: TrainLoader, consumer: Consumer, seconds: float) -> float:
    batches = loader.batches(0)
    batch = next(batches)
    batches.close()  # type: ignore[attr-defined]  # a generator: its threads must not run beside what is measured
    consumer(batch)  # the first one warms up
    begin, clips = time.perf_counter(), 0
    while time.perf_counter() - begin < seconds or not clips:
        consumer(batch)
        clips += batch.num_clips
    return clips / (time.perf_counter() - begin)
