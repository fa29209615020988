"""A real S3 server on loopback: `rclone serve s3` of a folder whose folders are its buckets."""

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ACCESS_KEY, SECRET_KEY = "tests", "not-a-secret"
_START_SECONDS = 20.0


@contextmanager
def s3_server(folder: Path, *, writable: bool = False) -> Iterator[dict[str, str]]:
    """Serve `folder`, requests signed; gives the environment variables that its clients need."""
    port = _free_port()
    command = [
        str(Path(sys.executable).with_name("rclone")),
        *("serve", "s3", "--addr", f"127.0.0.1:{port}", *(() if writable else ("--read-only",))),
        *("--auth-key", f"{ACCESS_KEY},{SECRET_KEY}", "--config", str(folder / "no-rclone.conf"), str(folder)),
    ]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        _wait_for(port, server)
        yield {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_DEFAULT_REGION": "us-east-1",
        }
    finally:
        server.terminate()
        server.communicate()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def _wait_for(port: int, server: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.05)
        else:
            return
    server.kill()
    raise RuntimeError(f"rclone did not serve: {server.communicate()[1].decode()}")
