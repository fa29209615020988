"""Which failure a run is told to have ended by, and whether starting it again can help."""

import signal
from dataclasses import replace
from pathlib import Path

import pytest

from ca2st.durable import InjectedFault
from ca2st.errors import CA2STError, DataDamageError, EnvironmentFault, NumericError, UserInputError
from ca2st.training.errors import (
    CheckpointDamagedError,
    LabelRangeError,
    NonFiniteError,
    OutOfMemoryFault,
    PeerFailedError,
    StopNotSavedError,
)
from ray_jobs.runs.failures import (
    FAILURE_NAME,
    FailureRecord,
    error_of,
    first_of,
    forget_failure,
    is_echo,
    is_final,
    keep_failure,
    read_failure,
    record_of,
)

RECORD = FailureRecord(
    kind="RuntimeError", message="boom", exit_code=1, rank=1, node="b", attempt=1, final=False, launch="one"
)
ECHO = replace(RECORD, kind="PeerFailedError", rank=0, echo=True)


@pytest.mark.parametrize("error", [LabelRangeError("x"), CheckpointDamagedError("x"), NonFiniteError("x")])
def test_t4_what_no_restart_mends_is_final(error: Exception) -> None:
    assert is_final(error)


@pytest.mark.parametrize("error", [InjectedFault("x"), EnvironmentFault("x"), OSError("x"), CA2STError("x")])
def test_t4_what_a_restart_may_mend_is_not_final(error: Exception) -> None:
    assert not is_final(error)


@pytest.mark.parametrize(("number", "final"), [(signal.SIGINT, True), (signal.SIGTERM, True), (signal.SIGHUP, False)])
def test_t14_a_stop_that_could_not_save_is_final_unless_it_was_a_node_that_is_taken_away(
    number: int, final: bool
) -> None:
    record = record_of(StopNotSavedError("x", signal_number=number), rank=0, node="a", attempt=1)
    assert (record.final, record.exit_code) == (final, 4)


@pytest.mark.parametrize(("code", "final"), [(1, False), (2, True), (3, True), (4, False), (5, True), (6, False)])
def test_t4_a_failure_told_by_another_rank_is_as_final_as_it_is_there(code: int, final: bool) -> None:
    assert is_final(PeerFailedError("rank 1 failed", exit_code=code)) == final


def test_t12_memory_that_did_not_suffice_is_final_at_its_second_time_in_a_launch() -> None:
    error = OutOfMemoryFault("peak 80 GB")
    first = record_of(error, rank=0, node="a", attempt=1, launch="one")
    assert not first.final
    assert record_of(error, rank=0, node="a", attempt=2, launch="one", before=first).final
    assert not record_of(error, rank=1, node="a", attempt=1, launch="one", before=first).final, "one time, two ranks"
    assert not record_of(error, rank=0, node="a", attempt=2, launch="two", before=first).final
    assert not record_of(error, rank=0, node="a", attempt=2, launch="one", before=RECORD).final


@pytest.mark.parametrize(
    "words",
    [
        "[gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.0.0.2]:4711",
        "[../third_party/gloo/gloo/transport/tcp/pair.cc:553] Read error [10.0.0.2]:4711: Connection reset by peer",
        "[../third_party/gloo/gloo/transport/tcp/buffer.cc:72] Application timeout caused pair closure",
        "[../third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 600000ms for recv operation",
        "NCCL error in: NCCLUtils.hpp, remote process exited or there was a network error, NCCL version 2.27",
        "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely.",
        "NCCL communicator was aborted on rank 0.",
        "[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7)",
        "socketProgress: Connection closed by remote peer node-1<4711>",
        "[../torch/csrc/distributed/c10d/socket.cpp] failed to recv, got 0 bytes. Connection was likely closed.",
    ],
)
def test_t4_an_error_of_a_cut_connection_is_an_echo(words: str) -> None:
    assert is_echo(RuntimeError(words))


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("shape mismatch"),
        RuntimeError(
            "NCCL error in: ncclUnhandledCudaError: Call to CUDA function failed. Last error: invalid argument"
        ),
        RuntimeError("ncclInvalidUsage: Duplicate GPU detected : rank 0 and rank 1 both on CUDA device 1b000"),
        RuntimeError("NCCL is not available"),
        RuntimeError("makeDeviceForInterface(): unsupported gloo device"),
        RuntimeError("s3: Connection reset by peer"),
        OSError("[gloo] Connection closed by peer"),
    ],
)
def test_t4_another_error_is_a_ranks_own_also_when_it_is_of_nccl_or_gloo(error: Exception) -> None:
    assert not is_echo(error)


def test_t4_what_another_rank_told_is_an_echo() -> None:
    assert is_echo(PeerFailedError("rank 1 failed", exit_code=2))


def test_t4_an_echo_never_replaces_the_failure_itself_and_is_replaced_by_it(tmp_path: Path) -> None:
    assert keep_failure(tmp_path, ECHO) == ECHO
    assert keep_failure(tmp_path, RECORD) == RECORD
    assert keep_failure(tmp_path, ECHO) == RECORD
    assert keep_failure(tmp_path, replace(RECORD, rank=2)) == RECORD
    assert read_failure(tmp_path) == RECORD


def test_t13_the_last_attempts_failure_is_kept() -> None:
    later = replace(RECORD, attempt=2, message="later")
    assert first_of(RECORD, later) is later
    assert first_of(later, RECORD) is later
    rerun = replace(RECORD, launch="two")
    assert first_of(later, rerun) is rerun


def test_a_failure_that_cannot_be_written_is_told_in_the_log_and_not_lost(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert keep_failure(tmp_path / "gone", RECORD) == RECORD
    assert "boom" in caplog.text


def test_a_record_of_another_version_counts_as_none(tmp_path: Path) -> None:
    (tmp_path / FAILURE_NAME).write_text('{"what": "else"}')
    assert read_failure(tmp_path) is None
    assert keep_failure(tmp_path, RECORD) == RECORD


@pytest.mark.parametrize("kind", [UserInputError, DataDamageError, EnvironmentFault, NumericError, CA2STError])
def test_t4_a_command_ends_with_the_exit_code_of_the_failure_and_says_rank_and_node(kind: type[CA2STError]) -> None:
    error = kind("label 7 of clip-0001")
    error.add_note("on rank 1")
    ended = error_of(record_of(error, rank=1, node="b (10.0.0.2)", attempt=2))
    assert type(ended) is kind
    assert ended.exit_code == kind.exit_code
    told = f"rank 1 on b (10.0.0.2), attempt 2: {kind.__name__}: label 7 of clip-0001 [on rank 1]"
    assert str(ended) == told


def test_a_run_that_ends_well_after_all_leaves_no_failure_on_record(tmp_path: Path) -> None:
    keep_failure(tmp_path, RECORD)
    forget_failure(tmp_path)
    assert read_failure(tmp_path) is None
    forget_failure(tmp_path)
