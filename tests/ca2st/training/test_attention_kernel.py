"""Kernels of attention: which one is chosen of measured times, and that the one that was set is the one that runs."""

import logging

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ca2st.errors import UserInputError
from ca2st.model.attention import Attend
from ca2st.training.attention_kernel import (
    KERNELS,
    AttentionShape,
    attention_shapes,
    fastest,
    kept_or_measured,
    set_kernels,
    settle_attention,
)
from ca2st.training.config import TrainingConfig
from ca2st.training.ranks import Ranks
from support.gpu import require_gpu
from support.models import inputs_for, tiny_model, wake
from support.refusals import forced
from support.tiny_training import fresh_accelerator, tiny_settings

WHOLE = AttentionShape(windows=6, heads=12, queries=1568, keys=1568, head_dim=64)
T2S = AttentionShape(windows=1176, heads=12, queries=8, keys=8, head_dim=32)
TIMES = {
    WHOLE: {"flash": 3.0, "cudnn": 2.0, "efficient": 5.0, "math": 1.0},
    T2S: {"flash": 3.0, "cudnn": None, "efficient": 4.0, "math": 1.0},
}


class _Attentions(TorchDispatchMode):
    """Names of the operators that compute attention."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "scaled_dot_product" in func.__name__ or "softmax" in func.__name__:
            self.names.add(func.__name__.split(".")[0])
        return func(*args, **(kwargs or {}))


def times(shape: AttentionShape, kernel: str) -> float | None:
    return TIMES[shape][kernel]


def test_each_shape_gets_its_fastest_kernel_and_many_keys_never_a_matrix_of_scores():
    assert fastest(TIMES, times, deterministic=False) == {str(WHOLE): "cudnn", str(T2S): "math"}


def test_a_deterministic_run_gets_the_fastest_of_the_kernels_that_give_the_same_bits():
    slow_math = {WHOLE: TIMES[WHOLE], T2S: {**TIMES[T2S], "math": 9.0}}
    chosen = fastest(TIMES, lambda shape, kernel: slow_math[shape][kernel], deterministic=True)
    assert chosen == {str(WHOLE): "flash", str(T2S): "flash"}


def test_a_shape_that_no_kernel_takes_is_left_to_torch():
    assert fastest([T2S], lambda *_: None, deterministic=False) == {}


def test_what_was_measured_on_a_device_and_version_is_kept_and_said_once(tmp_path, caplog):
    path, asked = tmp_path / "attention.json", []

    def seconds(shape: AttentionShape, kernel: str) -> float | None:
        asked.append(shape)
        return times(shape, kernel)

    def again(where: str, shapes=(T2S, WHOLE, T2S)) -> dict[str, str]:
        return kept_or_measured(path, where, shapes, seconds, deterministic=False)

    with caplog.at_level(logging.INFO):
        first = again("a GPU, torch 1")
        num_asked = len(asked)
        assert again("a GPU, torch 1") == first
    assert (len(asked), len(caplog.records)) == (num_asked, 1)
    assert "cudnn" in caplog.text
    again("a GPU, torch 2")
    again("a GPU, torch 1")
    assert len(asked) == 2 * num_asked


def test_shapes_are_those_of_the_model_with_its_clips():
    shapes = attention_shapes(tiny_model("ca2st"), num_clips=3)
    frames, patches = 2, 4  # 4 frames of 32 pixels
    assert shapes["experts.spatial.layers.0.attention.attend"] == (3 * frames, 2, 1 + patches, 1 + patches, 16)
    assert shapes["experts.temporal.layers.1.attention.attend"] == (3, 2, frames * patches, frames * patches, 16)
    t2s = "layers.0.bridges.spatial_temporal.directions.t2s.attention.attend"
    assert shapes[t2s] == (3 * patches, 2, frames, frames, 8)
    attends = {name for name, module in tiny_model("ca2st").named_modules() if isinstance(module, Attend)}
    assert shapes.keys() == attends


def _settled(name: str, tmp_path):
    model = tiny_model("ca2st")
    wake(model)
    config = TrainingConfig(attention=name, per_device_batch_size=2, global_batch_size=2)
    ranks = Ranks(fresh_accelerator(tiny_settings(tmp_path)))
    kept = settle_attention(model, config, device=torch.device("cpu"), folder=tmp_path, on_main=ranks.on_main)
    return model, kept


@pytest.mark.parametrize(
    ("name", "runs"),
    [
        ("auto", {"_scaled_dot_product_flash_attention_for_cpu"}),
        ("flash", {"_scaled_dot_product_flash_attention_for_cpu"}),
        ("math", {"_safe_softmax", "_softmax"}),
    ],
)
def test_the_kernel_that_was_set_is_the_one_that_runs_and_logits_are_equal(name, runs, tmp_path):
    model, kept = _settled(name, tmp_path)
    assert kept == ({} if name == "auto" else {"every shape": name})
    plain = tiny_model("ca2st")
    wake(plain)
    expected = plain(*inputs_for()).logits["label"]
    with _Attentions() as seen:
        found = model(*inputs_for()).logits["label"]
    assert seen.names
    assert seen.names <= runs
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_kernels_are_set_shape_by_shape():
    model = tiny_model("cast")
    shapes = attention_shapes(model, num_clips=1)
    chosen = str(next(iter(shapes.values())))
    set_kernels(model, shapes, {chosen: "math"})
    found = {(str(shape) == chosen, model.get_submodule(name).kernel) for name, shape in shapes.items()}
    assert found == {(True, KERNELS["math"]), (False, None)}


def test_a_kernel_that_the_device_does_not_have_is_refused_before_the_first_step(tmp_path):
    with pytest.raises(UserInputError, match=r"training.attention: .* found cudnn, which does not take 1 x 1 x "):
        _settled("cudnn", tmp_path)


def test_an_unknown_kernel_is_refused():
    with pytest.raises(UserInputError, match="attention"):
        forced(TrainingConfig(), attention="fastest")


@pytest.mark.gpu
def test_on_a_gpu_every_shape_gets_a_kernel_and_logits_are_equal(tmp_path):
    device = require_gpu()
    model = tiny_model("ca2st").to(device)
    inputs = [x.to(device) for x in inputs_for()]
    config = TrainingConfig(precision="bf16", per_device_batch_size=2, global_batch_size=2)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        expected = model(*inputs).logits["label"]
        ranks = Ranks(fresh_accelerator(tiny_settings(tmp_path)))
        settle_attention(model, config, device=device, folder=tmp_path, on_main=ranks.on_main)
        found = model(*inputs).logits["label"]
    assert all(module.kernel for module in model.modules() if isinstance(module, Attend))
    torch.testing.assert_close(found, expected, atol=2e-2, rtol=2e-2)
