"""``ca2st submit``."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ca2st.errors import UserInputError
from ray_jobs.commands.options import refuse_unused_ca_file
from ray_jobs.commands.train import with_options

if TYPE_CHECKING:
    from ray_jobs.cluster.job_server import JobClient
    from ray_jobs.cluster.submission import PreparedJob


_INTERRUPTED = 130


def submit(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or the name of one that ships with ca2st.")],
    address: Annotated[str, typer.Option(help="The cluster's dashboard: http://HEAD:8265.")],
    overrides: Annotated[list[str] | None, typer.Option("--set", help="Override a setting: section.key=value.")] = None,
    data: Annotated[
        str | None, typer.Option(help="Training shards as the nodes see them, instead of the recipe's.")
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Training processes; one a GPU where there are GPUs.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Run folder on storage all nodes share; default: launch.runs_folder/<recipe's name>."),
    ] = None,
    env: Annotated[
        list[str] | None,
        typer.Option(help="Pass this variable on, by name. Its value is kept with the job, for holders of the token."),
    ] = None,
    wheel: Annotated[
        Path | None, typer.Option(help="Send this wheel of ca2st instead of the one that runs here.")
    ] = None,
    package: Annotated[
        bool, typer.Option("--package/--no-package", help="Send ca2st along, or use the one of the cluster's image.")
    ] = True,
    python: Annotated[str, typer.Option(help="The head node's interpreter: that of its Ray.")] = "python",
    wait: Annotated[
        bool, typer.Option("--wait/--no-wait", help="Follow the job's log to its end, or leave it.")
    ] = True,
    resubmit: Annotated[
        int, typer.Option(min=0, help="Send the job again up to so often when its driver is killed; it resumes.")
    ] = 0,
    ca_file: Annotated[Path | None, typer.Option(help="Certificate authority of an https address.")] = None,
    accept_open_ray: Annotated[
        bool, typer.Option("--i-accept-open-ray", help="Use a cluster that takes jobs from anybody.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be sent; ask the cluster nothing and send nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the facts as one JSON object.")] = False,
) -> None:
    """Train on a Ray cluster: send ca2st and a recipe as a job, follow its log, end with its exit code.

    Ctrl-C stops following, not the job. The same command again resumes the run.

    Example: ca2st submit recipe.toml --address http://head:8265 --out /shared/runs/first
    """
    from ray_jobs import environment
    from ray_jobs.cluster.job_server import check_address, connect
    from ray_jobs.cluster.submission import Choices, prepared, send

    refuse_unused_ca_file(ca_file, address)
    if wheel is not None and not package:
        raise UserInputError("--wheel and --no-package: expected one of the two, found both")
    if resubmit and not wait:
        raise UserInputError(
            "--resubmit and --no-wait: expected one of the two; nobody would be there to send it again"
        )
    choices = Choices(
        recipe=recipe,
        overrides=tuple(with_options(overrides, data=data, workers=workers)),
        out=out,
        variables=environment.passed_variables(env or []),
        wheel=wheel,
        package=package,
        python=python,
        accept_open=accept_open_ray,
    )
    job = prepared(choices)
    if dry_run:
        check_address(address)
        _tell(_plan(job, address), as_json=as_json)
        return
    from ray_jobs.cluster.ray_access import found_access

    client = connect(address, access=found_access(accept_open=accept_open_ray), ca_file=ca_file)
    if wait:
        _follow(client, job, address, num_resubmits=resubmit, as_json=as_json)
        return
    try:
        send(client, job.request, job.archive)
    except KeyboardInterrupt:  # it was taken
        _tell_how_to_go_on(job.request.submission_id, address)
        raise typer.Exit(_INTERRUPTED) from None
    _tell(_facts(job.request.submission_id, job, address), as_json=as_json)
    _tell_how_to_go_on(job.request.submission_id, address)


def _follow(client: "JobClient", job: "PreparedJob", address: str, *, num_resubmits: int, as_json: bool) -> None:
    """Show the log until the job ends; a job that fails ends this command with its driver's exit code."""
    from ray_jobs.cluster.job_server import JobFailedError, JobUnreachableError
    from ray_jobs.cluster.submission import send_and_follow
    from ray_jobs.console import say

    sent = [job.request.submission_id]

    def new_id() -> str:
        sent.append(job.new_id())
        return sent[-1]

    say(f"job {sent[0]} at {address}")
    try:
        ended = send_and_follow(
            client, job.request, job.archive, show=_show, new_id=new_id, num_resubmits=num_resubmits
        )
    except JobFailedError as error:
        if as_json:
            _tell(_facts(sent[-1], job, address) | {"exit_code": error.exit_code}, as_json=True)
        raise
    except JobUnreachableError:
        _tell_how_to_go_on(sent[-1], address)
        raise
    except KeyboardInterrupt:
        _tell_how_to_go_on(sent[-1], address)
        raise typer.Exit(_INTERRUPTED) from None
    _tell(_facts(ended.submission_id, job, address) | {"exit_code": ended.exit_code}, as_json=as_json)


def _facts(job_id: str, job: "PreparedJob", address: str) -> dict[str, object]:
    return {"job_id": job_id, "address": address, "run_dir": job.request.run_dir}


def _plan(job: "PreparedJob", address: str) -> dict[str, object]:
    """What would be sent; of the variables the names alone."""
    return {
        "address": address,
        "run_dir": job.request.run_dir,
        "entrypoint": job.request.entrypoint,
        "variables": sorted(job.request.env_vars),
        "metadata": dict(job.request.metadata),
        "archive_bytes": len(job.archive),
    }


def _show(text: str) -> None:
    """A piece of the job's log, on stderr: stdout is for results."""
    sys.stderr.write(text)
    sys.stderr.flush()


def _tell(facts: dict[str, object], *, as_json: bool) -> None:
    from ray_jobs.console import print_json, result, table

    if as_json:
        print_json(facts)
    else:
        result(table(facts))


def _tell_how_to_go_on(job_id: str, address: str) -> None:
    from ray_jobs.console import say

    say(
        f"\nthe job goes on without this command\n"
        f"  to follow it:  ray job logs --follow --address {address} {job_id}\n"
        f"  how it stands: ray job status --address {address} {job_id}\n"
        f"  to stop it:    ray job stop --address {address} {job_id}"
    )
