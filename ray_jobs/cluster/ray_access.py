"""Reaching a Ray: one of this machine's own, or a cluster, which must ask for a token.

Its address is probed in under five seconds, where Ray itself waits for minutes in vain. Whoever reaches an open Ray
cluster runs code on it, so an open one is neither started nor joined unless the user says so. A token travels in clear
text: over networks of others it needs a tunnel or TLS.
"""

import os
import secrets
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from ca2st.errors import CA2STError, EnvironmentFault, UserInputError
from ray_jobs import environment

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
LOCAL = "local"
ACCEPT_OPEN = "--i-accept-open-ray"
_JOIN_FIRST = "this machine must be a node of it: `ray start --address=HEAD:6379`"
_FOUND = {
    "web server": "a web server, as its dashboard is",
    "another part of Ray": "another port of Ray's, of its client server or of a single node",
}
HOW_TO_GET_A_TOKEN = (
    "start the cluster with RAY_AUTH_MODE=token, put its token (`ray get-auth-token --generate` makes one) into "
    "~/.ray/auth_token, mode 600, or name another file by RAY_AUTH_TOKEN_PATH, and set RAY_AUTH_MODE=token here; "
    f"{ACCEPT_OPEN} goes without, and then everybody who reaches the cluster can run code on it"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class RayAccess:
    """What this process may show a Ray cluster, as found at the edge (`found_access`)."""

    token: str = field(default="", repr=False)
    """Of ``RAY_AUTH_TOKEN``, the file of ``RAY_AUTH_TOKEN_PATH`` or ``~/.ray/auth_token``; empty: there is none."""
    mode: str | None = None
    """``RAY_AUTH_MODE``; None where it is not set, and a token that is there is then used."""
    accept_open: bool = False
    """The user accepts a cluster that runs everybody's code."""

    @property
    def shown_token(self) -> str:
        """The token that Ray would show; empty where it shows none."""
        return self.token if self.mode in (None, "token") else ""

    def check(self, address: str) -> None:
        """Refuse to go to the cluster at `address` without a token.

        Raises:
            UserInputError: no token, or ``RAY_AUTH_MODE`` says not to use it, and open clusters are not accepted.
        """
        if self.accept_open or self.shown_token:
            return
        found = "no token" if self.mode in (None, "token") else f"RAY_AUTH_MODE={self.mode}"
        raise UserInputError(f"Ray at {address}: expected a cluster's token, found {found}; {HOW_TO_GET_A_TOKEN}")


def found_access(*, accept_open: bool = False) -> RayAccess:
    """Return whether this process holds a Ray cluster's token, looked up where Ray looks, and may go without one."""
    return RayAccess(
        token=find_token(os.environ, Path.home()),
        mode=(environment.ray_auth_mode() or "").lower() or None,
        accept_open=accept_open,
    )


def find_token(variables: Mapping[str, str], home: Path) -> str:
    """Return the token that Ray would find, looked up in Ray's order; empty where there is none.

    Raises:
        UserInputError: ``RAY_AUTH_TOKEN_PATH`` names no readable file or an empty one; Ray itself would abort.
    """
    if token := variables.get("RAY_AUTH_TOKEN", "").strip():
        return token
    if named := variables.get("RAY_AUTH_TOKEN_PATH", ""):
        if token := _text_of(Path(named)):
            return token
        raise UserInputError(f"RAY_AUTH_TOKEN_PATH={named}: expected a file with a token, found none or no text")
    return _text_of(home / ".ray" / "auth_token")


@contextmanager
def ray_session(address: str, *, access: RayAccess, num_cpus: int | None = None) -> Iterator[None]:
    """Connect to Ray for the block.

    `address`: ``local`` starts a Ray for this block alone, on the loopback interface, with a token of its own,
    without a dashboard, `num_cpus` processors wide (None: this machine's); anything else (``auto``, ``host:port``)
    joins the cluster there.

    Raises:
        UserInputError: the cluster asks for no token, or we have none or another one; or the address is none.
        EnvironmentFault: no cluster answers at `address`.
    """
    # Ray's own uv integration would build a new environment for every worker.
    _switch_off("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "RAY_ENABLE_UV_RUN_RUNTIME_ENV")
    if address == LOCAL:
        # Without nodes elsewhere Ray binds every port to the loopback interface; whatever the name, on Linux too.
        _switch_off("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "ENABLE_RAY_CLUSTER")
    with _own_ray(access, num_cpus) if address == LOCAL else _joined(address, access):
        yield


def check_cluster(address: str, access: RayAccess) -> str:
    """Make sure within seconds that a cluster answers at `address` and takes our token; returns its ``host:port``.

    Raises:
        UserInputError: no address, no token, another port of Ray's, a web server, another token, or a cluster that asks
            for none.
        EnvironmentFault: nobody answers.
    """
    found = where = address
    parts = None if address == "auto" else host_and_port(address)
    access.check(address)
    if parts is None:
        found = _address_of_auto()
        parts, where = host_and_port(found, whose=" of RAY_ADDRESS"), f"auto ({found})"
    try:
        listener = who_listens(*parts, token=access.shown_token)
    except OSError as error:
        raise EnvironmentFault(f"Ray at {where}: no cluster answers ({error}); {_JOIN_FIRST}; {PORTS}") from error
    if listener == "silent":
        raise EnvironmentFault(
            f"Ray at {where}: something listens there, but within {PROBE_SECONDS:g} s it does not answer as a cluster "
            f"does; look whether the cluster's head is well; {PORTS}"
        )
    if listener in ("web server", "another part of Ray"):
        raise UserInputError(f"Ray at {where}: expected the cluster's own port, found {_FOUND[listener]}; {PORTS}")
    if listener == "another token":
        refusal = "refuses our token" if access.shown_token else "asks for a token, and there is none here"
        raise UserInputError(f"Ray at {where}: {refusal}; {HOW_TO_GET_A_TOKEN}")
    if listener == "open cluster" and not access.accept_open:
        raise UserInputError(f"Ray at {where}: takes orders without a token; {HOW_TO_GET_A_TOKEN}")
    return found


def host_and_port(address: str, *, whose: str = "") -> tuple[str, int]:
    """Return the two halves of ``host:port`` or ``[IPv6 address]:port``; all else is a UserInputError.

    `whose`: where the address is from, for the message.
    """
    host, _, port = address.rpartition(":")
    bare = host.removeprefix("[").removesuffix("]")
    is_host = bare and "/" not in host and (":" in bare) == host.startswith("[")
    if is_host and port.isascii() and port.isdecimal() and len(port) < 6 and 0 < int(port) < 65536:
        return bare, int(port)
    raise UserInputError(
        f"Ray address {address}{whose}: expected auto or host:port of a cluster this machine is a node of; to send "
        f"a job to a cluster from outside: ca2st submit RECIPE --address http://HOST:8265; {PORTS}"
    )


def who_listens(host: str, port: int, *, token: str) -> Listener:
    """Ask the port whether it is a cluster's, without a token, with `token` where it wants one, then whether by HTTP.

    An OSError where nobody listens.
    """
    end = time.monotonic() + PROBE_SECONDS
    socket.create_connection((host, port), timeout=_CONNECT_SECONDS + _STEP_SECONDS / 2).close()
    answer = _ask_cluster(host, port, "", end)
    alive: Listener = "open cluster"
    if answer == "UNAUTHENTICATED" and token:
        answer, alive = _ask_cluster(host, port, token, end), "cluster"
    known: dict[str, Listener] = {
        "OK": alive,
        "UNAUTHENTICATED": "another token",
        "UNIMPLEMENTED": "another part of Ray",
    }
    return known.get(answer) or ("web server" if _speaks_http(host, port, end) else "silent")


def has_dashboard() -> bool:
    """Return whether the cluster that is joined serves Ray's dashboard."""
    from ray._private.worker import get_dashboard_url

    return bool(get_dashboard_url())  # type: ignore[no-untyped-call]  # Ray has no types there


def first_line(error: BaseException) -> str:
    """Return the first line with words of an error's message."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _ask_cluster(host: str, port: int, token: str, end: float) -> str:
    """Return the name of the status that answers the cluster's own health check; ``OK``: it lives."""
    import grpc  # type: ignore[import-untyped]  # it ships no stubs

    left = min(_STEP_SECONDS, end - time.monotonic())
    metadata = [("authorization", f"Bearer {token}")] if token else []
    address, options = f"[{host}]:{port}" if ":" in host else f"{host}:{port}", [("grpc.enable_http_proxy", 0)]
    if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):  # as Ray itself makes its channels
        from ray._common.tls_utils import load_certs_from_env

        chain, key, authority = load_certs_from_env()  # type: ignore[no-untyped-call]  # Ray has no types there
        credentials = grpc.ssl_channel_credentials(
            certificate_chain=chain, private_key=key, root_certificates=authority
        )
        asked = grpc.secure_channel(address, credentials, options)
    else:
        asked = grpc.insecure_channel(address, options)
    with asked as channel:
        try:
            channel.unary_unary(_ALIVE)(b"", timeout=max(0.1, left), metadata=metadata)
        except grpc.RpcError as error:
            return str(error.code().name)
    return "OK"


def _speaks_http(host: str, port: int, end: float) -> bool:
    try:
        with socket.create_connection((host, port), timeout=max(0.1, end - time.monotonic())) as connection:
            connection.sendall(b"GET /api/version HTTP/1.1\r\nHost: ray\r\nConnection: close\r\n\r\n")
            return connection.recv(5) == b"HTTP/"
    except OSError:
        return False


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _switch_off(variable: str, constant: str) -> None:
    """Switch off what `variable` does not ask for, in Ray's processes, which inherit it, and in this one.

    Ray reads it once, into `constant`, when it is imported: the training's driver has imported it before.
    """
    value = os.environ.setdefault(variable, "0")
    if "ray" in sys.modules:
        from ray._private import ray_constants

        setattr(ray_constants, constant, value.lower() in ("1", "true"))


@contextmanager
def _own_ray(access: RayAccess, num_cpus: int | None) -> Iterator[None]:
    if access.mode not in (None, "token") and not access.accept_open:
        raise UserInputError(
            f"RAY_AUTH_MODE={access.mode}: expected token, or no such variable; {ACCEPT_OPEN} starts an open Ray, "
            "and then everybody on this machine can run code as you"
        )
    # Of this process alone: no file in the home folder, and Ray would write one that others may read.
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    import ray

    folder = Path(tempfile.mkdtemp(prefix="ca2st-ray-"))  # closed to others; Ray opens the one that it is given
    try:
        try:
            # "local" said explicitly: without an address Ray would join the cluster of RAY_ADDRESS.
            ray.init(address=LOCAL, include_dashboard=False, num_cpus=num_cpus, _temp_dir=str(folder / "r"))
        except Exception as error:  # Ray has no class of its own for a start that took too long
            raise EnvironmentFault(
                f"Ray did not start on this machine: {first_line(error)}; run again when it is less busy"
            ) from error
        yield
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _joined(address: str, access: RayAccess) -> Iterator[None]:
    found = check_cluster(address, access)
    import ray
    from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
    from ray.exceptions import AuthenticationError

    # Ray does this itself for "auto" only.
    maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
    try:
        ray.init(address=found)
    except AuthenticationError as error:
        raise UserInputError(
            f"Ray at {address}: refuses our token ({first_line(error)}); {HOW_TO_GET_A_TOKEN}"
        ) from error
    except (ConnectionError, RuntimeError) as error:
        raise EnvironmentFault(f"Ray at {address}: no cluster answers ({first_line(error)}); {_JOIN_FIRST}") from error
    try:
        yield
    finally:
        ray.shutdown()


def _address_of_auto() -> str:
    """Return what Ray takes for ``auto``: RAY_ADDRESS, a cluster that runs here, or the one joined here last."""
    from ray._private import services

    services.find_gcs_addresses.cache_clear()  # type: ignore[attr-defined]  # lru_cache, which Ray does not type
    try:
        return str(services.get_ray_address_from_environment("auto", None))
    except ConnectionError as error:
        raise EnvironmentFault(f"Ray at auto: no cluster answers ({first_line(error)}); {_JOIN_FIRST}") from error


NODE_SECONDS = 120.0
"""A cold interpreter that imports torch on a busy node takes most of a minute."""
_SHORT_ID = 8

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True, order=True)
class Node:
    """A living node of the cluster."""

    address: str
    """As the other nodes reach it."""
    node_id: str
    """Ray's hexadecimal id."""
    resources: Mapping[str, float] = field(default_factory=dict, compare=False)
    """All that Ray may give out there: ``CPU``, ``GPU``, ``memory``, ... (used or not)."""

    @property
    def name(self) -> str:
        """Address and the start of the id: one machine may run two nodes."""
        return f"{self.address} ({self.node_id[:_SHORT_ID]})"

    def __str__(self) -> str:
        return self.name


def living_nodes() -> list[Node]:
    """Return the cluster's nodes that are alive, in the order of their addresses."""
    import ray

    alive = [one for one in ray.nodes() if one["Alive"]]  # type: ignore[no-untyped-call]  # Ray has no types there
    return sorted(
        Node(address=one["NodeManagerAddress"], node_id=one["NodeID"], resources=dict(one["Resources"]))
        for one in alive
    )


def this_node() -> Node:
    """Return the node that the calling task, worker or driver runs on."""
    import ray

    node_id = ray.get_runtime_context().get_node_id()
    address = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]  # Ray has no types there
    return Node(address=address, node_id=node_id)


