import json
from dataclasses import replace
from pathlib import Path

import pytest

from ca2st.errors import UserInputError
from pipelines.views import EvaluationViews
from ray_jobs.evaluation import robustness, workers
from ray_jobs.evaluation.perturbations import PERTURBATIONS
from ray_jobs.evaluation.robustness import measure_robustness, robustness_chart
from sharding.format.shard_set import LabelSpace
from support.fake_shards import make_samples, make_shard_set
from support.trained import trained_model

ONE_VIEW = EvaluationViews(protocol="test", clips=1, crops=1)


def use_model(
    monkeypatch: pytest.MonkeyPatch, run_dir: Path, kind: str, classes: dict[str, list[str]] | None = None
) -> None:
    """`classes`: what the run's document says of its targets, where it is not the model's own."""
    trained = trained_model(run_dir, kind)
    trained.checkpoint.folder.mkdir(parents=True)
    monkeypatch.setattr(workers.inference, "load_trained", lambda _: trained)
    monkeypatch.setattr(robustness, "find_checkpoint", lambda _: trained.checkpoint.folder)
    document = trained if classes is None else replace(trained, classes=classes)
    monkeypatch.setattr(robustness, "run_document_of", lambda _: document)


def test_every_condition_is_tested_on_the_same_samples_and_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_model(monkeypatch, tmp_path / "run", "ca2st")
    shards = make_shard_set(tmp_path / "set", make_samples(12), samples_per_shard=4, split="validation")
    report, folder = measure_robustness(tmp_path / "run", str(shards.root), ONE_VIEW)
    assert [one.name for one in report.conditions] == list(PERTURBATIONS)
    for one in report.conditions:
        assert one.against_clean.num_samples == 12
        assert one.against_clean.first == report.clean["top1"]
        assert one.against_clean.second == one.metrics["top1"]
    assert json.loads((folder / "robustness.json").read_text())["how_noise_is_added"].startswith("in the power of")
    plot = (folder / "robustness.svg").read_text()
    assert all(one.says in plot for one in PERTURBATIONS.values())
    best, worst = (replace(report.conditions[0].against_clean, second=x, low=x - 0.9, high=x + 0.9) for x in (1.0, 0.0))
    wide = [replace(one, against_clean=end) for one, end in zip(report.conditions, (best, worst), strict=False)]
    chart = robustness_chart(replace(report, conditions=wide))
    assert [mark.label for mark in (chart.y_marks[0], chart.y_marks[-1])] == ["0", "100"], "no accuracy beyond"
    again, _ = measure_robustness(tmp_path / "run", str(shards.root), ONE_VIEW, conditions=["pink_noise"])
    assert again.conditions[0].metrics == report.conditions[1].metrics


def test_what_cannot_be_tested_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_model(monkeypatch, tmp_path / "run", "cast")
    with pytest.raises(UserInputError, match="expected a model that hears, found cast"):
        measure_robustness(tmp_path / "run", "set", ONE_VIEW)
    with pytest.raises(UserInputError, match=r"--conditions: expected one of white_noise, .*found 'pink'"):
        measure_robustness(tmp_path / "run", "set", ONE_VIEW, conditions=["pink"])


@pytest.mark.parametrize("labelling", ["none", "several"])
def test_a_set_without_a_label_per_sample_is_refused_before_anything_is_scored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, labelling: str
) -> None:
    use_model(monkeypatch, tmp_path / "run", "ca2st")
    samples = [replace(sample, labels=()) for sample in make_samples(4)]
    shards = make_shard_set(tmp_path / "set", samples, labelling=labelling)
    with pytest.raises(UserInputError, match=f"expected samples with a label each, found {labelling}"):
        measure_robustness(tmp_path / "run", str(shards.root), ONE_VIEW, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_set_without_labels_of_a_target_of_the_model_is_refused_before_anything_is_scored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_model(monkeypatch, tmp_path / "run", "ca2st", {"verb": ["red", "green", "blue"], "noun": ["cup"]})
    verbs = (LabelSpace(name="verb", classes=("red", "green", "blue")),)
    shards = make_shard_set(tmp_path / "set", make_samples(4), label_spaces=verbs, targets=("verb",))
    with pytest.raises(UserInputError, match="expected labels of all targets of the model, found none of noun: actio"):
        measure_robustness(tmp_path / "run", str(shards.root), ONE_VIEW, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_target_that_the_main_metric_does_not_need_may_lack_labels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    classes = {"noun": ["cup"], "tool": ["knife"], "verb": ["red", "green", "blue"]}
    use_model(monkeypatch, tmp_path / "run", "ca2st", classes)
    spaces = tuple(LabelSpace(name=name, classes=tuple(classes[name])) for name in ("noun", "verb"))
    samples = [replace(sample, labels=(0, 0)) for sample in make_samples(4)]
    shards = make_shard_set(tmp_path / "set", samples, label_spaces=spaces, targets=("noun", "verb"))

    def begins_to_score(*_: object, **__: object) -> None:
        raise InterruptedError

    monkeypatch.setattr(robustness, "evaluate_checkpoint", begins_to_score)
    with pytest.raises(InterruptedError):
        measure_robustness(tmp_path / "run", str(shards.root), ONE_VIEW, out=tmp_path / "out")
