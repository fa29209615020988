"""Row P7: a sample that proves damaged while training stops the run by name, or is left out within a total budget."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from ca2st.batch import ClipBatch
from ca2st.errors import DataDamageError, EnvironmentFault, UserInputError
from ca2st.spec import ClipSpec
from pipelines.config import EvaluationSetup, LoaderConfig, TrainSetup
from pipelines.errors import QuarantineBudgetError, SampleDamageError
from pipelines.loader import EvaluationLoader, TrainLoader
from pipelines.quarantine import Quarantine, QuarantinedSample, quarantine_limit
from pipelines.storage.shard_files import OpenShard
from sharding.format.shard_set import ShardSet
from support.fake_shards import FakeSample, flip_byte, make_samples, make_shard_set, members_of

TINY: dict[str, Any] = {"num_frames": 3, "height": 24, "width": 32}
BATCH = 8
DAMAGED = ("clip-0005", "clip-0017")


@pytest.fixture
def clip() -> ClipSpec:
    return ClipSpec(num_frames=2, crop_size=16, mel_rows=16)


@pytest.fixture
def shard_set(tmp_path: Path) -> ShardSet:
    """24 samples in 4 shards, the spectrograms of `DAMAGED` changed by a byte."""
    found = make_shard_set(tmp_path / "set", make_samples(24, **TINY), samples_per_shard=6)
    for key in DAMAGED:
        damage(found, key)
    return found


def damage(shard_set: ShardSet, key: str) -> None:
    path = shard_set.root / shard_set.shards[int(key[-4:]) // 6].name
    offset, size = members_of(path)[f"{key}.mel.npy"]
    flip_byte(path, offset + size // 2)


def loader(
    shard_set: ShardSet,
    clip: ClipSpec,
    *,
    folder: Path | None = None,
    rank: int = 0,
    world_size: int = 1,
    **config: Any,
) -> TrainLoader:
    settings = {"on_error": "quarantine", "quarantine_percent": 50.0, "prefetch_steps": 0, "shuffle_block": 4} | config
    setup = TrainSetup(
        shard_sets=[shard_set],
        clip=clip,
        targets=("label",),
        loader=LoaderConfig(backend="reference", num_lanes=4, **settings),
        seed=1,
        global_batch_size=BATCH,
        quarantine_folder=folder,
        rank=rank,
        world_size=world_size,
    )
    return TrainLoader(setup)


def epoch(
    shard_set: ShardSet, clip: ClipSpec, *, epoch: int = 0, first_step: int = 0, **options: Any
) -> list[ClipBatch]:
    with loader(shard_set, clip, **options) as source:
        return list(source.batches(epoch, first_step))


def read_all(ranks: Sequence[TrainLoader]) -> None:
    for source in ranks:
        with source:
            list(source.batches(0))


def joined(shares: Sequence[Sequence[ClipBatch]]) -> list[tuple[tuple[str, ...], torch.Tensor, torch.Tensor]]:
    """Keys, pixels and labels of each step over all ranks."""
    return [
        (
            tuple(key for share in step for key in share.sample_ids),
            torch.cat([share.video for share in step]),
            torch.cat([share.labels for share in step]),
        )
        for step in zip(*shares, strict=True)
    ]


def require_equal(ours: list[Any], theirs: list[Any]) -> None:
    assert [step[0] for step in ours] == [step[0] for step in theirs]
    assert all(torch.equal(a[1], b[1]) and torch.equal(a[2], b[2]) for a, b in zip(ours, theirs, strict=True))


def test_p7_by_default_the_first_damaged_sample_ends_the_run_with_shard_key_and_rank(
    shard_set: ShardSet, clip: ClipSpec
) -> None:
    with pytest.raises(SampleDamageError, match=r"ca2st-00000[02].tar, sample clip-00(05|17), mel.npy") as found:
        epoch(shard_set, clip, on_error="fail")
    assert found.value.__notes__ == ["raised by the loader of rank 0 of 1"]


def test_p7_quarantine_keeps_every_step_whole_without_the_damaged_samples_and_changes_no_other_place(
    shard_set: ShardSet, clip: ClipSpec, tmp_path: Path
) -> None:
    whole = make_shard_set(tmp_path / "whole", make_samples(24, **TINY), samples_per_shard=6)
    expected = [key for batch in epoch(whole, clip) for key in batch.sample_ids]
    with loader(shard_set, clip) as source:
        batches = list(source.batches(0))
        stats = source.stats
    found = [key for batch in batches for key in batch.sample_ids]
    assert [len(batch.sample_ids) for batch in batches] == [BATCH] * 3
    assert not set(found) & set(DAMAGED)
    assert [a for a, b in zip(expected, found, strict=True) if a != b] == [key for key in expected if key in DAMAGED]
    assert stats.quarantined == len(DAMAGED)


def test_p7_the_place_is_filled_with_the_sample_of_the_same_position_a_step_later(
    shard_set: ShardSet, clip: ClipSpec, tmp_path: Path
) -> None:
    whole = make_shard_set(tmp_path / "whole", make_samples(24, **TINY), samples_per_shard=6)
    expected = [batch.sample_ids for batch in epoch(whole, clip)]
    found = [batch.sample_ids for batch in epoch(shard_set, clip)]
    for step, keys in enumerate(expected):
        for position, key in enumerate(keys):
            if key in DAMAGED:
                later = [expected[(step + ahead) % 3][position] for ahead in (1, 2)]
                assert found[step][position] == next(key for key in later if key not in DAMAGED)


@pytest.mark.parametrize("world_size", [2, 4])
def test_p7_the_same_damage_gives_the_same_batches_on_any_number_of_ranks(
    shard_set: ShardSet, clip: ClipSpec, tmp_path: Path, world_size: int
) -> None:
    alone = [epoch(shard_set, clip, folder=tmp_path / "one")]
    shares = [
        epoch(shard_set, clip, folder=tmp_path / "many", rank=rank, world_size=world_size) for rank in range(world_size)
    ]
    require_equal(joined(shares), joined(alone))
    kept = [sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("one", "many")]
    assert kept[0] == kept[1]
    assert len(kept[0]) == len(DAMAGED)


def test_p7_a_resumed_run_leaves_the_samples_out_without_touching_them_and_gives_the_same_numbers(
    shard_set: ShardSet, clip: ClipSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "quarantine"
    whole = epoch(shard_set, clip, folder=folder) + epoch(shard_set, clip, folder=folder, epoch=1)
    forbidden = {
        (shard_set.shards[int(key[-4:]) // 6].name, members_of(shard_set.root / name)[f"{key}.mel.npy"][0])
        for key in DAMAGED
        for name in [shard_set.shards[int(key[-4:]) // 6].name]
    }
    real = OpenShard.read

    def watched(self: OpenShard, offset: int, size: int) -> bytes:
        assert (Path(self.where).name, offset) not in forbidden, "a sample in quarantine was read"
        return real(self, offset, size)

    monkeypatch.setattr(OpenShard, "read", watched)
    rest = epoch(shard_set, clip, folder=folder, first_step=1) + epoch(shard_set, clip, folder=folder, epoch=1)
    require_equal(joined([rest]), joined([whole[1:]]))


def test_p7_the_quarantine_names_key_shard_damage_step_and_rank(
    shard_set: ShardSet, clip: ClipSpec, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    epoch(shard_set, clip, folder=tmp_path / "quarantine")
    kept = [json.loads(path.read_text()) for path in sorted((tmp_path / "quarantine").iterdir())]
    assert [(one["key"], one["shard"], one["row"], one["rank"]) for one in kept] == [
        ("clip-0005", "ca2st-000000.tar", 5, 0),
        ("clip-0017", "ca2st-000002.tar", 5, 0),
    ]
    assert all("expected xxh3-64" in one["what"] for one in kept)
    assert {one["fingerprint"] for one in kept} == {shard_set.manifest.fingerprint}
    assert "quarantined: ca2st-000000.tar, sample clip-0005" in caplog.text


def test_p7_beyond_the_budget_the_run_fails_and_names_the_samples(
    shard_set: ShardSet, clip: ClipSpec, tmp_path: Path
) -> None:
    message = r"2 samples are damaged, more than the 1 that .* allow: ca2st-00000.*clip-00(05|17), ca2st.*shard verify"
    with pytest.raises(QuarantineBudgetError, match=message) as found:
        epoch(shard_set, clip, folder=tmp_path / "quarantine", quarantine_budget=1)
    assert (found.value.exit_code, isinstance(found.value, DataDamageError)) == (3, True)


def test_p7_the_budget_counts_what_other_ranks_and_earlier_attempts_found(
    shard_set: ShardSet, clip: ClipSpec, tmp_path: Path
) -> None:
    folder = tmp_path / "quarantine"
    epoch(shard_set, clip, folder=folder, quarantine_budget=2)
    for name in ("clip-0000", "clip-0023"):
        damage(shard_set, name)
    ranks = [loader(shard_set, clip, folder=folder, rank=rank, world_size=4, quarantine_budget=2) for rank in range(4)]
    with pytest.raises(QuarantineBudgetError, match="3 samples are damaged, more than the 2"):
        read_all(ranks)
    with pytest.raises(QuarantineBudgetError, match="3 samples are damaged, more than the 2"):
        loader(shard_set, clip, folder=folder, quarantine_budget=2)


@pytest.mark.parametrize(
    ("budget", "percent", "samples", "limit"),
    [(100, 0.1, 240_000, 100), (100, 0.1, 50_000, 50), (5, 100.0, 3, 3), (0, 9.0, 99, 0)],
)
def test_p7_the_smaller_of_the_two_budgets_counts(budget: int, percent: float, samples: int, limit: int) -> None:
    assert quarantine_limit(budget=budget, percent=percent, num_samples=samples) == limit


def test_p7_evaluation_never_leaves_a_sample_out(shard_set: ShardSet, clip: ClipSpec) -> None:
    settings = LoaderConfig(backend="reference", on_error="quarantine", quarantine_percent=100.0)
    setup = EvaluationSetup(shard_set=shard_set, clip=clip, targets=("label",), loader=settings, global_batch_size=4)
    with EvaluationLoader(setup) as source:
        with pytest.raises(SampleDamageError, match="sample clip-0005"):
            list(source.batches())


def test_p7_a_picture_that_cannot_be_decoded_is_quarantined_too(
    clip: ClipSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = FakeSample.frames

    monkeypatch.setattr(FakeSample, "frames", lambda self: [cut(data, self.key) for data in frames(self)])
    written = make_shard_set(tmp_path / "set", make_samples(24, **TINY), samples_per_shard=6)
    with pytest.raises(SampleDamageError, match=r"sample clip-0003.*cannot be decoded"):
        epoch(written, clip, on_error="fail")
    batches = epoch(written, clip, folder=tmp_path / "quarantine")
    assert "clip-0003" not in [key for batch in batches for key in batch.sample_ids]
    assert [batch.num_clips for batch in batches] == [BATCH] * 3
    [kept] = [json.loads(path.read_text()) for path in (tmp_path / "quarantine").iterdir()]
    assert (kept["key"], "cannot be decoded" in kept["what"]) == ("clip-0003", True)


def cut(data: bytes, key: str) -> bytes:
    """A JPEG whose header is right and whose pixels end early."""
    return data if key != "clip-0003" else data[: data.index(b"\xff\xda") + 4]


def test_p7_an_index_row_that_contradicts_itself_is_quarantined_by_its_row(clip: ClipSpec, tmp_path: Path) -> None:
    edits = {"clip-0002": {"mel_bytes": 0}}
    written = make_shard_set(tmp_path / "set", make_samples(24, **TINY), samples_per_shard=6, row_edits=edits)
    batches = epoch(written, clip, folder=tmp_path / "quarantine")
    assert len(batches) == 3
    [kept] = [json.loads(path.read_text()) for path in (tmp_path / "quarantine").iterdir()]
    assert (kept["key"], kept["row"]) == ("", 2)


def test_p7_where_nothing_undamaged_is_left_the_run_fails(clip: ClipSpec, tmp_path: Path) -> None:
    edits = {f"clip-{number:04d}": {"mel_bytes": 0} for number in range(8)}
    written = make_shard_set(tmp_path / "set", make_samples(8, **TINY), samples_per_shard=4, row_edits=edits)
    with pytest.raises(DataDamageError, match="step 0: no undamaged sample is left to fill a place"):
        epoch(written, clip, quarantine_percent=100.0)


def sample(row: int, **values: Any) -> QuarantinedSample:
    fields: dict[str, Any] = {
        "fingerprint": "ab" * 32,
        "shard": "ca2st-000001.tar",
        "row": row,
        "key": f"clip-{row}",
        "what": "damaged",
        "step": 1,
        "rank": 0,
    }
    return QuarantinedSample(**(fields | values))


def test_p7_what_other_ranks_found_counts_against_the_budget_at_once(tmp_path: Path) -> None:
    first, second = (Quarantine(tmp_path / "q", most=1) for _ in range(2))
    first.add(sample(3, rank=0))
    with pytest.raises(QuarantineBudgetError, match="2 samples are damaged, more than the 1"):
        second.add(sample(4, rank=1))


def test_p7_the_same_sample_found_twice_counts_once(tmp_path: Path) -> None:
    ranks = [Quarantine(tmp_path / "q", most=1) for _ in range(2)]
    for rank, quarantine in enumerate(ranks):
        quarantine.add(sample(3, rank=rank, step=rank))
    assert [len(quarantine) for quarantine in ranks] == [1, 1]
    assert sample(3).place in Quarantine(tmp_path / "q", most=1)
    assert sample(4).place not in ranks[0]


def test_p7_a_file_left_half_written_is_no_quarantined_sample_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    Quarantine(tmp_path, most=9).add(sample(3))
    (tmp_path / f".{sample(4).file_name}.123.tmp").write_text("{")
    assert len(Quarantine(tmp_path, most=9)) == 1
    (tmp_path / sample(5).file_name).write_text("{")
    with pytest.raises(EnvironmentFault, match=r"ca2st-000001.000005.json: not a quarantined sample"):
        Quarantine(tmp_path, most=9)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"quarantine_budget": -1}, "loader.quarantine_budget: expected at least 0, found -1"),
        ({"quarantine_percent": 101.0}, "loader.quarantine_percent: expected 0..100, found 101"),
        ({"cache_bytes": 0}, "loader.cache_bytes: expected at least 1, found 0"),
    ],
)
def test_wrong_settings_of_damage_and_cache_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserInputError, match=message):
        LoaderConfig(**values)
