"""What ``ca2st submit`` sends to a cluster, to which server, and what it refuses."""

import json
import re
import shlex
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import grpc
import pytest
from typer.testing import CliRunner

from ca2st.errors import EnvironmentFault, UserInputError
from ray_jobs import environment
from ray_jobs.cli import app
from ray_jobs.cluster import submission as requests_of_jobs
from ray_jobs.cluster.job_server import JobFailedError, connect
from ray_jobs.cluster.ray_access import RayAccess
from ray_jobs.cluster.submission import Choices, prepared
from ray_jobs.config.recipe_file import load_recipe
from ray_jobs.errors import RecipeError
from support.fake_jobs import FakeDetails, FakeJobs, details
from support.tiny_runs import RECIPE

KNOWN = RayAccess(token="known", mode="token")


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(RECIPE.format(root="/shared"))
    return path


def test_the_job_trains_as_the_command_would(recipe: Path) -> None:
    settings = ("launch.workers=2", "training.epochs=8", "name=it's mine")
    job = prepared(
        Choices(
            recipe=str(recipe),
            overrides=settings,
            out=Path("/shared/runs/first"),
            variables={"CA2ST_FAULT": "none"},
            package=False,
            python="/opt/venv/bin/python",
        )
    )
    assert shlex.split(job.entrypoint) == [
        *("exec", "/opt/venv/bin/python", "-m", "ray_jobs.cli", "train", "submitted_recipe/tiny.toml"),
        *("--set", "launch.workers=2", "--set", "training.epochs=8", "--set", "name=it's mine"),
        *("--ray", "--ray-address", "auto", "--out", "/shared/runs/first"),
    ]
    assert job.submission_id.startswith("ca2st-it-s-mine-20")
    assert job.submission_id != job.again().submission_id
    assert job.env_vars["CA2ST_FAULT"] == "none"
    assert int(job.env_vars["RAY_JOB_STOP_WAIT_TIME_S"]) > load_recipe(str(recipe)).training.grace_seconds
    assert (job.recipe_text, job.modules) == (recipe.read_text(), ())


def test_variables_are_passed_by_name_over_our_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHOSEN", "secret")
    assert environment.passed_variables(["CHOSEN"]) == {"CHOSEN": "secret"}
    with pytest.raises(UserInputError, match="--env CHOSEN: expected a name alone") as refusal:
        environment.passed_variables(["CHOSEN=secret"])
    assert "secret" not in str(refusal.value)
    monkeypatch.delenv("CHOSEN")
    with pytest.raises(UserInputError, match="--env CHOSEN: expected a variable of this environment, found none"):
        environment.passed_variables(["CHOSEN"])
    made = requests_of_jobs.environment_of_job(
        {"OMP_WAIT_POLICY": "ACTIVE"},
        waiting="PASSIVE",
        tracking_uri="http://me:pass@server:5000",
        grace_seconds=20.5,
        git={},
    )
    assert made["OMP_WAIT_POLICY"] == "ACTIVE"
    assert made["MLFLOW_TRACKING_URI"] == "http://server:5000"
    assert made["RAY_JOB_STOP_WAIT_TIME_S"] == "50"


@pytest.mark.parametrize("uri", [None, "sqlite:////home/me/mlflow.db", "file:///home/me/mlruns", "mlruns"])
def test_a_tracking_file_of_this_machine_is_not_the_clusters(uri: str | None) -> None:
    made = requests_of_jobs.environment_of_job({}, waiting="PASSIVE", tracking_uri=uri, grace_seconds=1, git={})
    assert "MLFLOW_TRACKING_URI" not in made


def choices(recipe: Path, *overrides: str, out: str | None = "/shared/run") -> Choices:
    return Choices(
        recipe=str(recipe), overrides=overrides, out=None if out is None else Path(out), variables={}, package=False
    )


def test_j1_a_wrong_recipe_is_refused_before_anything_is_sent(recipe: Path) -> None:
    with pytest.raises(RecipeError, match=r"training\.epoch"):
        prepared(choices(recipe, "training.epoch=3"))
    with pytest.raises(UserInputError, match="no such file, nor a recipe of the package"):
        prepared(choices(recipe.with_name("none.toml")))


