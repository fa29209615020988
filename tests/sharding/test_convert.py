"""Conversion as a whole: reproducible, resumable, interruptible (C1, C2, C15)."""

import gc
import hashlib
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import webdataset

from ca2st.durable import FaultPoints, InjectedFault
from ca2st.errors import EnvironmentFault, UserInputError
from sharding import shard_task
from sharding.conversion import ConversionProgress, convert
from sharding.errors import ConversionRefusedError
from sharding.format.index import decode_index, encode_index, sample_key
from sharding.format.shard_set import read_shard_set, write_shard_set
from sharding.media.encode import ClipJob, EncodedClip, encode_clip
from sharding.settings import LEAST_SHARD_BYTES, RejectBudget
from sharding.shard_task import LocalWorkers
from sharding.verify import verify_shard_set
from support.media import Sound, make_clip
from support.processes import python_path
from support.ray_nodes import NEEDED
from support.shards import COUNT, Reference, file_hashes, sample, small_clips, small_config, source_list

DIE = "from support.convert_and_die import main; main()"


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return Reference(tmp_path_factory.mktemp("reference"))


def python(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    paths = {**os.environ, "PYTHONPATH": python_path(), **environment}
    return subprocess.Popen([sys.executable, *arguments], env=paths, stdout=subprocess.PIPE, text=True)


def test_the_report_and_the_manifest_say_what_was_made(reference: Reference) -> None:
    report, shard_set = reference.report, read_shard_set(reference.root)
    assert (report.num_samples, report.num_shards, report.num_with_audio) == (5, 3, 0)
    assert report.num_classes == {"label": 2}
    assert report.rejected == {}
    assert report.clips_per_second > 0
    assert report.manifest_path == reference.root / "manifest.json"
    assert shard_set.manifest.source_list_sha256 == reference.source.sha256
    assert shard_set.manifest.tool_versions.keys() >= {"av", "libavcodec", "numpy", "torch", "webdataset"}
    assert sum(shard.num_samples for shard in shard_set.shards) == 5
    assert verify_shard_set(reference.root) == []


def encode_with_note(job: ClipJob) -> EncodedClip:
    return replace(encode_clip(job), notes=("odd",), changes={"rotation": 90})


def mirrored(job: ClipJob) -> EncodedClip:
    return replace(encode_clip(job), notes=("mirrored",))


def test_notes_are_counted_over_clips_and_list_in_report_and_manifest_also_when_run_again(tmp_path: Path) -> None:
    source = replace(small_clips(tmp_path / "media", 5), notes={"labels that look alike": ("dot", "Dot")})
    expected = {"labels that look alike": 2, "odd": 5}
    reports = [convert(source, tmp_path / "set", small_config(), encode=encode_with_note) for _ in range(2)]
    assert [dict(report.notes) for report in reports] == [expected, expected]
    shard_set = read_shard_set(tmp_path / "set")
    assert shard_set.manifest.notes == expected
    with tarfile.open(tmp_path / "set" / shard_set.shards[0].name) as tar:
        record = tar.extractfile(next(member for member in tar if member.name.endswith(".json")))
        assert record is not None
        stored = json.load(record)
    assert (stored["changes"], stored["notes"]) == ({"rotation": 90}, ["odd"])
    assert verify_shard_set(tmp_path / "set") == []


def test_strict_refuses_notes_of_clips_by_name_and_keeps_the_shards(tmp_path: Path) -> None:
    source = small_clips(tmp_path / "media", 5)
    message = r"--strict: .*found 5 odd \(clip_0, clip_1, clip_2, clip_3, clip_4\); .*finished shards are kept"
    with pytest.raises(UserInputError, match=message):
        convert(source, tmp_path / "set", small_config(strict=True), encode=encode_with_note)
    report = convert(source, tmp_path / "set", small_config(), encode=encode_with_note)
    assert (report.num_samples, report.clips_per_second) == (5, 0)
    with pytest.raises(UserInputError, match=r"--strict: .*found 5 odd; correct or remove them"):
        convert(source, tmp_path / "set", small_config(strict=True), encode=encode_with_note)


def test_strict_accepts_what_was_only_converted(tmp_path: Path) -> None:
    report = convert(small_clips(tmp_path / "media", 2), tmp_path / "set", small_config(strict=True), encode=mirrored)
    assert dict(report.notes) == {"mirrored": 2}


def test_the_index_names_every_sample_in_source_order(reference: Reference) -> None:
    keys = []
    for shard in read_shard_set(reference.root).shards:
        table = decode_index((reference.root / shard.index_name).read_bytes())
        keys += table["key"].to_pylist()
    assert keys == [sample_key(sample.sample_id) for sample in reference.source.samples]


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # webdataset leaves the closing to the collector
def test_webdataset_itself_reads_every_sample(reference: Reference) -> None:
    shards = [str(reference.root / shard.name) for shard in read_shard_set(reference.root).shards]
    found = list(webdataset.WebDataset(shards, shardshuffle=False, empty_check=False))
    gc.collect()
    assert [sample["__key__"] for sample in found] == [
        sample_key(sample.sample_id) for sample in reference.source.samples
    ]
    for record, wanted in zip(found, reference.source.samples, strict=True):
        assert {name for name in record if not name.startswith("__")} == {"mp4", "mel.npy", "json"}
        facts = json.loads(record["json"])
        assert facts["sample_id"] == wanted.sample_id
        assert facts["labels"] == {"label": {"index": wanted.labels[0], "name": ("dot", "dash")[wanted.labels[0]]}}
        assert facts["audio"] == {"has_audio": False}


def test_sound_and_mute_clips_go_together_and_give_the_same_bytes_again(tmp_path: Path) -> None:
    clips = [
        make_clip(tmp_path / "loud.mp4", seconds=0.2, size=(32, 32), sound=Sound(seconds=0.3)),
        make_clip(tmp_path / "mute.mp4", seconds=0.2, size=(32, 32)),
    ]
    source = source_list([sample(clip) for clip in clips])
    report = convert(source, tmp_path / "out", small_config(audio_policy="optional", shard_bytes=10**7))
    table = decode_index((tmp_path / "out" / "ca2st-000000.index.parquet").read_bytes())
    assert report.num_with_audio == 1
    assert table["has_audio"].to_pylist() == [True, False]
    loud, mute = table["mel_rows"].to_pylist()
    assert (loud > 20, mute) == (True, 0)
    assert verify_shard_set(tmp_path / "out") == []
    convert(source, tmp_path / "again", small_config(audio_policy="optional", shard_bytes=10**7, workers=2))
    assert file_hashes(tmp_path / "again") == file_hashes(tmp_path / "out")


def test_c15_the_bytes_do_not_depend_on_the_number_of_workers_or_where_the_files_are(
    reference: Reference, tmp_path: Path
) -> None:
    media = tmp_path / "elsewhere"
    media.mkdir()
    for path in reference.media.iterdir():
        (media / path.name).write_bytes(path.read_bytes())
    source = replace(
        reference.source,
        samples=tuple(replace(one, path=media / one.path.name) for one in reference.source.samples),
    )
    convert(source, tmp_path / "children", small_config(workers=3))
    assert file_hashes(tmp_path / "children") == reference.hashes
    processes = partial(LocalWorkers, children_per_process=2)  # two, of which one has a single child
    convert(source, tmp_path / "processes", small_config(workers=3), pool=processes)
    assert file_hashes(tmp_path / "processes") == reference.hashes


def test_a_second_run_finds_the_set_finished_and_touches_nothing(reference: Reference) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in reference.root.iterdir()}
    report = convert(reference.source, reference.root, small_config(workers=2))
    assert (report.num_samples, report.num_shards, report.clips_per_second) == (5, 3, 0)
    assert {path.name: path.stat().st_mtime_ns for path in reference.root.iterdir()} == before


