import json
import os
import signal
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from sklearn import metrics as oracle

from ca2st.durable import open_itself, take_lock
from ca2st.errors import EnvironmentFault, UserInputError
from pipelines.views import EvaluationViews
from ray_jobs.errors import WorkerFailedError
from ray_jobs.evaluation import workers
from ray_jobs.evaluation.predictions import PredictionFacts, Rows, read_facts, read_rows
from ray_jobs.evaluation.workers import (
    EvaluationReport,
    LabelMatch,
    Workers,
    evaluate_checkpoint,
    match_labels,
    means_of,
)
from ray_jobs.runs.inference import TrainedModel
from sharding.format.shard_set import LabelSpace, Manifest, ShardSet
from support.fake_shards import make_samples, make_shard_set
from support.trained import trained_model

VIEWS = EvaluationViews(protocol="test", clips=2, crops=1)
SPACE = LabelSpace(name="label", classes=("red", "green", "blue"))


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrainedModel:
    """A model in memory, and workers that score in this process, one after the other."""
    made = trained_model(tmp_path / "run")
    made.checkpoint.folder.mkdir(parents=True)
    monkeypatch.setattr(workers.inference, "load_trained", lambda _: made)

    def in_turn(job: workers._Job) -> None:
        for rank in range(job.world_size):
            assert workers._score_as_worker(job, rank) is None

    monkeypatch.setattr(workers, "_score_in_processes", in_turn)
    return made


def a_set(root: Path, *, classes: tuple[str, ...] = SPACE.classes) -> ShardSet:
    spaces = (LabelSpace(name="label", classes=classes),)
    return make_shard_set(root, make_samples(11), samples_per_shard=4, split="validation", label_spaces=spaces)


def rows_of(report: EvaluationReport) -> Rows:
    (rows,) = read_rows(report.predictions, read_facts(report.predictions))
    return rows


def test_any_number_of_workers_gives_the_same_file_in_the_sets_order(trained: TrainedModel, tmp_path: Path) -> None:
    shards = a_set(tmp_path / "set")
    alone = evaluate_checkpoint(tmp_path / "run", shards.root, VIEWS)
    first = rows_of(alone)
    assert first.keys == [f"clip-{number:04d}" for number in range(11)]
    assert first.labels["label"].tolist() == [number % 3 for number in range(11)]
    assert alone.top1 == oracle.accuracy_score(first.labels["label"], first.probabilities["label"].argmax(1))
    assert json.loads(alone.predictions.with_suffix(".metrics.json").read_text())["top1"] == alone.top1
    for number in (2, 3, 20):  # more than there are samples
        report = evaluate_checkpoint(tmp_path / "run", shards.root, VIEWS, workers=Workers(number=number))
        rows = rows_of(report)
        assert (rows.keys, rows.labels["label"].tolist()) == (first.keys, first.labels["label"].tolist())
        np.testing.assert_allclose(rows.probabilities["label"], first.probabilities["label"], rtol=1e-4, atol=1e-6)
        assert report.metrics == alone.metrics
    assert not list(alone.predictions.parent.glob("*.parts"))


def test_a_transfer_matches_classes_by_name_and_reports_what_has_no_match(
    trained: TrainedModel, tmp_path: Path
) -> None:
    same = rows_of(evaluate_checkpoint(tmp_path / "run", a_set(tmp_path / "same").root, VIEWS))
    moved = a_set(tmp_path / "moved", classes=("blue", "violet", "red"))
    report = evaluate_checkpoint(tmp_path / "run", moved.root, VIEWS)
    rows = rows_of(report)
    np.testing.assert_array_equal(rows.probabilities["label"], same.probabilities["label"])
    assert rows.labels["label"].tolist() == [(2, -1, 0)[number % 3] for number in range(11)]
    assert report.unmatched == {"label": {"model": ["green"], "set": ["violet"]}}
    assert report.num_unmatched == {"label": 4}
    known = rows.labels["label"] >= 0
    expected = oracle.accuracy_score(rows.labels["label"][known], rows.probabilities["label"][known].argmax(1))
    assert report.top1 == expected


