"""Sets of several labels per sample, and of none, from their indexes to batches."""

from pathlib import Path

import numpy as np
import pytest
import torch

from ca2st.errors import UserInputError
from ca2st.spec import ClipSpec
from pipelines.config import LoaderConfig, OrderConfig, TrainSetup
from pipelines.errors import SampleDamageError, ShardSetDamageError
from pipelines.loader import TrainLoader, read_batches
from pipelines.order.selection import BalanceConfig, ClassBalance, LabelLists, SelectionConfig, rarest_classes
from pipelines.storage.index import set_facts
from sharding.format.shard_set import ShardSet
from support.fake_shards import FakeSample, make_shard_set

CLIP = ClipSpec(num_frames=4, crop_size=32, mel_rows=32)
SEVERAL = [(0,), (0, 2), (), (1, 2), (0,), (0, 1, 2)]


def make(folder: Path, labels: list[tuple[int, ...]], labelling: str, **values) -> ShardSet:
    samples = [FakeSample(key=f"clip-{i:04d}", seed=i, labels=own) for i, own in enumerate(labels)]
    return make_shard_set(folder, samples, labelling=labelling, **values)


def setup(shard_set: ShardSet, **values) -> TrainSetup:
    values = {"global_batch_size": 2, "seed": 0, **values}
    return TrainSetup(
        shard_sets=[shard_set], clip=CLIP, targets=("label",), loader=LoaderConfig(backend="reference"), **values
    )


def test_several_labels_arrive_as_zeros_and_ones(tmp_path: Path) -> None:
    shard_set = make(tmp_path, SEVERAL, "several")
    batches = [*read_batches(shard_set.root, batch_size=3, clip=CLIP)]
    assert {batch.labelling for batch in batches} == {"several"}
    assert torch.cat([batch.labels for batch in batches]).tolist() == [
        *([1, 0, 0], [1, 0, 1], [0, 0, 0]),
        *([0, 1, 1], [1, 0, 0], [1, 1, 1]),
    ]
    (part, *_) = batches[0].split(1)
    assert part.labelling == "several"


def test_the_card_counts_every_label(tmp_path: Path) -> None:
    facts = set_facts(make(tmp_path, SEVERAL, "several"))
    assert facts.classes == {"label": {"red": 4, "green": 2, "blue": 3}}
    assert (facts.labelling, facts.labels_per_sample.least, facts.labels_per_sample.most) == ("several", 0, 3)
    assert facts.labels_per_sample.mean == pytest.approx(1.5)


def test_a_set_without_labels_gives_batches_without_any(tmp_path: Path) -> None:
    shard_set = make(tmp_path, [()] * 3, "none", label_spaces=(), targets=())
    (batch,) = read_batches(shard_set.root, batch_size=3, clip=CLIP)
    assert (batch.labelling, batch.labels.shape) == ("none", (3, 0))
    assert (set_facts(shard_set).classes, set_facts(shard_set).labelling) == ({}, "none")


def test_training_on_a_set_without_labels_is_refused(tmp_path: Path) -> None:
    shard_set = make(tmp_path, [()] * 4, "none")
    with pytest.raises(UserInputError, match="expected labels, which training needs, found a set without any"):
        TrainLoader(setup(shard_set))


def test_sets_of_one_and_of_several_labels_are_not_read_as_one(tmp_path: Path) -> None:
    sets = [make(tmp_path / "one", [(0,)] * 4, "one"), make(tmp_path / "several", [(0,)] * 4, "several")]
    both = TrainSetup(shard_sets=sets, clip=CLIP, targets=("label",), global_batch_size=2, seed=0)
    with pytest.raises(UserInputError, match="several: expected one label per sample, as in the first training set"):
        both.plan()


