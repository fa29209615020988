"""The process that sends a run's journal on to MLflow: ``python -m ray_jobs.tracking.follower RUN_DIR PARENT_PID``.

Training never waits for it and does not notice when it is killed.
"""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
import traceback
from pathlib import Path

from ca2st.errors import CA2STError
from ray_jobs.errors import TrackingUnavailableError
from ray_jobs.redaction import RedactedStream, redacted
from ray_jobs.tracking.client import Complaint, StoreError, complaint_of_error
from ray_jobs.tracking.events import SenderBusyError, read_state
from ray_jobs.tracking.orphans import alive, end_orphans, show_ready
from ray_jobs.tracking.run_record import Say, TroubleLog, pause_seconds
from ray_jobs.tracking.sender import Sender

_NICENESS = 10
"""The processors are the training's."""
_LAST_WAIT_SECONDS = 5.0
"""At the end, for a follower of an earlier attempt to be done."""


def follow(run_dir: Path, *, parent_pid: int, say: Say, interval_seconds: float = 2.0) -> None:
    """Send again and again until SIGTERM asks for the last time, or the process that trains is gone."""
    asked_to_end = threading.Event()
    signal.signal(signal.SIGTERM, lambda _number, _frame: asked_to_end.set())
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})  # who started this process held it back
    sender, troubles = Sender(run_dir, say), TroubleLog(say=say)
    pause, is_first = interval_seconds, True
    while True:
        is_last = _wait(asked_to_end, parent_pid, pause, interval_seconds)
        try:
            with contextlib.suppress(SenderBusyError):  # the follower of an earlier attempt does it for us
                sender.send(wait_seconds=_LAST_WAIT_SECONDS if is_last else 0.0, is_last=is_last)
            troubles.succeeded()
            pause = interval_seconds
            if is_first and not is_last and read_state(run_dir).run_id is not None:
                is_first = False
                with contextlib.suppress(TrackingUnavailableError):  # the next follower finds them too
                    end_orphans(run_dir, host=socket.gethostname(), say=say, is_asked_to_end=asked_to_end.is_set)
        except Exception as error:  # noqa: BLE001  # a full disk, or an answer nobody expected, may pass in a long training
            trouble = _trouble(error)
            troubles.failed(trouble)
            pause = pause_seconds(troubles.failures, interval_seconds=interval_seconds, complaint=trouble.complaint)
        if is_last:
            troubles.close()
            return


def _trouble(error: Exception) -> StoreError:
    """What is told of `error`; of one that nobody expected the whole traceback."""
    if isinstance(error, StoreError):
        return error
    if isinstance(error, CA2STError):
        return StoreError(str(error), complaint_of_error(error))
    words = redacted("".join(traceback.format_exception(error)).rstrip())
    return StoreError(words, Complaint(kind="failing", detail=words.splitlines()[-1]))


def _wait(asked_to_end: threading.Event, parent_pid: int, pause: float, interval_seconds: float) -> bool:
    """Wait `pause` seconds; True, at once, when it is time for the last send."""
    end = time.monotonic() + pause
    while (left := end - time.monotonic()) > 0:
        if asked_to_end.wait(min(left, interval_seconds)) or os.getppid() != parent_pid:
            return True
    return False


def _say(text: str) -> None:
    """A line of the follower's log."""
    stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    print(f"{stamp} {text}", flush=True)  # noqa: T201  # its standard output is its own log file


if __name__ == "__main__":
    sys.stdout = sys.stderr = RedactedStream(sys.stderr)  # both are the log file
    os.nice(_NICENESS)
    folder = Path(sys.argv[1])
    with alive(folder):
        import mlflow  # noqa: F401  # takes seconds

        show_ready(folder)
        follow(folder, parent_pid=int(sys.argv[2]), say=_say)
