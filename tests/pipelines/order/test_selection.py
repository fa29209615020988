"""Training on a part of the samples: by class, participant, key and number; refused where a name matches nothing."""

import fnmatch
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from ca2st.errors import UserInputError
from pipelines.errors import ShardSetDamageError
from pipelines.order.plan import EpochPlan
from pipelines.order.selection import BalanceConfig, SelectionConfig, key_ranks, smallest
from pipelines.order.sources import SampleSource, make_sources
from sharding.format.shard_set import LabelSpace, ShardSet
from support.fake_shards import FakeSample, make_shard_set
from support.plans import counts_of, make_record, whole_epoch
from support.refusals import forced

VERBS = LabelSpace(name="verb", classes=("cut", "wash", "open", "peel"))
NOUNS = LabelSpace(name="noun", classes=("knife", "pan"))
KEYS = [
    f"p{person:02d}_{video:02d}_{i}-{i:016x}" for person, video in ((1, 1), (1, 2), (2, 1), (37, 5)) for i in range(5)
]
LABELS = [(i % 3, i % 2) for i in range(len(KEYS))]


@pytest.fixture(scope="module")
def kitchen(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """20 samples of three participants in 5 shards; no sample peels."""
    samples = [
        FakeSample(key=key, labels=labels, num_frames=1, mel_rows=1) for key, labels in zip(KEYS, LABELS, strict=True)
    ]
    return make_shard_set(
        tmp_path_factory.mktemp("kitchen"), samples, label_spaces=(VERBS, NOUNS), targets=("verb", "noun")
    )


def sources_of(shard_set: ShardSet, balance: BalanceConfig | None = None, **values: Any) -> tuple[SampleSource, ...]:
    return make_sources(
        [[shard_set]],
        first_target="verb",
        selection=SelectionConfig(**values),
        balance=balance or BalanceConfig(),
    )


def selected(shard_set: ShardSet, **values: Any) -> list[str]:
    """Keys that one epoch reads, in stored order."""
    (source,) = sources_of(shard_set, **values)
    plan = EpochPlan(make_record(batch=1, remainder="wrap"), [source], epoch=0)
    counts = counts_of(whole_epoch(plan, 1))
    assert set(counts.values()) == {1}
    return [KEYS[4 * shard + row] for shard, row in sorted(counts)]


def expected(**conditions: Sequence[str]) -> list[str]:
    """The same by going through the list."""
    keep = []
    for key, (verb, noun) in zip(KEYS, LABELS, strict=True):
        checks = {
            "verbs": lambda names, verb=verb: VERBS.classes[verb] in names,
            "nouns": lambda names, noun=noun: NOUNS.classes[noun] in names,
            "keys": lambda names, key=key: any(fnmatch.fnmatchcase(key, name) for name in names),
        }
        if all(checks[name](value) for name, value in conditions.items()):
            keep.append(key)
    return keep


def test_a_class_selects_its_samples_and_no_others(kitchen: ShardSet) -> None:
    assert selected(kitchen, classes=("wash",)) == expected(verbs=["wash"])
    assert selected(kitchen, classes=("wash", "cut")) == expected(verbs=["wash", "cut"])
    assert selected(kitchen, classes=("pan",), target="noun") == expected(nouns=["pan"])


def test_patterns_select_keys_whatever_their_case(kitchen: ShardSet) -> None:
    assert selected(kitchen, keys=("p01_*",)) == expected(keys=["p01_*"])
    assert selected(kitchen, keys=("P01_02_*", "p37_??_3*")) == expected(keys=["p01_02_*", "p37_??_3*"])
    assert selected(kitchen, keys=(KEYS[7],)) == [KEYS[7]]


def test_a_participant_selects_the_samples_whose_keys_begin_with_it(kitchen: ShardSet) -> None:
    assert selected(kitchen, participants=("P01",)) == expected(keys=["p01_*"])
    assert selected(kitchen, participants=("P02", "P37")) == expected(keys=["p02_*", "p37_*"])


def test_what_is_given_together_must_hold_together(kitchen: ShardSet) -> None:
    both = selected(kitchen, classes=("cut",), participants=("P01",))
    assert both == expected(verbs=["cut"], keys=["p01_*"])


def test_a_limit_takes_the_smallest_hashes_and_a_larger_one_takes_them_too(kitchen: ShardSet) -> None:
    by_hash = sorted(KEYS, key=lambda key: xxhash.xxh3_64_intdigest(key.encode(), seed=5))
    for limit in (1, 7, 20, 500):
        assert selected(kitchen, limit=limit, limit_seed=5) == sorted(by_hash[:limit], key=KEYS.index)
    assert selected(kitchen, limit=7) != selected(kitchen, limit=7, limit_seed=1)


def test_a_limit_comes_after_the_names(kitchen: ShardSet) -> None:
    of_class = expected(verbs=["open"])
    by_hash = sorted(of_class, key=lambda key: xxhash.xxh3_64_intdigest(key.encode(), seed=0))
    assert selected(kitchen, classes=("open",), limit=3) == sorted(by_hash[:3], key=KEYS.index)


def test_a_limit_holds_for_all_sets_together(kitchen: ShardSet, tmp_path: Path) -> None:
    others = [FakeSample(key=f"other-{i}", labels=(0, 0), num_frames=1, mel_rows=1) for i in range(6)]
    second = make_shard_set(tmp_path, others, label_spaces=(VERBS, NOUNS), targets=("verb", "noun"))
    sources = make_sources(
        [[kitchen], [second]],
        first_target="verb",
        selection=SelectionConfig(limit=15),
        balance=BalanceConfig(),
    )
    assert sum(source.num_samples for source in sources) == 15
    assert [source.first_shard for source in sources] == [0, 5]
    ranked = sorted([*KEYS, *(one.key for one in others)], key=lambda key: xxhash.xxh3_64_intdigest(key.encode()))
    assert sources[1].num_samples == sum(key.startswith("other") for key in ranked[:15])


def test_a_selection_is_balanced_among_what_it_left(kitchen: ShardSet) -> None:
    (source,) = sources_of(kitchen, balance=BalanceConfig(rule="full", target="noun"), keys=("p0*",))
    assert source.num_readings == source.num_samples == 15
    plan = EpochPlan(make_record(batch=1, remainder="wrap"), [source], epoch=0)
    nouns = [LABELS[4 * shard + row][1] for ((shard, row, _),) in whole_epoch(plan, 1)]
    assert sorted(np.bincount(nouns).tolist()) == [7, 8]


def test_without_selection_and_balance_no_index_is_read(kitchen: ShardSet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.order.sources.read_columns", None)
    (source,) = sources_of(kitchen)
    assert source.rows is None
    assert source.num_samples == 20


@settings(max_examples=40)
@given(ranks=st.lists(st.integers(0, 9), min_size=1, max_size=30), limit=st.integers(1, 35))
def test_the_smallest_ranks_are_those_of_a_stable_sort(ranks: list[int], limit: int) -> None:
    by_rank = sorted(range(len(ranks)), key=lambda index: ranks[index])[:limit]
    assert np.flatnonzero(smallest(np.array(ranks, np.uint64), limit)).tolist() == sorted(by_rank)


def test_a_rank_is_a_hash_of_key_and_seed() -> None:
    assert key_ranks(["a", "b"], limit_seed=3).tolist() == [
        xxhash.xxh3_64_intdigest(b"a", 3),
        xxhash.xxh3_64_intdigest(b"b", 3),
    ]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"classes": ("wsah",)}, r"classes: expected names of the 4 classes, found 'wsah' \(did you mean 'wash'\?\)"),
        ({"classes": ("peel",)}, "classes: no sample is of class 'peel'"),
        (
            {"participants": ("P38",)},
            r"participants: no key begins with 'P38' \(did you mean 'P37'\?\); the keys begin with P01, P02, P37",
        ),
        (
            {"keys": ("p01_*", "p03_01_*")},
            r"keys: no key matches 'p03_01_\*' \(did you mean 'p.*'\?\); keys look like p01",
        ),
        (
            {"classes": ("pan",), "target": "noun", "keys": (KEYS[0],)},
            "no sample matches classes and target and keys together",
        ),
    ],
)
def test_a_name_that_matches_nothing_is_refused_with_the_nearest(
    kitchen: ShardSet, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserInputError, match=message):
        sources_of(kitchen, **values)


