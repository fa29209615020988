"""Rejects and their budget, and what a conversion refuses (C5, C14, C16)."""

import errno
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from ca2st.durable import FaultPoints, InjectedFault
from ca2st.errors import EnvironmentFault, UserInputError
from sharding.conversion import convert
from sharding.errors import AnnotationError, ConversionRefusedError, RejectBudgetError, ShardDamageError
from sharding.folder import LOCK_NAME, folder_lock
from sharding.format.index import decode_index, encode_index
from sharding.format.shard_set import read_shard_set
from sharding.settings import ConversionConfig, RejectBudget
from sharding.source import SourceList
from sharding.verify import verify_shard_set
from support.media import damage, make_clip
from support.shards import Reference, file_hashes, sample, small_config, source_list
from support.stub_jobs import crash_on_b


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return Reference(tmp_path_factory.mktemp("reference"))


def bad_source(reference: Reference, folder: Path, kinds: dict[int, str]) -> SourceList:
    """The reference's clips with those at some positions damaged."""
    samples = list(reference.source.samples)
    for position, kind in kinds.items():
        path = damage(samples[position].path, folder / samples[position].path.name, kind)
        samples[position] = replace(samples[position], path=path)
    return source_list(samples)


def test_more_rejects_than_the_budget_end_with_names_and_without_a_manifest(
    reference: Reference, tmp_path: Path
) -> None:
    source, out = bad_source(reference, tmp_path, {1: "text", 4: "half"}), tmp_path / "out"
    with pytest.raises(RejectBudgetError) as caught:
        convert(source, out, small_config(max_rejects=RejectBudget(count=1)))
    message = str(caught.value)
    assert caught.value.exit_code == 3
    assert "2 of 5 samples rejected, --max-rejects allows 1" in message
    assert f"not_a_video 1 ({tmp_path / 'clip_1.mp4'} [list.csv:clip_1]: " in message
    assert "truncated 1 (" in message
    assert not (out / "manifest.json").exists()
    lines = [json.loads(line) for line in (out / "rejects.jsonl").read_text().splitlines()]
    assert [(line["position"], line["sample_id"], line["reason"]) for line in lines] == [
        (1, "clip_1", "not_a_video"),
        (4, "clip_4", "truncated"),
    ]


@pytest.mark.parametrize("budget", [RejectBudget(count=2), RejectBudget(fraction=0.4)])
def test_rejects_within_the_budget_are_counted_and_kept_by_name(
    reference: Reference, tmp_path: Path, budget: RejectBudget
) -> None:
    source, out = bad_source(reference, tmp_path, {1: "text", 4: "half"}), tmp_path / "out"
    report = convert(source, out, small_config(max_rejects=budget))
    assert (report.num_samples, report.rejected) == (3, {"not_a_video": 1, "truncated": 1})
    assert read_shard_set(out).manifest.rejected == {"not_a_video": 1, "truncated": 1}
    assert len((out / "rejects.jsonl").read_text().splitlines()) == 2
    assert verify_shard_set(out) == []


def test_a_larger_budget_finishes_what_a_smaller_one_refused(reference: Reference, tmp_path: Path) -> None:
    source, out = bad_source(reference, tmp_path, {1: "text"}), tmp_path / "out"
    with pytest.raises(RejectBudgetError):
        convert(source, out, small_config())
    finished = convert(source, out, small_config(max_rejects=RejectBudget(count=1)))
    direct = convert(source, tmp_path / "direct", small_config(max_rejects=RejectBudget(count=1)))
    assert finished.num_samples == direct.num_samples == 4
    assert file_hashes(out) == file_hashes(tmp_path / "direct")


@pytest.mark.parametrize("position", [0, 3, 4])
def test_a_repaired_source_is_taken_up_by_a_rerun(reference: Reference, tmp_path: Path, position: int) -> None:
    source, out = bad_source(reference, tmp_path, {position: "half"}), tmp_path / "out"
    with pytest.raises(RejectBudgetError):
        convert(source, out, small_config())
    whole = reference.source.samples[position].path
    (tmp_path / whole.name).write_bytes(whole.read_bytes())
    convert(source, out, small_config())
    assert file_hashes(out) == reference.hashes


