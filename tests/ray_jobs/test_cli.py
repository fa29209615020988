"""The command line: one-line errors with what to do, stable exit codes, nothing half-written."""

import contextlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ray_jobs import environment
from ray_jobs.commands.train import with_options
from ray_jobs.config.recipe_file import load_recipe
from support.annotations import EPIC_SOUNDS_HEADER, epic_sounds_row, touch, write_lines
from support.commands import Command
from support.fake_shards import flip_byte
from support.media import make_clip


@pytest.fixture
def ca2st(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    return Command(capsys, monkeypatch)


def test_help_needs_no_heavy_import() -> None:
    heavy = ("torch", "ray", "mlflow", "nvidia", "av", "pyarrow", "pydantic")
    script = f"import sys, ray_jobs.cli; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "command",
    [
        "demo",
        "shard build",
        "shard verify",
        "weights check-golden",
        "bench model",
        "model info",
        "model presets",
        "train",
        "evaluate",
        "explain",
        "features",
        "predict",
        "track sync",
    ],
)
def test_every_command_has_help_with_an_example(ca2st: Command, command: str) -> None:
    code, out, _ = ca2st(*command.split(), "--help")
    assert code == 0
    assert f"Example: ca2st {command}" in " ".join(out.split())


def test_help_breaks_lines_only_where_they_are_full(ca2st: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "500")  # wider than a line is made
    for command in ("train", "doctor", "shard build", "track sync"):
        code, out, _ = ca2st(*command.split(), "--help")
        assert code == 0
        lines = [line.strip() for line in re.split(r"\n\w+:\n", out)[0].splitlines()]
        for line, following in itertools.pairwise(lines):
            assert not line or not following or len(f"  {line} {following.split()[0]}") > 118, out


def test_a_dry_run_reads_the_annotations_only(ca2st: Command, tmp_path: Path) -> None:
    rows = [epic_sounds_row(f"P01_02_{number}") for number in range(3)]
    path = write_lines(tmp_path / "validation.csv", [EPIC_SOUNDS_HEADER, *rows])
    arguments = ("--dataset", "epic_sounds", "--annotations", path, "--media", tmp_path / "nowhere")
    code, out, _ = ca2st("shard", "build", *arguments, "--split", "validation", "--dry-run", "--json")
    facts = json.loads(out)
    assert (code, facts["num_samples"], facts["num_classes"]) == (0, 3, 44)
    assert facts["estimated_bytes"] > 0
    assert facts["samples_per_class"]["label"]["rustle"] == 3
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_of_videos_becomes_shards_that_verify(ca2st: Command, tmp_path: Path) -> None:
    for label in ("bark", "miaow"):
        (tmp_path / "media" / label).mkdir(parents=True)
        make_clip(tmp_path / "media" / label / "one.mp4", seconds=0.2)
    arguments = ("--dataset", "folder", "--media", tmp_path / "media", "--out", tmp_path / "set", "--audio", "optional")
    code, out, err = ca2st("shard", "build", *arguments, "--workers", 1, "--json")
    assert code == 0, err
    facts = json.loads(out)
    assert (facts["num_samples"], facts["num_classes"], facts["num_shards"], facts["rejected"]) == (2, 2, 1, {})
    assert Path(facts["manifest"]).is_file()
    assert facts["clips_per_second"] > 0
    assert ca2st("shard", "verify", tmp_path / "set")[0] == 0


def test_an_unreadable_video_is_named_and_ends_with_3(ca2st: Command, tmp_path: Path) -> None:
    for label in ("bark", "miaow"):
        (tmp_path / "media" / label).mkdir(parents=True)
        make_clip(tmp_path / "media" / label / "good.mp4", seconds=0.2)
    (tmp_path / "media" / "bark" / "bad.mp4").write_text("no video")
    arguments = ("--dataset", "folder", "--media", tmp_path / "media", "--out", tmp_path / "set", "--audio", "optional")
    code, _, err = ca2st("shard", "build", *arguments, "--workers", 1)
    assert code == 3
    assert "bad.mp4" in err
    assert not (tmp_path / "set" / "manifest.json").exists()
    code, out, err = ca2st("shard", "build", *arguments, "--workers", 1, "--max-rejects", "50%", "--json")
    assert (code, sum(json.loads(out)["rejected"].values())) == (0, 1)


@pytest.mark.parametrize("command", ["verify", "inspect"])
def test_a_folder_without_a_manifest_is_no_shard_set_for_any_command(
    ca2st: Command, tmp_path: Path, command: str
) -> None:
    code, out, err = ca2st("shard", command, tmp_path)
    assert (code, out) == (2, "")
    assert "manifest.json: no such file; is it a shard folder?" in err


