"""Real conversion in front of the loaders: the frames that arrive are those that were filmed, at their own times."""

import logging
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from ca2st.batch import ClipBatch
from ca2st.spec import ClipSpec
from pipelines.config import BackendName, EvaluationSetup, LoaderConfig, TrainSetup
from pipelines.loader import EvaluationLoader, TrainLoader
from pipelines.storage.samples import SampleReader
from pipelines.storage.shard_sets import stride_note
from pipelines.views import AugmentConfig, SamplingConfig
from sharding.conversion import convert
from sharding.format.shard_set import LabelSpace, ShardSet, read_shard_set
from sharding.settings import ConversionConfig
from sharding.source import SourceList, SourceSample
from support.media import Sound, make_clip, read_number
from support.processes import python_path

CLIP = ClipSpec(num_frames=8, crop_size=64, mel_rows=48)
UNEVEN = [0.0, 0.02, 0.1, 0.13, 0.3, 0.31, 0.4, 0.55, 0.6, 0.7, 0.9, 1.0, 1.01, 1.2, 1.3, 1.4]
"""Times of a clip of variable frame rate, in seconds."""


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    media = tmp_path_factory.mktemp("media")
    clips = {
        "steady": make_clip(media / "steady.mp4", seconds=1.0, fps=Fraction(25), size=(64, 64), sound=Sound()),
        "uneven": make_clip(media / "uneven.mp4", times=UNEVEN, size=(64, 64)),
    }
    samples = tuple(
        SourceSample(
            sample_id=name, path=path, start_seconds=None, end_seconds=None, labels=(i,), where=f"list.csv:{i + 1}"
        )
        for i, (name, path) in enumerate(clips.items())
    )
    space = LabelSpace(name="label", classes=("steady", "uneven"))
    source = SourceList(dataset="t", split="train", label_spaces=(space,), targets=("label",), samples=samples)
    root = tmp_path_factory.mktemp("shards") / "set"
    convert(source, root, ConversionConfig(audio_policy="optional", short_side=64, workers=1))
    return read_shard_set(root)


@pytest.fixture(scope="module", params=["reference", "dali"])
def batches(request: pytest.FixtureRequest, converted: ShardSet) -> dict[str, tuple[ClipBatch, int]]:
    """Batch and row of each clip, as one backend reads it."""
    return read(converted, request.param)


def read(shard_set: ShardSet, backend: BackendName) -> dict[str, tuple[ClipBatch, int]]:
    setup = EvaluationSetup(
        shard_set=shard_set,
        clip=CLIP,
        targets=("label",),
        sampling=SamplingConfig(scheme="uniform"),
        loader=LoaderConfig(backend=backend, verify="sha256"),
        global_batch_size=2,
    )
    with EvaluationLoader(setup) as loader:
        (batch,) = loader.batches()
    return {("steady", "uneven")[batch.labels[i, 0]]: (batch, i) for i in range(2)}


