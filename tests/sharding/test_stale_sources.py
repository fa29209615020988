"""What is kept beside a set: sources that changed are noticed, and no index is trusted that was damaged since."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ca2st.checked_json import sha256_of_json
from ca2st.durable import FaultPoints, InjectedFault
from sharding.conversion import convert
from sharding.errors import ConversionRefusedError, ShardDamageError
from sharding.folder import SOURCES_NAME
from sharding.format.index import decode_index, encode_index
from sharding.format.shard_set import read_shard_set
from sharding.media import claims
from sharding.media.encode import ClipJob, EncodedClip, encode_clip
from sharding.settings import LEAST_SHARD_BYTES, RejectBudget
from sharding.source import SourceList
from sharding.verify import verify_shard_set
from support.media import make_clip
from support.shards import file_hashes, sample, small_clips, small_config, source_list


@pytest.fixture
def source(tmp_path: Path) -> SourceList:
    return small_clips(tmp_path / "media", 5)


def relabelled(index: bytes) -> bytes:
    """An index whose first sample has the other label: what one flipped bit can do."""
    table = decode_index(index)
    metadata = {name.decode(): value.decode() for name, value in table.schema.metadata.items()}
    rows = table.to_pylist()
    rows[0]["labels"] = [1 - rows[0]["labels"][0]]
    return encode_index(rows, metadata)


def begun(source: SourceList, out: Path, *, num_shards: int = 2) -> None:
    faults = FaultPoints(point="sample", nth=2 * num_shards + 1, kind="raise")
    with pytest.raises(InjectedFault):
        convert(source, out, small_config(), faults=faults)
    assert len(list(out.glob("*.tar"))) >= 1


def test_a_finished_set_whose_source_was_replaced_is_refused_and_converted_again_where_asked(
    source: SourceList, tmp_path: Path
) -> None:
    out, path = tmp_path / "out", source.samples[3].path
    convert(source, out, small_config())
    before = file_hashes(out)
    first = (out / "ca2st-000000.tar").stat().st_mtime_ns
    make_clip(path, seconds=0.2, size=(48, 32))
    with pytest.raises(
        ConversionRefusedError,
        match=rf"holds a finished set, but 1 source files \({path}: \d+ bytes, now \d+\).*--update",
    ):
        convert(source, out, small_config())
    assert file_hashes(out) == before
    convert(source, out, small_config(update=True))
    convert(source, tmp_path / "fresh", small_config())
    assert file_hashes(out) == file_hashes(tmp_path / "fresh") != before
    assert (out / SOURCES_NAME).read_bytes() == (tmp_path / "fresh" / SOURCES_NAME).read_bytes()
    assert (out / "ca2st-000000.tar").stat().st_mtime_ns == first, "shards before the changed source stay"
    assert verify_shard_set(out) == []


def test_a_reject_of_a_finished_set_that_was_repaired_is_noticed(source: SourceList, tmp_path: Path) -> None:
    path, out = source.samples[2].path, tmp_path / "out"
    whole = path.read_bytes()
    path.write_bytes(b"")
    budget = RejectBudget(count=1)
    assert convert(source, out, small_config(max_rejects=budget)).num_samples == 4
    path.write_bytes(whole)
    with pytest.raises(ConversionRefusedError, match=rf"{path.name}: 0 bytes, now {len(whole)}"):
        convert(source, out, small_config(max_rejects=budget))
    assert convert(source, out, small_config(max_rejects=budget, update=True)).num_samples == 5
    convert(source, tmp_path / "fresh", small_config())
    assert file_hashes(out) == file_hashes(tmp_path / "fresh")


def test_a_file_of_the_same_size_and_another_time_is_noticed_too(source: SourceList, tmp_path: Path) -> None:
    out, path = tmp_path / "out", source.samples[0].path
    convert(source, out, small_config())
    os.utime(path, ns=(1, 1))
    with pytest.raises(
        ConversionRefusedError, match=r"modified since, .* bytes as before.*remove .*sources\.jsonl to keep"
    ):
        convert(source, out, small_config())
    (out / SOURCES_NAME).unlink()
    assert convert(source, out, small_config()).num_samples == 5, "a copy without the file is a set like any other"


def test_sources_that_are_gone_leave_a_finished_set_alone(source: SourceList, tmp_path: Path) -> None:
    convert(source, tmp_path / "out", small_config())
    for one in source.samples[1:]:
        one.path.unlink()
    assert convert(source, tmp_path / "out", small_config()).num_samples == 5


@pytest.mark.parametrize("position", [0, 1, 2, 3])
def test_an_unfinished_conversion_goes_on_from_the_first_shard_whose_sources_changed(
    source: SourceList, tmp_path: Path, position: int
) -> None:
    begun(source, tmp_path / "out")
    make_clip(source.samples[position].path, seconds=1 / 30, size=(32, 32))
    convert(source, tmp_path / "out", small_config())
    convert(source, tmp_path / "fresh", small_config())
    assert file_hashes(tmp_path / "out") == file_hashes(tmp_path / "fresh")


def test_the_same_sources_give_the_same_file_for_any_number_of_workers_and_any_interruption(
    source: SourceList, tmp_path: Path
) -> None:
    begun(source, tmp_path / "one")
    for name, workers in (("one", 1), ("two", 2)):
        convert(source, tmp_path / name, small_config(workers=workers))
    assert (tmp_path / "one" / SOURCES_NAME).read_bytes() == (tmp_path / "two" / SOURCES_NAME).read_bytes()


@pytest.mark.parametrize("with_hashes", [True, False])
def test_a_damaged_index_of_an_unfinished_conversion_is_not_trusted(
    source: SourceList, tmp_path: Path, with_hashes: bool
) -> None:
    out = tmp_path / "out"
    begun(source, out)
    index = out / "ca2st-000000.index.parquet"
    index.write_bytes(relabelled(index.read_bytes()))
    if not with_hashes:
        (out / SOURCES_NAME).unlink()
    convert(source, out, small_config())
    convert(source, tmp_path / "fresh", small_config())
    assert file_hashes(out) == file_hashes(tmp_path / "fresh")


def test_ranges_that_do_not_join_are_converted_again(source: SourceList, tmp_path: Path) -> None:
    """The second shard is that of a list whose second and third source stood in each other's place."""
    out, other = tmp_path / "out", tmp_path / "other"
    begun(source, out)
    convert(source, other, small_config(shard_bytes=LEAST_SHARD_BYTES))
    for suffix in ("tar", "index.parquet"):
        (out / f"ca2st-000001.{suffix}").write_bytes((other / f"ca2st-000001.{suffix}").read_bytes())
    index = out / "ca2st-000001.index.parquet"
    table = decode_index(index.read_bytes())
    theirs = decode_index((out / "ca2st-000000.index.parquet").read_bytes()).schema.metadata
    metadata = {name.decode(): value.decode() for name, value in table.schema.metadata.items()}
    index.write_bytes(encode_index(table.to_pylist(), metadata | {"conversion": theirs[b"conversion"].decode()}))
    (out / SOURCES_NAME).unlink()
    convert(source, out, small_config())
    convert(source, tmp_path / "fresh", small_config())
    assert file_hashes(out) == file_hashes(tmp_path / "fresh")


