"""Train in several processes of this machine that talk over the loopback interface."""

import multiprocessing
import multiprocessing.connection
import os
import resource
import shutil
import signal
import socket
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.process import BaseProcess
from pathlib import Path

from ca2st.durable import FaultPoints
from ray_jobs.console import say, show_log
from ray_jobs.errors import WorkerFailedError
from ray_jobs.running.failure_record import is_echo, keep_failure, read_failure, record_of
from ray_jobs.running.worker import Job, Outcome, read_outcome, run

_LAST_WORDS_SECONDS = 5.0
"""What the others get to end by themselves once a worker has failed: they may be stuck waiting for it for ever."""
_SAVING_SECONDS = 30.0
"""The same once one has ended because the run was asked to stop."""
_STOPPED = (128 + signal.SIGTERM, 128 + signal.SIGINT)


def run_processes(job: Job, num_workers: int, faults: FaultPoints) -> Outcome:
    """Train in `num_workers` processes of this machine; SIGINT and SIGTERM are passed on to them.

    When one fails the others are ended within seconds, and the first failure is what is told, with its rank.

    Raises:
        WorkerFailedError: a worker process failed, with its exit code.
    """
    launch, port = f"local-{os.getpid()}-{time.time_ns()}", _free_port()
    context = multiprocessing.get_context("spawn")
    workers: list[BaseProcess] = [
        context.Process(
            target=_worker_process, args=(rank, job, num_workers, port, faults, launch), name=f"rank {rank}"
        )
        for rank in range(num_workers)
    ]
    for worker in workers:
        worker.start()
    with _signals_to([worker.pid for worker in workers if worker.pid is not None]):
        failed = ended_badly(workers)
    if failed is not None:
        raise _failure(Path(job.run_dir), launch, rank=failed, exit_code=_exit_code(workers[failed]))
    return read_outcome(Path(job.run_dir))


def ended_badly(workers: Sequence[BaseProcess]) -> int | None:
    """Wait until all workers have ended; returns the rank that is to blame where not all ended well.

    Once one fails the others have seconds to end by themselves (longer after a request to stop: they save). A SIGTERM
    would not reach one that is stuck in an exchange, nor one that is stopped: what is left then is killed. To blame is
    who was ended by a signal, since that cuts the connections of the others, else who failed first.
    """
    running: dict[object, int] = {worker.sentinel: rank for rank, worker in enumerate(workers)}
    failed: list[int] = []
    deadline: float | None = None
    while running and (deadline is None or time.monotonic() < deadline):
        wait = None if deadline is None else max(0.0, deadline - time.monotonic())
        sentinels = [workers[rank].sentinel for rank in running.values()]
        for sentinel in multiprocessing.connection.wait(sentinels, wait):
            rank = running.pop(sentinel)
            workers[rank].join()
            if (code := _exit_code(workers[rank])) != 0:
                failed.append(rank)
                deadline = deadline or time.monotonic() + _last_words_seconds(code)
    for rank in running.values():
        workers[rank].kill()
        workers[rank].join()
    return min(failed, key=lambda rank: (not _is_signalled(workers[rank]), failed.index(rank)), default=None)


def _last_words_seconds(exit_code: int) -> float:
    return _SAVING_SECONDS if exit_code in _STOPPED else _LAST_WORDS_SECONDS


def _is_signalled(worker: BaseProcess) -> bool:
    return worker.exitcode is not None and worker.exitcode < 0


def _exit_code(worker: BaseProcess) -> int:
    """As a shell has it: 128 + n for signal n."""
    assert worker.exitcode is not None  # it has been joined
    return worker.exitcode if worker.exitcode >= 0 else 128 - worker.exitcode


def _failure(run_dir: Path, launch: str, *, rank: int, exit_code: int) -> WorkerFailedError:
    """What is told of a failed launch: that it was stopped, the failure that came first, or what a signal means."""
    if exit_code in _STOPPED:
        return WorkerFailedError(f"stopped by signal {exit_code - 128}; rerun to resume", exit_code)
    record = read_failure(run_dir)
    if record is not None and record.launch == launch and not record.echo:
        return WorkerFailedError(
            f"first failure, on rank {record.rank}: {record.kind}: {record.message}", record.exit_code
        )
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    return death_of(rank, exit_code, peak_bytes=peak, shared_free_bytes=_shared_memory_free())


def death_of(rank: int, exit_code: int, *, peak_bytes: int, shared_free_bytes: int) -> WorkerFailedError:
    """The error for a worker that ended without a word: what its exit code tells, and what to do.

    `peak_bytes`: the most that any worker held; `shared_free_bytes`: what is free in /dev/shm.
    """
    from ca2st.errors import EnvironmentFault
    from ca2st.training.memory import KNOBS, SHARED_MEMORY

    if exit_code == 128 + signal.SIGKILL:
        return WorkerFailedError(
            f"rank {rank} was killed (SIGKILL) and left no word: most likely by the kernel, for want of memory (look "
            f"with `dmesg | grep -i oom`, in a container at its memory limit); the largest worker held "
            f"{peak_bytes / 1e9:.2f} GB; {KNOBS}; rerun to resume",
            EnvironmentFault.exit_code,
        )
    if exit_code == 128 + signal.SIGBUS:
        return WorkerFailedError(
            f"rank {rank} ended by a bus error (SIGBUS): {SHARED_MEMORY} is full ({shared_free_bytes / 1e6:.0f} MB are "
            "free now; enlarge it, docker run --shm-size=8g), or a shard or weights file was cut short while it was "
            "read (`ca2st shard verify` tells); then rerun to resume",
            EnvironmentFault.exit_code,
        )
    return WorkerFailedError(f"rank {rank} ended with exit code {exit_code}", exit_code)


def _shared_memory_free() -> int:
    from ca2st.training.memory import SHARED_MEMORY

    try:
        return shutil.disk_usage(SHARED_MEMORY).free
    except OSError:
        return 0


def _worker_process(rank: int, job: Job, world_size: int, port: int, faults: FaultPoints, launch: str) -> None:
    from ca2st.errors import CA2STError
    from ca2st.training.errors import RunStoppedError

    die_with_parent()
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    if rank == 0:
        show_log()
    try:
        run(job, faults=faults.on_rank(rank))
    except RunStoppedError as error:
        _leave(rank, error, error.exit_code)
    except CA2STError as error:
        _record(rank, error, job, launch)
        _leave(rank, error, error.exit_code)
    except Exception as error:  # noqa: BLE001  # told with its stack, on record for the parent
        _record(rank, error, job, launch)
        if not is_echo(error):
            traceback.print_exc()
        _leave(rank, error, CA2STError.exit_code)


def _record(rank: int, error: Exception, job: Job, launch: str) -> None:
    keep_failure(Path(job.run_dir), record_of(error, rank=rank, node=socket.gethostname(), attempt=1, launch=launch))


def _leave(rank: int, error: Exception, exit_code: int) -> None:
    """End at once, without the shutdown of libraries that may wait for the other ranks."""
    if not is_echo(error):
        say(f"error (rank {rank}): {type(error).__name__}: {error}")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


def die_with_parent() -> None:
    """Ask Linux to kill this process when its parent dies: no orphan goes on training."""
    import ctypes

    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def _signals_to(pids: list[int]) -> Iterator[None]:
    """Pass SIGINT and SIGTERM on to the workers, which checkpoint and end; this process waits for them."""

    def forward(number: int, _frame: object) -> None:
        for pid in pids:
            with suppress(ProcessLookupError):  # ended already
                os.kill(pid, number)

    previous = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
