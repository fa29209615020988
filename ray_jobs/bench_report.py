"""The report of every bench: what was found, beside the command, date, machine and versions that explain it."""

import contextlib
import datetime
import json
import platform
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ray_jobs.console import print_json, result
from ray_jobs.environment import RECORDED_PACKAGES

_PACKAGES = (*RECORDED_PACKAGES, "av", "timm", "torchvision")
_DRIVER_FILE = Path("/proc/driver/nvidia/version")


def bench_facts(found: Mapping[str, Any], *, command: str, device: str | None = None) -> dict[str, Any]:
    """Return `found` with date, `command`, machine and versions; by default the GPU's, if there is one."""
    from ca2st.benchmark.measure import machine

    return {
        **found,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "command": command,
        "machine": asdict(machine(device or ("cuda" if torch.cuda.is_available() else "cpu"))),
        "versions": bench_versions(),
    }


def write_report(facts: Mapping[str, Any], lines: Iterable[str], *, out: Path | None, as_json: bool) -> None:
    """Write `facts` to the file `out`, and print them (`as_json`) or the `lines` for a person."""
    if out is not None:
        out.write_text(json.dumps(facts, indent=1) + "\n")
    if as_json:
        print_json(facts)
        return
    for line in lines:
        result(line)


def bench_versions() -> dict[str, str]:
    """Return the versions of what decides the figures; a package that is not there says so."""
    return {
        "python": platform.python_version(),
        **{name: package_version(name) for name in _PACKAGES},
        "cuda": torch.version.cuda or "none",
        "driver": driver_version(_DRIVER_FILE),
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


@contextlib.contextmanager
def work_folder(work: Path | None) -> Iterator[Path]:
    """`work`, made where it is missing and kept, or a temporary folder."""
    if work is not None:
        work.mkdir(parents=True, exist_ok=True)
        yield work
        return
    with tempfile.TemporaryDirectory(prefix="ca2st-bench-") as folder:
        yield Path(folder)
