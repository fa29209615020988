"""The loaders end to end on small shards. Row P10, and P13 at the end."""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ca2st.batch import ClipBatch
from ca2st.errors import UserInputError
from ca2st.spec import ClipSpec
from pipelines.augment.spectrogram import MEL_MEAN, MEL_SCALE
from pipelines.config import EvaluationSetup, LoaderConfig, TrainSetup
from pipelines.errors import LoaderClosedError, PlanError, SampleDamageError
from pipelines.loader import EvaluationLoader, TrainLoader
from pipelines.order.selection import PlanRecord
from pipelines.rendering import RenderRequest
from pipelines.views import EvaluationViews
from sharding.errors import ManifestError
from sharding.format.index import TICKS_PER_SECOND
from sharding.format.shard_set import LabelSpace, ShardSet, VideoParameters
from support.fake_shards import make_samples, make_shard_set, rewrite_manifest
from support.refusals import forced

BATCH, SEED = 8, 3
FAST = LoaderConfig(backend="reference", shuffle_block=4, fetch_threads=2)


def train_loader(shard_set: ShardSet, clip: ClipSpec, loader: LoaderConfig = FAST, **values: Any) -> TrainLoader:
    fields: dict[str, Any] = {"seed": SEED, "global_batch_size": BATCH, "rank": 0, "world_size": 1} | values
    return TrainLoader(TrainSetup(shard_sets=[shard_set], clip=clip, targets=("label",), loader=loader, **fields))


def evaluation_loader(
    shard_set: ShardSet, clip: ClipSpec, views: EvaluationViews | None = None, **values: Any
) -> EvaluationLoader:
    fields: dict[str, Any] = {"global_batch_size": BATCH, "views": views or EvaluationViews(), "loader": FAST} | values
    return EvaluationLoader(EvaluationSetup(shard_set=shard_set, clip=clip, targets=("label",), **fields))


@pytest.fixture(scope="module")
def epochs(intact_set: ShardSet) -> list[list[ClipBatch]]:
    """Epochs 0 and 3, read on one rank: what every other way of reading must equal."""
    clip = ClipSpec(num_frames=8, crop_size=32, mel_rows=64)
    with train_loader(intact_set, clip) as loader:
        return [list(loader.batches(0)), list(loader.batches(3))]


def assert_same(found: list[ClipBatch], expected: list[ClipBatch]) -> None:
    assert [batch.sample_ids for batch in found] == [batch.sample_ids for batch in expected]
    for ours, theirs in zip(found, expected, strict=True):
        for name in ("video", "mel", "intervals_seconds", "labels", "has_audio", "is_padding"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), name


# What a batch holds.


def test_a_batch_has_the_sizes_of_the_contract(epochs: list[list[ClipBatch]], intact_set: ShardSet) -> None:
    assert len(epochs[0]) == intact_set.manifest.num_samples // BATCH
    for batch in epochs[0]:
        assert batch.video.shape == (BATCH, 3, 8, 32, 32)
        assert batch.video.dtype == torch.uint8
        assert batch.video.is_contiguous()
        assert batch.mel.shape == (BATCH, 64, 128)
        assert batch.mel.dtype == torch.float32
        assert batch.intervals_seconds.shape == (BATCH, 5, 2)
        assert batch.labels.shape == (BATCH, 1)
        assert not batch.is_padding.any()


def test_labels_and_audio_masks_belong_to_their_samples(epochs: list[list[ClipBatch]], intact_set: ShardSet) -> None:
    for key, label, audio, mel in each(epochs[0], "labels", "has_audio", "mel"):
        if key.startswith("clip-"):
            number = int(key.removeprefix("clip-"))
            assert label.item() == number % 3
            assert bool(audio) == (number % 3 != 0)
        assert bool(audio) or not mel.any()


def each(batches: list[ClipBatch], *names: str) -> Iterator[tuple[Any, ...]]:
    for batch in batches:
        yield from zip(batch.sample_ids, *(getattr(batch, name) for name in names), strict=True)


