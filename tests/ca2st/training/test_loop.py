import contextlib
import itertools
import json
import logging
import math
import re
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors import safe_open
from torch import Tensor

from ca2st.batch import ClipBatch
from ca2st.durable import FaultPoints, InjectedFault
from ca2st.errors import EnvironmentFault, UserInputError
from ca2st.training import loop
from ca2st.training.checkpoint import list_checkpoints, read_checkpoint, verify_checkpoint
from ca2st.training.errors import (
    CheckpointDamagedError,
    CheckpointMismatchError,
    InterruptedRunError,
    NonFiniteError,
    ResumeRefusedError,
    RunFolderBusyError,
    StopNotSavedError,
    TerminatedError,
)
from ca2st.training.journal import Journal, locked, read_events, run_sequence
from ca2st.training.loop import train
from ca2st.training.settings import TrainingProgress, TrainingResult, TrainingSettings
from ca2st.training.signals import StopRequest
from ca2st.training.step import draw_seed, hash_of_keys
from support.tiny_training import (
    TARGETS,
    TinyEvaluation,
    TinyModel,
    TinyOutput,
    TinySource,
    fresh_accelerator,
    tiny_settings,
)

STATE_FILES = ("model.safetensors", "optimizer.safetensors", "optimizer.json", "loader.json", "schedule.json")


def run(settings: TrainingSettings, **parts: Any) -> TrainingResult:
    """One process's life: new model, new source, new Accelerator."""
    options = {"validation": TinyEvaluation()} | {k: v for k, v in parts.items() if k in ("validation", "stop")}
    model, source = parts.get("model") or TinyModel(), parts.get("source") or TinySource(seed=settings.config.seed)
    return train(model, source, accelerator=fresh_accelerator(settings), settings=settings, **options)


def sequence(folder: Path) -> list[tuple[int, float, float, float, str]]:
    lines = run_sequence(folder / "journal.jsonl")
    return [tuple(line[key] for key in ("step", "loss", "lr", "grad_norm", "sample_ids_hash")) for line in lines]


def final_state(folder: Path) -> dict[str, bytes]:
    files = read_checkpoint(list_checkpoints(folder / "checkpoints")[0]).files
    return {name: files[name] for name in STATE_FILES}


def events(folder: Path, event: str) -> list[dict[str, Any]]:
    return list(read_events(folder / "journal.jsonl", event=event))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    run(tiny_settings(folder))
    return folder


def test_metrics_that_are_not_finite_become_null_and_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"action_top1": 0.5, "verb_mean_class": math.nan, "verb_top5": math.inf}
    monkeypatch.setattr(loop, "evaluate", lambda *_, **__: found)
    clean = {"action_top1": 0.5, "verb_mean_class": None, "verb_top5": None}
    assert run(tiny_settings(tmp_path, max_steps=1)).metrics == clean
    (line,) = events(tmp_path, "eval")
    assert (line["metrics"], line["not_finite"]) == (clean, ["verb_mean_class", "verb_top5"])


def test_a_run_trains_every_step_and_journals_what_arrived(undisturbed: Path) -> None:
    lines = run_sequence(undisturbed / "journal.jsonl")
    source = TinySource(seed=5)
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert [line["epoch"] for line in lines] == [0] * 4 + [1] * 4
    assert [line["sample_ids_hash"] for line in lines] == [
        hash_of_keys(source.keys_of_step(epoch, step)) for epoch in range(2) for step in range(4)
    ]
    assert all(line["clips_per_second"] > 0 and 0 <= line["data_wait_fraction"] <= 1 for line in lines)
    assert lines[0]["lr"] == 0.0
    assert lines[2]["lr"] == pytest.approx(0.5 * 6 / 256)
    names = [line["event"] for line in read_events(undisturbed / "journal.jsonl")]
    assert names[0] == "start"
    assert names[-1] == "end"
    assert names.count("eval") == 2
    assert events(undisturbed, "end")[0]["status"] == "done"


