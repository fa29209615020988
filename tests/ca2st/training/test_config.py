import pytest

from ca2st.errors import UserInputError
from ca2st.training.config import OptimConfig, TrainingConfig


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("base_lr", 0.0, "base_lr: expected a finite number > 0, found 0.0"),
        ("base_lr", float("nan"), "base_lr: expected a finite number > 0"),
        ("betas", (0.9, 1.0), r"betas: expected two numbers in \[0, 1\), found 1.0"),
        ("eps", 0.0, "eps: expected"),
        ("weight_decay", -0.1, "weight_decay: expected a finite number >= 0"),
        ("layer_decay", 0.0, r"layer_decay: expected a number in \(0, 1\]"),
        ("layer_decay", 1.5, r"layer_decay: expected a number in \(0, 1\]"),
        ("warmup_epochs", -1.0, "warmup_epochs: expected"),
        ("min_lr", 1.0, r"min_lr: expected a number in \[0, base_lr = 0.001\], found 1.0"),
        ("label_smoothing", 1.0, "label_smoothing: expected"),
        ("clip_grad_norm", 0.0, "clip_grad_norm: expected a finite number > 0, or none"),
    ],
)
def test_a_wrong_optimizer_setting_is_refused_by_name(field: str, value: object, message: str) -> None:
    with pytest.raises(UserInputError, match=message):
        OptimConfig(**{field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epochs", 0),
        ("global_batch_size", 0),
        ("per_device_batch_size", 0),
        ("checkpoint_every_steps", 0),
        ("keep_checkpoints", 0),
        ("validate_every_epochs", -1),
        ("max_steps", 0),
        ("seed", -1),
        ("grace_seconds", 0.0),
    ],
)
def test_a_wrong_training_setting_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(UserInputError, match=f"{field}: expected .*, found {value}"):
        TrainingConfig(**{field: value})


@pytest.mark.parametrize("field", ["base_lr", "weight_decay", "eps", "layer_decay", "warmup_epochs", "label_smoothing"])
def test_only_a_setting_that_may_be_none_takes_none(field: str) -> None:
    with pytest.raises(TypeError):
        OptimConfig(**{field: None})
    assert OptimConfig(clip_grad_norm=None).clip_grad_norm is None


def test_max_steps_cuts_a_run_short_and_never_lengthens_it() -> None:
    assert TrainingConfig(epochs=3).total_steps(10) == 30
    assert TrainingConfig(epochs=3, max_steps=7).total_steps(10) == 7
    assert TrainingConfig(epochs=3, max_steps=70).total_steps(10) == 30
