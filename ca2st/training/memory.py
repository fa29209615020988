"""Memory that did not suffice, under its own name: what was asked for, the peak, and the settings that lower it."""

import errno
import resource
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ca2st.training.errors import OutOfMemoryFault

_REFUSED_ALLOCATIONS = (
    "DefaultCPUAllocator",  # torch on a CPU
    "CUDA out of memory",
    "CUDA error: out of memory",
    "cudaErrorMemoryAllocation",
    "CUDA allocation failed",  # DALI
    "CUBLAS_STATUS_ALLOC_FAILED",
    "std::bad_alloc",
)
_BYTES_PER_KILOBYTE = 1024
SHARED_MEMORY = "/dev/shm"  # noqa: S108  # the kernel's name; nothing is made there
KNOBS = (
    "lower training.per_device_batch_size (a step's clips are then cut into more micro-batches, with the same result), "
    'set training.activation_checkpointing = true, training.precision = "bf16" or experts.precision = "bf16", '
    "lower data.loader.prefetch_steps or data.loader.decode_threads, or use fewer workers on this machine; "
    "`ca2st train RECIPE --dry-run` guesses what each of them gives"
)
"""What to change, in the words of a recipe."""


@contextmanager
def naming_memory_faults() -> Iterator[None]:
    """Raise what the block fails with for want of memory as `OutOfMemoryFault`; other errors pass."""
    try:
        yield
    except Exception as error:
        fault = memory_fault(error)
        if fault is None:
            raise
        raise fault from error


def memory_fault(error: BaseException) -> OutOfMemoryFault | None:
    """`error` as an `OutOfMemoryFault`; None where it has another reason, or is one already."""
    if isinstance(error, OutOfMemoryFault):
        return None
    if isinstance(error, OSError) and error.errno == errno.ENOSPC and SHARED_MEMORY in str(error.filename or error):
        return _fault(
            f"shared memory ({SHARED_MEMORY}) is full: {error}; enlarge it (docker run --shm-size=8g);", error
        )
    if not _is_refused_allocation(error):
        return None
    told = str(error).strip().splitlines()
    return _fault(f"out of memory: {told[0] if told else type(error).__name__};", error)


def peak_memory() -> str:
    """The most this process, and its GPU where it has one, has held so far: in gigabytes."""
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _BYTES_PER_KILOBYTE
    told = f"this process {own / 1e9:.2f} GB"
    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        held, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        told += f", GPU {held / 1e9:.2f} GB ({reserved / 1e9:.2f} GB reserved) of {total / 1e9:.2f} GB"
    return told


def _fault(what: str, error: BaseException) -> OutOfMemoryFault:
    fault = OutOfMemoryFault(f"{what} peak so far: {peak_memory()}; {KNOBS}")
    for note in getattr(error, "__notes__", ()):
        fault.add_note(note)
    return fault


def _is_refused_allocation(error: BaseException) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _REFUSED_ALLOCATIONS)
