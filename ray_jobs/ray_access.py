"""A Ray of this machine's own, or a cluster that asks for a token.

Whoever reaches an open Ray cluster runs code on it, so an open one is neither started nor joined unless the user
says so. A token travels in clear text: over networks of others it needs a tunnel or TLS.
"""

import os
import secrets
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ca2st.errors import EnvironmentFault, UserInputError

LOCAL = "local"
ACCEPT_OPEN = "--i-accept-open-ray"
_ANSWER_SECONDS = 10.0
_JOIN_FIRST = "this machine must be a node of it: `ray start --address=HEAD:6379`"
_ALIVE = "/ray.rpc.NodeInfoGcsService/CheckAlive"


@dataclass(frozen=True, kw_only=True, slots=True)
class RayAccess:
    """What this process may show a Ray cluster, as found at the edge (`environment.ray_access`)."""

    token_known: bool
    """A token is there: ``RAY_AUTH_TOKEN``, the file of ``RAY_AUTH_TOKEN_PATH`` or ``~/.ray/auth_token``."""
    mode: str | None = None
    """``RAY_AUTH_MODE``; None where it is not set, and a token that is there is then used."""
    accept_open: bool = False
    """The user accepts a cluster that runs everybody's code."""

    def check(self, address: str) -> None:
        """Refuse to go to the cluster at `address` without a token.

        Raises:
            UserInputError: no token, or ``RAY_AUTH_MODE`` says not to use it, and open clusters are not accepted.
        """
        if self.accept_open or (self.token_known and self.mode in (None, "token")):
            return
        found = "no token" if self.mode in (None, "token") else f"RAY_AUTH_MODE={self.mode}"
        raise UserInputError(f"Ray at {address}: expected a cluster's token, found {found}; {HOW_TO_GET_A_TOKEN}")


HOW_TO_GET_A_TOKEN = (
    "start the cluster with RAY_AUTH_MODE=token, put its token (`ray get-auth-token --generate` makes one) into "
    "~/.ray/auth_token, mode 600, or name another file by RAY_AUTH_TOKEN_PATH, and set RAY_AUTH_MODE=token here; "
    f"{ACCEPT_OPEN} goes without, and then everybody who reaches the cluster can run code on it"
)


def has_token(variables: Mapping[str, str], home: Path) -> bool:
    """Whether Ray would find a token, looked up in Ray's order.

    Raises:
        UserInputError: ``RAY_AUTH_TOKEN_PATH`` names no readable file or an empty one; Ray itself would abort.
    """
    if variables.get("RAY_AUTH_TOKEN", "").strip():
        return True
    if named := variables.get("RAY_AUTH_TOKEN_PATH", ""):
        if not _holds_text(Path(named)):
            raise UserInputError(f"RAY_AUTH_TOKEN_PATH={named}: expected a file with a token, found none or no text")
        return True
    return _holds_text(home / ".ray" / "auth_token")


def _holds_text(path: Path) -> bool:
    try:
        return bool(path.read_text(encoding="utf-8").strip())
    except (OSError, UnicodeDecodeError):
        return False


@contextmanager
def ray_session(address: str, *, access: RayAccess, num_cpus: int | None = None) -> Iterator[None]:
    """Be connected to Ray for the block; enter it before anything imports ray, which reads its settings only then.

    `address`: ``local`` starts a Ray for this block alone, on the loopback interface, with a token of its own,
    without a dashboard, `num_cpus` processors wide (None: this machine's); anything else (``auto``, ``host:port``)
    joins the cluster there.

    Raises:
        UserInputError: the cluster asks for no token, or we have none or another one; or the address is none.
        EnvironmentFault: no cluster answers at `address`.
    """
    _set_before_import(local=address == LOCAL)
    with _own_ray(access, num_cpus) if address == LOCAL else _joined(address, access):
        yield


