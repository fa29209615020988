"""The synthetic world's files: decodable, reproducible to the byte, resumable."""

import csv
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import pytest

from ca2st.errors import CA2STError, UserInputError
from sharding.datasets import DatasetRequest, SyntheticConfig, read_dataset
from sharding.folder import folder_lock
from sharding.source import SourceList
from sharding.synthetic.clips import draw_frames, make_clip
from support.annotations import touch

SMALL = SyntheticConfig(num_samples=6, frame_size=32, workers=1)


def read(media: Path | None, config: SyntheticConfig = SMALL, **options) -> SourceList:
    return read_dataset("synthetic", DatasetRequest(media=media, synthetic=config, **options))


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_a_split_is_ordinary_files_with_their_annotations(tmp_path: Path) -> None:
    source = read(tmp_path, task="time")
    assert [space.name for space in source.label_spaces] == ["space", "time", "audio", "holistic"]
    assert source.targets == ("time",)
    assert source.num_classes == {"time": 4}
    rows = list(csv.DictReader((tmp_path / "train" / "annotations.csv").read_text(encoding="utf-8").splitlines()))
    assert len(rows) == len(source.samples) == 6
    for row, sample in zip(rows, source.samples, strict=True):
        assert sample.path == tmp_path / "train" / row["path"]
        assert sample.path.is_file()
        names = [space.classes[label] for space, label in zip(source.label_spaces, sample.labels, strict=True)]
        assert names == [row[space.name] for space in source.label_spaces]
    assert source.samples[0].where == f"{tmp_path / 'train' / 'annotations.csv'}:2"
    assert sorted(path.suffix for path in (tmp_path / "train").iterdir()) == [".csv", ".json", *[".mp4"] * 6]


def test_a_binding_split_is_labelled_with_the_keeper_and_with_every_rhythm(tmp_path: Path) -> None:
    source = read(tmp_path, task="binding")
    assert [space.name for space in source.label_spaces] == [
        "binding", "audio", "rhythm", "disc_rhythm", "square_rhythm",
    ]  # fmt: skip
    assert source.num_classes == {"binding": 2}
    rows = list(csv.DictReader((tmp_path / "train" / "annotations.csv").read_text(encoding="utf-8").splitlines()))
    assert [row[f"{row['binding']}_rhythm"] for row in rows] == [row["rhythm"] for row in rows]
    with pytest.raises(UserInputError, match=r"other settings \(binding: True there, None now"):
        read(tmp_path, task="space")


def test_every_clip_decodes_to_what_was_drawn_and_sounded(tmp_path: Path) -> None:
    config = SyntheticConfig(num_samples=8, workers=1)
    for index, sample in enumerate(read(tmp_path, config).samples):
        with av.open(str(sample.path)) as container:
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        with av.open(str(sample.path)) as container:
            sound = np.concatenate([frame.to_ndarray()[0] for frame in container.decode(audio=0)])
            assert container.streams.audio[0].rate == 16_000
        drawn = draw_frames(config, "train", index)
        assert np.shape(frames) == drawn.shape
        error = np.mean((np.stack(frames).astype(float) - drawn) ** 2)
        assert 10 * np.log10(255**2 / error) > 30.0
        assert len(drawn) * 1000 <= len(sound) <= len(drawn) * 1000 + 1024
        assert np.sqrt(np.mean(sound**2)) > 0.01


def test_the_same_sample_is_the_same_bytes_and_another_is_not() -> None:
    for index in range(8):
        assert len({make_clip(SyntheticConfig(), "train", index) for _ in range(4)}) == 1
    others = [("validation", 3, SMALL), ("train", 4, SMALL), ("train", 3, SyntheticConfig(frame_size=32, seed=1))]
    assert len({make_clip(config, split, index) for split, index, config in [("train", 3, SMALL), *others]}) == 4


def test_any_number_of_workers_makes_the_same_files(tmp_path: Path) -> None:
    for workers in (1, 2):
        config = SyntheticConfig(num_samples=36, frame_size=32, max_frames=16, workers=workers, difficulty="hard")
        read(tmp_path / str(workers), config, task="binding")
    made = hashes(tmp_path / "1" / "train")
    assert len(made) == 38
    assert made == hashes(tmp_path / "2" / "train")


