from pathlib import Path

import pytest

from ca2st.spec import ClipSpec
from sharding.format.shard_set import ShardSet
from support.fake_shards import FakeSample, make_samples, make_shard_set

SMALL_CLIP = ClipSpec(num_frames=8, crop_size=32, mel_rows=64)


@pytest.fixture
def clip() -> ClipSpec:
    return SMALL_CLIP


@pytest.fixture(scope="session")
def intact_set(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """27 samples in 7 shards, read-only: every third without audio, one of a single frame, two of other lengths."""
    samples = make_samples(27)
    for i in range(0, 27, 3):
        samples[i] = FakeSample(key=samples[i].key, labels=samples[i].labels, seed=i, mel_rows=0)
    samples[4] = FakeSample(key="single-frame", labels=(2,), num_frames=1, mel_rows=3)
    samples[7] = FakeSample(key="long", labels=(1,), num_frames=70)
    return make_shard_set(tmp_path_factory.mktemp("intact"), samples)


@pytest.fixture
def fresh_set(tmp_path: Path) -> ShardSet:
    """8 samples in 2 shards, to be damaged."""
    return make_shard_set(tmp_path / "set", make_samples(8, num_frames=12))
