"""Whole models: released checkpoints in, exports out, and back again without a bit changed."""

from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch

from ca2st.checked_json import DocumentError
from ca2st.errors import UserInputError
from ca2st.model.config import AudioVisualConfig, SpatialTemporalConfig
from ca2st.weights.importer import ImportOptions, import_weights
from ca2st.weights.model_file import MODEL_KEY, ModelDescription, UnwrittenSizes, export_model, read_description
from ca2st.weights.published import golden_model, to_published
from ca2st.weights.tensor_files import WeightsDamageError, WeightsMismatchError, read_tensor_file
from support.models import JOINED_KINDS, ONE_TARGET, VERB_NOUN, model_of_file, tiny_model, wake

GOLDEN = Path(__file__).parents[2] / "data" / "golden"
FILES = sorted(GOLDEN.glob("*.safetensors"))
TWO_HEADS = ImportOptions(sizes=UnwrittenSizes(num_heads=2))


def _released(folder, model, *, pickled=False):
    """What its authors would publish: no description; pickled below `module`, or as safetensors."""
    if pickled:
        torch.save({"module": to_published(model)}, folder / "released.pth")
        return folder / "released.pth"
    safetensors.torch.save_file(to_published(model), folder / "released.safetensors")
    return folder / "released.safetensors"


def _awake(kind, **how):
    model = tiny_model(kind, **how)
    wake(model)
    return model


def _equal(first, second):
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_configuration_beside_it_that_cannot_be_read_refuses_a_whole_model_before_anything_is_written(tmp_path):
    path, out = _released(tmp_path, _awake("cava")), tmp_path / "ours.safetensors"
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(DocumentError, match=r"config\.json"):
        import_weights(path, out, kind="cava", options=TWO_HEADS)
    assert not out.exists()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_released_checkpoint_gives_the_model_of_the_golden_file(tmp_path, path):
    file = read_tensor_file(path)
    golden = golden_model(file)
    weights = {n.removeprefix("weights/"): x for n, x in file.tensors.items() if n.startswith("weights/")}
    safetensors.torch.save_file(weights, tmp_path / "released.safetensors")
    mel_rows = golden.clip.mel_rows if "audio" in golden.experts else None
    sizes = UnwrittenSizes(num_heads=golden.config.num_heads, num_frames=golden.clip.num_frames, mel_rows=mel_rows)
    out = tmp_path / "ours.safetensors"
    kind = golden.config.kind
    report = import_weights(tmp_path / "released.safetensors", out, kind=kind, options=ImportOptions(sizes=sizes))
    imported = model_of_file(out)
    assert (imported.config, imported.clip, imported.targets) == (golden.config, golden.clip, golden.targets)
    assert _equal(imported, golden)
    assert (report.layout, report.missing) == (f"released {kind.upper()}", ())
    assert set(report.unexpected) == set(weights) & {"audio_ln_post.weight", "audio_ln_post.bias"}
    assert set(report.loaded) | set(report.unexpected) == set(weights)


@pytest.mark.parametrize("names", ["ours", "published"])
@pytest.mark.parametrize("targets", [ONE_TARGET, VERB_NOUN], ids=["label", "verb and noun"])
@pytest.mark.parametrize("kind", JOINED_KINDS)
def test_what_is_exported_and_imported_is_the_same_model(tmp_path, kind, targets, names):
    model = _awake(kind, targets=targets, drop_path_rate=0.2, time_code_layout="aligned")
    exported = export_model(model, tmp_path / "exported.safetensors", names=names)
    report = import_weights(exported.out, tmp_path / "back.safetensors", kind=kind)
    back = model_of_file(tmp_path / "back.safetensors")
    assert _equal(back, model)
    assert (back.config, back.clip, back.targets) == (model.config, model.clip, model.targets)
    ours = export_model(model, tmp_path / "ours.safetensors")
    assert report.sha256 == ours.sha256
    assert exported.num_tensors == len(read_tensor_file(exported.out).tensors)


@pytest.mark.parametrize("prefix", ["model.", "_orig_mod.", "module._orig_mod."])
def test_a_whole_model_is_read_without_what_was_wrapped_around_it(tmp_path, prefix):
    model = _awake("cast", targets=ONE_TARGET)
    exported = export_model(model, tmp_path / "exported.safetensors", names="published")
    file = read_tensor_file(exported.out)
    wrapped = {f"{prefix}{name}": tensor for name, tensor in file.tensors.items()} | {"n_averaged": torch.tensor(2)}
    safetensors.torch.save_file(wrapped, tmp_path / "wrapped.safetensors", metadata=file.metadata)
    report = import_weights(tmp_path / "wrapped.safetensors", tmp_path / "back.safetensors", kind="cast")
    assert _equal(model_of_file(tmp_path / "back.safetensors"), model)
    assert report.unexpected == ("n_averaged",)


