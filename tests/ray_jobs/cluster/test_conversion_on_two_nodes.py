"""Conversion on two Ray nodes with addresses of their own, whose workers are killed again and again (C1)."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sharding.conversion import convert
from support.ray_nodes import NEEDED, Network, ray_network, why_no_namespaces
from support.shards import file_hashes, small_clips, small_config
from support.stub_jobs import WAS_KILLED

WHY_NOT = why_no_namespaces()
pytestmark = [
    pytest.mark.skipif(WHY_NOT is not None and not NEEDED, reason=f"network namespaces: {WHY_NOT}"),
    pytest.mark.timeout(580),
]
CONVERT = """
import sys
from functools import partial
from pathlib import Path
from ca2st.durable import FaultPoints
from ray_jobs.cluster.conversion import joined_pool
from ray_jobs.cluster.ray_access import found_access, ray_session
from sharding.conversion import convert
from support.shards import sample, small_config, source_list
from support.stub_jobs import kill_the_worker_once_at_each
media, out, num_clips, address, fault = sys.argv[1:]
source = source_list([sample(Path(media) / f"clip_{n}.mp4", label=n % 2) for n in range(int(num_clips))])
with ray_session(address, access=found_access(accept_open=False), num_cpus=None):
    convert(source, Path(out), small_config(), faults=FaultPoints.parse(fault), encode=kill_the_worker_once_at_each,
            pool=lambda setup, _: joined_pool(source, None, setup))
"""


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    assert WHY_NOT is None, f"network namespaces are needed here: {WHY_NOT}"
    with ray_network() as network:
        network.add_machine()
        network.add_machine()
        yield network


def run(network: Network, media: Path, out: Path, num_clips: int, fault: str = "") -> "subprocess.Popen[bytes]":
    arguments = (str(media), str(out), str(num_clips), network.ray_address, fault)
    with out.with_suffix(".log").open("ab") as log:
        return network.head.popen([sys.executable, "-c", CONVERT, *arguments], stdout=log)


@pytest.mark.parametrize(
    ("num_kills", "num_made"),
    [pytest.param(6, 1, marks=pytest.mark.cluster), pytest.param(30, 5, marks=pytest.mark.soak)],
)
def test_c1_two_nodes_whose_workers_are_killed_again_and_again_and_their_driver_once_write_the_undisturbed_bytes(
    network: Network, tmp_path: Path, num_kills: int, num_made: int
) -> None:
    """As many clips as kills; the driver dies when it has `num_made` shards of two clips each."""
    media, out = tmp_path / "media", tmp_path / "there"
    source = small_clips(media, num_kills)
    convert(source, tmp_path / "here", small_config())
    first = run(network, media, out, num_kills, f"made:{num_made}")
    first.wait(timeout=280)
    log = out.with_suffix(".log")
    assert not (out / "manifest.json").exists(), log.read_text()
    done = {name: digest for name, digest in file_hashes(out).items() if name.endswith(".tar")}
    assert len(done) >= num_made, log.read_text()
    assert done.items() <= file_hashes(tmp_path / "here").items()
    second = run(network, media, out, num_kills)
    assert second.wait(timeout=280) == 0, log.read_text()
    assert file_hashes(out) == file_hashes(tmp_path / "here")
    modes = [path.stat().st_mode & 0o777 for path in media.iterdir()]
    assert modes == [WAS_KILLED] * num_kills, "each clip has killed the worker that met it first"
