"""``ca2st model info``."""

from enum import StrEnum
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True)


class Kind(StrEnum):
    """Models that can be built."""

    CAST = "cast"
    CAVA = "cava"
    CA2ST = "ca2st"
    SPATIAL = "spatial"
    TEMPORAL = "temporal"
    AUDIO = "audio"


@app.callback()
def _group() -> None:
    """Keeps the verbs even while there is only one."""


@app.command(epilog="Example: ca2st model info --model ca2st --num-classes 400")
def info(
    model: Annotated[Kind, typer.Option(help="Published kind, or one expert alone with adapters and head.")],
    num_classes: Annotated[int | None, typer.Option(help="Classes of a single label.")] = None,
    verb_noun: Annotated[bool, typer.Option("--verb-noun", help="97 verbs and 300 nouns (EPIC-KITCHENS-100).")] = False,
    num_frames: Annotated[int, typer.Option(help="Frames of a clip.")] = 16,
    mel_rows: Annotated[int, typer.Option(help="Rows of the spectrogram crop, 10 ms each.")] = 400,
    as_json: Annotated[bool, typer.Option("--json", help="Print the facts as one JSON object.")] = False,
) -> None:
    """Structure, parameters and multiply-adds of a model at ViT-B size, without building its weights."""
    from ca2st.errors import UserInputError
    from ca2st.model.config import ModelConfig, TargetSpec
    from ca2st.model.info import model_info
    from ca2st.spec import ClipSpec
    from ray_jobs.console import print_json, result

    if verb_noun == (num_classes is not None):
        raise UserInputError("expected either --num-classes C or --verb-noun")
    sizes = {"verb": 97, "noun": 300} if verb_noun else {"label": num_classes or 0}
    targets = tuple(TargetSpec(name=name, num_classes=size) for name, size in sizes.items())
    facts = model_info(ModelConfig(kind=model.value), ClipSpec(num_frames=num_frames, mel_rows=mel_rows), targets)
    if as_json:
        print_json(facts)
        return
    result(
        f"{model.value}: {facts.trainable:,} trainable of {facts.total:,} parameters, {facts.gmacs:.1f} GMACs a view"
    )
    for part in facts.parts:
        result(f"  {part.name:<28} {part.trainable:>12,} of {part.total:>12,}  {part.gmacs:8.2f} GMACs")