def test_the_result_names_the_last_checkpoint_and_metrics(tmp_path: Path) -> None:
    seen: list[TrainingProgress] = []
    result = run(tiny_settings(tmp_path, progress=seen.append))
    assert (result.steps, result.attempt, result.resumed_step, result.damaged_checkpoints) == (8, 1, 0, ())
    assert result.checkpoint.name == "step-8.attempt-1"
    verify_checkpoint(result.checkpoint)
    assert result.metrics == events(tmp_path, "eval")[-1]["metrics"]
    assert set(result.metrics) >= {"verb_top1", "noun_top1", "action_top1"}
    assert [(state.step, state.total_steps) for state in seen] == [(step, 8) for step in range(1, 9)]


def test_frozen_parameters_stay_and_get_no_gradient_while_the_rest_learns(tmp_path: Path) -> None:
    model, start = TinyModel(), TinyModel()
    run(tiny_settings(tmp_path, epochs=6), model=model)
    assert torch.equal(model.expert.weight, start.expert.weight)
    assert model.expert.weight.grad is None
    assert not torch.equal(model.layers[0].weight, start.layers[0].weight)
    losses = [loss for _, loss, *_ in sequence(tmp_path)]
    assert sum(losses[-4:]) < sum(losses[:4])


@pytest.mark.parametrize("stop_at", [1, 3, 4, 5, 7])
def test_t8_a_run_in_two_processes_equals_one_bit_for_bit(undisturbed: Path, tmp_path: Path, stop_at: int) -> None:
    first = run(tiny_settings(tmp_path, max_steps=stop_at))
    second = run(tiny_settings(tmp_path))
    assert (first.steps, second.resumed_step, second.attempt) == (stop_at, stop_at, 2)
    assert sequence(tmp_path) == sequence(undisturbed)
    assert final_state(tmp_path) == final_state(undisturbed)


def test_t8_resuming_twice_in_a_row_changes_nothing(undisturbed: Path, tmp_path: Path) -> None:
    for max_steps in (2, 3, 6, None):
        run(tiny_settings(tmp_path, max_steps=max_steps))
    assert sequence(tmp_path) == sequence(undisturbed)
    assert final_state(tmp_path) == final_state(undisturbed)


def test_a_finished_run_rerun_does_nothing_but_say_so(tmp_path: Path) -> None:
    first = run(tiny_settings(tmp_path))
    second = run(tiny_settings(tmp_path))
    assert (second.steps, second.resumed_step, second.checkpoint) == (8, 8, first.checkpoint)
    assert second.metrics == first.metrics
    assert len(events(tmp_path, "eval")) == 2


def test_any_split_into_micro_batches_gives_the_same_losses_and_gradients(tmp_path: Path) -> None:
    whole = tmp_path / "6"
    for size in (6, 5, 4, 3, 2, 1):
        run(tiny_settings(tmp_path / str(size), per_device_batch_size=size), model=TinyModel(dropout=0.0))
        for one, other in zip(sequence(whole), sequence(tmp_path / str(size)), strict=True):
            assert one[1] == pytest.approx(other[1], rel=1e-5)
            assert one[3] == pytest.approx(other[3], rel=1e-4)
            assert one[4] == other[4]


class Recording(TinyModel):
    """Remembers the dropout masks of its first layer, by arrival."""

    def __init__(self) -> None:
        super().__init__()
        self.masks: list[Tensor] = []
        self.dropout.register_forward_hook(lambda module, inputs, output: self.masks.append(output == 0))


