"""What runs on each node of a cluster that is examined; what it means is judged in `ray_jobs.doctor.cluster_findings`.

Heavy imports are inside the functions: Ray's processes on the nodes import this module.
"""

import contextlib
import socket
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from ca2st.durable import write_bytes
from ca2st.errors import EnvironmentFault
from ray_jobs.doctor.finding import Finding

_REACH_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeReport:
    """What a node says of itself."""

    findings: tuple[Finding, ...]
    versions: Mapping[str, str]
    """Of Python and the packages that were asked for, as far as they are installed."""
    num_gpus: int
    """CUDA devices that torch sees; 0 where it cannot be imported."""


def examine_node(packages: Sequence[str]) -> NodeReport:
    """Try all that a training needs of the machine this is called on; what is missing there is a finding.

    `packages`: whose versions are asked.
    """
    from ray_jobs.doctor.examination import examine, machine_checks
    from ray_jobs.doctor.libraries import installed_versions
    from ray_jobs.doctor.machine import check_folder
    from ray_jobs.every_node import this_node

    node = this_node().name
    folder = partial(check_folder, "disk temporary", Path(tempfile.gettempdir()))
    findings = examine({**machine_checks(), "disk temporary": folder})
    return NodeReport(
        findings=tuple(replace(finding, node=node) for finding in findings),
        versions=installed_versions(packages),
        num_gpus=_num_gpus(),
    )


def _num_gpus() -> int:
    try:
        import torch

        return torch.cuda.device_count()
    except Exception:  # noqa: BLE001 - a broken torch may raise anything; its own check tells what
        return 0


def write_token(folder: str, token: str) -> str:
    """Write this node's file into `folder`; why it cannot, or an empty string."""
    from ray_jobs.every_node import this_node

    if not Path(folder).is_dir():
        return "no such folder"
    try:
        write_bytes(_token_file(folder, token, this_node().node_id), token.encode())
    except (OSError, EnvironmentFault) as error:
        return str(error)
    return ""


def unseen_tokens(folder: str, token: str, node_ids: Sequence[str]) -> list[str]:
    """Those of `node_ids` whose files cannot be read here within some seconds."""
    from ray_jobs.ray_train.node_check import sees

    return [node_id for node_id in node_ids if not sees(_token_file(folder, token, node_id), token)]


def remove_token(folder: str, token: str) -> None:
    """Remove this node's file, if it is there."""
    from ray_jobs.every_node import this_node

    with contextlib.suppress(OSError):
        _token_file(folder, token, this_node().node_id).unlink()


def _token_file(folder: str, token: str, node_id: str) -> Path:
    return Path(folder) / f".ca2st-doctor-{token}-{node_id}"


class Door:
    """A port that is open on a node as long as this lives, and the node's clock."""

    def __init__(self) -> None:
        self._socket: socket.socket | None = None

    def open(self) -> tuple[str, int]:
        """Listen on a free port of the address that the cluster knows this node by."""
        from ray_jobs.every_node import this_node

        self._socket = socket.create_server((this_node().address, 0))
        address, port = self._socket.getsockname()
        return address, port

    def seconds(self) -> float:
        """Seconds since 1970 by this node's clock."""
        return time.time()

    def out_of_reach(self, doors: Mapping[str, tuple[str, int]]) -> dict[str, str]:
        """Those of `doors`, by node, that cannot be entered from here, and why."""
        found = {}
        for node, door in doors.items():
            try:
                socket.create_connection(door, timeout=_REACH_SECONDS).close()
            except OSError as error:
                found[node] = f"{door[0]}:{door[1]} {error.strerror or error}"
        return found
