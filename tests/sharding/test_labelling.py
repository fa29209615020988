"""Conversions of several labels per sample and of none, from a list to a verified set."""

import hashlib
import json
import tarfile
from dataclasses import fields, replace
from pathlib import Path

import pytest

from sharding.conversion import convert
from sharding.datasets import DatasetRequest, read_dataset
from sharding.errors import AnnotationError
from sharding.format.index import decode_index, encode_index
from sharding.format.shard_set import LabelSpace, read_manifest, read_shard_set, write_shard_set
from sharding.settings import ConversionConfig
from sharding.source import check_source
from sharding.verify import verify_shard_set
from support.annotations import write_lines
from support.media import make_clip

CONFIG = ConversionConfig(audio_policy="none")


def convert_list(tmp_path: Path, header: str, rows: list[str], **options) -> Path:
    media = tmp_path / "media"
    media.mkdir()
    for name in ("a.mp4", "b.mp4", "c.mp4"):
        make_clip(media / name, seconds=0.2, size=(32, 32))
    annotations = write_lines(tmp_path / "list.csv", [header, *rows])
    source = read_dataset("csv", DatasetRequest(annotations=annotations, media=tmp_path / "media", **options))
    convert(source, tmp_path / "out", CONFIG)
    return tmp_path / "out"


def said_of(out: Path) -> list[dict]:
    with tarfile.open(out / "ca2st-000000.tar") as tar:
        return [json.loads(tar.extractfile(one).read()) for one in tar if one.name.endswith(".json")]


def test_several_labels_stand_in_json_index_and_manifest_and_are_verified(tmp_path: Path) -> None:
    out = convert_list(tmp_path, "path,labels", ["a.mp4,x|y", "b.mp4,y", "c.mp4,"])
    manifest = read_manifest(out)
    assert (manifest.labelling, manifest.targets, manifest.label_spaces[0].classes) == (
        "several",
        ("label",),
        ("x", "y"),
    )
    rows = decode_index((out / "ca2st-000000.index.parquet").read_bytes()).to_pylist()
    assert [row["labels"] for row in rows] == [[0, 1], [1], []]
    assert [said["labels"]["label"] for said in said_of(out)] == [
        [{"index": 0, "name": "x"}, {"index": 1, "name": "y"}],
        [{"index": 1, "name": "y"}],
        [],
    ]
    assert verify_shard_set(out) == []
    assert manifest.notes == {"samples of no class": 1}


def test_a_set_without_labels_keeps_the_classes_it_is_asked_in(tmp_path: Path) -> None:
    classes = write_lines(tmp_path / "classes.txt", ["x", "y"])
    out = convert_list(tmp_path, "path", ["a.mp4", "b.mp4"], split="test", classes=classes)
    manifest = read_manifest(out)
    assert (manifest.labelling, manifest.label_spaces[0].classes) == ("none", ("x", "y"))
    assert [said["labels"] for said in said_of(out)] == [{}, {}]
    assert verify_shard_set(out) == []


def test_c18_a_set_of_one_label_has_no_word_of_it_in_its_manifest(tmp_path: Path) -> None:
    out = convert_list(tmp_path, "path,label", ["a.mp4,x", "b.mp4,y"])
    assert "labelling" not in json.loads((out / "manifest.json").read_bytes())
    assert read_shard_set(out).manifest.labelling == "one"


def test_c19_labels_that_json_and_index_give_otherwise_are_named(tmp_path: Path) -> None:
    out = convert_list(tmp_path, "path,labels", ["a.mp4,x|y"])
    manifest, (shard,) = read_manifest(out), read_shard_set(out).shards
    table = decode_index((out / shard.index_name).read_bytes())
    metadata = {name.decode(): value.decode() for name, value in table.schema.metadata.items()}
    index = encode_index([row | {"labels": [0]} for row in table.to_pylist()], metadata)
    (out / shard.index_name).write_bytes(index)
    entry = replace(shard, index_bytes=len(index), index_sha256=hashlib.sha256(index).hexdigest())
    derived = ("num_samples", "num_shards", "shards_sha256")
    values = {one.name: getattr(manifest, one.name) for one in fields(manifest) if one.name not in derived}
    write_shard_set(out, values | {"label_spaces": (LabelSpace(name="label", classes=("x", "z")),)}, (entry,))
    told = [problem.what for problem in verify_shard_set(out) if problem.key]
    assert told == [
        "labels: [0, 1] in the sample's JSON, [0] in the index; convert again",
        "class of label: 'y' in the sample's JSON, 'z' in the index; convert again",
    ]


@pytest.mark.parametrize(
    ("labelling", "labels", "expected"),
    [
        ("several", (1, 0), "expected ascending labels of 2 classes"),
        ("several", (0, 2), "expected ascending labels of 2 classes"),
        ("none", (0,), "expected no label"),
        ("one", (), r"expected a label in each of \[2\] classes"),
    ],
)
def test_labels_that_a_reader_got_wrong_are_refused(
    tmp_path: Path, labelling: str, labels: tuple[int, ...], expected: str
) -> None:
    annotations = write_lines(tmp_path / "list.csv", ["path,labels", "a.mp4,x|y"])
    source = read_dataset("csv", DatasetRequest(annotations=annotations, check_media=False))
    wrong = replace(source, labelling=labelling, samples=(replace(source.samples[0], labels=labels),))
    with pytest.raises(AnnotationError, match=expected):
        check_source(wrong)
