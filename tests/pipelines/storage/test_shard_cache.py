"""The node-local cache of shards: bounded, one fetch for all, nothing evicted under a reader, no litter of the dead."""

import errno
import fcntl
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ca2st.errors import EnvironmentFault, UserInputError
from pipelines.storage.remote import NoRoomError, ShardCache

SIZE = 1000


def write(content: bytes) -> Callable[[int], None]:
    return lambda descriptor: os.write(descriptor, content) and None


def forbidden(_: int) -> None:
    raise AssertionError("fetched although it is there")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def path_of(folder: Path, number: int) -> Path:
    return folder / "set" / f"ca2st-{number:06d}.tar"


def use(cache: ShardCache, path: Path, *, fill: Callable[[int], None] | None = None) -> bytes:
    with os.fdopen(cache.open(path, SIZE, fill or write(path.name[:4].encode() * (SIZE // 4))), "rb") as file:
        file.seek(0)
        return file.read()


def names(folder: Path) -> list[int]:
    return sorted(int(path.stem[-6:]) for path in folder.rglob("*.tar"))


def test_a_file_is_fetched_once_and_then_read_from_disk(folder: Path) -> None:
    cache, path = ShardCache(folder, most_bytes=10 * SIZE), path_of(folder, 0)
    assert use(cache, path) == use(cache, path, fill=forbidden) == b"ca2s" * 250
    assert use(ShardCache(folder, most_bytes=SIZE), path, fill=forbidden)


def test_the_least_recently_used_file_goes_first_also_across_processes(folder: Path) -> None:
    mine, other = (ShardCache(folder, most_bytes=3 * SIZE) for _ in range(2))
    for number in range(3):
        use(mine, path_of(folder, number))
        time.sleep(0.01)
    use(other, path_of(folder, 0))
    use(mine, path_of(folder, 3))
    assert names(folder) == [0, 2, 3]
    assert mine.held_bytes() == 3 * SIZE


def test_a_finished_file_goes_before_the_least_recently_used_one(folder: Path) -> None:
    cache = ShardCache(folder, most_bytes=2 * SIZE)
    use(cache, path_of(folder, 0))
    use(cache, path_of(folder, 1))
    cache.release(path_of(folder, 1))
    use(cache, path_of(folder, 2))
    assert names(folder) == [0, 2]


def test_a_file_in_use_is_never_evicted_and_counts(folder: Path) -> None:
    cache = ShardCache(folder, most_bytes=2 * SIZE, patience_seconds=0.1)
    held = cache.open(path_of(folder, 0), SIZE, write(b"x" * SIZE))
    use(cache, path_of(folder, 1))
    use(cache, path_of(folder, 2))
    assert names(folder) == [0, 2]
    second = cache.open(path_of(folder, 2), SIZE, forbidden)
    with pytest.raises(
        EnvironmentFault, match=r"no room for 1000 bytes.*2000 bytes in .* in use.*raise data.loader.cache_b"
    ):
        use(cache, path_of(folder, 3))
    assert os.pread(held, SIZE, 0) == b"x" * SIZE
    os.close(held)
    os.close(second)
    use(cache, path_of(folder, 3))
    assert cache.held_bytes() <= 2 * SIZE
    assert list(folder.rglob("*.part")) == []


def test_what_is_not_needed_yet_evicts_only_what_is_finished_with(folder: Path) -> None:
    cache = ShardCache(folder, most_bytes=2 * SIZE)
    use(cache, path_of(folder, 0))
    use(cache, path_of(folder, 1))
    with pytest.raises(NoRoomError):
        cache.open(path_of(folder, 2), SIZE, forbidden, ahead=True)
    cache.release(path_of(folder, 0))
    os.close(cache.open(path_of(folder, 2), SIZE, write(b"z" * SIZE), ahead=True))
    assert names(folder) == [1, 2]


def test_a_cache_smaller_than_one_shard_is_refused_with_the_numbers(folder: Path) -> None:
    with pytest.raises(UserInputError, match=r"loader.cache_bytes: expected at least 1000 bytes for .*found 999 in"):
        ShardCache(folder, most_bytes=999).open(path_of(folder, 0), SIZE, forbidden)


def test_without_a_limit_the_cache_takes_half_of_its_disk(folder: Path) -> None:
    free = os.statvfs(folder.parent).f_bavail * os.statvfs(folder.parent).f_frsize
    assert ShardCache(folder, most_bytes=None).most_bytes == pytest.approx(free / 2, rel=0.05)


def test_many_threads_that_want_one_file_fetch_it_once(folder: Path) -> None:
    fetched: list[int] = []

    def fill(descriptor: int) -> None:
        fetched.append(1)
        time.sleep(0.05)
        os.write(descriptor, b"y" * SIZE)

    caches = [ShardCache(folder, most_bytes=10 * SIZE) for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(lambda cache: use(cache, path_of(folder, 0), fill=fill), caches))
    assert read == [b"y" * SIZE] * 8
    assert len(fetched) == 1


@settings(max_examples=10)
@given(most=st.integers(1, 4), order=st.lists(st.integers(0, 6), min_size=4, max_size=40), threads=st.integers(1, 6))
def test_whatever_is_read_by_how_many_the_bound_holds_and_every_byte_is_right(
    tmp_path_factory: pytest.TempPathFactory, most: int, order: list[int], threads: int
) -> None:
    folder = tmp_path_factory.mktemp("cache")
    most_seen: list[int] = []

    def read(number: int) -> bytes:
        cache = ShardCache(folder, most_bytes=most * SIZE)
        data = use(cache, path_of(folder, number), fill=write(bytes([number]) * SIZE))
        most_seen.append(cache.held_bytes())
        return data

    with ThreadPoolExecutor(threads) as pool:
        assert list(pool.map(read, order)) == [bytes([number]) * SIZE for number in order]
    assert ShardCache(folder, most_bytes=most * SIZE).held_bytes() <= most * SIZE
    assert list(folder.rglob("*.part")) == []


def test_a_failed_fetch_leaves_nothing_and_the_next_one_succeeds(folder: Path) -> None:
    cache, path = ShardCache(folder, most_bytes=SIZE), path_of(folder, 0)

    def fail(descriptor: int) -> None:
        os.write(descriptor, b"half")
        raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        cache.open(path, SIZE, fail)
    assert list((folder / "set").iterdir()) == []
    assert len(use(cache, path)) == SIZE


_KILLED = """
import os, sys, signal, pathlib
from pipelines.storage.remote import ShardCache
def fill(descriptor):
    os.write(descriptor, b"half")
    os.kill(os.getpid(), signal.SIGKILL)
ShardCache(pathlib.Path(sys.argv[1]), most_bytes=2000).open(pathlib.Path(sys.argv[2]), 1000, fill)
"""


def test_what_a_killed_process_was_fetching_is_taken_over_or_swept_and_no_lock_stays(folder: Path) -> None:
    for number in (0, 1):
        command = [sys.executable, "-c", _KILLED, str(folder), str(path_of(folder, number))]
        assert subprocess.run(command, check=False).returncode == -9
    cache = ShardCache(folder, most_bytes=2 * SIZE)
    assert len(list(folder.rglob("*.part"))) == 1, "the second fetch swept what the first had left"
    assert use(cache, path_of(folder, 1)) == b"ca2s" * 250
    assert use(cache, path_of(folder, 2)) == b"ca2s" * 250
    assert list(folder.rglob("*.part")) == []


def test_a_cached_file_that_was_cut_is_fetched_again(folder: Path) -> None:
    cache, path = ShardCache(folder, most_bytes=SIZE), path_of(folder, 0)
    use(cache, path)
    with path.open("r+b") as file:
        file.truncate(10)
    assert use(cache, path) == b"ca2s" * 250


def test_a_full_disk_is_named_with_what_to_do(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(EnvironmentFault, match=r"000000.tar: cannot write.*No space left.*lower data\.loader.cache"):
        use(ShardCache(folder, most_bytes=SIZE), path_of(folder, 0))
    assert list(folder.rglob("*.part")) == []


def test_waiting_for_a_neighbour_is_shown_as_life(folder: Path) -> None:
    cache, path = ShardCache(folder, most_bytes=SIZE), path_of(folder, 0)
    path.parent.mkdir(parents=True)
    waits: list[int] = []
    with path.with_name(path.name + ".part").open("wb") as part:
        fcntl.flock(part, fcntl.LOCK_EX)
        reader = threading.Thread(
            target=lambda: os.close(cache.open(path, SIZE, write(b"x" * SIZE), on_wait=lambda: waits.append(1)))
        )
        reader.start()
        while len(waits) < 3:
            time.sleep(0.01)
        assert names(folder) == []
    reader.join()
    assert names(folder) == [0]
