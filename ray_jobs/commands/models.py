"""``ca2st model``: structure and parameters; ``ca2st weights``: import, export and the check against golden files."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ca2st.errors import UserInputError, listed
from ca2st.model import config as structure
from ca2st.spec import ClipSpec
from ray_jobs.commands.options import Json
from ray_jobs.console import answer

model = typer.Typer(no_args_is_help=True)
weights = typer.Typer(no_args_is_help=True)


@model.command(epilog="Example: ca2st model info --model ca2st --num-classes 400")
def info(
    kind: Annotated[
        structure.ModelKind | None, typer.Option("--model", help="Published kind, or one expert alone.")
    ] = None,
    preset: Annotated[str | None, typer.Option(help="A configuration by name instead (ca2st model presets).")] = None,
    spatial: Annotated[structure.SpatialEncoder | None, typer.Option(help="Another spatial expert than CLIP.")] = None,
    temporal: Annotated[
        structure.TemporalEncoder | None, typer.Option(help="Another temporal expert than VideoMAE.")
    ] = None,
    size: Annotated[structure.SizeName, typer.Option(help="Size of the experts.")] = "vit_b",
    num_classes: Annotated[int | None, typer.Option(help="Classes of a single label.")] = None,
    verb_noun: Annotated[bool, typer.Option("--verb-noun", help="97 verbs and 300 nouns (EPIC-KITCHENS-100).")] = False,
    num_frames: Annotated[int, typer.Option(help="Frames of a clip.")] = 16,
    crop_size: Annotated[int, typer.Option(help="Pixels of a frame's side.")] = 224,
    mel_rows: Annotated[int, typer.Option(help="Rows of the spectrogram crop, 10 ms each.")] = 400,
    as_json: Json = False,
) -> None:
    """Structure, parameters and multiply-adds of a model, without building its weights."""
    from ca2st.model.inspect import model_info

    if (kind is None) == (preset is None):
        raise UserInputError("expected either --model KIND or --preset NAME")
    config = structure.find_preset(preset).config if preset is not None else structure.ModelConfig(kind=kind or "ca2st")
    own = structure.EXPERTS[config.kind]
    for role, encoder in (("spatial", spatial), ("temporal", temporal)):
        if encoder is not None and role not in own:
            raise UserInputError(
                f"--{role} {encoder}: expected a model with a {role} expert, found {config.kind}, which has "
                f"{', '.join(own)}; leave --{role} out"
            )
    encoders = {"spatial_encoder": spatial, "temporal_encoder": temporal}
    changes = {name: encoder for name, encoder in encoders.items() if encoder is not None} | structure.SIZES[size]
    config = replace(config, **changes)  # type: ignore[arg-type]  # each by its own field's name
    if verb_noun == (num_classes is not None):
        raise UserInputError("expected either --num-classes C or --verb-noun")
    sizes = {"verb": 97, "noun": 300} if verb_noun else {"label": num_classes or 0}
    targets = [structure.TargetSpec(name=name, num_classes=classes) for name, classes in sizes.items()]
    clip = ClipSpec(num_frames=num_frames, crop_size=crop_size, mel_rows=mel_rows)
    facts = model_info(config, clip, targets)
    lines = [
        f"{preset or config.kind}: {facts.trainable:,} trainable of {facts.total:,} parameters, {facts.gmacs:.1f} "
        "GMACs per view"
    ]
    lines += [
        f"  {part.name:<28} {part.trainable:>12,} of {part.total:>12,}  {part.gmacs:8.2f} GMACs" for part in facts.parts
    ]
    answer(facts, lines, as_json=as_json)


@model.command(epilog="Example: ca2st model presets")
def presets(as_json: Json = False) -> None:
    """Configurations by name: published models and the rows of their ablations, for `[model] preset` and `info`."""
    lines = ["preset                        EPIC-KITCHENS-100 action top-1 as published; what it is"]
    for name, preset in structure.PRESETS.items():
        figure = "" if preset.published_top1 is None else f"{preset.published_top1:.1f}"
        lines.append(f"{name:<28} {figure:>6}  {preset.says}")
    answer({"presets": structure.PRESETS}, lines, as_json=as_json)


WeightsKind = Literal["clip", "videomae", "ast", "cast", "cava", "ca2st", "resnet50"]


@weights.command(
    "import", epilog="Example: ca2st weights import --kind clip ViT-B-16.pt --out experts/clip.safetensors"
)
def import_file(
    file: Annotated[
        str,
        typer.Argument(
            help="A checkpoint: .safetensors (one file, or a folder of parts with their index), .pt, .pth, .bin; its "
            "layout is detected. Or a public name: hf-hub:ORG/NAME[@REVISION], open_clip:MODEL/TAG, timm:NAME."
        ),
    ],
    kind: Annotated[
        WeightsKind,
        typer.Option(help="An expert (CLIP's visual half, VideoMAE, AST, ResNet-50) or a whole released model."),
    ],
    out: Annotated[Path, typer.Option(help="Where to write: a name that ends in .safetensors.")],
    allow_missing: Annotated[
        list[str] | None,
        typer.Option(help="Pattern of our tensor names that may be missing (norm.*); repeatable. Default: none may."),
    ] = None,
    heads: Annotated[int | None, typer.Option(min=1, help="Attention heads; default: 64 features per head.")] = None,
    mel_rows: Annotated[
        int | None,
        typer.Option(min=16, help="Spectrogram rows the audio positions are cut or stretched to; default 400."),
    ] = None,
    num_frames: Annotated[
        int | None, typer.Option(min=2, help="Frames of a clip, where no tensor shows it (VideoMAE, CAVA); default 16.")
    ] = None,
    crop_size: Annotated[
        int | None,
        typer.Option(min=16, help="Pixels that VideoMAE was trained with, which no tensor shows; default 224."),
    ] = None,
    target: Annotated[str, typer.Option(help="Name of a whole model's single label space.")] = "label",
    timeout_seconds: Annotated[float, typer.Option(min=1, help="Longest time to read the file.")] = 600,
    as_json: Json = False,
) -> None:
    """Turn a checkpoint that others wrote into a file of ours. Strict: every tensor is used, or nothing is written.

    Pickles are read in a limited child process that admits tensors and plain containers; no code in a file is run.
    A file that is fetched by its public name is read in the same way.
    """
    from ca2st.weights.hub import fetch, is_hub_name
    from ca2st.weights.importer import ImportOptions, import_weights
    from ca2st.weights.model_file import UnwrittenSizes
    from ca2st.weights.tensor_files import check_writable_name
    from ray_jobs.environment import hub_access

    check_writable_name(out, source=Path(file))
    path, origin = fetch(file, hub_access()) if is_hub_name(file) else (Path(file), None)
    options = ImportOptions(
        allow_missing=tuple(allow_missing or ()),
        sizes=UnwrittenSizes(
            num_heads=heads, mel_rows=mel_rows, num_frames=num_frames, crop_size=crop_size, target=target
        ),
        timeout_seconds=timeout_seconds,
        origin=origin,
    )
    report = import_weights(path, out, kind=kind, options=options)
    answer(report, _import_lines(report), as_json=as_json)


@weights.command("export", epilog="Example: ca2st weights export runs/my_run --out model.safetensors --names published")
def export_checkpoint(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint folder, or a run folder (its newest checkpoint).")],
    out: Annotated[Path, typer.Option(help="Where to write: a name that ends in .safetensors.")],
    names: Annotated[Literal["ours", "published"], typer.Option(help="Whose tensor names.")] = "ours",
    as_json: Json = False,
) -> None:
    """Write a trained model, its experts included, as one safetensors file."""
    from ca2st.weights.model_file import export_model
    from ca2st.weights.tensor_files import check_writable_name
    from ray_jobs.runs.inference import load_trained
    from ray_jobs.runs.model import sound_metadata

    check_writable_name(out, source=checkpoint)
    trained = load_trained(checkpoint)
    report = export_model(trained.model, out, names=names, notes=sound_metadata(trained.audio))
    lines = [f"{report.num_tensors} tensors under {report.names} names in {report.out}", f"  sha256 {report.sha256}"]
    answer(report, lines, as_json=as_json)


@weights.command("check-golden", epilog="Example: ca2st weights check-golden tests/data/golden/*.safetensors")
def check_golden_files(
    files: Annotated[list[Path], typer.Argument(help="Golden files: weights, inputs and expected outputs.")],
    as_json: Json = False,
) -> None:
    """Compare our model with the outputs an independent implementation gave; ends with 3 on a difference."""
    from ca2st.weights.published import check_golden

    reports = check_golden(files)
    ok = all(report.ok for report in reports)
    lines = []
    for report in reports:
        worst = f"max abs diff {max(report.max_abs_diff.values()):.2e}" if report.max_abs_diff else "no expected output"
        lines.append(f"{'ok  ' if report.ok else 'FAIL'} {report.file}  {worst}")
    answer({"ok": ok, "files": reports}, lines, as_json=as_json)
    if not ok:
        raise typer.Exit(3)


def _import_lines(report: "ImportReport") -> list[str]:
    below = f", below {report.wrapper!r}" if report.wrapper else ""
    lines = [f"{report.layout} ({report.container}{below}): {len(report.loaded)} tensors loaded into {report.out}"]
    if report.origin.repository:
        lines.append(f"  {report.origin.file} of {report.origin.repository} at {report.origin.revision}")
    if report.kind == "clip" and not report.origin.activation and report.container != "TorchScript archive":
        lines.append(
            "  the file does not say which activation it was trained with: taken for QuickGELU, as OpenAI's CLIPs"
        )
    if report.model:
        lines.append("  " + ", ".join(f"{name} {size}" for name, size in report.model.items()))
    for what, names in (("missing, left as a new model starts", report.missing), ("left aside", report.unexpected)):
        if names:
            more = " (--json lists all)" if len(names) > 8 else ""
            lines.append(f"  {len(names)} {what}: {listed(names, most=8)}{more}")
    return [*lines, f"  sha256 {report.sha256}"]


if TYPE_CHECKING:
    from ca2st.weights.importer import ImportReport
