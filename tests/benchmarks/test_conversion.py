"""``make bench-convert``: what it measures, prints and refuses."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import conversion
from benchmarks.conversion import app, benchmark_conversion
from ray_jobs.cli import main
from sharding.settings import ConversionConfig
from support.media import Sound, make_clip


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    folder = tmp_path_factory.mktemp("originals")
    paths = tuple(folder / f"{number}.mp4" for number in range(2))
    for path in paths:
        make_clip(path, seconds=0.6, sound=Sound(seconds=0.6))
    return paths


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["conversion", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main(app)
    return int(ended.value.code or 0)


def test_conversion_is_measured_in_three_ways_and_leaves_nothing(
    files: tuple[Path, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ways: list[int] = []
    convert: Callable[..., object] = conversion.convert

    def counted(source: object, out: Path, config: ConversionConfig) -> object:
        ways.append(config.workers)
        return convert(source, out, config)

    monkeypatch.setattr(conversion, "convert", counted)
    config = ConversionConfig(workers=2, audio_policy="optional")
    report = benchmark_conversion(config, files, tmp_path, rounds=1)
    assert ways == [2, 1]
    assert min(report.clips_per_second, report.one_worker_clips_per_second, report.baseline_clips_per_second) > 0
    assert report.ratio == pytest.approx(report.clips_per_second / report.baseline_clips_per_second)
    assert min(report.shard_bytes_per_clip, report.baseline_bytes_per_clip) > 1000
    assert list(tmp_path.iterdir()) == []


def test_both_rates_are_printed_with_the_command_and_nothing_is_kept(
    files: tuple[Path, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ("--media", files[0].parent, "--rounds", 1, "--work", tmp_path / "work", "--json")
    assert run(monkeypatch, *asked) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["clips_per_second"] > 0
    assert facts["baseline_clips_per_second"] > 0
    assert (facts["num_clips"], facts["codec"]) == (2, "mjpeg")
    assert facts["command"].startswith("make bench-convert ARGS='--media ")
    assert list((tmp_path / "work").iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--codec", "mjpg"), "codec: expected one of mjpeg, h264, hevc, vp9, found 'mjpg'"),
        (("--out", "."), "--out: expected the name of a file, found the folder ."),
    ],
)
def test_bad_input_is_reported_before_anything_is_measured(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[object, ...],
    told: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, *arguments) == 2
    assert told in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