def test_shards_that_were_left_behind_the_end_are_removed(source: SourceList, tmp_path: Path) -> None:
    out = tmp_path / "out"
    begun(source, out)
    for suffix in ("tar", "index.parquet"):
        (out / f"ca2st-000007.{suffix}").write_bytes((out / f"ca2st-000000.{suffix}").read_bytes())
    convert(source, out, small_config())
    assert not list(out.glob("ca2st-000007*"))
    assert verify_shard_set(out) == []


def rewritten(out: Path, index: bytes) -> None:
    """Have the whole set vouch for another index of its first shard, as a conversion that trusted it did."""
    import hashlib

    from sharding.format.shard_set import write_shard_set

    shard_set = read_shard_set(out)
    (out / "ca2st-000000.index.parquet").write_bytes(index)
    first = replace(shard_set.shards[0], index_sha256=hashlib.sha256(index).hexdigest(), index_bytes=len(index))
    names = ("dataset", "split", "label_spaces", "targets", "audio", "video", "tool_versions", "source_list_sha256")
    fields = {name: getattr(shard_set.manifest, name) for name in (*names, "rejected", "notes")}
    write_shard_set(out, fields, (first, *shard_set.shards[1:]))
    (out / SOURCES_NAME).unlink()


def test_verify_names_a_label_that_the_samples_json_contradicts(source: SourceList, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(source, out, small_config())
    rewritten(out, relabelled((out / "ca2st-000000.index.parquet").read_bytes()))
    [problem] = verify_shard_set(out)
    assert problem.shard == "ca2st-000000.index.parquet"
    assert problem.what == "labels: {'label': 0} in the sample's JSON, {'label': 1} in the index; convert again"


def test_verify_names_samples_that_the_manifest_counts_otherwise(source: SourceList, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(source, out, small_config())
    payload = json.loads((out / "manifest.json").read_text()) | {"num_samples": 6}
    del payload["self_sha256"]
    document = payload | {"self_sha256": sha256_of_json(payload)}
    text = json.dumps(document, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    (out / "manifest.json").write_text(text)
    with pytest.raises(ShardDamageError, match="expected the manifest's 6 samples, found 5"):
        read_shard_set(out)
    assert [problem.shard for problem in verify_shard_set(out)] == ["shards.parquet"]


def test_c13_a_source_that_vanishes_before_it_is_read_is_a_reject_with_its_own_reason(tmp_path: Path) -> None:
    source = small_clips(tmp_path / "media", 2)
    gone = source_list([*source.samples, sample(tmp_path / "media" / "gone.mp4")])
    report = convert(gone, tmp_path / "out", small_config(max_rejects=RejectBudget(count=1)))
    assert report.rejected == {"missing_file": 1}


def encode_while_another_writes(job: ClipJob) -> EncodedClip:
    """In a decode child: ``changing`` gets another time after it was looked at; writing itself is forbidden there."""
    opened = claims.open_media

    def open_changed(path: Path) -> Any:
        if path.stem == "changing":
            os.utime(path, (1, 1))
        return opened(path)

    claims.open_media = open_changed
    try:
        return encode_clip(job)
    finally:
        claims.open_media = opened


def test_c13_a_source_that_changes_while_it_is_read_is_a_reject_and_the_set_is_sound(tmp_path: Path) -> None:
    whole = small_clips(tmp_path / "media", 2)
    changing = make_clip(tmp_path / "media" / "changing.mp4", seconds=0.2, size=(32, 32))
    source = source_list([whole.samples[0], sample(changing), whole.samples[1]])
    out, config = tmp_path / "out", small_config(max_rejects=RejectBudget(count=1))
    report = convert(source, out, config, encode=encode_while_another_writes)
    assert (report.num_samples, report.rejected) == (2, {"source_changed": 1})
    (reject,) = (out / "rejects.jsonl").read_text().splitlines()
    assert json.loads(reject)["sample_id"] == "changing"
    assert verify_shard_set(out) == []


def test_a_rerun_says_where_it_resumes_and_when_nothing_is_left(
    source: SourceList, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    caplog.set_level("INFO", logger="sharding.conversion")
    with pytest.raises(InjectedFault):
        convert(source, out, small_config(), faults=FaultPoints(point="shard.renamed", nth=2, kind="raise"))
    convert(source, out, small_config())
    assert "resuming after" in caplog.text
    assert "already finished" not in caplog.text
    convert(source, out, small_config())
    assert f"already finished, nothing to convert: {out}" in caplog.text
