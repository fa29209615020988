"""A finished run has its small files in MLflow: recipe, journal, card, plots, class names, predictions."""

import html
import json
import os
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from mlflow import MlflowClient

from ray_jobs.errors import TrackingUnavailableError
from ray_jobs.pages.charts import duration_in_words
from ray_jobs.tracking import artefacts
from ray_jobs.tracking.artefacts import collect, log_artefacts, read_run, registered_name
from ray_jobs.tracking.inputs import INPUTS_NAME
from support.http_artefacts import http_store
from support.mlflow_runs import new_run

CLASSES = {"label": ["red", "green", "blue"]}
RECIPE = {
    "name": "mine & yours",
    "model": {"kind": "ca2st", "dim": 16},
    "training": {"epochs": 2, "seed": 5},
    "data": {"train": "s3://bucket/train"},
    "tracking": {"register_model": True, "registered_model": None},
}


@pytest.fixture
def client(store: str) -> MlflowClient:
    return MlflowClient(store)


@pytest.fixture
def run_id(client: MlflowClient, tmp_path: Path) -> str:
    return new_run(client, tmp_path)


def write_journal(run_dir: Path, *events: dict[str, Any], attempt: int = 1) -> None:
    with (run_dir / "journal.jsonl").open("a") as file:
        for event in events:
            file.write(json.dumps({"attempt": attempt, "time": 1_700_000_000.5, **event}, separators=(",", ":")) + "\n")


def step(number: int, loss: float) -> dict[str, Any]:
    return {"event": "step", "step": number, "loss": loss, "lr": 0.1, "clips_per_second": 8.0, "step_seconds": 60.0}


