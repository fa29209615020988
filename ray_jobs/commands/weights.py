"""``ca2st weights import``, ``export`` and ``check-golden``."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ca2st.weights.importer import ImportReport


app = typer.Typer(no_args_is_help=True)


class Kind(StrEnum):
    """Checkpoints that can be read."""

    CLIP = "clip"
    VIDEOMAE = "videomae"
    AST = "ast"
    CAST = "cast"
    CAVA = "cava"
    CA2ST = "ca2st"
    RESNET50 = "resnet50"


class NameScheme(StrEnum):
    """Whose tensor names an export has."""

    OURS = "ours"
    PUBLISHED = "published"


_JSON = typer.Option("--json", help="Print the facts as one JSON object.")


@app.command("import", epilog="Example: ca2st weights import --kind clip ViT-B-16.pt --out experts/clip.safetensors")
def import_file(
    file: Annotated[
        str,
        typer.Argument(
            help="A checkpoint: .safetensors (one file, or a folder of parts with their index), .pt, .pth, .bin; its "
            "layout is detected. Or a public name: "
            "hf-hub:ORG/NAME, hf-hub:ORG/NAME@REVISION, open_clip:MODEL/TAG, timm:NAME."
        ),
    ],
    kind: Annotated[
        Kind,
        typer.Option(help="An expert (CLIP's visual half, VideoMAE, AST, ResNet-50) or a whole released model."),
    ],
    out: Annotated[Path, typer.Option(help="Where to write: a name that ends in .safetensors.")],
    allow_missing: Annotated[
        list[str] | None,
        typer.Option(help="Pattern of our tensor names that may be missing (norm.*); repeatable. Default: none may."),
    ] = None,
    heads: Annotated[int | None, typer.Option(min=1, help="Attention heads; default: 64 features a head.")] = None,
    mel_rows: Annotated[
        int | None,
        typer.Option(min=16, help="Spectrogram rows the audio positions are cut or stretched to; default 400."),
    ] = None,
    num_frames: Annotated[
        int | None, typer.Option(min=2, help="Frames of a clip, where no tensor tells (VideoMAE, CAVA); default 16.")
    ] = None,
    crop_size: Annotated[
        int | None,
        typer.Option(min=16, help="Pixels that VideoMAE was trained with, which no tensor tells; default 224."),
    ] = None,
    target: Annotated[str, typer.Option(help="Name of a whole model's single label space.")] = "label",
    timeout_seconds: Annotated[float, typer.Option(min=1, help="Longest time to read the file.")] = 600,
    as_json: Annotated[bool, _JSON] = False,
) -> None:
    """Turn a checkpoint that others wrote into a file of ours. Strict: every tensor is used, or nothing is written.

    Pickles are read in a limited child process that admits tensors and plain containers; no code in a file is run.
    A file that is fetched by its public name is read in the same way.
    """
    from ca2st.weights.hub import fetch, is_hub_name
    from ca2st.weights.importer import ImportOptions, import_weights
    from ca2st.weights.sizes import UnwrittenSizes
    from ca2st.weights.tensor_files import check_writable_name
    from ray_jobs.console import print_json
    from ray_jobs.environment import hub_access

    check_writable_name(out, source=Path(file))
    fetched = fetch(file, hub_access()) if is_hub_name(file) else None
    options = ImportOptions(
        allow_missing=tuple(allow_missing or ()),
        sizes=UnwrittenSizes(
            num_heads=heads, mel_rows=mel_rows, num_frames=num_frames, crop_size=crop_size, target=target
        ),
        timeout_seconds=timeout_seconds,
        origin=fetched.origin if fetched else None,
    )
    report = import_weights(fetched.path if fetched else Path(file), out, kind=kind.value, options=options)
    if as_json:
        print_json(report)
        return
    _print_report(report)


def _print_report(report: "ImportReport") -> None:
    from ray_jobs.console import result

    below = f", below {report.wrapper!r}" if report.wrapper else ""
    result(f"{report.layout} ({report.container}{below}): {len(report.loaded)} tensors loaded into {report.out}")
    if report.origin.repository:
        result(f"  {report.origin.file} of {report.origin.repository} at {report.origin.revision}")
    if report.kind == "clip" and not report.origin.activation and report.container != "TorchScript archive":
        result("  the file does not say which activation it was trained with: taken for QuickGELU, as OpenAI's CLIPs")
    if report.model:
        result("  " + ", ".join(f"{name} {size}" for name, size in report.model.items()))
    for what, names in (("missing, left as a new model starts", report.missing), ("left aside", report.unexpected)):
        if names:
            more = f" and {len(names) - 8} more (--json lists all)" if len(names) > 8 else ""
            result(f"  {len(names)} {what}: {', '.join(names[:8])}{more}")
    result(f"  sha256 {report.sha256}")


@app.command("export", epilog="Example: ca2st weights export runs/my_run --out model.safetensors --names published")
def export_checkpoint(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint folder, or a run folder (its newest checkpoint).")],
    out: Annotated[Path, typer.Option(help="Where to write: a name that ends in .safetensors.")],
    names: Annotated[NameScheme, typer.Option(help="Whose tensor names.")] = NameScheme.OURS,
    as_json: Annotated[bool, _JSON] = False,
) -> None:
    """Write a trained model, its experts included, as one safetensors file."""
    from ca2st.weights.model_file import export_model
    from ca2st.weights.tensor_files import check_writable_name
    from ray_jobs.console import print_json, result
    from ray_jobs.runs.inference import load_trained, sound_metadata

    check_writable_name(out, source=checkpoint)
    trained = load_trained(checkpoint)
    report = export_model(trained.model, out, names=names.value, notes=sound_metadata(trained.audio))
    if as_json:
        print_json(report)
        return
    result(f"{report.num_tensors} tensors under {report.names} names in {report.out}")
    result(f"  sha256 {report.sha256}")


@app.command("check-golden", epilog="Example: ca2st weights check-golden tests/data/golden/*.safetensors")
def check_golden_files(
    files: Annotated[list[Path], typer.Argument(help="Golden files: weights, inputs and expected outputs.")],
    as_json: Annotated[bool, _JSON] = False,
) -> None:
    """Compare our model with the outputs an independent implementation gave; ends with 3 on a difference."""
    from ca2st.weights.golden import check_golden
    from ray_jobs.console import print_json, result

    reports = check_golden(files)
    ok = all(report.ok for report in reports)
    if as_json:
        print_json({"ok": ok, "files": reports})
    else:
        for report in reports:
            worst = max(report.max_abs_diff.values())
            result(f"{'ok  ' if report.ok else 'FAIL'} {report.file}  max abs diff {worst:.2e}")
    if not ok:
        raise typer.Exit(3)
