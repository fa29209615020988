"""P12: three epochs with everything on, and nothing grows. Outside CI: ``pytest -m soak``."""

import ctypes
import gc
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import fsspec
import numpy as np
import pytest

from ca2st.spec import ClipSpec
from pipelines.augment.boxes import ErasingConfig
from pipelines.augment.mixing import MixingConfig
from pipelines.augment.spectrogram import SpectrogramConfig
from pipelines.config import LoaderConfig, TrainSetup
from pipelines.loader import TrainLoader
from pipelines.views import AugmentConfig
from sharding.format.remote import StorageConfig
from sharding.format.shard_set import ShardSet, read_shard_set
from support.fake_shards import make_samples, make_shard_set
from support.flaky_storage import put_in_memory

SAMPLES, BATCH, EPOCHS = 1600, 16, 3
MOST_MB_PER_1000_SAMPLES = 1.0
EVERYTHING = AugmentConfig(
    rand_augment="rand-m7-n4-mstd0.5-inc1",
    erasing=ErasingConfig(probability=0.5),
    spectrogram=SpectrogramConfig(time_masks=2, time_mask_rows=20, frequency_masks=2, roll_rows=5, noise_std=0.1),
    mixing=MixingConfig(probability=0.9, switch_probability=0.5),
)


@dataclass(frozen=True)
class Held:
    """What the process holds at a moment."""

    samples: int
    resident_mb: float
    shared_mb: float
    descriptors: int
    threads: int


def held(samples: int) -> Held:
    """Now, after the allocator has given back what nobody uses: what it keeps for itself is no growth."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    kilobytes = {name: int(lines[name].split()[0]) for name in ("VmRSS", "RssShmem")}
    return Held(
        samples=samples,
        resident_mb=kilobytes["VmRSS"] / 1024,
        shared_mb=kilobytes["RssShmem"] / 1024,
        descriptors=len(list(Path("/proc/self/fd").iterdir())),
        threads=threading.active_count(),
    )


@pytest.fixture(scope="module")
def local_set(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    samples = make_samples(SAMPLES, num_frames=12)
    return make_shard_set(tmp_path_factory.mktemp("soak"), samples, samples_per_shard=50)


@pytest.fixture(params=["local files", "a server and a cache of a third"])
def shard_set(request: pytest.FixtureRequest, local_set: ShardSet, tmp_path: Path) -> Iterator[ShardSet]:
    if request.param == "local files":
        yield local_set
        return
    url = f"memory://soak-{os.getpid()}/set"
    put_in_memory(local_set.root, url)
    whole = sum(shard.bytes + shard.index_bytes for shard in local_set.shards)
    yield read_shard_set(url, storage=StorageConfig(cache_dir=str(tmp_path / "cache"), cache_bytes=whole // 3))
    fsspec.filesystem("memory").rm(f"/soak-{os.getpid()}", recursive=True)


def watched_epochs(loader: TrainLoader) -> list[Held]:
    """What is held after every tenth batch of each epoch, behind one epoch in which caches fill."""
    seen: list[Held] = []
    for epoch in range(1 + EPOCHS):
        for number, batch in enumerate(loader.batches(epoch)):
            assert batch.num_clips == BATCH
            if epoch and number % 10 == 0:
                seen.append(held((epoch - 1) * SAMPLES + number * BATCH))
    return seen


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_p12_three_epochs_with_everything_on_grow_by_nothing(
    shard_set: ShardSet, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    clip = ClipSpec(num_frames=4, crop_size=32, mel_rows=64)
    index_bytes = 3 * shard_set.shards[0].index_bytes  # so small that indexes come and go
    config = LoaderConfig(
        backend="auto", verify="sha256", shuffle_block=100, num_lanes=4, index_cache_bytes=index_bytes
    )
    before = held(0)
    setup = TrainSetup(
        shard_sets=[shard_set],
        clip=clip,
        targets=("label",),
        augment=EVERYTHING,
        loader=config,
        seed=0,
        global_batch_size=BATCH,
    )
    with TrainLoader(setup) as loader:
        seen = watched_epochs(loader)
    samples = np.array([moment.samples for moment in seen])
    resident = np.array([moment.resident_mb for moment in seen])
    slope = 1000 * float(np.polyfit(samples, resident, 1)[0])
    with capsys.disabled():
        print(
            f"\n{request.node.name}: {slope:+.3f} MB per 1000 samples over {EPOCHS * SAMPLES} samples "
            f"({resident[0]:.0f} to {resident[-1]:.0f} MB)"
        )
    assert slope < MOST_MB_PER_1000_SAMPLES
    assert max(moment.shared_mb for moment in seen) - seen[0].shared_mb < 1
    # Open shards come and go below their bound: the last epoch holds no more than the first.
    first, last = (seen[part * len(seen) // EPOCHS : (part + 1) * len(seen) // EPOCHS] for part in (0, EPOCHS - 1))
    assert max(moment.descriptors for moment in last) <= max(moment.descriptors for moment in first) + 1
    assert max(moment.threads for moment in last) <= max(moment.threads for moment in first)
    after = held(0)
    assert after.descriptors <= before.descriptors + 2
    assert after.threads == before.threads
