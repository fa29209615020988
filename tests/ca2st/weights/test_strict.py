import pytest
import torch
from torch import nn

from ca2st.weights.tensor_files import WeightsMismatchError, load_strictly


def _state(**changes):
    state = {"weight": torch.ones(3, 2), "bias": torch.ones(3)} | changes
    return {name: tensor for name, tensor in state.items() if tensor is not None}


def test_all_tensors_are_loaded_and_listed():
    linear = nn.Linear(2, 3)
    report = load_strictly(linear, _state(), where="here")
    assert report.loaded == ("bias", "weight")
    assert (report.missing, report.unexpected) == ((), ())
    assert linear.weight.eq(1).all()


def test_half_precision_is_widened_to_the_models_type():
    linear = nn.Linear(2, 3)
    load_strictly(linear, {name: tensor.half() for name, tensor in _state().items()}, where="here")
    assert linear.weight.dtype == torch.float32
    assert linear.bias.eq(1).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bias": None}, "here: expected exactly the tensors of the model, found 1 missing: bias"),
        ({"extra": torch.ones(1)}, "1 unexpected: extra"),
        ({"weight": torch.ones(2, 3)}, r"1 of another shape: weight expected \[3, 2\], found \[2, 3\]"),
        ({"bias": torch.ones(3, dtype=torch.int32)}, "1 not of a floating-point type: bias"),
        ({"bias": None, "extra": torch.ones(1)}, "1 missing: bias; 1 unexpected: extra"),
    ],
)
def test_anything_but_the_exact_tensors_is_refused_and_changes_nothing(changes, message):
    linear = nn.Linear(2, 3)
    before = linear.weight.clone()
    with pytest.raises(WeightsMismatchError, match=message):
        load_strictly(linear, _state(**changes), where="here")
    assert torch.equal(linear.weight, before)


def test_a_pattern_that_allows_nothing_is_refused():
    with pytest.raises(WeightsMismatchError, match=r"allow_missing patterns match nothing that is missing: head\.\*"):
        load_strictly(nn.Linear(2, 3), _state(), where="here", allow_missing=("head.*",))


def test_what_the_caller_allows_may_be_missing_and_is_reported():
    report = load_strictly(nn.Linear(2, 3), _state(bias=None), where="here", allow_missing=("b*",))
    assert report.missing == ("bias",)


def test_loading_does_not_disturb_who_learns():
    linear = nn.Linear(2, 3)
    linear.bias.requires_grad_(False)
    load_strictly(linear, _state(), where="here")
    assert (linear.weight.requires_grad, linear.bias.requires_grad) == (True, False)