def test_t9_a_resumed_step_draws_the_same_dropout_masks(tmp_path: Path) -> None:
    whole, rest = Recording(), Recording()
    run(tiny_settings(tmp_path / "whole"), model=whole, validation=None)
    run(tiny_settings(tmp_path / "cut", max_steps=5), validation=None)
    torch.manual_seed(123)  # whatever state a new process happens to be in
    run(tiny_settings(tmp_path / "cut"), model=rest, validation=None)
    masks_per_step = 2 * 2  # micro-batches x layers
    assert len(rest.masks) == 3 * masks_per_step
    for mask, expected in zip(rest.masks, whole.masks[5 * masks_per_step :], strict=True):
        assert torch.equal(mask, expected)
    assert not torch.equal(whole.masks[0], whole.masks[masks_per_step])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_t6_a_damaged_newest_checkpoint_is_passed_over_loudly(
    undisturbed: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(tiny_settings(tmp_path, max_steps=7))
    flip(tmp_path / "checkpoints/step-7.attempt-1/optimizer.safetensors")
    with caplog.at_level(logging.WARNING):
        result = run(tiny_settings(tmp_path))
    assert "DAMAGED CHECKPOINT passed over" in caplog.text
    assert result.resumed_step == 6
    assert "step-7.attempt-1/optimizer.safetensors" in result.damaged_checkpoints[0]
    assert events(tmp_path, "fault")[0]["kind"] == "damaged_checkpoint"
    assert sequence(tmp_path) == sequence(undisturbed)
    assert final_state(tmp_path) == final_state(undisturbed)


def test_t6_strict_resume_stops_at_a_damaged_newest_checkpoint(tmp_path: Path) -> None:
    run(tiny_settings(tmp_path, max_steps=7))
    flip(tmp_path / "checkpoints/step-7.attempt-1/COMPLETE.json")
    with pytest.raises(CheckpointDamagedError, match=r"step-7.attempt-1/COMPLETE.json"):
        run(tiny_settings(tmp_path, strict_resume=True))


def test_t6_a_run_whose_checkpoints_are_all_damaged_never_starts_anew(tmp_path: Path) -> None:
    run(tiny_settings(tmp_path, max_steps=7))
    for folder in list_checkpoints(tmp_path / "checkpoints"):
        flip(folder / "model.safetensors")
    with pytest.raises(CheckpointDamagedError, match="no sound checkpoint is left"):
        run(tiny_settings(tmp_path))


def with_record(settings: TrainingSettings, **changes: Any) -> TrainingSettings:
    return replace(settings, record=replace(settings.record, **changes))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: replace(s, config=replace(s.config, seed=6)), "\n  seed: 5 -> 6\n"),
        (lambda s: replace(s, config=replace(s.config, global_batch_size=2)), "\n  global_batch_size: 6 -> 2\n"),
        (lambda s: with_record(s, manifests={"train": "b" * 64}), 'manifests.train: "a+" -> "b+"'),
        (lambda s: with_record(s, recipe={"model": "tiny", "data": {"fold": 2}}), r"\n  recipe.data.fold: 1 -> 2\n"),
        (lambda s: with_record(s, loader={"num_lanes": 3}), r"loader.num_lanes: \(absent\) -> 3"),
        (lambda s: with_record(s, experts={"audio": "e"}), r'experts.audio: \(absent\) -> "e"'),
        (lambda s: replace(s, optim=replace(s.optim, base_lr=1.0)), r"schedule.json: saved by another run: peak: "),
        (lambda s: replace(s, optim=replace(s.optim, layer_decay=0.9)), r"optimizer groups.1.lr_scale: "),
    ],
)
def test_t15_another_run_in_the_folder_is_refused_with_the_difference(
    tmp_path: Path, change: Callable[[TrainingSettings], TrainingSettings], message: str
) -> None:
    run(tiny_settings(tmp_path, max_steps=2))
    settings = change(tiny_settings(tmp_path))
    source = TinySource(seed=settings.config.seed, global_batch_size=settings.config.global_batch_size, num_samples=8)
    with pytest.raises((ResumeRefusedError, CheckpointMismatchError), match=message):
        run(settings, source=source if settings.config.global_batch_size == 2 else None)
    assert [path.name for path in list_checkpoints(tmp_path / "checkpoints")] == ["step-2.attempt-1"]