def test_a_worker_that_sees_another_set_at_the_same_place_is_refused(
    trained: TrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node with an older copy of the set: the same keys, but its classes in another order."""
    shards, other = a_set(tmp_path / "set"), a_set(tmp_path / "other", classes=("blue", "green", "red"))

    def on_another_node(job: workers._Job) -> None:
        raise WorkerFailedError(*(workers._score_as_worker(replace(job, data=str(other.root)), 1) or ("", 0)))

    monkeypatch.setattr(workers, "_score_in_processes", on_another_node)
    expected = shards.manifest.fingerprint[:16]
    with pytest.raises(
        WorkerFailedError, match=f"rank 1: .*expected the shard set of the fingerprint {expected}, found"
    ):
        evaluate_checkpoint(tmp_path / "run", shards.root, VIEWS, workers=Workers(number=2))


def test_two_tests_do_not_write_the_same_predictions_at_a_time(trained: TrainedModel, tmp_path: Path) -> None:
    shards = make_shard_set(tmp_path / "set", make_samples(3))
    out = tmp_path / "found.parquet"
    parts = tmp_path / "found.parquet.parts"
    parts.mkdir()
    (parts / "part-00000-of-00001.parquet").write_text("of a test that was killed")
    with open_itself(parts / "lock", "ab") as lock:
        assert take_lock(lock)
        with pytest.raises(UserInputError, match="expected to be the only test that writes it, found another one at w"):
            evaluate_checkpoint(tmp_path / "run", shards.root, VIEWS, predictions=out)
        assert sorted(path.name for path in parts.iterdir()) == ["lock", "part-00000-of-00001.parquet"]
    assert evaluate_checkpoint(tmp_path / "run", shards.root, VIEWS, predictions=out).num_samples == 3
    assert not parts.exists()


def test_a_set_without_labels_has_predictions_and_no_metric(trained: TrainedModel, tmp_path: Path) -> None:
    samples = [replace(sample, labels=()) for sample in make_samples(5)]
    shards = make_shard_set(tmp_path / "set", samples, label_spaces=(), targets=(), labelling="none")
    report = evaluate_checkpoint(tmp_path / "run", shards.root, VIEWS)
    assert (report.metrics, report.top1, report.num_samples, report.tables) == ({}, None, 5, [])
    rows = rows_of(report)
    assert rows.labels == {}
    assert rows.probabilities["label"].sum(axis=1) == pytest.approx(np.ones(5))


def test_a_metric_that_a_set_cannot_have_is_null_in_the_file_of_metrics(trained: TrainedModel, tmp_path: Path) -> None:
    samples = [replace(sample, labels=(1,)) for sample in make_samples(3)]
    shards = make_shard_set(tmp_path / "set", samples, dataset="vgg_sound")
    report = evaluate_checkpoint(tmp_path / "run", shards.root, VIEWS)
    text = report.predictions.with_suffix(".metrics.json").read_text()
    assert (json.loads(text)["auc"], json.loads(text)["map"]) == (None, 1.0)


def test_samples_of_several_labels_are_matched_by_name_and_ranked(trained: TrainedModel, tmp_path: Path) -> None:
    hers = [(0,), (0, 1), (1, 2), (2,), ()]
    samples = [replace(sample, labels=labels) for sample, labels in zip(make_samples(5), hers, strict=True)]
    spaces = (LabelSpace(name="label", classes=("blue", "violet", "red")),)
    shards = make_shard_set(tmp_path / "set", samples, label_spaces=spaces, labelling="several")
    report = evaluate_checkpoint(tmp_path / "run", shards.root, VIEWS)
    rows = rows_of(report)
    assert rows.labels["label"].tolist() == [[0, 0, 1], [0, 0, 1], [1, 0, 0], [1, 0, 0], [0, 0, 0]]
    known = rows.labels["label"][:, [0, 2]]
    expected = oracle.average_precision_score(known, rows.probabilities["label"][:, [0, 2]], average="macro")
    assert report.metrics["map"] == pytest.approx(expected)
    assert report.unmatched == {"label": {"model": ["green"], "set": ["violet"]}}


def manifest_of(*spaces: LabelSpace, root: Path) -> Manifest:
    sample = make_samples(1)[0]
    made = make_shard_set(root, [type(sample)(key="a", labels=(0,) * len(spaces))], label_spaces=spaces)
    return replace(made.manifest, targets=tuple(space.name for space in spaces))


def test_the_one_target_of_a_model_meets_the_one_of_a_set_whatever_their_names(tmp_path: Path) -> None:
    manifest = manifest_of(LabelSpace(name="sound", classes=("blue", "red")), root=tmp_path)
    match = match_labels({"label": ["red", "green", "blue"]}, manifest, where="set")
    assert (match.spaces, match.maps) == ({"label": "sound"}, {"label": [2, 0]})


def test_a_set_of_no_class_that_the_model_knows_is_refused(tmp_path: Path) -> None:
    manifest = manifest_of(LabelSpace(name="label", classes=("violet", "brown")), root=tmp_path)
    with pytest.raises(
        UserInputError,
        match=r"no class of the 3 .*: only in the model 'blue', .*; only in the set 'brown', 'violet'; convert",
    ):
        match_labels({"label": list(SPACE.classes)}, manifest, where="set")
    with pytest.raises(UserInputError, match="expected one of the model's label spaces verb, noun, found label"):
        match_labels({"verb": ["a"], "noun": ["b"]}, manifest, where="set")


def test_a_set_with_labels_of_one_of_two_targets_is_tested_on_that_one(tmp_path: Path) -> None:
    manifest = manifest_of(LabelSpace(name="verb", classes=("b", "a")), root=tmp_path)
    match = match_labels({"verb": ["a", "b"], "noun": ["c"]}, manifest, where="set")
    assert (match.targets, match.maps["verb"]) == (("verb",), [1, 0])


def test_no_worker_at_all_is_refused() -> None:
    with pytest.raises(UserInputError, match="--workers: expected at least 1, found 0"):
        Workers(number=0)


def test_several_runs_have_the_mean_of_their_splits_and_the_harmonic_mean(tmp_path: Path) -> None:
    def report(top1: float) -> EvaluationReport:
        return EvaluationReport(
            metrics={"top1": top1},
            main_metric="top1",
            num_samples=1,
            predictions=tmp_path,
            tables=[],
            checkpoint=tmp_path,
            set_name="ucf_101-validation",
            step=1,
        )

    means = means_of([report(0.2), report(0.6), report(0.4)])
    assert means == pytest.approx({"mean": 0.4, "harmonic_mean": 3 / (5 + 5 / 3 + 2.5)})
    assert asdict(report(0.5))["set_name"] == "ucf_101-validation"


def job_of_two(checkpoint: Path, parts: Path) -> workers._Job:
    return workers._Job(
        checkpoint=checkpoint,
        data=str(parts / "no set"),
        views=VIEWS,
        parts=parts,
        facts=PredictionFacts(targets={}, labelled=()),
        match=LabelMatch(spaces={}, maps={}, unmatched={}, several=False),
        world_size=2,
    )


@pytest.mark.slow
def test_what_failed_in_a_worker_is_told_with_its_rank_and_exit_code(tmp_path: Path) -> None:
    with pytest.raises(WorkerFailedError, match=r"rank [01]: \w+: .*no run") as caught:
        workers._score_in_processes(job_of_two(tmp_path / "no run", tmp_path))
    assert caught.value.exit_code == UserInputError.exit_code


def kill_itself(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_a_worker_that_was_killed_is_explained_as_one_of_a_training_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "_worker_process", kill_itself)
    with pytest.raises(WorkerFailedError, match=r"rank 0 was killed \(SIGKILL\).*dmesg") as caught:
        workers._score_in_processes(replace(job_of_two(tmp_path, tmp_path), world_size=1))
    assert caught.value.exit_code == EnvironmentFault.exit_code


def end_by_an_interrupt(*_: object, **__: object) -> None:
    os._exit(130)


@pytest.mark.slow
def test_a_test_that_was_interrupted_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_worker_process", end_by_an_interrupt)
    with pytest.raises(WorkerFailedError, match=r"^stopped by signal 2; no metric is reported$") as caught:
        workers._score_in_processes(replace(job_of_two(tmp_path, tmp_path), world_size=1))
    assert caught.value.exit_code == 130
