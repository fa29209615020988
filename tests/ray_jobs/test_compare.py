"""``ca2st compare``: what differs, what was reached and what it cost, as the tracking store has it."""

import gc
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlflow import MlflowClient
from mlflow.entities import Metric, Param
from typer.testing import CliRunner

from ca2st.errors import UserInputError
from ray_jobs import compare as comparing
from ray_jobs.cli import app
from ray_jobs.compare import RunFilter, TrackedRun, _device_hours, compare, read_runs, render_comparison_page
from ray_jobs.errors import TrackingUnavailableError
from ray_jobs.pages.charts import metric_charts, places, thinned


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Three runs of two experiments in a real store."""
    uri = f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"
    client = MlflowClient(uri)
    first, second = client.create_experiment("first"), client.create_experiment("second")
    _log(client, first, "cast", start=1, params={"model.kind": "cast"}, top1=0.5, speed=40.0, workers=2)
    _log(client, first, "cava", start=2, params={"model.kind": "cava", "extra": "<b>"}, top1=0.6, speed=20.0)
    _log(client, second, "cast", start=3, params={"model.kind": "cast"}, top1=0.7, speed=40.0, gpu=True)
    yield uri
    gc.collect()  # MLflow keeps engines open until they are collected: no warning of it lands in another test


def _log(
    client: MlflowClient,
    experiment: str,
    name: str,
    *,
    start: int,
    params: dict[str, str],
    top1: float,
    speed: float,
    workers: int = 1,
    gpu: bool = False,
) -> None:
    tags = {"ca2st.name": name, "team": "blue" if start < 3 else "red"} | ({"hardware.gpus": "8 x H200"} if gpu else {})
    run = client.create_run(experiment, start_time=start * 1_000_000, run_name=name, tags=tags)
    settings = {"training.global_batch_size": "32", "launch.workers": str(workers), "name": name} | params
    metrics = [Metric("train/clips_per_second", speed, step, step) for step in range(1, 11)]
    metrics += [Metric("train/loss", 4 - step * 0.1, step, step) for step in range(1, 11)]
    metrics += [Metric("train/loss", 99.0, 0, 5)]  # an earlier value of step 5, sent twice
    metrics += [Metric("system/one:cpu_utilization_percentage", 99.0, 5, 5)]
    metrics += [Metric("validation/top1", top1 / 2, 5, 5), Metric("validation/top1", top1, 10, 10)]
    client.log_batch(run.info.run_id, metrics, [Param(key, value) for key, value in settings.items()])
    client.set_terminated(run.info.run_id)


def run(name: str, **values: Any) -> TrackedRun:
    own: dict[str, Any] = {
        "run_id": f"id-{name}",
        "name": name,
        "experiment": "ours",
        "status": "FINISHED",
        "started": "2026-01-01T00:00:00+00:00",
        "settings": {},
        "tags": {},
        "metrics": {},
        "curves": {},
        "device_hours": None,
        "device": "CPU",
    }
    return TrackedRun(**(own | values))


def test_runs_come_oldest_first_with_their_curves_and_the_cost_of_their_steps(store: str) -> None:
    cast, cava, other = read_runs(store, RunFilter())
    assert [cast.name, cava.name, other.name] == ["cast", "cava", "cast"]
    assert (cast.experiment, other.experiment) == ("first", "second")
    assert [step for step, _ in cast.curves["train/loss"]] == list(range(1, 11))
    assert dict(cast.curves["train/loss"])[5] == 3.5, "the newest value of a step"
    assert cast.curves["validation/top1"] == ((5, 0.25), (10, 0.5))
    assert cast.device_hours == pytest.approx(10 * 32 / 40 * 2 / 3600), "two workers, ten steps of 0.8 s"
    assert (cast.device, other.device) == ("CPU", "GPU")


@pytest.mark.parametrize(
    ("wanted", "names"),
    [
        (RunFilter(experiment="first"), ["cast", "cava"]),
        (RunFilter(recipes=("cava",)), ["cava"]),
        (RunFilter(tags={"team": "red"}), ["cast"]),
        (RunFilter(newest=2), ["cava", "cast"]),
        (RunFilter(runs=("cava", "cast")), ["cava", "cast"]),
    ],
)
def test_filters_choose(store: str, wanted: RunFilter, names: list[str]) -> None:
    assert [run.name for run in read_runs(store, wanted)] == names


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (RunFilter(experiment="frist"), "experiment: .*found 'frist' .did you mean 'first'"),
        (RunFilter(runs=("cavo",)), "run 'cavo'.*did you mean 'cava'"),
        (RunFilter(runs=("",)), "run '': expected one run, found 3 ids that begin so"),
        (RunFilter(recipes=("none",)), "of recipe none"),
        (RunFilter(tags={"team": "green"}), "with tag team=green"),
    ],
)
def test_a_filter_that_matches_nothing_says_what_there_is(store: str, wanted: RunFilter, message: str) -> None:
    with pytest.raises(UserInputError, match=message):
        read_runs(store, wanted)


def test_a_store_that_is_not_there_is_refused_and_not_made(tmp_path: Path) -> None:
    with pytest.raises(UserInputError, match=r"nothing\.db: expected an MLflow store, found no such file; train first"):
        read_runs(f"sqlite:///{tmp_path}/away/nothing.db", RunFilter())
    assert not (tmp_path / "away").exists()


def test_k8_a_store_without_such_a_run_is_named_without_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MlflowClient, "search_experiments", lambda _: [])
    monkeypatch.setattr(comparing, "_search", lambda *_: [])
    with pytest.raises(UserInputError, match=r"no run of https://mlflow\.example\.org ") as refusal:
        read_runs("https://me:hunter2@mlflow.example.org", RunFilter())
    assert "hunter2" not in str(refusal.value)


def test_a_store_that_is_away_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(TrackingUnavailableError, match="compare again when it is back"):
        read_runs("http://127.0.0.1:9", RunFilter())


def test_settings_that_differ_are_told_and_equal_ones_counted() -> None:
    runs = [
        run("a", settings={"name": "a", "optim.base_lr": "1", "seed": "0"}, tags={"git.commit": "abc"}),
        run("b", settings={"name": "b", "optim.base_lr": "2", "seed": "0", "extra": "x"}, tags={"git.commit": "def"}),
    ]
    found = compare(runs)
    assert found.settings == {"extra": [None, "x"], "optim.base_lr": ["1", "2"], "git.commit": ["abc", "def"]}
    assert found.num_equal_settings == 1


def test_deltas_refer_to_the_baseline_and_cost_to_a_point_of_accuracy() -> None:
    runs = [
        run("a", metrics={"test/top1": 0.5, "validation/top1": 0.9}, device_hours=2.0),
        run("b", metrics={"validation/top1": 0.8}, device_hours=4.0),
        run("c"),
    ]
    first, second, third = compare(runs, baseline="b").runs
    assert (first.accuracy_name, first.accuracy, first.hours_per_point) == ("test/top1", 0.5, 2 / 50)
    assert first.deltas == {"validation/top1": pytest.approx(0.1)}
    assert second.deltas == {"validation/top1": 0}
    assert second.hours_per_point == 4 / 80
    assert (third.accuracy, third.hours_per_point, third.deltas) == (None, None, {})
    with pytest.raises(UserInputError, match="--baseline 'd': expected one of a, b, c"):
        compare(runs, baseline="d")
    twins = [run("a"), replace(run("a"), run_id="other-id")]
    with pytest.raises(UserInputError, match=r"expected one of a \(id-a\), a \(other-id\)"):
        compare(twins, baseline="d")


def test_a_test_on_the_runs_own_dataset_stands_for_it_and_a_transfer_does_not() -> None:
    tags = {"data.train.dataset": "epic_sounds"}
    metrics = {"test/hd_epic_sounds-test/top1": 0.3, "validation/top1": 0.6}
    assert run("a", tags=tags, metrics=metrics).accuracy_name == "validation/top1"
    metrics["test/epic_sounds-validation/top1"] = 0.5
    assert run("a", tags=tags, metrics=metrics).accuracy_name == "test/epic_sounds-validation/top1"


def test_best_and_last_come_with_their_steps() -> None:
    curve = ((10, 0.5), (20, 0.75), (30, 0.75), (40, 0.25))
    (found,) = compare([run("a", metrics={"validation/top1": 0.25}, curves={"validation/top1": curve})]).runs
    assert (found.accuracy, found.last_step, found.best, found.best_step) == (0.25, 40, 0.75, 20)


def test_an_ambiguous_baseline_is_refused_with_the_ids() -> None:
    twins = [run("a", settings={"seed": "0"}), run("a", run_id="other-id", settings={"seed": "1"}), run("b")]
    with pytest.raises(UserInputError, match=r"--baseline 'a': expected one run, found 2: id-a .* other-id"):
        compare(twins, baseline="a")
    assert compare(twins, baseline="other").baseline == "other-id"


def test_runs_of_one_name_are_told_apart_by_experiment_setting_or_id() -> None:
    by_seed = [run("a", run_id=f"{seed}-id", settings={"training.seed": seed, "lr": "1"}) for seed in ("0", "1")]
    assert [one.label for one in compare([*by_seed, run("b")]).runs] == ["a (seed 0)", "a (seed 1)", "b"]
    by_experiment = [run("a", run_id=name, experiment=name) for name in ("first", "second")]
    assert [one.label for one in compare(by_experiment).runs] == ["a (first)", "a (second)"]
    twins = [run("a", run_id="1234567890"), run("a", run_id="abcdefghij")]
    assert [one.label for one in compare(twins).runs] == ["a (12345678)", "a (abcdefgh)"]


def test_a_model_on_several_datasets_has_the_harmonic_mean_of_the_means_of_its_seeds() -> None:
    def one(kind: str, dataset: str, top1: float) -> TrackedRun:
        tags = {"data.train.dataset": dataset}
        return run(f"{kind}-{dataset}-{top1}", settings={"model.kind": kind}, tags=tags, metrics={"test/top1": top1})

    runs = [one("cast", "a", 0.4), one("cast", "a", 0.6), one("cast", "b", 0.25), one("cava", "a", 0.9)]
    (found,) = compare(runs).across_datasets
    assert found.model == "cast"
    assert found.accuracies == {"a": 0.5, "b": 0.25}
    assert found.harmonic_mean == pytest.approx(2 / (2 + 4))
    wider = [
        replace(one("cast", name, 0.5), settings={"model.kind": "cast", "model.dim": dim})
        for name, dim in (("a", "96"), ("b", "48"))
    ]
    assert compare(wider).across_datasets == [], "another width is another model"


def test_an_axis_of_nothing_but_zeros_has_the_step_of_fractions_of_one() -> None:
    assert places(0.0, 0.0) == [0.0, 0.2]


@given(st.floats(-1e6, 1e6), st.one_of(st.just(0.0), st.floats(1e-3, 1e6)))
def test_round_places_span_the_values_in_even_steps(low: float, span: float) -> None:
    found = places(low, low + span)
    width = found[1] - found[0]
    assert 2 <= len(found) <= 12
    assert found[0] <= low + 1e-6 * width
    assert found[-1] >= low + span - 1e-6 * width
    assert all(b - a == pytest.approx(width, rel=1e-6) for a, b in pairwise(found))


def test_a_long_curve_is_thinned_and_keeps_its_end() -> None:
    curve = tuple((step, float(step)) for step in range(10_001))
    assert len(thinned(curve)) <= 400
    assert thinned(curve)[-1] == (10_000, 10_000.0)


def test_a_chart_puts_equal_steps_of_two_runs_at_one_place() -> None:
    curves = [{"loss": ((0, 4.0), (10, 2.0))}, {"loss": ((5, 3.0), (10, 1.0))}, {"lonely": ((1, 1.0),)}]
    (chart,) = metric_charts(curves, names=["a", "b", "c"])
    first, second = chart.lines
    assert [first.name, second.name] == ["a", "b"]
    assert first.points[-1].x == second.points[-1].x == chart.frame.right
    assert first.points[0].y < first.points[1].y < second.points[1].y, "a greater value stands higher"


def test_the_page_holds_every_number_asks_no_network_and_escapes_names() -> None:
    runs = [
        run("<script>a", metrics={"test/top1": 0.5}, curves={"train/loss": ((1, 4.0), (2, 3.0))}, device_hours=1.5),
        run("b", metrics={"test/top1": 0.625}, curves={"train/loss": ((1, 4.0), (2, 2.0))}, settings={"lr": "1"}),
    ]
    html = render_comparison_page(compare(runs), source="sqlite:///runs/mlflow.db")
    assert "<script" not in html
    assert "&lt;script&gt;a" in html
    assert not re.search(r"""(?:src|href)=["']|url\(|@import""", html), "nothing is fetched"
    assert "default-src 'none'" in html
    assert "50.0 %" in html
    assert "62.5 %" in html
    assert "+12.5" in html
    assert html.count('<path class="curve"') == 2
    assert 'data-setting="lr"' in html


