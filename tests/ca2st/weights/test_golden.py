from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from ca2st.errors import UserInputError
from ca2st.model.network import build_model
from ca2st.weights.published import TOLERANCE, check_golden, golden_model, golden_output, pix
from ca2st.weights.tensor_files import WeightsDamageError, WeightsMismatchError, read_tensor_file

GOLDEN = Path(__file__).parents[2] / "data" / "golden"
FILES = sorted(GOLDEN.glob("*.safetensors"))
MEASURED = 2e-6
"""What is asked for is 2e-5; the description promises 2e-6, and so do we."""


def test_all_ten_golden_files_are_here():
    assert len(FILES) == 10


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_ours_reproduces_every_expected_tensor(path):
    (report,) = check_golden([path])
    expected = {n.removeprefix("expected/") for n in read_tensor_file(path).tensors if n.startswith("expected/")}
    assert report.ok
    assert set(report.max_abs_diff) == expected
    assert max(report.max_abs_diff.values()) <= MEASURED, report.max_abs_diff


def _rewritten(tmp_path: Path, change, *, source: str = "cava_small_variance") -> Path:
    file = read_tensor_file(GOLDEN / f"{source}.safetensors")
    tensors, metadata = dict(file.tensors), dict(file.metadata)
    change(tensors, metadata)
    path = tmp_path / "changed.safetensors"
    safetensors.torch.save_file(tensors, path, metadata=metadata)
    return path


@pytest.mark.parametrize(
    "name",
    [
        "blocks.0.s2t_cross.s2t_kv.weight",
        "blocks.0.T_MLP_Adapter.D_fc2.bias",
        "audio_time_mlp.3.0.weight",
        "ast_pos_embed",
        "clip_ln_post.weight",
    ],
)
def test_a_small_change_of_any_weight_is_noticed(tmp_path, name):
    def nudge(tensors, _metadata):
        tensors[f"weights/{name}"] = tensors[f"weights/{name}"] * 1.05 + 0.01

    (report,) = check_golden([_rewritten(tmp_path, nudge)])
    assert not report.ok


@pytest.mark.parametrize("changes", [{"time_code_layout": "aligned"}, {"combination": "parallel"}])
def test_golden_files_tell_the_reference_layout_and_the_sequential_combination_from_the_others(changes):
    file = read_tensor_file(GOLDEN / "ca2st_single.safetensors")
    reference = golden_model(file)
    other = build_model(replace(reference.config, **changes), reference.clip, reference.targets).eval()
    other.load_state_dict(reference.state_dict())
    difference = golden_output(other, file).logits["label"] - file.tensors["expected/logits"]
    assert difference.abs().max() > TOLERANCE


def test_a_file_that_expects_another_shape_is_not_ok(tmp_path):
    def shorten(tensors, _metadata):
        tensors["expected/logits"] = tensors["expected/logits"][:, :-1].contiguous()

    (report,) = check_golden([_rewritten(tmp_path, shorten)])
    assert report.max_abs_diff["logits"] == float("inf")
    assert not report.ok


def test_a_file_that_expects_nothing_is_not_ok(tmp_path):
    def forget(tensors, _metadata):
        for name in [name for name in tensors if name.startswith("expected/")]:
            del tensors[name]

    (report,) = check_golden([_rewritten(tmp_path, forget)])
    assert not report.ok


def test_an_expected_tensor_that_nobody_computes_is_named(tmp_path):
    def add(tensors, _metadata):
        tensors["expected/feature_text"] = torch.zeros(1)

    with pytest.raises(UserInputError, match="expected/feature_text: expected one of feature_audio"):
        check_golden([_rewritten(tmp_path, add)])


def test_a_golden_file_with_a_weight_too_few_is_refused_by_name(tmp_path):
    with pytest.raises(WeightsMismatchError, match=r"1 missing: .*blocks.0.ast_attn.qkv.bias|1 missing: experts.audio"):
        check_golden([_rewritten(tmp_path, lambda tensors, _: tensors.pop("weights/blocks.0.ast_attn.qkv.bias"))])


def test_a_file_without_the_golden_key_is_refused(tmp_path):
    with pytest.raises(UserInputError, match="expected a golden file"):
        check_golden([_rewritten(tmp_path, lambda _, metadata: metadata.pop("golden"))])


@pytest.mark.parametrize("text", ["{", "[]", '{"kind": "cast"}', '{"what": 1}'])
def test_a_golden_key_that_cannot_be_read_is_damage(tmp_path, text):
    with pytest.raises(WeightsDamageError, match="cannot read the metadata key 'golden'"):
        check_golden([_rewritten(tmp_path, lambda _, metadata: metadata.update(golden=text))])


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserInputError, match=r"expected a safetensors file, found none at .*nowhere"):
        check_golden([tmp_path / "nowhere.safetensors"])


@pytest.mark.parametrize("num_bytes", [0, 7, 200, 100_000])
def test_a_truncated_file_is_damage_and_named(tmp_path, num_bytes):
    path = tmp_path / "short.safetensors"
    path.write_bytes(FILES[0].read_bytes()[:num_bytes])
    with pytest.raises(WeightsDamageError, match=r"short.safetensors: expected a whole safetensors file"):
        check_golden([path])


def test_a_pickle_is_never_opened(tmp_path):
    path = tmp_path / "model.pth"
    torch.save({"w": torch.zeros(2)}, path)
    with pytest.raises(WeightsDamageError, match="expected a whole safetensors file"):
        check_golden([path])


def test_the_input_function_follows_its_formula():
    values = pix((2, 3, 5), salt=11)
    assert values.shape == (2, 3, 5)
    assert values.dtype == torch.float32
    for i in (0, 1, 7, 29):
        hashed = ((i * 2654435761 + 11 * 40503) % 2**32) >> 16
        assert values.flatten()[i].item() == np.float32((hashed % 997) / 498 - 1)
    far = pix((3_000_000,), salt=2)
    assert far[2_999_999].item() == np.float32((((2_999_999 * 2654435761 + 2 * 40503) % 2**32) >> 16) % 997 / 498 - 1)
