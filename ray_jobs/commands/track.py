"""``ca2st track sync``."""

from pathlib import Path
from typing import Annotated

import typer

from ca2st.errors import EnvironmentFault

app = typer.Typer(no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Keeps the verbs even while there is only one."""


@app.command(epilog="Example: ca2st track sync runs/smoke")
def sync(
    run_dir: Annotated[Path, typer.Argument(help="Folder of a training run.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the facts as one JSON object.")] = False,
) -> None:
    """Send what MLflow does not have yet of a run: its journal, system metrics, inputs, artefacts and model.

    Ends with 4 while something is lacking: the store cannot be reached, or did not take all.
    """
    from ray_jobs.console import print_json, result
    from ray_jobs.tracking.events import read_state
    from ray_jobs.tracking.following import sync as send

    sent = send(run_dir)
    state = read_state(run_dir)
    lacking = list(state.progress.pending)
    if as_json:
        print_json({"sent": sent, "run_id": state.run_id, "lacking": lacking})
    elif state.run_id is None:
        result(f"{run_dir}: nothing to send yet, the journal has no line")
    else:
        still = f"; it still lacks {', '.join(lacking)}, for the reasons above" if lacking else ""
        result(f"{sent} values sent to MLflow run {state.run_id}{still}")
    if lacking:
        raise typer.Exit(EnvironmentFault.exit_code)