@pytest.mark.parametrize("out", [None, "runs/first"])
def test_j4_a_run_folder_that_the_job_would_lose_is_refused(recipe: Path, out: str | None) -> None:
    with pytest.raises(UserInputError, match=r"run folder runs/\w+: expected an absolute path on storage.*--out"):
        prepared(choices(recipe, out=out))
    job = prepared(choices(recipe, "launch.runs_folder='/shared/runs'", out=None))
    assert job.run_dir == "/shared/runs/tiny"


def test_j2_places_that_only_this_machine_knows_are_refused_all_at_once(recipe: Path) -> None:
    with pytest.raises(UserInputError) as refusal:
        prepared(choices(recipe, "data.train=shards/train", "experts.audio=audio.safetensors"))
    assert [line.partition(":")[0] for line in str(refusal.value).splitlines()] == ["data.train", "experts.audio"]
    prepared(choices(recipe, "data.train=s3://bucket/train", "experts.audio=/shared/audio.safetensors"))


@pytest.mark.parametrize(
    "uri", ["https://me:hidden@server", "postgresql://hidden@server/mlflow", "https://server/api?token=hidden"]
)
def test_k8_a_user_password_or_token_in_an_override_is_refused_and_not_repeated(recipe: Path, uri: str) -> None:
    with pytest.raises(UserInputError, match=r"--set tracking\.uri: expected no user or password") as refusal:
        prepared(choices(recipe, f"tracking.uri='{uri}'"))
    assert "hidden" not in str(refusal.value)


