"""Adding to a finished set: new shards and a new manifest, the old shards as they are."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from ca2st.durable import FaultPoints, InjectedFault
from ca2st.errors import UserInputError
from sharding.conversion import convert
from sharding.errors import ConversionRefusedError, RejectBudgetError
from sharding.format.index import decode_index, sample_key
from sharding.format.shard_set import LabelSpace, read_shard_set
from sharding.settings import RejectBudget
from sharding.source import SourceList
from sharding.verify import verify_shard_set
from support.shards import file_hashes, small_clips, small_config, source_list

NEW = small_config(append=True)


@pytest.fixture
def source(tmp_path: Path) -> SourceList:
    return small_clips(tmp_path / "media", 9)


def parts(source: SourceList) -> tuple[SourceList, SourceList]:
    return source_list(source.samples[:5]), source_list(source.samples[5:])


def keys(root: Path) -> list[str]:
    found = []
    for shard in read_shard_set(root).shards:
        found += decode_index((root / shard.index_name).read_bytes(), columns=["key"])["key"].to_pylist()
    return found


def test_an_added_list_makes_a_new_manifest_over_old_and_new_shards(source: SourceList, tmp_path: Path) -> None:
    first, second = parts(source)
    out = tmp_path / "out"
    convert(first, out, small_config())
    before = file_hashes(out)
    report = convert(second, out, NEW)
    assert (report.num_samples, report.num_shards) == (9, 5)
    assert keys(out) == [sample_key(sample.sample_id) for sample in source.samples]
    after = file_hashes(out)
    for name in before.keys() - {"manifest.json", "shards.parquet"}:
        assert after[name] == before[name], "an old shard is as it was"
    assert read_shard_set(out).manifest.source_lists == (first.sha256, second.sha256)
    assert verify_shard_set(out) == []
    assert convert(second, out, NEW).clips_per_second == 0, "run again, it is found finished"
    assert file_hashes(out) == after


def test_c1_an_addition_that_is_stopped_anywhere_leaves_the_old_set_and_ends_with_the_same_bytes(
    source: SourceList, tmp_path: Path
) -> None:
    first, second = parts(source)
    convert(first, tmp_path / "fresh", small_config())
    convert(second, tmp_path / "fresh", NEW)
    for point in ("sample", "shard.written", "shard.renamed", "shards_table.renamed", "manifest.written"):
        out = tmp_path / point
        convert(first, out, small_config())
        with pytest.raises(InjectedFault):
            convert(second, out, NEW, faults=FaultPoints(point=point, kind="raise"))
        assert read_shard_set(out).manifest.num_samples == 5
        assert keys(out) == [sample_key(sample.sample_id) for sample in first.samples]
        convert(second, out, NEW)
        assert file_hashes(out) == file_hashes(tmp_path / "fresh")


def test_rejects_of_both_lists_are_counted_and_listed_and_the_budget_is_that_of_the_new_one(
    source: SourceList, tmp_path: Path
) -> None:
    first, second = parts(source)
    out = tmp_path / "out"
    for sample in (first.samples[1], second.samples[2]):
        sample.path.write_bytes(b"no video at all")
    convert(first, out, small_config(max_rejects=RejectBudget(count=1)))
    with pytest.raises(RejectBudgetError, match="1 of 4 samples rejected, --max-rejects allows 0"):
        convert(second, out, NEW)
    assert len((out / "rejects.jsonl").read_text().splitlines()) == 1, "the old set's list is as it was"
    report = convert(second, out, replace(NEW, max_rejects=RejectBudget(count=1)))
    assert (report.num_samples, report.rejected) == (7, {"not_a_video": 2})
    lines = [json.loads(line) for line in (out / "rejects.jsonl").read_text().splitlines()]
    assert [line["sample_id"] for line in lines] == ["clip_1", "clip_7"]
    assert verify_shard_set(out) == []


def test_what_cannot_be_added_is_refused_and_nothing_is_changed(source: SourceList, tmp_path: Path) -> None:
    first, second = parts(source)
    out = tmp_path / "out"
    with pytest.raises(ConversionRefusedError, match=r"--append: expected a finished set to add to, found no manifest"):
        convert(second, out, NEW)
    convert(first, out, small_config())
    before = file_hashes(out)
    again = source_list([*second.samples, first.samples[3]])
    with pytest.raises(ConversionRefusedError, match=r"list.csv:clip_3: sample id 'clip_3' is in .*out already"):
        convert(again, out, NEW)
    with pytest.raises(ConversionRefusedError, match=r"--append: expected the video of the set that is there"):
        convert(second, out, replace(NEW, quality=7))
    others = replace(second, label_spaces=(LabelSpace(name="label", classes=("dot", "other")),))
    with pytest.raises(ConversionRefusedError, match=r"--append: expected the label_spaces of the set"):
        convert(others, out, NEW)
    with pytest.raises(UserInputError, match="append, update: expected one of them at a time"):
        replace(NEW, update=True)
    assert file_hashes(out) == before