def test_other_versions_warn_and_are_journalled_or_are_refused_when_strict(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(tiny_settings(tmp_path, max_steps=2))
    changed = with_record(tiny_settings(tmp_path, max_steps=3), versions={"torch": "y"})
    with pytest.raises(ResumeRefusedError, match='saved under other versions: torch: "x" -> "y"'):
        run(replace(changed, strict_resume=True))
    run(changed)
    assert 'torch: "x" -> "y"' in caplog.text
    assert events(tmp_path, "start")[-1]["changes"] == ['torch: "x" -> "y"']


def test_another_number_of_threads_is_another_topology(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(tiny_settings(tmp_path, max_steps=2))
    settings = tiny_settings(tmp_path, max_steps=3)
    accelerator = fresh_accelerator(settings)
    torch.set_num_threads(2)
    train(TinyModel(), TinySource(seed=5), accelerator=accelerator, settings=settings)
    assert "numbers will be close but may not be equal: cpu_threads: 1 -> 2" in caplog.text


class Poisoned(TinySource):
    """Makes the loss of one clip of step 6 not a number."""

    def make(self, clips: list[dict[str, Tensor]], keys: list[str], *, epoch: int, step: int) -> ClipBatch:
        batch = super().make(clips, keys, epoch=epoch, step=step)
        if (epoch, step) == (1, 1):
            batch.mel[4] = torch.nan
        return batch


def test_t11_a_loss_that_is_not_finite_stops_before_the_update_and_names_the_sample(tmp_path: Path) -> None:
    key = TinySource(seed=5).keys_of_step(1, 1)[4]
    model = TinyModel()
    with pytest.raises(NonFiniteError, match=rf"step 6: loss expected finite, found {key} \(nan, rank 0\)") as caught:
        run(tiny_settings(tmp_path), source=Poisoned(seed=5), model=model)
    assert caught.value.exit_code == 5
    assert caught.value.keys == (key,)
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())
    fault = events(tmp_path, "fault")[0]
    assert (fault["kind"], fault["keys"]) == ("NonFiniteError", [key])
    assert events(tmp_path, "end")[0]["status"] == "failed"
    assert list_checkpoints(tmp_path / "checkpoints")[0].name == "step-4.attempt-1"
    with safe_open(tmp_path / "failures/step-6.attempt-1.rank-0.safetensors", framework="pt") as kept:
        assert kept.metadata() == {"sample_ids": key}
        assert kept.get_tensor("mel").shape == (1, 4, 4)


class BadGradient(TinyModel):
    """Finite logits whose gradient is not finite where a clip carries a mark."""

    def forward(
        self, video: Tensor, mel: Tensor, intervals_seconds: Tensor, has_audio: Tensor | None = None
    ) -> TinyOutput:
        output = super().forward(video, mel, intervals_seconds)
        if not bool((mel[:, 0, 3] == 77).any()):
            return output
        zero = torch.sqrt(self.positions.sum() * 0)
        return TinyOutput({name: value + zero for name, value in output.logits.items()})


class Marked(TinySource):
    def make(self, clips: list[dict[str, Tensor]], keys: list[str], *, epoch: int, step: int) -> ClipBatch:
        batch = super().make(clips, keys, epoch=epoch, step=step)
        if (epoch, step) == (1, 1):
            batch.mel[5, 0, 3] = 77
        return batch


def test_t11_a_gradient_that_is_not_finite_names_its_micro_batch_and_parameters(tmp_path: Path) -> None:
    keys = TinySource(seed=5).keys_of_step(1, 1)
    with pytest.raises(
        NonFiniteError, match="step 6: gradient expected finite, found NaN or infinity in positions"
    ) as caught:
        run(tiny_settings(tmp_path), source=Marked(seed=5), model=BadGradient())
    assert caught.value.parameters == ("positions",)
    assert caught.value.keys == tuple(keys[4:])


class PoisonedAgain(TinySource):
    """Makes steps 6 and 8 not numbers."""

    def make(self, clips: list[dict[str, Tensor]], keys: list[str], *, epoch: int, step: int) -> ClipBatch:
        batch = super().make(clips, keys, epoch=epoch, step=step)
        if (epoch, step) in ((1, 1), (1, 3)):
            batch.mel[4] = torch.nan
        return batch


def test_t11_a_step_that_is_left_out_within_the_budget_changes_nothing_and_is_on_record(tmp_path: Path) -> None:
    key = TinySource(seed=5).keys_of_step(1, 1)[4]
    settings = tiny_settings(tmp_path, max_skipped_steps=1, checkpoint_every_steps=1, keep_checkpoints=9)
    assert run(settings, source=Poisoned(seed=5)).steps == 8
    before, after = (read_checkpoint(tmp_path / f"checkpoints/step-{step}.attempt-1").files for step in (5, 6))
    for name in ("model.safetensors", "optimizer.safetensors", "optimizer.json"):
        assert before[name] == after[name]
    lines = run_sequence(tmp_path / "journal.jsonl")
    assert [line["skipped_steps"] for line in lines] == [0, 0, 0, 0, 0, 1, 1, 1]
    assert (lines[5]["loss"], lines[5]["grad_norm"]) == (None, None)
    (fault,) = events(tmp_path, "fault")
    assert (fault["kind"], fault["step"], fault["keys"]) == ("skipped_step", 6, [key])
    assert (tmp_path / "failures/step-6.attempt-1.rank-0.safetensors").exists()


@pytest.mark.parametrize("killed_at", ["step.updated:5", "step.updated:7", "step.updated:8"])
def test_t11_a_resumed_run_leaves_out_the_same_steps_and_counts_them_once(tmp_path: Path, killed_at: str) -> None:
    for name in ("whole", "killed"):
        settings = tiny_settings(tmp_path / name, max_skipped_steps=2, checkpoint_every_steps=3)
        if name == "killed":
            faults = FaultPoints.parse(f"{killed_at}:raise")
            with pytest.raises(InjectedFault, match=r"step\.updated"):
                run(replace(settings, faults=faults), source=PoisonedAgain(seed=5))
        run(settings, source=PoisonedAgain(seed=5))
    assert sequence(tmp_path / "killed") == sequence(tmp_path / "whole")
    assert final_state(tmp_path / "killed") == final_state(tmp_path / "whole")
    counts = [line["skipped_steps"] for line in run_sequence(tmp_path / "killed/journal.jsonl")]
    assert counts == [0, 0, 0, 0, 0, 1, 1, 2]


def test_t11_one_step_more_than_the_budget_ends_the_run_whatever_attempt_used_it(tmp_path: Path) -> None:
    settings = tiny_settings(tmp_path, max_skipped_steps=1)
    spent = r"step 8: loss expected finite.*max_skipped_steps = 1 are used up \(left out: steps 6\)"
    for resumed in (0, 6):
        with pytest.raises(NonFiniteError, match=spent):
            run(settings, source=PoisonedAgain(seed=5))
        assert events(tmp_path, "start")[-1]["step"] == resumed
    more = tiny_settings(tmp_path, max_skipped_steps=2)
    assert run(more, source=PoisonedAgain(seed=5)).steps == 8


@pytest.mark.parametrize(("number", "error"), [(signal.SIGTERM, TerminatedError), (signal.SIGINT, InterruptedRunError)])
def test_t14_a_request_to_stop_saves_a_checkpoint_and_resumes_exactly(
    undisturbed: Path, tmp_path: Path, number: int, error: type[Exception]
) -> None:
    stop = StopRequest()

    def ask(state: TrainingProgress) -> None:
        if state.step == 5:
            stop.request(number)

    with pytest.raises(error, match=r"after step 5; its state is in .*step-5.attempt-1; rerun to resume"):
        run(tiny_settings(tmp_path, progress=ask), stop=stop)
    assert [line["status"] for line in events(tmp_path, "end")] == ["stopped"]
    assert events(tmp_path, "fault")[0]["signal"] == number
    assert run(tiny_settings(tmp_path)).resumed_step == 5
    assert sequence(tmp_path) == sequence(undisturbed)
    assert final_state(tmp_path) == final_state(undisturbed)


def test_t14_a_stop_before_the_first_step_saves_nothing(tmp_path: Path) -> None:
    stop = StopRequest()
    stop.request(signal.SIGTERM)
    with pytest.raises(TerminatedError, match="after step 0; nothing new to save"):
        run(tiny_settings(tmp_path), stop=stop)
    assert list_checkpoints(tmp_path / "checkpoints") == []


def stopping_after(step: int) -> tuple[StopRequest, Callable[[TrainingProgress], None]]:
    """A request to stop, and what makes it after a step."""
    stop = StopRequest()

    def ask(state: TrainingProgress) -> None:
        if state.step == step:
            stop.request(signal.SIGTERM)

    return stop, ask


@pytest.mark.parametrize(
    ("full_at", "told", "resumed"),
    [
        ({2}, r"the newest checkpoint is .*step-3\.attempt-1: a rerun goes on from step 3 and makes 2 steps again", 3),
        ({1, 2}, "there is no checkpoint, so a rerun begins anew", 0),
    ],
)
def test_t7_t14_a_stop_whose_state_cannot_be_saved_is_a_failure_and_tells_which_checkpoint_counts(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full_at: set[int], told: str, resumed: int
) -> None:
    monkeypatch.setattr(FullDisk, "full_at", frozenset(full_at))
    monkeypatch.setattr(FullDisk, "arrivals", 0)
    stop, ask = stopping_after(5)
    settings = tiny_settings(tmp_path, faults=FullDisk(), progress=ask, validate_every_epochs=0)
    with pytest.raises(StopNotSavedError, match=told) as caught:
        run(settings, stop=stop)
    assert str(caught.value).startswith("stopped by signal 15 after step 5, but its state is NOT saved: cannot write ")
    assert re.search(r"No space left on device .*; free space there", str(caught.value))
    assert (caught.value.exit_code, caught.value.signal_number) == (4, 15)
    assert [line["status"] for line in events(tmp_path, "end")] == ["failed"]
    rerun = run(tiny_settings(tmp_path, validate_every_epochs=0))
    assert rerun.resumed_step == resumed
    assert sequence(tmp_path) == sequence(undisturbed)


def test_t14_a_journal_that_cannot_be_ended_does_not_hide_that_a_stop_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop, ask = stopping_after(5)

    def full(_: Journal) -> None:
        raise EnvironmentFault("cannot write the journal: No space left on device")

    monkeypatch.setattr(Journal, "close", full)
    with pytest.raises(TerminatedError, match=r"its state is in .*step-5\.attempt-1; rerun to resume") as caught:
        run(tiny_settings(tmp_path, progress=ask), stop=stop)
    assert caught.value.__notes__ == ["cannot write the journal: No space left on device"]
    with pytest.raises(EnvironmentFault, match="cannot write the journal"):
        run(tiny_settings(tmp_path))  # a run that ends well is not done without its journal


class FullDisk(FaultPoints):
    """The disk is full at some of the arrivals at the first file of a checkpoint."""

    arrivals = 0

    def reach(self, point: str) -> None:
        if point == "checkpoint.recipe.json.written":
            FullDisk.arrivals += 1
            if FullDisk.arrivals in FullDisk.full_at:
                FaultPoints(point=point, kind="enospc").reach(point)

    full_at: frozenset[int] = frozenset()


def test_t7_training_goes_on_when_a_save_fails(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FullDisk, "full_at", frozenset({2, 3}))
    monkeypatch.setattr(FullDisk, "arrivals", 0)
    result = run(tiny_settings(tmp_path, faults=FullDisk()))
    assert result.checkpoint.name == "step-8.attempt-1"
    faults = events(tmp_path, "fault")
    assert [(fault["kind"], fault["step"], fault["num_failed"]) for fault in faults] == [
        ("checkpoint", 4, 1),
        ("checkpoint", 6, 2),
    ]
    assert "No space left on device" in faults[0]["error"]
    assert sequence(tmp_path) == sequence(undisturbed)


def test_t7_the_third_failed_save_in_a_row_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FullDisk, "full_at", frozenset({2, 3, 4}))
    monkeypatch.setattr(FullDisk, "arrivals", 0)
    settings = tiny_settings(tmp_path, faults=FullDisk(), checkpoint_every_steps=1, validate_every_epochs=0)
    with pytest.raises(EnvironmentFault, match=r"cannot save at step 4 \(3 failures in a row\).*step-1.attempt-1"):
        run(settings)
    verify_checkpoint(tmp_path / "checkpoints/step-1.attempt-1")


