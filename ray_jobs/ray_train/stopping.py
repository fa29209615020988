"""How a worker learns that it should save and stop, and how a driver ends that has nothing to save yet.

Ray runs a worker's training in a thread, where no signal arrives. A second thread looks for the driver's stop file and
for Ray's notice that a node will be taken away; whatever one rank sees, all ranks agree on at the next step.
"""

import contextlib
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from ca2st.training.signals import ONE_REQUEST_SECONDS, StopRequest, stop_on_signals, stopped_error

if TYPE_CHECKING:
    from ray.train.v2.api.preemption import PreemptionInfo

PREEMPTED = int(signal.SIGHUP)
"""How a notice is told to the training loop. Ranks take the highest number any of them saw: a person's SIGINT or
SIGTERM at the same time counts for more."""
_POLL_SECONDS = 0.5
_STOPPING = (signal.SIGINT, signal.SIGTERM)
_CLEANING_SECONDS = 30.0
"""For the way out, after a signal came while there was nothing to save."""
_LOGGER = logging.getLogger(__name__)


@contextlib.contextmanager
def watching(ask: Callable[[], int], *, poll_seconds: float = _POLL_SECONDS) -> Iterator[StopRequest]:
    """Ask every `poll_seconds` while the block runs; the first number that is not 0 becomes a stop request.

    An `ask` that fails (storage that does not answer) is told once in the log and asked again.
    """
    stop, ended, ask = StopRequest(), threading.Event(), patient(ask)

    def watch() -> None:
        while not ended.wait(poll_seconds):
            if number := ask():
                stop.request(number)
                return

    watcher = threading.Thread(target=watch, name="stop-watch", daemon=True)
    watcher.start()
    try:
        yield stop
    finally:
        ended.set()
        watcher.join()


def patient(ask: Callable[[], int]) -> Callable[[], int]:
    """`ask`, with 0 for an answer while it fails (storage that does not answer); the log tells of the first time."""
    troubled = False

    def answer() -> int:
        nonlocal troubled
        try:
            return ask()
        except (OSError, ValueError) as error:
            if not troubled:
                _LOGGER.warning("cannot see whether to stop, trying again: %s", error)
            troubled = True
            return 0

    return answer


def preemption_notice() -> "PreemptionInfo | None":
    """Ray's notice that nodes of this worker group will be taken away, as this worker has it; None: none.

    Ray's public ``get_preemption_info`` waits for all ranks; a thread of one rank must not.
    """
    from ray.train.v2._internal.execution.context import get_train_context

    return get_train_context().preemption_context.preemption_info


def hold(until: Callable[[], int], *, poll_seconds: float = _POLL_SECONDS) -> None:
    """Wait, the state being saved, for Ray to take this worker down: it does when the notice has run out.

    Ending before would not do: Ray counts a run whose workers return as finished and one whose workers fail as failed.
    Returns only when `until` says that a person asked to stop after all.
    """
    while not until():
        time.sleep(poll_seconds)


class _SignalledError(BaseException):
    """A signal on its way out: no ``except Exception`` on the way takes it for a failure that may pass."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextlib.contextmanager
def ended_by_signals(message: str) -> Iterator[None]:
    """Let the first SIGINT or SIGTERM end the block, wherever the main thread is just then; a second one the process.

    For the time in which there is nothing to save: the way out cleans up, for 30 s at most. Signals within half a
    second of the first are the same request (see `ca2st.training.signals`). Main thread only.

    Raises:
        RunStoppedError: with `message`, for the signal that came.
    """
    came: list[tuple[int, float]] = []

    def end(number: int, _frame: object) -> None:
        if not came:
            came.append((number, time.monotonic()))
            raise _SignalledError(number)

    with stop_on_signals(grace_seconds=_CLEANING_SECONDS), _only_handler(end):
        with contextlib.suppress(_SignalledError):
            yield
        if came:
            number, moment = came[0]
            time.sleep(max(0.0, moment + ONE_REQUEST_SECONDS - time.monotonic()))  # the rest of this request
            raise stopped_error(number, message) from None


@contextlib.contextmanager
def _only_handler(handle: Callable[[int, object], None]) -> Iterator[None]:
    """Let `handle` hear SIGINT and SIGTERM, whoever else asks for them in the block; the caller puts handlers back.

    `ray.init` asks for SIGTERM, without being told to, and would end the process with code 15.
    """
    install = signal.signal
    for number in _STOPPING:
        install(number, handle)

    def refusing(number: int, handler: Any) -> Any:
        return signal.getsignal(number) if number in _STOPPING else install(number, handler)

    signal.signal = refusing  # type: ignore[assignment]  # as Ray itself does to defer a SIGINT
    try:
        yield
    finally:
        signal.signal = install
