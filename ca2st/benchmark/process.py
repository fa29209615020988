"""A case in a process of its own, so that its memory is its own and nobody's leftovers slow it down."""

import contextlib
import traceback
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any, cast

from ca2st.benchmark.case import Case, CaseSpec, LocalCase, PassKind
from ca2st.benchmark.limits import Limit
from ca2st.child_processes import SPAWN
from ca2st.errors import CA2STError, EnvironmentFault

_END = "end"
_PATIENCE_SECONDS = 10.0


class RemoteCase:
    """Asks the process for what a `Case` can do."""

    def __init__(self, connection: Connection, process: Any, spec: CaseSpec) -> None:
        self._connection = connection
        self._process = process
        self._spec = spec

    def seconds(self, kind: PassKind) -> float:
        """Run one pass there; how long it took."""
        return cast("float", self._ask("seconds", kind))

    def peak_bytes(self) -> int:
        """Highest memory since the last `reset_peak`, weights included."""
        return cast("int", self._ask("peak_bytes"))

    def reset_peak(self) -> None:
        """Forget earlier peaks."""
        self._ask("reset_peak")

    def limit(self) -> Limit:
        """The device's limit, in the precision of the case."""
        return cast("Limit", self._ask("limit"))

    def _ask(self, *request: str) -> object:
        try:
            self._connection.send(request)
            answer = self._connection.recv()
        except (EOFError, OSError) as error:
            raise EnvironmentFault(self._death()) from error
        if isinstance(answer, CA2STError):
            raise answer
        return answer

    def _death(self) -> str:
        self._process.join(_PATIENCE_SECONDS)
        spec = self._spec
        return (
            f"{spec.config.kind}, {spec.variant}: expected the measuring process to answer, found it ended with exit "
            f"code {self._process.exitcode} (-9: the system had no memory left); take fewer clips (--batch) or layers "
            "(--layers)"
        )


@contextlib.contextmanager
def case_in_process(spec: CaseSpec) -> Iterator[Case]:
    """Start a process with the case in it; ends it with the block.

    Raises:
        EnvironmentFault: in any of the case's methods, when the process ended or ran out of the device's memory.
        CA2STError: anything else that went wrong there, with its traceback.
    """
    ours, theirs = SPAWN.Pipe()
    process = SPAWN.Process(target=_serve, args=(theirs, spec), daemon=False)
    process.start()
    theirs.close()
    try:
        yield RemoteCase(ours, process, spec)
    finally:
        _end(ours, process)


def _end(connection: Connection, process: Any) -> None:
    with connection:
        with contextlib.suppress(OSError):  # it has ended already
            connection.send((_END,))
    process.join(_PATIENCE_SECONDS)
    if process.is_alive():
        process.kill()
        process.join()


def _serve(connection: Connection, spec: CaseSpec) -> None:
    """Answer requests until told to end; a fault is an answer too."""
    case: LocalCase | None = None
    while (request := _next(connection))[0] != _END:
        try:
            case = case or LocalCase(spec)
            connection.send(getattr(case, request[0])(*request[1:]))
        except Exception as error:  # noqa: BLE001  # whatever it is, the parent tells it
            connection.send(_told(error, spec))


def _next(connection: Connection) -> tuple[str, ...]:
    try:
        return cast("tuple[str, ...]", connection.recv())
    except EOFError:
        return (_END,)


def _told(error: Exception, spec: CaseSpec) -> CA2STError:
    from torch.cuda import OutOfMemoryError

    where = f"{spec.config.kind}, {spec.variant}"
    if isinstance(error, CA2STError):
        return error
    if isinstance(error, OutOfMemoryError):
        return EnvironmentFault(
            f"{where}: expected {spec.per_device_batch_size} clips to fit on the GPU, found its memory used up; "
            "take fewer (--batch)"
        )
    return CA2STError(f"{where}: " + "".join(traceback.format_exception(error)))