@pytest.mark.parametrize("kind", JOINED_KINDS)
def test_a_file_without_a_description_is_understood_by_its_shapes(tmp_path, kind):
    model = _awake(kind)
    sizes = UnwrittenSizes(num_heads=2, num_frames=4)
    report = import_weights(
        _released(tmp_path, model, pickled=True),
        tmp_path / "o.safetensors",
        kind=kind,
        options=ImportOptions(sizes=sizes),
    )
    back = model_of_file(tmp_path / "o.safetensors")
    assert _equal(back, model)
    assert back.config == model.config
    rows = {"cast": 400}.get(kind, 46)  # no sound: the default; else the fewest rows that give its 4 columns
    assert back.clip == replace(model.clip, mel_rows=rows)
    assert report.wrapper == "module"


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("ca2st", {"audio_spatial": AudioVisualConfig(last_layers=1)}),
        ("ca2st", {"spatial_temporal": SpatialTemporalConfig(last_layers=1)}),
        ("cava", {"audio_spatial": AudioVisualConfig(last_layers=1)}),
        ("cast", {"bottleneck_ratio": 0.25, "adapter_ratio": 0.5}),
    ],
)
def test_other_layers_and_ratios_are_seen_in_the_tensors(tmp_path, kind, changes):
    model = _awake(kind, **changes)
    sizes = UnwrittenSizes(num_heads=2, num_frames=4)
    path = _released(tmp_path, model)
    import_weights(path, tmp_path / "o.safetensors", kind=kind, options=ImportOptions(sizes=sizes))
    assert model_of_file(tmp_path / "o.safetensors").config == model.config


def test_400_and_1024_spectrogram_rows_are_guessed_first_and_can_be_said(tmp_path):
    from support.models import TINY_CLIP

    model = _awake("cava", clip=replace(TINY_CLIP, mel_rows=400))
    path = _released(tmp_path, model)
    for asked, expected in ((None, 400), (396, 396), (405, 405)):
        options = ImportOptions(sizes=UnwrittenSizes(num_heads=2, num_frames=4, mel_rows=asked))
        report = import_weights(path, tmp_path / "o.safetensors", kind="cava", options=options)
        assert report.model["mel_rows"] == expected
    with pytest.raises(WeightsMismatchError, match="expected positions for 406 mel rows, found them for 396 to 405"):
        import_weights(
            path,
            tmp_path / "no.safetensors",
            kind="cava",
            options=ImportOptions(sizes=UnwrittenSizes(num_heads=2, mel_rows=406)),
        )
    assert not (tmp_path / "no.safetensors").exists()


@pytest.mark.parametrize(
    ("is_kind", "said"), [("cava", "cast"), ("cast", "cava"), ("cast", "ca2st"), ("ca2st", "cast")]
)
def test_t10_a_model_of_another_kind_is_refused(tmp_path, is_kind, said):
    path = _released(tmp_path, _awake(is_kind))
    with pytest.raises(WeightsMismatchError, match=r"check --kind|unexpected|found tables"):
        import_weights(path, tmp_path / "o.safetensors", kind=said, options=TWO_HEADS)
    exported = export_model(_awake(is_kind), tmp_path / "e.safetensors")
    with pytest.raises(WeightsMismatchError, match=rf"--kind {said} \(it is {is_kind}\)"):
        import_weights(exported.out, tmp_path / "o.safetensors", kind=said)
    assert not (tmp_path / "o.safetensors").exists()


def test_t10_a_tensor_too_few_or_too_many_is_named_and_may_be_missing_by_name_only(tmp_path):
    model = _awake("cast")
    state = to_published(model)
    few = {name: tensor for name, tensor in state.items() if not name.startswith("head.")}
    path, out = tmp_path / "few.safetensors", tmp_path / "o.safetensors"
    safetensors.torch.save_file(few | {"head.weight": state["head.weight"]}, path)
    with pytest.raises(WeightsMismatchError, match=r"1 missing: head\.classifiers\.label\.bias"):
        import_weights(path, out, kind="cast", options=TWO_HEADS)
    options = replace(TWO_HEADS, allow_missing=("head.classifiers.*",))
    assert import_weights(path, out, kind="cast", options=options).missing == ("head.bias",)
    safetensors.torch.save_file(state | {"fc.weight": torch.ones(1)}, path)
    with pytest.raises(WeightsMismatchError, match=r"1 unexpected: fc\.weight"):
        import_weights(path, tmp_path / "o2.safetensors", kind="cast", options=TWO_HEADS)


def test_sizes_that_contradict_the_files_own_description_are_refused(tmp_path):
    exported = export_model(_awake("cast"), tmp_path / "e.safetensors")
    with pytest.raises(WeightsMismatchError, match=r"num_heads 4 \(it has 2\)"):
        import_weights(
            exported.out,
            tmp_path / "o.safetensors",
            kind="cast",
            options=ImportOptions(sizes=UnwrittenSizes(num_heads=4)),
        )


def test_a_configuration_that_was_never_published_has_our_names_only(tmp_path):
    model = _awake("ca2st", audio_spatial=AudioVisualConfig(positions="learned"))
    with pytest.raises(UserInputError, match="this configuration was never published"):
        export_model(model, tmp_path / "e.safetensors", names="published")
    export_model(model, tmp_path / "e.safetensors")
    assert _equal(model_of_file(tmp_path / "e.safetensors"), model)


def test_a_description_survives_its_own_writing_and_damage_is_told():
    description = ModelDescription.of(_awake("ca2st", audio_spatial=AudioVisualConfig(last_layers=2)))
    assert read_description(description.metadata(), where="here") == description
    assert read_description({}, where="here") is None
    with pytest.raises(WeightsDamageError, match="here: cannot read the metadata key 'ca2st_model'"):
        read_description({MODEL_KEY: "{"}, where="here")
    newer = description.metadata()[MODEL_KEY].replace('"format": 1', '"format": 2')
    with pytest.raises(WeightsMismatchError, match="expected a model of format 1, found 2; use a newer ca2st"):
        read_description({MODEL_KEY: newer}, where="here")