def test_a_set_of_a_mixture_without_selected_samples_is_refused(kitchen: ShardSet, tmp_path: Path) -> None:
    others = [FakeSample(key=f"p09_{i}", labels=(1, 0), num_frames=1, mel_rows=1) for i in range(3)]
    second = make_shard_set(tmp_path, others, label_spaces=(VERBS, NOUNS), targets=("verb", "noun"))
    with pytest.raises(UserInputError, match=f"no sample of {tmp_path} is selected; leave the set out"):
        make_sources(
            [[kitchen], [second]],
            first_target="verb",
            selection=SelectionConfig(participants=("P01",)),
            balance=BalanceConfig(),
        )


@pytest.mark.parametrize(("column", "value"), [("labels", [9, 0]), ("labels", [-1, 0])])
def test_p1_a_label_outside_its_classes_is_named_with_its_index(tmp_path: Path, column: str, value: list[int]) -> None:
    samples = [FakeSample(key=f"a{i}", labels=(0, 0), num_frames=1, mel_rows=1) for i in range(3)]
    shard_set = make_shard_set(tmp_path, samples, row_edits={"a1": {column: value}}, label_spaces=(VERBS, NOUNS))
    with pytest.raises(ShardSetDamageError, match=r"ca2st-000000.index.parquet: expected a verb of 0\.\.3"):
        sources_of(shard_set, balance=BalanceConfig(rule="sqrt"))


def test_p1_a_damaged_index_is_refused_before_anything_is_planned(tmp_path: Path) -> None:
    samples = [FakeSample(key=f"a{i}", labels=(0, 0), num_frames=1, mel_rows=1) for i in range(3)]
    shard_set = make_shard_set(tmp_path, samples, label_spaces=(VERBS, NOUNS))
    path = tmp_path / "ca2st-000000.index.parquet"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(ShardSetDamageError, match=r"ca2st-000000\.index\.parquet: sha256 differs"):
        sources_of(shard_set, limit=2)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"limit": 0}, "select.limit: expected at least 1, found 0"),
        ({"limit_seed": -1}, r"select.limit_seed: expected 0 or more and below 2\*\*64, found -1"),
        ({"limit_seed": 1 << 64}, "select.limit_seed: expected 0 or more .*found 18446744073709551616"),
        ({"keys": ("p01_*", "")}, "select.keys: expected names, found an empty one"),
        ({"target": "noun"}, "select.target: expected select.classes beside it, .*found 'noun' alone"),
        ({"participants": ("P0*",)}, r"select.participants: expected names of letters and digits.*found 'P0\*'"),
    ],
)
def test_an_impossible_selection_is_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(UserInputError, match=message):
        forced(SelectionConfig(), **values)
