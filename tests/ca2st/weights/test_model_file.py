"""A model's description: every setting comes back as it was, from files of every age."""

import json
from dataclasses import fields, replace

import pytest

from ca2st.model.config import AudioVisualConfig, ModelConfig, SpatialTemporalConfig, TargetSpec
from ca2st.spec import ClipSpec
from ca2st.weights.importer import ImportOptions, import_weights
from ca2st.weights.model_file import MODEL_KEY, ModelDescription, export_model, read_description
from ca2st.weights.tensor_files import WeightsDamageError, WeightsMismatchError, write_tensor_file
from support.models import TINY_CLIP, model_of_file, tiny_model

CHANGED = ModelConfig(
    kind="cast",
    spatial_encoder="videomae",
    temporal_encoder="clip",
    fusion="lateral",
    dim=64,
    depth=4,
    num_heads=4,
    patch_size=8,
    audio_stride=16,
    adapters=False,
    adapter_ratio=0.5,
    bottleneck_ratio=0.25,
    drop_path_rate=0.2,
    combination="parallel",
    shared_bottleneck=False,
    spatial_temporal=SpatialTemporalConfig(
        layers=(2, 4), directions="t2s", t2s_window="space", s2t_window="time", positions="time_codes"
    ),
    audio_spatial=AudioVisualConfig(last_layers=2, directions="to_audio", positions="none"),
    audio_temporal=AudioVisualConfig(layers=(1,), positions="learned"),
    time_code_layout="aligned",
    resnet_grouping="square",
    pretrained_num_frames=16,
    pretrained_crop_size=224,
    head_init_scale=0.001,
)
"""No setting at its default."""
DESCRIPTION = ModelDescription(
    model=CHANGED,
    clip=ClipSpec(num_frames=8, crop_size=96, mel_rows=96, num_mel_bins=64),
    targets=(TargetSpec(name="verb", num_classes=3), TargetSpec(name="noun", num_classes=4)),
)


def _edited(edit):
    document = json.loads(DESCRIPTION.metadata()[MODEL_KEY])
    edit(document)
    return {MODEL_KEY: json.dumps(document)}


def test_the_sample_changes_every_setting_there_is():
    default = ModelConfig()
    assert not [
        entry.name for entry in fields(ModelConfig) if getattr(CHANGED, entry.name) == getattr(default, entry.name)
    ]


def test_every_setting_comes_back_tuples_too():
    assert read_description(DESCRIPTION.metadata(), where="here") == DESCRIPTION


def test_settings_younger_than_the_file_have_their_defaults():
    young = ("spatial_encoder", "temporal_encoder", "fusion", "resnet_grouping", "pretrained_num_frames")
    young += ("pretrained_crop_size",)

    def as_before(document):
        for name in young:
            del document["model"][name]
        for part in ("spatial_temporal", "audio_spatial", "audio_temporal"):
            document["model"][part].pop("layers")

    found = read_description(_edited(as_before), where="here")
    default = ModelConfig()
    expected = replace(
        CHANGED,
        **{name: getattr(default, name) for name in young},
        spatial_temporal=replace(CHANGED.spatial_temporal, layers=None),
        audio_temporal=replace(CHANGED.audio_temporal, layers=None),
    )
    assert found.model == expected


@pytest.mark.parametrize("section", ["", "audio_spatial"])
def test_settings_of_a_newer_version_are_named(section):
    def add(document):
        (document["model"][section] if section else document["model"])["depth_expert"] = True

    name = f"{section}.depth_expert" if section else "depth_expert"
    with pytest.raises(
        WeightsMismatchError, match=rf"here: expected settings that .* knows, found {name}; use a newer"
    ):
        read_description(_edited(add), where="here")


def test_a_newer_format_is_named_and_a_broken_one_is_damage():
    with pytest.raises(WeightsMismatchError, match="expected a model of format 1, found 2"):
        read_description(_edited(lambda document: document.update(format=2)), where="here")
    with pytest.raises(WeightsDamageError, match="cannot read the metadata key 'ca2st_model'"):
        read_description(_edited(lambda document: document.pop("clip")), where="here")


