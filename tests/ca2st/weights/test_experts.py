import pytest
import torch

from ca2st.weights.importer import expert_state, load_expert
from ca2st.weights.tensor_files import WeightsMismatchError
from support.models import expert_inputs, tiny_model, wake


@pytest.mark.parametrize("name", ["spatial", "temporal", "audio"])
def test_a_pretrained_expert_moves_into_the_whole_model(name):
    alone = tiny_model(name, adapters=False)
    wake(alone)
    whole = tiny_model("ca2st")
    report = load_expert(whole, name, expert_state(alone, name))
    assert len(report.loaded) == len(list(alone.experts[name].parameters()))
    with torch.no_grad():
        assert torch.equal(whole.experts[name](expert_inputs()), alone.experts[name](expert_inputs()))


def test_the_state_is_the_experts_own_and_a_copy():
    model = tiny_model("cast")
    state = expert_state(model, "spatial")
    assert not [name for name in state if "adapter" in name or "bridge" in name]
    assert not any(tensor.requires_grad for tensor in state.values())
    state["class_token"].fill_(7)
    assert not model.experts["spatial"].class_token.eq(7).all()


def test_fixed_position_tables_are_no_weights():
    assert "positions" not in expert_state(tiny_model("temporal"), "temporal")


def test_an_expert_that_the_model_does_not_have_is_named():
    with pytest.raises(
        WeightsMismatchError, match="expert 'audio': expected one of spatial, temporal for a cast model"
    ):
        expert_state(tiny_model("cast"), "audio")
    with pytest.raises(WeightsMismatchError, match="expert 'audio'"):
        load_expert(tiny_model("cast"), "audio", {})


def test_the_weights_of_another_expert_or_size_are_refused():
    audio = expert_state(tiny_model("audio"), "audio")
    with pytest.raises(WeightsMismatchError, match=r"spatial expert: .*missing: norm_pre.bias"):
        load_expert(tiny_model("cast"), "spatial", audio)
    wider = expert_state(tiny_model("audio", dim=64), "audio")
    with pytest.raises(WeightsMismatchError, match=r"store: .*class_token expected \[32\], found \[64\]"):
        load_expert(tiny_model("cava"), "audio", wider, where="store")


def test_the_temporal_expert_without_its_query_bias_is_refused():
    state = expert_state(tiny_model("temporal"), "temporal")
    del state["layers.0.attention.q_bias"]
    with pytest.raises(WeightsMismatchError, match=r"1 missing: layers\.0\.attention\.q_bias"):
        load_expert(tiny_model("cast"), "temporal", state)
