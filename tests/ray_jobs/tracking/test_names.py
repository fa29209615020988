"""Whatever a setting or metric is called and holds, MLflow takes it, and two never become one."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlflow.utils.validation import _validate_metric_name, _validate_param, _validate_tag

from ray_jobs.tracking import run_record
from ray_jobs.tracking.run_record import (
    LEFT_OUT,
    MAX_NAME_CHARACTERS,
    MAX_PARAM_CHARACTERS,
    MAX_TAG_CHARACTERS,
    batches,
    clean_name,
    clean_params,
    clean_value,
    cleaned,
    open_run,
)
from ray_jobs.tracking.sender import Sender
from ray_jobs.tracking.state import TrackingState, read_state
from support.tracked_runs import run_of, start, step, tracked_run, write

ANY_TEXT = st.text(st.characters() | st.sampled_from("./: -_#"))


@given(ANY_TEXT)
def test_k7_any_name_becomes_one_that_mlflow_takes_and_a_good_one_stays(name: str) -> None:
    clean = clean_name(name)
    _validate_metric_name(clean)
    _validate_param(clean, "value")
    _validate_tag(clean, "value")
    assert len(clean) <= MAX_NAME_CHARACTERS
    assert clean_name(clean) == clean


@given(st.sets(ANY_TEXT, min_size=2))
def test_k7_two_names_never_become_one(names: set[str]) -> None:
    assert len({clean_name(name) for name in names}) == len(names)


@given(st.text(st.characters(codec=None)), st.integers(20, 60))
def test_k7_any_value_can_be_stored_and_a_cut_is_seen(value: str, limit: int) -> None:
    clean = clean_value(value, limit)
    assert len(clean) <= limit
    assert "\0" not in clean.encode().decode()
    if clean != value:
        assert clean.endswith("...(cut)") or "\\" in clean


def test_k7_names_stay_readable() -> None:
    assert clean_name("optim.base_lr") == "optim.base_lr"
    assert clean_name("größe/学習 率") == "größe/学習 率"
    assert clean_name("loss 🔥").startswith("loss _-")
    assert clean_name("../../up").startswith("up-")
    assert clean_name("x" * 1000).startswith("x" * 200)


def test_k7_what_was_changed_is_told() -> None:
    values, changes = cleaned("param", {"good": "1", "a#b": "2", "long": "x" * 10_000}, MAX_PARAM_CHARACTERS)
    assert values["good"] == "1"
    assert values["long"].endswith("...(cut)")
    assert len(changes) == 2
    assert changes[0].startswith("param 'a#b' is called a_b-")
    assert changes[1].startswith("the value of param long, 10000 characters")
    assert cleaned("tag", {"t": "y" * 9000}, MAX_TAG_CHARACTERS)[1]


def test_k7_params_over_the_limit_are_counted_in_one_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_record, "MAX_PARAMS", 10)
    values, changes = clean_params({f"p{number}": "1" for number in range(30)})
    assert len(values) == 10
    assert values[LEFT_OUT].startswith("21 of 30; the run folder's recipe.json")
    assert changes == [f"params left out: {values[LEFT_OUT]}"]


@given(st.dictionaries(st.text(max_size=5), st.integers(0, 400_000).map("x".__mul__), max_size=5))
def test_k7_batches_keep_everything_and_stay_small(values: dict[str, str]) -> None:
    parts = list(batches(values))
    assert {name: value for part in parts for name, value in part.items()} == values
    assert all(sum(map(len, part.values())) < 1_000_000 for part in parts)


class RecordingClient:
    """Takes what MlflowClient takes, within its limits."""

    def __init__(self) -> None:
        self.params: dict[str, str] = {}

    def get_experiment_by_name(self, name: str) -> Any:
        return SimpleNamespace(lifecycle_stage="active", experiment_id="1")

    def search_runs(self, *values: object, **named: object) -> list[object]:
        return []

    def create_run(self, *values: object, **named: object) -> Any:
        return SimpleNamespace(info=SimpleNamespace(run_id="one"))

    def log_batch(self, run_id: str, *, params: Any = (), tags: Any = ()) -> None:
        assert len(params) <= 100
        assert len(tags) <= 100
        self.params |= {param.key: param.value for param in params}


def test_k7_ten_thousand_params_are_all_recorded() -> None:
    settings = {f"data.mixture.{number}.weight": str(number) for number in range(10_000)}
    client, state = RecordingClient(), TrackingState(uri="x", experiment="e", run_name="r", params=settings, tags={})
    open_run(client, state, print, begun=None)  # type: ignore[arg-type]  # as much of a client as is needed
    assert client.params == settings


def test_k7_odd_names_values_and_numbers_reach_a_real_store(tmp_path: Path, store: str) -> None:
    run_dir = tracked_run(
        tmp_path / "odd",
        store,
        experiment=tmp_path.name + "x" * 600,
        run_name="n" * 400,
        params={"p" * 300: "\0", "good": "q" * 7000, "🔥": "\ud800"},
        tags={"t#": "u" * 9000},
    )
    metrics = {"top#1": 0.5, "top5": None, "nan": None}
    evaluation = {"event": "eval", "step": 1, "split": "validation", "metrics": metrics, "not_finite": ["nan"]}
    write(run_dir, start(), step(2, 1.0), evaluation)
    told: list[str] = []
    assert Sender(run_dir, told.append).send() == 4  # epoch, loss and lr of the step, and the one number of the test
    assert len([line for line in told if "is called" in line]) == 4  # two params, a tag, a metric
    data = run_of(run_dir).data
    assert len(data.params) == 3
    assert sorted(map(len, data.params.values())) == [2, 6, 6000]
    assert data.metrics["train/loss"] == 1.0
    assert "validation/nan" not in data.metrics
    assert data.metrics[clean_name("validation/top#1")] == 0.5
    assert data.tags["ca2st.not_finite.validation/nan"] == "at step 1"
    assert read_state(run_dir).progress.last_step == 2