def test_a_source_that_went_bad_behind_the_last_finished_shard_is_counted(reference: Reference, tmp_path: Path) -> None:
    source, out = bad_source(reference, tmp_path, {}), tmp_path / "out"
    copy = tmp_path / source.samples[4].path.name
    copy.write_bytes(source.samples[4].path.read_bytes())
    source = source_list([*source.samples[:4], replace(source.samples[4], path=copy)])
    with pytest.raises(InjectedFault):
        convert(source, out, small_config(), faults=FaultPoints(point="shard.renamed", nth=2, kind="raise"))
    copy.write_bytes(b"")
    budget = RejectBudget(count=1)
    convert(source, out, small_config(max_rejects=budget))
    convert(source, tmp_path / "direct", small_config(max_rejects=budget))
    assert file_hashes(out) == file_hashes(tmp_path / "direct")
    assert verify_shard_set(out) == []


def test_c5_a_crash_a_hang_and_a_lack_of_memory_cost_one_clip_each(tmp_path: Path) -> None:
    names = ("a", "b", "c", "h", "m", "z")
    clips = [make_clip(tmp_path / f"{name}.mp4", seconds=0.1, size=(32, 32)) for name in names]
    config = small_config(workers=2, clip_timeout_seconds=2.0, max_rejects=RejectBudget(count=3))
    report = convert(source_list([sample(clip) for clip in clips]), tmp_path / "out", config, encode=crash_on_b)
    assert report.rejected == {"decoder_crash": 1, "out_of_memory": 1, "timeout": 1}
    assert report.num_samples == 3


def test_c16_when_every_video_is_bad_nothing_is_left(reference: Reference, tmp_path: Path) -> None:
    source = bad_source(reference, tmp_path, dict.fromkeys(range(5), "text"))
    with pytest.raises(
        UserInputError, match="all 5 samples were rejected, nothing was written: not_a_video 5"
    ) as caught:
        convert(source, tmp_path / "out", small_config(max_rejects=RejectBudget(fraction=1.0)))
    assert caught.value.exit_code == 2
    assert not (tmp_path / "out").exists()


def test_c16_no_samples_or_no_media_at_all_are_refused_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(UserInputError, match="expected at least one sample, found none"):
        convert(source_list([]), tmp_path / "out", small_config())
    with pytest.raises(
        UserInputError, match=r"none of the 1 media files exists; the first is .*gone.mp4 \(list.csv:gone\)"
    ):
        convert(source_list([sample(tmp_path / "gone.mp4")]), tmp_path / "out", small_config())
    assert not (tmp_path / "out").exists()


def test_an_id_that_is_there_twice_names_both_rows(reference: Reference, tmp_path: Path) -> None:
    first, second = reference.source.samples[0], reference.source.samples[1]
    twice = source_list([first, replace(second, sample_id=first.sample_id)])
    with pytest.raises(
        AnnotationError, match=r"list.csv:clip_1: sample id 'clip_0' is there already, at list.csv:clip_0"
    ):
        convert(twice, tmp_path / "out", small_config())


@pytest.mark.parametrize("field", ["sample_id", "path"])
def test_c9_a_name_that_is_no_text_is_refused_and_the_message_can_be_printed(
    reference: Reference, tmp_path: Path, field: str
) -> None:
    name = os.fsdecode(b"caf\xe9.mp4")
    odd = replace(reference.source.samples[0], **{field: Path(name) if field == "path" else name})
    with pytest.raises(AnnotationError, match=r"list\.csv:.*expected a name that UTF-8 can write, .*udce9") as caught:
        convert(source_list([odd, *reference.source.samples[1:]]), tmp_path / "out", small_config())
    str(caught.value).encode()
    assert not (tmp_path / "out").exists()


def test_a_label_outside_its_space_is_refused(reference: Reference, tmp_path: Path) -> None:
    for labels in ((2,), (-1,), (0, 0)):
        wrong = source_list([replace(reference.source.samples[0], labels=labels)])
        with pytest.raises(AnnotationError, match=r"list.csv:clip_0: expected a label in each of \[2\] classes"):
            convert(wrong, tmp_path / "out", small_config())


def other_parameters(source: SourceList) -> tuple[SourceList, ConversionConfig]:
    return source, small_config(quality=7)


