"""One loader over several shard sets: their bytes and labels, the order's record, and what cannot be mixed. Row P11."""

import logging
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ca2st.batch import ClipBatch
from ca2st.errors import UserInputError
from ca2st.spec import ClipSpec
from ca2st.training.journal import differences
from pipelines.config import LoaderConfig, TrainSetup
from pipelines.errors import PlanError
from pipelines.loader import TrainLoader
from pipelines.order.plan import rank_positions
from pipelines.order.selection import BalanceConfig, OrderConfig, SelectionConfig
from sharding.format.shard_set import AudioParameters, LabelSpace, ShardSet
from support.fake_shards import FakeSample, make_shard_set
from support.refusals import forced

COLOURS = LabelSpace(name="label", classes=("red", "green", "blue"))
SHAPES = LabelSpace(name="shape", classes=("round", "square"))
FAST = LoaderConfig(backend="reference", shuffle_block=4, fetch_threads=2)
WEIGHTED = OrderConfig(weights=(1.0, 2.0))


@pytest.fixture(scope="module")
def two_sets(tmp_path_factory: pytest.TempPathFactory) -> list[ShardSet]:
    """12 samples with colours first, and 8 whose label spaces stand the other way round."""
    first = [FakeSample(key=f"one-{i}", labels=(i % 3, i % 2), num_frames=4, seed=i) for i in range(12)]
    second = [FakeSample(key=f"two-{i}", labels=(i % 2, i % 3), num_frames=4, seed=50 + i) for i in range(8)]
    root = tmp_path_factory.mktemp("sets")
    return [
        make_shard_set(root / "one", first, label_spaces=(COLOURS, SHAPES)),
        make_shard_set(root / "two", second, label_spaces=(SHAPES, COLOURS)),
    ]


def loader_of(sets: Any, clip: ClipSpec, order: OrderConfig | None = None, **values: Any) -> TrainLoader:
    fields: dict[str, Any] = {"seed": 3, "global_batch_size": 4} | values
    shard_sets = [sets] if isinstance(sets, ShardSet) else sets
    fields = {"targets": ("label", "shape"), "loader": FAST, "order": order or OrderConfig()} | fields
    return TrainLoader(TrainSetup(shard_sets=shard_sets, clip=clip, **fields))


def rows(batches: list[ClipBatch]) -> dict[str, tuple[list[int], torch.Tensor]]:
    """Labels and pixels of every clip, by key; of several readings the last."""
    return {
        key: (batch.labels[index].tolist(), batch.video[index])
        for batch in batches
        for index, key in enumerate(batch.sample_ids)
    }


def test_sets_without_weights_are_read_as_one_each_sample_once(two_sets: list[ShardSet], clip: ClipSpec) -> None:
    with loader_of(two_sets, clip) as loader:
        assert (loader.num_samples, loader.steps_per_epoch) == (20, 5)
        batches = list(loader.batches(0))
    found = rows(batches)
    assert len(found) == 20
    for key, (labels, _) in found.items():
        number = int(key.split("-")[1])
        assert labels == [number % 3, number % 2]


def test_a_clip_of_a_mixture_is_the_clip_of_its_own_set(two_sets: list[ShardSet], clip: ClipSpec) -> None:
    with loader_of(two_sets, clip) as loader:
        together = rows(list(loader.batches(0)))
    for shard_set in two_sets:
        with loader_of(shard_set, clip) as loader:
            alone = rows(list(loader.batches(0)))
        for key, (labels, video) in alone.items():
            assert together[key][0] == labels
            assert torch.equal(together[key][1], video)


def test_weights_and_epoch_length_decide_how_often_each_set_is_read(
    two_sets: list[ShardSet], clip: ClipSpec, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        caplog.at_level(logging.INFO, "pipelines.loader"),
        loader_of(two_sets, clip, replace(WEIGHTED, epoch_samples=192)) as loader,
    ):
        assert loader.steps_per_epoch == 48
    (line,) = [record.getMessage() for record in caplog.records if record.getMessage().startswith("plan: ")]
    assert "48 steps of 4 clips per epoch (remainder drop)" in line
    assert f"{two_sets[0].root}: 12 samples, each read 5.333 times on average" in line
    assert f"{two_sets[1].root}: 8 samples, each read 16" in line


def test_p10_a_repeated_mixture_resumed_elsewhere_gives_the_same_clips(
    two_sets: list[ShardSet], clip: ClipSpec
) -> None:
    order = OrderConfig(weights=(1.0, 2.0), repeats=2, remainder="wrap")
    with loader_of(two_sets, clip, order, global_batch_size=8) as loader:
        expected = list(loader.batches(1))
    for rank in range(2):
        with loader_of(two_sets, clip, order, global_batch_size=8, rank=rank, world_size=2) as loader:
            rest = list(loader.batches(1, first_step=3))
        share = rank_positions(rank, 2, global_batch_size=8, keep_pairs=True)
        assert len(rest) == len(expected) - 3
        for found, whole in zip(rest, expected[3:], strict=True):
            assert found.sample_ids == whole.sample_ids[share.start : share.stop]
            assert torch.equal(found.video, whole.video[share.start : share.stop])