@contextmanager
def job_server(*, open_to_all: bool, elsewhere: int = 200) -> Iterator[str]:
    """A job server's answers: to everybody (`elsewhere`), or 401 without a token and 403 with another one."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            code = elsewhere if open_to_all else 403 if "authorization" in self.headers else 401
            body = b'{"ray_version": "2.60.0", "version": "4"}'
            self.send_response(code)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = HTTPServer(("127.0.0.1", 0), Answer)
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def token_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # this process's Ray stays as it is


@pytest.mark.usefixtures("token_mode")
def test_no_job_is_sent_to_an_open_cluster_unless_it_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    with job_server(open_to_all=True) as address:
        with pytest.raises(UserInputError, match=r"takes jobs from anybody; .*--i-accept-open-ray"):
            connect(address, access=KNOWN)
        accepted = RayAccess(accept_open=True)
        assert connect(address, access=accepted).get_address() == address
        monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:1")
        with pytest.raises(EnvironmentFault, match="no answer"):
            connect(address, access=accepted)
        with job_server(open_to_all=True) as other:
            monkeypatch.setenv("RAY_ADDRESS", other)
            with pytest.raises(UserInputError, match=f"RAY_ADDRESS would send the job to {other}"):
                connect(address, access=accepted)


@pytest.mark.usefixtures("token_mode")
def test_a_cluster_that_refuses_our_token_is_told() -> None:
    with job_server(open_to_all=False) as address, pytest.raises(UserInputError, match="refuses our token"):
        connect(address, access=KNOWN)


@pytest.mark.parametrize(
    "address", ["auto", "head:8265", "ray://head:10001", "http://", "http://head:99999", "http://[head"]
)
def test_an_address_that_is_no_job_server_is_refused(address: str) -> None:
    with pytest.raises(UserInputError, match="expected the address of the cluster's dashboard"):
        connect(address, access=KNOWN)


def test_no_job_goes_out_without_a_token() -> None:
    with pytest.raises(UserInputError, match="expected a cluster's token, found no token"):
        connect("http://head:8265", access=RayAccess())


@pytest.mark.usefixtures("token_mode")
def test_a_web_server_that_is_no_dashboard_is_refused() -> None:
    with job_server(open_to_all=True, elsewhere=404) as address:
        with pytest.raises(UserInputError, match=r"expected the cluster's dashboard, found a web server.* 404.*8265"):
            connect(address, access=KNOWN)


def test_the_clusters_own_port_is_no_dashboard() -> None:
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    begin = time.monotonic()
    try:
        told = r"expected the cluster's dashboard, found another of its ports; .*6379.*8265"
        with pytest.raises(UserInputError, match=told):
            connect(f"http://127.0.0.1:{port}", access=KNOWN)
        assert time.monotonic() - begin < 5
    finally:
        server.stop(None)


def test_a_server_that_never_answers_is_told_within_five_seconds() -> None:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(8)
        begin = time.monotonic()
        with pytest.raises(EnvironmentFault, match="no answer"):
            connect(f"http://127.0.0.1:{listening.getsockname()[1]}", access=KNOWN)
        assert time.monotonic() - begin < 5


def test_a_server_that_is_not_there_is_told() -> None:
    with pytest.raises(EnvironmentFault, match=r"Ray at http://127\.0\.0\.1:1: no answer"):
        connect("http://127.0.0.1:1", access=KNOWN)


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> FakeJobs:
    """The cluster that the command finds."""
    cluster = FakeJobs()
    monkeypatch.setattr("ray_jobs.cluster.job_server.connect", lambda *_, **__: cluster)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "hidden")
    return cluster


def submitted(recipe: Path, *options: str) -> Any:
    words = ("submit", str(recipe), "--address", "http://head:8265", "--no-package", "--out", "/shared/run", *options)
    return CliRunner().invoke(app, words)


def test_a_job_is_left_to_itself_when_asked(recipe: Path, jobs: FakeJobs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHOSEN", "concealed")
    done = submitted(recipe, "--no-wait", "--json", "--env", "CHOSEN", "--workers", "2")
    assert done.exit_code == 0, done.output
    (sent,) = jobs.sent
    assert json.loads(done.stdout) == {
        "job_id": sent["submission_id"],
        "address": "http://head:8265",
        "run_dir": "/shared/run",
    }
    assert f"ray job logs --follow --address http://head:8265 {sent['submission_id']}" in done.stderr
    assert sent["runtime_env"]["env_vars"]["CHOSEN"] == "concealed"
    assert "launch.workers=2" in sent["entrypoint"]
    assert "concealed" not in done.output + sent["entrypoint"] + str(sent["metadata"])
    assert "hidden" not in done.output + str(sent)


def test_j7_a_dry_run_prints_what_would_be_sent_and_asks_the_cluster_nothing(
    recipe: Path, jobs: FakeJobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHOSEN", "concealed")
    monkeypatch.setattr("ray_jobs.cluster.job_server.connect", lambda *_, **__: pytest.fail("asked"))
    done = submitted(recipe, "--dry-run", "--json", "--env", "CHOSEN", "--workers", "2")
    assert done.exit_code == 0, done.output
    plan = json.loads(done.stdout)
    assert plan["run_dir"] == "/shared/run"
    assert "launch.workers=2" in plan["entrypoint"]
    assert {"CHOSEN", "OMP_WAIT_POLICY"} <= set(plan["variables"])
    assert plan["archive_bytes"] > 0
    assert "concealed" not in done.output
    assert jobs.sent == []


def test_the_log_is_shown_and_the_drivers_exit_code_is_the_commands(recipe: Path, jobs: FakeJobs) -> None:
    jobs.connections = [(["loss 0.1\n"], None)]
    jobs.answers = [details("FAILED", 3)]
    done = submitted(recipe, "--json")
    assert isinstance(done.exception, JobFailedError)
    assert done.exception.exit_code == json.loads(done.stdout)["exit_code"] == 3
    assert "loss 0.1\n" in done.stderr


def test_j6_ctrl_c_leaves_the_job_and_tells_how_to_stop_it(recipe: Path, jobs: FakeJobs) -> None:
    class Interrupted(FakeJobs):
        def get_job_info(self, job_id: str, /) -> FakeDetails:
            raise KeyboardInterrupt

    jobs.connections = [(["loss 0.1\n"], None)]
    jobs.__class__ = Interrupted
    done = submitted(recipe)
    assert done.exit_code == 130
    assert f"ray job stop --address http://head:8265 {jobs.sent[0]['submission_id']}" in done.stderr


def test_a_wheel_to_send_and_none_to_send_exclude_each_other(recipe: Path, jobs: FakeJobs) -> None:
    done = submitted(recipe, "--wheel", "ca2st-0.1.0-py3-none-any.whl")
    assert isinstance(done.exception, UserInputError)
    assert "expected one of the two, found both" in str(done.exception)
    assert not jobs.sent


def test_a_job_that_nobody_follows_cannot_be_sent_again(recipe: Path, jobs: FakeJobs) -> None:
    done = submitted(recipe, "--no-wait", "--resubmit", "2")
    assert isinstance(done.exception, UserInputError)
    assert "--resubmit and --no-wait" in str(done.exception)
    assert jobs.sent == []


def test_a_cluster_that_is_named_without_ray_is_not_passed_over(recipe: Path) -> None:
    done = CliRunner().invoke(app, ["train", str(recipe), "--ray-address", "head:6379"])
    assert isinstance(done.exception, UserInputError)
    assert "--ray-address head:6379: expected --ray beside it" in str(done.exception)
    done = CliRunner().invoke(app, ["train", str(recipe), "--i-accept-open-ray"])
    assert isinstance(done.exception, UserInputError)
    assert "--i-accept-open-ray: expected --ray beside it" in str(done.exception)


def test_a_certificate_authority_without_tls_is_not_passed_over(recipe: Path, jobs: FakeJobs) -> None:
    done = submitted(recipe, "--ca-file", "authority.pem")
    assert isinstance(done.exception, UserInputError)
    assert "--ca-file authority.pem: expected an https address beside it, found http://head:8265" in str(done.exception)
    assert jobs.sent == []


def test_ctrl_c_while_a_job_is_sent_tells_whether_it_was_taken(recipe: Path, jobs: FakeJobs) -> None:
    class Interrupted(FakeJobs):
        def submit_job(self, **request: Any) -> str:
            if self.answers:  # it was taken, and only the answer did not come
                super().submit_job(**request)
            raise KeyboardInterrupt

        def get_job_info(self, job_id: str, /) -> FakeDetails:
            if not self.answers:
                raise RuntimeError(f"Request failed with status code 404: Job {job_id} does not exist.")
            return super().get_job_info(job_id)

    jobs.__class__ = Interrupted
    for options in ((), ("--no-wait",)):
        done = submitted(recipe, *options)
        assert (done.exception.exit_code, str(done.exception)) == (130, "interrupted; nothing was submitted")
        assert "the job goes on" not in done.stderr
    jobs.answers = [details("RUNNING")]
    done = submitted(recipe, "--no-wait")
    assert done.exit_code == 130
    assert "the job goes on without this command" in done.stderr
    assert f"ray job stop --address http://head:8265 {jobs.sent[0]['submission_id']}" in done.stderr


def test_a_second_ctrl_c_does_not_claim_that_the_job_was_taken(recipe: Path, jobs: FakeJobs) -> None:
    class Impatient(FakeJobs):
        def submit_job(self, **request: Any) -> str:
            raise KeyboardInterrupt

        def get_job_info(self, job_id: str, /) -> FakeDetails:
            raise KeyboardInterrupt

    jobs.__class__ = Impatient
    done = submitted(recipe, "--no-wait")
    assert done.exception.exit_code == 130
    assert "was taken is not known (KeyboardInterrupt)" in str(done.exception)
    assert "the job goes on" not in done.stderr


def test_ctrl_c_while_a_job_is_sent_to_a_server_that_no_longer_answers_says_how_to_ask(
    recipe: Path, jobs: FakeJobs
) -> None:
    class Gone(FakeJobs):
        def submit_job(self, **request: Any) -> str:
            raise KeyboardInterrupt

        def get_job_info(self, job_id: str, /) -> FakeDetails:
            raise ConnectionError("no route to host")

    jobs.__class__ = Gone
    done = submitted(recipe)
    assert done.exception.exit_code == 130
    told = (
        r"interrupted; whether job (ca2st-\S+) was taken is not known \(no route to host\): ray job status --address "
    )
    found = re.fullmatch(told + r"http://head:8265 \1 tells", str(done.exception))
    assert found is not None
