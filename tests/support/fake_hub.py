"""A hub of model repositories on the loopback interface, as far as fetching one file asks for it."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

COMMIT = "0123456789abcdef0123456789abcdef01234567"
"""The only commit of every repository; `main` and `v1` name it too."""
_REVISIONS = ("main", "v1", COMMIT)


@dataclass
class FakeHub:
    """What it has, and what was asked of it."""

    endpoint: str = ""
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    commit: str = COMMIT
    """As it names it in its answers."""
    torn: bool = False
    """Files end in the middle, as when a connection is lost."""
    requests: list[str] = field(default_factory=list)


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """A hub that answers until the block ends."""
    hub = FakeHub()

    class Handler(_Handler):
        state = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    state: FakeHub

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, *, with_body: bool) -> None:
        path = self.path.partition("?")[0].strip("/")
        self.state.requests.append(f"{self.command} /{path}")
        parts = path.split("/")
        if parts[:2] == ["api", "models"]:
            self._tell("/".join(parts[2:4]), parts[5] if parts[4:5] == ["revision"] else "main", with_body=with_body)
        elif parts[2:3] == ["resolve"]:
            self._give("/".join(parts[:2]), parts[3], "/".join(parts[4:]), with_body=with_body)
        else:
            self._refuse(404, "EntryNotFound")

    def _tell(self, repository: str, revision: str, *, with_body: bool) -> None:
        if self._has(repository, revision):
            siblings = [{"rfilename": name} for name in self.state.repositories[repository]]
            facts = {"id": repository, "modelId": repository, "sha": self.state.commit, "siblings": siblings}
            body = json.dumps(facts).encode()
            self._send(body, {"Content-Type": "application/json"}, with_body=with_body)

    def _give(self, repository: str, revision: str, name: str, *, with_body: bool) -> None:
        if not self._has(repository, revision):
            return
        body = self.state.repositories[repository].get(name)
        if body is None:
            self._refuse(404, "EntryNotFound")
        else:
            headers = {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', "X-Repo-Commit": COMMIT}
            self._send(body, headers, with_body=with_body)

    def _has(self, repository: str, revision: str) -> bool:
        if repository not in self.state.repositories:
            self._refuse(404, "RepoNotFound")
        elif repository in self.state.gated:
            self._refuse(403, "GatedRepo")
        elif revision not in _REVISIONS:
            self._refuse(404, "RevisionNotFound")
        else:
            return True
        return False

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _send(self, body: bytes, headers: dict[str, str], *, with_body: bool) -> None:
        self.send_response(200)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body:
            self.wfile.write(body[: len(body) // 2] if self.state.torn and "ETag" in headers else body)
