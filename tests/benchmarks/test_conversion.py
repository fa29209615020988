"""``make bench-convert``: what it measures, prints and refuses."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from benchmarks.conversion import app
from ray_jobs.cli import main
from support.media import Sound, make_clip


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    folder = tmp_path_factory.mktemp("originals")
    paths = tuple(folder / f"{number}.mp4" for number in range(4))
    for path in paths:
        make_clip(path, seconds=0.6, sound=Sound(seconds=0.6))
    return paths


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["conversion", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main(app)
    return int(ended.value.code or 0)


@pytest.mark.slow
def test_each_way_is_measured_and_printed_with_the_command_and_nothing_is_kept(
    files: tuple[Path, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ("--media", files[0].parent, "--rounds", 1, "--workers", 2, "--work", tmp_path / "work", "--json")
    assert run(monkeypatch, *asked) == 0
    facts = json.loads(capsys.readouterr().out)
    ways = facts["ways"]
    assert list(ways) == ["workers", "one worker", *(["ffmpeg"] if shutil.which("ffmpeg") else []), "baseline"]
    for way in ways.values():
        assert min(way["seconds"], way["cpu_seconds"], way["clips_per_second"]) > 0
        assert way["bytes_per_clip"] > 1000
        assert abs(way["seconds_per_further_clip"]) < way["seconds"]
    assert facts["clips_per_second"] == ways["workers"]["clips_per_second"]
    assert facts["baseline_clips_per_second"] == ways["baseline"]["clips_per_second"]
    assert facts["workers_speedup"] == ways["one worker"]["seconds"] / ways["workers"]["seconds"]
    assert (facts["share_of_ffmpeg"] is None) == ("ffmpeg" not in ways)
    one, several = (ways[name]["seconds_per_further_clip"] for name in ("one worker", "workers"))
    assert facts["workers_speedup_per_further_clip"] == one / several
    assert (facts["num_clips"], facts["num_shards"], facts["codec"]) == (4, 4, "mjpeg"), "each worker has two shards"
    assert facts["command"].startswith("make bench-convert ARGS='--media ")
    assert list((tmp_path / "work").iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--codec", "mjpg"), "codec: expected one of mjpeg, h264, hevc, vp9, found 'mjpg'"),
        (("--out", "."), "--out: expected the name of a file, found the folder ."),
        (("--clips", "3"), "expected at least 4 video files, found 3"),
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