@pytest.mark.parametrize("name", ["steady", "uneven"])
def test_every_frame_that_arrives_shows_its_own_number_and_carries_its_own_time(
    batches: dict[str, tuple[ClipBatch, int]], name: str
) -> None:
    batch, i = batches[name]
    moments = UNEVEN if name == "uneven" else [k / 25 for k in range(25)]
    # of 1.5 s (the last frame lasts 0.1 s) the centres of eighths are 0.094, 0.281, 0.469, ... 1.406 s
    by_time = [1, 3, 6, 8, 9, 12, 13, 15]
    wanted = by_time if name == "uneven" else [(2 * k + 1) * len(moments) // 16 for k in range(8)]
    pictures = batch.video[i].permute(1, 2, 3, 0).numpy()
    assert [read_number(picture) for picture in pictures] == wanted
    expected = np.array([moments[k] for k in wanted]).reshape(4, 2)
    assert np.allclose(batch.intervals_seconds[i, 1:].numpy(), expected, atol=2e-4)


def test_sound_arrives_where_there_is_some_and_zeros_where_there_is_none(
    batches: dict[str, tuple[ClipBatch, int]],
) -> None:
    (batch, steady), (_, uneven) = batches["steady"], batches["uneven"]
    assert batch.has_audio[steady]
    assert not batch.has_audio[uneven]
    assert batch.mel[steady].std() > 0.1
    assert not batch.mel[uneven].any()


def test_both_backends_decode_the_converters_jpegs_to_the_same_pixels(converted: ShardSet) -> None:
    ours, oracle = (read(converted, backend)["steady"][0] for backend in ("dali", "reference"))
    assert torch.equal(ours.video, oracle.video)


def test_segments_of_one_video_are_samples_of_their_own_and_views_stay_inside_them(tmp_path: Path) -> None:
    film = make_clip(tmp_path / "film.mp4", seconds=4.0, fps=Fraction(25), size=(64, 64))
    samples = tuple(
        SourceSample(
            sample_id=f"film/{i}", path=film, start_seconds=a, end_seconds=b, labels=(i,), where=f"list.csv:{i}"
        )
        for i, (a, b) in enumerate([(0.4, 1.2), (1.0, 3.6)])
    )
    space = LabelSpace(name="label", classes=("steady", "uneven"))
    source = SourceList(dataset="t", split="train", label_spaces=(space,), targets=("label",), samples=samples)
    convert(source, tmp_path / "set", ConversionConfig(audio_policy="none", short_side=64, workers=1))
    for name, first, last in (("steady", 10, 30), ("uneven", 25, 90)):
        batch, row = read(read_shard_set(tmp_path / "set"), "reference")[name]
        frames = [read_number(picture) for picture in batch.video[row].permute(1, 2, 3, 0).numpy()]
        n = last - first
        assert frames == [first + (2 * k + 1) * n // 16 for k in range(8)]
        times = batch.intervals_seconds[row, 1:].flatten().numpy()
        assert np.allclose(times, [(frame - first) / 25 for frame in frames], atol=2e-3)


def test_clips_at_fifty_frames_a_second_are_told_and_read_with_a_wider_stride(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    film = make_clip(tmp_path / "film.mp4", seconds=2.0, fps=Fraction(50), size=(64, 64))
    sample = SourceSample(
        sample_id="film", path=film, start_seconds=None, end_seconds=None, labels=(0,), where="list.csv:1"
    )
    space = LabelSpace(name="label", classes=("steady",))
    source = SourceList(dataset="t", split="train", label_spaces=(space,), targets=("label",), samples=(sample,))
    convert(source, tmp_path / "set", ConversionConfig(audio_policy="none", short_side=64, workers=1))
    shard_set = read_shard_set(tmp_path / "set")
    for scheme in ("dense", "uniform"):
        setup = TrainSetup(
            shard_sets=[shard_set],
            clip=CLIP,
            targets=("label",),
            sampling=SamplingConfig(scheme=scheme),
            augment=AugmentConfig(crop_area=(1.0, 1.0), crop_aspect_ratio=(1.0, 1.0), flip_probability=0.0),
            loader=LoaderConfig(backend="reference"),
            seed=0,
            global_batch_size=1,
        )
        with caplog.at_level(logging.INFO, "pipelines.loader"), TrainLoader(setup) as loader:
            (batch,) = loader.batches(0)
        lines = [record.getMessage() for record in caplog.records if "frames per second" in record.getMessage()]
        caplog.clear()
        assert len(lines) == (scheme == "dense")
        if scheme == "dense":
            assert "1 of the first 1 clips run at 50 frames per second" in lines[0]
            assert "strides of 7 frames in place of 4" in lines[0]
            frames = [read_number(picture) for picture in batch.video[0].permute(1, 2, 3, 0).numpy()]
            assert frames[-1] - frames[0] == 8 * 7 - 1


def test_it_is_said_of_clips_whose_rate_varies_where_dense_windows_read_them(converted: ShardSet) -> None:
    reader = SampleReader(converted)
    note = stride_note(reader, SamplingConfig(scheme="dense"))
    assert note is not None
    assert note.endswith(
        "1 of the first 2 clips vary in their frame rate; their dense windows take a frame every 4/30 s"
    )
    assert stride_note(reader, SamplingConfig(scheme="uniform")) is None


UNGUARDED = """\
import sys
from pathlib import Path
from ca2st.spec import ClipSpec
from pipelines.loader import TrainLoader
from pipelines.config import LoaderConfig, TrainSetup
from pipelines.views import SamplingConfig
from sharding.settings import ConversionConfig
from sharding.conversion import convert
from sharding.format.shard_set import LabelSpace
from sharding.format.shard_set import read_shard_set
from sharding.source import SourceList, SourceSample
from sharding.synthetic.config import SyntheticConfig
from sharding.synthetic.clips import generate_split

print("started")
root = Path(sys.argv[1])
media = generate_split(root / "media", "train", SyntheticConfig(num_samples=32, workers=2))
samples = tuple(
    SourceSample(sample_id=path.stem, path=path, start_seconds=None, end_seconds=None, labels=(0,), where="here")
    for path in sorted(media.glob("*.mp4"))[:4]
)
space = LabelSpace(name="label", classes=("clip",))
source = SourceList(dataset="t", split="train", label_spaces=(space,), targets=("label",), samples=samples)
convert(source, root / "set", ConversionConfig(audio_policy="optional", short_side=64, workers=2))
clip = ClipSpec(num_frames=4, crop_size=32, mel_rows=48)
sampling = SamplingConfig(scheme="uniform")
setup = TrainSetup(
    shard_sets=[read_shard_set(root / "set")], clip=clip, targets=("label",), sampling=sampling,
    loader=LoaderConfig(backend=sys.argv[2]), seed=0, global_batch_size=2,
)
with TrainLoader(setup) as loader:
    print(sum(len(batch.video) for batch in loader.batches(0)))
"""


@pytest.mark.parametrize("how", ["a script", "stdin"])
def test_a_script_without_a_guard_makes_shards_and_reads_them(tmp_path: Path, how: str) -> None:
    (tmp_path / "unguarded.py").write_text(UNGUARDED)
    name, backend = ("-", "dali") if how == "stdin" else ("unguarded.py", "reference")
    done = subprocess.run(
        [sys.executable, name, "made", backend],
        input=UNGUARDED,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": python_path()},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "started\n4\n"), done.stderr
