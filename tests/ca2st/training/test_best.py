"""Which checkpoints are kept as the best, when a run ends early, and the average of its weights."""

import gzip
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ca2st.durable import FaultPoints, InjectedFault
from ca2st.errors import UserInputError
from ca2st.training.best import best_and_last, best_steps, reason_to_end
from ca2st.training.checkpoint import list_checkpoints, read_checkpoint
from ca2st.training.config import TrainingConfig
from ca2st.training.errors import TimeUpError
from ca2st.training.evaluate import evaluate
from ca2st.training.loop import train
from ca2st.training.optim import WeightAverage, decay_at
from ca2st.training.resume import put_model_tensors, read_model_tensors, tensors_to_use
from ca2st.training.settings import TrainingResult, TrainingSettings
from ca2st.training.step import LossScale
from support.tiny_training import TARGETS, TinyEvaluation, TinyModel, TinySource, fresh_accelerator, tiny_settings


def run(settings: TrainingSettings, *, model: TinyModel | None = None) -> TrainingResult:
    return train(
        model or TinyModel(),
        TinySource(seed=5),
        accelerator=fresh_accelerator(settings),
        settings=settings,
        validation=TinyEvaluation(num_samples=40),
    )


def journal(folder: Path, event: str) -> list[dict[str, object]]:
    lines = map(json.loads, (folder / "journal.jsonl").read_text().splitlines())
    return [line for line in lines if line["event"] == event]


def kept_steps(folder: Path) -> set[int]:
    return {int(path.name.split(".")[0].removeprefix("step-")) for path in list_checkpoints(folder / "checkpoints")}


def best_by_hand(folder: Path, metric: str) -> int:
    values = {line["step"]: line["metrics"][metric] for line in journal(folder, "eval")}
    return max(values, key=lambda step: (values[step], -step))


EVERY_STEP = {"validate_every_steps": 1, "keep_checkpoints": 1, "best_metric": "noun_top5", "base_lr": 2.0}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> TrainingResult:
    """An undisturbed run that is validated at every step; only read."""
    return run(tiny_settings(tmp_path_factory.mktemp("whole"), **EVERY_STEP))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an undisturbed run; only read."""
    folder = tmp_path_factory.mktemp("plain")
    run(tiny_settings(folder))
    return folder


@pytest.fixture(scope="module")
def averaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an undisturbed run with an average of its weights; only read."""
    folder = tmp_path_factory.mktemp("averaged")
    run(tiny_settings(folder, ema_decay=0.9))
    return folder


def test_the_best_checkpoint_is_kept_beside_the_newest(whole: TrainingResult) -> None:
    folder = whole.checkpoint.parents[1]
    best = best_by_hand(folder, "noun_top5")
    assert 1 < best < 8, "the test needs a best that is not the newest"
    assert kept_steps(folder) == {best, 8}
    assert whole.best is not None
    assert (whole.best.step, whole.best.metric) == (best, "noun_top5")
    assert whole.best.checkpoint == folder / "checkpoints" / f"step-{best}.attempt-1"
    assert whole.checkpoint.name == "step-8.attempt-1"
    assert best_and_last(folder, "noun_top5")[1].step == 8


def test_the_best_few_are_kept_and_none_where_none_are_wanted(tmp_path: Path) -> None:
    run(tiny_settings(tmp_path / "three", **EVERY_STEP, keep_best=3))
    values = {line["step"]: line["metrics"]["noun_top5"] for line in journal(tmp_path / "three", "eval")}
    assert kept_steps(tmp_path / "three") == {*sorted(values, key=lambda step: (-values[step], step))[:3], 8}
    run(tiny_settings(tmp_path / "none", **EVERY_STEP, keep_best=0))
    assert kept_steps(tmp_path / "none") == {8}


@pytest.mark.parametrize("point", ["checkpoint.folder", "checkpoint.COMPLETE.json.written", "checkpoint.unmarked"])
def test_t5_t16_a_run_interrupted_between_two_best_saves_keeps_the_best_and_the_newest(
    whole: TrainingResult, tmp_path: Path, point: str
) -> None:
    undisturbed = whole.checkpoint.parents[1]
    for nth in (2, 5):
        folder = tmp_path / str(nth)
        settings = tiny_settings(folder, **EVERY_STEP)
        with pytest.raises(InjectedFault):
            run(replace(settings, faults=FaultPoints(point=point, nth=nth, kind="raise")))
        newest = max(line["step"] for line in journal(folder, "checkpoint"))
        kept = kept_steps(folder)
        assert best_by_hand(folder, "noun_top5") in kept
        assert max(kept) >= newest
        run(settings)
        assert kept_steps(folder) == kept_steps(undisturbed)
        assert best_and_last(folder, "noun_top5")[0].value == best_and_last(undisturbed, "noun_top5")[0].value


def test_a_metric_that_validations_do_not_have_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(UserInputError, match=r"training.best_metric: expected one of .*verb_top1.*, found 'verb_top'"):
        run(tiny_settings(tmp_path / "run", best_metric="verb_top"))
    assert not (tmp_path / "run").exists()


