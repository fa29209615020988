"""A Ray cluster of one node on the loopback interface, as `ray start --head` starts it, with its job server."""

import secrets
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import requests

from support.processes import environment_without_ray

_START_SECONDS = 120.0
_SETTINGS = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",  # by itself the node waits half a minute before it ends
}


@dataclass(frozen=True, kw_only=True, slots=True)
class RayHead:
    """A running cluster."""

    address: str
    """Of its dashboard: ``http://127.0.0.1:PORT``."""
    token: str

    @property
    def client_variables(self) -> dict[str, str]:
        """What a client of it has in its environment."""
        return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token}


def bare_python(folder: Path) -> str:
    """Make an interpreter with all that this one has but ca2st, as on a node to which a job brings it."""
    venv.create(folder, symlinks=True)
    here, there = (Path(sysconfig.get_path("purelib", vars={"base": str(base)})) for base in (sys.prefix, folder))
    for path in here.iterdir():
        if not path.name.startswith(("ca2st", "__editable__")):
            (there / path.name).symlink_to(path)
    return str(folder / "bin" / "python")


@contextmanager
def ray_head(*, num_cpus: int, python: str = sys.executable) -> Iterator[RayHead]:
    """Start a cluster that asks for a token; end it, and nothing else, with the block."""
    port, token = _free_port(), secrets.token_hex(16)
    head = RayHead(address=f"http://127.0.0.1:{port}", token=token)
    variables = environment_without_ray() | head.client_variables | _SETTINGS
    options = (
        "--dashboard-host=127.0.0.1",
        f"--dashboard-port={port}",
        f"--num-cpus={num_cpus}",
        "--port=0",
        f"--ray-client-server-port={_free_port()}",
        f"--dashboard-agent-listen-port={_free_port()}",  # jobs come here; the usual port may be another Ray's
    )
    # A short path: sockets lie under it, and their names must not be longer than about 100 letters.
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        log = Path(folder) / "start.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [
                    python,
                    "-P",
                    "-m",
                    "ray.scripts.scripts",
                    "start",
                    "--head",
                    "--block",
                    "--disable-usage-stats",
                    f"--temp-dir={folder}",
                    *options,
                ],
                env=variables,
                stdout=output,
                stderr=output,
            )
        try:
            _wait_for_jobs(process, head, log)
            yield head
        finally:
            process.send_signal(signal.SIGTERM)  # with --block it ends what it has started
            process.wait(timeout=60)


def _wait_for_jobs(process: "subprocess.Popen[bytes]", head: RayHead, log: Path) -> None:
    """Until the job server answers those who have the token."""
    headers = {"Authorization": f"Bearer {head.token}"}
    last_moment = time.monotonic() + _START_SECONDS
    while time.monotonic() < last_moment and process.poll() is None:
        try:
            if requests.get(f"{head.address}/api/jobs/", headers=headers, timeout=10).ok:
                return
        except requests.ConnectionError:
            pass
        time.sleep(0.2)
    raise AssertionError(f"no job server at {head.address}:\n{log.read_text()}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