def test_t7_the_last_checkpoint_must_be_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FullDisk, "full_at", frozenset({4}))
    monkeypatch.setattr(FullDisk, "arrivals", 0)
    with pytest.raises(EnvironmentFault, match="cannot save at step 8"):
        run(tiny_settings(tmp_path, faults=FullDisk()))


def test_a_validation_that_a_kill_cut_off_is_made_up_for(tmp_path: Path) -> None:
    class Broken(TinyEvaluation):
        def batches(self) -> object:
            raise RuntimeError("killed in validation")

    with pytest.raises(RuntimeError, match="killed in validation"):
        run(tiny_settings(tmp_path), validation=Broken())
    run(tiny_settings(tmp_path))
    assert [line["step"] for line in events(tmp_path, "eval")] == [4, 8]


def test_a_torn_journal_and_a_half_written_checkpoint_are_tidied_at_the_start(
    undisturbed: Path, tmp_path: Path
) -> None:
    run(tiny_settings(tmp_path, max_steps=3))
    with (tmp_path / "journal.jsonl").open("ab") as file:
        file.write(b'{"event":"st')
    partial = tmp_path / "checkpoints/step-4.attempt-7"
    partial.mkdir()
    (partial / "model.safetensors").write_bytes(b"half")
    result = run(tiny_settings(tmp_path))
    start = events(tmp_path, "start")[-1]
    assert (start["cut_bytes"], start["swept"], result.attempt) == (12, ["step-4.attempt-7"], 8)
    assert not partial.exists()
    assert sequence(tmp_path) == sequence(undisturbed)


