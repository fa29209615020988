"""A model that hears meets shards: spectrograms that were made otherwise are refused wherever that happens."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ca2st.checked_json import DocumentError
from ca2st.durable import NO_FAULTS
from ca2st.errors import UserInputError
from ca2st.weights.model_file import export_model
from pipelines.views import EvaluationViews
from ray_jobs.config.recipe import MixtureSet, Recipe, StartConfig
from ray_jobs.evaluation.workers import evaluate_checkpoint
from ray_jobs.launch import launch
from ray_jobs.own_data.training import plan_training
from ray_jobs.runs import inference
from ray_jobs.runs.data import open_data
from ray_jobs.runs.inference import TrainedModel, score, write_features
from ray_jobs.runs.model import SOUND_KEY, sound_metadata, start_sound
from sharding.format.shard_set import AudioParameters, LabelSpace, ShardSet, VideoParameters
from support.fake_shards import make_samples, make_shard_set
from support.models import tiny_model
from support.trained import trained_model

ONE_VIEW = EvaluationViews(protocol="test")
MADE_OTHERWISE = {
    "another sample rate": (
        {"sample_rate_hz": 24_000},
        r"expected spectrograms of sample rate 16000 Hz as .* has, found 24000 Hz; .* `--sample-rate 16000`",
    ),
    "another hop": ({"frame_shift_ms": 5.0}, "expected spectrograms of hop 10 ms as .* has, found 5 ms"),
    "another window": ({"frame_length_ms": 20.0}, "expected spectrograms of window 25 ms as .* has, found 20 ms"),
    "no sound": ({"policy": "none"}, r"expected shards with sound for .*, found a set .*`--audio none`.*optional"),
}
made_otherwise = pytest.mark.parametrize(("changes", "message"), MADE_OTHERWISE.values(), ids=MADE_OTHERWISE)


def set_of(root: Path, changes: dict[str, Any] | None = None, *, split: str = "train", **values: Any) -> ShardSet:
    """Eight samples, whose manifest says of their sound what `changes` say."""
    audio = AudioParameters(**({"policy": "optional"} | (changes or {})))
    return make_shard_set(root, make_samples(8), split=split, audio=audio, **values)


def in_run_folder(trained: TrainedModel) -> TrainedModel:
    trained.checkpoint.folder.mkdir(parents=True)
    return trained


def recipe_for(trained: TrainedModel, train: ShardSet, **data: Any) -> Recipe:
    sources = replace(trained.recipe.data, train=str(train.root), **data)
    return replace(trained.recipe, data=sources, tracking=replace(trained.recipe.tracking, enabled=False))


@made_otherwise
def test_a_checkpoint_that_hears_is_neither_tested_on_other_sounds_nor_asked_for_features(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    trained = in_run_folder(trained_model(tmp_path / "run"))
    other = set_of(tmp_path / "other", changes)
    monkeypatch.setattr(inference, "load_trained", lambda _: trained)
    with pytest.raises(UserInputError, match=message):
        evaluate_checkpoint(tmp_path / "run", other.root, ONE_VIEW)
    with pytest.raises(UserInputError, match=message):
        write_features(tmp_path / "run", other.root, ONE_VIEW)
    assert not list((tmp_path / "run").glob("*.parquet"))


def test_labels_of_another_list_of_classes_are_not_given_out_as_the_model_s(tmp_path: Path) -> None:
    trained = trained_model(tmp_path / "run")
    assert len(list(trained.batches(set_of(tmp_path / "same", {}).root))) == 2
    spaces = (LabelSpace(name="label", classes=("red", "blue", "green")),)
    other = make_shard_set(tmp_path / "other", make_samples(4), label_spaces=spaces)
    with pytest.raises(UserInputError, match="found others: the same names in another order"):
        next(trained.batches(other.root))


@pytest.mark.parametrize("changes", [changes for changes, _ in MADE_OTHERWISE.values()])
def test_a_checkpoint_that_does_not_hear_reads_any_sounds(tmp_path: Path, changes: dict[str, Any]) -> None:
    trained = trained_model(tmp_path / "run", "cast")
    assert len(score(trained, set_of(tmp_path / "set", changes), ONE_VIEW)) == 8


def test_a_checkpoint_of_silent_shards_reads_silent_ones_and_says_so_of_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trained = trained_model(tmp_path / "run", audio_policy="none")
    score(trained, set_of(tmp_path / "silent", {"policy": "none"}), ONE_VIEW)
    assert "without any" not in caplog.text
    score(trained, set_of(tmp_path / "heard"), ONE_VIEW)
    assert "has sound, and" in caplog.text


def test_pictures_of_another_size_or_rate_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trained = trained_model(tmp_path / "run", "spatial")
    caplog.set_level(logging.WARNING)
    score(trained, set_of(tmp_path / "same", video=VideoParameters(short_side=48)), ONE_VIEW)
    assert not caplog.records
    score(trained, set_of(tmp_path / "set", video=VideoParameters(short_side=96, frames_per_second=8)), ONE_VIEW)
    assert "its videos have 96 pixels on the shorter side, those that" in caplog.text
    assert "its videos have at most 8 frames per second, those that" in caplog.text


@made_otherwise
@pytest.mark.parametrize("role", ["mixture", "validation"])
def test_training_a_model_that_hears_refuses_a_second_set_of_other_sounds(
    tmp_path: Path, role: str, changes: dict[str, Any], message: str
) -> None:
    train, other = set_of(tmp_path / "train"), set_of(tmp_path / "other", changes, split="validation")
    recipe = recipe_for(trained_model(tmp_path / "run"), train)
    sets = (MixtureSet(train=str(train.root)), MixtureSet(train=str(other.root)))
    change = {"validation": str(other.root)} if role == "validation" else {"train": None, "mixture": sets}
    with pytest.raises(UserInputError, match=message):
        launch(replace(recipe, data=replace(recipe.data, **change)), tmp_path / "new", faults=NO_FAULTS)
    assert not (tmp_path / "new").exists()


def test_training_a_model_that_hears_on_shards_without_sound_is_refused(tmp_path: Path) -> None:
    silent = set_of(tmp_path / "silent", {"policy": "none"})
    recipe = recipe_for(trained_model(tmp_path / "run"), silent)
    with pytest.raises(UserInputError, match=r"expected shards with sound for model\.kind 'ca2st', which hears, found"):
        open_data(recipe)
    deaf = replace(recipe, model=replace(recipe.model, kind="cast"))
    assert open_data(deaf).train.where == silent.where


def test_validating_a_model_that_does_not_hear_does_not_look_at_sounds(tmp_path: Path) -> None:
    train, other = set_of(tmp_path / "train"), set_of(tmp_path / "other", {"sample_rate_hz": 24_000}, split="x")
    assert open_data(recipe_for(trained_model(tmp_path / "run", "cast"), train, validation=str(other.root)))


def test_spectrograms_of_another_width_are_refused_before_anything_starts(tmp_path: Path) -> None:
    train = set_of(tmp_path / "train", {"num_mel_bins": 64})
    with pytest.raises(UserInputError, match=r"expected 128 mel bins, found 64; set clip\.num_mel_bins"):
        open_data(recipe_for(trained_model(tmp_path / "run", "cast"), train))


def started_from(trained: TrainedModel, place: Path, train: ShardSet) -> Recipe:
    return replace(recipe_for(trained, train), start=StartConfig(checkpoint=str(place), head="keep"))


@pytest.fixture(scope="module")
def heard_at_24_khz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step on shards of 24 kHz."""
    root = tmp_path_factory.mktemp("start")
    train = set_of(root / "train", {"sample_rate_hz": 24_000})
    recipe = recipe_for(trained_model(root / "none"), train)
    training = replace(recipe.training, max_steps=1)
    launch(replace(recipe, training=training), root / "run", faults=NO_FAULTS)
    return root / "run"