def validated(number: int, top1: float) -> dict[str, Any]:
    return {"event": "eval", "step": number, "split": "validation", "metrics": {"top1": top1, "top5": None}}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A finished run of two attempts; its checkpoint is names and hashes alone."""
    folder = tmp_path / "runs" / "mine"
    checkpoint = folder / "checkpoints" / "step-4.attempt-2"
    checkpoint.mkdir(parents=True)
    (checkpoint / "COMPLETE.json").write_text("{}")
    (checkpoint / "model.safetensors").write_bytes(b"weights")
    (checkpoint / "run.json").write_text(json.dumps({"classes": CLASSES}))
    (folder / "recipe.json").write_text(json.dumps(RECIPE))
    start = {"event": "start", "step": 0, "total_steps": 4, "topology": {"device": "cpu"}, "versions": {"torch": "2"}}
    write_journal(folder, start, step(1, 3.0), step(2, 2.5), validated(2, 0.25), step(3, 9.0))
    end = {"event": "end", "step": 4, "status": "done"}
    write_journal(folder, start, step(3, 2.25), step(4, 2.0), validated(4, 0.5), end, attempt=2)
    return folder


def write_predictions(run_dir: Path, *, name: str = "predictions.step-4.attempt-2.2x3.parquet") -> Path:
    answers = [[0.1, 0.8, 0.1], [0.1, 0.8, 0.1], [0.4, 0.4, 0.2], [0.1, 0.1, 0.8]]
    columns = {
        "key": pa.array(["a", "b", "c", "d"]),
        "label_label": pa.array([0, 0, 0, 2], pa.int32()),
        "label_probabilities": pa.array(answers, pa.list_(pa.float32())),
    }
    pq.write_table(pa.table(columns), run_dir / name)
    return run_dir / name


def stored(client: MlflowClient, run_id: str, folder: str | None = None) -> set[str]:
    found: set[str] = set()
    for file in client.list_artifacts(run_id, folder):
        found |= stored(client, run_id, file.path) if file.is_dir else {file.path}
    return found


def test_k6_a_run_sends_its_small_files_and_no_checkpoint(client: MlflowClient, run_id: str, run_dir: Path) -> None:
    write_predictions(run_dir)
    for _ in range(2):
        log_artefacts(client, run_id, run_dir)
    assert stored(client, run_id) == {
        "run_card.html",
        "recipe.json",
        "classes.json",
        "journal.jsonl",
        "confusion.label.csv",
        "predictions.step-4.attempt-2.2x3.parquet",
        *(f"plots/{name}.svg" for name in ("train.loss", "train.lr", "train.clips_per_second", "validation.top1")),
    }


def test_k7_a_journal_with_a_damaged_byte_is_kept_too(run_dir: Path) -> None:
    with (run_dir / "journal.jsonl").open("ab") as file:
        file.write(b'{"event":"fault","text":"\xff"}\n')
    assert collect(run_dir)["journal.jsonl"].endswith(b'{"event":"fault","text":"\\xff"}\n')


def test_k6_a_file_of_ten_megabytes_stays_and_is_named_in_a_note(run_dir: Path) -> None:
    with (run_dir / "journal.jsonl").open("a") as file:
        file.write(
            json.dumps({"event": "fault", "attempt": 2, "step": 4, "time": 1.0, "text": "x" * 10_000_000}) + "\n"
        )
    found = collect(run_dir)
    assert "journal.jsonl" not in found
    assert max(len(data) for data in found.values()) < artefacts.MAX_BYTES
    journal = run_dir / "journal.jsonl"
    note = found[artefacts.LARGE_FILES_NAME].decode()
    assert note == f"{journal}: {journal.stat().st_size / 1e6:.1f} MB, too large for MLflow; it stays there\n"
    assert str(journal) in found["run_card.html"].decode()


def test_k6_exactly_the_limit_is_too_large_and_a_byte_less_is_not(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = (run_dir / "journal.jsonl").stat().st_size
    monkeypatch.setattr(artefacts, "MAX_BYTES", size)
    assert "journal.jsonl" not in collect(run_dir)
    monkeypatch.setattr(artefacts, "MAX_BYTES", size + 1)
    assert "journal.jsonl" in collect(run_dir)


def test_k6_a_store_that_times_out_is_told_and_gets_everything_later(
    client: MlflowClient, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with http_store() as store:
        experiment = client.create_experiment(f"{tmp_path} behind http", artifact_location=store.address)
        run_id = str(client.create_run(experiment).info.run_id)
        store.status = 504
        with pytest.raises(TrackingUnavailableError, match=re.escape(f"run `ca2st track sync {run_dir}`")) as caught:
            log_artefacts(client, run_id, run_dir)
        assert "504" in str(caught.value)
        assert store.files == {}
        store.status = 200
        log_artefacts(client, run_id, run_dir)
        assert store.files == collect(run_dir)


def test_k8_no_secret_of_recipe_or_journal_reaches_an_artefact(run_dir: Path) -> None:
    recipe = {**RECIPE, "start": {"checkpoint": "https://me:hunter2@host.example/model"}}
    (run_dir / "recipe.json").write_text(json.dumps(recipe))
    write_journal(
        run_dir, {"event": "fault", "step": 4, "error": "GET https://me:hunter2@host.example/a: 404"}, attempt=2
    )
    files = collect(run_dir)
    assert not [name for name, data in files.items() if b"hunter2" in data]
    assert json.loads(files["recipe.json"])["start"]["checkpoint"].endswith("host.example/model")
    assert b"404" in files["journal.jsonl"]


def test_the_card_tells_what_was_trained_on_what_and_how_to_use_it(run_dir: Path) -> None:
    inputs = {"role": "train_1", "dataset": "<birds>", "split": "train", "num_samples": 1234, "num_shards": 3}
    (run_dir / INPUTS_NAME).write_text(json.dumps([{**inputs, "fingerprint": "f" * 64, "source": "s3://bucket/train"}]))
    card = collect(run_dir)["run_card.html"].decode()
    assert "mine &amp; yours" in card
    assert "&lt;birds&gt;, train" in card
    assert "1,234" in card
    assert "label: 3 classes: red, green, blue" in card
    assert f"ca2st predict {run_dir}/checkpoints/step-4.attempt-2 video.mp4" in card
    assert "models:/mine &amp; yours/1" in card
    assert '<tr data-metric="validation/top1"><th scope="row">validation/top1</th><td>0.5</td></tr>' in card
    assert "4 min 0 s in steps" in card
    assert "2 attempts" in card


@pytest.mark.parametrize(
    ("tracking", "name"),
    [
        ({}, "mine & yours"),
        ({"register_model": True, "registered_model": "ours"}, "ours"),
        ({"register_model": False, "registered_model": "ours"}, None),
    ],
)
def test_the_card_names_the_model_under_which_it_is_registered(
    run_dir: Path, tracking: dict[str, object], name: str | None
) -> None:
    recipe = {**RECIPE, "tracking": tracking}
    (run_dir / "recipe.json").write_text(json.dumps(recipe))
    assert registered_name(recipe) == name
    card = html.unescape(collect(run_dir)["run_card.html"].decode())
    assert re.findall(r"models:/(.*?)/1", card)[:1] == ([] if name is None else [name])


def test_the_card_asks_nothing_of_any_network(run_dir: Path) -> None:
    card = collect(run_dir)["run_card.html"].decode()
    assert "default-src 'none'" in card
    assert not re.search(r"(?:src|href)=\"?(?!data:)|url\(|@import", card)


def test_a_plot_is_a_drawing_of_its_own_with_the_last_attempts_values(run_dir: Path) -> None:
    svg = collect(run_dir)["plots/train.loss.svg"].decode()
    assert svg.startswith('<svg xmlns="http://www.w3.org/2000/svg"')
    assert re.findall(r"<title>(step [^<]*)</title>", svg) == ["step 1: 3", "step 2: 2.5", "step 3: 2.25", "step 4: 2"]


def test_the_facts_of_a_run_count_each_step_once(run_dir: Path) -> None:
    run = read_run(run_dir)
    assert run.curves["train/loss"] == ((1, 3.0), (2, 2.5), (3, 2.25), (4, 2.0))
    assert run.metrics == {"validation/top1": 0.5}
    assert (run.steps, run.step_seconds, run.attempts, run.status) == (4, 240.0, 2, "done")
    assert run.classes == CLASSES


def test_answers_are_counted_by_true_and_answered_class(run_dir: Path) -> None:
    write_predictions(run_dir)
    table = collect(run_dir)["confusion.label.csv"].decode()
    assert table == "true,predicted,count\nred,green,2\nred,red,1\nblue,blue,1\n"


def test_the_newest_predictions_are_sent(run_dir: Path) -> None:
    assert not [name for name in collect(run_dir) if name.startswith("predictions")]
    old, _ = (write_predictions(run_dir, name=f"predictions.{name}.parquet") for name in ("z", "a"))
    os.utime(old, (1, 1))
    assert [name for name in collect(run_dir) if name.startswith("predictions")] == ["predictions.a.parquet"]
    (run_dir / "predictions.a.classes.label.csv").write_text("class,samples\n")
    (run_dir / "predictions.z.classes.label.csv").write_text("class,samples\n")
    found = {name for name in collect(run_dir) if name.startswith("predictions")}
    assert found == {"predictions.a.parquet", "predictions.a.classes.label.csv"}


def test_a_run_that_made_no_step_has_a_card_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text(json.dumps(RECIPE))
    files = collect(tmp_path)
    assert set(files) == {"run_card.html", "recipe.json"}
    assert b"It has no checkpoint." in files["run_card.html"]


@pytest.mark.parametrize(
    ("seconds", "words"), [(4.5234, "4.52 s"), (61.0, "1 min 1 s"), (7_500.0, "2 h 5 min"), (0.0, "0 s")]
)
def test_a_duration_is_told_in_its_largest_units(seconds: float, words: str) -> None:
    assert duration_in_words(seconds) == words
