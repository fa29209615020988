"""Row P9 and what belongs to it: URLs of shards, transient and lasting errors, retries that end."""

import errno
import socket
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ca2st.errors import EnvironmentFault, UserInputError
from sharding.format.remote import (
    RANGE_BYTES,
    RemoteFileMissingError,
    RemoteFiles,
    RemoteFolder,
    Retrier,
    RetriesSpentError,
    RetryConfig,
    as_location,
    may_pass,
)
from support.flaky_storage import FakeTime, FlakyStorage, http_server

FOLDER = RemoteFolder("s3://bucket/set")


def remote(
    storage: FlakyStorage, time: FakeTime, *, config: RetryConfig | None = None
) -> tuple[RemoteFiles, list[int]]:
    """Files on `storage` with an injected clock, and a list that grows by one at each retry."""
    retries: list[int] = []
    retrier = Retrier(
        config=config or RetryConfig(),
        on_retry=lambda: retries.append(1),
        clock=time.clock,
        sleep=time.sleep,
        chance=lambda: 0.5,
    )
    return RemoteFiles(folder=FOLDER, retrier=retrier, filesystem=storage), retries


# URLs.


def test_a_path_stays_a_path_and_a_url_becomes_a_folder_without_a_last_slash() -> None:
    assert as_location("shards/train") == Path("shards/train")
    assert as_location(Path("s3:/odd")) == Path("s3:/odd")
    assert as_location("s3://bucket/train/") == RemoteFolder("s3://bucket/train")
    assert as_location("s3://bucket/train/").file("manifest.json") == "s3://bucket/train/manifest.json"
    assert as_location(FOLDER) is FOLDER


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("htps://host/x", r"expected one of s3, gs, http, https, memory, found 'htps' \(did you mean 'http"),
        ("pipe://cat /etc/passwd", "found 'pipe'"),
        ("file:///etc", "found 'file'"),
        ("simplecache::s3://bucket/x", "expected one of"),
        ("s3:///x", "expected a bucket or host behind s3://"),
    ],
)
def test_p14_a_kind_of_url_that_is_not_read_is_refused(url: str, message: str) -> None:
    with pytest.raises(UserInputError, match=message):
        as_location(url)


@pytest.mark.parametrize(
    "url", ["https://me:hush@host/x", "s3://hush@b/x", "https://host/x?token=hush", "gs://b/x#hush"]
)
def test_a_url_that_carries_a_secret_is_refused_and_the_secret_is_not_shown(url: str) -> None:
    with pytest.raises(UserInputError, match="give secrets in the environment") as found:
        as_location(url)
    assert "hush" not in str(found.value)


def test_a_missing_package_is_named_with_what_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(EnvironmentFault, match=r"gcsfs is not installed.*pip install 'ca2st\[gs\]'"):
        RemoteFiles(folder=RemoteFolder("gs://bucket/set"))


# What is tried again.


def with_status(status: int) -> Exception:
    error = Exception(f"HTTP {status}")
    error.status = status  # type: ignore[attr-defined]  # as aiohttp's errors have it
    return error


class HTTPClientError(Exception):
    """Named as botocore's error of a broken connection."""

    __module__ = "botocore.exceptions"


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (ConnectionResetError(), True),
        (TimeoutError(), True),
        (OSError(errno.EIO, "input/output error"), True),
        (HTTPClientError(), True),
        *[(with_status(status), True) for status in (408, 429, 500, 502, 503, 504)],
        *[(with_status(status), False) for status in (400, 401, 403, 404, 416, 501)],
        (FileNotFoundError(), False),
        (PermissionError(), False),
        (ValueError("a fault of ours"), False),
        (OSError(errno.EINVAL, "invalid argument"), False),
    ],
)
def test_p9_only_errors_that_may_pass_are_tried_again(error: Exception, passes: bool) -> None:
    assert may_pass(error) is passes


@given(
    failures=st.integers(1, 60),
    fraction=st.floats(0, 1, exclude_max=True),
    first=st.floats(0.01, 5),
    longest=st.floats(0.01, 60),
)
def test_p9_pauses_grow_have_jitter_and_are_bounded(
    failures: int, fraction: float, first: float, longest: float
) -> None:
    config = RetryConfig(first_pause_seconds=first, longest_pause_seconds=longest)
    pause = config.pause_seconds(failures, fraction)
    full = min(longest, first * 2 ** (failures - 1))
    assert full / 2 <= pause <= full
    assert pause <= config.pause_seconds(failures + 1, fraction)


def test_p9_storage_that_fails_one_read_in_twenty_with_5_s_latency_is_read_whole_and_counted() -> None:
    time = FakeTime()
    files = {f"bucket/set/{number}": bytes([number]) * 10 for number in range(200)}
    storage = FlakyStorage(
        files, fail=lambda call: None if call % 20 else ConnectionResetError("reset"), on_read=lambda: time.pass_by(5)
    )
    reader, retries = remote(storage, time)
    assert [reader.read(str(number)) for number in range(200)] == list(files.values())
    assert len(retries) == storage.calls - 200 == 10
    assert time.now == pytest.approx(5 * storage.calls + 10 * 0.375)


def test_p9_storage_that_never_answers_is_given_up_after_bounded_tries_with_the_last_error() -> None:
    time = FakeTime()
    storage = FlakyStorage({}, fail=lambda call: TimeoutError(f"no answer {call}"), on_read=lambda: time.pass_by(1))
    reader, retries = remote(storage, time)
    expected = r"s3://bucket/set/a: cannot be read: 6 tries in \d+ s, the last: no answer 6; check the server"
    with pytest.raises(EnvironmentFault, match=expected) as found:
        reader.read("a")
    assert (storage.calls, len(retries), found.value.exit_code) == (6, 5, 4)
    assert time.pauses == [0.375, 0.75, 1.5, 3.0, 6.0]


