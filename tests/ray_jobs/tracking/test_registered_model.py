"""A finished run is a model in MLflow's registry that predicts from the checkpoint where it is."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from ca2st.errors import UserInputError
from ca2st.training.errors import CheckpointDamagedError
from pipelines.views import EvaluationViews
from ray_jobs.config.recipe import TrackingConfig, model_name
from ray_jobs.runs.prediction import predict_videos
from ray_jobs.tracking.models import SHA256_TAG, register, signature_of
from support.media import Sound, make_clip
from support.mlflow_runs import new_run
from support.tiny_runs import ca2st, make_tiny_run

# MLflow warns of its own type hints when it is imported whole.
pytestmark = pytest.mark.filterwarnings("ignore:.*type hint is inferred as AnyType:UserWarning")

WEIGHTS = b"weights that stay where they are" * 1000


@pytest.fixture
def client(store: str) -> MlflowClient:
    return MlflowClient(store)


@pytest.fixture
def run_id(client: MlflowClient, tmp_path: Path) -> str:
    return new_run(client, tmp_path)


def checkpoint(run_dir: Path, name: str, *, marker: str = "{}", targets: tuple[str, ...] = ("label",)) -> Path:
    folder = run_dir / "checkpoints" / name
    folder.mkdir(parents=True)
    (folder / "COMPLETE.json").write_text(marker)
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    (folder / "run.json").write_text(json.dumps({"classes": {target: ["a", "b"] for target in targets}}))
    return folder


def recipe(run_dir: Path, **tracking: Any) -> None:
    (run_dir / "recipe.json").write_text(json.dumps({"name": run_dir.name, "tracking": tracking}))


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run folder whose name no other test has, with one checkpoint."""
    folder = tmp_path / re.sub(r"\W+", "-", tmp_path.name)
    checkpoint(folder, "step-4.attempt-1")
    recipe(folder)
    return folder


def versions(client: MlflowClient, name: str) -> list[Any]:
    found = client.search_model_versions(f"name = '{name}'")
    return sorted(found, key=lambda version: int(version.version))


def load(client: MlflowClient, name: str, **settings: Any) -> Any:
    import mlflow.pyfunc

    return mlflow.pyfunc.load_model(versions(client, name)[-1].source, **settings)


def test_a_checkpoint_is_registered_once_with_signature_and_without_its_weights(
    client: MlflowClient, run_id: str, run_dir: Path
) -> None:
    for _ in range(2):
        register(client, run_id, run_dir)
    (version,) = versions(client, run_dir.name)
    files = {path.name: path for path in Path(version.source.removeprefix("file://")).iterdir()}
    assert {"MLmodel", "checkpoint_model.py"} <= set(files)
    assert not [name for name in files if name.endswith((".pkl", ".safetensors"))]
    assert sum(path.stat().st_size for path in files.values()) < len(WEIGHTS)
    assert version.run_id == run_id
    assert version.tags["ca2st.checkpoint"] == str(run_dir / "checkpoints" / "step-4.attempt-1")


def test_the_runs_page_leads_to_the_registered_version(client: MlflowClient, run_id: str, run_dir: Path) -> None:
    register(client, run_id, run_dir)
    (output,) = client.get_run(run_id).outputs.model_outputs
    model = client.get_logged_model(output.model_id)
    assert str(model.status) == "READY"
    assert json.loads(model.tags["mlflow.modelVersions"]) == [{"name": run_dir.name, "version": 1}]


def test_a_later_checkpoint_of_the_run_becomes_the_next_version(
    client: MlflowClient, run_id: str, run_dir: Path
) -> None:
    register(client, run_id, run_dir)
    checkpoint(run_dir, "step-8.attempt-2", marker='{"step": 8}')
    register(client, run_id, run_dir)
    first, second = versions(client, run_dir.name)
    assert first.tags[SHA256_TAG] != second.tags[SHA256_TAG]
    assert second.tags["ca2st.checkpoint"].endswith("step-8.attempt-2")


def test_what_broke_off_is_finished_and_not_begun_anew(
    client: MlflowClient, run_id: str, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise MlflowException("the registry is away")

    with monkeypatch.context() as patch:
        patch.setattr(client, "create_model_version", refuse)
        with pytest.raises(MlflowException, match="away"):
            register(client, run_id, run_dir)
    register(client, run_id, run_dir)
    assert len(versions(client, run_dir.name)) == 1
    assert len(client.get_run(run_id).outputs.model_outputs) == 1


def test_the_recipe_gives_the_name(client: MlflowClient, run_id: str, run_dir: Path) -> None:
    recipe(run_dir, registered_model=f"chosen {run_dir.name}")
    register(client, run_id, run_dir)
    assert versions(client, run_dir.name) == []
    assert len(versions(client, f"chosen {run_dir.name}")) == 1


def test_the_recipe_may_say_no(client: MlflowClient, run_id: str, run_dir: Path) -> None:
    recipe(run_dir, register_model=False)
    register(client, run_id, run_dir)
    assert versions(client, run_dir.name) == []


def test_a_run_without_a_checkpoint_has_no_model(client: MlflowClient, run_id: str, tmp_path: Path) -> None:
    recipe(tmp_path)
    register(client, run_id, tmp_path)
    assert client.get_run(run_id).outputs.model_outputs == []


def validate(run_dir: Path, scores: dict[int, float]) -> None:
    """Validations in the journal, and the shard set they were made on."""
    lines = [
        {
            "event": "eval",
            "attempt": 1,
            "time": 1e9 + step,
            "step": step,
            "split": "validation",
            "metrics": {"top1": top1},
        }
        for step, top1 in scores.items()
    ]
    (run_dir / "journal.jsonl").write_text("".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines))
    facts = {"role": "validation", "dataset": "birds", "split": "val", "fingerprint": "f" * 64}
    (run_dir / "inputs.json").write_text(json.dumps([facts]))