def test_the_command_prints_a_table_json_and_a_page(store: str, tmp_path: Path) -> None:
    page = tmp_path / "compare.html"
    options = ["compare", "--tracking-uri", store, "--experiment", "first"]
    shown = CliRunner().invoke(app, [*options, "--html", str(page)])
    assert shown.exit_code == 0, shown.exception
    assert re.search(r"cava +\w{8} +finished +60.0% +10 +60.0% +10 +\+10.0 +16 s CPU +20", shown.stdout)
    assert "model.kind: cast | cava" in shown.stdout
    assert "&lt;b&gt;" in page.read_text()
    facts = json.loads(CliRunner().invoke(app, [*options, "--json", "--baseline", "cava"]).stdout)
    assert [one["name"] for one in facts["runs"]] == ["cast", "cava"]
    assert facts["runs"][0]["deltas"]["validation/top1"] == pytest.approx(-0.1)
    assert facts["runs"][0]["curves"]["validation/top1"] == [[5, 0.25], [10, 0.5]]
    refused = CliRunner().invoke(app, [*options, "--tag", "team"])
    assert isinstance(refused.exception, UserInputError)
    assert "expected name=value, found 'team'" in str(refused.exception)


def test_hours_of_an_elastic_run_count_the_devices_of_each_step() -> None:
    settings = {"training.global_batch_size": "36", "launch.workers": "4"}
    speeds = tuple((step, 36.0) for step in range(1, 11))  # a second a step
    assert _device_hours(speeds, (), settings) == pytest.approx(40 / 3600)
    assert _device_hours(speeds, ((0, 4.0), (6, 1.0)), settings) == pytest.approx((6 * 4 + 4 * 1) / 3600)


def test_how_busy_the_nodes_were_is_not_compared(store: str) -> None:
    (run, _) = read_runs(store, RunFilter(experiment="first"))
    assert set(run.metrics) == {"train/clips_per_second", "train/loss", "validation/top1"}
