"""A store that is away, silent or unwilling costs the training nothing, and nothing is lost."""

import contextlib
import fcntl
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from mlflow.exceptions import MlflowException

from ca2st.training.journal import JOURNAL_NAME, run_sequence
from ray_jobs.errors import TrackingUnavailableError
from ray_jobs.tracking import following
from ray_jobs.tracking.client import (
    Complaint,
    StoreError,
    TroubleLog,
    anchored,
    complaint_of_error,
    complaint_of_status,
    connected,
    is_making_tables,
    pause_seconds,
)
from ray_jobs.tracking.following import at_work, finish_following
from ray_jobs.tracking.sender import Sender, sync
from ray_jobs.tracking.state import (
    Progress,
    alive,
    is_alive,
    is_ready,
    read_state,
    show_ready,
    unsent_bytes,
    write_progress,
)
from support.fake_mlflow import FakeMlflow, served
from support.tracked_runs import losses, remote_run, start, step, tracked_run, write

AWAY = "http://127.0.0.1:9"


def test_k1_a_server_away_at_the_start_in_the_middle_and_at_the_end_gets_everything_when_it_is_back(
    tmp_path: Path, fake: FakeMlflow
) -> None:
    run_dir = remote_run(tmp_path / "runs" / "mine", fake.uri)
    follower = Sender(run_dir, print)
    with pytest.raises(TrackingUnavailableError, match=r"cannot be reached.*Connection refused.*ca2st track sync"):
        follower.send()
    with served(fake):
        follower.send()
    write(run_dir, step(2, 2.0))
    with pytest.raises(TrackingUnavailableError, match="cannot be reached"):
        follower.send()
    write(run_dir, step(3, 1.0))
    assert unsent_bytes(run_dir) > 0
    with served(fake):
        sync(run_dir)
    assert fake.losses() == [(1, 3.0), (2, 2.0), (3, 1.0)]
    assert len(fake.runs) == 1
    assert unsent_bytes(run_dir) == 0


def test_a_follower_with_nothing_to_send_asks_the_server_nothing(tmp_path: Path, fake: FakeMlflow) -> None:
    run_dir = remote_run(tmp_path / "runs" / "mine", fake.uri)
    follower = Sender(run_dir, print)
    with served(fake):
        follower.send()
        asked = fake.num_requests
        follower.send(is_last=False)
        assert fake.num_requests == asked
        write(run_dir, step(2, 2.0))
        follower.send(is_last=False)
    assert fake.num_requests > asked


def test_k1_an_unreachable_file_costs_nothing_and_gets_everything_later(tmp_path: Path, store: str) -> None:
    blocked = tmp_path / "blocked"
    blocked.write_text("a file where the store's folder should be")
    run_dir = tracked_run(tmp_path / "run", f"sqlite:///{blocked}/mlflow.db", experiment=tmp_path.name)
    write(run_dir, step(1, 3.0))
    with pytest.raises(TrackingUnavailableError, match="ca2st track sync"):
        sync(run_dir)
    tracked_run(run_dir, store)
    assert sync(run_dir) > 0
    assert losses(run_dir) == [(1, 3.0)]


@pytest.mark.parametrize("uri", ["sqlite:////runs/mlflow.db?timeout=5", "http://host:5000/a", "postgresql://db/mlflow"])
def test_an_address_that_is_the_same_from_everywhere_stays_as_it_is(uri: str) -> None:
    assert anchored(uri) == uri


def test_an_sqlite_file_named_from_here_is_found_from_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for written in ("runs/mlflow.db", "./runs/mlflow.db", "runs//mlflow.db"):
        assert anchored(f"sqlite:///{written}?timeout=5") == f"sqlite:///{tmp_path}/runs/mlflow.db?timeout=5"


def test_k1_a_damaged_store_is_told_and_gets_everything_once_it_is_restored(tmp_path: Path, store: str) -> None:
    damaged = tmp_path / "mlflow.db"
    damaged.write_bytes(b"SQLite format 3\0" + bytes(200))
    run_dir = tracked_run(tmp_path / "run", f"sqlite:///{damaged}", experiment=tmp_path.name)
    write(run_dir, step(1, 3.0))
    with pytest.raises(StoreError, match=r"fails \(.*file is not a database\).*ca2st track sync") as caught:
        sync(run_dir)
    assert caught.value.complaint.kind == "failing"
    tracked_run(run_dir, store)
    sync(run_dir)
    assert losses(run_dir) == [(1, 3.0)]


def test_k1_an_sqlite_file_that_cannot_be_opened_is_told_at_once(tmp_path: Path, store: str) -> None:
    (tmp_path / "mlflow.db").mkdir()
    run_dir = tracked_run(tmp_path / "run", f"sqlite:///{tmp_path}/mlflow.db", experiment=tmp_path.name)
    write(run_dir, step(1, 3.0))
    begin = time.monotonic()
    with pytest.raises(StoreError, match=r"unable to open database file: it is a folder.*ca2st track sync"):
        sync(run_dir)
    assert time.monotonic() - begin < 30  # MLflow tries for a hundred seconds
    tracked_run(run_dir, store)
    sync(run_dir)
    assert losses(run_dir) == [(1, 3.0)]


