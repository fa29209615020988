"""``ca2st train``, ``ca2st recipes`` and ``ca2st submit``."""

import json
import math
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from urllib.parse import urlsplit

import typer

from ca2st.errors import UserInputError
from ray_jobs import environment
from ray_jobs.commands.options import Json, OpenRay, Overrides, RayAddress, refuse_without_ray, takes
from ray_jobs.console import answer, duration, parse_views, print_json, require_folder_place, result, say, table

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

    from ray_jobs.cluster.submission import PreparedJob
    from ray_jobs.config.recipe import Recipe
    from ray_jobs.runs.model import RunDocument

_ONE_OF_TWO = (
    "expected either a recipe (with --data where it names no shards) or --data-folder DIR, a folder of videos; "
    "for example: ca2st train smoke, or: ca2st train --data-folder videos"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainOptions:
    """The options of ``train``."""

    recipe: Annotated[
        str | None, typer.Argument(help="A recipe file, or the name of one that ships with ca2st (ca2st recipes).")
    ] = None
    data_folder: Annotated[
        Path | None, typer.Option(help="A folder of your own videos, one folder per class, instead of a recipe.")
    ] = None
    follow_links: Annotated[
        bool, typer.Option("--follow-links", help="--data-folder: links in it may lead outside.")
    ] = False
    overrides: Overrides = None
    data: Annotated[str | None, typer.Option(help="Training shards, a folder or a URL, instead of the recipe's.")] = (
        None
    )
    splits: Annotated[
        str | None, typer.Option(help="Train and test each of these splits (1,2,3), and print the mean of their top-1.")
    ] = None
    workers: Annotated[int | None, typer.Option(help="Training processes; one per GPU where there are GPUs.")] = None
    out: Annotated[Path | None, typer.Option(help="Run folder; default: launch.runs_folder/<recipe's name>.")] = None
    overfit: Annotated[
        int | None, typer.Option(help="Sanity run: learn so many clips of the recipe by heart; fails below 95 %.")
    ] = None
    max_hours: Annotated[
        float | None, typer.Option(help="Save and end after so many hours (exit code 143); rerun to go on.")
    ] = None
    profile: Annotated[
        int | None, typer.Option(help="Record so many steps with torch's profiler, into profile/ of the run folder.")
    ] = None
    ray: Annotated[bool, typer.Option("--ray", help="Train under Ray Train, which restarts failed workers.")] = False
    ray_address: RayAddress = "local"
    open_ray: OpenRay = False
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the whole plan; train and make nothing.")] = False
    measure: Annotated[
        bool, typer.Option("--measure", help="--dry-run: the hours from a few steps on random clips on this machine.")
    ] = False
    device: Annotated[str | None, typer.Option(help="--dry-run: the hours on another device, such as H200.")] = None
    assume_counts: Annotated[
        bool,
        typer.Option("--assume-published-counts", help="--dry-run: without shards, by the dataset's published counts."),
    ] = False
    as_json: Json = False

    def check(self) -> None:
        """Refuse options that need another one.

        Raises:
            UserInputError: as said.
        """
        refuse_without_ray(ray=self.ray, ray_address=self.ray_address, accept_open_ray=self.open_ray)
        if self.out is not None:
            require_folder_place(self.out, "--out")
        plans = {
            "--measure": self.measure,
            "--device": self.device is not None,
            "--assume-published-counts": self.assume_counts,
        }
        for name, given in plans.items():
            if given and (not self.dry_run or self.data_folder is not None):
                raise UserInputError(f"{name}: expected a recipe and --dry-run beside it, which it is about")
        if self.measure and self.device is not None:
            raise UserInputError(f"--measure: expected no --device {self.device}; only this machine can be measured")
        if environment.launched_ranks() is not None and (self.ray or self.data_folder is not None or self.splits):
            raise UserInputError(
                "torchrun: expected a recipe without --ray, --splits and --data-folder, found one of them; start it "
                "without torchrun (--workers N starts processes too), or unset RANK and WORLD_SIZE"
            )
        if self.overfit is not None and (self.recipe is None or self.splits is not None):
            raise UserInputError("--overfit: expected a recipe beside it; for example: ca2st train smoke --overfit 8")
        if self.splits is not None and (self.dry_run or self.data_folder is not None):
            raise UserInputError("--splits: expected a recipe and no --dry-run; plan one split by --set data.split=1")


@takes(TrainOptions)
def train(options: TrainOptions) -> None:
    """Train by a recipe, or on a folder of videos. Rerun the same command to resume where it stopped.

    Example: ca2st train smoke, or: ca2st train --data-folder videos
    """
    options.check()
    settings = with_options(options.overrides, data=options.data, workers=options.workers)
    settings += [] if options.max_hours is None else [f"training.max_hours={float(options.max_hours)}"]
    settings += [] if options.profile is None else [f"training.profile_steps={options.profile}"]
    ray_address = options.ray_address if options.ray else None
    if options.data_folder is not None and options.recipe is None and options.data is None:
        from ray_jobs.own_data.training import train_own_videos

        train_own_videos(
            options.data_folder,
            settings,
            out=options.out,
            follow_links=options.follow_links,
            ray_address=ray_address,
            accept_open_ray=options.open_ray,
            dry_run=options.dry_run,
            as_json=options.as_json,
        )
        return
    if options.recipe is None or options.data_folder is not None:
        raise UserInputError(_ONE_OF_TWO)
    if options.follow_links:
        raise UserInputError("--follow-links: expected --data-folder beside it, found a recipe; leave it out")
    if options.splits is not None:
        _train_splits(options, options.recipe, settings)
        return
    from ray_jobs.config.recipe_file import load_recipe

    loaded = load_recipe(options.recipe, settings)
    if options.overfit is not None:
        from ray_jobs.launch import overfitting

        loaded = overfitting(loaded, options.overfit)
    run_dir = options.out or loaded.folder
    if options.dry_run:
        _print_plan(loaded, run_dir, options)
    else:
        _train(loaded, run_dir, ray_address, accept_open_ray=options.open_ray, as_json=options.as_json)
        if options.overfit is not None:
            from ray_jobs.launch import check_overfit

            say(f"sanity run passed: {check_overfit(run_dir):.0%} of {options.overfit} clips learned by heart")


def _train_splits(options: TrainOptions, recipe: str, settings: list[str]) -> None:
    """Train each split in a run of its own, test it in its published views, and print the mean."""
    from pipelines.views import EvaluationViews
    from ray_jobs.config.recipe_file import load_recipe
    from ray_jobs.evaluation.workers import Workers, evaluate_checkpoint, log_to_run, means_of
    from ray_jobs.launch import launch

    splits = [split.strip() for split in (options.splits or "").split(",")]
    if not all(split.isdecimal() for split in splits) or len(set(splits)) < len(splits):
        raise UserInputError(f"--splits: expected different numbers with commas between them (1,2,3), found {splits}")
    recipes = [load_recipe(recipe, [*settings, f"data.split={split}"]) for split in splits]
    shards = [loaded.data.validation for loaded in recipes if loaded.data.validation is not None]
    if len(shards) < len(splits):
        raise UserInputError(
            "data.validation: expected the shards that each split is tested on, found none; name them, with {split} "
            "for its number"
        )
    address = options.ray_address if options.ray else None
    facts: list[dict[str, object]] = []
    reports = []
    for split, loaded, tested in zip(splits, recipes, shards, strict=True):
        run_dir = loaded.folder if options.out is None else options.out / f"split{split}"
        launch(
            loaded, run_dir, faults=environment.fault_points(), ray_address=address, accept_open_ray=options.open_ray
        )
        views = loaded.published.views if loaded.published is not None else "2x3"
        clips, crops = parse_views(views)
        test = EvaluationViews(protocol="test", clips=clips, crops=crops)
        who = Workers(number=loaded.launch.workers, ray_address=address, accept_open_ray=options.open_ray)
        reports.append(evaluate_checkpoint(run_dir, tested, test, workers=who))
        if loaded.tracking.enabled:
            log_to_run(reports[-1])
        facts.append({"split": int(split), "run_dir": str(run_dir), "top1": reports[-1].top1, "views": views})
    mean = means_of(reports)["mean"]
    lines = []
    for one, report in zip(facts, reports, strict=True):
        top1 = "-" if report.top1 is None else f"{report.top1:.4f}"
        lines.append(f"  split {one['split']}  top1 {top1}  ({one['views']} views)  {one['run_dir']}")
    lines.append(f"  mean     top1 {'-' if mean is None else f'{mean:.4f}'}")
    answer({"splits": facts, "top1": mean}, lines, as_json=options.as_json)


def recipes(
    plan: Annotated[bool, typer.Option("--plan", help="Hours of each training on this machine.")] = False,
    device: Annotated[str | None, typer.Option(help="--plan: on another device, such as H200.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="--plan: on so many GPUs.")] = 1,
    as_json: Json = False,
) -> None:
    """The published trainings: what each reached in the paper, and whether its shards are here.

    Example: ca2st recipes --plan --device H200 --workers 8
    """
    from ray_jobs.runs.published import published_recipes, published_rows, rows_lines

    if not plan and (device is not None or workers > 1):
        raise UserInputError("--device, --workers: expected --plan beside them, which they are about")
    rows = published_rows(published_recipes(), with_hours=plan, device=device, workers=workers)
    answer({"recipes": rows}, [rows_lines(rows)], as_json=as_json)


def with_options(overrides: list[str] | None, *, data: str | None, workers: int | None) -> list[str]:
    """Return all overrides, those that have an option of their own last."""
    settings = list(overrides or [])
    if data is not None:
        settings += [f"data.train={json.dumps(data, ensure_ascii=False)}", "data.mixture=[]"]
    if workers is not None:
        settings.append(f"launch.workers={workers}")
    return settings


def _train(recipe: "Recipe", run_dir: Path, ray_address: str | None, *, accept_open_ray: bool, as_json: bool) -> None:
    from ray_jobs.launch import launch
    from ray_jobs.runs.model import run_document_of
    from ray_jobs.tracking.following import how_to_serve
    from ray_jobs.tracking.state import link_of, read_state

    outcome = launch(
        recipe, run_dir, faults=environment.fault_points(), ray_address=ray_address, accept_open_ray=accept_open_ray
    )
    if (environment.launched_ranks() or (0,))[0] > 0:
        return  # the first rank reports
    state = read_state(run_dir) if recipe.tracking.enabled else None
    facts: dict[str, object] = {
        "run_id": state.run_id if state else None,
        "checkpoint": outcome.checkpoint,
        "steps": outcome.steps,
        "top1": outcome.metrics.get("top1", outcome.metrics.get(outcome.main_metric)),
        "metrics": outcome.metrics,
        "best": outcome.best,
        "ended_early": outcome.ended_early,
        "run_dir": str(run_dir),
        "mlflow": link_of(state) if state else None,
    }
    if as_json:
        print_json(facts)
        return
    document = run_document_of(Path(outcome.checkpoint))
    for name in ("metrics", "best"):
        del facts[name]
    facts |= _how_it_went(document, run_dir)
    if state is not None:
        facts["mlflow"] = f"{facts['mlflow'] or state.uri}{how_to_serve(state.uri)}"
    result(table({name: value for name, value in facts.items() if value is not None}))
    run = shlex.quote(str(run_dir))
    result(f"\nnext: ca2st predict {run} VIDEO")
    if (validation := recipe.data.validation or document.recipe.data.validation) is not None:
        result(f"next: ca2st evaluate {run} --checkpoint best --data {shlex.quote(validation)} --views 2x3")


def _how_it_went(document: "RunDocument", run_dir: Path) -> dict[str, object]:
    """Return best and last validation beside chance, and how long it took in all attempts."""
    from ca2st.training.best import best_and_last
    from ca2st.training.journal import JOURNAL_NAME, run_sequence
    from ray_jobs.runs.model import ranking_metric

    facts: dict[str, object] = {}
    metric = ranking_metric(document)
    best, last = best_and_last(run_dir, metric)
    if best is not None and last is not None:
        where = "its checkpoint is not kept" if best.checkpoint is None else best.checkpoint.name
        facts["top1" if metric == "top1" else metric] = f"{last.value:.4f} at the last step ({last.step})"
        facts["best"] = f"{best.value:.4f} at step {best.step} ({where})"
        if metric.endswith("top1"):
            facts["chance"] = f"{1 / math.prod(len(names) for names in document.classes.values()):.4f}"
    seconds = sum(line.get("step_seconds", 0.0) for line in run_sequence(run_dir / JOURNAL_NAME))
    facts["training_time"] = duration(seconds)
    return facts


def _print_plan(recipe: "Recipe", run_dir: Path, options: TrainOptions) -> None:
    import torch

    from ray_jobs.runs.plan import make_plan, plan_lines

    try:
        plan = make_plan(
            recipe,
            run_dir,
            device="cuda" if options.device is not None or torch.cuda.is_available() else "cpu",
            other_device=options.device,
            measure=options.measure,
            assume_counts=options.assume_counts,
        )
    except UserInputError as error:
        if recipe.published is not None and not options.assume_counts:
            error.add_note("--assume-published-counts plans it without shards and weights")
        raise
    answer(plan, [plan_lines(plan)], as_json=options.as_json)


_INTERRUPTED = 130


@dataclass(frozen=True, kw_only=True, slots=True)
class SubmitOptions:
    """The options of ``submit``."""

    recipe: Annotated[str, typer.Argument(help="A recipe file, or the name of one that ships with ca2st.")]
    address: Annotated[str, typer.Option(help="The cluster's dashboard: http://HEAD:8265.")]
    overrides: Overrides = None
    data: Annotated[
        str | None, typer.Option(help="Training shards as the nodes see them, instead of the recipe's.")
    ] = None
    workers: Annotated[int | None, typer.Option(help="Training processes; one per GPU where there are GPUs.")] = None
    out: Annotated[
        Path | None,
        typer.Option(help="Run folder on storage all nodes share; default: launch.runs_folder/<recipe's name>."),
    ] = None
    env: Annotated[
        list[str] | None,
        typer.Option(help="Pass this variable on, by name. Its value is kept with the job, for holders of the token."),
    ] = None
    wheel: Annotated[Path | None, typer.Option(help="Send this wheel of ca2st instead of the one that runs here.")] = (
        None
    )
    package: Annotated[
        bool, typer.Option("--package/--no-package", help="Send ca2st along, or use the one of the cluster's image.")
    ] = True
    python: Annotated[str, typer.Option(help="The head node's interpreter: that of its Ray.")] = "python"
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Follow the job's log to its end, or leave it.")] = True
    resubmit: Annotated[
        int, typer.Option(min=0, help="Send the job again up to so often when its driver is killed; it resumes.")
    ] = 0
    ca_file: Annotated[Path | None, typer.Option(help="Certificate authority of an https address.")] = None
    accept_open_ray: Annotated[
        bool, typer.Option("--i-accept-open-ray", help="Use a cluster that takes jobs from anybody.")
    ] = False
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be sent; ask the cluster nothing and send nothing.")
    ] = False
    as_json: Json = False

    def check(self) -> None:
        """Refuse options that do not go together.

        Raises:
            UserInputError: as said.
        """
        if self.ca_file is not None and urlsplit(self.address).scheme != "https":
            raise UserInputError(
                f"--ca-file {self.ca_file}: expected an https address beside it, found {self.address}; without TLS "
                "nothing is verified: leave it out, or give the https address"
            )
        if self.wheel is not None and not self.package:
            raise UserInputError("--wheel and --no-package: expected one of the two, found both")
        if self.resubmit and not self.wait:
            raise UserInputError(
                "--resubmit and --no-wait: expected one of the two; nobody would be there to send again"
            )


@takes(SubmitOptions)
def submit(options: SubmitOptions) -> None:
    """Train on a Ray cluster: send ca2st and a recipe as a job, follow its log, end with its exit code.

    Ctrl-C stops following, not the job. The same command again resumes the run.

    Example: ca2st submit recipe.toml --address http://head:8265 --out /shared/runs/first
    """
    from ray_jobs.cluster.job_server import check_address, connect
    from ray_jobs.cluster.ray_access import found_access
    from ray_jobs.cluster.submission import Choices, prepared, send

    options.check()
    job = prepared(
        Choices(
            recipe=options.recipe,
            overrides=tuple(with_options(options.overrides, data=options.data, workers=options.workers)),
            out=options.out,
            variables=environment.passed_variables(options.env or []),
            wheel=options.wheel,
            package=options.package,
            python=options.python,
            accept_open=options.accept_open_ray,
        )
    )
    if options.dry_run:
        check_address(options.address)
        plan: dict[str, object] = {
            "address": options.address,
            "run_dir": job.run_dir,
            "entrypoint": job.entrypoint,
            "variables": sorted(job.env_vars),  # the names alone
            "metadata": dict(job.metadata),
            "archive_bytes": job.num_bytes,
        }
        answer(plan, [table(plan)], as_json=options.as_json)
        return
    client = connect(options.address, access=found_access(accept_open=options.accept_open_ray), ca_file=options.ca_file)
    if options.wait:
        _follow(client, job, options)
        return
    try:
        send(client, job)
    except KeyboardInterrupt:  # it was taken
        _say_how_to_go_on(job, options.address)
        raise typer.Exit(_INTERRUPTED) from None
    facts = _facts(job, options.address)
    answer(facts, [table(facts)], as_json=options.as_json)
    _say_how_to_go_on(job, options.address)


def _follow(client: "JobSubmissionClient", job: "PreparedJob", options: SubmitOptions) -> None:
    """Show the log until the job ends; a job that fails ends this command with its driver's exit code."""
    from ray_jobs.cluster.job_server import JobFailedError, JobUnreachableError, exit_code
    from ray_jobs.cluster.submission import send_and_follow

    sent = [job]

    def again() -> "PreparedJob":
        sent.append(job.again())
        return sent[-1]

    def show(text: str) -> None:  # on stderr: stdout is for results
        sys.stderr.write(text)
        sys.stderr.flush()

    say(f"job {job.submission_id} at {options.address}")
    try:
        ended = send_and_follow(client, job, show=show, again=again, num_resubmits=options.resubmit)
    except JobFailedError as error:
        if options.as_json:
            print_json(_facts(sent[-1], options.address) | {"exit_code": error.exit_code})
        raise
    except JobUnreachableError:
        _say_how_to_go_on(sent[-1], options.address)
        raise
    except KeyboardInterrupt:
        _say_how_to_go_on(sent[-1], options.address)
        raise typer.Exit(_INTERRUPTED) from None
    facts = _facts(sent[-1], options.address) | {"exit_code": exit_code(ended)}
    answer(facts, [table(facts)], as_json=options.as_json)


def _facts(job: "PreparedJob", address: str) -> dict[str, object]:
    return {"job_id": job.submission_id, "address": address, "run_dir": job.run_dir}


def _say_how_to_go_on(job: "PreparedJob", address: str) -> None:
    say(
        f"\nthe job goes on without this command\n"
        f"  to follow it:  ray job logs --follow --address {address} {job.submission_id}\n"
        f"  how it stands: ray job status --address {address} {job.submission_id}\n"
        f"  to stop it:    ray job stop --address {address} {job.submission_id}"
    )
