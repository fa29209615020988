"""The manifest vouches for itself and for the shard table, and refuses what it cannot read."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ca2st.checked_json import sha256_of_json
from sharding.errors import ManifestError, ShardDamageError
from sharding.format.shard_set import (
    MANIFEST_NAME,
    SHARDS_NAME,
    AudioParameters,
    LabelSpace,
    ShardEntry,
    VideoParameters,
    read_manifest,
    read_shard_set,
    write_shard_set,
)

SHARDS = (
    ShardEntry(name="ca2st-000000.tar", bytes=10, sha256="a" * 64, index_bytes=3, index_sha256="b" * 64, num_samples=2),
    ShardEntry(name="ca2st-000001.tar", bytes=20, sha256="c" * 64, index_bytes=4, index_sha256="d" * 64, num_samples=3),
)


def written(root: Path) -> Path:
    fields = {
        "dataset": "folder",
        "split": "train",
        "label_spaces": (LabelSpace(name="label", classes=("bark", "miaow", "Grüße")),),
        "targets": ("label",),
        "audio": AudioParameters(policy="optional"),
        "video": VideoParameters(),
        "tool_versions": {"av": "18"},
        "source_list_sha256": "e" * 64,
        "rejected": {"truncated": 1},
    }
    write_shard_set(root, fields, SHARDS)
    return root


def test_a_manifest_comes_back_as_it_was_written(tmp_path: Path) -> None:
    shard_set = read_shard_set(written(tmp_path))
    assert shard_set.shards == SHARDS
    assert shard_set.manifest.num_samples == 5
    assert shard_set.manifest.label_space("label").classes[2] == "Grüße"
    assert json.loads((tmp_path / MANIFEST_NAME).read_text())["self_sha256"] == shard_set.manifest.fingerprint


@given(position=st.integers(0, 10**6), bit=st.integers(0, 7), name=st.sampled_from([MANIFEST_NAME, SHARDS_NAME]))
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_a_flipped_bit_never_reads_as_a_whole_set(tmp_path: Path, position: int, bit: int, name: str) -> None:
    path = written(tmp_path) / name
    data = bytearray(path.read_bytes())
    data[position % len(data)] ^= 1 << bit
    path.write_bytes(data)
    with pytest.raises((ShardDamageError, ManifestError)):
        read_shard_set(tmp_path)


def test_a_folder_without_a_manifest_is_named(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="no such file; is it a shard folder"):
        read_manifest(tmp_path)


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "shards").write_text("no folder")
    with pytest.raises(ManifestError, match=r"cannot be read \(Not a directory\); give the folder of a shard set"):
        read_shard_set(tmp_path / "shards")


def test_an_unfinished_conversion_is_told_to_be_rerun(tmp_path: Path) -> None:
    (tmp_path / "ca2st-000000.tar").write_bytes(b"")
    with pytest.raises(ManifestError, match="has not finished: rerun it"):
        read_manifest(tmp_path)


def test_c18_a_newer_format_version_is_refused_clearly(tmp_path: Path) -> None:
    payload = json.loads((written(tmp_path) / MANIFEST_NAME).read_text())
    (tmp_path / MANIFEST_NAME).write_text(json.dumps(payload | {"format_version": 2}))
    with pytest.raises(ManifestError, match="format version 2, this ca2st reads 1"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("change", [{"tiles": 4}, {"video": {"tiles": 4}}, {"label_spaces": [3]}])
def test_c18_fields_of_another_release_are_refused_clearly(tmp_path: Path, change: dict[str, object]) -> None:
    payload = json.loads((written(tmp_path) / MANIFEST_NAME).read_text()) | change
    del payload["self_sha256"]
    text = json.dumps(payload | {"self_sha256": sha256_of_json(payload)})
    (tmp_path / MANIFEST_NAME).write_text(text)
    with pytest.raises(ManifestError, match=r"expected the fields that this ca2st knows, found others .*release"):
        read_manifest(tmp_path)


def test_a_changed_manifest_is_damage_by_its_own_hash_whatever_field_changed(tmp_path: Path) -> None:
    payload = json.loads((written(tmp_path) / MANIFEST_NAME).read_text())
    for change in ({"num_samples": 6}, {"num_samples": "6"}, {"tiles": 4}):
        (tmp_path / MANIFEST_NAME).write_text(json.dumps(payload | change))
        with pytest.raises(ShardDamageError, match=r"self_sha256 differs from the contents; restore it"):
            read_manifest(tmp_path)


def test_an_unknown_label_space_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="'verb': not in this set; it has label"):
        read_manifest(written(tmp_path)).label_space("verb")


def test_reading_a_set_starts_no_native_thread(tmp_path: Path) -> None:
    """Arrow's pools, once started, can abort a finished process at its exit."""
    written(tmp_path)
    script = (
        "import os, sys, pathlib; from sharding.format.shard_set import read_shard_set;"
        "before = len(os.listdir('/proc/self/task')); read_shard_set(pathlib.Path(sys.argv[1]));"
        "print(len(os.listdir('/proc/self/task')) - before)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "0"