def test_the_options_of_a_conversion_stand_in_groups(ca2st: Command) -> None:
    _, out, _ = ca2st("shard", "build", "--help")
    groups = re.split(r"^(Source|Video|Audio|Output|Cluster|Synthetic world):$", out, flags=re.MULTILINE)
    options = {name: re.findall(r"--[a-z-]+", text) for name, text in zip(groups[1::2], groups[2::2], strict=True)}
    assert {"--dataset", "--media", "--clock"} <= set(options["Source"])
    assert {"--codec", "--short-side", "--hdr"} <= set(options["Video"])
    assert {"--audio", "--sample-rate"} <= set(options["Audio"])
    assert {"--out", "--shard-size", "--dry-run"} <= set(options["Output"])
    assert {"--workers", "--ray"} <= set(options["Cluster"])
    assert {"--task", "--num-samples"} <= set(options["Synthetic world"])


def test_verify_names_the_shard_and_the_key_and_ends_with_3(ca2st: Command, tmp_path: Path) -> None:
    config = ("--dataset", "synthetic", "--media", tmp_path / "media", "--out", tmp_path / "set", "--num-samples", 2)
    assert ca2st("shard", "build", *config, "--task", "space")[0] == 0
    shard = tmp_path / "set" / "ca2st-000000.tar"
    assert ca2st("shard", "verify", tmp_path / "set", "--json")[0] == 0
    flip_byte(shard, 2000)
    code, out, _ = ca2st("shard", "verify", tmp_path / "set", "--json")
    facts = json.loads(out)
    assert (code, facts["ok"]) == (3, False)
    assert facts["problems"][0]["shard"] == shard.name
    assert facts["problems"][0]["key"]


