"""What works of this machine's services: MLflow's store, Ray, ports and who listens on them; and all that is tried."""

import contextlib
import os
import socket
import sqlite3
import urllib.error
import urllib.request
from functools import partial
from importlib import metadata
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import unquote, urlsplit

from ray_jobs.doctor.machine import Check, Finding, check_folder, machine_checks
from ray_jobs.environment import basic_authorization, default_tracking_uri, ray_auth_mode, tracking_authorization
from ray_jobs.redaction import without_credentials
from ray_jobs.tracking.client import sqlite_path

_ANSWER_SECONDS = 5.0
_LOOPBACK = "127.0.0.1"
_PORTS = {"MLflow": 5000, "Ray": 6379, "Ray dashboard": 8265}


def all_checks(runs: Path, *, tracking_uri: str | None = None) -> dict[str, Check]:
    """Return what is tried, by name. `runs` is the folder that runs are written under."""
    return {
        **machine_checks(),
        "disk runs": partial(check_folder, "disk runs", runs),
        "mlflow": partial(check_tracking, tracking_uri or default_tracking_uri(runs), tracking_authorization()),
        "ray": partial(check_ray, ray_auth_mode()),
        "loopback": check_loopback,
        "ports": partial(check_ports, _PORTS),
        "listening": check_listening,
    }


def check_tracking(uri: str, authorization: str | None = None) -> Finding:
    """Check that the tracking store can be written: an SQLite file, or a server that answers within seconds.

    `authorization` is the header that a server is shown where the address itself holds no credentials.
    """
    if (path := sqlite_path(uri)) is not None:
        return _check_sqlite(path)
    if uri.startswith(("http://", "https://")):
        return _check_server(uri, authorization)
    return Finding(name="mlflow", ok=True, what=f"a {urlsplit(uri).scheme} store: not tried", mend="", needed=False)


def _check_sqlite(path: Path) -> Finding:
    if not path.is_file():
        folder = next(one for one in path.absolute().parents if one.is_dir())
        return Finding(
            name="mlflow",
            ok=os.access(folder, os.W_OK),
            what=f"SQLite, not there yet: {path}",
            mend=f"make {folder} writable, or set MLFLOW_TRACKING_URI",
        )
    mend = "another process may hold it for long: end that, or set MLFLOW_TRACKING_URI to another store"
    try:
        connection = sqlite3.connect(path, timeout=_ANSWER_SECONDS, isolation_level=None)
        try:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("ROLLBACK")
        finally:
            connection.close()
    except sqlite3.Error as error:
        return Finding(name="mlflow", ok=False, what=f"{path}: {error}", mend=mend)
    return Finding(name="mlflow", ok=True, what=f"SQLite, writable: {path}")


def _check_server(uri: str, authorization: str | None) -> Finding:
    where, parts = without_credentials(uri).rstrip("/"), urlsplit(uri)
    if parts.username is not None:  # urllib takes none from an address, and would show them in its errors
        authorization = basic_authorization(unquote(parts.username), unquote(parts.password or ""))
    request = urllib.request.Request(f"{where}/version")  # noqa: S310 - http or https, by the caller
    if authorization:
        request.add_unredirected_header("Authorization", authorization)
    try:
        with urllib.request.urlopen(request, timeout=_ANSWER_SECONDS) as answer:  # noqa: S310 - as above
            version = answer.read(64).decode(errors="replace")
    except urllib.error.HTTPError as error:
        what, mend = f"{where} answers {error.code}", "set MLFLOW_TRACKING_TOKEN, or user and password"
        return Finding(name="mlflow", ok=False, what=what, mend=mend)
    except OSError as error:
        reason = getattr(error, "reason", error)
        mend = "start the server or correct MLFLOW_TRACKING_URI; runs go on without it, `ca2st track sync` sends later"
        return Finding(name="mlflow", ok=False, what=f"{where}: no answer ({reason})", mend=mend, needed=False)
    return Finding(name="mlflow", ok=True, what=f"{where} answers, version {version}")


def check_loopback() -> Finding:
    """Connect two ends of this machine: ranks and Ray need it."""
    with socket.socket() as server:
        server.bind((_LOOPBACK, 0))
        server.listen(1)
        port = server.getsockname()[1]
        with socket.create_connection((_LOOPBACK, port), timeout=_ANSWER_SECONDS):
            pass
    return Finding(name="loopback", ok=True, what="connections within this machine work")


def check_ports(ports: dict[str, int]) -> Finding:
    """Look which of the usual ports something already listens on."""
    taken = [f"{port} ({name})" for name, port in ports.items() if _is_taken(port)]
    return Finding(
        name="ports",
        ok=not taken,
        what=f"taken: {', '.join(taken)}" if taken else f"free: {', '.join(str(port) for port in ports.values())}",
        mend="a server of yours may be running already; otherwise start ours on other ports",
        needed=False,
    )


def _is_taken(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(_ANSWER_SECONDS)
        return probe.connect_ex((_LOOPBACK, port)) == 0


def check_listening() -> Finding:
    """List our processes that other machines can talk to: Ray, for one, listens on every interface."""
    import psutil  # type: ignore[import-untyped]  # it ships no stubs

    ports: dict[str, set[int]] = {}
    for one in psutil.net_connections("tcp"):
        if one.status == psutil.CONN_LISTEN and one.pid and not _is_loopback(one.laddr.ip):
            with contextlib.suppress(psutil.Error):  # it ended meanwhile
                ports.setdefault(psutil.Process(one.pid).name(), set()).add(one.laddr.port)
    listening = "; ".join(f"{name} {', '.join(map(str, sorted(of)))}" for name, of in sorted(ports.items()))
    return Finding(
        name="listening", ok=True, what=f"to other machines: {listening}" if listening else "to this machine alone"
    )


def _is_loopback(address: str) -> bool:
    """Return whether an address is of this machine alone, also as IPv6 sockets write it: ``::ffff:127.0.0.1``."""
    found = ip_address(address)
    return (getattr(found, "ipv4_mapped", None) or found).is_loopback


def check_ray(auth_mode: str | None) -> Finding:
    """Check that Ray is there, and whether a cluster started here asks for a token."""
    version = metadata.version("ray")
    ok = auth_mode == "token"
    return Finding(
        name="ray",
        ok=ok,
        what=f"Ray {version}, RAY_AUTH_MODE={auth_mode or 'not set'}",
        mend="export RAY_AUTH_MODE=token before `ray start`: without it anybody who reaches the cluster can run jobs",
        needed=False,
    )
