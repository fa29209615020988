"""Files of a shard set behind a URL: whole small ones, ranges of large ones, tried again where that can help.

fsspec does the reading; credentials and endpoints are those of its backends' usual environment variables and
configuration files (AWS_*, GOOGLE_APPLICATION_CREDENTIALS, FSSPEC_*), which never pass through our hands.
"""

import asyncio
import errno
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ca2st.errors import EnvironmentFault
from sharding.location import EXTRAS, SCHEMES, RemoteFolder
from sharding.retry import Retrier, RetriesSpentError, described

T = TypeVar("T")
RANGE_BYTES = 16 << 20
"""Most bytes of one request: what a failed request loses, and what a download holds in memory."""
_PASSING_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
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


class ShortAnswerError(OSError):
    """The connection ended before all bytes asked for had come, or brought others."""


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
        """A whole small file.

        Raises:
            RemoteFileMissingError: there is none.
            EnvironmentFault: refused, or not to be had within the retries.
        """
        return self._ask(name, lambda path: self._fetch(path, None, None))

    def ranges(self, name: str, num_bytes: int) -> Iterator[bytes]:
        """A file of known size, piece by piece, each at most `RANGE_BYTES`; raises as `read`."""
        start = 0
        while start < num_bytes:
            piece = self.read_range(name, start, min(start + RANGE_BYTES, num_bytes), num_bytes)
            start += len(piece)
            yield piece

    def read_range(self, name: str, start: int, end: int, num_bytes: int) -> bytes:
        """Bytes `start` to `end` of a file of `num_bytes`; raises as `read`."""

        def fetch(path: str) -> bytes:
            data = self._fetch(path, start, end)
            if len(data) == num_bytes and len(data) != end - start:
                data = data[start:end]  # a server without byte ranges sends all of it
            if len(data) != end - start:
                raise ShortAnswerError(f"expected bytes {start} to {end}, found {len(data)} bytes")
            return data

        return self._ask(name, fetch)

    def sizes(self) -> dict[str, int] | None:
        """Size of every file of the folder by name; None where the server does not tell (http, or no permission)."""
        if self.folder.scheme in ("http", "https"):
            return None
        try:
            listed = self._ask("", lambda path: self._call("ls", path, detail=True, refresh=True))
        except EnvironmentFault as fault:
            if isinstance(fault.__cause__, PermissionError):
                return None
            raise
        return {entry["name"].rpartition("/")[2]: int(entry["size"]) for entry in listed if entry["type"] == "file"}

    def _ask(self, name: str, work: Callable[[str], T]) -> T:
        url = self.folder.file(name) if name else self.folder.url
        path = self.filesystem._strip_protocol(url)
        try:
            return self.retrier.call(lambda: work(path), is_passing=may_pass)
        except FileNotFoundError as error:
            raise RemoteFileMissingError(f"{url}: no such file") from error
        except RetriesSpentError as error:
            raise EnvironmentFault(
                f"{url}: cannot be read: {error}; check the server and the network, or raise loader.retry.attempts and "
                "loader.retry.total_seconds"
            ) from error.__cause__
        except Exception as error:  # every backend has errors of its own; all end here
            raise EnvironmentFault(f"{url}: cannot be read: {described(error)}; {_remedy(error)}") from error

    def _fetch(self, path: str, start: int | None, end: int | None) -> bytes:
        begin = time.perf_counter()
        data: bytes = self._call("cat_file", path, start=start, end=end)
        self.on_bytes(len(data), time.perf_counter() - begin)
        return data

    def _call(self, method: str, path: str, **arguments: Any) -> Any:
        """A method of the filesystem, given up after `request_seconds` where it waits for a network."""
        if not self.filesystem.async_impl:
            if method == "ls":
                arguments.pop("refresh")
            return getattr(self.filesystem, method)(path, **arguments)
        from fsspec.asyn import sync

        coroutine = getattr(self.filesystem, f"_{method}")
        return sync(self.filesystem.loop, coroutine, path, timeout=self.retrier.config.request_seconds, **arguments)


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
    """The HTTP status behind an error, where there is one."""
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
    """The fsspec filesystem of a URL, its own retries off: ours are the only ones, and they are counted.

    Raises:
        EnvironmentFault: the package that reads such URLs is not installed.
    """
    import fsspec

    try:
        kind = fsspec.get_filesystem_class(folder.scheme)
    except ImportError as error:
        raise EnvironmentFault(
            f"{folder}: {SCHEMES[folder.scheme]} is not installed, which reads {folder.scheme}:// URLs; "
            f"run pip install 'ca2st[{EXTRAS[folder.scheme]}]'"
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