def test_a_resumed_run_says_where_it_goes_on_and_validations_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    run(tiny_settings(tmp_path, max_steps=3))
    assert "resuming" not in caplog.text
    run(tiny_settings(tmp_path))
    assert f"resuming step 3 of 8 from {tmp_path / 'checkpoints' / 'step-3.attempt-1'}" in caplog.text
    assert "validation after step 4 of 8: verb_top1 0." in caplog.text
    run(tiny_settings(tmp_path))
    assert "already finished, nothing to train: step 8 of 8 from" in caplog.text


def test_ranks_exchange_gradients_after_the_last_micro_batch_of_a_step_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    apart: list[bool] = []
    no_sync, backward = Accelerator.no_sync, Accelerator.backward
    inside = [False]

    @contextlib.contextmanager
    def recorded_no_sync(self: Accelerator, model: Any) -> Iterator[None]:
        inside[0] = True
        with no_sync(self, model):
            yield
        inside[0] = False

    def recorded_backward(self: Accelerator, loss: Any, **options: Any) -> None:
        apart.append(inside[0])
        backward(self, loss, **options)

    monkeypatch.setattr(Accelerator, "no_sync", recorded_no_sync)
    monkeypatch.setattr(Accelerator, "backward", recorded_backward)
    run(tiny_settings(tmp_path, max_steps=2))  # six clips per step, four per micro-batch
    assert apart == [True, False] * 2