def test_times_are_those_stored_and_the_spectrogram_starts_where_its_interval_says(
    epochs: list[list[ClipBatch]],
) -> None:
    seen = False
    for key, mel, intervals in each([*epochs[0], *epochs[1]], "mel", "intervals_seconds"):
        assert (intervals[1:, 1] >= intervals[1:, 0]).all()
        assert torch.allclose(intervals[0, 1] - intervals[0, 0], torch.tensor(0.64))
        ticks = intervals[1:] * TICKS_PER_SECOND / 3000
        assert torch.allclose(ticks, ticks.round(), atol=1e-3)
        if key == "long":
            first_row = round(intervals[0, 0].item() * 100)
            value = mel[0, 0] * MEL_SCALE + MEL_MEAN
            assert value.item() == pytest.approx(-first_row / 100, abs=2e-3)
            seen = True
    assert seen


def test_a_short_spectrogram_is_followed_by_zero_rows_normalised_like_the_others(
    epochs: list[list[ClipBatch]],
) -> None:
    mels = dict(each([*epochs[0], *epochs[1]], "mel"))
    mel = mels["single-frame"]
    assert torch.allclose(mel[:3, 0], (torch.tensor([0.0, -0.01, -0.02]) - MEL_MEAN) / MEL_SCALE, atol=1e-4)
    assert torch.allclose(mel[3:], torch.tensor(-MEL_MEAN / MEL_SCALE))


def test_frames_of_a_single_frame_clip_are_all_that_frame(epochs: list[list[ClipBatch]]) -> None:
    videos = dict(each([*epochs[0], *epochs[1]], "video"))
    video = videos["single-frame"]
    assert (video == video[:, :1]).all()


def test_several_targets_become_columns_in_the_order_asked(tmp_path: Any, clip: ClipSpec) -> None:
    samples = [replace(one, labels=(i % 2, i % 3)) for i, one in enumerate(make_samples(4, num_frames=4))]
    spaces = tuple(LabelSpace(name=name, classes=("a", "b", "c")) for name in ("verb", "noun"))
    shard_set = make_shard_set(tmp_path, samples, label_spaces=spaces, targets=("verb", "noun"))
    setup = EvaluationSetup(shard_set=shard_set, clip=clip, targets=("noun", "verb"), loader=FAST, global_batch_size=4)
    with EvaluationLoader(setup) as loader:
        (batch,) = loader.batches()
    numbers = [int(key[-1]) for key in batch.sample_ids]
    assert batch.labels.tolist() == [[n % 3, n % 2] for n in numbers]


# P10: the same numbers however they are read.


@pytest.mark.parametrize("first_step", [0, 1, 2, 3])
@pytest.mark.parametrize("which", [0, 1])
def test_p10_a_resumed_epoch_equals_the_rest_of_the_whole_one(
    epochs: list[list[ClipBatch]], intact_set: ShardSet, clip: ClipSpec, first_step: int, which: int
) -> None:
    epoch = (0, 3)[which]
    with train_loader(intact_set, clip) as loader:
        assert loader.steps_per_epoch == len(epochs[which]) == 3
        assert_same(list(loader.batches(epoch, first_step=first_step)), epochs[which][first_step:])


def test_p10_a_resume_of_a_resume_equals_the_whole(
    epochs: list[list[ClipBatch]], intact_set: ShardSet, clip: ClipSpec
) -> None:
    with train_loader(intact_set, clip) as loader:
        first = loader.batches(0)
        read = [next(first)]
        first.close()  # type: ignore[attr-defined]  # a generator
        second = loader.batches(0, first_step=1)
        read.append(next(second))
        del second
        read += loader.batches(0, first_step=2)
    assert_same(read, epochs[0])


