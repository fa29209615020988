"""Open Ray clusters are neither started nor joined unless the user says so."""

import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import grpc
import pytest
import ray
from ray._private import ray_constants
from ray.exceptions import AuthenticationError

from ca2st.errors import EnvironmentFault, UserInputError
from ray_jobs import environment
from ray_jobs.cluster.ray_access import RayAccess, find_token, found_access, host_and_port, ray_session, who_listens

KNOWN = RayAccess(token="known")
UNKNOWN = RayAccess()


def token_file(home: Path, text: str) -> None:
    (home / ".ray").mkdir()
    (home / ".ray" / "auth_token").write_text(text)


def test_a_token_is_looked_up_where_ray_looks(tmp_path: Path) -> None:
    assert not find_token({}, tmp_path)
    assert find_token({"RAY_AUTH_TOKEN": " secret\n"}, tmp_path) == "secret"
    (tmp_path / "named").write_text("secret\n")
    assert find_token({"RAY_AUTH_TOKEN_PATH": str(tmp_path / "named")}, tmp_path) == "secret"
    token_file(tmp_path, " \n")
    assert not find_token({"RAY_AUTH_TOKEN": ""}, tmp_path)
    (tmp_path / ".ray" / "auth_token").write_text("secret")
    assert find_token({}, tmp_path) == "secret"


@pytest.mark.parametrize("text", [None, "", " \n"])
def test_a_token_file_that_is_named_and_holds_none_is_refused(tmp_path: Path, text: str | None) -> None:
    token_file(tmp_path, "another")
    named = tmp_path / "named"
    if text is not None:
        named.write_text(text)
    with pytest.raises(UserInputError, match=r"RAY_AUTH_TOKEN_PATH=.*named: expected a file with a token"):
        find_token({"RAY_AUTH_TOKEN_PATH": str(named)}, tmp_path)


def test_the_edge_finds_the_token_and_the_mode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    assert found_access() == UNKNOWN
    token_file(tmp_path, "secret")
    monkeypatch.setenv("RAY_AUTH_MODE", "Token")
    assert found_access(accept_open=True) == RayAccess(token="secret", mode="token", accept_open=True)


def test_no_cluster_is_joined_without_a_token() -> None:
    with (
        pytest.raises(UserInputError, match=r"found no token; .*RAY_AUTH_MODE=token.*auth_token.*--i-accept-open-ray"),
        ray_session("auto", access=UNKNOWN),
    ):
        pytest.fail("joined")
    switched_off = RayAccess(token="known", mode="disabled")
    with pytest.raises(UserInputError, match="found RAY_AUTH_MODE=disabled"):
        switched_off.check("auto")


def test_no_open_ray_is_started_on_this_machine() -> None:
    with (
        pytest.raises(UserInputError, match="RAY_AUTH_MODE=disabled: expected token"),
        ray_session("local", access=RayAccess(token="known", mode="disabled")),
    ):
        pytest.fail("started")


@pytest.mark.parametrize("address", ["http://127.0.0.1:8265", "ray://127.0.0.1:10001", "head", "head:99999"])
def test_the_address_of_a_job_server_is_no_cluster_to_join(address: str) -> None:
    with (
        pytest.raises(UserInputError, match=r"expected auto or host:port.*ca2st submit"),
        ray_session(address, access=KNOWN),
    ):
        pytest.fail("joined")


SETTINGS = {
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "RAY_ENABLE_UV_RUN_RUNTIME_ENV",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "ENABLE_RAY_CLUSTER",
}
"""Variables of Ray, and the constants that it reads them into when it is imported."""


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """What is asked of Ray, which here starts nothing."""
    made: list[tuple[str, dict[str, Any]]] = []
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_MODE", *SETTINGS):
        monkeypatch.setenv(name, "kept")  # so that it is put back
        monkeypatch.delenv(name)
    for constant in SETTINGS.values():
        monkeypatch.setattr(ray_constants, constant, True)  # as ray is that was imported before
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setattr(ray, "init", lambda **options: made.append(("init", options)))
    monkeypatch.setattr(ray, "shutdown", lambda: made.append(("shutdown", {})))
    monkeypatch.setenv("RAY_ADDRESS", "kept")
    monkeypatch.delenv("RAY_ADDRESS")
    return made