def check_killed_conversions(reference: Reference, tmp_path: Path, faults: list[str]) -> None:
    """Die at each fault, see that nothing incomplete has a final name, rerun, compare every byte."""
    process = python("-c", DIE, str(reference.media), str(tmp_path), str(COUNT), *faults, PYTHONHASHSEED="7")
    output, _ = process.communicate(timeout=240)
    assert output.splitlines() == [f"{fault} -9" for fault in faults]
    for fault in faults:
        out = tmp_path / fault
        finals = {name: digest for name, digest in file_hashes(out).items() if not name.startswith(".")}
        assert finals.items() <= reference.hashes.items()
        report = convert(reference.source, out, small_config())
        assert file_hashes(out) == reference.hashes
        assert report.num_samples == COUNT


def test_c1_a_killed_conversion_resumes_to_the_same_bytes(reference: Reference, tmp_path: Path) -> None:
    check_killed_conversions(reference, tmp_path, ["index.renamed:2", "shard.renamed:2"])


@pytest.mark.slow
def test_c1_killed_at_every_fault_point_it_resumes_to_the_same_bytes(reference: Reference, tmp_path: Path) -> None:
    points = [f"{point}.{step}:{nth}" for point in ("index", "shard") for step, nth in (("written", 1), ("renamed", 3))]
    points += [f"{point}.{step}:1" for point in ("shards_table", "manifest") for step in ("written", "renamed")]
    check_killed_conversions(reference, tmp_path, points)