def test_dropout_is_drawn_anew_for_every_seed_step_rank_and_micro_batch() -> None:
    places = itertools.product(range(3), repeat=4)
    seeds = {draw_seed(seed, step=step, rank=rank, micro_batch=part) for seed, step, rank, part in places}
    assert len(seeds) == 3**4


def test_t17_a_second_training_in_the_folder_is_refused(tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(RunFolderBusyError, match="is training in this run folder"):
        run(tiny_settings(tmp_path))


def test_t17_a_clock_that_jumps_back_changes_nothing(undisturbed: Path, tmp_path: Path) -> None:
    times = iter(range(10**6, 0, -7))
    run(tiny_settings(tmp_path, clock=lambda: float(next(times)), wall_clock=lambda: float(next(times))))
    assert sequence(tmp_path) == sequence(undisturbed)


def test_the_record_and_its_documents_are_in_every_checkpoint(tmp_path: Path) -> None:
    settings = with_record(tiny_settings(tmp_path, max_steps=1), documents={"classes": {"verb": ["take"]}})
    folder = run(settings).checkpoint
    assert json.loads((folder / "classes.json").read_text()) == {"verb": ["take"]}
    assert json.loads((folder / "recipe.json").read_text())["data"] == {"fold": 1}
    assert json.loads((folder / "loader.json").read_text()) == {
        "epoch": 0,
        "plan": {},
        "step_in_epoch": 1,
        "steps_per_epoch": 4,
    }


@pytest.mark.parametrize("field", ["recipe", "loader"])
@pytest.mark.parametrize("value", [math.inf, Path("clips")])
def test_a_record_that_no_checkpoint_could_hold_is_refused_before_the_first_step(
    tmp_path: Path, field: str, value: object
) -> None:
    settings = tiny_settings(tmp_path)
    with pytest.raises((ValueError, TypeError), match="JSON"):
        run(replace(settings, record=replace(settings.record, **{field: {"data": value}})))
    assert list(tmp_path.iterdir()) == []


def test_documents_that_would_hide_a_file_of_ours_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserInputError, match=r"documents: .* found \['recipe'\]"):
        with_record(tiny_settings(tmp_path), documents={"recipe": {}})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"precision": "bf16"}, "precision bf16: expected an Accelerator with mixed_precision='bf16', found 'no'"),
        ({"warmup_epochs": 9.0}, "warmup_epochs: expected at most epochs = 2, found 9.0"),
    ],
)
def test_a_setup_that_cannot_work_is_refused_before_anything_is_made(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    settings = tiny_settings(tmp_path / "run", **change)
    accelerator = fresh_accelerator(tiny_settings(tmp_path))
    with pytest.raises(UserInputError, match=message):
        train(TinyModel(), TinySource(), accelerator=accelerator, settings=settings)
    assert not (tmp_path / "run").exists()


def test_bfloat16_autocast_trains_and_resumes_exactly(tmp_path: Path) -> None:
    run(tiny_settings(tmp_path / "whole", precision="bf16"))
    run(tiny_settings(tmp_path / "cut", precision="bf16", max_steps=5))
    run(tiny_settings(tmp_path / "cut", precision="bf16"))
    assert sequence(tmp_path / "cut") == sequence(tmp_path / "whole")
    assert final_state(tmp_path / "cut") == final_state(tmp_path / "whole")


def test_gradient_clipping_bounds_the_update_and_keeps_the_reported_norm(undisturbed: Path, tmp_path: Path) -> None:
    run(tiny_settings(tmp_path, clip_grad_norm=1e-3))
    assert sequence(tmp_path)[0][3] == sequence(undisturbed)[0][3] > 1e-3
    assert sequence(tmp_path)[-1][1] != sequence(undisturbed)[-1][1]


class SeveralLabels(TinySource):
    """Each clip has verb 0 and a verb of its own."""

    def make(self, clips: list[dict[str, Tensor]], keys: list[str], *, epoch: int, step: int) -> ClipBatch:
        batch = super().make(clips, keys, epoch=epoch, step=step)
        hot = torch.nn.functional.one_hot(batch.labels[:, 0], TARGETS["verb"])
        hot[:, 0] = 1
        return replace(batch, labels=hot, labelling="several")


def test_of_several_labels_a_clip_is_right_where_each_of_them_is(tmp_path: Path) -> None:
    settings = tiny_settings(tmp_path, targets={"verb": TARGETS["verb"]}, labelling="several", epochs=1)
    model = TinyModel(dropout=0.0)
    with torch.no_grad():
        model.head["verb"].weight.zero_()
        model.head["verb"].bias.copy_(torch.tensor([1.0, 1.0, -1.0, -1.0, -1.0]))  # says: verbs 0 and 1
    source = SeveralLabels()
    first = next(source.batches(0))
    train(model, source, accelerator=fresh_accelerator(settings), settings=settings)
    lines = events(tmp_path, "step")
    wanted = (first.labels == torch.tensor([1, 1, 0, 0, 0])).all(dim=1).float().mean().item()
    assert lines[0]["exact_match"] == pytest.approx(wanted)
    assert not any("top1" in line for line in lines)
