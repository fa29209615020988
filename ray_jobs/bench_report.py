"""What every bench reports: what was found beside the command, date, machine and versions that explain it.

Neither DALI nor PyAV is needed here: the GPU check of the model runs where they are missing.
"""

import datetime
import json
import platform
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ca2st.benchmark.measure import machine
from ray_jobs.console import answer
from ray_jobs.environment import RECORDED_PACKAGES

_DRIVER_FILE = Path("/proc/driver/nvidia/version")


def bench_facts(found: Mapping[str, Any], *, command: str, device: str | None = None) -> dict[str, Any]:
    """Return `found` with date, `command`, machine and versions; by default the GPU's, if there is one."""
    packages = (*RECORDED_PACKAGES, "av", "timm", "torchvision")
    return {
        **found,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "command": command,
        "machine": asdict(machine(device or ("cuda" if torch.cuda.is_available() else "cpu"))),
        "versions": {
            "python": platform.python_version(),
            **{name: package_version(name) for name in packages},
            "cuda": torch.version.cuda or "none",
            "driver": driver_version(_DRIVER_FILE),
        },
    }


def package_version(package: str) -> str:
    """Return the version of a package, or ``not installed``."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def driver_version(path: Path) -> str:
    """Return the version of the GPU driver from the kernel module's own words; ``unknown`` where they have none."""
    if not path.is_file():
        return "none"
    found = re.search(r"\s(\d+\.\d+(?:\.\d+)?)\s", path.read_text())
    return found.group(1) if found else "unknown"


def write_report(facts: Mapping[str, Any], lines: Iterable[str], *, out: Path | None, as_json: bool) -> None:
    """Write `facts` to the file `out`, and print them (`as_json`) or the `lines` for a person."""
    if out is not None:
        out.write_text(json.dumps(facts, indent=1) + "\n")
    answer(facts, lines, as_json=as_json)
