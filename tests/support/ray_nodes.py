"""Several Ray nodes on one machine, each in a network namespace with an address of its own.

The namespaces hang on one bridge, like machines on a switch. They share the machine's files, which stand for the
shared storage of a cluster. Nodes are started by the project's own script for users.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from support.processes import environment_without_ray, python_path

START_NODE = Path(__file__).parents[2] / "ray_jobs" / "cluster" / "start_node.sh"
SUBNET = "10.213.77"
PORT = 6379
PREFIX = "ca2st-"
"""Of namespaces and folders; the process that made them follows."""
WITH_HOSTS = 'mount --bind "$0" /etc/hosts && exec "$@"'
"""Names for the addresses, seen on the machine alone: torch asks for them, and would wait for a name server."""

ANNOUNCE = """
import sys, ray
from ray.scripts.scripts import cli
cluster, address, seconds = sys.argv[1:]
ray.init(cluster)
(node,) = (node["NodeID"] for node in ray.nodes() if node["Alive"] and node["NodeManagerAddress"] == address)
cli(["drain-node", "--address", cluster, "--node-id", node, "--reason", "DRAIN_NODE_REASON_PREEMPTION",
     "--reason-message", "taken back", "--deadline-remaining-seconds", seconds])
"""
"""Run on the head with the cluster's address, the node's address and the seconds it has left."""


NEEDED = os.environ.get("CA2ST_REQUIRE_NAMESPACES") == "1"
"""In CI a test that needs namespaces fails where there are none; elsewhere it is skipped."""


def why_no_namespaces() -> str | None:
    """Why this machine cannot have network namespaces of ours; None where it can."""
    if shutil.which("ip") is None:
        return "no `ip` on PATH; install iproute2"
    name = f"{PREFIX}{os.getpid()}-try"
    tried = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if tried.returncode != 0:
        return f"no network namespace (needs root with CAP_NET_ADMIN and CAP_SYS_ADMIN): {tried.stderr.strip()}"
    bridge = subprocess.run(
        ["ip", "-n", name, "link", "add", "br0", "type", "bridge"], capture_output=True, text=True, check=False
    )
    _ip("netns", "del", name)
    return None if bridge.returncode == 0 else f"no network bridge: {bridge.stderr.strip()}"


@dataclass
class Machine:
    """A network namespace with one interface, and the Ray node in it."""

    name: str
    """The namespace."""
    address: str
    port_name: str
    """The switch's end of its cable."""
    switch: str
    folder: Path
    environment: Mapping[str, str]
    started: list["subprocess.Popen[bytes]"] = field(default_factory=list)

    def start_ray(self, *arguments: str, num_cpus: int = 1) -> None:
        """Start a Ray node by the users' script; returns when it has joined."""
        settings = {
            "NODE_IP": self.address,
            "NUM_CPUS": str(num_cpus),
            "TEMP_DIR": str(self.folder),
            "DASHBOARD": "false",
        }
        log = self.folder / "start.log"
        self.folder.mkdir(exist_ok=True)
        with log.open("wb") as out:
            node = self.popen([str(START_NODE), *arguments], settings, stdout=out)
        deadline = time.monotonic() + 90
        while "Ray runtime started" not in log.read_text():
            if node.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{self.name}: no Ray node:\n{log.read_text()}")
            time.sleep(0.1)

    def popen(
        self, command: list[str], environment: Mapping[str, str] | None = None, *, stdout: IO[bytes] | None = None
    ) -> "subprocess.Popen[bytes]":
        """Start `command` in the namespace; its standard error goes where `stdout` goes."""
        process = subprocess.Popen(
            ["ip", "netns", "exec", self.name, "sh", "-c", WITH_HOSTS, str(self.folder.parent / "hosts"), *command],
            env=environment_without_ray() | dict(self.environment) | dict(environment or {}),
            stdout=stdout,
            stderr=subprocess.STDOUT,
        )
        self.started.append(process)
        return process

    def kill(self) -> None:
        """End every process of the machine at once, as a power cut does."""
        _kill_all_in(self.name)
        for process in self.started:
            process.wait()

    def cut(self) -> None:
        """Pull its cable at the switch: packets vanish, and both ends see a link that is up."""
        _ip("-n", self.switch, "link", "set", self.port_name, "nomaster")

    def repair(self) -> None:
        """Put the cable back."""
        _ip("-n", self.switch, "link", "set", self.port_name, "master", "br0")

    def has_stopped_processes(self) -> bool:
        """Whether a process on the machine stands still, as by SIGSTOP."""
        return any(_stands_still(pid) for pid in _pids_in(self.name))

    def continue_stopped_processes(self) -> None:
        """Let every process that stands still go on."""
        for pid in filter(_stands_still, _pids_in(self.name)):
            os.kill(pid, signal.SIGCONT)


