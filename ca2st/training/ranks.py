"""This process among those that train together: where its time goes, what ranks exchange, and who is silent.

`Ranks` holds the few collectives. A rank that fails alone would leave the others waiting in one. Whatever may fail on
one rank (a loader, a file) runs in `together` or `on_main`: the failure travels as data and every rank raises in the
same place.

`StageClock` always stands in exactly one stage, so the stages of a step add up to the step::

    restart                                                                     restart
     |-- data_wait --|-- gather --|-- to_device --|-- forward --|-- backward --|...|
                          all that belongs to no named stage: other

Times are the host's. On a GPU `forward` and `backward` end when their work is queued; nothing waits for the device
here that did not wait before, so the device's own time shows in the first stage that needs a number from it:
``gather``, which reads the losses. On a CPU every stage is what it says.

`Heartbeat` tells the ranks of each other.
"""

import errno
import faulthandler
import json
import logging
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal, TypeVar, cast, get_args

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from ca2st.checked_json import DocumentError, read_json
from ca2st.errors import CA2STError, EnvironmentFault
from ca2st.training.errors import OutOfMemoryFault, PeerFailedError, RanksSilentError

T = TypeVar("T")
PROFILE_NAME = "profile"
"""Folder of traces in a run folder."""
_UNPROFILED_STEPS = 2
"""The first steps are unlike the rest."""
_LOGGER = logging.getLogger(__name__)

Stage = Literal["data_wait", "to_device", "forward", "backward", "optimizer", "gather", "other"]
Standing = Stage | Literal["checkpoint", "validation"]
"""A stage of a step, or what is done between two steps: there the clock stands in it, and charges it to ``other``."""
STAGES: tuple[Stage, ...] = get_args(Stage)
"""``data_wait``: this rank's loader. ``forward``: with the loss. ``backward``: with the exchange of gradients between
ranks. ``optimizer``: gradient norm, clipping, update. ``gather``: reading losses and meeting the other ranks."""