def test_a_ray_of_our_own_has_a_token_no_dashboard_and_leaves_nothing(
    calls: list[tuple[str, dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with ray_session("local", access=UNKNOWN, num_cpus=3):
        ((_, options),) = calls
        folder = Path(options.pop("_temp_dir")).parent
        assert folder.stat().st_mode & 0o777 == 0o700
        assert options == {"address": "local", "include_dashboard": False, "num_cpus": 3}
        assert len(environment.os.environ["RAY_AUTH_TOKEN"]) == 64
        assert [environment.os.environ[name] for name in SETTINGS] == ["0", "0"]
        assert [getattr(ray_constants, constant) for constant in SETTINGS.values()] == [False, False]
    assert calls[-1] == ("shutdown", {})
    assert not folder.exists()


def test_a_ray_of_our_own_that_does_not_start_is_a_fault_of_the_machine(
    calls: list[tuple[str, dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def late(**options: Any) -> None:
        raise Exception("The current node timed out during startup.\nMore words.")

    monkeypatch.setattr(ray, "init", late)
    told = r"Ray did not start on this machine: The current node timed out during startup\.; run again"
    with pytest.raises(EnvironmentFault, match=told), ray_session("local", access=UNKNOWN):
        pytest.fail("started")
    assert calls == [("shutdown", {})]


def test_a_cluster_is_left_when_the_block_fails(calls: list[tuple[str, dict[str, Any]]]) -> None:
    with answering(closed_cluster) as address:
        with pytest.raises(ZeroDivisionError), ray_session(address, access=KNOWN):
            raise ZeroDivisionError
        assert calls == [("init", {"address": address}), ("shutdown", {})]


@pytest.mark.parametrize(
    ("error", "told", "kind"),
    [
        (AuthenticationError("wrong"), "refuses our token", UserInputError),
        (ConnectionError("Could not find any running Ray instance."), "no cluster answers", EnvironmentFault),
    ],
)
def test_why_a_cluster_cannot_be_joined_is_told(
    calls: list[tuple[str, dict[str, Any]]],
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    told: str,
    kind: type[Exception],
) -> None:
    def fail(**_: Any) -> None:
        raise error

    monkeypatch.setattr(ray, "init", fail)
    with (
        answering(closed_cluster) as address,
        pytest.raises(kind, match=f"Ray at {address}: {told}"),
        ray_session(address, access=KNOWN),
    ):
        pytest.fail("joined")


Call = tuple[str, str]


@contextmanager
def answering(answer: Callable[[str, str], grpc.StatusCode | None]) -> Iterator[str]:
    """A gRPC server that answers (method, authorization) with a status, or well; gives its address."""

    class Everything(grpc.GenericRpcHandler):
        def service(self, details: Any) -> Any:
            shown = dict(details.invocation_metadata).get("authorization", "")
            code = answer(details.method, shown)

            def respond(_: bytes, context: grpc.ServicerContext) -> bytes:
                if code is not None:
                    context.abort(code, "by a test")
                return b""

            return grpc.unary_unary_rpc_method_handler(respond)

    server = grpc.server(ThreadPoolExecutor(1))
    server.add_generic_rpc_handlers((Everything(),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None)


def closed_cluster(_method: str, shown: str) -> grpc.StatusCode | None:
    return None if shown == "Bearer known" else grpc.StatusCode.UNAUTHENTICATED


@contextmanager
def web_server() -> Iterator[str]:
    class Answer(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@contextmanager
def silent_socket() -> Iterator[str]:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(8)
        yield f"127.0.0.1:{listening.getsockname()[1]}"


@contextmanager
def nobody() -> Iterator[str]:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{unused.getsockname()[1]}"


WRONG = RayAccess(token="of another cluster")
SERVERS = [
    (nobody, KNOWN, EnvironmentFault, r"no cluster answers \(.*refused.*ray start --address.*6379.*8265.*10001"),
    (silent_socket, KNOWN, EnvironmentFault, r"something listens there, but within 4\.5 s"),
    (web_server, KNOWN, UserInputError, r"expected the cluster's own port, found a web server, as its dashboard.*6379"),
    (lambda: answering(closed_cluster), WRONG, UserInputError, "refuses our token; start the cluster with RAY_AUTH"),
    (
        lambda: answering(closed_cluster),
        RayAccess(accept_open=True),
        UserInputError,
        "asks for a token, and there is none here",
    ),
    (lambda: answering(lambda *_: None), KNOWN, UserInputError, "takes orders without a token"),
    (
        lambda: answering(lambda *_: grpc.StatusCode.UNIMPLEMENTED),
        KNOWN,
        UserInputError,
        "found another port of Ray's, of its client server or of a single node",
    ),
]


@pytest.mark.parametrize("as_auto", [False, True])
@pytest.mark.parametrize(("server", "access", "kind", "told"), SERVERS)
def test_what_is_no_cluster_for_us_is_told_within_five_seconds_and_before_ray_is_asked(
    calls: list[tuple[str, dict[str, Any]]],
    monkeypatch: pytest.MonkeyPatch,
    as_auto: bool,
    server: Callable[[], AbstractContextManager[str]],
    access: RayAccess,
    kind: type[Exception],
    told: str,
) -> None:
    with server() as address:
        if as_auto:
            monkeypatch.setenv("RAY_ADDRESS", address)
        begin = time.monotonic()
        with (
            pytest.raises(kind, match=told) as refusal,
            ray_session("auto" if as_auto else address, access=access),
        ):
            pytest.fail("joined")
        assert time.monotonic() - begin < 5
    assert str(refusal.value).startswith(f"Ray at {f'auto ({address})' if as_auto else address}: ")
    assert calls == []


def test_a_cluster_that_takes_our_token_is_joined_and_one_that_asks_for_none_where_it_is_accepted(
    calls: list[tuple[str, dict[str, Any]]],
) -> None:
    with answering(closed_cluster) as address, ray_session(address, access=KNOWN):
        assert calls == [("init", {"address": address})]
    calls.clear()
    with answering(lambda *_: None) as address, ray_session(address, access=RayAccess(accept_open=True)):
        assert calls == [("init", {"address": address})]


def test_a_cluster_is_asked_by_its_own_question() -> None:
    asked: list[Call] = []

    def answer(method: str, shown: str) -> grpc.StatusCode | None:
        asked.append((method, shown))
        return closed_cluster(method, shown)

    with answering(answer) as address:
        host, _, port = address.partition(":")
        assert who_listens(host, int(port), token="known") == "cluster"
    assert [method for method, _ in asked] == ["/ray.rpc.NodeInfoGcsService/CheckAlive"] * 2
    assert [shown for _, shown in asked] == ["", "Bearer known"]


@pytest.mark.parametrize(
    ("address", "found"),
    [
        ("head:6379", ("head", 6379)),
        ("[::1]:6379", ("::1", 6379)),
        ("::1:6379", None),
        ("head", None),
        ("head:", None),
        (":6379", None),
        ("head:0", None),
        ("head:65536", None),
        ("head:" + "9" * 5000, None),
        ("head:٣", None),
        ("http://head:8265", None),
    ],
)
def test_an_address_is_a_host_and_a_port(address: str, found: tuple[str, int] | None) -> None:
    if found is not None:
        assert host_and_port(address) == found
        return
    with pytest.raises(UserInputError, match="expected auto or host:port of a cluster this machine is a node of"):
        host_and_port(address)


def test_the_question_for_a_token_goes_by_tls_where_the_cluster_speaks_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def channel(address: str, _credentials: object, _options: object) -> grpc.Channel:
        asked.append(address)
        return grpc.insecure_channel(address)

    monkeypatch.setenv("RAY_USE_TLS", "1")
    monkeypatch.setattr("ray._common.tls_utils.load_certs_from_env", lambda: (None, None, None))
    monkeypatch.setattr(grpc, "secure_channel", channel)
    with answering(lambda *_: grpc.StatusCode.UNAUTHENTICATED) as address:
        host, _, port = address.partition(":")
        assert who_listens(host, int(port), token="") == "another token"
    assert asked == [address]
