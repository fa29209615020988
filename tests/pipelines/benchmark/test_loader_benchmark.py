"""The turns, what is made of them, and one small benchmark of everything with its baseline in this process."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from ca2st.batch import ClipBatch
from ca2st.errors import UserInputError
from ca2st.spec import ClipSpec
from pipelines.benchmark import loader
from pipelines.benchmark.clips import BaselineConfig, source_list, video_files
from pipelines.benchmark.loader import (
    BaselineCase,
    LoaderBenchConfig,
    LoaderBenchmark,
    Turn,
    benchmark_loader,
    footprint_of_baseline,
    footprint_of_ours,
    take_turns,
)
from sharding.format.shard_set import ShardSet
from support.media import Sound, make_clip

SMALL = LoaderBenchConfig(
    seconds=0.02,
    rounds=2,
    batch_size=4,
    threads=1,
    backend="reference",
    clip=ClipSpec(num_frames=8, crop_size=32),
    footprint=False,
)


class FakeCase:
    def __init__(self, name: str, log: list[str], rates: Sequence[float]) -> None:
        self._name, self._log, self._rates = name, log, iter(rates)

    def turn(self, seconds: float) -> Turn:
        self._log.append(f"{self._name} {seconds:g}")
        rate = next(self._rates)
        return Turn(clips=10, seconds=10 / rate, processor_seconds=5.0, stage_seconds={"decode": 0.5}, bytes_read=1000)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    folder = tmp_path_factory.mktemp("originals")
    return tuple(make_clip(folder / f"{n}.mp4", seconds=0.5, sound=Sound(seconds=0.5)) for n in range(2))


@pytest.fixture(scope="module")
def small(intact_set: ShardSet, files: tuple[Path, ...]) -> Iterator[LoaderBenchmark]:
    def in_this_process(files: Sequence[Path], config: BaselineConfig) -> BaselineCase:
        return BaselineCase(files, replace(config, num_workers=0))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loader, "BaselineCase", in_this_process)
        yield benchmark_loader(SMALL, intact_set, files)


def test_variants_take_turns_after_a_first_pass_that_does_not_count() -> None:
    log: list[str] = []
    cases = {"ours": FakeCase("ours", log, [1, 20, 30]), "pyav": FakeCase("theirs", log, [1, 10, 5])}
    turns = take_turns(cases, rounds=2, seconds=3.0)  # type: ignore[arg-type]
    assert log == ["ours 0", "theirs 0", *["ours 3", "theirs 3"] * 2]
    assert [turn.clips_per_second for turn in turns["ours"]] == pytest.approx([20, 30])


def test_the_report_holds_medians_ratios_round_by_round_and_times_a_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    monkeypatch.setattr(loader, "BaselineCase", lambda *_: FakeCase("theirs", log, [1, 10, 5]))
    ours = FakeCase("ours", log, [1, 20, 30])
    report = loader._split_report(SMALL, ours, [], ["pyav"], training=True)
    assert (report.clips_per_second, report.baseline_clips_per_second) == pytest.approx((25, 7.5))
    assert report.ratio is not None
    assert (report.ratio.lowest, report.ratio.median, report.ratio.highest) == pytest.approx((2, 4, 6))
    assert report.stages == {"decode_ms": 50.0}
    assert (report.processor_ms_per_clip, report.bytes_per_clip) == (500, 100)


def test_a_whole_benchmark_measures_both_loaders_their_stages_and_headspace(small: LoaderBenchmark) -> None:
    for report in (small.train, small.validation):
        assert report.clips_per_second > 0
        assert report.baseline_clips_per_second is not None
        assert {"fetch_ms", "checksum_ms", "decode_ms", "augment_ms", "wait_ms"} <= set(report.stages)
        assert report.stages["decode_ms"] > 0
        assert set(report.baseline_stages or ()) == {"decode_ms", "augment_ms", "transform_ms"}
        assert report.bytes_per_clip > 1000
        assert report.rounds.count == 2
        assert (report.torchcodec is None) is (small.torchcodec_missing is not None)
        if report.torchcodec is not None:
            assert report.torchcodec.clips_per_second > 0
            assert report.torchcodec.ratio.count == 2
    assert small.headspace.loader_clips_per_second == small.train.clips_per_second
    assert 0 <= small.headspace.data_wait_fraction <= 1
    assert small.headspace.limited_by in ("data", "compute")
    assert (small.backend, small.num_clips, small.codec) == ("reference", 27, "mjpeg")


@pytest.mark.slow
def test_memory_and_start_of_ours_and_of_a_baseline_with_a_worker(
    intact_set: ShardSet, files: tuple[Path, ...]
) -> None:
    ours = footprint_of_ours(SMALL, intact_set)
    theirs = footprint_of_baseline(files, loader._baseline_config(SMALL, "pyav", training=True))
    assert (ours.num_workers, ours.worker_bytes, theirs.num_workers) == (0, 0, 1)
    for found in (ours, theirs):
        assert found.first_batch_seconds > 0
        assert found.process_bytes > 100e6  # torch alone takes more
    assert 100e6 < theirs.worker_bytes < theirs.process_bytes * 2


def test_a_slow_consumer_is_found_to_be_the_limit(intact_set: ShardSet) -> None:
    import time

    config = replace(SMALL, baseline=False, rand_augment=False)
    consumed: list[int] = []

    def slow(batch: ClipBatch) -> None:
        consumed.append(batch.num_clips)
        time.sleep(0.2)

    report = benchmark_loader(config, intact_set, [], consumer=slow, consumer_name="slow")
    assert report.headspace.limited_by == "compute"
    assert report.headspace.consumer_clips_per_second < 4 / 0.2
    assert (report.train.ratio, report.train.baseline_clips_per_second) == (None, None)
    assert set(consumed) == {4}


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"seconds": 0.0}, "seconds: expected a finite number > 0"),
        ({"batch_size": 0}, "batch_size: expected at least 1"),
    ],
)
def test_settings_that_measure_nothing_are_refused(values: dict[str, object], told: str) -> None:
    with pytest.raises(UserInputError, match=told):
        LoaderBenchConfig(**values)  # type: ignore[arg-type]


def test_a_folder_without_videos_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("none")
    with pytest.raises(UserInputError, match="expected video files, found none"):
        video_files(tmp_path)


def test_files_become_samples_of_two_classes(files: tuple[Path, ...]) -> None:
    source = source_list(files)
    assert [sample.labels for sample in source.samples] == [(0,), (1,)]
    assert video_files(files[0].parent) == files