@pytest.mark.parametrize(
    "values",
    [{"fetch_threads": 1, "prefetch_steps": 0}, {"fetch_threads": 7, "prefetch_steps": 5}, {"index_cache_bytes": 1}],
)
def test_p10_threads_prefetching_and_memory_change_nothing(
    epochs: list[list[ClipBatch]], intact_set: ShardSet, clip: ClipSpec, values: dict[str, Any]
) -> None:
    with train_loader(intact_set, clip, replace(FAST, **values)) as loader:
        assert_same(list(loader.batches(0)), epochs[0])


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_p10_any_world_size_reads_the_same_global_order_and_pixels(
    epochs: list[list[ClipBatch]], intact_set: ShardSet, clip: ClipSpec, world_size: int
) -> None:
    shares = []
    for rank in range(world_size):
        with train_loader(intact_set, clip, rank=rank, world_size=world_size) as loader:
            shares.append(list(loader.batches(3)))
    for step, expected in enumerate(epochs[1]):
        parts = [share[step] for share in shares]
        assert tuple(key for part in parts for key in part.sample_ids) == expected.sample_ids
        for name in ("video", "mel", "intervals_seconds", "labels"):
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(expected, name))


def test_p10_dali_resumes_to_the_same_pixels_with_other_threads(intact_set: ShardSet, clip: ClipSpec) -> None:
    with train_loader(intact_set, clip, replace(FAST, backend="dali", decode_threads=1)) as loader:
        assert loader.backend_name == "dali"
        whole = list(loader.batches(0))
    with train_loader(intact_set, clip, replace(FAST, backend="dali", decode_threads=3)) as loader:
        assert_same(list(loader.batches(0, first_step=1)), whole[1:])


def test_epochs_differ_in_order_and_in_views(epochs: list[list[ClipBatch]]) -> None:
    first, other = (dict(each(epoch, "video")) for epoch in epochs)
    assert [b.sample_ids for b in epochs[0]] != [b.sample_ids for b in epochs[1]]
    common = first.keys() & other.keys()
    assert all(not torch.equal(first[key], other[key]) for key in common)


def test_p11_the_record_names_what_the_order_depends_on(intact_set: ShardSet, clip: ClipSpec) -> None:
    with train_loader(intact_set, clip) as loader:
        assert loader.record == PlanRecord(
            seed=SEED,
            global_batch_size=BATCH,
            num_lanes=BATCH,
            shuffle_block=4,
            remainder="drop",
            manifest_fingerprint=intact_set.manifest.fingerprint,
        )
        with train_loader(intact_set, clip, rank=1, world_size=2) as other:
            assert loader.record == other.record


# Threads, errors, statistics.


def test_closing_an_iterator_early_ends_its_threads(intact_set: ShardSet, clip: ClipSpec) -> None:
    before = threading.active_count()
    with train_loader(intact_set, clip) as loader:
        batches = loader.batches(0)
        next(batches)
        assert threading.active_count() > before
        batches.close()  # type: ignore[attr-defined]  # a generator
        assert threading.active_count() == before


def test_closing_the_loader_ends_the_threads_of_open_iterators(intact_set: ShardSet, clip: ClipSpec) -> None:
    before = threading.active_count()
    with train_loader(intact_set, clip) as loader:
        batches = loader.batches(0)
        next(batches)
    assert threading.active_count() == before
    assert list(batches) == []
    with pytest.raises(LoaderClosedError, match="the loader is closed"):
        loader.batches(0)


def test_an_interrupt_while_reading_leaves_no_thread(intact_set: ShardSet, clip: ClipSpec) -> None:
    before = threading.active_count()

    def consume() -> None:
        with train_loader(intact_set, clip) as loader:
            for _ in loader.batches(0):
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        consume()
    assert threading.active_count() == before


def test_an_exhausted_iterator_leaves_no_thread_and_a_closed_loader_no_open_shard(
    intact_set: ShardSet, clip: ClipSpec
) -> None:
    before = threading.active_count()
    with train_loader(intact_set, clip) as loader:
        assert len(list(loader.batches(1))) == 3
        assert threading.active_count() == before
        assert len(open_shards(intact_set)) == 7
    assert open_shards(intact_set) == []


def open_shards(shard_set: ShardSet) -> list[Path]:
    """Shards of the set that this process holds open."""
    opened = [path.resolve() for path in Path("/proc/self/fd").iterdir()]
    return [path for path in opened if path.parent == shard_set.root.resolve()]


