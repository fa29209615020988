"""A model's description: every setting comes back as it was, from files of every age."""

import json
from dataclasses import fields, replace

import pytest

from ca2st.model.config import AudioVisualConfig, ModelConfig, SpatialTemporalConfig, TargetSpec
from ca2st.spec import ClipSpec
from ca2st.weights import WeightsDamageError, WeightsMismatchError, read_model_file
from ca2st.weights.exporter import export_model
from ca2st.weights.model_file import MODEL_KEY, ModelDescription, read_description
from support.models import TINY_CLIP, tiny_model

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
    back = read_model_file(tmp_path / "model.safetensors")
    assert (back.config, back.clip, back.targets) == (model.config, TINY_CLIP, model.targets)
    assert back.state_dict().keys() == model.state_dict().keys()
