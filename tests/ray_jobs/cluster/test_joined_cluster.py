"""With a real Ray on this machine: conversion by its workers, and the doctor's examination of its node."""

import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import pytest

from ca2st.durable import FaultPoints
from ca2st.errors import EnvironmentFault, UserInputError
from ray_jobs.cluster.conversion import joined_pool
from ray_jobs.cluster.node_check import examine_cluster
from ray_jobs.cluster.ray_access import (
    LOCAL,
    RayAccess,
    ask_every_node,
    has_dashboard,
    living_nodes,
    ray_session,
    this_node,
)
from sharding.conversion import convert
from sharding.settings import RejectBudget
from sharding.shard_task import ShardPool, ShardSetup
from sharding.source import SourceList
from support.media import Sound, make_clip
from support.processes import python_path
from support.shards import file_hashes, sample, small_config, source_list
from support.stub_jobs import WAS_KILLED, kill_the_worker, kill_the_worker_once_at_b

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(580)]


@pytest.fixture(scope="module", autouse=True)
def _session() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", python_path())
        with ray_session(LOCAL, access=RayAccess(), num_cpus=2):
            yield


def one_pool(source: SourceList, setup: ShardSetup, _num_tasks: int) -> AbstractContextManager[ShardPool]:
    return joined_pool(source, 2, setup)


def test_conversion_by_ray_gives_the_bytes_of_a_local_one_though_a_worker_is_killed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "media").mkdir(mode=0o755)
    samples = []
    for number, name in enumerate(["a0", "a1", "b2", "a3", "c4", "c5", "c6"]):
        path = tmp_path / "media" / f"{name}.mp4"
        make_clip(path, seconds=(3 + number) / 30, size=(32, 32))
        samples.append(sample(path, label=number % 2))
    samples[4].path.write_bytes(b"no video at all")
    make_clip(samples[5].path, seconds=2.0, size=(32, 32), sound=Sound(seconds=2.0))
    source = source_list(samples)
    config = small_config(audio_policy="optional", max_rejects=RejectBudget(count=1))
    convert(source, tmp_path / "here", config)
    pool = partial(one_pool, source)
    report = convert(source, tmp_path / "there", config, pool=pool, encode=kill_the_worker_once_at_b)
    assert (tmp_path / "media").stat().st_mode & 0o777 == WAS_KILLED
    assert "a conversion worker was lost while it made ca2st-000002.tar" in caplog.text
    assert (report.num_with_audio, dict(report.rejected)) == (1, {"not_a_video": 1})
    assert file_hashes(tmp_path / "there") == file_hashes(tmp_path / "here")
    # Finished: the same command again neither needs a pool nor changes anything.
    assert convert(source, tmp_path / "there", config, pool=pytest.fail).num_samples == 6


def test_a_clip_that_loses_three_workers_stops_the_conversion_and_is_no_reject(tmp_path: Path) -> None:
    make_clip(tmp_path / "b.mp4", seconds=0.1, size=(32, 32))
    source = source_list([sample(tmp_path / "b.mp4")])
    with pytest.raises(EnvironmentFault, match=r"ca2st-000000\.tar: 3 workers were lost while making it .*rerun"):
        convert(source, tmp_path / "out", small_config(), pool=partial(one_pool, source), encode=kill_the_worker)


def test_a_shard_that_cannot_be_written_ends_the_conversion_with_its_name(tmp_path: Path) -> None:
    make_clip(tmp_path / "a.mp4", seconds=0.1, size=(32, 32))
    source = source_list([sample(tmp_path / "a.mp4")])
    faults = FaultPoints(point="shard.written", kind="enospc")
    with pytest.raises(EnvironmentFault, match=r"cannot write .*ca2st-000000\.tar: No space left") as caught:
        convert(source, tmp_path / "out", small_config(), pool=partial(one_pool, source), faults=faults)
    assert "are still to come; rerun to go on" in caught.value.__notes__[0]


def test_j3_more_workers_than_the_cluster_has_cpus_are_refused(tmp_path: Path) -> None:
    make_clip(tmp_path / "a.mp4", seconds=0.1, size=(32, 32))
    source = source_list([sample(tmp_path / "a.mp4")])
    setup = ShardSetup(out=tmp_path, config=small_config(), source=source, identity={})
    with (
        pytest.raises(UserInputError, match="--workers 3: expected at most the cluster's 2 CPUs"),
        joined_pool(source, 3, setup),
    ):
        pytest.fail("opened")


def test_every_node_is_asked_and_one_that_fails_is_named() -> None:
    (node,) = living_nodes()
    assert node == this_node()
    assert ask_every_node(os.path.basename, "/a/b", nodes=[node]) == ({node: "b"}, {})
    for _ in range(100):  # Ray aborts this process when a task is cancelled that failed a moment ago
        found, failed = ask_every_node(os.path.getsize, "/no/such/file", nodes=[node])
        assert not found
        assert failed[node].startswith("FileNotFoundError: ")
    assert not has_dashboard()
    late = ask_every_node(lambda: time.sleep(60.0), nodes=[node], timeout_seconds=2)
    assert late == ({}, {node: "no answer within 2 s"})


def test_the_doctor_examines_the_node_and_what_it_shares(tmp_path: Path) -> None:
    findings = {one.name: one for one in examine_cluster([str(tmp_path), "/no/such/folder"])}
    (node,) = living_nodes()
    assert {one.node for one in findings.values()} == {None, node.name}
    assert not {name: one.what for name, one in findings.items() if one.needed and not one.ok}.keys() ^ {
        "storage /no/such/folder"
    }
    assert findings[f"storage {tmp_path}"].what == "written, and read what all others wrote"
    assert findings["ray token"].ok
    assert findings["network"].what == "reaches all 1 on a free port"
    assert list(tmp_path.iterdir()) == []
