"""How long a training takes: multiply-adds, peaks of devices, a few measured steps."""

from dataclasses import replace
from pathlib import Path

import pytest

from ca2st.benchmark.measure import PEAKS, find_peak
from ca2st.errors import UserInputError
from ca2st.model.config import ModelConfig, TargetSpec, find_preset
from ca2st.model.inspect import ModelInfo, PartInfo, model_info, train_tflop
from ca2st.spec import ClipSpec
from ray_jobs.config.recipe import Recipe
from ray_jobs.config.recipe_file import load_recipe
from ray_jobs.runs.data import open_data
from ray_jobs.runs.hours import (
    Rate,
    Work,
    counted_hours,
    hours_line,
    rate_of,
    spoken_hours,
    work_of,
)
from ray_jobs.runs.plan import count_notes, make_plan, plan_lines
from support.fake_shards import make_samples, make_shard_set
from support.tiny_runs import make_tiny_run


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("NVIDIA H200", "H200"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA A10", "A10"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("Tesla T4", None),
    ],
)
def test_a_gpu_is_known_by_the_name_that_torch_gives(name: str, found: str | None) -> None:
    assert find_peak(name) == found


def test_another_device_is_planned_for_by_its_datasheet() -> None:
    assert rate_of("h200", "bf16") == Rate(device="H200", peak_tflops=989, share=0.3, source="datasheet")
    assert rate_of("A100", "fp32").peak_tflops == PEAKS["A100"].fp32 == 19.5
    with pytest.raises(UserInputError, match=r"--device: expected one of A10, .*found 'H20' \(did you mean 'H200'"):
        rate_of("H20", "bf16")


PARTS = (
    PartInfo(name="spatial expert", trainable=0, total=10, gmacs=100.0),
    PartInfo(name="adapters", trainable=5, total=5, gmacs=20.0),
    PartInfo(name="head", trainable=2, total=2, gmacs=1.0),
)
INFO = ModelInfo(trainable=7, total=17, gmacs=121.0, computed_gmacs=121.0, parts=PARTS)


def test_the_work_of_a_clip_is_forward_and_backward_and_the_gradients_of_what_is_trained() -> None:
    assert train_tflop(INFO, again=False) == pytest.approx(2 * (121 + 121 + 21) / 1e3)
    assert train_tflop(INFO, again=True) == pytest.approx(2 * (121 + 121 + 21 + 121) / 1e3)
    frozen = replace(INFO, parts=(PARTS[0], replace(PARTS[1], trainable=0), PARTS[2]))
    assert train_tflop(frozen, again=True) == pytest.approx(2 * (121 + 1 + 1) / 1e3)
    half = replace(INFO, computed_gmacs=121 / 2)
    assert train_tflop(half, again=False) == pytest.approx(2 * (121 + 121 + 21) / 2 / 1e3)
    everything = replace(INFO, parts=tuple(replace(part, trainable=part.total) for part in PARTS))
    assert train_tflop(everything, again=False) == pytest.approx(2 * 3 * 121 / 1e3)


@pytest.mark.slow
def test_cast_takes_as_much_to_train_as_the_paper_says() -> None:
    info = model_info(find_preset("cast").config, ClipSpec(), (TargetSpec(name="label", num_classes=400),))
    assert train_tflop(info, again=False) == pytest.approx(1.80 * info.computed_gmacs / info.gmacs, rel=0.06)


def test_hours_are_the_work_over_the_rate_of_all_devices() -> None:
    work = Work(clips=3_600_000, views=360_000, train_tflop=2.0, forward_tflop=1.0)
    rate = Rate(device="H200", peak_tflops=1000, share=0.5, source="datasheet")
    found = counted_hours(work, rate, workers=4)
    assert (found["training_hours"], found["validation_hours"]) == (pytest.approx(1.0), pytest.approx(0.05))
    assert (found["hours"], found["clips_per_second"]) == (pytest.approx(1.05), pytest.approx(1000))
    basis = "counted: 2 TFLOP per clip, 50% assumed of 1e+03 TFLOP/s of its datasheet"
    assert hours_line(found).startswith(f"1.05 h on 4 x H200 ({basis}); validation 3 min of it")
    one = counted_hours(work, replace(rate, device="this CPU", source="matrix product", times_in_fp32=40), workers=4)
    assert one["num_devices"] == 1, "workers of a CPU share it"
    assert "no GPU: --device H200 plans for one, and training.precision = fp32 is 40 times as fast" in hours_line(one)


def test_every_epoch_that_is_validated_counts_and_the_last_step_once() -> None:
    recipe = load_recipe("smoke", ["training.validate_every_epochs=2"])
    work = work_of(recipe, INFO, steps=5 * 8, steps_per_epoch=8, num_validation=10)
    assert (work.clips, work.views) == (5 * 8 * 16, 3 * 10)  # after epochs 2 and 4, and at the end
    never = replace(recipe, training=replace(recipe.training, validate_every_epochs=0))
    assert work_of(never, INFO, steps=40, steps_per_epoch=8, num_validation=10).views == 10


@pytest.mark.parametrize(
    ("hours", "told"),
    [(0.001, "3.6 s"), (0.5, "30 min"), (12.34, "12.3 h"), (71, "71 h"), (2400, "2,400 h (100 days)")],
)
def test_hours_are_told_in_what_fits_them(hours: float, told: str) -> None:
    assert spoken_hours(hours) == told


@pytest.fixture
def tiny(tmp_path: Path) -> Recipe:
    return load_recipe(str(make_tiny_run(tmp_path)))


def test_a_few_steps_on_random_clips_measure_the_hours(tiny: Recipe, tmp_path: Path) -> None:
    plan = make_plan(tiny, tmp_path / "run", device="cpu", measure=True)
    time = plan["time"]
    assert (time["how"], time["measured_clips"], time["num_devices"]) == ("measured", 1, 1)
    clips = 16 * tiny.training.global_batch_size
    assert time["training_hours"] == pytest.approx(clips / time["clips_per_second"] / 3600)
    assert 0 < time["validation_hours"] < plan["hours"]
    assert "measured with 1 random clips at a time, no data read" in plan_lines(plan)


def test_a_set_with_another_number_of_samples_than_published_is_a_note(tiny: Recipe, tmp_path: Path) -> None:
    folder = tmp_path / "ucf"
    make_shard_set(folder, make_samples(7), dataset="ucf_101", split="train")
    mine = replace(tiny, data=replace(tiny.data, train=str(folder)))
    (note,) = count_notes(open_data(mine))
    assert "ucf: 7 samples, published are 9537 or 9586 or 9624 or 4893 or 4926 or 4941; 0 were rejected" in note
    assert count_notes(open_data(tiny)) == []


def test_an_expert_alone_has_no_bridge_to_train() -> None:
    config = replace(ModelConfig(kind="spatial"), dim=48, depth=2, num_heads=3)
    info = model_info(config, ClipSpec(num_frames=4, crop_size=32), (TargetSpec(name="a", num_classes=2),))
    assert 0 < train_tflop(info, again=False) < 3 * 2 * info.gmacs / 1e3
