"""``ca2st bench loader``: what it prints and how it refuses."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from pipelines.benchmark import loader
from pipelines.benchmark.clips import BaselineConfig
from pipelines.benchmark.loader import BaselineCase
from support.commands import Command
from support.fake_shards import make_samples, make_shard_set
from support.media import Sound, make_clip


@pytest.fixture
def bench(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    def in_this_process(files: Sequence[Path], config: BaselineConfig) -> BaselineCase:
        return BaselineCase(files, replace(config, num_workers=0))

    monkeypatch.setattr(loader, "BaselineCase", in_this_process)
    return Command(capsys, monkeypatch, "bench")


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("originals")
    for number in range(2):
        make_clip(folder / f"{number}.mp4", seconds=0.6, sound=Sound(seconds=0.6))
    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shard_set(tmp_path_factory.mktemp("shards"), make_samples(4)).root


@pytest.mark.slow
def test_json_and_file_hold_both_loaders_beside_the_baseline(
    bench: Command, shards: Path, originals: Path, tmp_path: Path
) -> None:
    out_file = tmp_path / "report.json"
    quick = ("--seconds", 0.01, "--rounds", 1, "--batch", 2, "--threads", 1)
    code, out, err = bench("loader", *quick, "--data", shards, "--media", originals, "--out", out_file, "--json")
    assert code == 0, err
    facts = json.loads(out)
    assert facts == json.loads(out_file.read_text())
    for split in ("train", "validation"):
        assert facts[split]["clips_per_second"] > 0
        assert facts[split]["baseline_clips_per_second"] > 0
        assert {"fetch_ms", "checksum_ms", "decode_ms", "augment_ms", "wait_ms"} <= set(facts[split]["stages"])
        assert facts[split]["ratio"]["median"] > 0
    assert facts["headspace"]["limited_by"] in ("data", "compute")
    assert facts["command"].startswith("ca2st bench loader --seconds 0.01")
    assert facts["date"].endswith("Z")
    assert {"torch", "nvidia-dali-cuda130", "av", "timm", "torchvision"} <= set(facts["versions"])
    assert facts["machine"]["num_cores"] >= 1


def test_without_json_a_person_reads_rates_stages_and_the_limit(bench: Command, shards: Path, originals: Path) -> None:
    quick = ("--seconds", 0.01, "--rounds", 1, "--batch", 2, "--no-rand-augment", "--no-baseline")
    code, out, err = bench("loader", *quick, "--data", shards, "--media", originals)
    assert code == 0, err
    assert "train" in out
    assert "decode" in out
    assert "is the limit: loader alone" in out
    assert "baseline" not in out


def test_help_has_an_example(bench: Command) -> None:
    code, out, _ = bench("loader", "--help")
    assert code == 0
    assert "Example: ca2st bench loader" in " ".join(out.split())


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("loader", "--data", "shards"), "--data: expected --media too"),
        (("loader", "--seconds", 0), "seconds: expected a finite number > 0"),
        (("loader", "--batch", 1), "Invalid value for '--batch'"),
        (("loader", "--media", "."), "expected video files, found none"),
        (("loader", "--out", "nowhere/report.json"), "found no nowhere"),
        (("loader", "--codec", "mjpg"), "codec: expected one of"),
        (("loader", "--out", "."), "--out: expected the name of a file, found the folder ."),
    ],
)
def test_bad_input_is_told_before_anything_is_measured(
    bench: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[object, ...], told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = bench(*arguments)
    assert (code, out) == (2, "")
    assert told in err
    assert list(tmp_path.iterdir()) == []
