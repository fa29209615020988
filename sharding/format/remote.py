"""Where a shard set is, a folder or a URL that fsspec reads, and its files: whole small ones, ranges of large ones.

What may pass is tried again, bounded, with growing pauses. fsspec does the reading; credentials and endpoints are those
of its backends' usual environment variables and configuration files (AWS_*, GOOGLE_APPLICATION_CREDENTIALS,
FSSPEC_*), which never pass through our hands.
"""

import asyncio
import contextlib
import errno
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from ca2st.durable import NO_FAULTS, FaultPoints, write_bytes
from ca2st.errors import EnvironmentFault, UserInputError, check_choice

SCHEMES = {"s3": "s3fs", "gs": "gcsfs", "http": "aiohttp", "https": "aiohttp", "memory": "fsspec"}
"""Kinds of URLs, and the package that reads each."""


@dataclass(frozen=True, slots=True)
class RemoteFolder:
    """A folder behind a URL, without a slash at its end; never holds a secret."""

    url: str

    @property
    def scheme(self) -> str:
        """``s3``, ``gs``, ``http``, ``https`` or ``memory``."""
        return self.url.partition("://")[0]

    def file(self, name: str) -> str:
        """Return the URL of a file in it."""
        return f"{self.url}/{name}"

    def __str__(self) -> str:
        return self.url


Location = Path | RemoteFolder
"""Where a shard set is."""


def as_location(place: str | Path | RemoteFolder) -> Location:
    """Return the folder or URL that `place` names; anything without ``://`` is a path.

    Raises:
        UserInputError: a kind of URL that is not read, one without a bucket or host, or one that carries a secret:
            those come from the environment, never from a recipe.
    """
    if not isinstance(place, str) or "://" not in place:
        return place if isinstance(place, RemoteFolder) else Path(place)
    scheme = place.partition("://")[0]
    check_choice("URL of shards", scheme, SCHEMES)
    parts = urlsplit(place)
    shown = f"{scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise UserInputError(
            f"URL of shards: expected {shown} alone, found a user, password, query or fragment with it; give secrets "
            "in the environment (AWS_ACCESS_KEY_ID, AWS_PROFILE, GOOGLE_APPLICATION_CREDENTIALS or fsspec's "
            "configuration)"
        )
    if not parts.netloc:
        raise UserInputError(f"URL of shards: expected a bucket or host behind {scheme}://, found {shown!r}")
    return RemoteFolder(shown.rstrip("/"))


T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class RetryConfig:
    """How long a read from remote storage is tried; only errors that may pass are tried again."""

    attempts: int = 6
    """Tries of one request, the first included."""
    total_seconds: float = 300.0
    """No further try of a request begins later than this after its first."""
    first_pause_seconds: float = 0.5
    """Longest pause after the first failure; it doubles from try to try. The pause itself is drawn evenly from the
    upper half below it, so that workers do not come back all at once."""
    longest_pause_seconds: float = 30.0
    """Where the doubling ends."""
    request_seconds: float = 60.0
    """A request (at most 16 MiB) without an answer is given up after this, and counts as a failure."""

    def __post_init__(self) -> None:
        if self.attempts < 1:
            raise UserInputError(f"retry.attempts: expected at least 1, found {self.attempts}")
        for name in ("total_seconds", "first_pause_seconds", "longest_pause_seconds"):
            if getattr(self, name) < 0:
                raise UserInputError(f"retry.{name}: expected at least 0, found {getattr(self, name)}")
        if self.request_seconds <= 0:
            raise UserInputError(f"retry.request_seconds: expected more than 0, found {self.request_seconds}")

    def pause_seconds(self, failures: int, fraction: float) -> float:
        """Return the pause after that many failures; `fraction` in [0, 1) is the draw."""
        longest = doubled_pause(failures, first_seconds=self.first_pause_seconds, longest=self.longest_pause_seconds)
        return longest * (1 + fraction) / 2


def doubled_pause(failures: int, *, first_seconds: float, longest: float) -> float:
    """Return the seconds to wait after that many failures in a row: doubled from try to try, up to `longest`."""
    return min(longest, first_seconds * 2.0 ** min(max(failures - 1, 0), 60))