def _set(*path, to):
    def edit(document):
        for name in path[:-1]:
            document = document[name]
        document[path[-1]] = to

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_set("model", to=[]), r"model: .*found \[\]"),
        (_set("model", "spatial_temporal", to=[]), r"model\.spatial_temporal: .*found \[\]"),
        (_set("model", "depth", to=1.5), r"model\.depth: Input should be a valid integer, found 1\.5"),
        (_set("model", "depth", to=float("nan")), r"model\.depth: .*found nan"),
        (_set("model", "depth", to=True), r"model\.depth: .*found True"),
        (_set("model", "drop_path_rate", to=float("nan")), r"model\.drop_path_rate: .*a finite number, found nan"),
        (_set("clip", "num_frames", to="4"), r"clip\.num_frames: .*found '4'"),
        (_set("clip", "num_frames", to=3), r"clip: num_frames: expected an even number >= 2, found 3, found"),
        (_set("targets", to={}), r"targets: .*found {}"),
        (_set("model", "depth", to=1025), r"found depth 1025 \(most: 1024\)"),
        (_set("model", "dim", to=1572864), r"found dim 1572864 \(most: 65536\)"),
        (_set("model", "dim", to=10**400), "int too large to convert to float"),
        (_set("clip", "num_frames", to=2**70), r"found tokens of a clip \* dim \d+"),
        (_set("clip", "mel_rows", to=2**40), r"found patches of a spectrogram \d+"),
        (_set("targets", 0, "num_classes", to=2**70), r"found classes \d+ \(most"),
    ],
)
def test_a_description_of_other_types_or_of_sizes_that_no_model_has_is_damage(edit, message):
    with pytest.raises(WeightsDamageError, match=f"^here: .*(?:{message})") as caught:
        read_description(_edited(edit), where="here")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["[]", "7", "null", "[" * 100_000, '{"format": 1}'])
def test_what_is_no_description_at_all_is_damage(text):
    with pytest.raises(WeightsDamageError, match="here: cannot read the metadata key 'ca2st_model'"):
        read_description({MODEL_KEY: text}, where="here")


def _export(path, **changes):
    """A tiny model whose header tells other sizes."""
    model = tiny_model("cast")
    config = replace(model.config, **changes)
    description = ModelDescription(model=config, clip=model.clip, targets=model.targets)
    write_tensor_file(path, model.state_dict(), metadata=description.metadata())
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": 2**16, "num_heads": 2}, r"of another shape: .* expected \[.*65536"),
        ({"depth": 1024}, r"expected the tensors of 1024 layers, as described, found \d+ in all"),
        ({"depth": 3}, r"missing: .*layers\.2\."),
    ],
)
def test_a_header_that_lies_is_one_line_and_nothing_of_its_size_is_allocated(tmp_path, changes, message):
    path = _export(tmp_path / "lies.safetensors", **changes)
    with pytest.raises(WeightsMismatchError, match=message):
        import_weights(path, tmp_path / "o.safetensors", kind="cast")
    with pytest.raises(WeightsMismatchError, match=message):
        model_of_file(path)


def test_what_may_be_missing_is_not_allocated_at_any_size(tmp_path):
    model = tiny_model("cast")
    targets = tuple(replace(target, num_classes=2**24) for target in model.targets)
    description = ModelDescription(model=model.config, clip=model.clip, targets=targets)
    path = tmp_path / "lies.safetensors"
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("head.classifiers.")}
    write_tensor_file(path, state, metadata=description.metadata())
    options = ImportOptions(allow_missing=("head.classifiers.*",))
    with pytest.raises(WeightsDamageError, match=r"expected at most \d+ numbers that the file does not give, found \d"):
        import_weights(path, tmp_path / "o.safetensors", kind="cast", options=options)


def test_a_file_of_published_names_says_how_to_translate_them(tmp_path):
    path = tmp_path / "published.safetensors"
    export_model(tiny_model("cast"), path, names="published")
    message = rf"published names; run `ca2st weights import --kind cast {path} --out OURS\.safetensors` first"
    with pytest.raises(WeightsMismatchError, match=message):
        model_of_file(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"fusion": "lateral"},
        {"spatial_encoder": "videomae", "temporal_encoder": "clip"},
        {"spatial_temporal": SpatialTemporalConfig(layers=(2,), positions="time_codes")},
    ],
)
def test_a_model_that_was_never_published_is_exported_and_read_back(tmp_path, changes):
    model = tiny_model("cast", **changes)
    export_model(model, tmp_path / "model.safetensors")
    back = model_of_file(tmp_path / "model.safetensors")
    assert (back.config, back.clip, back.targets) == (model.config, TINY_CLIP, model.targets)
    assert back.state_dict().keys() == model.state_dict().keys()