@dataclass
class Network:
    """A switch and the machines on it."""

    switch: str
    folder: Path
    environment: Mapping[str, str]
    machines: list[Machine] = field(default_factory=list)

    @property
    def head(self) -> Machine:
        return self.machines[0]

    @property
    def ray_address(self) -> str:
        return f"{self.head.address}:{PORT}"

    def announce_end(self, machine: Machine, *, seconds: int) -> None:
        """Tell the cluster that `machine` will be taken away, as clouds do with machines that they lend cheaply."""
        log = self.folder / "drain.log"
        command = [sys.executable, "-c", ANNOUNCE, self.ray_address, machine.address, str(seconds)]
        with log.open("wb") as out:
            if self.head.popen(command, stdout=out).wait(timeout=90) != 0:
                raise RuntimeError(log.read_text())

    def worker(self) -> Machine:
        """The newest machine beside the head if its node lives, else one more."""
        newest = self.machines[-1]
        lives = newest is not self.head and newest.started[-1].poll() is None
        return newest if lives else self.add_machine()

    def add_machine(self, environment: Mapping[str, str] | None = None) -> Machine:
        """Connect one more machine; the first one is the cluster's head and starts a Ray cluster.

        `environment`: for this machine alone.
        """
        number = len(self.machines) + 1
        name, port_name = f"{self.switch}-{number}", f"port{number}"
        machine = Machine(
            name,
            f"{SUBNET}.{number}",
            port_name,
            self.switch,
            self.folder / str(number),
            {**self.environment, **(environment or {})},
        )
        _ip("netns", "add", name)
        self.machines.append(machine)
        _ip("-n", name, "link", "add", "eth0", "type", "veth", "peer", "name", port_name, "netns", self.switch)
        _ip("-n", self.switch, "link", "set", port_name, "master", "br0", "up")
        _ip("-n", name, "addr", "add", f"{machine.address}/24", "dev", "eth0")
        for interface in ("lo", "eth0"):
            _ip("-n", name, "link", "set", interface, "up")
        # Leads nowhere; programs find their own address by asking for a route to the outside.
        _ip("-n", name, "route", "add", "default", "via", f"{SUBNET}.254")
        machine.start_ray(*(("head",) if number == 1 else ("worker", self.ray_address)))
        return machine


@contextmanager
def ray_network(environment: Mapping[str, str] | None = None) -> Iterator[Network]:
    """A switch without machines; at the end every process on it is killed and every trace removed.

    `environment`: for all processes on the network, beside the token of this cluster.
    """
    _sweep()
    folder = Path(tempfile.gettempdir()) / f"{PREFIX}{os.getpid()}"  # short: a socket's path has at most 107 characters
    folder.mkdir()
    # Torch asks for the addresses mapped to IPv6.
    names = [f"{mapped}{SUBNET}.{number} machine-{number}" for number in range(1, 10) for mapped in ("", "::ffff:")]
    (folder / "hosts").write_text("\n".join([Path("/etc/hosts").read_text(), *names, ""]))
    settings = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": python_path(),
    }
    network = Network(folder.name, folder, {**settings, **(environment or {})})
    _ip("netns", "add", network.switch)
    try:
        _ip("-n", network.switch, "link", "add", "br0", "type", "bridge")
        _ip("-n", network.switch, "addr", "add", f"{SUBNET}.254/24", "dev", "br0")
        _ip("-n", network.switch, "link", "set", "br0", "up")
        yield network
    finally:
        for machine in reversed(network.machines):
            machine.kill()
            _ip("netns", "del", machine.name)
        _ip("netns", "del", network.switch)
        shutil.rmtree(folder)


def _sweep() -> None:
    """Remove what a killed test run has left."""
    for line in _ip("netns", "list").splitlines():
        name = line.split()[0]
        owner = name.removeprefix(PREFIX).partition("-")[0]
        if name.startswith(PREFIX) and not Path("/proc", owner).exists():
            _kill_all_in(name)
            _ip("netns", "del", name)
            shutil.rmtree(Path(tempfile.gettempdir()) / f"{PREFIX}{owner}", ignore_errors=True)


def _kill_all_in(namespace: str) -> None:
    while pids := _pids_in(namespace):
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def _pids_in(namespace: str) -> list[int]:
    return [int(pid) for pid in _ip("netns", "pids", namespace).split()]


def _stands_still(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2]
    except (FileNotFoundError, ProcessLookupError):
        return False  # ended meanwhile
    return state.startswith("T")


def _ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], capture_output=True, text=True, check=True).stdout
