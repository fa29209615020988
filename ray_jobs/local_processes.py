"""Train in several processes of this machine that talk over the loopback interface."""

import os
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ca2st.durable import FaultPoints
from ray_jobs.console import say, show_log
from ray_jobs.errors import WorkerFailedError
from ray_jobs.worker import Job, Outcome, read_outcome, run


def run_processes(job: Job, num_workers: int, faults: FaultPoints) -> Outcome:
    """Train in `num_workers` processes of this machine; SIGINT and SIGTERM are passed on to them.

    Raises:
        WorkerFailedError: a worker process failed, with its exit code.
    """
    from torch.multiprocessing.spawn import ProcessExitedException, spawn

    context = spawn(  # type: ignore[no-untyped-call]  # torch leaves it untyped
        _worker_process,
        args=(job, num_workers, _free_port(), faults),
        nprocs=num_workers,
        join=False,
    )
    with _signals_to(context.pids()):
        try:
            while not context.join():
                pass
        except ProcessExitedException as error:
            code = error.exit_code if error.exit_code >= 0 else 128 - error.exit_code
            raise WorkerFailedError(f"worker of rank {error.error_index} ended with exit code {code}", code) from error
    return read_outcome(Path(job.run_dir))


def _worker_process(rank: int, job: Job, world_size: int, port: int, faults: FaultPoints) -> None:
    from ca2st.errors import CA2STError

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
        run(job, faults=faults)
    except CA2STError as error:
        say(f"error (rank {rank}): {error}")
        sys.exit(error.exit_code)


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
