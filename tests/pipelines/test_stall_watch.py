"""P8: a loader whose threads hang or vanish ends with a named error in time; one that is slow goes on."""

import subprocess
import sys
import threading
import time
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from ca2st.errors import UserInputError
from ca2st.spec import ClipSpec
from pipelines.config import LoaderConfig, TrainSetup
from pipelines.errors import LoaderStalledError
from pipelines.loader import TrainLoader
from pipelines.storage.shard_files import OpenShard, ShardFiles
from pipelines.threads import LoaderThreads, StallWatch, StatsRecorder, prefetched
from sharding.format.shard_set import ShardEntry, ShardSet
from support.fake_shards import make_samples, make_shard_set


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """Closed until the test is over: what waits for it hangs, and is let go afterwards."""
    event = threading.Event()
    yield event
    event.set()


def make_loader(shard_set: ShardSet, clip: ClipSpec, **loader: object) -> TrainLoader:
    config = LoaderConfig(backend="reference", **loader)  # type: ignore[arg-type]
    return TrainLoader(
        TrainSetup(shard_sets=[shard_set], clip=clip, targets=("label",), loader=config, seed=0, global_batch_size=2)
    )


def test_p8_a_read_that_never_returns_ends_the_run_with_its_stage_and_sample(
    fresh_set: ShardSet, clip: ClipSpec, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, calls = OpenShard.read, iter(range(1000))

    def read_then_hang(self: OpenShard, offset: int, size: int) -> bytes:
        if next(calls) >= 8:
            gate.wait()
        return read(self, offset, size)

    monkeypatch.setattr(OpenShard, "read", read_then_hang)
    began = time.monotonic()
    with (
        make_loader(fresh_set, clip, stall_timeout_seconds=0.5) as loader,
        pytest.raises(
            LoaderStalledError, match=r"fetch for \d\.\d s \(ca2st-\d+\.tar, sample .+\) in clip-fetch_"
        ) as e,
    ):
        list(loader.batches(0))
    assert time.monotonic() - began < 10
    assert "raised by the loader of rank 0 of 1" in e.value.__notes__
    assert e.value.exit_code == 4


def test_p8_a_decoder_that_hangs_is_named_and_closing_does_not_wait_for_it(
    fresh_set: ShardSet, clip: ClipSpec, gate: threading.Event
) -> None:
    loader = make_loader(fresh_set, clip, stall_timeout_seconds=0.3)
    backend = loader._backend

    def hang(requests: object) -> None:
        with loader._stats.timed("decode_seconds"):
            gate.wait()

    backend.render = hang  # type: ignore[method-assign, assignment]
    with pytest.raises(LoaderStalledError, match=r"it hangs in: decode for \d\.\d s in clip-render_"):
        next(loader.batches(0))
    began = time.monotonic()
    loader.close()
    assert time.monotonic() - began < 1


def test_p8_closing_a_loader_early_does_not_wait_for_a_file_whose_opening_hangs(
    tmp_path: Path, clip: ClipSpec, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard_set = make_shard_set(tmp_path, make_samples(12, num_frames=4), samples_per_shard=1)
    with make_loader(shard_set, clip) as loader:
        first = {f"ca2st-{int(key.rpartition('-')[2]):06d}.tar" for key in next(loader.batches(0)).sample_ids}
    open_shard, opened, hangs = ShardFiles._open_checked, set[str](), threading.Event()

    def open_or_hang(self: ShardFiles, shard: ShardEntry) -> int:
        if first <= opened:  # one file is opened at a time
            hangs.set()
            gate.wait()
        opened.add(shard.name)
        return open_shard(self, shard)

    monkeypatch.setattr(ShardFiles, "_open_checked", open_or_hang)
    loader = make_loader(shard_set, clip, stall_timeout_seconds=0.5, prefetch_steps=1)
    batches = loader.batches(0)
    next(batches)
    assert hangs.wait(5)
    closing = threading.Thread(target=loader.close, daemon=True)
    closing.start()
    closing.join(5)
    assert not closing.is_alive()


def test_p8_a_thread_that_ends_without_a_result_is_noticed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LoaderThreads, "_run", lambda self: None)
    watch = StallWatch(StatsRecorder(), timeout_seconds=2.0)
    began = time.monotonic()
    with pytest.raises(LoaderStalledError, match="its thread has ended without a result"):
        next(prefetched((i for i in range(3)), 2, watch=watch))
    assert time.monotonic() - began < 2


def test_p8_slow_is_not_stalled_while_stages_go_on_ending() -> None:
    stats = StatsRecorder()

    def slow() -> Generator[int, None, None]:
        for _ in range(12):
            with stats.timed("fetch_seconds"):
                time.sleep(0.05)
        yield 1

    watch = StallWatch(stats, timeout_seconds=0.3)
    assert list(prefetched(slow(), 1, watch=watch)) == [1]
    assert not watch.has_tripped


def test_p8_a_process_with_a_hanging_read_still_ends() -> None:
    script = """
import threading, sys
from pipelines.threads import LoaderThreads, StallWatch, prefetched
from pipelines.threads import StatsRecorder
stats = StatsRecorder()
def source():
    pool = LoaderThreads("clip-fetch", 2)
    yield pool.submit(threading.Event().wait).result()
try:
    next(prefetched(source(), 1, watch=StallWatch(stats, timeout_seconds=0.2)))
except Exception as error:
    sys.exit(type(error).__name__)
"""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.strip() == "LoaderStalledError"


def test_fetch_threads_carry_results_and_errors() -> None:
    pool = LoaderThreads("clip-fetch", 2)
    good, bad = pool.submit(pow, 2, 5), pool.submit(int, "x")
    assert good.result() == 32
    with pytest.raises(ValueError, match="invalid literal"):
        bad.result()
    before = threading.active_count()
    pool.close()
    assert threading.active_count() == before - 2


def test_closing_drops_calls_that_wait(gate: threading.Event) -> None:
    pool = LoaderThreads("clip-fetch", 1)
    running = threading.Event()

    def block() -> None:
        running.set()
        gate.wait()

    first, second = pool.submit(block), pool.submit(pow, 1, 1)
    assert running.wait(5)
    threading.Timer(0.1, gate.set).start()
    pool.close()
    assert first.done()
    assert second.cancelled()


def test_a_stall_timeout_of_nothing_is_refused() -> None:
    with pytest.raises(UserInputError, match=r"loader\.stall_timeout_seconds: expected > 0, found 0"):
        LoaderConfig(stall_timeout_seconds=0.0)
