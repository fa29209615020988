"""Open Ray clusters are neither started nor joined unless the user says so."""

import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
import ray
from ray.exceptions import AuthenticationError

from ca2st.errors import EnvironmentFault, UserInputError
from ray_jobs import environment, ray_access
from ray_jobs.ray_access import RayAccess, has_token, is_open, ray_session

KNOWN = RayAccess(token_known=True)
UNKNOWN = RayAccess(token_known=False)


def token_file(home: Path, text: str) -> None:
    (home / ".ray").mkdir()
    (home / ".ray" / "auth_token").write_text(text)


def test_a_token_is_looked_up_where_ray_looks(tmp_path: Path) -> None:
    assert not has_token({}, tmp_path)
    assert has_token({"RAY_AUTH_TOKEN": "secret"}, tmp_path)
    (tmp_path / "named").write_text("secret\n")
    assert has_token({"RAY_AUTH_TOKEN_PATH": str(tmp_path / "named")}, tmp_path)
    token_file(tmp_path, " \n")
    assert not has_token({"RAY_AUTH_TOKEN": ""}, tmp_path)
    (tmp_path / ".ray" / "auth_token").write_text("secret")
    assert has_token({}, tmp_path)


@pytest.mark.parametrize("text", [None, "", " \n"])
def test_a_token_file_that_is_named_and_holds_none_is_refused(tmp_path: Path, text: str | None) -> None:
    token_file(tmp_path, "another")
    named = tmp_path / "named"
    if text is not None:
        named.write_text(text)
    with pytest.raises(UserInputError, match=r"RAY_AUTH_TOKEN_PATH=.*named: expected a file with a token"):
        has_token({"RAY_AUTH_TOKEN_PATH": str(named)}, tmp_path)


def test_the_edge_finds_the_token_and_the_mode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    assert environment.ray_access() == UNKNOWN
    token_file(tmp_path, "secret")
    monkeypatch.setenv("RAY_AUTH_MODE", "Token")
    assert environment.ray_access(accept_open=True) == RayAccess(token_known=True, mode="token", accept_open=True)


def test_no_cluster_is_joined_without_a_token() -> None:
    with (
        pytest.raises(UserInputError, match=r"found no token; .*RAY_AUTH_MODE=token.*auth_token.*--i-accept-open-ray"),
        ray_session("auto", access=UNKNOWN),
    ):
        pytest.fail("joined")
    switched_off = RayAccess(token_known=True, mode="disabled")
    with pytest.raises(UserInputError, match="found RAY_AUTH_MODE=disabled"):
        switched_off.check("auto")


def test_no_open_ray_is_started_on_this_machine() -> None:
    with (
        pytest.raises(UserInputError, match="RAY_AUTH_MODE=disabled: expected token"),
        ray_session("local", access=RayAccess(token_known=True, mode="disabled")),
    ):
        pytest.fail("started")


@pytest.mark.parametrize("address", ["http://127.0.0.1:8265", "ray://127.0.0.1:10001"])
def test_the_address_of_a_job_server_is_no_cluster_to_join(address: str) -> None:
    with (
        pytest.raises(UserInputError, match=r"expected auto or host:port.*ca2st submit"),
        ray_session(address, access=KNOWN),
    ):
        pytest.fail("joined")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """What is asked of Ray, which here starts nothing."""
    made: list[tuple[str, dict[str, Any]]] = []
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_MODE", "RAY_ENABLE_UV_RUN_RUNTIME_ENV"):
        monkeypatch.setenv(name, "kept")  # so that it is put back
        monkeypatch.delenv(name)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setattr(ray, "init", lambda **options: made.append(("init", options)))
    monkeypatch.setattr(ray, "shutdown", lambda: made.append(("shutdown", {})))
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(gcs_address="127.0.0.1:1"))
    monkeypatch.setattr(ray_access, "is_open", lambda _: False)
    return made


def test_a_ray_of_our_own_has_a_token_no_dashboard_and_leaves_nothing(
    calls: list[tuple[str, dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with ray_session("local", access=UNKNOWN, num_cpus=3):
        ((_, options),) = calls
        folder = Path(options.pop("_temp_dir"))
        assert folder.is_dir()
        assert options == {"address": "local", "include_dashboard": False, "num_cpus": 3}
        assert len(environment.os.environ["RAY_AUTH_TOKEN"]) == 64
        assert environment.os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] == "0"
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
    with pytest.raises(ZeroDivisionError), ray_session("auto", access=KNOWN):
        raise ZeroDivisionError
    assert calls == [("init", {"address": "auto"}), ("shutdown", {})]


def test_an_open_cluster_is_left_at_once_unless_it_is_accepted(
    calls: list[tuple[str, dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_access, "is_open", lambda _: True)
    with (
        pytest.raises(UserInputError, match="takes orders without a token"),
        ray_session("auto", access=KNOWN),
    ):
        pytest.fail("joined")
    assert calls == [("init", {"address": "auto"}), ("shutdown", {})]
    with ray_session("auto", access=RayAccess(token_known=False, accept_open=True)):
        pass


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
    with pytest.raises(kind, match=f"Ray at auto: {told}"), ray_session("auto", access=KNOWN):
        pytest.fail("joined")


def test_ray_is_not_asked_to_wait_where_nothing_listens(calls: list[tuple[str, dict[str, Any]]]) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        with (
            pytest.raises(EnvironmentFault, match=r"no cluster answers \(.*refused.*ray start --address"),
            ray_session(address, access=KNOWN),
        ):
            pytest.fail("joined")
    assert calls == []


@contextmanager
def answering(code: grpc.StatusCode | None) -> Iterator[str]:
    """A server that answers every call: with `code`, or well; gives its address."""

    def answer(_: bytes, context: grpc.ServicerContext) -> bytes:
        if code is not None:
            context.abort(code, "by a test")
        return b""

    class Everything(grpc.GenericRpcHandler):
        def service(self, details: Any) -> Any:
            return grpc.unary_unary_rpc_method_handler(answer)

    server = grpc.server(ThreadPoolExecutor(1))
    server.add_generic_rpc_handlers((Everything(),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None)


def test_a_cluster_is_open_when_it_answers_a_caller_without_a_token() -> None:
    with answering(None) as address:
        assert is_open(address)
    with answering(grpc.StatusCode.UNAUTHENTICATED) as address:
        assert not is_open(address)
    with answering(grpc.StatusCode.UNAVAILABLE) as address, pytest.raises(EnvironmentFault, match="UNAVAILABLE"):
        is_open(address)


def test_the_question_for_a_token_goes_by_tls_where_the_cluster_speaks_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def channel(address: str, _credentials: object) -> grpc.Channel:
        asked.append(address)
        return grpc.insecure_channel(address)

    monkeypatch.setenv("RAY_USE_TLS", "1")
    monkeypatch.setattr("ray._common.tls_utils.load_certs_from_env", lambda: (None, None, None))
    monkeypatch.setattr(grpc, "secure_channel", channel)
    with answering(grpc.StatusCode.UNAUTHENTICATED) as address:
        assert not is_open(address)
    assert asked == [address]