def test_every_kept_checkpoint_is_a_model_that_its_validation_ranks(
    client: MlflowClient, run_id: str, run_dir: Path
) -> None:
    checkpoint(run_dir, "step-8.attempt-1", marker='{"step": 8}')
    checkpoint(run_dir, "step-12.attempt-1", marker='{"step": 12}')
    validate(run_dir, {4: 0.5, 8: 0.75, 12: 0.25})
    for _ in range(2):
        register(client, run_id, run_dir)
    experiment = client.get_run(run_id).info.experiment_id
    ranked = client.search_logged_models(
        [experiment],
        filter_string=f"source_run_id = '{run_id}'",
        order_by=[{"field_name": "metrics.validation_top1", "ascending": False}],
    )
    assert [model.tags["ca2st.step"] for model in ranked] == ["8", "4", "12"]
    assert {one.step for one in client.get_run(run_id).outputs.model_outputs} == {4, 8, 12}
    (metric,) = ranked[0].metrics
    assert (metric.value, metric.step) == (0.75, 8)
    assert (metric.dataset_name, metric.dataset_digest) == ("birds/val", "f" * 36)
    assert ranked[0].params["step"] == "8"
    assert ranked[0].params["name"] == run_dir.name


def test_registered_are_the_best_and_the_last_with_their_accuracy_and_an_alias(
    client: MlflowClient, run_id: str, run_dir: Path
) -> None:
    checkpoint(run_dir, "step-8.attempt-1", marker='{"step": 8}')
    checkpoint(run_dir, "step-12.attempt-1", marker='{"step": 12}')
    validate(run_dir, {4: 0.5, 8: 0.75, 12: 0.25})
    register(client, run_id, run_dir)
    described = [version.description.split(";")[0] for version in versions(client, run_dir.name)]
    assert described == [
        "validation top1 0.7500 at step 8, the best of its run",
        "validation top1 0.2500 at step 12",
    ]
    aliased = {alias: str(client.get_model_version_by_alias(run_dir.name, alias).version) for alias in ("best", "last")}
    assert aliased == {"best": "1", "last": "2"}


@pytest.mark.parametrize(("score", "best"), [(0.9, "2"), (0.1, "1"), (0.5, "1")])
def test_the_alias_best_stays_with_the_better_run(
    client: MlflowClient, run_id: str, run_dir: Path, score: float, best: str
) -> None:
    validate(run_dir, {4: 0.5})
    register(client, run_id, run_dir)
    other = run_dir.with_name("other")
    checkpoint(other, "step-4.attempt-1", marker='{"run": 2}')
    recipe(other, registered_model=run_dir.name)
    validate(other, {4: score})
    register(client, new_run(client, other), other)
    assert str(client.get_model_version_by_alias(run_dir.name, "best").version) == best


def test_a_model_whose_checkpoint_was_cleared_away_says_so(client: MlflowClient, run_id: str, run_dir: Path) -> None:
    register(client, run_id, run_dir)
    checkpoint(run_dir, "step-8.attempt-1", marker='{"step": 8}')
    shutil.rmtree(run_dir / "checkpoints" / "step-4.attempt-1")
    register(client, run_id, run_dir)
    outputs = client.get_run(run_id).outputs.model_outputs
    tags = [client.get_logged_model(one.model_id).tags for one in outputs]
    assert {one["ca2st.step"]: one.get("ca2st.checkpoint_kept") for one in tags} == {"4": "no", "8": None}


def remove(folder: Path) -> None:
    folder.rename(folder.with_name("moved"))


def change(folder: Path) -> None:
    (folder / "COMPLETE.json").write_text('{"step": 5}')


@pytest.mark.parametrize(
    ("damage", "error", "says"),
    [
        (remove, UserInputError, 'model_config={"checkpoint": "PLACE"}'),
        (change, CheckpointDamagedError, "it is another checkpoint"),
    ],
)
def test_a_moved_and_a_changed_checkpoint_are_refused_with_what_to_do(
    client: MlflowClient,
    run_id: str,
    run_dir: Path,
    damage: Callable[[Path], None],
    error: type[Exception],
    says: str,
) -> None:
    register(client, run_id, run_dir)
    load(client, run_dir.name)
    damage(run_dir / "checkpoints" / "step-4.attempt-1")
    with pytest.raises(error, match=re.escape(says)):
        load(client, run_dir.name)


