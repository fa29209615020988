"""Processors, memory, disks and limits of this machine."""

import os
import resource
import shutil
import tempfile
from pathlib import Path

from ca2st.cores import num_cores
from ray_jobs.doctor.finding import Finding

_GIB = 2**30
_LEAST_DISK_BYTES = 5 * _GIB
_LEAST_MEMORY_BYTES = 4 * _GIB
_LEAST_SHARED_BYTES = 64 * 2**20
_LEAST_OPEN_FILES = 1024
_CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def check_processor() -> Finding:
    """Cores this process may use."""
    from ca2st.benchmark.machine import machine

    return Finding(name="processor", ok=True, what=f"{num_cores()} cores, {machine('cpu').processor}")


def check_memory() -> Finding:
    """Memory this process may use, a container's limit included."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [int(text) for path in _CGROUP_LIMITS if path.is_file() and (text := path.read_text().strip()).isdigit()]
    usable = min([total, *limits])
    return Finding(
        name="memory",
        ok=usable >= _LEAST_MEMORY_BYTES,
        what=f"{usable / _GIB:.1f} GiB usable",
        mend=f"a worker with a small model needs 2 GiB: give the machine {_LEAST_MEMORY_BYTES // _GIB} or more",
    )


def check_shared_memory(folder: Path = Path("/dev/shm")) -> Finding:  # noqa: S108 - the place is what is asked about
    """Ray's object store lives there."""
    free = shutil.disk_usage(folder).free
    return Finding(
        name="shared memory",
        ok=free >= _LEAST_SHARED_BYTES,
        what=f"{free / _GIB:.2f} GiB free in {folder}",
        mend="start the container with --shm-size=8g; Ray falls back to slower files without",
        needed=False,
    )


def check_open_files() -> Finding:
    """How many files a process may hold open: shards, sockets of Ray."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return Finding(
        name="open files",
        ok=soft >= _LEAST_OPEN_FILES or soft == resource.RLIM_INFINITY,
        what=f"{soft} a process (at most {hard})",
        mend="ulimit -n 65536 before the command, or LimitNOFILE= of the service",
    )


def check_folder(name: str, folder: Path) -> Finding:
    """A file can be written and linked in `folder` (or the nearest parent that is there), and there is room."""
    place = next(one for one in (folder, *folder.absolute().parents) if one.is_dir())
    free = shutil.disk_usage(place).free
    try:
        with tempfile.NamedTemporaryFile(dir=place) as file:
            file.write(b"ca2st")
            os.fsync(file.fileno())
            Path(f"{file.name}.renamed").hardlink_to(file.name)
            Path(f"{file.name}.renamed").unlink()
    except OSError as error:
        return Finding(
            name=name,
            ok=False,
            what=f"{place}: cannot write there ({error.strerror})",
            mend="give another folder, or the right to write to it",
        )
    return Finding(
        name=name,
        ok=free >= _LEAST_DISK_BYTES,
        what=f"{place}: writable, {free / _GIB:.0f} GiB free",
        mend=f"make room: at least {_LEAST_DISK_BYTES // _GIB} GiB for checkpoints and logs",
    )


def check_compiler() -> Finding:
    """torch.compile on a CPU needs a C++ compiler."""
    found = next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)
    return Finding(
        name="c++ compiler",
        ok=found is not None,
        what=found or "none on PATH",
        mend="apt-get install g++; only training.compile needs it",
        needed=False,
    )