REFUSALS = {
    "a missing media folder": (
        ["shard", "build", "--dataset", "folder", "--media", "nowhere", "--out", "set"],
        "nowhere",
    ),
    "no --out": (["shard", "build", "--dataset", "folder", "--media", "."], "--out: required unless --dry-run"),
    "an unknown dataset": (
        ["shard", "build", "--dataset", "epic_sound", "--media", ".", "--out", "set"],
        "did you mean 'epic_sounds'",
    ),
    "an open Ray without Ray": (
        ["shard", "build", "--dataset", "folder", "--media", ".", "--out", "set", "--i-accept-open-ray"],
        "--i-accept-open-ray: expected --ray beside it",
    ),
    "a cluster for a test of robustness without Ray": (
        ["robustness", "runs/none", "--data", "set", "--ray-address", "auto"],
        "--ray-address auto: expected --ray beside it",
    ),
    "groups of pictures of a codec without them": (
        ["shard", "build", "--dataset", "folder", "--media", ".", "--out", "set", "--gop", "8"],
        "--gop 8: --codec mjpeg has none but key frames",
    ),
    "a synthetic seed for videos": (
        ["shard", "build", "--dataset", "folder", "--media", ".", "--out", "set", "--seed", "0"],
        "--seed: --dataset folder does not use it; leave it out",
    ),
    "a synthetic frame rate for videos": (
        ["shard", "build", "--dataset", "csv", "--media", ".", "--out", "set", "--frame-rate", "8"],
        "--frame-rate: --dataset csv does not use it",
    ),
    "an unknown codec": (
        ["shard", "build", "--dataset", "folder", "--media", ".", "--out", "set", "--codec", "mjepg"],
        "mjpeg",
    ),
    "a size without a unit we know": (
        ["shard", "build", "--dataset", "folder", "--media", ".", "--out", "set", "--shard-size", "1 parsec"],
        "expected a number with a unit",
    ),
    "an unknown recipe": (["train", "smok"], "smoke.toml"),
    "an unknown recipe key": (["train", "smoke", "--set", "training.epoch=1"], "did you mean 'epochs'"),
    "shards that are not there": (["train", "smoke", "--data", "nowhere"], "nowhere"),
    "a checkpoint that is not there": (["evaluate", "nowhere", "--data", "nowhere"], "nowhere"),
    "a video that is not there": (["predict", "nowhere", "nofilm.mp4"], "nofilm.mp4"),
    "views of another form": (["evaluate", "x", "--data", "y", "--views", "two"], "expected CLIPSxCROPS"),
    "numbers for a submission that is not asked for": (
        ["evaluate", "x", "--data", "y", "--sls", "1,2,3"],
        "--sls: expected --submission beside it",
    ),
    "a threshold of events without windows": (
        ["predict", "x", "/dev/null", "--threshold", "0.2"],
        "--threshold, --out: expected --window beside them",
    ),
    "no class count": (["model", "info", "--model", "cast"], "expected either --num-classes C or --verb-noun"),
    "no model": (["model", "info", "--num-classes", "4"], "expected either --model KIND or --preset NAME"),
    "unknown preset": (["model", "info", "--preset", "cast_late_ad", "--verb-noun"], "did you mean 'cast_late_add'"),
    "an encoder without its expert": (
        ["model", "info", "--model", "audio", "--spatial", "resnet50", "--num-classes", "4"],
        "--spatial resnet50: expected a model with a spatial expert, found audio, which has audio; leave --spatial out",
    ),
    "a golden file that is not there": (["weights", "check-golden", "nowhere.safetensors"], "nowhere.safetensors"),
    "a run folder that is another's file": (
        ["train", "smoke", "--out", "/dev/null"],
        "--out: expected a folder, found",
    ),
    "a run folder below a file": (["train", "smoke", "--out", "/dev/null/x"], "expected a folder, found the file"),
    "a file for a run folder": (["track", "sync", "/dev/null"], "expected the folder of a training run, found a file"),
    "a name that is too long": (["train", "smoke", "--out", "x" * 300], "File name too long"),
    "a recipe that is too long a name": (["train", "x" * 300], "File name too long; check the name"),
    "a video that is too long a name": (["predict", "nowhere", "x" * 300], "File name too long; check the name"),
    "a number of thousands of digits": (
        ["train", "smoke", "--set", f"training.seed={'9' * 5000}"],
        "expected a value of a recipe",
    ),
    "sections in thousands of sections": (["train", "smoke", "--set", "a." * 3000 + "b=1"], "at most 20 sections"),
    "lists in thousands of lists": (["train", "smoke", "--set", f"a={'[' * 3000}"], "expected a value of a recipe"),
    "a run that would lie elsewhere": (
        ["train", "smoke", "--set", 'name="../../x"'],
        "expected a name for the run's folder, without /",
    ),
    "a run without a name": (["train", "smoke", "--set", 'name=""'], "expected a name for the run's folder"),
    "more views than fit": (["predict", "x", "y", "--views", "100x100"], "expected at most 100 views per sample"),
    "a size of thousands of digits": (
        ["shard", "build", "--dataset", "folder", "--media", ".", "--out", "set", "--shard-size", "9" * 5000],
        "expected a number with a unit",
    ),
    "rejects of thousands of digits": (
        ["shard", "build", "--dataset", "folder", "--media", ".", "--out", "set", "--max-rejects", "9" * 5000],
        "expected",
    ),
    "a run folder that is not there": (["track", "sync", "nowhere"], "expected the folder of a training run"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_bad_input_is_told_in_a_line_and_leaves_nothing(
    ca2st: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    arguments, told = REFUSALS[name]
    monkeypatch.chdir(tmp_path)
    code, out, err = ca2st(*arguments)
    assert (code, out) == (2, "")
    assert "Traceback" not in err
    assert told in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'\xff\xfename = "a"', "expected UTF-8 text, found other bytes at byte 0; save it as UTF-8"),
        (b"a = " + b"[" * 5000, "at most 20 deep, found more"),
        (b"[" + b"a." * 3000 + b"b]\nc = 1", "at most 20 deep, found more"),
        (b"seed = " + b"9" * 5000, "not valid TOML"),
        (b'\xef\xbb\xbfname = "a"', "training: required, but not given"),
    ],
)
def test_a_recipe_that_is_none_is_told_in_a_line(ca2st: Command, tmp_path: Path, text: bytes, message: str) -> None:
    (tmp_path / "r.toml").write_bytes(text)
    code, out, err = ca2st("train", tmp_path / "r.toml", "--dry-run")
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err