def _set_before_import(*, local: bool) -> None:
    """What Ray reads once, when it is imported, and what its processes inherit."""
    # Ray's own uv integration would build a new environment for every worker.
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    if local and "ray" not in sys.modules:
        # Without nodes elsewhere Ray binds every port to the loopback interface; whatever the name, on Linux too.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")


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

    folder = Path(tempfile.mkdtemp(prefix="ca2st-ray-"))
    try:
        _start_own(folder, num_cpus)
        yield
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def _start_own(folder: Path, num_cpus: int | None) -> None:
    import ray

    try:
        # "local" in words: without an address Ray would join the cluster of RAY_ADDRESS.
        ray.init(address=LOCAL, include_dashboard=False, num_cpus=num_cpus, _temp_dir=str(folder))
    except Exception as error:  # Ray tells of a start that took too long by no class of its own
        raise EnvironmentFault(
            f"Ray did not start on this machine: {first_line(error)}; run again when it is less busy"
        ) from error


@contextmanager
def _joined(address: str, access: RayAccess) -> Iterator[None]:
    if "://" in address:
        raise UserInputError(
            f"Ray address {address}: expected auto or host:port of a cluster this machine is a node of; to send a "
            "job to a cluster from outside: ca2st submit RECIPE --address http://HOST:8265"
        )
    access.check(address)
    _check_answers(address)
    import ray
    from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
    from ray.exceptions import AuthenticationError

    # Ray does this itself for "auto" only.
    maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
    try:
        ray.init(address=address)
    except AuthenticationError as error:
        raise UserInputError(
            f"Ray at {address}: refuses our token ({first_line(error)}); {HOW_TO_GET_A_TOKEN}"
        ) from error
    except (ConnectionError, RuntimeError) as error:
        raise EnvironmentFault(f"Ray at {address}: no cluster answers ({first_line(error)}); {_JOIN_FIRST}") from error
    try:
        if not access.accept_open and is_open(ray.get_runtime_context().gcs_address):
            raise UserInputError(f"Ray at {address}: takes orders without a token; {HOW_TO_GET_A_TOKEN}")
        yield
    finally:
        ray.shutdown()


def _check_answers(address: str) -> None:
    """Something listens at ``host:port``: Ray itself would wait for minutes."""
    host, _, port = address.rpartition(":")
    if not port.isdecimal():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_SECONDS).close()
    except OSError as error:
        raise EnvironmentFault(f"Ray at {address}: no cluster answers ({error}); {_JOIN_FIRST}") from error


def is_open(gcs_address: str) -> bool:
    """Whether the cluster answers a caller who shows no token.

    Raises:
        EnvironmentFault: it answers nothing at all.
    """
    import grpc  # type: ignore[import-untyped]  # it ships no stubs

    with _tokenless_channel(gcs_address) as channel:
        call = channel.unary_unary(_ALIVE)
        try:
            call(b"", timeout=_ANSWER_SECONDS)
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.UNAUTHENTICATED:
                return False
            raise EnvironmentFault(f"Ray at {gcs_address}: {error.code().name} instead of an answer") from error
    return True


def _tokenless_channel(gcs_address: str) -> Any:
    """A channel as Ray makes them, by TLS where ``RAY_USE_TLS`` says so, but for the token."""
    import grpc
    from ray._common.tls_utils import load_certs_from_env

    if os.environ.get("RAY_USE_TLS", "0").lower() not in ("1", "true"):
        return grpc.insecure_channel(gcs_address)
    chain, private_key, authority = load_certs_from_env()  # type: ignore[no-untyped-call]  # Ray has no types there
    credentials = grpc.ssl_channel_credentials(
        certificate_chain=chain, private_key=private_key, root_certificates=authority
    )
    return grpc.secure_channel(gcs_address, credentials)


def has_dashboard() -> bool:
    """Whether the cluster that is joined serves Ray's dashboard."""
    from ray._private.worker import get_dashboard_url

    return bool(get_dashboard_url())  # type: ignore[no-untyped-call]  # Ray has no types there


def first_line(error: BaseException) -> str:
    """The first line with words of an error's message."""
    lines: Sequence[str] = [line.strip() for line in str(error).splitlines()]
    return next((line for line in lines if line), type(error).__name__)