def test_stages_are_counted(intact_set: ShardSet, clip: ClipSpec) -> None:
    with train_loader(intact_set, clip) as loader:
        start = loader.stats
        list(loader.batches(0))
        stats = loader.stats - start
    assert (stats.steps, stats.views) == (3, 3 * BATCH)
    assert stats.bytes_read > 24 * 1000
    for name in ("fetch_seconds", "checksum_seconds", "decode_seconds", "augment_seconds", "wait_seconds"):
        assert getattr(stats, name) > 0, name


class Together:
    """Renders by the backend of a loader and counts calls that overlap; the first ends after the second, if it can."""

    def __init__(self, loader: TrainLoader, *, patience: float) -> None:
        backend = loader._backend
        self._render, self._patience, self._changed = backend.render, patience, threading.Condition()
        self._running, self.most, self.calls = 0, 0, 0
        backend.render = self.render  # type: ignore[method-assign]

    def render(self, requests: Sequence[RenderRequest]) -> torch.Tensor:
        with self._changed:
            self._running, self.calls = self._running + 1, self.calls + 1
            self.most = max(self.most, self._running)
            self._changed.notify_all()
            if self.calls == 1:
                self._changed.wait_for(lambda: self.calls >= 2 and self._running == 1, self._patience)
        views = self._render(requests)
        with self._changed:
            self._running -= 1
            self._changed.notify_all()
        return views


def test_two_batches_are_rendered_at_once_and_come_in_order_though_the_later_one_is_ready_first(
    intact_set: ShardSet, clip: ClipSpec, epochs: list[list[ClipBatch]]
) -> None:
    with train_loader(intact_set, clip) as loader:
        backend = Together(loader, patience=30.0)
        assert_same(list(loader.batches(0)), epochs[0])
    assert (backend.most, backend.calls) == (2, 3)


def test_without_batches_made_ahead_each_is_rendered_when_it_is_asked_for(
    intact_set: ShardSet, clip: ClipSpec, epochs: list[list[ClipBatch]]
) -> None:
    with train_loader(intact_set, clip, replace(FAST, prefetch_steps=0)) as loader:
        backend = Together(loader, patience=0.1)
        batches = loader.batches(0)
        first = next(batches)
        assert backend.calls == 1
        assert_same([first, *batches], epochs[0])
    assert (backend.most, backend.calls) == (1, 3)


def test_an_error_of_a_batch_that_is_rendered_beside_another_comes_after_that_one_and_ends_all_threads(
    intact_set: ShardSet, clip: ClipSpec
) -> None:
    before = threading.active_count()
    with train_loader(intact_set, clip) as loader:
        wanted = [batch.sample_ids for batch in loader.batches(0)]
        second = wanted[1][0]

        def failing(requests: Sequence[RenderRequest]) -> torch.Tensor:
            if bad := [request.where for request in requests if request.where.endswith(f"sample {second}")]:
                raise SampleDamageError(f"{bad[0]}: cannot be decoded")
            return render(requests)

        render = loader._backend.render
        loader._backend.render = failing  # type: ignore[method-assign]
        batches = loader.batches(0)
        assert next(batches).sample_ids == wanted[0]
        with pytest.raises(SampleDamageError, match=rf"sample {second}: cannot be decoded"):
            next(batches)
        assert threading.active_count() == before


# Refusals before the first step.


def test_p6_fewer_samples_than_a_batch_are_refused_with_the_three_numbers(intact_set: ShardSet, clip: ClipSpec) -> None:
    with pytest.raises(PlanError, match="27 samples, global_batch_size 32, world_size 4"):
        train_loader(intact_set, clip, global_batch_size=32, world_size=4)


@pytest.mark.parametrize(("epoch", "step"), [(-1, 0), (0, 4), (0, -1)])
def test_an_epoch_or_step_outside_the_run_is_refused_at_once(
    intact_set: ShardSet, clip: ClipSpec, epoch: int, step: int
) -> None:
    with train_loader(intact_set, clip) as loader:
        with pytest.raises(UserInputError, match=r"a first step within 0..3, found epoch"):
            loader.batches(epoch, first_step=step)


