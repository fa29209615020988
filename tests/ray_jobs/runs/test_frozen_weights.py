"""What a run does not train is kept once by its hash, comes back whole, and nothing else is kept."""

from pathlib import Path

import pytest
import torch

from ca2st.model.network import set_trainable
from ca2st.training.resume import trained_tensors
from ca2st.weights.tensor_files import WeightsDamageError, WeightsMismatchError
from ray_jobs.runs.model import ADDED, EXPERTS_FOLDER, frozen_state, keep_frozen, load_frozen
from support.models import tiny_model, wake


def model_training(which, *, seed=0, **changes):
    model = tiny_model("cast", **changes)
    wake(model, seed=seed)
    set_trainable(model, which)
    return model


@pytest.mark.parametrize(
    ("which", "kept"),
    [
        ("all", set()),
        ("added", {"spatial", "temporal"}),
        ("adapters", {"spatial", "temporal", ADDED}),
        ("head", {"spatial", "temporal", ADDED}),
        (["head.*", "layers.*", "experts.spatial.*"], {"temporal"}),
        (["head.*", "layers.*", "experts.spatial.layers.1.*"], {"spatial", "temporal"}),
    ],
)
def test_what_is_frozen_comes_back_bit_for_bit_and_what_is_trained_is_left_to_the_checkpoint(
    which, kept, tmp_path: Path
) -> None:
    model, other = model_training(which), model_training(which, seed=9)
    hashes = keep_frozen(model, tmp_path)
    assert hashes.keys() == kept
    load_frozen(other, hashes, tmp_path)
    trained = trained_tensors(model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor) or name in trained
    whole = frozen_state(hashes, tmp_path) | trained
    assert whole.keys() == model.state_dict().keys()


def test_a_resnet_is_kept_with_its_statistics(tmp_path: Path) -> None:
    model = model_training("added", spatial_encoder="resnet50", depth=4)
    model.experts["spatial"].stem.norm.running_mean.fill_(3.0)
    other = model_training("added", seed=9, spatial_encoder="resnet50", depth=4)
    load_frozen(other, keep_frozen(model, tmp_path), tmp_path)
    assert float(other.experts["spatial"].stem.norm.running_mean.mean()) == 3.0


def test_equal_weights_are_kept_once_however_often_a_run_starts(tmp_path: Path) -> None:
    assert keep_frozen(model_training("head"), tmp_path) == keep_frozen(model_training("head"), tmp_path)
    assert len(list((tmp_path / EXPERTS_FOLDER).iterdir())) == 3


def test_weights_of_another_frozen_set_are_refused(tmp_path: Path) -> None:
    hashes = keep_frozen(model_training("head"), tmp_path)
    with pytest.raises(WeightsMismatchError, match=r"expected frozen weights of spatial, temporal, found .* added"):
        load_frozen(model_training("added"), hashes, tmp_path)
    adapters = keep_frozen(model_training("adapters"), tmp_path)
    with pytest.raises(WeightsMismatchError, match=r"missing: layers\.0\.adapters"):
        load_frozen(model_training("head"), adapters, tmp_path)


def test_damaged_frozen_weights_are_refused_by_name(tmp_path: Path) -> None:
    hashes = keep_frozen(model_training("head"), tmp_path)
    path = tmp_path / EXPERTS_FOLDER / f"{hashes[ADDED]}.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(WeightsDamageError, match=hashes[ADDED]):
        load_frozen(model_training("head"), hashes, tmp_path)
