"""What a fed training step's time is made of, by a clock of the test's own."""

from collections.abc import Iterator

import pytest
import torch

from benchmarks import feeding
from benchmarks.feeding import FedConfig, drawn_shards, measure_fed
from ca2st.batch import ClipBatch
from ca2st.spec import ClipSpec
from pipelines.benchmark.clips import DrawnClips
from pipelines.loader import TrainLoader
from sharding.format.shard_set import ShardSet

CLIP = ClipSpec(num_frames=4, crop_size=32, mel_rows=32, num_mel_bins=16)


@pytest.fixture(scope="module")
def shard_set(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    drawn = DrawnClips(count=3, width=64, height=48, num_frames=12)
    return drawn_shards(drawn, tmp_path_factory.mktemp("fed"), codec="mjpeg", clip=CLIP, gop=4, workers=1)


class Clock:
    """Tells the seconds that somebody has spent."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


def test_drawn_clips_become_a_set_in_the_codec_asked_for(shard_set: ShardSet) -> None:
    assert (shard_set.manifest.num_samples, shard_set.manifest.video.codec) == (3, "mjpeg")
    assert shard_set.manifest.audio.num_mel_bins == CLIP.num_mel_bins


def test_what_is_waited_for_is_a_part_of_the_fed_time_and_none_of_the_time_alone(
    shard_set: ShardSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, taken = Clock(), list[ClipBatch]()
    monkeypatch.setattr(feeding, "time", clock)
    batches_of = TrainLoader.batches

    def slow(self: TrainLoader, epoch: int, first_step: int = 0) -> Iterator[ClipBatch]:
        for batch in batches_of(self, epoch, first_step):
            clock.now += 1.0
            self._stats.add("wait_seconds", 1.0)
            yield batch

    def consume(batch: ClipBatch) -> None:
        clock.now += 3.0
        taken.append(batch)

    monkeypatch.setattr(TrainLoader, "batches", slow)
    monkeypatch.setattr(TrainLoader, "_counted", lambda _, source: source)
    config = FedConfig(clip=CLIP, batch=2, seconds=14.0, device=torch.device("cpu"))
    report = measure_fed(shard_set, consume, config, consumer="a step")
    assert (report.codec, report.backend, report.consumer) == ("mjpeg", "dali", "a step")
    assert (report.num_steps, report.data_wait_fraction) == (4, 0.25)
    assert report.clips_per_second == pytest.approx(2 / 4)
    assert report.alone_clips_per_second == pytest.approx(2 / 3)
    assert len({id(batch) for batch in taken[-5:]}) == 1


def test_at_least_two_steps_are_measured_however_slow_they_are(
    shard_set: ShardSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(feeding, "time", clock)

    def consume(_: ClipBatch) -> None:
        clock.now += 100.0

    config = FedConfig(clip=CLIP, batch=2, seconds=1.0, device=torch.device("cpu"))
    report = measure_fed(shard_set, consume, config, consumer="a step")
    assert report.num_steps == 2
    assert report.alone_clips_per_second == pytest.approx(2 / 100)