@pytest.mark.parametrize("wanted", [pytest.param(5, marks=pytest.mark.slow), pytest.param(30, marks=pytest.mark.soak)])
@pytest.mark.timeout(580)
def test_c1_killed_by_progress_with_one_worker_and_with_two_it_ends_with_the_same_bytes(
    reference: Reference, tmp_path: Path, wanted: int
) -> None:
    """Kills after a random number of samples, of conversions that go on from one another until they are done."""
    numbers, num_kills, series = random.Random(0), 0, 0
    while num_kills < wanted or series < 2:
        out, series = tmp_path / str(series), series + 1
        faults = [f"sample:{numbers.randint(1, 3)}" for _ in range(3 if wanted < 30 else 5)]
        process = python("-c", DIE, str(reference.media), str(out), str(COUNT), *faults, WORKERS=str(1 + series % 2))
        output, _ = process.communicate(timeout=240)
        statuses = [int(line.split()[1]) for line in output.splitlines()]
        assert set(statuses) <= {-signal.SIGKILL, 0}
        assert len(statuses) == len(faults)
        assert statuses[0] == -signal.SIGKILL
        num_kills += statuses.count(-signal.SIGKILL)
        finals = {name: digest for name, digest in file_hashes(out / "sample").items() if not name.startswith(".")}
        assert finals.items() <= reference.hashes.items()
        convert(reference.source, out / "sample", small_config())
        assert file_hashes(out / "sample") == reference.hashes


def test_a_worker_process_that_is_killed_ends_the_conversion_with_its_shard_and_a_rerun_goes_on(
    reference: Reference, tmp_path: Path
) -> None:
    def kill_a_worker(_step: ConversionProgress) -> None:
        for child in multiprocessing.active_children():
            child.kill()

    processes = partial(LocalWorkers, children_per_process=1)
    ended = r"a conversion worker ended while it made ca2st-00000\d.tar \(SIGKILL\); is memory short\? finished shards"
    with pytest.raises(EnvironmentFault, match=ended):
        convert(reference.source, tmp_path / "out", small_config(workers=2), pool=processes, progress=kill_a_worker)
    convert(reference.source, tmp_path / "out", small_config(workers=2), pool=processes)
    assert file_hashes(tmp_path / "out") == reference.hashes


def test_a_resumed_conversion_keeps_its_finished_shards(reference: Reference, tmp_path: Path) -> None:
    with pytest.raises(InjectedFault):
        convert(
            reference.source,
            tmp_path / "out",
            small_config(),
            faults=FaultPoints(point="shard.renamed", nth=2, kind="raise"),
        )
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.tar")}
    assert sorted(before) == ["ca2st-000000.tar", "ca2st-000001.tar"]
    seen: list[ConversionProgress] = []
    convert(reference.source, tmp_path / "out", small_config(), progress=seen.append)
    assert file_hashes(tmp_path / "out") == reference.hashes
    assert {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in before} == before
    assert [step.num_done for step in seen] == [5]