@pytest.mark.parametrize("form", ["run", "file"])
def test_a_start_that_heard_other_sounds_is_refused(heard_at_24_khz: Path, tmp_path: Path, form: str) -> None:
    place, trained = heard_at_24_khz, trained_model(tmp_path / "run")
    if form == "file":
        place = tmp_path / "model.safetensors"
        export_model(
            trained.model, place, notes=sound_metadata(AudioParameters(policy="optional", sample_rate_hz=24_000))
        )
    other, same = set_of(tmp_path / "other"), set_of(tmp_path / "same", {"sample_rate_hz": 24_000})
    message = r"other: expected spectrograms of sample rate 24000 Hz as start\.checkpoint .* has, found 16000 Hz"
    with pytest.raises(UserInputError, match=message):
        launch(started_from(trained, place, other), tmp_path / "new", faults=NO_FAULTS)
    assert not (tmp_path / "new").exists()
    recipe = started_from(trained, place, same)
    one_step = replace(recipe, training=replace(recipe.training, max_steps=1))
    assert launch(one_step, tmp_path / "fits", faults=NO_FAULTS).steps == 1


def test_a_start_says_nothing_of_sounds_where_it_does_not_hear_or_does_not_tell(tmp_path: Path) -> None:
    audio = AudioParameters(policy="optional")
    export_model(tiny_model("cast"), tmp_path / "deaf.safetensors", notes=sound_metadata(audio))
    export_model(tiny_model("audio"), tmp_path / "mute.safetensors")
    export_model(tiny_model("audio"), tmp_path / "told.safetensors", notes=sound_metadata(audio))
    export_model(tiny_model("audio"), tmp_path / "wrong.safetensors", notes={SOUND_KEY: '{"policy": 3}'})
    found = {name: start_sound(tmp_path / f"{name}.safetensors") for name in ("deaf", "mute", "told", "gone")}
    assert found == {"deaf": None, "mute": None, "told": audio, "gone": None}
    with pytest.raises(DocumentError, match=f"metadata key '{SOUND_KEY}': policy: expected a text, found 3"):
        start_sound(tmp_path / "wrong.safetensors")


def test_videos_of_ones_own_are_converted_for_the_model_that_is_started_from(
    heard_at_24_khz: Path, tmp_path: Path
) -> None:
    for name in ("a", "b"):
        for number in range(3):
            (tmp_path / "videos" / name).mkdir(parents=True, exist_ok=True)
            (tmp_path / "videos" / name / f"{number}.mp4").write_bytes(b"x")
    out = ["launch.runs_folder=" + repr(str(tmp_path / "runs"))]
    plain = plan_training(tmp_path / "videos", out, out=None)
    started = plan_training(tmp_path / "videos", [*out, f"start.checkpoint={str(heard_at_24_khz)!r}"], out=None)
    assert plain.shards != started.shards