def test_of_equal_ones_the_earlier_is_the_best_and_of_losses_the_least() -> None:
    scores = {2: {"top1": 0.5, "loss": 3.0}, 4: {"top1": 0.7, "loss": 1.0}, 6: {"top1": 0.7, "loss": None}}
    assert best_steps(scores, "top1") == [4, 6, 2]
    assert best_steps(scores, "loss") == [4, 2]


@pytest.mark.parametrize(
    ("values", "settings", "reason"),
    [
        ([0.1, 0.2, 0.2], {"early_stopping": 2}, None),
        ([0.1, 0.2, 0.2, 0.1], {"early_stopping": 2}, "2 validations without a better top1 than 0.2000"),
        ([0.1, 0.2, 0.2, 0.3], {"early_stopping": 2}, None),
        ([0.1, 0.14, 0.18], {"early_stopping": 2, "least_improvement": 0.1}, "2 validations without a better top1"),
        ([0.1, 0.14, 0.22], {"early_stopping": 2, "least_improvement": 0.1}, None),
        ([0.1, 0.96], {"stop_at": 0.95}, "top1 0.9600 reached stop_at = 0.95"),
        ([None, None], {"early_stopping": 2}, "2 validations without"),
        ([0.9, 0.1, 0.1, 0.1], {}, None),
    ],
)
def test_a_run_ends_early_when_its_validations_say_so(
    values: list[float | None], settings: dict[str, float], reason: str | None
) -> None:
    scores = {step: {"top1": value} for step, value in enumerate(values, start=1)}
    found = reason_to_end(TrainingConfig(**settings), scores, "top1")
    assert found is None if reason is None else str(found).startswith(reason)


def test_a_run_that_ended_early_stays_ended_and_goes_on_with_more_patience(
    whole: TrainingResult, tmp_path: Path
) -> None:
    impatient = tiny_settings(tmp_path / "run", **EVERY_STEP, early_stopping=1)
    first = run(impatient)
    assert first.steps < 8
    assert first.ended_early is not None
    assert journal(tmp_path / "run", "end")[-1]["reason"] == first.ended_early
    assert run(impatient).steps == first.steps
    assert run(tiny_settings(tmp_path / "run", **EVERY_STEP)).steps == 8
    losses = {line["step"]: line["loss"] for line in journal(tmp_path / "run", "step")}
    assert losses == {line["step"]: line["loss"] for line in journal(whole.checkpoint.parents[1], "step")}


@pytest.mark.parametrize("cut_after", [1, 3, 5])
def test_a_run_that_ends_by_its_fit_ends_at_the_same_step_when_resumed(
    plain: Path, tmp_path: Path, cut_after: int
) -> None:
    """What was answered right before the kill counts: the last epoch is the last four steps of all attempts."""
    shares = [line["top1"] for line in journal(plain, "step")]
    fits = [sum(shares[end - 4 : end]) / 4 for end in range(4, 9)]
    fit = fits[2]
    ended = 4 + next(index for index, one in enumerate(fits) if one >= fit)
    settings = tiny_settings(tmp_path / "cut", stop_at_fit=fit)
    run(tiny_settings(tmp_path / "cut", stop_at_fit=fit, max_steps=cut_after))
    assert run(settings).steps == ended
    again = run(settings)
    assert (again.steps, again.resumed_step) == (ended, ended)
    assert again.ended_early is not None


def test_validations_come_every_so_many_steps(tmp_path: Path) -> None:
    run(tiny_settings(tmp_path, validate_every_steps=3, validate_every_epochs=0))
    assert [line["step"] for line in journal(tmp_path, "eval")] == [3, 6, 8]


def test_a_validation_costs_the_run_its_own_time_alone(tmp_path: Path) -> None:
    """With a clock that ticks once a look, steps with and without a validation behind them take the same time."""
    times: Iterator[float] = iter(map(float, range(10**6)))
    run(tiny_settings(tmp_path, clock=lambda: next(times), validate_every_steps=3, validate_every_epochs=0))
    seconds = [line["step_seconds"] for line in journal(tmp_path, "step")]
    assert len(set(seconds)) == 1


def test_the_average_is_the_formula_by_hand() -> None:
    model = TinyModel()
    average = WeightAverage(model, 0.9)
    expected = model.positions.detach().clone()
    for step in (1, 2, 300):
        with torch.no_grad():
            model.positions += step
        average.update(step)
        decay = {1: 2 / 11, 2: 3 / 12, 300: 0.9}[step]
        expected = decay * expected + (1 - decay) * model.positions.detach()
        torch.testing.assert_close(average.tensors["positions"], expected)
        assert decay_at(0.9, step) == decay
    assert "expert.weight" not in average.tensors


def test_while_the_average_is_in_place_the_model_has_it_and_then_its_own_bits_again() -> None:
    model = TinyModel()
    average = WeightAverage(model, 0.9)
    with torch.no_grad():
        model.positions.normal_()
    own, kept = model.positions.detach().clone(), average.tensors["positions"].clone()
    with average.in_place():
        assert torch.equal(model.positions, kept)
    assert torch.equal(model.positions, own)


