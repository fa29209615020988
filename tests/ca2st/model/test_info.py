import pytest

from ca2st.model.config import ModelConfig, TargetSpec
from ca2st.model.inspect import model_info
from ca2st.spec import ClipSpec
from support.models import KINDS, ONE_TARGET, TINY_CLIP, tiny_config


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "gmacs", "trainable"),
    [("cast", 390.5, 45_378_832), ("ca2st", 459.1, 62_249_296)],  # CAVA's are those of `ca2st model info`
)
def test_multiply_adds_and_trainable_parameters_are_the_published_ones(kind, gmacs, trainable):
    info = model_info(ModelConfig(kind=kind), ClipSpec(), (TargetSpec(name="label", num_classes=400),))
    assert info.gmacs == pytest.approx(gmacs, abs=0.05)
    assert info.trainable == trainable


@pytest.mark.parametrize("kind", KINDS)
def test_parts_add_up_to_the_model(kind):
    info = model_info(tiny_config(kind), TINY_CLIP, ONE_TARGET)
    assert sum(part.total for part in info.parts) == info.total
    assert sum(part.trainable for part in info.parts) == info.trainable
    assert sum(part.gmacs for part in info.parts) == pytest.approx(info.gmacs)
    assert all(part.gmacs > 0 for part in info.parts)


def test_multiply_adds_of_one_expert_equal_a_count_by_hand():
    info = model_info(tiny_config("temporal", adapters=False), TINY_CLIP, ONE_TARGET)
    tokens, dim, layers = 2 * 4, 32, 2
    patches = tokens * dim * 3 * 2 * 16 * 16
    linears = tokens * dim * dim * (3 + 1 + 4 + 4)
    attention = 2 * tokens * tokens * dim
    assert info.parts[0].name == "temporal expert"
    assert info.parts[0].gmacs * 1e9 == pytest.approx(patches + layers * (linears + attention))
    assert info.parts[1].gmacs * 1e9 == pytest.approx(dim * 5)