@pytest.mark.parametrize("labels", [[2, 0], [1, 1]])
def test_p3_labels_that_do_not_ascend_are_damage(tmp_path: Path, labels: list[int]) -> None:
    edits = {"clip-0001": {"labels": labels}}
    shard_set = make(tmp_path, SEVERAL, "several", row_edits=edits)
    with pytest.raises(SampleDamageError, match="clip-0001': expected ascending labels"):
        [*read_batches(shard_set.root, batch_size=3, clip=CLIP)]


def test_p3_labels_outside_the_classes_are_damage(tmp_path: Path) -> None:
    shard_set = make(tmp_path, SEVERAL, "several", row_edits={"clip-0001": {"labels": [0, 7]}})
    with pytest.raises(SampleDamageError, match=r"clip-0001: expected a label of 0\.\.2, found 7"):
        [*read_batches(shard_set.root, batch_size=3, clip=CLIP)]
    with pytest.raises(ShardSetDamageError, match=r"expected labels of 0\.\.2, found 7"):
        set_facts(shard_set)
    labelled = make(tmp_path / "none", [(), (1,)], "none")
    with pytest.raises(ShardSetDamageError, match="expected 0 labels per sample"):
        set_facts(labelled)


def test_a_selection_takes_samples_by_any_of_their_labels(tmp_path: Path) -> None:
    shard_set = make(tmp_path, SEVERAL, "several")
    order = OrderConfig(selection=SelectionConfig(classes=("green", "blue")))
    plan = setup(shard_set, order=order, global_batch_size=1).plan()
    assert plan.num_samples == 3


def lists(*labels: tuple[int, ...]) -> LabelLists:
    return LabelLists(np.array(sum(labels, ()), np.int64), np.array([len(own) for own in labels]))


def test_the_rarest_label_of_a_sample_is_its_class_for_the_balance() -> None:
    classes, occurrences = rarest_classes(lists(*SEVERAL))
    assert classes.tolist() == [0, 2, 3, 1, 0, 1]  # red 4, green 2, blue 3, and one sample without a label
    assert occurrences.tolist() == [4, 2, 3, 1]


def test_repeat_factors_of_several_labels_are_those_of_lvis() -> None:
    labels = [(0,)] * 80 + [(0, 1)] * 16 + [(0, 1, 2)] * 4
    balance = ClassBalance(lists(*labels), BalanceConfig(rule="repeat_factor", threshold=0.36))
    factors = np.sqrt([1, 0.36 / 0.2, 0.36 / 0.04])  # max over a picture's classes of sqrt(t / f), f = 1, .2, .04
    assert balance.num_readings == 80 + round(16 * factors[1]) + round(4 * factors[2])
    readings = balance.readings((1, 2)).astype(int)
    assert readings[:80].tolist() == [1] * 80
    assert readings[96:].tolist() == [3] * 4


def test_a_full_balance_reads_a_sample_as_often_as_its_rarest_label_is_rare() -> None:
    labels = [(0,)] * 60 + [(0, 1)] * 30 + [(1, 2)] * 10
    balance = ClassBalance(lists(*labels), BalanceConfig(rule="full"))
    readings = balance.readings((1, 2)).astype(int)
    sums = readings[:60].sum(), readings[60:90].sum(), readings[90:].sum()
    parts = np.array([60 / 90, 30 / 40, 10 / 10])  # samples by occurrences of red 90, green 40, blue 10
    assert np.abs(np.array(sums) - 100 * parts / parts.sum()).max() < 1
    assert balance.num_readings == 100


def test_one_label_in_lists_is_balanced_as_one_label() -> None:
    labels = np.array([0, 1, 1, 2, 0, 1, 0, 0, 2, 1])
    for rule in ("sqrt", "full", "repeat_factor"):
        config = BalanceConfig(rule=rule, threshold=0.3)
        one = ClassBalance(labels, config).readings((3,))
        assert ClassBalance(lists(*((label,) for label in labels.tolist())), config).readings((3,)).tolist() == (
            one.tolist()
        )
