"""MLflow gets everything the journal holds, once, whenever it can be reached."""

import json
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from ca2st.errors import UserInputError
from ray_jobs.evaluation.workers import EvaluationReport, log_to_run
from ray_jobs.tracking import run_record
from ray_jobs.tracking.run_record import RunRecord, clean_name
from ray_jobs.tracking.sender import EXTRAS, Sender, log_metrics, read_metrics, sync
from ray_jobs.tracking.state import SenderBusyError, TrackingState, one_sender, read_state, unsent_bytes
from support.tracked_runs import end, losses, run_of, start, step, tracked_run, write


def test_stage_times_and_counts_of_the_loader_arrive_under_flat_names(run_dir: Path) -> None:
    stages = {"data_wait_seconds": 0.25, "forward_seconds": 0.5}
    counts = {"decode_seconds": 1.5, "bytes_read": 4096, "quarantined": 2}
    write(run_dir, step(1, 2.5) | {"step_seconds": 0.75, "stages": stages, "loader": counts})
    sync(run_dir)
    assert run_of(run_dir).data.metrics == {
        "train/epoch": 0,
        "train/loss": 2.5,
        "train/lr": 0.1,
        "train/step_seconds": 0.75,
        "work/stage/data_wait_seconds": 0.25,
        "work/stage/forward_seconds": 0.5,
        "work/stage/decode_seconds": 1.5,
        "work/data/bytes_read": 4096,
        "work/data/quarantined": 2,
    }


def test_a_training_that_ends_before_its_first_line_leaves_no_run_behind(run_dir: Path) -> None:
    assert unsent_bytes(run_dir) == 0
    assert sync(run_dir) == 0
    assert read_state(run_dir).run_id is None
    write(run_dir, start())
    sync(run_dir)
    assert run_of(run_dir).info.status == "RUNNING"


def test_a_run_has_its_params_tags_and_every_step(run_dir: Path) -> None:
    write(run_dir, start(), step(1, 2.5), step(2, 2.25))
    metrics = {"top1": 0.5, "top5": None}
    write(run_dir, {"event": "eval", "step": 2, "split": "validation", "metrics": metrics}, end("done", 2))
    sync(run_dir)
    run = run_of(run_dir)
    assert run.data.params == {"optim.base_lr": "0.1"}
    assert run.data.tags.items() >= {"a": "b", "ca2st.attempt": "1", "ca2st.exit_status": "done"}.items()
    assert run.data.metrics["validation/top1"] == 0.5
    assert losses(run_dir) == [(1, 2.5), (2, 2.25)]
    assert run.info.status == "FINISHED"
    assert run.info.start_time == run.info.end_time == 1_700_000_000_500  # the journal's times, not those of sending
    assert unsent_bytes(run_dir) == 0


def test_k4_a_resume_keeps_the_run_and_sends_no_step_or_evaluation_twice(run_dir: Path) -> None:
    evaluation = {"event": "eval", "step": 2, "split": "validation", "metrics": {"top1": 0.5}}
    write(run_dir, start(), step(1, 3.0), step(2, 2.0), evaluation)
    sync(run_dir)
    first = read_state(run_dir).run_id
    tracked_run(run_dir, read_state(run_dir).uri)
    later = {"time": 1_700_000_100.5}  # MLflow itself drops what it has with the same time
    write(run_dir, start(1) | later, step(2, 2.0) | later, evaluation | later, step(3, 1.0) | later, attempt=2)
    sync(run_dir)
    assert read_state(run_dir).run_id == first
    assert losses(run_dir) == [(1, 3.0), (2, 2.0), (3, 1.0)]
    assert len(MlflowClient(read_state(run_dir).uri).get_metric_history(first, "validation/top1")) == 1
    assert run_of(run_dir).data.tags["ca2st.attempt"] == "2"


def test_a_torn_last_line_waits_for_its_end(run_dir: Path) -> None:
    write(run_dir, step(1, 3.0))
    with (run_dir / "journal.jsonl").open("a") as file:
        file.write('{"event":"step","st')
    sync(run_dir)
    assert losses(run_dir) == [(1, 3.0)]
    assert unsent_bytes(run_dir) == 0  # nobody can send it: no warning asks for that
    with (run_dir / "journal.jsonl").open("a") as file:
        file.write('ep":2,"attempt":1,"time":1700000001,"epoch":0,"loss":2.0,"lr":0.1}\n{"event":"st')
    assert unsent_bytes(run_dir) > 0
    sync(run_dir)
    assert losses(run_dir) == [(1, 3.0), (2, 2.0)]


