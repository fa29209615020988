"""ResNet-50 of torchvision and timm, with random weights, through a file and the importer, map by map."""

import pytest
import safetensors.torch
import torch
import torchvision

from ca2st.model.experts import ClipInputs, build_expert
from ca2st.spec import ClipSpec
from ca2st.weights.importer import import_weights, load_expert, load_expert_file
from ca2st.weights.model_file import ALONE
from ca2st.weights.tensor_files import WeightsDamageError, WeightsMismatchError, load_strictly, read_tensor_file
from support.models import tiny_model

CLIP = ClipSpec(num_frames=2, crop_size=64)
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def theirs():
    """Running statistics that are not those of a fresh network, and every norm with a scale and a shift of its own."""
    torch.manual_seed(5)
    network = torchvision.models.resnet50(weights=None)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.2)
                module.running_mean.normal_(0, 0.2)
                module.running_var.uniform_(0.5, 1.5)
    return network.eval()


@pytest.fixture(scope="module")
def imported(theirs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("resnet")
    safetensors.torch.save_file(theirs.state_dict(), folder / "theirs.safetensors")
    return import_weights(folder / "theirs.safetensors", folder / "ours.safetensors", kind="resnet50")


def _save(state, path):
    safetensors.torch.save_file({name: tensor.clone() for name, tensor in state.items()}, path)
    return path


@torch.no_grad()
def test_stages_and_the_pooled_feature_are_those_of_torchvision(theirs, imported):
    ours = build_expert("spatial", ALONE["resnet50"], CLIP).eval()
    load_strictly(ours, read_tensor_file(imported.out).tensors, where="here")
    video = torch.randn(2, 3, 2, 64, 64, generator=torch.Generator().manual_seed(0))
    inputs = ClipInputs(video, torch.zeros(2, 400, 128))
    x = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(video[:, :, 1]))))
    tokens = ours.embed(inputs)
    for stage, layer in enumerate((theirs.layer1, theirs.layer2, theirs.layer3, theirs.layer4)):
        x, tokens = layer(x), ours.stages[stage](tokens)
        expected = x.flatten(2).transpose(1, 2)
        assert expected.std() > 0.01
        assert (tokens[:, 0] - expected).abs().max() <= TOLERANCE * expected.abs().max()
    pooled = theirs.avgpool(x).flatten(1)
    assert pooled.shape == (2, 2048)
    assert (ours(inputs) - pooled).abs().max() <= TOLERANCE * pooled.abs().max()


def test_the_classifier_and_the_counters_are_left_aside_and_all_else_is_used(theirs, imported):
    aside = {name for name in theirs.state_dict() if name.endswith("num_batches_tracked") or name.startswith("fc.")}
    assert set(imported.unexpected) == aside
    assert set(imported.loaded) == theirs.state_dict().keys() - aside
    assert (len(imported.loaded), imported.layout, imported.missing) == (265, "ResNet-50", ())


def test_timm_writes_the_same_names_and_shapes(theirs):
    import timm

    with torch.device("meta"):
        network = timm.create_model("resnet50", pretrained=False)
    shapes = {name: tensor.shape for name, tensor in network.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in theirs.state_dict().items()}


def test_the_prefix_of_parallel_training_makes_no_difference(theirs, imported, tmp_path):
    path = _save({f"module.{name}": x for name, x in theirs.state_dict().items()}, tmp_path / "theirs.safetensors")
    report = import_weights(path, tmp_path / "ours.safetensors", kind="resnet50")
    assert report.checksums == imported.checksums


@pytest.mark.slow
def test_a_pickled_file_gives_the_same_tensors(theirs, imported, tmp_path):
    torch.save(theirs.state_dict(), tmp_path / "resnet50.pth")
    report = import_weights(tmp_path / "resnet50.pth", tmp_path / "ours.safetensors", kind="resnet50")
    assert report.checksums == imported.checksums


def test_the_imported_file_goes_into_a_model_of_any_clip(imported):
    model = tiny_model("cast", clip=ClipSpec(num_frames=4, crop_size=64), depth=4, spatial_encoder="resnet50")
    load_expert_file(model, "spatial", imported.out)
    expected = read_tensor_file(imported.out).tensors
    state = model.experts["spatial"].state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in state.items())


def test_it_does_not_go_into_an_expert_that_is_clip(imported):
    with pytest.raises(WeightsMismatchError, match=r"missing: class_token.*unexpected: stages\.0\.0\.bn1"):
        load_expert(tiny_model("cast"), "spatial", read_tensor_file(imported.out).tensors)


def _without_statistics(state):
    return {name: tensor for name, tensor in state.items() if "running_var" not in name}


def _of_resnet101(state):
    return state | {"layer3.6.conv1.weight": state["layer3.5.conv1.weight"]}


def _narrow(state):
    return state | {"layer4.2.conv3.weight": torch.zeros(8, 8, 1, 1)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without_statistics, r"53 missing: stages\.0\.0\.bn1\.running_var"),
        (_of_resnet101, r"1 unexpected in the layout 'ResNet-50': layer3\.6\.conv1\.weight"),
        (_narrow, r"1 of another shape: stages\.3\.2\.conv3\.weight expected \[2048, 512, 1, 1\]"),
    ],
)
def test_t10_what_is_no_whole_resnet50_is_refused_by_name(theirs, tmp_path, change, message):
    path = _save(change(theirs.state_dict()), tmp_path / "theirs.safetensors")
    with pytest.raises(WeightsMismatchError, match=message):
        import_weights(path, tmp_path / "out" / "ours.safetensors", kind="resnet50")
    assert not (tmp_path / "out").exists()


def test_statistics_that_are_not_finite_are_damage(theirs, tmp_path):
    state = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    state["layer2.1.bn2.running_var"][3] = float("nan")
    with pytest.raises(WeightsDamageError, match=r"NaN or infinity in 1 tensors: stages\.1\.1\.bn2\.running_var"):
        import_weights(_save(state, tmp_path / "theirs.safetensors"), tmp_path / "o.safetensors", kind="resnet50")
