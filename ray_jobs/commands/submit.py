"""``ca2st submit``."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ca2st.errors import UserInputError
from ray_jobs.commands.options import refuse_unused_ca_file
from ray_jobs.commands.train import with_options

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

    from ray_jobs.cluster.submission import PreparedJob

_INTERRUPTED = 130

_Recipe = Annotated[str, typer.Argument(help="A recipe file, or the name of one that ships with ca2st.")]
_Address = Annotated[str, typer.Option(help="The cluster's dashboard: http://HEAD:8265.")]
_Overrides = Annotated[list[str] | None, typer.Option("--set", help="Override a setting: section.key=value.")]
_Data = Annotated[str | None, typer.Option(help="Training shards as the nodes see them, instead of the recipe's.")]
_Workers = Annotated[int | None, typer.Option(help="Training processes; one per GPU where there are GPUs.")]
_Out = Annotated[
    Path | None,
    typer.Option(help="Run folder on storage all nodes share; default: launch.runs_folder/<recipe's name>."),
]
_Env = Annotated[
    list[str] | None,
    typer.Option(help="Pass this variable on, by name. Its value is kept with the job, for holders of the token."),
]
_Wheel = Annotated[Path | None, typer.Option(help="Send this wheel of ca2st instead of the one that runs here.")]
_Package = Annotated[
    bool, typer.Option("--package/--no-package", help="Send ca2st along, or use the one of the cluster's image.")
]
_Python = Annotated[str, typer.Option(help="The head node's interpreter: that of its Ray.")]
_Wait = Annotated[bool, typer.Option("--wait/--no-wait", help="Follow the job's log to its end, or leave it.")]
_Resubmit = Annotated[
    int, typer.Option(min=0, help="Send the job again up to so often when its driver is killed; it resumes.")
]
_CaFile = Annotated[Path | None, typer.Option(help="Certificate authority of an https address.")]
_AcceptOpen = Annotated[bool, typer.Option("--i-accept-open-ray", help="Use a cluster that takes jobs from anybody.")]
_DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print what would be sent; ask the cluster nothing and send nothing.")
]
_AsJson = Annotated[bool, typer.Option("--json", help="Print the facts as one JSON object.")]


def submit(
    recipe: _Recipe,
    address: _Address,
    overrides: _Overrides = None,
    data: _Data = None,
    workers: _Workers = None,
    out: _Out = None,
    env: _Env = None,
    wheel: _Wheel = None,
    package: _Package = True,
    python: _Python = "python",
    wait: _Wait = True,
    resubmit: _Resubmit = 0,
    ca_file: _CaFile = None,
    accept_open_ray: _AcceptOpen = False,
    dry_run: _DryRun = False,
    as_json: _AsJson = False,
) -> None:
    """Train on a Ray cluster: send ca2st and a recipe as a job, follow its log, end with its exit code.

    Ctrl-C stops following, not the job. The same command again resumes the run.

    Example: ca2st submit recipe.toml --address http://head:8265 --out /shared/runs/first
    """
    from ray_jobs import environment
    from ray_jobs.cluster.job_server import check_address, connect
    from ray_jobs.cluster.ray_access import found_access
    from ray_jobs.cluster.submission import Choices, prepared

    refuse_unused_ca_file(ca_file, address)
    if wheel is not None and not package:
        raise UserInputError("--wheel and --no-package: expected one of the two, found both")
    if resubmit and not wait:
        raise UserInputError("--resubmit and --no-wait: expected one of the two; nobody would be there to send again")
    job = prepared(
        Choices(
            recipe=recipe,
            overrides=tuple(with_options(overrides, data=data, workers=workers)),
            out=out,
            variables=environment.passed_variables(env or []),
            wheel=wheel,
            package=package,
            python=python,
            accept_open=accept_open_ray,
        )
    )
    if dry_run:
        check_address(address)
        _print(_plan(job, address), as_json=as_json)
        return
    client = connect(address, access=found_access(accept_open=accept_open_ray), ca_file=ca_file)
    if wait:
        _follow(client, job, address, num_resubmits=resubmit, as_json=as_json)
    else:
        _leave(client, job, address, as_json=as_json)


def _leave(client: "JobSubmissionClient", job: "PreparedJob", address: str, *, as_json: bool) -> None:
    """Send the job and say how to follow it."""
    from ray_jobs.cluster.submission import send

    try:
        send(client, job)
    except KeyboardInterrupt:  # it was taken
        _say_how_to_go_on(job.submission_id, address)
        raise typer.Exit(_INTERRUPTED) from None
    _print(_facts(job, address), as_json=as_json)
    _say_how_to_go_on(job.submission_id, address)


def _follow(
    client: "JobSubmissionClient", job: "PreparedJob", address: str, *, num_resubmits: int, as_json: bool
) -> None:
    """Show the log until the job ends; a job that fails ends this command with its driver's exit code."""
    from ray_jobs.cluster.job_server import JobFailedError, JobUnreachableError, exit_code
    from ray_jobs.cluster.submission import send_and_follow
    from ray_jobs.console import say

    sent = [job]

    def again() -> "PreparedJob":
        sent.append(job.again())
        return sent[-1]

    say(f"job {job.submission_id} at {address}")
    try:
        ended = send_and_follow(client, job, show=_show, again=again, num_resubmits=num_resubmits)
    except JobFailedError as error:
        if as_json:
            _print(_facts(sent[-1], address) | {"exit_code": error.exit_code}, as_json=True)
        raise
    except JobUnreachableError:
        _say_how_to_go_on(sent[-1].submission_id, address)
        raise
    except KeyboardInterrupt:
        _say_how_to_go_on(sent[-1].submission_id, address)
        raise typer.Exit(_INTERRUPTED) from None
    _print(_facts(sent[-1], address) | {"exit_code": exit_code(ended)}, as_json=as_json)


def _facts(job: "PreparedJob", address: str) -> dict[str, object]:
    return {"job_id": job.submission_id, "address": address, "run_dir": job.run_dir}


def _plan(job: "PreparedJob", address: str) -> dict[str, object]:
    """Return what would be sent; of the variables the names alone."""
    return {
        "address": address,
        "run_dir": job.run_dir,
        "entrypoint": job.entrypoint,
        "variables": sorted(job.env_vars),
        "metadata": dict(job.metadata),
        "archive_bytes": job.num_bytes,
    }


def _show(text: str) -> None:
    """Show a piece of the job's log, on stderr: stdout is for results."""
    sys.stderr.write(text)
    sys.stderr.flush()


def _print(facts: dict[str, object], *, as_json: bool) -> None:
    from ray_jobs.console import print_json, result, table

    if as_json:
        print_json(facts)
    else:
        result(table(facts))


def _say_how_to_go_on(job_id: str, address: str) -> None:
    from ray_jobs.console import say

    say(
        f"\nthe job goes on without this command\n"
        f"  to follow it:  ray job logs --follow --address {address} {job_id}\n"
        f"  how it stands: ray job status --address {address} {job_id}\n"
        f"  to stop it:    ray job stop --address {address} {job_id}"
    )