def test_a_store_that_is_locked_for_a_moment_is_waited_for(store: str, run_dir: Path) -> None:
    write(run_dir, start(), step(1, 3.0))
    with contextlib.closing(sqlite3.connect(store.removeprefix("sqlite:///"), check_same_thread=False)) as other:
        other.execute("BEGIN EXCLUSIVE")
        letting_go = threading.Timer(0.5, other.rollback)
        letting_go.start()
        sync(run_dir)
        letting_go.join()
    assert losses(run_dir) == [(1, 3.0)]


def test_k1_a_follower_that_hangs_at_the_end_is_ended_and_the_person_told_what_to_do(
    tmp_path: Path, fake: FakeMlflow, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = remote_run(tmp_path / "runs" / "mine", fake.uri)
    monkeypatch.setattr(following, "_SILENT_SECONDS", 0.3)
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(600)"
    hanging = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert hanging.stdout is not None
    with hanging.stdout as ready:
        ready.readline()
        (run_dir / "follower.lock").write_text(str(hanging.pid))
        an_hour_ahead = time.time() + 3600  # the clock of the folder's server
        os.utime(run_dir / "follower.lock", (an_hour_ahead, an_hour_ahead))
        finish_following(run_dir, hanging)
    assert hanging.returncode == -signal.SIGKILL
    assert f"bytes of the journal of this run; send it by `ca2st track sync {run_dir}`" in capsys.readouterr().err


def test_k1_ten_seconds_are_given_to_a_store_that_is_silent_and_more_to_one_that_works(tmp_path: Path) -> None:
    run_dir = remote_run(tmp_path / "runs" / "mine", f"sqlite:///{tmp_path}/mlflow.db")
    assert at_work(run_dir, os.getpid())[0] > 30  # it is starting
    with alive(run_dir):
        show_ready(run_dir)
    assert at_work(run_dir, os.getpid())[0] == 10
    with (tmp_path / ".mlflow.db.lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert at_work(run_dir, os.getpid())[0] > 30  # it makes tables
    assert at_work(run_dir, os.getpid())[0] == 10
    write_progress(run_dir, Progress(sent_bytes=(run_dir / JOURNAL_NAME).stat().st_size))
    assert at_work(run_dir, os.getpid())[0] > 30  # it sends files


@pytest.mark.parametrize(
    ("pending", "lacking"),
    [((), ""), (("inputs", "artefacts"), "warning: MLflow lacks inputs, artefacts of this run; send it by `ca2st")],
)
def test_what_of_a_sent_run_mlflow_lacks_at_its_end_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], pending: tuple[str, ...], lacking: str
) -> None:
    run_dir = remote_run(tmp_path / "runs" / "mine", f"sqlite:///{tmp_path}/mlflow.db")
    write_progress(run_dir, Progress(sent_bytes=(run_dir / JOURNAL_NAME).stat().st_size, pending=pending))
    with subprocess.Popen([sys.executable, "-c", ""]) as over:
        over.wait()
        finish_following(run_dir, over)
    told = capsys.readouterr().err
    assert lacking in told
    assert bool(told) == bool(lacking)


def test_a_follower_that_is_still_starting_is_told_from_one_that_waits_for_the_store(tmp_path: Path) -> None:
    assert not is_ready(tmp_path, os.getpid())
    with alive(tmp_path):
        assert not is_ready(tmp_path, os.getpid())
        show_ready(tmp_path)
        assert is_alive(tmp_path)
    assert is_ready(tmp_path, os.getpid())
    assert not is_ready(tmp_path, os.getpid() + 1)