def test_a_reader_that_goes_away_changes_no_exit_code() -> None:
    command = f"{sys.executable} -m ray_jobs.cli model presets --json | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("number", "code", "what"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_ctrl_c_ends_with_130_and_sigterm_with_143_and_both_say_how_to_go_on(
    tmp_path: Path, number: signal.Signals, code: int, what: str
) -> None:
    os.mkfifo(tmp_path / "annotations.csv")  # whoever opens it waits for a writer
    arguments = [
        "shard",
        "build",
        "--dataset",
        "csv",
        "--annotations",
        tmp_path / "annotations.csv",
        "--media",
        tmp_path,
    ]
    # Whoever starts the tests in the background ignores Ctrl-C, and so would the command.
    heard = "import signal, ray_jobs.cli; signal.signal(signal.SIGINT, signal.default_int_handler); ray_jobs.cli.main()"
    command = [sys.executable, "-c", heard, *map(str, arguments), "--out", str(tmp_path / "out")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        writer = os.open(tmp_path / "annotations.csv", os.O_WRONLY)  # returns once the command reads
        # A signal just before a blocking read is noticed only when that ends or the next one comes: press again, but
        # not so soon that it meets a command that is already on its way out.
        for _ in range(4):
            process.send_signal(number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=60)
                break
        os.close(writer)
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (code, f"{what}; rerun the same command to go on where it stopped\n")


def test_a_wrong_csv_row_is_told_with_file_line_and_column(ca2st: Command, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "mine.csv", ["path,label,start,end", "a.mp4,bark,0,1", "b.mp4,bark,two,3"])
    touch(tmp_path / "media", "a.mp4", "b.mp4")
    arguments = ("--dataset", "csv", "--annotations", path, "--media", tmp_path / "media", "--out", tmp_path / "set")
    code, _, err = ca2st("shard", "build", *arguments)
    assert code == 2
    assert "mine.csv:3:" in err
    assert "start" in err
    assert not (tmp_path / "set").exists()


def test_model_info_counts_to_the_unit(ca2st: Command) -> None:
    code, out, _ = ca2st("model", "info", "--model", "cava", "--num-classes", 400, "--json")
    facts = json.loads(out)
    assert (code, facts["trainable"]) == (0, 44_092_432)
    assert facts["gmacs"] == pytest.approx(241.5, abs=0.05)


@pytest.mark.slow
def test_model_info_knows_resnet_and_presets(ca2st: Command) -> None:
    _, out, _ = ca2st("model", "info", "--model", "cast", "--spatial", "resnet50", "--verb-noun", "--json")
    resnet = json.loads(out)
    _, out, _ = ca2st("model", "info", "--preset", "cast_resnet50", "--verb-noun", "--json")
    assert json.loads(out) == resnet
    expert = next(part for part in resnet["parts"] if part["name"] == "spatial expert")
    assert expert["trainable"] == 0
    assert expert["gmacs"] == pytest.approx(8 * 4.09, rel=0.01)  # ResNet-50's own figure for an image, eight images


def test_model_info_knows_sizes(ca2st: Command) -> None:
    _, out, _ = ca2st("model", "info", "--model", "audio", "--size", "vit_s", "--num-classes", 10, "--json")
    assert 21e6 < json.loads(out)["total"] < 25e6


def test_model_presets_lists_names_and_published_figures(ca2st: Command) -> None:
    _, out, _ = ca2st("model", "presets", "--json")
    presets = json.loads(out)["presets"]
    assert presets["cast_late_add"]["published_top1"] == 44.2
    assert presets["cast_late_add"]["config"]["fusion"] == "late_add"
    _, told, _ = ca2st("model", "presets")
    assert all(name in told for name in presets)


def test_a_dry_run_of_a_training_prints_its_plan_and_makes_nothing(
    ca2st: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, _ = ca2st("train", "smoke", "--dry-run", "--json")
    facts = json.loads(out)
    assert (code, facts["steps"]) == (0, 32)
    assert 0 < facts["trainable"] < facts["total"]
    assert facts["gmacs"] > 0
    assert list(tmp_path.iterdir()) == []


UNFIT = {
    'trainable=["nothing.*"]': "nothing.*",
    "start.checkpoint=nowhere": "start.checkpoint: expected a checkpoint folder",
    "clip.crop_size=65": "crop_size",
    "experts.spatial=hf-hub:foo": "experts.spatial: hf-hub:foo: expected hf-hub:ORGANISATION/NAME",
    "experts.spatial=nowhere": "experts.spatial: expected a safetensors file",
    "model.fusion=independent": "independent",
    "data.synthetic.task=tempo": "data.synthetic.task: expected one of space, time",
    'data.targets=["binding"]': "data.targets: expected label spaces of the synthetic world, which are space, time",
}


@pytest.mark.parametrize("more", [("--dry-run",), ()], ids=["dry run", "run"])
@pytest.mark.parametrize("setting", UNFIT)
def test_what_does_not_fit_the_model_is_refused_before_a_synthetic_clip_is_drawn(
    ca2st: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str, more: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = ca2st("train", "smoke", "--set", setting, *more)
    assert (code, out) == (2, ""), err
    assert UNFIT[setting] in err
    assert list(tmp_path.iterdir()) == []


def test_threads_wait_without_spinning_unless_the_user_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    environment.wait_passively()
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    environment.wait_passively()
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"


@pytest.mark.parametrize("place", ['/data/it\'s "mine"', "/data/back\\slash", "/data/ü", "s3://bucket/set"])
def test_data_names_its_shards_to_the_letter(place: str) -> None:
    assert load_recipe("smoke", with_options(None, data=place, workers=None)).data.train == place