class RetriesSpentError(Exception):
    """Every try failed; the last error is the cause. Never leaves this package: its callers name the file."""

    def __init__(self, attempts: int, seconds: float, last: Exception) -> None:
        super().__init__(f"{attempts} tries in {seconds:.0f} s, the last: {described(last)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Retrier:
    """Calls again what failed in passing; clock, sleep and chance are arguments, so that tests need no time."""

    config: RetryConfig = field(default_factory=RetryConfig)
    on_retry: Callable[[], None] = lambda: None
    """Called before each further try: counts them."""
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    chance: Callable[[], float] = random.random

    def call(self, work: Callable[[], T], *, is_passing: Callable[[Exception], bool]) -> T:
        """Return the result of `work`.

        Raises:
            RetriesSpentError: attempts or time are used up; any error that `is_passing` denies is raised as it is.
        """
        start, failures = self.clock(), 0
        while True:
            try:
                return work()
            except Exception as error:
                if not is_passing(error):
                    raise
                failures += 1
                pause = self.config.pause_seconds(failures, self.chance())
                spent = self.clock() - start
                if failures == self.config.attempts or spent + pause > self.config.total_seconds:
                    raise RetriesSpentError(failures, spent, error) from error
                self.on_retry()
                self.sleep(pause)


def described(error: BaseException) -> str:
    """Return an error in one line: its text, or its kind where it has none."""
    text = " ".join(str(error).split())
    return text if text and isinstance(error, OSError) else f"{type(error).__name__}{f': {text}' if text else ''}"


@dataclass(frozen=True, kw_only=True, slots=True)
class StorageConfig:
    """The node-local cache of remote shards, and how long their server is tried."""

    cache_dir: str | None = None
    """Folder of the cache, on a disk of this machine; shared by its workers and by all sets. None:
    ``~/.cache/ca2st/shards``."""
    cache_bytes: int | None = None
    """Most bytes of shards in it, those being fetched included; None: half of what its disk has for them."""
    retry: RetryConfig = field(default_factory=RetryConfig)
    """How long a request is tried."""

    def __post_init__(self) -> None:
        if self.cache_bytes is not None and self.cache_bytes < 1:
            raise UserInputError(f"cache_bytes: expected at least 1, found {self.cache_bytes}")

    @property
    def folder(self) -> Path:
        """The cache's folder."""
        return Path(self.cache_dir or "~/.cache/ca2st/shards").expanduser()


RANGE_BYTES = 16 << 20
"""Most bytes of one request: what a failed request loses, and what a download holds in memory."""
_PASSING_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
_LEAST_BYTES_PER_SECOND = 1 << 18  # of an upload that is not given up
_LASTING = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
_LASTING_ERRNOS = frozenset({errno.EINVAL, errno.ENOTSUP, errno.ENOSYS})
_PASSING_KINDS = frozenset(
    {
        ("aiohttp", "ClientConnectionError"),
        ("aiohttp", "ClientPayloadError"),
        ("botocore", "HTTPClientError"),
        ("botocore", "ConnectionError"),
        ("aiobotocore", "AioReadTimeoutError"),
        ("requests", "ConnectionError"),
        ("requests", "Timeout"),
        ("urllib3", "HTTPError"),
    }
)
"""Broken connections by package and class: named, for none of these packages needs to be there."""


class RemoteFileMissingError(Exception):
    """There is no such file behind the URL; callers say what that means."""


@dataclass(frozen=True, kw_only=True)
class RemoteFiles:
    """Reads the files of one remote folder; safe to call from several threads."""

    folder: RemoteFolder
    retrier: Retrier = field(default_factory=Retrier)
    on_bytes: Callable[[int, float], None] = lambda _count, _seconds: None
    """Called after each answer with its bytes and the seconds it took."""
    filesystem: Any = None
    """An fsspec filesystem; None: that of the URL."""

    def __post_init__(self) -> None:
        if self.filesystem is None:
            object.__setattr__(self, "filesystem", _open_filesystem(self.folder))

    def read(self, name: str) -> bytes:
        """Return a whole small file.

        Raises:
            RemoteFileMissingError: there is none.
            EnvironmentFault: refused, or not to be had within the retries.
        """
        return self._ask(name, lambda path: self._fetch(path, None, None))

    def ranges(self, name: str, num_bytes: int) -> Iterator[bytes]:
        """Yield a file of known size, piece by piece, each at most `RANGE_BYTES`; raises as `read`."""
        start = 0
        while start < num_bytes:
            piece = self.read_range(name, start, min(start + RANGE_BYTES, num_bytes), num_bytes)
            start += len(piece)
            yield piece

    def read_range(self, name: str, start: int, end: int, num_bytes: int) -> bytes:
        """Return bytes `start` to `end` of a file of `num_bytes`; raises as `read`."""

        def fetch(path: str) -> bytes:
            data = self._fetch(path, start, end)
            if len(data) == num_bytes and len(data) != end - start:
                data = data[start:end]  # a server without byte ranges sends all of it
            if len(data) != end - start:
                raise OSError(f"expected bytes {start} to {end}, found {len(data)} bytes")  # it may pass
            return data

        return self._ask(name, fetch)

    def size(self, name: str) -> int:
        """Return the size of a file; raises as `read`."""
        return int(self._ask(name, lambda path: self._call("info", path))["size"])

    def sizes(self) -> dict[str, int] | None:
        """Return the size of every file by name; None where the server does not tell (http, or no permission).

        What is not there is empty: object stores have no folders.
        """
        if self.folder.scheme in ("http", "https"):
            return None
        try:
            listed = self._ask("", lambda path: self._call("ls", path, detail=True, refresh=True))
        except RemoteFileMissingError:
            return {}
        except EnvironmentFault as fault:
            if isinstance(fault.__cause__, PermissionError):
                return None
            raise
        return {entry["name"].rpartition("/")[2]: int(entry["size"]) for entry in listed if entry["type"] == "file"}

    def write(self, name: str, data: bytes, *, faults: FaultPoints = NO_FAULTS, point: str = "file") -> None:
        """Write a whole small file, which is there completely or not at all; fault points as `ca2st.durable.writing`.

        Raises:
            EnvironmentFault: refused, or not to be had within the retries.
        """
        faults.reach(f"{point}.written")
        self._ask(name, lambda path: self._call("pipe_file", path, data), doing="written")
        faults.reach(f"{point}.renamed")

    def upload(self, name: str, file: Path) -> None:
        """Write a file of this machine there, a large one in parts that are tried again alone; raises as `write`."""
        seconds = self.retrier.config.request_seconds + file.stat().st_size / _LEAST_BYTES_PER_SECOND

        def put(path: str) -> None:
            before = getattr(self.filesystem, "retries", None)
            if before is not None:
                self.filesystem.retries = self.retrier.config.attempts  # of each part
            try:
                self._call("put_file", str(file), path, seconds=seconds)
            finally:
                if before is not None:
                    self.filesystem.retries = before

        self._ask(name, put, doing="written")

    def remove(self, name: str) -> None:
        """Remove a file, if it is there; raises as `write`."""
        with contextlib.suppress(RemoteFileMissingError):
            self._ask(name, lambda path: self._call("rm_file", path), doing="removed")

    def _ask(self, name: str, work: Callable[[str], T], *, doing: str = "read") -> T:
        url = self.folder.file(name) if name else self.folder.url
        path = self.filesystem._strip_protocol(url)
        try:
            return self.retrier.call(lambda: work(path), is_passing=may_pass)
        except FileNotFoundError as error:
            raise RemoteFileMissingError(f"{url}: no such file") from error
        except RetriesSpentError as error:
            more = "or raise loader.retry.attempts and loader.retry.total_seconds" if doing == "read" else "and rerun"
            raise EnvironmentFault(
                f"{url}: cannot be {doing}: {error}; check the server and the network, {more}"
            ) from error.__cause__
        except Exception as error:  # every backend has errors of its own; all end here
            raise EnvironmentFault(f"{url}: cannot be {doing}: {described(error)}; {_remedy(error)}") from error

    def _fetch(self, path: str, start: int | None, end: int | None) -> bytes:
        begin = time.perf_counter()
        data: bytes = self._call("cat_file", path, start=start, end=end)
        self.on_bytes(len(data), time.perf_counter() - begin)
        return data

    def _call(self, method: str, path: str, *values: Any, seconds: float | None = None, **arguments: Any) -> Any:
        """Return a method of the filesystem; one that waits for a network is given up after `request_seconds`."""
        if not self.filesystem.async_impl:
            if method == "ls":
                arguments.pop("refresh")
            if method == "rm_file" and not self.filesystem.exists(path):
                raise FileNotFoundError(path)
            return getattr(self.filesystem, method)(path, *values, **arguments)
        from fsspec.asyn import sync

        coroutine = getattr(self.filesystem, f"_{method}")
        seconds = seconds or self.retrier.config.request_seconds
        return sync(self.filesystem.loop, coroutine, path, *values, timeout=seconds, **arguments)


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalFiles:
    """The files of a folder of this machine, read and written as `RemoteFiles` are; errors name the path."""

    folder: Path

    def size(self, name: str) -> int:
        """Return the size of a file."""
        return (self.folder / name).stat().st_size

    def sizes(self) -> dict[str, int]:
        """Return size of every file of the folder by name."""
        found = {}
        for path in self.folder.iterdir():
            with contextlib.suppress(FileNotFoundError):  # another process may remove its temporary files meanwhile
                found[path.name] = path.lstat().st_size
        return found

    def read(self, name: str) -> bytes:
        """Return a whole small file."""
        return (self.folder / name).read_bytes()

    def write(self, name: str, data: bytes, *, faults: FaultPoints = NO_FAULTS, point: str = "file") -> None:
        """Write a file by the protocol of `ca2st.durable.writing`; raises as it does."""
        write_bytes(self.folder / name, data, faults=faults, point=point)

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        (self.folder / name).unlink(missing_ok=True)


Files = LocalFiles | RemoteFiles


def files_of(place: Location | Files) -> Files:
    """Return the files of a folder or URL."""
    if isinstance(place, RemoteFolder):
        return RemoteFiles(folder=place)
    return LocalFiles(folder=place) if isinstance(place, Path) else place


def may_pass(error: Exception) -> bool:
    """Whether the same request may succeed a moment later: broken connections, timeouts, an overloaded server."""
    status = _status(error)
    if status is not None:
        return status in _PASSING_STATUS
    if isinstance(error, _LASTING):
        return False
    if isinstance(error, TimeoutError | asyncio.TimeoutError | ConnectionError):
        return True
    kinds = {(kind.__module__.partition(".")[0], kind.__name__) for kind in type(error).__mro__}
    if kinds & _PASSING_KINDS:
        return True
    return isinstance(error, OSError) and error.errno not in _LASTING_ERRNOS


def _status(error: BaseException) -> int | None:
    """Return the HTTP status behind an error, where there is one."""
    for one in (error, error.__cause__):
        answer = getattr(one, "response", None)
        if isinstance(answer, dict):
            found = answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
        else:
            found = getattr(one, "status", None) or getattr(one, "code", None)
        if isinstance(found, int | str) and str(found).isdigit():
            return int(found)
    return None


def _remedy(error: Exception) -> str:
    if isinstance(error, PermissionError) or _status(error) in (401, 403):
        return (
            "the server refuses it: check the credentials in the environment, and that they may read this file "
            "(some servers also say so where there is no such file)"
        )
    if "redential" in f"{type(error).__name__} {error}":
        return "no credentials were found: set them in the environment, as for the server's own command line"
    return "check the URL, the server and its settings in the environment"


def _open_filesystem(folder: RemoteFolder) -> Any:
    """Return the fsspec filesystem of a URL, its own retries off: ours are the only ones, and they are counted.

    Raises:
        EnvironmentFault: the package that reads such URLs is not installed.
    """
    import fsspec

    try:
        kind = fsspec.get_filesystem_class(folder.scheme)
    except ImportError as error:
        raise EnvironmentFault(
            f"{folder}: {SCHEMES[folder.scheme]} is not installed, which reads {folder.scheme}:// URLs; "
            f"run pip install 'ca2st[{'http' if folder.scheme == 'https' else folder.scheme}]'"
        ) from error
    options: dict[str, Any] = {"use_listings_cache": False}
    if folder.scheme == "s3":
        own = dict(fsspec.config.conf.get("s3", {}).get("config_kwargs", {}))
        options["config_kwargs"] = {"retries": {"max_attempts": 0}, **own}
    try:
        filesystem = kind(**options)
        if hasattr(filesystem, "retries"):
            filesystem.retries = 1
    except Exception as error:
        raise EnvironmentFault(f"{folder}: cannot be opened: {described(error)}; {_remedy(error)}") from error
    return filesystem
