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
from typing import TYPE_CHECKING

from ca2st.training.signals import StopRequest, stopped_error

if TYPE_CHECKING:
    from ray.train.v2.api.preemption import PreemptionInfo

PREEMPTED = int(signal.SIGHUP)
"""How a notice is told to the training loop. Ranks take the highest number any of them saw: a person's SIGINT or
SIGTERM at the same time counts for more."""
_POLL_SECONDS = 0.5
_LOGGER = logging.getLogger(__name__)


@contextlib.contextmanager
def watching(ask: Callable[[], int], *, poll_seconds: float = _POLL_SECONDS) -> Iterator[StopRequest]:
    """Ask every `poll_seconds` while the block runs; the first number that is not 0 becomes a stop request.

    An `ask` that fails (storage that does not answer) is told once in the log and asked again.
    """
    stop, ended = StopRequest(), threading.Event()

    def watch() -> None:
        troubled = False
        while not ended.wait(poll_seconds):
            try:
                number = ask()
            except (OSError, ValueError) as error:
                if not troubled:
                    _LOGGER.warning("cannot see whether to stop, trying again: %s", error)
                troubled = True
                continue
            if number:
                stop.request(number)
                return

    watcher = threading.Thread(target=watch, name="stop-watch", daemon=True)
    watcher.start()
    try:
        yield stop
    finally:
        ended.set()
        watcher.join()


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

    For the time in which there is nothing to save: the way out cleans up. Main thread only.

    Raises:
        RunStoppedError: with `message`, for the signal that came.
    """
    stopping = (signal.SIGINT, signal.SIGTERM)

    def end(number: int, _frame: object) -> None:
        for one in stopping:
            signal.signal(one, signal.SIG_DFL)
        raise _SignalledError(number)

    previous = {number: signal.signal(number, end) for number in stopping}
    try:
        yield
    except _SignalledError as error:
        raise stopped_error(error.number, message) from None
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
