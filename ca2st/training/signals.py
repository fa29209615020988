"""Stopping on request: SIGTERM and SIGINT become a flag that all ranks agree on at the next step.

Install the handlers at the edge (`stop_on_signals` in the main thread of a command); the loop only reads the flag.
"""

import contextlib
import faulthandler
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator

from ca2st.processes import STOPPING
from ca2st.training.errors import InterruptedRunError, RunStoppedError, TerminatedError, TimeUpError

TIME_UP = int(signal.SIGALRM)
"""Stands among the requests to stop for a run that has lasted `max_hours`; nobody sends the signal."""
ONE_REQUEST_SECONDS = 0.5
"""One request may come as several signals: a terminal's Ctrl-C, timeout(1) and Slurm reach every process of a group,
and the parent of a group passes on to its workers what they have got already."""


class StopRequest:
    """A flag that asks the run to save a checkpoint and stop."""

    def __init__(self) -> None:
        self.signal_number = 0
        """Of the signal that asked; 0: none did."""

    def request(self, signal_number: int = signal.SIGTERM) -> None:
        """Ask the run to stop as this signal would; the first request counts."""
        self.signal_number = self.signal_number or signal_number


def stopped_error(signal_number: int, message: str) -> RunStoppedError:
    """Return the error that ends a run stopped by `signal_number`, with the shell's exit code for it."""
    kinds = {TIME_UP: TimeUpError, int(signal.SIGINT): InterruptedRunError}
    return kinds.get(signal_number, TerminatedError)(message)


@contextlib.contextmanager
def stop_on_signals(*, grace_seconds: float) -> Iterator[StopRequest]:
    """Turn SIGTERM and SIGINT into a `StopRequest` while the block runs.

    A second signal, or `grace_seconds` after the first, ends the process at once with the same exit code and the
    stacks of its threads on stderr: even when the main thread is stuck in a collective that will never end. Signals
    within half a second of the first are the same request. Main thread only.
    """
    stop = StopRequest()
    reader, writer = socket.socketpair()
    for end in (reader, writer):
        end.setblocking(False)
    previous = {number: signal.signal(number, lambda came, _frame: stop.request(came)) for number in STOPPING}
    # handlers run in the main thread, which may hang in native code; this byte reaches the watchdog all the same
    previous_descriptor = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    watchdog = threading.Thread(target=_watch, args=(reader, grace_seconds), name="stop-watchdog", daemon=True)
    watchdog.start()
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(previous_descriptor)
        writer.close()
        watchdog.join()
        reader.close()


def _watch(reader: socket.socket, grace_seconds: float) -> None:
    """End the process on a second request or when its grace is over; return when the other end is closed."""
    first, begin, why = 0, 0.0, f"no exit within {grace_seconds:g} s"
    while True:
        left = max(0.0, begin + grace_seconds - time.monotonic()) if first else None
        if not select.select([reader], [], [], left)[0]:
            break
        data = reader.recv(1)
        if not data:
            return
        if data[0] not in STOPPING:
            continue
        if not first:
            first, begin = data[0], time.monotonic()
        elif time.monotonic() - begin >= ONE_REQUEST_SECONDS:
            why = "second signal"
            break
    sys.stderr.write(f"stopping at once: {why}\n")
    faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
    os._exit(128 + first)
