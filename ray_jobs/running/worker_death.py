"""What it means that a worker process ended without a word."""

import shutil
import signal

from ca2st.errors import EnvironmentFault
from ca2st.training.memory import KNOBS, SHARED_MEMORY
from ray_jobs.errors import WorkerFailedError


def death_of(rank: int, exit_code: int, *, peak_bytes: int, shared_free_bytes: int) -> WorkerFailedError:
    """The error for a worker that ended without a word: what its exit code tells, and what to do.

    `peak_bytes`: the most that any worker held; `shared_free_bytes`: what is free in /dev/shm.
    """
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


def shared_memory_free() -> int:
    try:
        return shutil.disk_usage(SHARED_MEMORY).free
    except OSError:
        return 0