def other_sources(source: SourceList) -> tuple[SourceList, ConversionConfig]:
    return replace(source, samples=source.samples[:4]), small_config()


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (other_parameters, "video.quality: there 5, now 7"),
        (other_sources, r"another list of files, segments, labels or classes \(source_list_sha256\): there "),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_the_folder_of_another_conversion_is_refused_with_the_difference(
    reference: Reference,
    tmp_path: Path,
    change: Callable[[SourceList], tuple[SourceList, ConversionConfig]],
    difference: str,
    finished: bool,
) -> None:
    out = reference.root
    if not finished:
        out = tmp_path / "out"
        out.mkdir()
        for name in ("ca2st-000000.tar", "ca2st-000000.index.parquet"):
            (out / name).write_bytes((reference.root / name).read_bytes())
    before = file_hashes(out)
    source, config = change(reference.source)
    with pytest.raises(ConversionRefusedError, match=difference):
        convert(source, out, config)
    assert file_hashes(out) == before


def test_other_tool_versions_are_refused(reference: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sharding.settings.platform.machine", lambda: "pdp11")
    with pytest.raises(ConversionRefusedError, match=r"tool_versions.machine: there .*, now 'pdp11'"):
        convert(reference.source, reference.root, small_config())


def test_a_folder_with_anything_else_in_it_and_a_file_are_refused(reference: Reference, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(
        ConversionRefusedError, match=r"expected an empty folder or an unfinished conversion, found notes.txt"
    ):
        convert(reference.source, tmp_path, small_config())
    with pytest.raises(UserInputError, match="expected a folder, found a file"):
        convert(reference.source, tmp_path / "notes.txt", small_config())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt"]


def test_c14_a_second_converter_is_refused_and_told_the_holder(reference: Reference, tmp_path: Path) -> None:
    with folder_lock(tmp_path), pytest.raises(ConversionRefusedError, match=f"process {os.getpid()} on "):
        convert(reference.source, tmp_path, small_config())
    assert not (tmp_path / LOCK_NAME).exists()


def test_a_lock_that_is_a_symbolic_link_is_refused_and_its_target_untouched(tmp_path: Path) -> None:
    (tmp_path / "theirs").write_text("theirs")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / LOCK_NAME).symlink_to(tmp_path / "theirs")
    with pytest.raises(EnvironmentFault, match=r"cannot lock .*expected a file of a conversion, found a symbolic link"):
        with folder_lock(tmp_path / "out"):
            pass
    assert (tmp_path / "theirs").read_text() == "theirs"


def test_a_lock_that_cannot_be_made_is_a_fault_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", no_locks)
    with pytest.raises(EnvironmentFault, match=r"cannot lock .*No locks available; choose another folder"):
        with folder_lock(tmp_path):
            pass
    with pytest.raises(EnvironmentFault, match=r"cannot lock .*No such file or directory"):
        with folder_lock(tmp_path / "nowhere"):
            pass


def test_c14_the_lock_and_temporary_files_of_a_dead_converter_are_taken_over(
    reference: Reference, tmp_path: Path
) -> None:
    (tmp_path / LOCK_NAME).write_text('{"pid": 1, "host": "gone"}')
    (tmp_path / ".ca2st-000000.tar.999.tmp").write_bytes(b"half a shard")
    convert(reference.source, tmp_path, small_config())
    assert file_hashes(tmp_path) == reference.hashes


def test_a_finished_set_with_a_shard_missing_is_damage_not_work_to_do(reference: Reference, tmp_path: Path) -> None:
    for path in reference.root.iterdir():
        if path.name != "ca2st-000001.tar":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(ShardDamageError, match=r"ca2st-000001.tar or its index is missing, .*see `ca2st shard verify"):
        convert(reference.source, tmp_path, small_config())


def test_a_finished_set_with_another_index_is_damage(reference: Reference, tmp_path: Path) -> None:
    for path in reference.root.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    table = decode_index((tmp_path / "ca2st-000001.index.parquet").read_bytes())
    metadata = {name.decode(): value.decode() for name, value in table.schema.metadata.items()}
    rows = [row | {"labels": [0]} for row in table.to_pylist()]
    (tmp_path / "ca2st-000001.index.parquet").write_bytes(encode_index(rows, metadata))
    with pytest.raises(ShardDamageError, match=r"ca2st-000001.tar or its index is missing, cut short or changed"):
        convert(reference.source, tmp_path, small_config())
