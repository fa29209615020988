"""``ca2st model info`` and ``ca2st model presets``."""

from dataclasses import replace
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ca2st.model.config import ModelConfig, TargetSpec


app = typer.Typer(no_args_is_help=True)


class Kind(StrEnum):
    """Models that can be built."""

    CAST = "cast"
    CAVA = "cava"
    CA2ST = "ca2st"
    SPATIAL = "spatial"
    TEMPORAL = "temporal"
    AUDIO = "audio"


class Spatial(StrEnum):
    """What the spatial expert can be."""

    CLIP = "clip"
    VIDEOMAE = "videomae"
    RESNET50 = "resnet50"


class Temporal(StrEnum):
    """What the temporal expert can be."""

    VIDEOMAE = "videomae"
    CLIP = "clip"


class Size(StrEnum):
    """Sizes of the experts."""

    VIT_S = "vit_s"
    VIT_B = "vit_b"
    VIT_L = "vit_l"


_JSON = typer.Option("--json", help="Print the facts as one JSON object.")


@app.command(epilog="Example: ca2st model info --model ca2st --num-classes 400")
def info(
    model: Annotated[Kind | None, typer.Option(help="Published kind, or one expert alone.")] = None,
    preset: Annotated[str | None, typer.Option(help="A configuration by name instead (ca2st model presets).")] = None,
    spatial: Annotated[Spatial | None, typer.Option(help="Another spatial expert than CLIP.")] = None,
    temporal: Annotated[Temporal | None, typer.Option(help="Another temporal expert than VideoMAE.")] = None,
    size: Annotated[Size, typer.Option(help="Size of the experts.")] = Size.VIT_B,
    num_classes: Annotated[int | None, typer.Option(help="Classes of a single label.")] = None,
    verb_noun: Annotated[bool, typer.Option("--verb-noun", help="97 verbs and 300 nouns (EPIC-KITCHENS-100).")] = False,
    num_frames: Annotated[int, typer.Option(help="Frames of a clip.")] = 16,
    crop_size: Annotated[int, typer.Option(help="Pixels of a frame's side.")] = 224,
    mel_rows: Annotated[int, typer.Option(help="Rows of the spectrogram crop, 10 ms each.")] = 400,
    as_json: Annotated[bool, _JSON] = False,
) -> None:
    """Structure, parameters and multiply-adds of a model, without building its weights."""
    from ca2st.model.inspect import model_info
    from ca2st.model.presets import SIZES
    from ca2st.spec import ClipSpec
    from ray_jobs.console import print_json, result

    encoders = {"spatial_encoder": spatial, "temporal_encoder": temporal}
    changes = {name: encoder.value for name, encoder in encoders.items() if encoder is not None}
    base = _base(model, preset)
    _check_roles(base, spatial, temporal)
    config = replace(base, **changes, **SIZES[size.value])  # type: ignore[arg-type]  # checked strings
    clip = ClipSpec(num_frames=num_frames, crop_size=crop_size, mel_rows=mel_rows)
    facts = model_info(config, clip, _targets(num_classes, verb_noun=verb_noun))
    if as_json:
        print_json(facts)
        return
    name = preset or config.kind
    result(f"{name}: {facts.trainable:,} trainable of {facts.total:,} parameters, {facts.gmacs:.1f} GMACs a view")
    for part in facts.parts:
        result(f"  {part.name:<28} {part.trainable:>12,} of {part.total:>12,}  {part.gmacs:8.2f} GMACs")


@app.command(epilog="Example: ca2st model presets")
def presets(as_json: Annotated[bool, _JSON] = False) -> None:
    """Configurations by name: published models and the rows of their ablations, for `[model] preset` and `info`."""
    from ca2st.model.presets import PRESETS
    from ray_jobs.console import print_json, result

    if as_json:
        print_json({"presets": PRESETS})
        return
    result("preset                        EPIC-KITCHENS-100 action top-1 as published; what it is")
    for name, preset in PRESETS.items():
        figure = "" if preset.published_top1 is None else f"{preset.published_top1:.1f}"
        result(f"{name:<28} {figure:>6}  {preset.says}")


def _base(model: Kind | None, preset: str | None) -> "ModelConfig":
    from ca2st.errors import UserInputError
    from ca2st.model.config import ModelConfig
    from ca2st.model.presets import find_preset

    if (model is None) == (preset is None):
        raise UserInputError("expected either --model KIND or --preset NAME")
    return find_preset(preset).config if preset is not None else ModelConfig(kind=model.value if model else "ca2st")


def _check_roles(config: "ModelConfig", spatial: Spatial | None, temporal: Temporal | None) -> None:
    """Refuse an encoder for an expert that the model has not."""
    from ca2st.errors import UserInputError
    from ca2st.model.structure import EXPERTS

    own = EXPERTS[config.kind]
    for role, encoder in (("spatial", spatial), ("temporal", temporal)):
        if encoder is not None and role not in own:
            raise UserInputError(
                f"--{role} {encoder.value}: expected a model with a {role} expert, found {config.kind}, which has "
                f"{', '.join(own)}; leave --{role} out"
            )


def _targets(num_classes: int | None, *, verb_noun: bool) -> "tuple[TargetSpec, ...]":
    from ca2st.errors import UserInputError
    from ca2st.model.config import TargetSpec

    if verb_noun == (num_classes is not None):
        raise UserInputError("expected either --num-classes C or --verb-noun")
    sizes = {"verb": 97, "noun": 300} if verb_noun else {"label": num_classes or 0}
    return tuple(TargetSpec(name=name, num_classes=classes) for name, classes in sizes.items())