def test_a_full_disk_names_the_file_keeps_finished_shards_and_leaves_no_partial_one(
    reference: Reference, tmp_path: Path
) -> None:
    faults = FaultPoints(point="shard.written", nth=2, kind="enospc")
    with pytest.raises(EnvironmentFault, match=r"cannot write .*ca2st-000001.tar: No space left on device"):
        convert(reference.source, tmp_path / "out", small_config(), faults=faults)
    assert sorted(path.name for path in (tmp_path / "out").glob("*")) == [
        "ca2st-000000.index.parquet", "ca2st-000000.tar", "ca2st-000001.index.parquet", "sources.jsonl",
    ]  # fmt: skip
    convert(reference.source, tmp_path / "out", small_config())
    assert file_hashes(tmp_path / "out") == reference.hashes


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[tuple[Path, Callable[[str], None]]]:
    """A real file system of 64 KiB, and how to make it larger; only root can make one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True).returncode:
        assert not NEEDED, "CI must be allowed to mount a small file system"
        pytest.skip("mounting a small file system is not allowed here")
    yield disk, lambda size: subprocess.run(["mount", "-o", f"remount,size={size}", disk], check=True) and None
    subprocess.run(["umount", disk], check=True)


def test_c3_a_disk_that_is_full_names_file_and_need_keeps_finished_shards_and_goes_on_once_there_is_room(
    reference: Reference, small_disk: tuple[Path, Callable[[str], None]], caplog: pytest.LogCaptureFixture
) -> None:
    disk, resize = small_disk
    with pytest.raises(
        EnvironmentFault, match=r"cannot write .*ca2st-00000\d\.\w+.*: No space left on device"
    ) as caught:
        convert(reference.source, disk / "out", small_config())
    assert "are still to come; rerun to go on" in caught.value.__notes__[0]
    assert "MB are to be written (an estimate)" in caplog.text, "said before the first clip"
    assert not list((disk / "out").glob(".*.tmp"))
    done = {path.name: path.stat().st_mtime_ns for path in (disk / "out").glob("*.tar")}
    assert done
    resize("4m")
    convert(reference.source, disk / "out", small_config())
    assert file_hashes(disk / "out") == reference.hashes
    assert {name: (disk / "out" / name).stat().st_mtime_ns for name in done} == done


def test_c2_an_interrupt_ends_the_run_leaves_no_process_and_can_be_resumed(
    reference: Reference, tmp_path: Path
) -> None:
    script = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom support.shards import *\n"
        # A shell that runs the tests in its background has them ignore SIGINT; a person's terminal does not.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "media, out = Path(sys.argv[1]), Path(sys.argv[2])\n"
        f"source = source_list([sample(media / f'clip_{{n}}.mp4', label=n % 2) for n in range({COUNT})])\n"
        "def progress(step):\n"
        "    print(step.num_done, *open(f'/proc/self/task/{os.getpid()}/children').read().split(), flush=True)\n"
        "    import time; time.sleep(0.5)\n"
        "convert(source, out, small_config(workers=2), progress=progress)\n"
    )
    out = tmp_path / "out"
    process = python("-c", script, str(reference.media), str(out))
    assert process.stdout is not None
    children = [int(pid) for pid in process.stdout.readline().split()[1:]]
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode in (130, -signal.SIGINT)
    assert children
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and any(Path(f"/proc/{pid}").exists() for pid in children):
        time.sleep(0.05)
    assert not any(Path(f"/proc/{pid}").exists() for pid in children)
    assert not list(out.glob(".*")), "neither a temporary file nor a lock stays behind"
    convert(reference.source, out, small_config())
    assert file_hashes(out) == reference.hashes


def test_an_end_before_the_first_clip_does_not_wait_for_torch(
    reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_over, loaded = threading.Event(), threading.Event()

    def load() -> None:
        is_over.wait(60)
        loaded.set()

    monkeypatch.setattr(shard_task, "load_filter_bank", load)
    monkeypatch.setattr(shard_task.DecodePool, "map", _interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert(reference.source, tmp_path / "out", small_config(audio_policy="optional"))
    assert not loaded.is_set()
    is_over.set()


def _interrupted(_pool: object, jobs: Iterator[ClipJob]) -> Iterator[EncodedClip]:
    next(jobs)
    raise KeyboardInterrupt
    yield


def test_without_torchaudio_a_conversion_ends_with_advice_and_one_without_sound_does_not_need_it(
    reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchaudio.compliance.kaldi", None)
    with pytest.raises(EnvironmentFault, match=r"spectrograms need torch and torchaudio, found .*--audio none"):
        convert(reference.source, tmp_path / "out", small_config(audio_policy="optional"))
    convert(reference.source, tmp_path / "silent", small_config())
    assert file_hashes(tmp_path / "silent") == reference.hashes


def test_the_filter_bank_is_imported_once_and_its_first_error_is_told(
    reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors: list[Exception] = [EnvironmentFault("the cause"), RuntimeError("half of torch is there already")]

    def load() -> None:
        raise errors.pop(0)

    monkeypatch.setattr(shard_task, "load_filter_bank", load)
    with pytest.raises(EnvironmentFault, match="the cause"):
        convert(reference.source, tmp_path / "out", small_config(audio_policy="optional"))


def test_what_is_left_of_a_shard_that_the_plan_does_not_have_is_removed(reference: Reference, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "ca2st-000009.tar").write_bytes(b"cut short")
    convert(reference.source, out, small_config())
    assert file_hashes(out) == reference.hashes


def test_a_sample_larger_than_a_shard_gets_one_of_its_own(reference: Reference, tmp_path: Path) -> None:
    report = convert(reference.source, tmp_path / "out", small_config(shard_bytes=LEAST_SHARD_BYTES))
    assert report.num_shards == 5
    report = convert(reference.source, tmp_path / "one", small_config(shard_bytes=10**9))
    assert report.num_shards == 1


def test_a_shard_whose_sources_are_all_rejected_is_left_out_and_every_reject_is_vouched_for(
    reference: Reference, tmp_path: Path
) -> None:
    samples = list(reference.source.samples)
    for position in (2, 3):
        bad = tmp_path / samples[position].path.name
        bad.write_bytes(b"no video at all")
        samples[position] = replace(samples[position], path=bad)
    source, out = source_list(samples), tmp_path / "out"
    config = small_config(max_rejects=RejectBudget(count=2))
    report = convert(source, out, config)
    assert [shard.name for shard in read_shard_set(out).shards] == ["ca2st-000000.tar", "ca2st-000002.tar"]
    assert (report.num_samples, report.rejected) == (3, {"not_a_video": 2})
    assert verify_shard_set(out) == []
    assert convert(source, out, config).clips_per_second == 0
    rejects = (out / "rejects.jsonl").read_bytes()
    (out / "rejects.jsonl").write_bytes(rejects.replace(b"not_a_video", b"not_a_movie", 1))
    assert [problem.shard for problem in verify_shard_set(out)] == ["rejects.jsonl"]


def test_a_conversion_that_an_earlier_version_began_is_refused_with_what_to_do_and_its_finished_set_is_not(
    reference: Reference, tmp_path: Path
) -> None:
    """Shards of before were cut as they filled; their indexes name no plan."""
    source, out = reference.source, tmp_path / "out"
    convert(source, out, small_config(shard_bytes=10**9))
    entry = read_shard_set(out).shards[0]
    table = decode_index((out / entry.index_name).read_bytes())
    metadata = {name.decode(): value.decode() for name, value in table.schema.metadata.items()}
    conversion = json.loads(metadata["conversion"])
    del conversion["shard_plan"]
    index = encode_index(table.to_pylist(), metadata | {"conversion": json.dumps(conversion)})
    (out / entry.index_name).write_bytes(index)
    earlier = replace(entry, index_bytes=len(index), index_sha256=hashlib.sha256(index).hexdigest())
    manifest = read_shard_set(out).manifest
    fields = {name: getattr(manifest, name) for name in manifest.__slots__ if not name.startswith(("num_", "shards_"))}
    write_shard_set(out, fields, (earlier,))
    assert convert(source, out, small_config(shard_bytes=10**9)).num_samples == COUNT
    (out / "manifest.json").unlink()
    with pytest.raises(ConversionRefusedError, match=r"unfinished conversion of an earlier ca2st.*finish it with that"):
        convert(source, out, small_config(shard_bytes=10**9))
