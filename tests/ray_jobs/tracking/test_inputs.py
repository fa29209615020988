"""MLflow knows which shard sets a run read, by name, fingerprint and place."""

import json
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.data import get_source

from ray_jobs.runs.data import TrainingData
from ray_jobs.tracking.inputs import INPUTS_NAME, keep_inputs, log_inputs, read_inputs
from sharding.format.remote import RemoteFolder
from sharding.format.shard_set import ShardSet
from support.fake_shards import make_samples, make_shard_set
from support.mlflow_runs import new_run


@pytest.fixture(scope="module")
def shard_sets(tmp_path_factory: pytest.TempPathFactory) -> tuple[ShardSet, ShardSet]:
    root = tmp_path_factory.mktemp("shards")
    train = make_shard_set(root / "train", make_samples(7), samples_per_shard=3)
    return train, make_shard_set(root / "validation", make_samples(2), split="validation")


@pytest.fixture
def client(store: str) -> MlflowClient:
    return MlflowClient(store)


@pytest.fixture
def run_id(client: MlflowClient, tmp_path: Path) -> str:
    return new_run(client, tmp_path)


def training(*train: ShardSet, validation: ShardSet | None = None) -> TrainingData:
    return TrainingData(train_sets=train, validation=validation, targets=("label",))


def inputs_of(client: MlflowClient, run_id: str) -> dict[str, Any]:
    """Dataset inputs by context."""
    found = client.get_run(run_id).inputs.dataset_inputs
    return {one.tags[0].value: one for one in found}


def test_each_set_of_a_run_is_an_input_with_its_fingerprint_place_and_facts(
    client: MlflowClient, run_id: str, tmp_path: Path, shard_sets: tuple[ShardSet, ShardSet]
) -> None:
    train, validation = shard_sets
    keep_inputs(tmp_path, training(train, validation=validation))
    log_inputs(client, run_id, tmp_path)
    found = inputs_of(client, run_id)
    assert set(found) == {"training", "validation"}
    dataset = found["training"].dataset
    assert dataset.name == f"{train.manifest.dataset}/{train.manifest.split}"
    assert dataset.digest == train.manifest.fingerprint[:36]
    assert [column["name"] for column in json.loads(dataset.schema)["mlflow_colspec"]] == [
        "key",
        "video",
        "spectrogram",
        "label:label",
    ]
    profile = json.loads(dataset.profile)
    assert profile["fingerprint"] == train.manifest.fingerprint
    assert (profile["num_samples"], profile["num_shards"]) == (7, 3)
    assert profile["num_classes"] == {"label": len(train.manifest.label_space("label").classes)}
    assert profile["duration_seconds"] == pytest.approx(7 * 20 / 30, abs=0.01)


def test_mlflow_finds_the_folder_of_a_set_again(
    client: MlflowClient, run_id: str, tmp_path: Path, shard_sets: tuple[ShardSet, ShardSet]
) -> None:
    keep_inputs(tmp_path, training(shard_sets[0]))
    log_inputs(client, run_id, tmp_path)
    assert Path(get_source(inputs_of(client, run_id)["training"]).load()) == shard_sets[0].root


def test_repeating_adds_no_second_input(
    client: MlflowClient, run_id: str, tmp_path: Path, shard_sets: tuple[ShardSet, ShardSet]
) -> None:
    keep_inputs(tmp_path, training(shard_sets[0], validation=shard_sets[1]))
    for _ in range(3):
        log_inputs(client, run_id, tmp_path)
    assert len(client.get_run(run_id).inputs.dataset_inputs) == 2


def test_a_set_that_trains_and_validates_is_one_input_of_both_contexts(
    client: MlflowClient, run_id: str, tmp_path: Path, shard_sets: tuple[ShardSet, ShardSet]
) -> None:
    keep_inputs(tmp_path, training(*shard_sets, validation=shard_sets[0]))
    log_inputs(client, run_id, tmp_path)
    assert set(inputs_of(client, run_id)) == {"training, validation", "training"}


@pytest.mark.parametrize(
    ("url", "kind"),
    [("s3://bucket/train", "s3"), ("https://host.example/train", "http"), ("memory://train/set", "code")],
)
def test_a_set_behind_a_url_is_named_by_it_and_not_opened(
    client: MlflowClient,
    run_id: str,
    tmp_path: Path,
    shard_sets: tuple[ShardSet, ShardSet],
    url: str,
    kind: str,
) -> None:
    remote = ShardSet(
        root=tmp_path / "cache",
        manifest=shard_sets[0].manifest,
        shards=shard_sets[0].shards,
        origin=RemoteFolder(url),
    )
    keep_inputs(tmp_path, training(remote))
    log_inputs(client, run_id, tmp_path)
    dataset = inputs_of(client, run_id)["training"].dataset
    assert dataset.source_type == kind
    assert url in dataset.source
    assert "duration_seconds" not in json.loads(dataset.profile)


def test_k8_no_credential_of_an_address_is_kept(tmp_path: Path, shard_sets: tuple[ShardSet, ShardSet]) -> None:
    origin = RemoteFolder("https://user:hunter2@host.example/train")
    remote = ShardSet(root=tmp_path, manifest=shard_sets[0].manifest, shards=shard_sets[0].shards, origin=origin)
    keep_inputs(tmp_path, training(remote))
    assert read_inputs(tmp_path)[0]["source"] == "https://host.example/train"
    assert "hunter2" not in (tmp_path / INPUTS_NAME).read_text()


def test_a_set_that_is_gone_or_another_by_now_is_told_without_its_duration(
    client: MlflowClient, run_id: str, tmp_path: Path, shard_sets: tuple[ShardSet, ShardSet]
) -> None:
    keep_inputs(tmp_path, training(*shard_sets))
    kept = read_inputs(tmp_path)
    kept[0]["source"], kept[1]["source"] = str(tmp_path / "gone"), str(shard_sets[0].root)
    (tmp_path / INPUTS_NAME).write_text(json.dumps(kept))
    log_inputs(client, run_id, tmp_path)
    profiles = [json.loads(one.dataset.profile) for one in client.get_run(run_id).inputs.dataset_inputs]
    assert [("duration_seconds" in profile, profile["num_samples"] > 0) for profile in profiles] == [(False, True)] * 2


def test_a_run_folder_that_keeps_no_inputs_has_none_to_send(client: MlflowClient, run_id: str, tmp_path: Path) -> None:
    log_inputs(client, run_id, tmp_path)
    assert client.get_run(run_id).inputs.dataset_inputs == []
