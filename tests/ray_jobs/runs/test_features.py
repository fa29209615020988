"""`ca2st features`: what the model says by hand, one row per sample, in order, or no file."""

import json
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from ca2st.errors import DataDamageError, UserInputError
from pipelines.views import EvaluationViews
from ray_jobs import cli
from ray_jobs.runs import inference
from ray_jobs.runs.data import evaluation_loader
from ray_jobs.runs.inference import METADATA_KEY, write_features
from sharding.format.shard_set import LabelSpace, ShardSet
from support.fake_shards import flip_byte, make_samples, make_shard_set, members_of
from support.trained import trained_model

NUM_SAMPLES = 6
"""Not a multiple of the batch of 4: the last batch is padded."""
ONE_VIEW = EvaluationViews(protocol="test")
SIX_VIEWS = EvaluationViews(protocol="test", clips=2, crops=3)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    samples = make_samples(NUM_SAMPLES - 1)
    silent = make_samples(NUM_SAMPLES, mel_rows=0)[-1:]
    return make_shard_set(tmp_path_factory.mktemp("features") / "set", samples + silent, samples_per_shard=4)


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "run").mkdir()
    one = trained_model(tmp_path / "run")
    monkeypatch.setattr(inference, "load_trained", lambda _: one)
    return one


def _table(path: Path):
    return pq.ParquetFile(path).read(use_threads=False)


def _by_hand(trained, shards: ShardSet, views: EvaluationViews, expert: str) -> torch.Tensor:
    """[samples, dim] by plain calls of the model on whole batches."""
    by_key: dict[str, list[torch.Tensor]] = {}
    with evaluation_loader(trained.recipe, shards, ("label",), views=views, rank=0, world_size=1) as loader:
        for batch in loader.batches():
            with torch.no_grad():
                output = trained.model(batch.normalised_video(), batch.mel, batch.intervals_seconds, batch.has_audio)
            for index, key in enumerate(batch.sample_ids):
                if not batch.is_padding[index]:
                    by_key.setdefault(key, []).append(output.features[expert][index])
    assert {len(rows) for rows in by_key.values()} == {views.num_views}
    return torch.stack([torch.stack(by_key[key]).mean(dim=0) for key in sorted(by_key)])


@pytest.mark.parametrize("views", [ONE_VIEW, SIX_VIEWS], ids=["1x1", "2x3"])
def test_features_are_those_of_the_model_called_by_hand(trained, shards, tmp_path, views):
    report = write_features(tmp_path, shards.root, views, out=tmp_path / "f.parquet")
    table = _table(tmp_path / "f.parquet")
    assert report.experts == {"spatial": 32, "temporal": 32, "audio": 32}
    for expert in report.experts:
        expected = _by_hand(trained, shards, views, expert)
        torch.testing.assert_close(torch.tensor(table[expert].to_pylist()), expected, atol=1e-5, rtol=1e-5)


def test_every_sample_is_one_row_in_the_sets_own_order_without_padding(trained, shards, tmp_path):
    report = write_features(tmp_path, shards.root, SIX_VIEWS, out=tmp_path / "f.parquet")
    table = _table(tmp_path / "f.parquet")
    assert report.num_samples == NUM_SAMPLES
    assert table["key"].to_pylist() == [f"clip-{index:04d}" for index in range(NUM_SAMPLES)]
    assert table["label_label"].to_pylist() == [index % 3 for index in range(NUM_SAMPLES)]
    assert table["has_audio"].to_pylist() == [True] * (NUM_SAMPLES - 1) + [False]


def test_rows_are_written_in_groups_as_they_come(trained, shards, tmp_path):
    write_features(tmp_path, shards.root, ONE_VIEW, out=tmp_path / "whole.parquet")
    write_features(tmp_path, shards.root, ONE_VIEW, out=tmp_path / "groups.parquet", rows_per_group=3)
    assert pq.ParquetFile(tmp_path / "whole.parquet").num_row_groups == 1
    groups = pq.ParquetFile(tmp_path / "groups.parquet")
    assert [groups.metadata.row_group(index).num_rows for index in range(groups.num_row_groups)] == [4, 2]
    assert _table(tmp_path / "groups.parquet").equals(_table(tmp_path / "whole.parquet"))