def files_of(folder: Path) -> dict[str, bytes]:
    return dict(read_checkpoint(list_checkpoints(folder / "checkpoints")[0]).files)


@pytest.mark.parametrize("stop_at", [1, 4, 5])
def test_t8_a_run_with_an_average_in_two_processes_equals_one_bit_for_bit(
    averaged: Path, tmp_path: Path, stop_at: int
) -> None:
    run(tiny_settings(tmp_path / "cut", ema_decay=0.9, max_steps=stop_at))
    run(tiny_settings(tmp_path / "cut", ema_decay=0.9))
    assert files_of(tmp_path / "cut") == files_of(averaged)
    last = [journal(folder, "eval")[-1] for folder in (tmp_path / "cut", averaged)]
    assert last[0]["metrics"] == last[1]["metrics"]


def test_the_average_is_validated_and_kept_and_changes_no_step(plain: Path, averaged: Path) -> None:
    losses = [[line["loss"] for line in journal(folder, "step")] for folder in (plain, averaged)]
    assert losses[0] == losses[1]
    files, model = files_of(averaged), TinyModel()
    assert tensors_to_use(files) == files["average.safetensors"] != files["model.safetensors"]
    put_model_tensors(model, tensors=read_model_tensors(model, data=tensors_to_use(files)))
    found = evaluate(
        model,
        TinyEvaluation(num_samples=40),
        accelerator=fresh_accelerator(tiny_settings(averaged)),
        targets=TARGETS,
        per_device_batch_size=4,
    )
    last = journal(averaged, "eval")[-1]
    assert (last["weights"], last["metrics"]) == ("average", found)


def test_t14_a_run_whose_hours_are_over_saves_and_the_rerun_goes_on_exactly(plain: Path, tmp_path: Path) -> None:
    hours = iter(range(10**6))
    settings = tiny_settings(tmp_path / "cut", max_hours=40.0, clock=lambda: 3600.0 * next(hours))
    with pytest.raises(TimeUpError, match=r"stopped because max_hours are over after step .* rerun") as caught:
        run(settings)
    assert caught.value.exit_code == 143
    assert 1 <= max(kept_steps(tmp_path / "cut")) < 8
    run(tiny_settings(tmp_path / "cut"))
    assert files_of(tmp_path / "cut") == files_of(plain)


def test_the_profiler_leaves_a_trace_of_the_steps(tmp_path: Path) -> None:
    run(tiny_settings(tmp_path, profile_steps=2, max_steps=5))
    trace = json.loads(gzip.decompress((tmp_path / "profile/rank-0.json.gz").read_bytes()))
    names = [event.get("name", "") for event in trace["traceEvents"]]
    assert names.count("Optimizer.step#AdamW.step") == 2
    assert "aten::linear" in names


def test_t8_fp16_with_its_scale_trains_and_resumes_exactly(plain: Path, tmp_path: Path) -> None:
    run(tiny_settings(tmp_path / "whole", precision="fp16"))
    run(tiny_settings(tmp_path / "cut", precision="fp16", max_steps=5))
    run(tiny_settings(tmp_path / "cut", precision="fp16"))
    assert files_of(tmp_path / "cut") == files_of(tmp_path / "whole")
    assert b'"loss_scale"' in files_of(tmp_path / "whole")["optimizer.json"]
    losses = [[line["loss"] for line in journal(folder, "step")] for folder in (plain, tmp_path / "whole")]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert losses[1] != losses[0]


class SteepModel(TinyModel):
    """Its logits are the same, its gradients a hundred thousand times as large: in fp16 they overflow at first."""

    def forward(
        self,
        video: torch.Tensor,
        mel: torch.Tensor,
        intervals_seconds: torch.Tensor,
        has_audio: torch.Tensor | None = None,
    ) -> object:
        output = super().forward(video, mel, intervals_seconds, has_audio)
        steep = {name: value + (value - value.detach()) * 1e5 for name, value in output.logits.items()}
        return output._replace(logits=steep)


def test_t11_gradients_that_overflow_in_fp16_leave_the_step_out_and_halve_the_scale(tmp_path: Path) -> None:
    model, start = SteepModel(), SteepModel()
    run(tiny_settings(tmp_path, precision="fp16", max_steps=1), model=model)
    first = journal(tmp_path, "step")[0]
    assert (first["grad_norm"], first["loss_scale"]) == (None, 65536.0)
    assert torch.equal(model.positions, start.positions)
    state = json.loads(files_of(tmp_path)["optimizer.json"])
    assert state["loss_scale"] == {"factor": 32768.0, "good_steps": 0}


def test_the_loss_scale_doubles_after_2000_good_steps_and_is_never_less_than_one() -> None:
    scale = LossScale(is_on=True)
    for _ in range(2000):
        scale.held()
    assert scale.state() == {"factor": 2.0**17, "good_steps": 0}
    assert [scale.overflowed() for _ in range(18)] == [True] * 17 + [False]
    assert scale.factor == 1.0
    assert LossScale(is_on=False).state() is None
