"""Which nodes may convert: those that see the media and write the same bytes (J2, J4, J5)."""

from dataclasses import replace
from pathlib import Path

import pytest

from ray_jobs.cluster.conversion import Probe, probe_of, refuse_other_clips, try_clips
from ray_jobs.cluster.node_check import NodeFacts
from sharding.errors import UnlikeNodeError
from support.media import make_clip
from support.shards import sample, small_clips, small_config, source_list


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> Probe:
    return probe_of(small_clips(tmp_path_factory.mktemp("media"), 3), small_config())


@pytest.fixture(scope="module")
def here(probe: Probe) -> NodeFacts:
    return try_clips(probe)


def test_a_probe_is_spread_over_the_files_that_are_there(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number:03d}.mp4" for number in range(100)]
    for path in paths[1:]:
        path.write_bytes(b"x")
    found = probe_of(source_list([sample(path) for path in paths]), small_config())
    assert found.paths[0] == paths[1]
    assert found.paths[-1] >= paths[85]
    assert 10 <= len(found.paths) <= 16
    assert [job.path for job in found.jobs] == [found.paths[0], found.paths[len(found.paths) // 2 + 1]]


def test_the_same_machine_makes_the_same_of_a_probe_twice(probe: Probe, here: NodeFacts) -> None:
    assert [len(clip) for clip in here.clips] == [64, 64]
    assert here.data == {str(path): f"{path.stat().st_size} bytes" for path in probe.paths}
    refuse_other_clips(probe, here, {"10.0.0.2 (ab)": try_clips(probe), "10.0.0.3 (cd)": here})


def test_another_picture_is_another_hash(probe: Probe, here: NodeFacts, tmp_path: Path) -> None:
    make_clip(tmp_path / "other.mp4", seconds=0.2, size=(32, 32))
    other = try_clips(replace(probe, jobs=(replace(probe.jobs[0], path=tmp_path / "other.mp4"), probe.jobs[1])))
    assert other.clips[0] != here.clips[0]
    assert other.clips[1] == here.clips[1]


def test_j2_a_node_that_does_not_see_the_media_is_named(probe: Probe, here: NodeFacts) -> None:
    first = str(probe.paths[0])
    blind = replace(here, data={first: here.data[first]}, clips=("missing_file: x", "missing_file: x"))
    with pytest.raises(UnlikeNodeError) as refusal:
        refuse_other_clips(probe, here, {"10.0.0.2 (ab)": here, "10.0.0.3 (cd)": blind})
    assert "found 1 that do not" in str(refusal.value)
    assert f"  10.0.0.3 (cd)  cannot read {probe.paths[1]} (2 of 3 tried)\n" in str(refusal.value)
    assert "10.0.0.2" not in str(refusal.value)


def test_j4_a_node_with_another_copy_of_the_media_is_named(probe: Probe, here: NodeFacts) -> None:
    first, size = str(probe.paths[0]), probe.paths[0].stat().st_size
    other = replace(here, data={**here.data, first: f"{size + 1} bytes"})
    with pytest.raises(UnlikeNodeError, match=rf"clip_0.mp4: {size + 1} bytes, here {size} bytes"):
        refuse_other_clips(probe, here, {"10.0.0.2 (ab)": other})


def test_j5_nodes_with_other_versions_are_refused_with_a_line_each(probe: Probe, here: NodeFacts) -> None:
    older = replace(here, versions={**here.versions, "av": "1.0", "libavcodec": "3.2.1"})
    fewer = replace(here, versions={key: value for key, value in here.versions.items() if key != "torch"})
    with pytest.raises(UnlikeNodeError) as refusal:
        refuse_other_clips(probe, here, {"10.0.0.2 (ab)": older, "10.0.0.30 (cd)": fewer})
    now = here.versions
    assert str(refusal.value).splitlines()[1:3] == [
        f"  10.0.0.2 (ab)   av 1.0, here {now['av']}; libavcodec 3.2.1, here {now['libavcodec']}",
        f"  10.0.0.30 (cd)  torch none, here {now['torch']}",
    ]


def test_a_node_that_rounds_differently_under_equal_versions_is_refused(probe: Probe, here: NodeFacts) -> None:
    other = replace(here, clips=(here.clips[0], "f" * 64))
    with pytest.raises(UnlikeNodeError, match=r"clip_2.mp4 to other bytes under equal versions\nis the processor"):
        refuse_other_clips(probe, here, {"10.0.0.2 (ab)": other})
