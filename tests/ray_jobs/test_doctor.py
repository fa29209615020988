"""``ca2st doctor``: each check says what it found, and one that breaks is a finding, not a crash."""

import json
import socket
import sqlite3
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib import metadata
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ca2st.errors import EnvironmentFault
from pipelines.decode.reference import ReferenceBackend
from ray_jobs import doctor
from ray_jobs.cli import app
from ray_jobs.doctor import Finding, all_checks, examine
from ray_jobs.environment import basic_authorization


def test_a_healthy_environment_passes_all_that_is_needed(tmp_path: Path) -> None:
    findings = {one.name: one for one in examine(all_checks(tmp_path, tracking_uri=f"sqlite:///{tmp_path}/m.db"))}
    assert not {name: one.what for name, one in findings.items() if one.needed and not one.ok}
    assert {"packages", "torch", "dali cpu", "video h264", "video mjpeg", "mlflow", "disk runs"} <= findings.keys()
    assert all(one.fix for one in findings.values() if not one.ok)


def test_a_missing_and_a_wrong_package_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        doctor.metadata, "requires", lambda _: ["numpy<1", "not-there==3", "ruff; extra == 'dev'", "einops"]
    )
    finding = doctor.check_packages()
    assert not finding.ok
    numpy = metadata.version("numpy")
    assert finding.what == f"numpy: expected <1, found {numpy}; not-there: expected ==3, found none"


def test_a_check_that_breaks_is_a_finding_with_its_error() -> None:
    def broken() -> Finding:
        raise ImportError("libcudart.so.13: cannot open shared object file")

    (finding,) = examine({"torch": broken})
    assert (finding.name, finding.ok) == ("torch", False)
    assert "ImportError: libcudart.so.13" in finding.what


def test_an_encoder_that_ffmpeg_lacks_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(doctor._ENCODERS, "hevc", "no_such_encoder")
    finding = doctor.check_video("hevc")
    assert (finding.ok, finding.needed, finding.what) == (False, False, "no encoder no_such_encoder")


def test_a_decoder_that_gives_other_pixels_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    true_render = ReferenceBackend.render
    monkeypatch.setattr(ReferenceBackend, "render", lambda self, requests: true_render(self, requests) // 2)
    finding = doctor.check_dali()
    assert not finding.ok
    assert "of 255 off Pillow" in finding.what


def test_a_folder_that_cannot_be_written_is_told_and_one_to_come_is_judged_by_its_parent(tmp_path: Path) -> None:
    assert doctor.check_folder(tmp_path / "a" / "b").ok
    assert list(tmp_path.iterdir()) == []
    finding = doctor.check_folder(Path("/proc/1"))
    assert not finding.ok
    assert "cannot write there" in finding.what


def test_a_folder_below_a_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    finding = doctor.check_folder(tmp_path / "file" / "runs")
    assert (finding.ok, finding.what) == (False, f"{tmp_path / 'file'}: a file, no folder")


def test_a_held_sqlite_store_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_ANSWER_SECONDS", 0.1)
    path = tmp_path / "mlflow.db"
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("CREATE TABLE runs (id)")
    assert doctor.check_tracking(f"sqlite:///{path}").ok
    holder.execute("BEGIN IMMEDIATE")
    finding = doctor.check_tracking(f"sqlite:///{path}")
    holder.close()
    assert not finding.ok
    assert "locked" in finding.what


class _Server(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        known = self.headers.get("Authorization") == basic_authorization("someone", "secret")
        allowed = self.path == "/open/version" or known
        self.send_response(200 if allowed else 401)
        self.end_headers()
        self.wfile.write(b"3.17.0" if allowed else b"")

    def log_message(self, format: str, *values: object) -> None:
        """Quiet."""


def test_a_tracking_server_is_asked_and_passwords_are_never_shown() -> None:
    with HTTPServer(("127.0.0.1", 0), _Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"127.0.0.1:{server.server_port}"
        good = doctor.check_tracking(f"http://{address}/open")
        refused = doctor.check_tracking(f"http://{address}/closed")
        known = doctor.check_tracking(f"http://someone:secret@{address}/closed")
        also_known = doctor.check_tracking(f"http://{address}/closed", basic_authorization("someone", "secret"))
        server.shutdown()
    assert known == also_known
    assert (known.ok, known.what) == (True, f"http://{address}/closed answers, version 3.17.0")
    without_port = doctor.check_tracking("http://someone:secret@host.invalid")
    assert "secret" not in without_port.what + without_port.fix
    silent = doctor.check_tracking(f"http://someone:secret@{address}")
    assert (good.ok, good.what) == (True, f"http://{address}/open answers, version 3.17.0")
    assert (refused.ok, refused.what) == (False, f"http://{address}/closed answers 401")
    assert not silent.ok
    assert not silent.needed
    assert "secret" not in silent.what + silent.fix


def test_a_taken_port_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        finding = doctor.check_ports({"MLflow": port})
    assert (finding.ok, finding.what) == (False, f"taken: {port} (MLflow)")


def test_a_port_that_other_machines_can_reach_is_listed_and_one_on_the_loopback_is_not() -> None:
    with socket.create_server(("127.0.0.1", 0)) as inside, socket.create_server(("0.0.0.0", 0)) as outside:
        what = doctor.check_listening().what
        ports = what.replace(",", "").replace(";", "").split()
        assert what.startswith("to other machines: ")
        assert str(outside.getsockname()[1]) in ports
        assert str(inside.getsockname()[1]) not in ports


@pytest.mark.parametrize(
    ("host", "is_inside"), [("::ffff:127.0.0.1", True), ("::1", True), ("::ffff:0.0.0.0", False), ("::", False)]
)
def test_an_ipv6_socket_on_the_loopback_is_no_port_for_other_machines(host: str, is_inside: bool) -> None:
    try:
        server = socket.create_server((host, 0), family=socket.AF_INET6, dualstack_ipv6="ffff" in host)
    except OSError as error:
        pytest.skip(f"no IPv6 here: {error}")
    with server:
        ports = doctor.check_listening().what.replace(",", "").replace(";", "").split()
        assert (str(server.getsockname()[1]) not in ports) == is_inside


def test_a_cluster_without_a_token_is_warned_of() -> None:
    assert doctor.check_ray("token").ok
    assert "RAY_AUTH_MODE=token" in doctor.check_ray(None).fix


def test_the_command_reports_and_ends_with_4_when_something_needed_is_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def checks(ok: bool) -> dict[str, object]:
        one = Finding(name="memory", ok=ok, what="1.0 GiB usable", fix="give it more")
        other = Finding(name="gpu", ok=False, what="none", fix="use one", needed=False)
        return {"memory": lambda: one, "gpu": lambda: other}

    module = sys.modules["ray_jobs.doctor"]
    monkeypatch.setattr(module, "all_checks", lambda *_, **__: checks(ok=True))
    done = CliRunner().invoke(app, ["doctor", "--json"])
    assert done.exit_code == 0
    assert [one["name"] for one in json.loads(done.stdout)["checks"]] == ["memory", "gpu"]
    monkeypatch.setattr(module, "all_checks", lambda *_, **__: checks(ok=False))
    broken = CliRunner().invoke(app, ["doctor"])
    assert isinstance(broken.exception, EnvironmentFault)
    assert broken.exception.exit_code == 4
    assert "NOT OK   memory" in broken.stdout
    assert "fix: give it more" in broken.stdout
    assert "optional gpu" in broken.stdout