def test_a_store_whose_tables_are_being_made_is_told_from_one_that_is_stuck(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    assert not is_making_tables(uri)
    with (tmp_path / ".mlflow.db.lock").open("a") as file:
        assert not is_making_tables(uri)
        fcntl.flock(file, fcntl.LOCK_EX)
        assert is_making_tables(uri)
        (tmp_path / "mlflow.db").touch()
        assert not is_making_tables(uri)
    assert not is_making_tables("http://127.0.0.1:1")


@pytest.mark.parametrize(
    ("status", "kind", "match"),
    [
        (500, "failing", r"fails \(500\).*when it is back"),
        (503, "failing", r"fails \(503\)"),
        (401, "refused", r"refuses the credentials \(401\); set MLFLOW_TRACKING_USERNAME"),
        (403, "refused", r"refuses the credentials \(403\)"),
        (429, "busy", r"asks to wait \(429\)"),
    ],
)
def test_k2_every_refusal_of_a_server_is_told_for_what_it_is(
    tmp_path: Path, fake: FakeMlflow, status: int, kind: str, match: str
) -> None:
    run_dir = remote_run(tmp_path / "runs" / "mine", fake.uri)
    fake.status = status
    with served(fake):
        with pytest.raises(StoreError, match=match) as caught:
            sync(run_dir)
        assert caught.value.complaint.kind == kind
        assert unsent_bytes(run_dir) > 0
        fake.status = None
        sync(run_dir)
    assert fake.losses() == [(1, 3.0)]


def test_k2_a_server_that_accepts_and_never_answers_is_given_up(tmp_path: Path, fake: FakeMlflow) -> None:
    run_dir = remote_run(tmp_path / "runs" / "mine", fake.uri)
    fake.is_silent = True
    follower = Sender(run_dir, print)
    with served(fake):
        with pytest.raises(StoreError, match="does not answer") as caught:
            follower.send()
        assert caught.value.complaint.kind == "silent"
        asked = fake.num_requests
        with pytest.raises(StoreError, match="does not answer"):
            follower.send()
        assert fake.num_requests == asked + 1  # one small question, not a batch
    assert [line["loss"] for line in run_sequence(run_dir / JOURNAL_NAME)] == [3.0]


def test_k2_a_database_that_stays_locked_is_told_once_by_its_name() -> None:
    def refused() -> None:
        locked = sqlite3.OperationalError("database is locked")
        raise MlflowException(f"({type(locked).__name__}) {locked}\n[SQL: INSERT INTO metrics ...]") from locked

    with pytest.raises(StoreError, match="is locked by another program") as caught, connected(AWAY, "wait"):
        refused()
    assert caught.value.complaint.kind == "locked"


def test_k2_a_server_that_asks_to_be_left_alone_is_left_alone_for_as_long(fake: FakeMlflow) -> None:
    fake.status, fake.headers = 429, {"Retry-After": "120"}
    with (
        served(fake),
        pytest.raises(StoreError, match="429, for 120 s") as caught,
        connected(fake.uri, "wait", ask_first=True),
    ):
        pass
    assert pause_seconds(1, caught.value.complaint, interval_seconds=2.0) == 120
    endless = complaint_of_status(429, retry_after="999999")
    assert pause_seconds(1, endless, interval_seconds=2.0) == 600
    dated = complaint_of_status(429, retry_after="Wed, 21 Oct 2015 07:28:00 GMT")
    assert dated.retry_after_seconds is None
    assert complaint_of_status(429, retry_after="3²").retry_after_seconds is None  # float() reads no ²


def test_k2_settings_of_the_environment_that_mlflow_refuses_are_a_trouble_with_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_INSECURE_TLS", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_SERVER_CERT_PATH", "/no/certificate.pem")
    sender = Sender(remote_run(tmp_path / "runs" / "mine", AWAY), print)
    for _ in range(2):  # the second time the server is asked first
        with pytest.raises(StoreError, match=r"rejects what is sent.*MLFLOW_TRACKING_INSECURE_TLS"):
            sender.send()


def test_k2_pauses_double_up_to_a_minute_and_end_with_the_trouble() -> None:
    unreachable = Complaint(kind="unreachable", detail="")
    pauses = [pause_seconds(n, unreachable, interval_seconds=2.0) for n in (1, 2, 3, 4, 5, 6, 1000)]
    assert pauses == [4, 8, 16, 32, 60, 60, 60]
    assert pause_seconds(1, complaint_of_status(401), interval_seconds=2.0) == 60


def test_k2_a_trouble_is_told_once_with_its_count_when_it_changes_or_ends() -> None:
    told: list[str] = []
    log = TroubleLog(say=told.append)
    for port in (1, 2, 3):
        error = OSError(f"connection {port} refused")
        log.failed(StoreError(f"away {port}", complaint_of_error(error)))
    log.failed(StoreError("no entry", complaint_of_status(401)))
    log.succeeded()
    log.succeeded()
    assert told == ["away 1", "(the same 2 times more)", "no entry", "MLflow answers again, after 4 tries in vain"]
    log.failed(StoreError("away again", complaint_of_error(OSError("gone"))))
    assert told[-1] == "away again"


def test_k8_an_error_of_a_store_never_shows_its_password() -> None:
    uri = "http://me:hunter2@127.0.0.1:9"
    with pytest.raises(StoreError) as caught, connected(uri, "wait"):
        raise MlflowException(f"API request to {uri}/api failed with exception no route to {uri}")
    assert "hunter2" not in str(caught.value)
    assert "http://[hidden]@127.0.0.1:9" in str(caught.value)


def test_the_run_of_a_making_whose_answer_was_lost_is_found_again(run_dir: Path) -> None:
    write(run_dir, start(), step(1, 3.0))
    sync(run_dir)
    first = read_state(run_dir).run_id
    (run_dir / "tracking_progress.json").unlink()
    sync(run_dir)
    assert read_state(run_dir).run_id == first
    assert losses(run_dir) == [(1, 3.0)]