def test_p9_the_total_time_bounds_the_tries_too() -> None:
    time = FakeTime()
    storage = FlakyStorage({}, fail=lambda _: TimeoutError(), on_read=lambda: time.pass_by(40))
    reader, _ = remote(storage, time, config=RetryConfig(attempts=100, total_seconds=100))
    with pytest.raises(EnvironmentFault, match="3 tries in 121 s"):
        reader.read("a")


def test_p9_no_try_begins_after_the_total_time_its_pause_included() -> None:
    time = FakeTime()
    storage = FlakyStorage({}, fail=lambda _: TimeoutError(), on_read=lambda: time.pass_by(49.7))
    reader, _ = remote(storage, time, config=RetryConfig(attempts=100, total_seconds=100))
    with pytest.raises(EnvironmentFault, match="2 tries in 100 s"):
        reader.read("a")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (PermissionError("Forbidden"), "Forbidden; the server refuses it: check the credentials"),
        (with_status(403), "the server refuses it: check the credentials"),
        (Exception("Unable to locate credentials"), "no credentials were found: set them in the environment"),
    ],
)
def test_p9_what_the_server_refuses_fails_at_once_and_clearly(error: Exception, message: str) -> None:
    time = FakeTime()
    storage = FlakyStorage({}, fail=lambda _: error)
    reader, _ = remote(storage, time)
    with pytest.raises(EnvironmentFault, match=message):
        reader.read("a")
    assert (storage.calls, time.pauses) == (1, [])


def test_p9_a_file_that_is_not_there_is_not_tried_again() -> None:
    storage = FlakyStorage({})
    reader, _ = remote(storage, FakeTime())
    with pytest.raises(RemoteFileMissingError, match="s3://bucket/set/a: no such file"):
        reader.read("a")
    assert storage.calls == 1


def test_p9_an_answer_that_ends_early_is_asked_for_again() -> None:
    storage = FlakyStorage({"bucket/set/a": b"0123456789"}, change=lambda call, data: data[:3] if call == 1 else data)
    reader, retries = remote(storage, FakeTime())
    assert b"".join(reader.ranges("a", 10)) == b"0123456789"
    assert len(retries) == 1


def test_a_large_file_is_read_in_pieces_and_a_failed_piece_alone_is_read_again() -> None:
    data = bytes(RANGE_BYTES) + b"end"
    storage = FlakyStorage({"bucket/set/a": data}, fail=lambda call: ConnectionResetError() if call == 2 else None)
    reader, retries = remote(storage, FakeTime())
    assert [len(piece) for piece in reader.ranges("a", len(data))] == [RANGE_BYTES, 3]
    assert (storage.calls, len(retries)) == (3, 1)


def test_an_error_that_does_not_pass_leaves_the_retrier_as_it_is() -> None:
    with pytest.raises(ZeroDivisionError):
        Retrier().call(lambda: 1 // 0, is_passing=may_pass)


def test_spent_retries_hold_the_last_error() -> None:
    time = FakeTime()
    retrier = Retrier(config=RetryConfig(attempts=1), clock=time.clock, sleep=time.sleep)
    with pytest.raises(RetriesSpentError, match="1 tries in 0 s, the last: TimeoutError") as found:
        retrier.call(_raise_timeout, is_passing=may_pass)
    assert isinstance(found.value.__cause__, TimeoutError)


def _raise_timeout() -> None:
    raise TimeoutError


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"attempts": 0}, "retry.attempts: expected at least 1, found 0"),
        ({"total_seconds": -1}, "retry.total_seconds: expected at least 0"),
        ({"first_pause_seconds": -1}, "retry.first_pause_seconds: expected at least 0"),
        ({"request_seconds": 0}, "retry.request_seconds: expected more than 0"),
    ],
)
def test_wrong_retries_are_refused(values: dict[str, int], message: str) -> None:
    with pytest.raises(UserInputError, match=message):
        RetryConfig(**values)


# A real server on loopback.


@pytest.fixture
def served(tmp_path: Path) -> Path:
    (tmp_path / "a").write_bytes(b"0123456789")
    return tmp_path


@pytest.mark.parametrize("ranges", [True, False])
def test_http_is_read_by_ranges_and_from_servers_that_know_none(served: Path, ranges: bool) -> None:
    with http_server(served, ranges=ranges) as url:
        files = RemoteFiles(folder=RemoteFolder(url))
        assert files.read("a") == b"0123456789"
        assert files.read_range("a", 2, 5, 10) == b"234"
        assert files.sizes() is None
        with pytest.raises(RemoteFileMissingError):
            files.read("b")


@pytest.mark.parametrize(("status", "calls"), [(403, 0), (503, 2)])
def test_p9_an_http_status_decides_whether_it_is_tried_again(served: Path, status: int, calls: int) -> None:
    retries: list[int] = []
    config = RetryConfig(attempts=3, first_pause_seconds=0.01)
    with http_server(served, status=status) as url:
        retrier = Retrier(config=config, on_retry=lambda: retries.append(1))
        with pytest.raises(EnvironmentFault, match=str(status)):
            RemoteFiles(folder=RemoteFolder(url), retrier=retrier).read("a")
    assert len(retries) == calls


def test_p9_a_server_that_accepts_and_never_answers_does_not_hang_the_reader() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        config = RetryConfig(attempts=2, first_pause_seconds=0.01, request_seconds=0.2)
        files = RemoteFiles(
            folder=RemoteFolder(f"http://127.0.0.1:{silent.getsockname()[1]}"), retrier=Retrier(config=config)
        )
        with pytest.raises(EnvironmentFault, match=r"2 tries in \d s, the last: FSTimeoutError"):
            files.read("a")
