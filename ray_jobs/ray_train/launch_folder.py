"""How a driver and its workers talk: small files in the run folder, in a folder of their own for every launch.

Training must not wait for a message, and a node may be gone: files on the shared storage, which the run needs anyway,
ask nothing more of the cluster.
"""

import contextlib
import json
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from ca2st.durable import write_bytes

_FOLDER = "launches"
_STOP_NAME = "stop.json"


@dataclass(frozen=True, slots=True)
class LaunchFolder:
    """The files of one launch."""

    path: Path
    """``<run folder>/launches/<unique name>``."""

    @classmethod
    def make(cls, run_dir: Path, name: str) -> "LaunchFolder":
        """A new one. No two launches share a name: Ray would go on with its record of an earlier run of that name."""
        plain = re.sub(r"[^\w.-]+", "-", name)  # one folder, whatever a run is called
        folder = cls(run_dir / _FOLDER / f"{plain}-{time.time_ns()}")
        folder.path.mkdir(parents=True)
        return folder

    @property
    def name(self) -> str:
        """Unique among all launches."""
        return self.path.name

    @property
    def run_dir(self) -> Path:
        """The run folder it lies in."""
        return self.path.parents[1]

    def remove(self) -> None:
        """When the launch is over."""
        shutil.rmtree(self.path, ignore_errors=True)
        with contextlib.suppress(OSError):  # another launch has one too
            self.path.parent.rmdir()

    def ask_stop(self, signal_number: int) -> None:
        """Tell all workers to save a checkpoint and end, as this signal would."""
        write_bytes(self.path / _STOP_NAME, json.dumps({"signal": signal_number}).encode())

    def stop_signal(self) -> int:
        """The signal that the driver passed on, or 0."""
        try:
            return int(json.loads((self.path / _STOP_NAME).read_text())["signal"])
        except FileNotFoundError:
            return 0

    def num_attempts(self) -> int:
        """How often workers have begun."""
        return len(list(self.path.glob("attempt-*.rank-0")))

    def begin(self, attempt: int, *, rank: int, node: str) -> None:
        """Leave where the worker of `rank` runs."""
        write_bytes(self._place(attempt, rank), node.encode())

    def node_of(self, attempt: int, rank: int) -> str:
        """Where the worker of `rank` ran, or an empty text where it never began."""
        try:
            return self._place(attempt, rank).read_text()
        except FileNotFoundError:
            return ""

    def _place(self, attempt: int, rank: int) -> Path:
        return self.path / f"attempt-{attempt}.rank-{rank}"