def test_a_larger_set_keeps_the_files_of_a_smaller_one(tmp_path: Path) -> None:
    small = read(tmp_path, limit=3)
    times = [sample.path.stat().st_mtime_ns for sample in small.samples]
    assert len(list((tmp_path / "train").glob("*.mp4"))) == 3
    large = read(tmp_path)
    assert large.samples[:3] == small.samples
    assert [sample.path.stat().st_mtime_ns for sample in large.samples[:3]] == times
    assert all(sample.path.is_file() for sample in large.samples)


def test_what_an_interruption_left_is_completed_to_the_same_bytes(tmp_path: Path) -> None:
    read(tmp_path)
    folder, undisturbed = tmp_path / "train", hashes(tmp_path / "train")
    for name in ("train-000002.mp4", "train-000005.mp4", "annotations.csv"):
        (folder / name).unlink()
    (folder / ".train-000002.mp4.99999.tmp").write_bytes(b"half")
    calls: list[tuple[int, int]] = []
    read(tmp_path, progress=lambda done, total: calls.append((done, total)))
    assert hashes(folder) == undisturbed
    assert calls == [(4, 6), (6, 6)]


@pytest.mark.slow
def test_a_killed_generation_continues_and_leaves_no_workers(tmp_path: Path) -> None:
    script = tmp_path / "generate.py"
    script.write_text(
        "from pathlib import Path\n"
        "from sharding.synthetic.config import SyntheticConfig\n"
        "from sharding.synthetic.clips import generate_split\n"
        "if __name__ == '__main__':\n"
        "    generate_split(Path('killed'), 'train', SyntheticConfig(num_samples=300))\n"
    )
    process = subprocess.Popen([sys.executable, str(script)], cwd=tmp_path)
    folder = tmp_path / "killed" / "train"
    while not folder.is_dir() or len(list(folder.glob("*.mp4"))) < 20:
        assert process.poll() is None
        time.sleep(0.02)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 20
    while any(_runs(child) for child in children):
        assert time.monotonic() < deadline, "a worker outlived its parent"
        time.sleep(0.05)
    assert not (folder / "annotations.csv").exists()
    config = SyntheticConfig(num_samples=300)
    read(tmp_path / "killed", config)
    read(tmp_path / "undisturbed", config)
    assert hashes(folder) == hashes(tmp_path / "undisturbed" / "train")


def _runs(process_id: str) -> bool:
    try:
        return Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def test_a_dry_run_lists_the_clips_and_makes_nothing(tmp_path: Path) -> None:
    listed = read(tmp_path, check_media=False)
    assert list(tmp_path.iterdir()) == []
    assert listed == read(tmp_path)
    assert len(read(None, check_media=False).samples) == 6


def test_a_folder_of_another_world_is_refused_with_the_difference(tmp_path: Path) -> None:
    read(tmp_path, limit=1)
    with pytest.raises(
        UserInputError, match=r"other settings \(seed: 0 there, 1 now\); choose another --media or remove it"
    ):
        read(tmp_path, SyntheticConfig(num_samples=6, frame_size=32, seed=1))
    world = tmp_path / "train" / "world.json"
    settings = json.loads(world.read_text())
    world.write_text(json.dumps(settings | {"tool_versions": {"av": "1.0"}}))
    with pytest.raises(UserInputError, match=r"tool_versions: \{'av': '1\.0'\} there"):
        read(tmp_path)
    world.write_text("[")
    with pytest.raises(UserInputError, match=r"world\.json: not the settings of a synthetic set \(.*; remove"):
        read(tmp_path)


def test_two_generations_in_one_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    with folder_lock(tmp_path / "train"), pytest.raises(CA2STError, match=r"another .* writes here"):
        read(tmp_path)


@pytest.mark.parametrize("task", ["bindings", "spaces", ""])
def test_an_unknown_task_is_answered_with_the_known_ones(task: str) -> None:
    if not task:
        assert read(None, check_media=False, task=task).targets == ("holistic",)
        return
    with pytest.raises(
        UserInputError, match=rf"--task: expected one of space, time, audio, holistic, binding, found '{task}'"
    ):
        read(None, check_media=False, task=task)


def test_a_place_for_the_files_is_needed(tmp_path: Path) -> None:
    with pytest.raises(
        UserInputError, match="--dataset synthetic: expected --media, found none; pass a folder to make"
    ):
        read(None)
    with pytest.raises(UserInputError, match="expected a folder to make videos in, found a file in its way"):
        read(touch(tmp_path, "file") / "file")
    with pytest.raises(UserInputError, match="--annotations: --dataset synthetic does not use it"):
        read(tmp_path, annotations=tmp_path / "a.csv")