def test_a_target_the_set_does_not_have_is_refused(intact_set: ShardSet, clip: ClipSpec) -> None:
    for targets, error, message in (
        (("noun",), ManifestError, "label space 'noun': not in this set; it has label"),
        ((), UserInputError, "at least one label space"),
    ):
        setup = TrainSetup(
            shard_sets=[intact_set], clip=clip, targets=targets, loader=FAST, seed=0, global_batch_size=BATCH
        )
        with pytest.raises(error, match=message):
            TrainLoader(setup)


def test_a_codec_without_a_reader_is_refused(fresh_set: ShardSet, clip: ClipSpec) -> None:
    other = rewrite_manifest(fresh_set.root, fresh_set.shards, video=VideoParameters(codec="av1"))
    with pytest.raises(UserInputError, match=r"expected codec mjpeg or .*, found av1"):
        evaluation_loader(other, clip)


def test_another_number_of_mel_bins_is_refused(fresh_set: ShardSet, clip: ClipSpec) -> None:
    with pytest.raises(UserInputError, match="expected 64 mel bins, found 128"):
        evaluation_loader(fresh_set, replace(clip, num_mel_bins=64))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"backend": "dalli"}, r"loader.backend: expected one of auto, dali, reference, found 'dalli'.*'dali'"),
        ({"verify": "md5"}, "loader.verify: expected one of size, sha256"),
        ({"fetch_threads": 0}, "loader.fetch_threads: expected at least 1, found 0"),
        ({"prefetch_steps": -1}, "loader.prefetch_steps: expected at least 0, found -1"),
        ({"shuffle_block": 0}, "loader.shuffle_block: expected at least 1, found 0"),
    ],
)
def test_a_wrong_loader_configuration_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserInputError, match=message):
        forced(LoaderConfig(), **values)


# P13: an evaluation counts every sample once.


@pytest.mark.parametrize(("world_size", "batch"), [(1, 8), (2, 8), (3, 7), (4, 4), (2, 27)])
def test_p13_every_sample_is_scored_exactly_once_at_any_number_of_ranks(
    intact_set: ShardSet, clip: ClipSpec, world_size: int, batch: int
) -> None:
    scored: list[str] = []
    steps = set()
    for rank in range(world_size):
        with evaluation_loader(intact_set, clip, rank=rank, world_size=world_size, global_batch_size=batch) as loader:
            batches = list(loader.batches())
            steps.add((len(batches), loader.num_steps))
            scored += [key for key, padding in each(batches, "is_padding") if not padding]
    assert len(scored) == len(set(scored)) == intact_set.manifest.num_samples == 27
    assert steps == {(-(-27 // batch), -(-27 // batch))}


def test_p13_views_of_a_sample_follow_each_other_and_share_its_key(intact_set: ShardSet, clip: ClipSpec) -> None:
    views = EvaluationViews(protocol="test", clips=2, crops=3)
    with evaluation_loader(intact_set, clip, views, global_batch_size=4) as loader:
        assert loader.num_samples == 27
        batches = list(loader.batches())
    for batch in batches:
        assert batch.num_clips == 24
        groups = [batch.sample_ids[i : i + 6] for i in range(0, 24, 6)]
        assert all(len(set(group)) == 1 for group in groups)
    videos = {key: [] for batch in batches for key in batch.sample_ids}
    for key, video, padding in each(batches, "video", "is_padding"):
        if not padding:
            videos[key].append(video)
    long = videos["long"]
    assert len(long) == 6
    assert not torch.equal(long[0], long[1])
    assert not torch.equal(long[0], long[3])


def test_an_evaluation_is_the_same_every_time(intact_set: ShardSet, clip: ClipSpec) -> None:
    with evaluation_loader(intact_set, clip) as loader:
        assert_same(list(loader.batches()), list(loader.batches()))