def ask_every_node(
    function: Callable[..., T],
    *arguments: Any,
    nodes: Sequence[Node],
    timeout_seconds: float = NODE_SECONDS,
) -> tuple[dict[Node, T], dict[Node, str]]:
    """Return what ``function(*arguments)`` returns on each of `nodes`, and why the others gave no answer."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from sharding.cluster import end_tasks  # no need of it where Ray is only looked for

    task = ray.remote(num_cpus=0, max_retries=0)(function)
    asked = {
        task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node.node_id, soft=False)).remote(
            *arguments
        ): node
        for node in nodes
    }
    answers = gathered(asked, timeout_seconds=timeout_seconds)
    end_tasks(asked)
    return answers


def gathered(asked: Mapping[Any, Node], *, timeout_seconds: float) -> tuple[dict[Node, Any], dict[Node, str]]:
    """Return the values of references by the node each was asked of, and why those of others are late or failed."""
    import ray
    from ray.exceptions import GetTimeoutError, RayError, RayTaskError

    deadline = time.monotonic() + timeout_seconds
    answers: dict[Node, Any] = {}
    silent: dict[Node, str] = {}
    for ticket, node in asked.items():
        try:
            answers[node] = ray.get(ticket, timeout=max(0.0, deadline - time.monotonic()))
        except GetTimeoutError:
            silent[node] = f"no answer within {timeout_seconds:g} s"
        except RayTaskError as error:
            silent[node] = _raised(error.cause)
        except RayError as error:
            silent[node] = f"{type(error).__name__}: {first_line(error)}"
    return answers, silent


def _raised(cause: Exception) -> str:
    """Return what a task raised on a node, in a line."""
    if isinstance(cause, CA2STError):
        return str(cause)
    what = f"{type(cause).__name__}: {first_line(cause)}"
    if isinstance(cause, ImportError) or "No module named" in str(cause):
        what += " (is ca2st installed there as here?)"
    return what