def test_the_file_says_where_it_comes_from(trained, shards, tmp_path):
    report = write_features(tmp_path, shards.root, SIX_VIEWS)
    assert report.features.parent == tmp_path / "run"
    about = json.loads(pq.read_schema(report.features).metadata[METADATA_KEY])
    assert about["manifest_fingerprint"] == shards.manifest.fingerprint
    assert about["views"] == {"protocol": "test", "clips": 2, "crops": 3}
    assert about["model"]["kind"] == "ca2st"
    assert about["checkpoint"] == "step-8.attempt-1"
    assert about["checkpoint_files"] == {"model.safetensors": "a" * 64}
    assert about["classes"] == {"label": ["red", "green", "blue"]}


def test_the_chosen_experts_alone_are_written(trained, shards, tmp_path):
    report = write_features(tmp_path, shards.root, ONE_VIEW, experts=("audio", "spatial"), out=tmp_path / "f.parquet")
    assert list(report.experts) == ["spatial", "audio"]
    assert _table(tmp_path / "f.parquet").column_names == ["key", "label_label", "has_audio", "spatial", "audio"]


def test_an_unknown_expert_is_refused_with_the_known_ones(trained, shards, tmp_path):
    with pytest.raises(UserInputError, match="spatial, temporal, audio, found 'sptial' \\(did you mean 'spatial'"):
        write_features(tmp_path, shards.root, ONE_VIEW, experts=("sptial",), out=tmp_path / "f.parquet")


def test_a_folder_that_is_not_there_is_refused_before_any_work(shards, tmp_path):
    with pytest.raises(UserInputError, match=r"--out: expected a file in a folder that exists, found no .*nowhere"):
        write_features(tmp_path, shards.root, ONE_VIEW, out=tmp_path / "nowhere" / "f.parquet")
    with pytest.raises(UserInputError, match="--out: expected the name of a file"):
        write_features(tmp_path, shards.root, ONE_VIEW, out=tmp_path)


def test_a_set_with_other_classes_than_the_models_is_read_too(trained, tmp_path):
    space = LabelSpace(name="instrument", classes=tuple("abcdefgh"))
    other = make_shard_set(tmp_path / "set", make_samples(3), label_spaces=(space,), targets=("instrument",))
    write_features(tmp_path, other.root, ONE_VIEW, out=tmp_path / "f.parquet")
    assert _table(tmp_path / "f.parquet")["instrument_label"].to_pylist() == [0, 1, 2]


def test_damage_ends_with_its_place_and_leaves_no_file(trained, tmp_path):
    damaged = make_shard_set(tmp_path / "set", make_samples(9), samples_per_shard=3)
    shard = damaged.root / "ca2st-000002.tar"
    offset, size = members_of(shard)["clip-0008.mp4"]
    for place in range(offset + 60, offset + size - 60, 200):
        flip_byte(shard, place)
    (tmp_path / "out").mkdir()
    with pytest.raises(DataDamageError, match="clip-0008"):
        write_features(tmp_path, damaged.root, ONE_VIEW, out=tmp_path / "out" / "f.parquet", rows_per_group=1)
    assert list((tmp_path / "out").iterdir()) == []


def test_the_command_prints_its_facts_as_json(trained, shards, tmp_path, monkeypatch, capsys):
    out = tmp_path / "f.parquet"
    arguments = ["ca2st", "features", "run", "--data", str(shards.root), "--experts", "audio, temporal", "--json"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--out", str(out)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    facts = json.loads(capsys.readouterr().out)
    assert facts == {"features": str(out), "num_samples": NUM_SAMPLES, "experts": {"temporal": 32, "audio": 32}}