def test_readings_of_one_sample_in_a_batch_are_different_views(two_sets: list[ShardSet], clip: ClipSpec) -> None:
    with loader_of(two_sets[0], clip, OrderConfig(repeats=2)) as loader:
        assert loader.steps_per_epoch == 6
        for batch in loader.batches(0):
            assert batch.sample_ids[:2] == batch.sample_ids[2:]
            assert batch.sample_ids[0] != batch.sample_ids[1]
            assert not torch.equal(batch.video[0], batch.video[2])


def test_only_selected_samples_arrive(two_sets: list[ShardSet], clip: ClipSpec) -> None:
    order = OrderConfig(selection=SelectionConfig(classes=("square",), target="shape"))
    with loader_of(two_sets, clip, order, global_batch_size=2) as loader:
        found = rows(list(loader.batches(0)))
    assert len(found) == 10
    assert all(labels[1] == 1 for labels, _ in found.values())


def test_p6_a_selection_smaller_than_a_batch_is_refused_with_the_three_numbers(
    two_sets: list[ShardSet], clip: ClipSpec
) -> None:
    with pytest.raises(PlanError, match="3 samples, global_batch_size 4, world_size 1"):
        loader_of(two_sets, clip, OrderConfig(selection=SelectionConfig(limit=3)))


@pytest.mark.parametrize(
    ("changed", "fields"),
    [
        ({"seed": 4}, ["seed"]),
        ({"global_batch_size": 8}, ["global_batch_size", "num_lanes"]),
        ({"order": replace(WEIGHTED, weights=(1.0, 3.0))}, ["mixture.1.weight"]),
        ({"order": replace(WEIGHTED, repeats=2)}, ["num_lanes", "repeats"]),
        ({"order": replace(WEIGHTED, epoch_samples=16)}, ["epoch_samples"]),
        ({"order": replace(WEIGHTED, remainder="wrap")}, ["remainder"]),
        ({"order": replace(WEIGHTED, balance=BalanceConfig(rule="sqrt"))}, ["balance.rule"]),
        ({"order": replace(WEIGHTED, selection=SelectionConfig(limit=9))}, ["selection.limit"]),
    ],
)
def test_p11_the_record_names_what_another_order_comes_from(
    two_sets: list[ShardSet], clip: ClipSpec, changed: dict[str, Any], fields: list[str]
) -> None:
    records = []
    for values in ({}, changed):
        with loader_of(two_sets, clip, **({"order": WEIGHTED} | values)) as loader:
            records.append(asdict(loader.record))
    assert [line.split(": ")[0] for line in differences(*records)] == fields


def test_p11_other_sets_and_another_number_of_ranks_in_the_record(two_sets: list[ShardSet], clip: ClipSpec) -> None:
    def record(sets: Any, **values: Any) -> dict[str, Any]:
        with loader_of(sets, clip, **values) as loader:
            return asdict(loader.record)

    both, turned = record(two_sets), record(two_sets[::-1])
    named = ["manifest_fingerprint", "mixture.0.fingerprint", "mixture.1.fingerprint"]
    assert [line.split(": ")[0] for line in differences(both, turned)] == named
    assert record(two_sets[0])["mixture"] == ()
    assert record(two_sets, rank=1, world_size=2) == both


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"label_spaces": (LabelSpace(name="label", classes=("red", "green", "pink")), SHAPES)},
            r"label space 'label': .*one has 3 classes and .*other 3: only in .*one 'blue'; only in .*other 'pink'; "
            r"convert both with one class list",
        ),
        (
            {"label_spaces": (LabelSpace(name="label", classes=("green", "red", "blue")), SHAPES)},
            "one has 3 classes and .*other 3: the same names in another order",
        ),
        (
            {"audio": AudioParameters(policy="optional", sample_rate_hz=24_000)},
            r"other: expected spectrograms of sample rate 16000 Hz as .*one has, found 24000 Hz; .*--sample-rate 16000",
        ),
    ],
)
def test_sets_that_do_not_agree_are_refused_by_name(
    two_sets: list[ShardSet], clip: ClipSpec, tmp_path: Path, values: dict[str, Any], message: str
) -> None:
    samples = [FakeSample(key=f"x{i}", labels=(0, 0), num_frames=1, mel_rows=1) for i in range(4)]
    other = make_shard_set(tmp_path / "other", samples, **({"label_spaces": (COLOURS, SHAPES)} | values))
    with pytest.raises(UserInputError, match=message):
        loader_of([two_sets[0], other], clip)


def test_one_set_named_twice_is_refused(two_sets: list[ShardSet], clip: ClipSpec) -> None:
    with pytest.raises(UserInputError, match="are the same shard set; name it once, with the sum of the weights"):
        loader_of([two_sets[0], two_sets[0]], clip)


def test_a_weight_is_needed_for_every_set(two_sets: list[ShardSet], clip: ClipSpec) -> None:
    with pytest.raises(UserInputError, match="a weight for each of 2 sets, found 3"):
        loader_of(two_sets, clip, OrderConfig(weights=(1.0, 1.0, 1.0)))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"repeats": 0}, "repeats: expected at least 1, found 0"),
        ({"epoch_samples": 0}, "epoch_samples: expected at least 1, found 0"),
        ({"remainder": "pad"}, "remainder: expected one of drop, wrap, found 'pad'"),
    ],
)
def test_an_impossible_order_is_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(UserInputError, match=message):
        forced(OrderConfig(), **values)
