"""The stages of a step add up to the step, and what the loader's threads did stands beside them."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from ca2st.batch import ClipBatch
from ca2st.training.journal import read_events
from ca2st.training.loop import train
from ca2st.training.ranks import STAGES, SourceCounts, StageClock, profiled
from ca2st.training.settings import TrainingProgress
from support.tiny_training import TinyModel, TinySource, fresh_accelerator, tiny_settings


@dataclass
class Totals:
    values: dict[str, float]

    def totals(self) -> Mapping[str, float]:
        return dict(self.values)


class CountingSource(TinySource):
    """Says that each batch took two seconds of decoding and 10 bytes of reading."""

    def __init__(self) -> None:
        super().__init__(seed=5)
        self.stats = Totals({"decode_seconds": 100.0, "bytes_read": 7})

    def batches(self, epoch: int, first_step: int = 0) -> Iterator[ClipBatch]:
        for batch in super().batches(epoch, first_step):
            self.stats.values["decode_seconds"] += 2.0
            self.stats.values["bytes_read"] += 10
            yield batch


@dataclass
class FakeClock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


def test_every_moment_belongs_to_one_stage_and_the_inner_one_wins() -> None:
    clock = FakeClock()
    stages = StageClock(clock)
    clock.now = 5.0
    stages.restart()
    clock.now = 6.0  # 1 s of nothing named
    with stages.stage("gather"):
        clock.now = 8.0
        with stages.stage("data_wait"):
            clock.now = 11.0
        clock.now = 11.5
    clock.now = 11.75
    seconds = stages.seconds()
    assert seconds == {
        **dict.fromkeys(STAGES, 0.0),
        "gather": 2.5,
        "data_wait": 3.0,
        "other": 1.25,
    }
    assert sum(seconds.values()) == 6.75


@pytest.mark.parametrize("name", ["checkpoint", "validation"])
def test_what_is_done_between_steps_is_stood_in_and_charged_to_other(name: Any) -> None:
    clock = FakeClock()
    stages = StageClock(clock)
    with stages.stage(name):
        clock.now = 2.0
        assert stages.standing() == (name, 2.0)
        with stages.stage("gather"):
            clock.now = 3.0
            assert stages.standing() == ("gather", 1.0)
    assert stages.seconds() == {**dict.fromkeys(STAGES, 0.0), "other": 2.0, "gather": 1.0}


def test_a_stage_that_fails_ends_all_the_same() -> None:
    clock = FakeClock()
    stages = StageClock(clock)

    def fail() -> None:
        with stages.stage("forward"):
            clock.now = 1.0
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    clock.now = 3.0
    assert (stages.seconds()["forward"], stages.seconds()["other"]) == (1.0, 2.0)


def test_counts_are_what_was_added_since_and_nothing_from_a_source_that_does_not_count() -> None:
    source = CountingSource()
    counts = SourceCounts(source)
    assert counts.since_last() == {"decode_seconds": 0.0, "bytes_read": 0}
    source.stats.values["bytes_read"] += 3
    assert counts.since_last()["bytes_read"] == 3
    assert counts.since_last()["bytes_read"] == 0
    assert SourceCounts(TinySource()).since_last() == {}


def test_the_stages_of_every_step_line_add_up_to_the_step(tmp_path: Path) -> None:
    settings = tiny_settings(tmp_path)
    train(TinyModel(), CountingSource(), accelerator=fresh_accelerator(settings), settings=settings)
    lines = list(read_events(tmp_path / "journal.jsonl", event="step"))
    assert len(lines) == 8
    for line in lines:
        assert set(line["stages"]) == {f"{stage}_seconds" for stage in STAGES}
        assert sum(line["stages"].values()) == pytest.approx(line["step_seconds"], rel=1e-9)
        assert line["clips_per_second"] == pytest.approx(6 / line["step_seconds"])
        assert all(seconds >= 0 for seconds in line["stages"].values())
        assert all(line["stages"][f"{stage}_seconds"] > 0 for stage in ("forward", "backward", "optimizer"))
        assert line["loader"] == {"decode_seconds": 2.0, "bytes_read": 10}
    assert lines[0]["data_wait_fraction"] == pytest.approx(
        lines[0]["stages"]["data_wait_seconds"] / lines[0]["step_seconds"], abs=0.05
    )


def test_the_sum_of_all_steps_is_within_the_time_of_the_run(tmp_path: Path) -> None:
    seen: list[TrainingProgress] = []
    settings = tiny_settings(tmp_path, progress=seen.append)
    begin = settings.clock()
    train(TinyModel(), TinySource(seed=5), accelerator=fresh_accelerator(settings), settings=settings)
    whole = settings.clock() - begin
    lines = [json.loads(line) for line in (tmp_path / "journal.jsonl").read_text().splitlines()]
    assert 0 < sum(line["step_seconds"] for line in lines if line["event"] == "step") < whole
    assert all(line["loader"] == {} for line in lines if line["event"] == "step")
    assert all(0 <= state.data_wait_fraction <= 1 for state in seen)


@pytest.mark.parametrize("num_steps", [0, 1, 2])
def test_a_run_that_ends_before_its_trace_begins_leaves_no_profiler_running(tmp_path: Path, num_steps: int) -> None:
    """One that is left running ends the process with a segmentation fault."""
    with profiled(tmp_path, steps=3, rank=0) as mark:
        for _ in range(num_steps):
            mark()
    assert not torch.autograd._profiler_enabled()
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