class StageClock:
    """Charges every moment to one stage; for one thread."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._stage: Standing = "other"
        self.restart()

    def restart(self) -> None:
        """Begin a step."""
        self._seconds: dict[Stage, float] = dict.fromkeys(STAGES, 0.0)
        self._since = self._clock()

    @contextmanager
    def stage(self, name: Standing) -> Iterator[None]:
        """Charge the block to `name`; the stage around it goes on afterwards."""
        outer = self._switch(name)
        try:
            yield
        finally:
            self._switch(outer)

    def standing(self) -> tuple[Standing, float]:
        """Return the stage it stands in now, and for how many seconds; from any thread."""
        return self._stage, self._clock() - self._since

    def seconds(self) -> dict[Stage, float]:
        """Return what has passed since `restart`, by stage; every stage is there."""
        self._switch(self._stage)
        return dict(self._seconds)

    def _switch(self, name: Standing) -> Standing:
        now = self._clock()
        charged: Stage = "other" if self._stage == "checkpoint" or self._stage == "validation" else self._stage
        self._seconds[charged] += now - self._since
        outer, self._stage, self._since = self._stage, name, now
        return outer


@contextmanager
def profiled(folder: Path, *, steps: int, rank: int) -> Iterator[Callable[[], None]]:
    """Record `steps` steps with torch's profiler, from the third on; call what is yielded after each step.

    The trace is ``profile/rank-<r>.json.gz`` of the run folder, for chrome://tracing and Perfetto. 0 steps: nothing.
    """
    if steps == 0:
        yield lambda: None
        return
    path = folder / PROFILE_NAME / f"rank-{rank}.json.gz"
    path.parent.mkdir(parents=True, exist_ok=True)

    def export(profiler: torch.profiler.profile) -> None:
        if (recorded := profiler.step_num - _UNPROFILED_STEPS) > 0:
            profiler.export_chrome_trace(str(path))
            _LOGGER.info("trace of %d steps: %s", recorded, path)

    schedule = torch.profiler.schedule(wait=_UNPROFILED_STEPS - 1, warmup=1, active=steps, repeat=1)
    with torch.profiler.profile(schedule=schedule, on_trace_ready=export, acc_events=True) as profiler:
        yield profiler.step


class SourceCounts:
    """What a loader's own threads did between two steps, where the loader says so.

    Such a loader has ``stats``, and ``stats.totals()`` the running totals by name: seconds of its threads
    (``..._seconds``) and counts (``bytes_read``).
    """

    def __init__(self, source: object) -> None:
        self._source = source
        self._before: dict[str, int | float] = {}
        self.since_last()

    def since_last(self) -> dict[str, int | float]:
        """Return the totals now minus totals at the last call; empty where the source does not count.

        Work is counted where it ended: the threads run ahead, so a step's line may hold the decoding of a later batch.
        """
        stats = getattr(self._source, "stats", None)
        before = self._before
        self._before = {} if stats is None else dict(stats.totals())
        return {name: total - before.get(name, 0) for name, total in self._before.items()}


class Ranks:
    """This process among those that train together."""

    def __init__(self, accelerator: Accelerator, *, stages: StageClock | None = None) -> None:
        self.rank: int = accelerator.process_index
        self.world_size: int = accelerator.num_processes
        self.is_main = self.rank == 0
        """On the rank that writes journal and checkpoints."""
        self.stages = stages or StageClock()
        """Charged while it waits for the others."""

    def gather(self, value: T) -> list[T]:
        """Return the values of all ranks, in rank order, on every rank."""
        with self.stages.stage("gather"):
            gathered: list[T] = gather_object([value])
        return gathered

    def together(self, action: Callable[[], T]) -> list[T]:
        """Run `action` on every rank and gather the results; when one fails, all raise.

        Raises:
            PeerFailedError: the action failed on another rank (the failing rank raises its own error).
        """
        value, error, failure = None, None, None
        try:
            value = action()
        except Exception as caught:  # noqa: BLE001  # raised again below, on every rank
            error = memory_fault(caught) or caught
            if self.world_size > 1:
                error.add_note(f"on rank {self.rank}")
            code = error.exit_code if isinstance(error, CA2STError) else CA2STError.exit_code
            failure = (type(error).__name__, str(error), code)
        # every rank comes here, failed or not: one that raised at once would leave the others waiting
        outcomes = self.gather((value, failure))
        if error is not None:
            raise error
        for rank, (_, other) in enumerate(outcomes):
            if other is not None:
                kind, message, exit_code = other
                raise PeerFailedError(f"rank {rank} failed with {kind}: {message}", exit_code=exit_code)
        return [cast(T, value) for value, _ in outcomes]

    def on_main(self, action: Callable[[], T]) -> T:
        """Run `action` on the main rank only; every rank gets its result or raises as `together`."""
        return cast(T, self.together(lambda: action() if self.is_main else None)[0])


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
    'set training.activation_checkpointing = true or experts.precision = "bf16", '
    "lower data.loader.prefetch_steps or data.loader.decode_threads, or use fewer workers on this machine, and rerun; "
    "or, in another run folder, lower training.per_device_batch_size (a step's clips are then cut into more "
    'micro-batches, with the same result) or set training.precision = "bf16"; '
    "the log of a run's first step has the memory that it took"
)
"""What to change, in the words of a recipe: first what a run that has begun may change."""


@contextmanager
def naming_memory_faults() -> Iterator[None]:
    """Raise what the block fails with for want of memory as `OutOfMemoryFault`; other errors pass."""
    try:
        yield
    except Exception as error:
        if (fault := memory_fault(error)) is None:
            raise
        raise fault from error


def memory_fault(error: BaseException) -> OutOfMemoryFault | None:
    """Return `error` as an `OutOfMemoryFault`; None where it has another reason, or is one already."""
    if isinstance(error, OutOfMemoryFault):
        return None
    if isinstance(error, OSError) and error.errno == errno.ENOSPC and SHARED_MEMORY in str(error.filename or error):
        what = f"shared memory ({SHARED_MEMORY}) is full: {error}; enlarge it (docker run --shm-size=8g)"
    elif isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in _REFUSED_ALLOCATIONS)
    ):
        lines = str(error).strip().splitlines() or [type(error).__name__]
        what = f"out of memory: {lines[0]}"
    else:
        return None
    fault = OutOfMemoryFault(f"{what}; peak so far: {peak_memory()}; {KNOBS}")
    for note in getattr(error, "__notes__", ()):
        fault.add_note(note)
    return fault


def peak_memory() -> str:
    """Return the most this process, and its GPU where it has one, has held so far: in gigabytes."""
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _BYTES_PER_KILOBYTE
    words = f"this process {own / 1e9:.2f} GB"
    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        held, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        words += f", GPU {held / 1e9:.2f} GB ({reserved / 1e9:.2f} GB reserved) of {total / 1e9:.2f} GB"
    return words


_HEARTBEATS = "heartbeats"
_EXCHANGES = ("gather", "backward")
_TIMED_OUT = ("Timed out waiting", "timed out", "Timeout")


@dataclass(frozen=True, kw_only=True, slots=True)
class Whereabouts:
    """Where a rank stands."""

    step: int
    stage: str
    seconds: float
    keys: tuple[str, ...] = ()
    """Samples it works on, where they are known."""

    def __str__(self) -> str:
        keys = f" with {', '.join(self.keys[:4])}{' ...' if len(self.keys) > 4 else ''}" if self.keys else ""
        return f"in {self.stage} after step {self.step}, for {self.seconds:.0f} s{keys}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Beat:
    """One rank's file."""

    count: int
    where: Whereabouts


