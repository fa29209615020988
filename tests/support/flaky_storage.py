"""Servers for tests: fsspec's memory, a filesystem that fails as it is told, an HTTP server on loopback."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec

Failure = Callable[[int], Exception | None]
"""What the nth call, counted from 1, fails with."""


def put_in_memory(folder: Path, url: str) -> None:
    """Copy a folder's files to a ``memory://`` URL."""
    memory = fsspec.filesystem("memory")
    for path in folder.iterdir():
        memory.pipe(f"{url.removeprefix('memory:/')}/{path.name}", path.read_bytes())


class FlakyStorage:
    """Files by path in memory; every read may fail, take time on an injected clock, or be changed on its way."""

    async_impl = False

    def __init__(
        self,
        files: dict[str, bytes],
        *,
        fail: Failure = lambda _: None,
        change: Callable[[int, bytes], bytes] = lambda _, data: data,
        on_read: Callable[[], None] = lambda: None,
    ) -> None:
        self.files, self.calls = files, 0
        self._fail, self._change, self._on_read = fail, change, on_read

    @staticmethod
    def _strip_protocol(url: str) -> str:
        return url.partition("://")[2]

    def cat_file(self, path: str, start: int | None = None, end: int | None = None) -> bytes:
        self.calls += 1
        number = self.calls
        self._on_read()
        error = self._fail(number)
        if error is not None:
            raise error
        if path not in self.files:
            raise FileNotFoundError(path)
        return self._change(number, self.files[path][start:end])

    def ls(self, path: str, detail: bool) -> list[dict[str, Any]]:
        return [
            {"name": name, "size": len(data), "type": "file"}
            for name, data in self.files.items()
            if name.startswith(f"{path}/")
        ]


class FakeTime:
    """A clock that only sleeping and reading move."""

    def __init__(self) -> None:
        self.now = 0.0
        self.pauses: list[float] = []

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds

    def pass_by(self, seconds: float) -> None:
        self.now += seconds


class _Ranges(SimpleHTTPRequestHandler):
    """Python's file server, which knows no byte ranges, taught them where `ranges` says so."""

    def __init__(self, *arguments: Any, ranges: bool, status: int | None, **named: Any) -> None:
        self._ranges, self._status = ranges, status
        super().__init__(*arguments, **named)

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        if self._status is not None or not path.is_file():
            self.send_error(self._status or 404)
            return
        data, status = path.read_bytes(), 200
        asked = self.headers.get("Range")
        if asked and self._ranges:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            data, status = data[int(first) : int(last) + 1], 206
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Tests need no log."""


@contextmanager
def http_server(folder: Path, *, ranges: bool = True, status: int | None = None) -> Iterator[str]:
    """The URL of a server of `folder` on loopback; `status` is what it answers to everything."""
    handler = partial(_Ranges, directory=str(folder), ranges=ranges, status=status)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()
