"""What a node's processors, memory, GPUs, disk and network do while it trains, measured by one worker of the node.

Lines go to ``system/<node>.jsonl`` of the run folder, under the names that MLflow gives such numbers; whoever sends
the journal sends them too. Its own classes are not used: importing MLflow takes a worker seconds and 170 MB.
"""

import contextlib
import importlib
import json
import logging
import platform
import re
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypedDict

import psutil  # type: ignore[import-untyped]  # has none

from ca2st.durable import open_itself, take_lock
from ca2st.training.journal import cut_torn_end, read_events

SYSTEM_FOLDER = "system"
_MEGABYTE = 1e6
_LOG = logging.getLogger(__name__)

Measure = Callable[[], Mapping[str, float]]
"""The numbers of this moment by name; what is used is a mean since the last call."""


class SystemLine(TypedDict):
    """A line of ``system/<node>.jsonl``."""

    time: float
    step: int
    metrics: dict[str, float | None]


class NodeMetrics:
    """Measures this node in a thread of its own while the block runs, and once more at its end.

    One process measures a node: where another does already, this one does nothing. Whatever fails ends the
    measurements with one warning; the training goes on.
    """

    def __init__(
        self, run_dir: Path, *, every_seconds: float, node: str | None = None, measure: Measure | None = None
    ) -> None:
        """Nothing is written yet.

        `node`: name of the node; None: its host name. `measure`: in place of `NodeProbe`.
        """
        self.path = node_file(run_dir, platform.node() if node is None else node)
        self._every_seconds = every_seconds
        self._measure = measure
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="node metrics", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join(timeout=10.0)  # a disk that hangs must not hold the training's end

    def _run(self) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open_itself(self.path, "ab") as file:
                if not take_lock(file):
                    return
                cut_torn_end(self.path)
                # Numbers count on over the attempts of a run.
                number = max((int(line["step"]) for line in read_events(self.path, kind=SystemLine)), default=-1)
                measure = self._measure or NodeProbe(self.path.parent).measure
                is_last = False
                while not is_last:
                    is_last, number = self._ended.wait(self._every_seconds), number + 1
                    metrics = {name: round(value, 3) for name, value in measure().items()}
                    line = json.dumps({"time": time.time(), "step": number, "metrics": metrics}, separators=(",", ":"))
                    file.write(f"{line}\n".encode())
                    file.flush()
        except Exception as error:  # noqa: BLE001  # measuring is never worth a training
            _LOG.warning("%s: system metrics end here: %s: %s", self.path, type(error).__name__, error)


class NodeProbe:
    """Reads the counters of this machine and of its NVIDIA devices, all of them, in the driver's order."""

    def __init__(self, folder: Path) -> None:
        """`folder`: on the disk whose use is measured."""
        self._folder = folder
        self._start = psutil.net_io_counters()
        psutil.cpu_percent()  # the next call tells the mean since this one
        self._gpus: list[Any] = []
        try:
            self._nvml = importlib.import_module("pynvml")
        except ImportError:  # no package nvidia-ml-py
            return
        with contextlib.suppress(self._nvml.NVMLError):  # no driver
            self._nvml.nvmlInit()
            self._gpus = list(map(self._nvml.nvmlDeviceGetHandleByIndex, range(self._nvml.nvmlDeviceGetCount())))

    def measure(self) -> dict[str, float]:
        """Return the percentages, megabytes of 10^6 bytes and watts; network traffic since this object was made.

        A number that a GPU does not have is left out.
        """
        memory, disk, network = psutil.virtual_memory(), psutil.disk_usage(str(self._folder)), psutil.net_io_counters()
        found = {
            "cpu_utilization_percentage": psutil.cpu_percent(),
            "system_memory_usage_megabytes": memory.used / _MEGABYTE,
            "system_memory_usage_percentage": 100 * memory.used / memory.total,
            "disk_usage_percentage": disk.percent,
            "disk_usage_megabytes": disk.used / _MEGABYTE,
            "disk_available_megabytes": disk.free / _MEGABYTE,
            "network_receive_megabytes": (network.bytes_recv - self._start.bytes_recv) / _MEGABYTE,
            "network_transmit_megabytes": (network.bytes_sent - self._start.bytes_sent) / _MEGABYTE,
        }
        for index, gpu in enumerate(self._gpus):
            for read in (_gpu_memory, _gpu_utilization, _gpu_power):
                with contextlib.suppress(self._nvml.NVMLError):
                    found |= {f"gpu_{index}_{name}": value for name, value in read(self._nvml, gpu).items()}
        return found


def _gpu_memory(nvml: Any, handle: Any) -> dict[str, float]:
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    return {
        "memory_usage_percentage": 100 * memory.used / memory.total,
        "memory_usage_megabytes": memory.used / _MEGABYTE,
    }


def _gpu_utilization(nvml: Any, handle: Any) -> dict[str, float]:
    return {"utilization_percentage": float(nvml.nvmlDeviceGetUtilizationRates(handle).gpu)}


def _gpu_power(nvml: Any, handle: Any) -> dict[str, float]:
    used, limit = nvml.nvmlDeviceGetPowerUsage(handle), nvml.nvmlDeviceGetEnforcedPowerLimit(handle)
    return {"power_usage_watts": used / 1000, "power_usage_percentage": 100 * used / limit}


def node_file(run_dir: Path, node: str) -> Path:
    """Return where the numbers of `node` are kept; characters that files or MLflow do not take become ``-``."""
    return run_dir / SYSTEM_FOLDER / f"{re.sub(r'[^A-Za-z0-9_.-]+', '-', node).strip('.-') or 'node'}.jsonl"


def node_files(run_dir: Path) -> dict[str, Path]:
    """Return the files there are, by node; the last line of one may be torn."""
    return {path.stem: path for path in sorted((run_dir / SYSTEM_FOLDER).glob("*.jsonl"))}
