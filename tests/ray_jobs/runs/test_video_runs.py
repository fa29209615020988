"""Training, evaluation and prediction from shards whose frames depend on each other."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from ca2st.training.evaluate import Scored
from ca2st.training.loop import train
from pipelines.config import TrainSetup
from pipelines.loader import TrainLoader
from pipelines.views import EvaluationViews, SamplingConfig
from ray_jobs.runs.inference import score
from ray_jobs.runs.prediction import shards_of_videos
from sharding.format.shard_set import ShardSet
from sharding.settings import ConversionConfig
from support.media import make_clip
from support.models import TINY_CLIP
from support.tiny_training import TinyModel, fresh_accelerator, tiny_settings
from support.trained import trained_model
from support.video_shards import video_shard_set

VIEWS = EvaluationViews(protocol="test", clips=2, crops=3)
NUM_CLIPS = 4


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("media")
    return [make_clip(folder / f"clip_{n}.mp4", seconds=(9 + n) / 30, size=(64, 48)) for n in range(NUM_CLIPS)]


@pytest.fixture(scope="module", params=["h264", "hevc", "vp9"])
def shard_set(request: pytest.FixtureRequest, clips: list[Path], tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    return video_shard_set(tmp_path_factory.mktemp("sets") / "set", clips, request.param, short_side=48)


def test_a_model_trains_on_videos_of_every_codec(shard_set: ShardSet, tmp_path: Path) -> None:
    settings = tiny_settings(tmp_path, targets={"label": 2}, global_batch_size=2, per_device_batch_size=2)
    setup = TrainSetup(
        shard_sets=[shard_set],
        clip=TINY_CLIP,
        targets=("label",),
        sampling=SamplingConfig(scheme="uniform"),
        seed=settings.config.seed,
        global_batch_size=2,
    )
    with TrainLoader(setup) as loader:
        result = train(
            TinyModel(classes={"label": 2}), loader, accelerator=fresh_accelerator(settings), settings=settings
        )
    assert result.steps == settings.config.epochs * NUM_CLIPS // 2


def test_an_evaluation_of_videos_scores_every_sample_once_and_as_of_jpegs(
    shard_set: ShardSet, clips: list[Path], tmp_path: Path
) -> None:
    trained = trained_model(tmp_path, audio_policy="none")
    ours = score(trained, shard_set, VIEWS)
    theirs = score(trained, video_shard_set(tmp_path / "jpegs", clips, "mjpeg", short_side=48), VIEWS)
    assert ours.sample_ids == theirs.sample_ids
    assert len(ours.sample_ids) == NUM_CLIPS
    assert furthest(ours, theirs) < 0.02  # these clips are silent: the pictures alone decide


def furthest(a: Scored, b: Scored) -> float:
    return float(abs(a.probabilities["label"] - b.probabilities["label"]).max())


def test_videos_to_be_predicted_are_converted_as_the_training_shards_were(clips: list[Path], tmp_path: Path) -> None:
    video = ConversionConfig(codec="h264", quality=24, num_gop_frames=4, short_side=48).video
    trained = replace(trained_model(tmp_path, audio_policy="none"), video=video)
    with shards_of_videos(trained, clips[:1]) as shard_set:
        assert shard_set.manifest.video == video
        (row,) = score(trained, shard_set, EvaluationViews()).probabilities["label"].tolist()
    assert math.isclose(sum(row), 1, abs_tol=1e-5)
