"""``ca2st weights check-golden``."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Keeps the verbs even while there is only one."""


@app.command("check-golden", epilog="Example: ca2st weights check-golden tests/data/golden/*.safetensors")
def check_golden_files(
    files: Annotated[list[Path], typer.Argument(help="Golden files: weights, inputs and expected outputs.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the facts as one JSON object.")] = False,
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
