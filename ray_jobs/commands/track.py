"""``ca2st track sync``."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Keeps the verbs even while there is only one."""


@app.command(epilog="Example: ca2st track sync runs/smoke")
def sync(
    run_dir: Annotated[Path, typer.Argument(help="Folder of a training run.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the facts as one JSON object.")] = False,
) -> None:
    """Send what MLflow does not have yet of a run's journal."""
    from ray_jobs.console import print_json, result
    from ray_jobs.tracking.tracker import read_state
    from ray_jobs.tracking.tracker import sync as send

    sent = send(run_dir)
    run_id = read_state(run_dir).run_id
    if as_json:
        print_json({"sent": sent, "run_id": run_id})
    else:
        result(f"{sent} values sent to MLflow run {run_id}")
