"""A small server that speaks the few REST calls of MLflow that a sender makes, and can be told to misbehave."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlparse


class FakeMlflow:
    """What the server was told, and how it answers."""

    def __init__(self) -> None:
        self.status: int | None = None
        """Answer everything with it; None: work."""
        self.headers: dict[str, str] = {}
        self.is_silent = False
        """Accept every request and answer none."""
        self.num_requests = 0
        self.asked = threading.Event()
        """Set with each request."""
        self.released = threading.Event()
        self.metrics: list[dict[str, Any]] = []
        self.runs: list[dict[str, Any]] = []
        self.port = 0

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def losses(self) -> list[tuple[int, float]]:
        return [(int(one["step"]), one["value"]) for one in self.metrics if one["key"] == "train/loss"]

    def answer(self, call: str, asked: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if call == "experiments/get-by-name":
            return 200, {"experiment": {"experiment_id": "1", "name": "tests", "lifecycle_stage": "active"}}
        if call == "runs/search":
            return 200, {"runs": []}
        if call == "runs/create":
            info = {"run_id": f"run{len(self.runs)}", "run_uuid": f"run{len(self.runs)}", "experiment_id": "1"}
            self.runs.append({"info": info | {"status": "RUNNING", "lifecycle_stage": "active"}, "data": {}})
            return 200, {"run": self.runs[-1]}
        if call == "runs/get":
            return 200, {"run": self.runs[-1]}
        if call == "runs/log-batch":
            self.metrics += asked.get("metrics", [])
            return 200, {}
        if call == "runs/update":
            return 200, {"run_info": self.runs[-1]["info"]}
        return 404, {"error_code": "ENDPOINT_NOT_FOUND", "message": call}


@contextmanager
def served(fake: FakeMlflow) -> Iterator[None]:
    """Let it answer on the loopback interface, at its old port once it had one."""
    server = ThreadingHTTPServer(("127.0.0.1", fake.port), _handler(fake))
    server.daemon_threads = True
    fake.port = server.server_port
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield
    finally:
        fake.released.set()
        server.shutdown()
        server.server_close()
        thread.join()


def _handler(fake: FakeMlflow) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:  # the name http.server calls
            self._reply({name: values[0] for name, values in parse_qs(urlparse(self.path).query).items()})

        def do_POST(self) -> None:  # the same
            self._reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def _reply(self, asked: dict[str, Any]) -> None:
            fake.num_requests += 1
            fake.asked.set()
            if fake.is_silent:
                fake.released.wait(60)
                return
            status, answer = fake.status, {}
            if status is None:
                status, answer = fake.answer(urlparse(self.path).path.removeprefix("/api/2.0/mlflow/"), asked)
            body = json.dumps(answer).encode()
            self.send_response(status)
            for name, value in {**fake.headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Nothing on stderr."""

    return Handler