def test_a_journal_that_is_one_torn_line_makes_no_run(run_dir: Path) -> None:
    (run_dir / "journal.jsonl").write_text('{"event":"start"' + " " * 200_000)
    assert sync(run_dir) == 0
    assert read_state(run_dir).run_id is None


def test_hundreds_of_steps_go_in_batches_and_all_arrive(run_dir: Path) -> None:
    write(run_dir, *(step(number, 1 / number) for number in range(1, 401)))
    sync(run_dir)
    assert losses(run_dir) == [(number, 1 / number) for number in range(1, 401)]


@pytest.mark.parametrize(("ended", "expected"), [("done", "FINISHED"), ("stopped", "KILLED"), ("failed", "FAILED")])
def test_the_run_ends_as_the_training_did(run_dir: Path, ended: str, expected: str) -> None:
    write(run_dir, start(), end(ended) | {"error": "https://me:hunter2@host broke"})
    sync(run_dir)
    run = run_of(run_dir)
    assert run.info.status == expected
    assert run.data.tags["ca2st.exit_status"] == ended
    assert run.data.tags["ca2st.error"] == "https://[hidden]@host broke"


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserInputError, match="expected the folder of a training run"):
        sync(tmp_path)


def test_a_follower_that_outlives_its_attempt_and_the_next_ones_make_one_run(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first is slow to make its run: the second attempt and its follower begin in the meantime."""
    write(run_dir, start(), step(1, 3.0))
    create, begun, made = run_record.open_run, threading.Event(), []

    def slowly(client: MlflowClient, state: TrackingState, say: Any, **named: Any) -> tuple[RunRecord, str]:
        begun.set()
        time.sleep(0.3)
        record, experiment_id = create(client, state, say, **named)
        made.append(record.run_id)
        return record, experiment_id

    monkeypatch.setattr(run_record, "open_run", slowly)
    first = threading.Thread(target=sync, args=(run_dir,))
    first.start()
    assert begun.wait(60)
    tracked_run(run_dir, read_state(run_dir).uri)
    with pytest.raises(SenderBusyError, match="another process is sending"):
        Sender(run_dir, made.append).send()
    sync(run_dir)
    first.join(60)
    assert made == [read_state(run_dir).run_id]
    assert losses(run_dir) == [(1, 3.0)]


def test_who_starts_a_training_does_not_wait_for_a_sender_that_hangs(run_dir: Path) -> None:
    with one_sender(run_dir, wait_seconds=0.0):
        tracked_run(run_dir, read_state(run_dir).uri, params={"optim.base_lr": "0.2"})
    assert read_state(run_dir).params == {"optim.base_lr": "0.2"}


def test_system_metrics_of_every_node_arrive_once(run_dir: Path) -> None:
    write(run_dir, start())
    (run_dir / "system").mkdir()
    for node, load in (("alpha", 50.0), ("beta", 75.0)):
        lines = [{"time": 1.7e9 + n, "step": n, "metrics": {"cpu_utilization_percentage": load + n}} for n in (0, 1)]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (run_dir / "system" / f"{node}.jsonl").write_text(text + '{"torn')
    assert (sync(run_dir), sync(run_dir)) == (4, 0)
    name = "system/beta:cpu_utilization_percentage"
    history = MlflowClient(read_state(run_dir).uri).get_metric_history(read_state(run_dir).run_id, name)
    assert [(one.step, one.value) for one in history] == [(0, 75.0), (1, 76.0)]


def test_extras_are_sent_once_each_when_their_time_comes(run_dir: Path, extras: list[str]) -> None:
    write(run_dir, start(), step(1, 3.0))
    sync(run_dir)
    assert extras == ["inputs"]
    write(run_dir, end("stopped", 1))
    sync(run_dir)
    assert extras == ["inputs"]
    write(run_dir, start(1), end("done", 1), attempt=2)
    sync(run_dir)
    sync(run_dir)
    assert extras == ["inputs", "artefacts", "registered_model"]


def test_an_extra_that_fails_costs_no_metric_and_is_tried_again_by_sync(
    run_dir: Path, extras: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(client: MlflowClient, run_id: str, folder: Path) -> None:
        raise RuntimeError("no space for token=hunter2 at https://me:hunter2@host")

    works, told = EXTRAS["artefacts"], []
    monkeypatch.setitem(EXTRAS, "artefacts", broken)
    write(run_dir, start(), step(1, 3.0), end("done", 1))
    follower = Sender(run_dir, told.append)
    for _ in range(3):
        follower.send(is_last=False)
    assert losses(run_dir) == [(1, 3.0)]
    assert run_of(run_dir).info.status == "FINISHED"
    assert extras == ["inputs", "registered_model"]
    assert len(told) == 1
    assert "RuntimeError" in told[0]
    assert "me:hunter2" not in told[0]
    assert read_state(run_dir).progress.pending == ("artefacts",)
    monkeypatch.setitem(EXTRAS, "artefacts", works)
    sync(run_dir)
    assert extras[-1] == "artefacts"
    assert read_state(run_dir).progress.pending == ()


def test_numbers_of_a_later_test_are_added_and_the_artefacts_sent_again(run_dir: Path, extras: list[str]) -> None:
    write(run_dir, start(), step(1, 0.5), end("done", 1))
    sync(run_dir)
    assert extras.count("artefacts") == 1
    log_metrics(run_dir, {"test/top1": 0.75}, step=1)
    assert run_of(run_dir).data.metrics["test/top1"] == 0.75
    assert extras.count("artefacts") == 2
    assert extras.count("registered_model") == 1
    assert read_state(run_dir).progress.pending == ()


def test_an_evaluation_adds_its_metrics_under_the_name_of_its_set_unless_nothing_is_tracked(
    run_dir: Path, extras: list[str]
) -> None:
    write(run_dir, start(), step(1, 0.5), end("done", 1))
    report = EvaluationReport(
        metrics={"top1": 0.75, "map": 0.5},
        main_metric="top1",
        num_samples=4,
        predictions=run_dir / "predictions.parquet",
        tables=[],
        checkpoint=run_dir / "checkpoints" / "step-1.attempt-1",
        set_name="vgg_sound-test",
        step=1,
    )
    assert not log_to_run(replace(report, tracked=False))
    assert read_state(run_dir).run_id is None
    assert log_to_run(report)
    found = run_of(run_dir).data.metrics
    assert {name: found[f"test/vgg_sound-test/{name}"] for name in ("top1", "map", "num_samples")} == {
        "top1": 0.75,
        "map": 0.5,
        "num_samples": 4,
    }
    assert not log_to_run(replace(report, checkpoint=run_dir.parent / "pulled" / "checkpoints" / "step-1.attempt-1"))


def test_k7_numbers_of_a_later_test_are_cleaned_as_the_journals_are_and_read_back_by_their_own_names(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(run_dir, start(), step(1, 0.5), end("done", 1))
    added = {"test/top#1": 0.75, "test/top5": float("nan"), "test/loss": float("inf")}
    log_metrics(run_dir, added, step=1)
    data = run_of(run_dir).data
    assert data.metrics[clean_name("test/top#1")] == 0.75
    assert not {"test/top5", "test/loss"} & data.metrics.keys()
    assert {data.tags[f"ca2st.not_finite.{name}"] for name in ("test/top5", "test/loss")} == {"at step 1"}
    assert "metric 'test/top#1' is called test/top_1-" in capsys.readouterr().err
    assert read_metrics(run_dir, ["test/top#1"]) == {"test/top#1": 0.75}
    with pytest.raises(UserInputError, match="MLflow has no test/top5 for this run"):
        read_metrics(run_dir, ["test/top#1", "test/top5"])


def test_a_system_metric_that_is_not_finite_is_named_instead_of_sent(run_dir: Path) -> None:
    write(run_dir, start())
    (run_dir / "system").mkdir()
    line = '{"time":1.7e9,"step":3,"metrics":{"gpu_0_power_usage_watts":NaN,"cpu_utilization_percentage":5}}\n'
    (run_dir / "system" / "alpha.jsonl").write_text(line)
    assert sync(run_dir) == 1
    assert run_of(run_dir).data.tags["ca2st.not_finite.system/alpha:gpu_0_power_usage_watts"] == "at step 3"


def test_the_late_end_of_an_attempt_that_was_given_up_does_not_end_the_run(run_dir: Path) -> None:
    write(run_dir, start())
    write(run_dir, start(), attempt=2)
    write(run_dir, end("failed"), attempt=1)
    sync(run_dir)
    assert run_of(run_dir).info.status == "RUNNING"
    write(run_dir, end("done"), attempt=2)
    sync(run_dir)
    assert run_of(run_dir).info.status == "FINISHED"


def test_the_number_of_workers_of_each_attempt_is_a_metric(run_dir: Path) -> None:
    write(run_dir, start() | {"topology": {"world_size": 2}}, step(1, 3.0))
    write(run_dir, start(1) | {"topology": {"world_size": 1}}, step(2, 2.0), attempt=2)
    sync(run_dir)
    client, run_id = MlflowClient(read_state(run_dir).uri), read_state(run_dir).run_id
    assert [(one.step, one.value) for one in client.get_metric_history(run_id, "train/world_size")] == [(0, 2), (1, 1)]
