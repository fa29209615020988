"""What listens at an address of a Ray cluster, asked in under five seconds: Ray itself waits for minutes in vain."""

import os
import socket
import time
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import grpc  # type: ignore[import-untyped]  # it ships no stubs

Listener = Literal["cluster", "open cluster", "another token", "web server", "another part of Ray", "silent"]

PORTS = (
    "a cluster's ports: 6379 (`ray start --port`) is the one of --ray-address HEAD:6379, 8265 is its dashboard, for "
    "`ca2st submit --address http://HEAD:8265`, and 10001 (Ray's client server) is for neither"
)
PROBE_SECONDS = 4.5
_STEP_SECONDS = 1.8
"""Of one question; there are at most two behind the connection."""
_CONNECT_SECONDS = 0.8
_ALIVE = "/ray.rpc.NodeInfoGcsService/CheckAlive"


def host_and_port(address: str) -> tuple[str, int] | None:
    """The two halves of ``host:port`` or ``[IPv6 address]:port``; None where `address` is something else."""
    host, _, port = address.rpartition(":")
    bare = host.removeprefix("[").removesuffix("]")
    if not bare or "/" in host or (":" in bare) != host.startswith("[") or not (port.isascii() and port.isdecimal()):
        return None
    return (bare, int(port)) if len(port) < 6 and 0 < int(port) < 65536 else None


def who_listens(host: str, port: int, *, token: str) -> Listener:
    """Ask the port whether it is a cluster's, without a token, with `token` where it wants one, then whether by HTTP.

    Raises:
        OSError: nobody listens there.
    """
    end = time.monotonic() + PROBE_SECONDS
    socket.create_connection((host, port), timeout=_CONNECT_SECONDS + _STEP_SECONDS / 2).close()
    answer = _ask_cluster(host, port, "", end)
    if answer == "UNAUTHENTICATED":
        if not token:
            return "another token"
        answer = _ask_cluster(host, port, token, end)
        return {"OK": "cluster", "UNAUTHENTICATED": "another token", "UNIMPLEMENTED": "another part of Ray"}.get(
            answer, "silent"
        )  # type: ignore[return-value]  # all of Listener
    if answer == "OK":
        return "open cluster"
    if answer == "UNIMPLEMENTED":
        return "another part of Ray"
    return "web server" if _speaks_http(host, port, end) else "silent"


def _ask_cluster(host: str, port: int, token: str, end: float) -> str:
    """Name of the status that the cluster's own question after its health is answered with; ``OK``: it lives."""
    import grpc

    left = min(_STEP_SECONDS, end - time.monotonic())
    metadata = [("authorization", f"Bearer {token}")] if token else []
    with _channel(f"[{host}]:{port}" if ":" in host else f"{host}:{port}") as channel:
        try:
            channel.unary_unary(_ALIVE)(b"", timeout=max(0.1, left), metadata=metadata)
        except grpc.RpcError as error:
            return str(error.code().name)
    return "OK"


def _channel(address: str) -> "grpc.Channel":
    """A channel as Ray makes them, by TLS where ``RAY_USE_TLS`` says so, and through no proxy."""
    import grpc

    options: list[tuple[str, Any]] = [("grpc.enable_http_proxy", 0)]
    if os.environ.get("RAY_USE_TLS", "0").lower() not in ("1", "true"):
        return grpc.insecure_channel(address, options)
    from ray._common.tls_utils import load_certs_from_env

    chain, private_key, authority = load_certs_from_env()  # type: ignore[no-untyped-call]  # Ray has no types there
    credentials = grpc.ssl_channel_credentials(
        certificate_chain=chain, private_key=private_key, root_certificates=authority
    )
    return grpc.secure_channel(address, credentials, options)


def _speaks_http(host: str, port: int, end: float) -> bool:
    try:
        with socket.create_connection((host, port), timeout=max(0.1, end - time.monotonic())) as connection:
            connection.sendall(b"GET /api/version HTTP/1.1\r\nHost: ray\r\nConnection: close\r\n\r\n")
            return connection.recv(5) == b"HTTP/"
    except OSError:
        return False