class Heartbeat:
    """Beats while the block runs, and watches its own rank: a context manager, inert for a rank alone.

    A thread writes ``heartbeats/rank-<r>.json`` of the run folder, which all ranks see. A process that is stopped,
    hangs in the kernel or has lost its machine writes no more. Who waits too long looks twice: a rank whose count of
    beats stands still is silent. No clocks are compared.

    When this rank has waited in one exchange for four fifths of the timeout, the stacks of its threads are dumped on
    stderr with who is silent. A rank that others wait for so long, and that lives, dumps its own.
    """

    def __init__(
        self, folder: Path, *, rank: int, world_size: int, timeout_seconds: float, where: Callable[[], Whereabouts]
    ) -> None:
        self._folder = folder / _HEARTBEATS
        self._rank, self._world_size = rank, world_size
        self._timeout, self._where = timeout_seconds, where
        self._interval_seconds = min(5.0, timeout_seconds / 20)
        self._ended = threading.Event()
        self._count = 0
        self._thread = threading.Thread(target=self._watch, name="heartbeat", daemon=True)

    def __enter__(self) -> "Heartbeat":
        if self._world_size > 1:
            self._beat()
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._world_size == 1:
            return
        self._ended.set()
        self._thread.join()
        with suppress(OSError):
            self._path(self._rank).unlink()
            self._folder.rmdir()  # by the last of the ranks

    def explain(self, error: BaseException) -> RanksSilentError | None:
        """Return `error` as what it says of the other ranks, where it is an exchange that was given up; else None."""
        if self._world_size == 1 or not isinstance(error, RuntimeError):
            return None
        if not any(words in str(error) for words in _TIMED_OUT):
            return None
        before = self._others()
        time.sleep(3 * self._interval_seconds)
        return RanksSilentError(
            f"rank {self._rank} waited {self._timeout:g} s for the other ranks after step {self._where().step}: "
            f"{self._compared(before)}; look at that process and its machine, or raise "
            "training.collective_timeout_seconds where it is only slow, and rerun to resume"
        )

    def _watch(self) -> None:
        dumped: tuple[int, str] | None = None
        while not self._ended.wait(self._interval_seconds):
            self._beat()
            where = self._where()
            standing = (where.step, where.stage)
            if dumped == standing:
                continue
            if self._waits_long(where):
                dumped = standing
                before = self._others()
                for _ in range(3):  # this rank goes on beating, or the others would call it silent
                    self._ended.wait(self._interval_seconds)
                    self._beat()
                self._dump(f"waits for other ranks {where}: {self._compared(before)}")
            elif where.seconds > self._timeout / 2:
                waiting = [str(rank) for rank, beat in self._others().items() if self._waits_long(beat.where)]
                if waiting:
                    dumped = standing
                    self._dump(f"is waited for by rank {', '.join(waiting)} and stands {where}")

    def _waits_long(self, where: Whereabouts) -> bool:
        return where.stage in _EXCHANGES and where.seconds > 0.8 * self._timeout

    def _compared(self, before: Mapping[int, Beat]) -> str:
        return describe(before, self._others(), ranks=[r for r in range(self._world_size) if r != self._rank])

    def _dump(self, what: str) -> None:
        sys.stderr.write(f"rank {self._rank} {what}; its threads:\n")
        sys.stderr.flush()
        with suppress(OSError, ValueError):  # a stderr without a file descriptor
            faulthandler.dump_traceback(file=sys.stderr, all_threads=True)

    def _beat(self) -> None:
        self._count += 1
        path = self._path(self._rank)
        temporary = path.with_suffix(".tmp")
        beat = Beat(count=self._count, where=self._where())
        try:
            self._folder.mkdir(parents=True, exist_ok=True)  # the last of an earlier group may take it away
            temporary.write_text(json.dumps(asdict(beat)))
            temporary.replace(path)
        except OSError as error:  # a full disk must not end a run that could go on
            _LOGGER.debug("cannot write %s: %s", path, error)

    def _others(self) -> dict[int, Beat]:
        found = {rank: read_beat(self._path(rank)) for rank in range(self._world_size) if rank != self._rank}
        return {rank: beat for rank, beat in found.items() if beat is not None}

    def _path(self, rank: int) -> Path:
        return self._folder / f"rank-{rank}.json"


def read_beat(path: Path) -> Beat | None:
    """Read a rank's file; None where there is none that can be read."""
    try:
        return read_json(path, Beat)
    except (OSError, EnvironmentFault, DocumentError):
        return None


def describe(before: Mapping[int, Beat], after: Mapping[int, Beat], *, ranks: list[int]) -> str:
    """Say what two looks at the beats of `ranks` show: first who is silent, then where the others stand."""
    alive = [rank for rank in ranks if rank in after]
    silent = [rank for rank in alive if rank in before and before[rank].count == after[rank].count]
    parts = [f"rank {rank} is silent, last seen {after[rank].where}" for rank in silent]
    parts += [f"rank {rank} has left the run" for rank in ranks if rank not in after]
    parts += [f"rank {rank} is alive {after[rank].where}" for rank in alive if rank not in silent]
    return "; ".join(parts)