def test_a_moved_checkpoint_loads_from_where_it_is_told_to_be(client: MlflowClient, run_id: str, run_dir: Path) -> None:
    register(client, run_id, run_dir)
    folder = run_dir / "checkpoints" / "step-4.attempt-1"
    remove(folder)
    moved = folder.with_name("moved")
    assert load(client, run_dir.name, model_config={"checkpoint": str(moved)}).model_config["checkpoint"] == str(moved)


def test_a_model_of_several_targets_has_columns_of_each() -> None:
    signature = signature_of(("verb", "noun"))
    assert signature.inputs.input_names() == ["video"]
    assert signature.outputs.input_names() == ["verb_label", "verb_probability", "noun_label", "noun_probability"]


@pytest.mark.parametrize(
    ("recipe_name", "chosen", "name"),
    [("mine", None, "mine"), ("a/b:c", None, "a-b-c"), ("mine", "shared model", "shared model"), (" ", None, "ca2st")],
)
def test_a_model_has_the_recipes_name_unless_it_is_given_one(recipe_name: str, chosen: str | None, name: str) -> None:
    assert model_name(recipe_name, chosen) == name


@pytest.mark.parametrize("name", ["", " ", "a/b", "a:b"])
def test_a_name_that_mlflow_refuses_is_refused_before_training(name: str) -> None:
    with pytest.raises(UserInputError, match="registered_model: expected a name"):
        TrackingConfig(registered_model=name)


def test_measuring_less_than_never_is_refused() -> None:
    with pytest.raises(UserInputError, match="system_metrics_seconds: expected 0"):
        TrackingConfig(system_metrics_seconds=-1.0)


def labels_by_a_script(source: str, videos: list[Path]) -> list[str]:
    """What the lines of the README give when they are all of a program."""
    names = [str(video) for video in videos]
    script = f"""\
import mlflow, pandas
model = mlflow.pyfunc.load_model({source!r})
found = model.predict(pandas.DataFrame({{"video": {names!r}}}), params=dict(clips=1, crops=1))
print(*found["label"], sep="\\n")
"""
    command = [sys.executable, "-"]
    done = subprocess.run(command, input=script, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
def test_a_trained_run_is_loaded_from_mlflow_and_labels_videos(tmp_path: Path, store: str) -> None:
    import mlflow.pyfunc
    import pandas

    shutil.copy(store.removeprefix("sqlite:///"), tmp_path / "mlflow.db")
    run_dir = tmp_path / "runs" / "tiny"
    for words in (("train", make_tiny_run(tmp_path), "--out", run_dir), ("track", "sync", run_dir)):
        done = ca2st(*words)
        assert done.returncode == 0, done.stderr
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    version = versions(client, "tiny")[-1]
    run = client.get_run(version.run_id)
    assert {one.tags[0].value for one in run.inputs.dataset_inputs} == {"training", "validation"}
    assert "run_card.html" in {file.path for file in client.list_artifacts(version.run_id)}
    assert [name for name in run.data.metrics if name.endswith("cpu_utilization_percentage")]
    videos = [make_clip(tmp_path / "a.mp4", sound=Sound()), make_clip(tmp_path / "b.mp4")]
    model = mlflow.pyfunc.load_model(version.source)
    found = model.predict(pandas.DataFrame({"video": list(map(str, videos))}), params={"clips": 1, "crops": 1})
    assert labels_by_a_script(version.source, videos) == found["label"].tolist()
    views = EvaluationViews(protocol="test", clips=1, crops=1)
    expected = predict_videos(run_dir, videos, top=1, views=views)
    assert list(found.columns) == ["label", "probability"]
    assert found["label"].tolist() == [one.predictions[0].label for one in expected]
    assert found["probability"].tolist() == [one.predictions[0].probability for one in expected]


@pytest.mark.slow
def test_an_uploaded_model_predicts_without_its_run_folder(tmp_path: Path, store: str) -> None:
    import mlflow.pyfunc
    import pandas

    shutil.copy(store.removeprefix("sqlite:///"), tmp_path / "mlflow.db")
    run_dir = tmp_path / "runs" / "tiny"
    settings = ("--set", "tracking.upload_model=true", "--set", "tracking.enabled=false")  # all is sent by the sync
    for words in (("train", make_tiny_run(tmp_path), "--out", run_dir, *settings), ("track", "sync", run_dir)):
        done = ca2st(*words)
        assert done.returncode == 0, done.stderr
    video = make_clip(tmp_path / "a.mp4", sound=Sound())
    views = EvaluationViews(protocol="test", clips=1, crops=1)
    (expected,) = predict_videos(run_dir, [video], top=1, views=views)
    source = versions(MlflowClient(f"sqlite:///{tmp_path}/mlflow.db"), "tiny")[-1].source
    shutil.rmtree(run_dir)
    found = mlflow.pyfunc.load_model(source).predict(
        pandas.DataFrame({"video": [str(video)]}), params={"clips": 1, "crops": 1}
    )
    assert found["probability"].tolist() == [expected.predictions[0].probability]
