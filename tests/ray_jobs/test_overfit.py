"""``ca2st train --overfit N``: a model that can learn learns a few clips by heart."""

import json
from pathlib import Path

import pytest

from ca2st.errors import NumericError, UserInputError
from ray_jobs.config.recipe_file import load_recipe
from ray_jobs.launch import check_overfit, overfitting
from support.tiny_runs import ca2st, journal


def test_a_sanity_run_keeps_the_model_and_leaves_out_what_makes_learning_harder() -> None:
    recipe = load_recipe("cast_kinetics_400")
    run = overfitting(recipe, 8)
    assert run.name == "cast_kinetics_400-overfit-8"
    assert (run.data.select.limit, run.training.global_batch_size, run.data.validation) == (8, 8, None)
    assert (run.optim.label_smoothing, run.model.drop_path_rate) == (0.0, 0.0)
    augment = run.data.augment
    assert (augment.rand_augment, augment.mixing.probability, augment.flip_probability) == (None, 0.0, 0.0)
    assert run.optim.base_lr * 8 / 256 == pytest.approx(1e-3)
    assert (run.trainable, run.experts, run.clip) == (recipe.trainable, recipe.experts, recipe.clip)


def test_no_clips_are_refused() -> None:
    with pytest.raises(UserInputError, match="--overfit: expected at least 1 clip, found 0"):
        overfitting(load_recipe("smoke"), 0)


@pytest.mark.parametrize("key", ["top1", "exact_match"])
@pytest.mark.parametrize(("share", "passes"), [(1.0, True), (0.875, False)])
def test_a_run_that_did_not_learn_its_clips_fails(tmp_path: Path, key: str, share: float, passes: bool) -> None:
    line = {"event": "step", "attempt": 1, "time": 1.0, "step": 400, "loss": 0.5, key: share}
    (tmp_path / "journal.jsonl").write_text(json.dumps(line, separators=(",", ":")) + "\n")
    if passes:
        assert check_overfit(tmp_path) == 1.0
    else:
        with pytest.raises(NumericError, match="expected 95% of the clips learned by heart after 400 steps, found 88%"):
            check_overfit(tmp_path)


@pytest.mark.slow
def test_the_smoke_recipe_learns_eight_clips_by_heart(tmp_path: Path) -> None:
    few = ["tracking.enabled=false", "data.synthetic.num_train=16", "data.synthetic.num_validation=4"]
    few += ["clip.num_frames=4", "clip.crop_size=32"]
    settings = [part for setting in few for part in ("--set", setting)]
    done = ca2st("train", "smoke", "--overfit", "8", *settings, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "sanity run passed: 100% of 8 clips learned by heart" in done.stderr
    (end,) = journal(tmp_path / "runs" / "smoke-overfit-8", "end")
    assert "of the training clips right in the last epoch" in end["reason"]
