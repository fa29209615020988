"""Real conversion in front of the loaders: the frames that arrive are those that were filmed, at their own times."""

from fractions import Fraction

import numpy as np
import pytest
import torch

from ca2st.batch import ClipBatch
from ca2st.spec import ClipSpec
from pipelines.backends import BackendName
from pipelines.draws import EvaluationViews
from pipelines.loader import EvaluationLoader, LoaderConfig
from pipelines.sampling import SamplingConfig
from sharding.conversion import ConversionConfig
from sharding.convert import convert
from sharding.manifest import LabelSpace, ShardSet, read_shard_set
from sharding.source import SourceList, SourceSample
from support.media import Sound, make_clip, read_number

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
    with EvaluationLoader(
        shard_set,
        CLIP,
        ("label",),
        SamplingConfig(scheme="uniform"),
        EvaluationViews(),
        LoaderConfig(backend=backend, verify="sha256"),
        global_batch_size=2,
    ) as loader:
        (batch,) = loader.batches()
    return {("steady", "uneven")[batch.labels[i, 0]]: (batch, i) for i in range(2)}


@pytest.mark.parametrize("name", ["steady", "uneven"])
def test_every_frame_that_arrives_shows_its_own_number_and_carries_its_own_time(
    batches: dict[str, tuple[ClipBatch, int]], name: str
) -> None:
    batch, i = batches[name]
    moments = UNEVEN if name == "uneven" else [k / 25 for k in range(25)]
    wanted = [(2 * k + 1) * len(moments) // 16 for k in range(8)]
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
