"""Promise 1, through the command line: kill a run at any moment, rerun it, get the same numbers."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from mlflow import MlflowClient

from ray_jobs.tracking.state import read_state
from support.fake_shards import flip_byte
from support.media import Sound, make_clip
from support.object_store import SECRET_KEY, s3_server
from support.tiny_runs import ca2st, journal, make_tiny_run, sequence

pytestmark = pytest.mark.slow
NO_TRACKING = ("--set", "tracking.enabled=false")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_run(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def undisturbed(recipe: Path) -> Path:
    run_dir = recipe.parent / "undisturbed"
    done = ca2st("train", recipe, "--out", run_dir, "--json", *NO_TRACKING)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["steps"] == 16
    assert 0 <= facts["top1"] <= 1
    return run_dir


def test_t1_a_run_killed_at_a_random_step_goes_on_to_the_same_numbers(
    recipe: Path, undisturbed: Path, tmp_path: Path
) -> None:
    step = random.randint(1, 15)
    killed = ca2st("train", recipe, "--out", tmp_path / "run", *NO_TRACKING, fault=f"step.logged:{step}:kill")
    assert killed.returncode == -signal.SIGKILL, f"step {step}: {killed.stderr}"
    rerun = ca2st("train", recipe, "--out", tmp_path / "run", *NO_TRACKING)
    assert rerun.returncode == 0, rerun.stderr
    assert sequence(tmp_path / "run") == sequence(undisturbed)
    assert [line["attempt"] for line in journal(tmp_path / "run", "start")] == [1, 2]
    assert journal(tmp_path / "run", "eval")[-1]["metrics"] == journal(undisturbed, "eval")[-1]["metrics"]


@pytest.fixture(scope="module")
def two_processes(recipe: Path) -> Path:
    run_dir = recipe.parent / "two_processes"
    done = ca2st("train", recipe, "--out", run_dir, "--workers", 2, *NO_TRACKING)
    assert done.returncode == 0, done.stderr
    return run_dir


def test_a_run_from_an_s3_server_through_a_cache_smaller_than_the_data_gives_the_same_numbers(
    recipe: Path, undisturbed: Path, tmp_path: Path
) -> None:
    buckets = recipe.parent  # whose folder "shards" is served as a bucket
    sizes = [path.stat().st_size for path in (buckets / "shards" / "train").glob("ca2st-*")]
    cache_bytes = sum(sizes) // 2
    settings = ["data.validation=s3://shards/validation", f"data.loader.cache_dir={tmp_path / 'cache'}"]
    settings += [f"data.loader.cache_bytes={cache_bytes}"]
    options = [part for setting in settings for part in ("--set", setting)]
    with s3_server(buckets) as environment:
        done = ca2st(
            *("train", recipe, "--data", "s3://shards/train", "--out", tmp_path / "run", *options, *NO_TRACKING),
            environment=environment,
        )
    assert done.returncode == 0, done.stderr
    assert sequence(tmp_path / "run") == sequence(undisturbed)
    assert journal(tmp_path / "run", "eval")[-1]["metrics"] == journal(undisturbed, "eval")[-1]["metrics"]
    kept = list((tmp_path / "cache").rglob("ca2st-*"))
    assert 0 < sum(path.stat().st_size for path in kept) <= cache_bytes
    loader = [line["loader"] for line in journal(tmp_path / "run", "step")]
    assert sum(counts["cache_misses"] for counts in loader) > len(sizes), "fetched more than once: the cache is small"
    shown = done.stdout + done.stderr + "".join(path.read_text() for path in (tmp_path / "run").rglob("*.json*"))
    assert SECRET_KEY not in shown


def test_two_processes_see_the_same_samples_and_nearly_the_same_losses(undisturbed: Path, two_processes: Path) -> None:
    alone, together = sequence(undisturbed), sequence(two_processes)
    assert [hashed for _, hashed, _ in together] == [hashed for _, hashed, _ in alone]
    assert [loss for _, _, loss in together] == pytest.approx([loss for _, _, loss in alone], rel=1e-4)


def test_two_processes_train_with_bfloat16_experts_whose_file_stays_float32(
    recipe: Path, undisturbed: Path, tmp_path: Path
) -> None:
    savings = ("precision=bf16", "activation_checkpointing=true", "epochs=1")
    settings = [part for saving in savings for part in ("--set", f"training.{saving}")]
    settings += ["--set", "experts.precision=bf16", "--set", "trainable=adapters"]
    run_dir = tmp_path / "run"
    done = ca2st("train", recipe, "--out", run_dir, "--workers", 2, *settings, *NO_TRACKING)
    assert done.returncode == 0, done.stderr
    (start,) = journal(run_dir, "start")
    assert start["topology"]["experts_precision"] == "bf16"
    kept, plain = ({path.name for path in (folder / "experts").iterdir()} for folder in (run_dir, undisturbed))
    assert plain < kept
    assert len(kept - plain) == 1  # what is added to the experts, not trained here
    done = ca2st("evaluate", run_dir, "--data", recipe.parent / "shards" / "validation", "--views", "1x1", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["num_samples"] == 5


def test_a_run_is_one_mlflow_run_through_its_attempts(recipe: Path, undisturbed: Path, tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    tracking = ("--set", f"tracking.uri='{uri}'")
    ca2st("train", recipe, "--out", tmp_path / "run", *tracking, fault="step.logged:7:kill")
    done = ca2st("train", recipe, "--out", tmp_path / "run", *tracking, "--json")
    assert done.returncode == 0, done.stderr
    assert sequence(tmp_path / "run") == sequence(undisturbed)
    ca2st("track", "sync", tmp_path / "run")
    client = MlflowClient(uri)
    run = client.get_run(read_state(tmp_path / "run").run_id)
    assert json.loads(done.stdout)["run_id"] in (None, run.info.run_id)  # none where the follower came late
    assert run.info.status == "FINISHED"
    assert [metric.step for metric in client.get_metric_history(run.info.run_id, "train/loss")] == list(range(1, 17))
    assert run.data.params["model.kind"] == "ca2st"
    assert len(run.data.tags["data.train.fingerprint"]) == 64
    assert run.data.tags["data.train.dataset"] == "fake"
    experiment = client.get_experiment_by_name("ca2st")
    assert experiment is not None
    assert len(client.search_runs([experiment.experiment_id])) == 1


def test_a_checkpoint_is_evaluated_with_every_sample_once(recipe: Path, undisturbed: Path) -> None:
    done = ca2st("evaluate", undisturbed, "--data", recipe.parent / "shards" / "validation", "--views", "2x3", "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["num_samples"] == 5
    assert {"top1", "top5", "mean_class"} <= facts.keys()
    table = pq.read_table(facts["predictions"])
    assert sorted(table["key"].to_pylist()) == [f"clip-{index:04d}" for index in range(5)]
    assert table["label_probabilities"].to_pylist()[0] == pytest.approx([1 / 3] * 3, abs=0.5)
    where = ("--data", recipe.parent / "shards" / "validation", "--predictions", recipe.parent / "two.parquet")
    done = ca2st("evaluate", undisturbed, *where, "--workers", 2, "--no-track", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["top1"] == facts["top1"]
    assert pq.read_table(recipe.parent / "two.parquet")["key"] == table["key"]
    done = ca2st("significance", facts["predictions"], recipe.parent / "two.parquet", "--json")
    assert json.loads(done.stdout)["comparisons"][0]["p_value"] == 1.0


def test_videos_of_ones_own_are_classified_with_and_without_sound(undisturbed: Path, tmp_path: Path) -> None:
    videos = [make_clip(tmp_path / "loud.mp4", sound=Sound()), make_clip(tmp_path / "silent.mp4", seconds=0.1)]
    done = ca2st("predict", undisturbed, *videos, "--top", 2, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["videos"]
    assert [entry["video"] for entry in found] == [str(video) for video in videos]
    for entry in found:
        first, second = entry["predictions"]
        assert {first["label"], second["label"]} < {"red", "green", "blue"}
        assert 1 > first["probability"] >= second["probability"] > 0


def test_a_checkpoint_can_be_looked_into(recipe: Path, undisturbed: Path, tmp_path: Path) -> None:
    video = make_clip(tmp_path / "loud.mp4", sound=Sound())
    done = ca2st("explain", undisturbed, video, "--out", tmp_path / "page.html", "--json")
    assert done.returncode == 0, done.stderr
    assert {row["direction"] for row in json.loads(done.stdout)["entropy"]} == {
        "t2s",
        "s2t",
        "a2s",
        "s2a",
        "a2t",
        "t2a",
    }
    assert "loud.mp4" in (tmp_path / "page.html").read_text()
    data = recipe.parent / "shards" / "validation"
    done = ca2st("features", undisturbed, "--data", data, "--out", tmp_path / "features.parquet", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["num_samples"] == pq.ParquetFile(tmp_path / "features.parquet").metadata.num_rows


def test_predict_says_what_it_can_and_names_what_it_cannot_read(undisturbed: Path, tmp_path: Path) -> None:
    for name in ("a/good.mp4", "b/good.MP4"):
        (tmp_path / name).parent.mkdir()
        make_clip(tmp_path / name, seconds=0.2)
    (tmp_path / "b" / "bad.mp4").write_text("no video")
    (tmp_path / "b" / "notes.txt").write_text("no video either")
    done = ca2st("predict", undisturbed, tmp_path, "--views", "1x1", "--json")
    assert done.returncode == 3, done.stderr
    facts = json.loads(done.stdout)
    assert [one["video"] for one in facts["videos"]] == [str(tmp_path / "a/good.mp4"), str(tmp_path / "b/good.MP4")]
    assert [(one["video"], one["reason"]) for one in facts["damaged"]] == [(str(tmp_path / "b/bad.mp4"), "not_a_video")]
    assert "2 of 3 videos predicted, 1 cannot be read" in done.stderr
    assert "notes.txt" in done.stderr
    assert not any(word in done.stderr for word in ("Traceback", "rejects.jsonl", "--max-rejects", "ca2st-videos-"))
    done = ca2st("predict", undisturbed, tmp_path / "b" / "bad.mp4")
    assert done.returncode == 3
    assert (done.stdout, f"cannot be read: {tmp_path / 'b/bad.mp4'}: not_a_video" in done.stderr) == ("", True)


def test_explain_names_a_video_that_cannot_be_read(undisturbed: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.mp4").write_text("no video")
    done = ca2st("explain", undisturbed, tmp_path / "bad.mp4", "--out", tmp_path / "page.html")
    assert done.returncode == 3
    assert "bad.mp4: not_a_video" in done.stderr


def test_p1_a_damaged_frame_stops_the_training_before_it_is_used(recipe: Path, tmp_path: Path) -> None:
    shutil.copytree(recipe.parent / "shards" / "train", tmp_path / "shards")
    shard = tmp_path / "shards" / "ca2st-000000.tar"
    for place in range(2_000, shard.stat().st_size - 2_000, 400):
        flip_byte(shard, place)
    done = ca2st("train", recipe, "--out", tmp_path / "run", "--data", tmp_path / "shards", *NO_TRACKING)
    assert done.returncode == 3
    assert "ca2st-000000.tar" in done.stderr
    assert "clip-000" in done.stderr
    assert journal(tmp_path / "run", "end")[-1]["status"] == "failed"
    assert journal(tmp_path / "run", "checkpoint") == []


def test_t15_another_recipe_in_the_same_folder_is_refused_with_the_difference(recipe: Path, undisturbed: Path) -> None:
    done = ca2st("train", recipe, "--out", undisturbed, "--set", "optim.base_lr=0.5", *NO_TRACKING)
    assert done.returncode == 2
    assert "optim.base_lr: 0.001 -> 0.5" in done.stderr


def test_t14_a_terminated_run_saves_and_the_rerun_goes_on_exactly(
    recipe: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    arguments = [sys.executable, "-m", "ray_jobs.cli", "train", str(recipe), "--out", str(run_dir), *NO_TRACKING]
    process = subprocess.Popen(arguments, env=os.environ, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not _has_step(run_dir, 2):
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, told = process.communicate(timeout=60)
    if process.returncode == 0:
        pytest.fail("the run ended before it could be stopped; give it more steps")
    assert process.returncode == 143
    assert "rerun to resume" in told
    assert ca2st("train", recipe, "--out", run_dir, *NO_TRACKING).returncode == 0
    assert sequence(run_dir) == sequence(undisturbed)


def _has_step(run_dir: Path, step: int) -> bool:
    path = run_dir / "journal.jsonl"
    return path.exists() and f'"step":{step},' in path.read_text()
