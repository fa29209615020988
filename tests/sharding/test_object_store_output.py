"""Shards that are written straight to an object store."""

import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import s3fs

from ca2st.durable import FaultPoints, InjectedFault
from ca2st.errors import EnvironmentFault, UserInputError
from sharding.conversion import convert
from sharding.errors import ConversionRefusedError
from sharding.folder import SOURCES_NAME
from sharding.format.remote import RemoteFiles, RemoteFolder, Retrier, RetryConfig
from sharding.verify import verify_place
from support.flaky_storage import FakeTime, FlakyStorage
from support.media import make_clip
from support.object_store import s3_server
from support.shards import Reference, file_hashes, small_config


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return Reference(tmp_path_factory.mktemp("reference"))


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder behind ``s3://bucket`` of a real server; the home folder is empty."""
    folder = tmp_path / "store" / "bucket"
    folder.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with s3_server(folder.parent, writable=True) as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()  # those of another server
        yield folder


@pytest.mark.slow
def test_a_conversion_to_an_object_store_has_the_bytes_of_one_to_a_folder_after_any_interruption(
    reference: Reference, bucket: Path
) -> None:
    url = "s3://bucket/sets/train"
    with pytest.raises(InjectedFault):
        convert(reference.source, url, small_config(), faults=FaultPoints(point="sample", nth=4, kind="raise"))
    assert sorted(path.name for path in (bucket / "sets/train").iterdir()) == [
        "ca2st-000000.index.parquet", "ca2st-000000.tar",
    ]  # fmt: skip
    first = (bucket / "sets/train/ca2st-000000.tar").stat().st_mtime_ns
    report = convert(reference.source, url, small_config(workers=2))
    assert report.manifest_path == "s3://bucket/sets/train/manifest.json"
    assert (bucket / "sets/train/ca2st-000000.tar").stat().st_mtime_ns == first, "what was there is kept"
    assert file_hashes(bucket / "sets/train") == reference.hashes
    assert verify_place(url) == []
    assert convert(reference.source, url, small_config()).clips_per_second == 0


@pytest.mark.slow
def test_changed_sources_and_damage_behind_a_url_are_noticed(
    reference: Reference, bucket: Path, tmp_path: Path
) -> None:
    url, root = "s3://bucket/train", bucket / "train"
    convert(reference.source, url, small_config())
    assert (root / SOURCES_NAME).is_file()
    path = reference.source.samples[2].path
    whole = path.read_bytes()
    try:
        make_clip(path, seconds=0.3, size=(48, 32))
        with pytest.raises(ConversionRefusedError, match=r"holds a finished set, but 1 source files .*--update"):
            convert(reference.source, url, small_config())
        convert(reference.source, url, small_config(update=True))
        convert(reference.source, tmp_path / "fresh", small_config())
        assert file_hashes(root) == file_hashes(tmp_path / "fresh")
    finally:
        path.write_bytes(whole)
    files = RemoteFiles(folder=RemoteFolder(url))
    files.remove("manifest.json")
    files.remove(SOURCES_NAME)
    for known in (tmp_path / "home").rglob(SOURCES_NAME):
        known.unlink()
    data = bytearray((root / "ca2st-000001.tar").read_bytes())
    data[tarfile.BLOCKSIZE + 7] ^= 1
    files.write("ca2st-000001.tar", bytes(data))
    convert(reference.source, url, small_config())
    assert file_hashes(root) == reference.hashes, "a damaged shard of an unfinished conversion is made again"


def test_another_machine_finishes_a_conversion_of_which_only_the_manifest_is_missing(
    reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"memory://bucket/{tmp_path.name}"
    monkeypatch.setenv("HOME", str(tmp_path / "first"))
    with pytest.raises(InjectedFault):
        convert(
            reference.source, url, small_config(), faults=FaultPoints(point="manifest.written", nth=1, kind="raise")
        )
    files = RemoteFiles(folder=RemoteFolder(url))
    files.remove(SOURCES_NAME)
    monkeypatch.setenv("HOME", str(tmp_path / "second"))
    report = convert(reference.source, url, small_config())
    assert (report.num_samples, report.clips_per_second) == (5, 0)
    assert verify_place(url) == []


class FlakyUploads(FlakyStorage):
    """Writes that may fail, too."""

    def pipe_file(self, path: str, value: bytes) -> None:
        self.calls += 1
        if (error := self._fail(self.calls)) is not None:
            raise error
        self.files[path] = value

    def put_file(self, file: str, path: str) -> None:
        self.pipe_file(path, Path(file).read_bytes())


def test_p9_an_upload_that_fails_in_passing_is_tried_again_and_one_that_is_refused_is_named(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"shard")
    time = FakeTime()
    storage = FlakyUploads({}, fail=lambda call: ConnectionError("reset") if call < 3 else None)
    retrier = Retrier(config=RetryConfig(attempts=3), clock=time.clock, sleep=time.sleep)
    files = RemoteFiles(folder=RemoteFolder("memory://set"), retrier=retrier, filesystem=storage)
    files.upload("a", tmp_path / "a")
    assert (storage.files, len(time.pauses)) == ({"set/a": b"shard"}, 2)
    storage = FlakyUploads({}, fail=lambda _: PermissionError("no"))
    files = RemoteFiles(folder=RemoteFolder("memory://set"), retrier=retrier, filesystem=storage)
    with pytest.raises(EnvironmentFault, match=r"memory://set/a: cannot be written: no; the server refuses it"):
        files.write("a", b"x")


def test_a_place_that_cannot_be_written_is_refused_before_anything_is_decoded(reference: Reference) -> None:
    with pytest.raises(UserInputError, match=r"--out https://host/set: expected a folder or a URL of s3, gs"):
        convert(reference.source, "https://host/set", small_config())
