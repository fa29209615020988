"""A training as a Ray job: what it is asked to run is decided and checked, then sent, followed, and sent again.

With the job travel the recipe, as its working directory, and the packages of ca2st, as Ray's ``py_modules``: Ray
unpacks them on every node, before a ca2st of the cluster's image, and does not send what the cluster has already.
"""

import re
import secrets
import shlex
import signal
import tempfile
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from ca2st import __version__
from ca2st.errors import CA2STError, UserInputError
from ca2st.weights.hub import is_hub_name
from ray_jobs import environment
from ray_jobs.cluster import job_server
from ray_jobs.cluster.ray_access import ACCEPT_OPEN, first_line
from ray_jobs.config.recipe import Recipe, with_places
from ray_jobs.config.recipe_file import load_recipe, read_recipe
from ray_jobs.console import say
from ray_jobs.redaction import holds_credentials, without_credentials
from ray_jobs.runs.worker import check_settings

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

PACKAGES = ("ca2st", "sharding", "pipelines", "ray_jobs")
_RECIPE_FOLDER = "submitted_recipe"
_SECONDS_BEYOND_GRACE = 30
_ASK_AFTER_SECONDS = (0.0, 1.0)
_NOT_FOUND = "status code 404"


@dataclass(frozen=True, kw_only=True, slots=True)
class Choices:
    """What the user asks for."""

    recipe: str
    """A recipe file, or a name of the package's recipes."""
    overrides: tuple[str, ...] = ()
    """``section.key=value``, as on the command line."""
    out: Path | None = None
    """The run folder; None: the recipe's."""
    variables: Mapping[str, str]
    """Variables to pass on."""
    wheel: Path | None = None
    """A wheel to send; None: the ca2st that runs here."""
    package: bool = True
    """False: use the cluster's own ca2st."""
    python: str = "python"
    """The head node's interpreter."""
    accept_open: bool = False
    """The cluster may be open."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedJob:
    """One job, as Ray's job server takes it."""

    submission_id: str
    """Readable, and never used before: Ray refuses an id twice."""
    entrypoint: str
    """A shell command, run on the head node in the working directory. Shown in the job's log: no secrets."""
    env_vars: Mapping[str, str]
    """Variables of the driver and all workers. Kept with the job: whoever holds the cluster's token can read them."""
    metadata: Mapping[str, str]
    """Shown beside the job in Ray's dashboard."""
    run_dir: str
    """The run's folder, on storage that all nodes share."""
    recipe_name: str
    recipe_place: str
    """Where the recipe lies in the working directory."""
    recipe_text: str
    modules: tuple[Path, ...]
    """What is sent beside the recipe: folders of packages, or one wheel."""

    def again(self) -> "PreparedJob":
        """Return the same job under an id that no job has had."""
        return replace(self, submission_id=new_id(self.recipe_name))

    @property
    def num_bytes(self) -> int:
        """Of all that is sent, before Ray packs it."""
        return len(self.recipe_text.encode()) + sum(
            path.stat().st_size
            for module in self.modules
            for path in ([module] if module.is_file() else module.rglob("*"))
            if path.is_file() and "__pycache__" not in path.parts
        )


def prepared(choices: Choices) -> PreparedJob:
    """Read the recipe as the job will; whatever can be wrong is refused here.

    Raises:
        UserInputError: a recipe or a setting that the job would refuse too, places that the cluster cannot see, a
            password where everybody would see it, or a wheel that is none of ca2st.
    """
    check_overrides(choices.overrides)
    recipe = load_recipe(choices.recipe, choices.overrides)
    check_places(recipe)
    run_dir = run_folder(recipe, choices.out)
    # Files that only the cluster sees are checked there.
    there = {name: None for name, source in recipe.experts.sources().items() if not is_hub_name(source)}
    check_settings(replace(recipe, experts=replace(recipe.experts, **there)))  # type: ignore[arg-type]  # expert names
    text, _ = read_recipe(choices.recipe)
    git = environment.git_state(Path.cwd())
    # Messages of the job name the recipe as the user does.
    place = f"{_RECIPE_FOLDER}/{Path(choices.recipe).name.removesuffix('.toml')}.toml"
    modules: tuple[Path, ...] = ()
    if choices.wheel is not None:
        modules = (checked_wheel(choices.wheel),)
    elif choices.package:  # those that run here, of a checkout or installed
        origins = [getattr(find_spec(name), "origin", None) for name in PACKAGES]
        modules = tuple(Path(origin).parent for origin in origins if origin is not None)
    words = ["train", place, *(part for override in choices.overrides for part in ("--set", override))]
    words += ["--ray", "--ray-address", "auto", "--out", run_dir, *([ACCEPT_OPEN] if choices.accept_open else [])]
    return PreparedJob(
        submission_id=new_id(recipe.name),
        # In the shell's own place, so that signals and exit codes are the trainer's.
        entrypoint=shlex.join(["exec", choices.python, "-m", "ray_jobs.cli", *words]),
        env_vars=environment_of_job(
            choices.variables,
            waiting=environment.waiting_policy(),
            tracking_uri=environment.tracking_uri(),
            grace_seconds=recipe.training.grace_seconds,
            # Nothing is known of the commit of a wheel, or of the cluster's own ca2st.
            git=environment.git_variable(git) if choices.package and choices.wheel is None else {},
        ),
        metadata={"recipe": recipe.name, "ca2st": __version__, "run_dir": run_dir} | git,
        run_dir=run_dir,
        recipe_name=recipe.name,
        recipe_place=place,
        recipe_text=text,
        modules=modules,
    )


def new_id(recipe_name: str) -> str:
    """Return ``ca2st-<recipe>-<moment>-<salt>``, made of what every URL and file name takes."""
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", recipe_name).strip("-.") or "run"
    return f"ca2st-{name[:60]}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"


def checked_wheel(path: Path) -> Path:
    """Return the path of a wheel that the user gives; a UserInputError where it is none of ca2st for every machine."""
    if not path.is_file():
        raise UserInputError(f"--wheel {path}: expected a wheel of ca2st, found no such file")
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile as error:
        raise UserInputError(f"--wheel {path}: expected a wheel of ca2st, found no zip archive") from error
    infos = {PurePosixPath(name).parts[0] for name in names if ".dist-info/" in name}
    if not any(info.startswith("ca2st-") for info in infos) or not path.name.endswith("-none-any.whl"):
        found = ", ".join(sorted(infos)) or "none"
        raise UserInputError(f"--wheel {path}: expected ca2st-VERSION-py3-none-any.whl, found a wheel of {found}")
    return path


def environment_of_job(
    passed: Mapping[str, str],
    *,
    waiting: str,
    tracking_uri: str | None,
    grace_seconds: float,
    git: Mapping[str, str],
) -> dict[str, str]:
    """Return the variables of the job: what the user passes, over what a training on a cluster needs.

    `waiting`: how torch's threads wait (``OMP_WAIT_POLICY``); `tracking_uri`: the tracking server's, where it is one
    that a cluster can reach, sent without its password, which only the user passes on; `grace_seconds`: what a stopped
    training may take for its last checkpoint; `git`: the variable that says what is sent.
    """
    own = {
        "OMP_WAIT_POLICY": waiting,
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # Ray's own uv integration would build a new environment
        "RAY_JOB_STOP_WAIT_TIME_S": str(int(grace_seconds) + _SECONDS_BEYOND_GRACE),  # by itself Ray kills after 3 s
    }
    if tracking_uri is not None and urlsplit(tracking_uri).scheme not in ("", "file", "sqlite"):
        own["MLFLOW_TRACKING_URI"] = without_credentials(tracking_uri)
    return own | dict(git) | dict(passed)


def run_folder(recipe: Recipe, out: Path | None) -> str:
    """Return the run's folder on the cluster; a UserInputError where it is relative, to the job's working directory."""
    folder = PurePosixPath(out) if out is not None else PurePosixPath(recipe.folder)
    if not folder.is_absolute():
        raise UserInputError(
            f"run folder {folder}: expected an absolute path on storage that all nodes share, by --out DIR or "
            "launch.runs_folder; a relative one would be lost with the job's working directory"
        )
    return str(folder)


def check_places(recipe: Recipe) -> None:
    """Refuse relative paths, by a line for each (UserInputError): the job runs elsewhere, in a folder of its own."""
    lines: list[str] = []

    def look(key: str, place: str) -> str:
        if "://" not in place and not is_hub_name(place) and not PurePosixPath(place).is_absolute():
            lines.append(f"{key}: expected a URL or an absolute path that the cluster's nodes see, found {place}")
        return place

    with_places(recipe, look)
    if lines:
        raise UserInputError("\n".join(lines))


def check_overrides(overrides: Sequence[str]) -> None:
    """Refuse a user, password or token in what the job's log and Ray's dashboard show, without naming it."""
    for override in overrides:
        key, _, value = override.partition("=")
        if holds_credentials(value) or without_credentials(value) != value:
            raise UserInputError(
                f"--set {key}: expected no user or password in what the job's log shows, found a URL with one; pass it "
                "by --env, for example --env MLFLOW_TRACKING_URI"
            )


class SendingInterruptedError(CA2STError):
    """Ctrl-C while a job was being sent; the message says what became of it."""

    exit_code = 128 + signal.SIGINT


def send(client: "JobSubmissionClient", job: PreparedJob) -> None:
    """Send a job; Ray uploads what the cluster does not have.

    Raises:
        UserInputError: the token is refused.
        EnvironmentFault: the server does not answer, or refuses.
        SendingInterruptedError: Ctrl-C before the server took it, or nobody knows whether it did.
        KeyboardInterrupt: Ctrl-C after it did.
    """
    try:
        with tempfile.TemporaryDirectory() as name, job_server.explained_refusals(client.get_address()):
            recipe = Path(name) / "job" / job.recipe_place
            recipe.parent.mkdir(parents=True)
            recipe.write_text(job.recipe_text, encoding="utf-8")
            modules, unpacked = [module for module in job.modules if module.is_dir()], Path(name) / "wheel"
            if not modules and job.modules:  # a wheel, which Ray would have pip install with all it needs, torch too
                with zipfile.ZipFile(job.modules[0]) as archive:
                    archive.extractall(unpacked)  # the user's own; zipfile keeps members inside the folder
                modules = sorted(path.parent for path in unpacked.glob("*/__init__.py"))
            client.submit_job(
                entrypoint=job.entrypoint,
                submission_id=job.submission_id,
                runtime_env={
                    "working_dir": str(recipe.parents[1]),
                    "py_modules": list(map(str, modules)),
                    "env_vars": dict(job.env_vars),
                },
                metadata=dict(job.metadata),
            )
    except KeyboardInterrupt:
        _raise_unless_taken(client, job.submission_id)
        raise


def _raise_unless_taken(client: "JobSubmissionClient", job_id: str) -> None:
    """Raise SendingInterruptedError unless the server knows the job; a request on its way gets some time to arrive."""
    for pause_seconds in _ASK_AFTER_SECONDS:
        try:
            time.sleep(pause_seconds)
            client.get_job_info(job_id)
        except (RuntimeError, OSError, KeyboardInterrupt) as error:  # impatient: Ctrl-C once more
            if not isinstance(error, RuntimeError) or _NOT_FOUND not in str(error):
                raise SendingInterruptedError(
                    f"interrupted; whether job {job_id} was taken is not known ({first_line(error)}): "
                    f"ray job status --address {client.get_address()} {job_id} tells"
                ) from None
        else:
            return
    raise SendingInterruptedError("interrupted; nothing was submitted")


def send_and_follow(
    client: "JobSubmissionClient",
    job: PreparedJob,
    *,
    show: job_server.Show,
    again: Callable[[], PreparedJob],
    num_resubmits: int = 0,
    patience: job_server.Patience | None = None,
) -> "JobDetails":
    """Send a job and follow it to its end; one whose driver was killed is sent `again`, which resumes the run.

    Raises:
        JobFailedError: it did not succeed; carries the driver's exit code.
        EnvironmentFault: the server does not take it, or stays away later (JobUnreachableError).
        SendingInterruptedError: see `send`; of a job that is sent again, that one.
    """
    remaining = num_resubmits
    while True:
        send(client, job)
        with job_server.explained_refusals(client.get_address()):
            details = job_server.follow(
                client, job.submission_id, show=show, patience=patience or job_server.Patience()
            )
        if job_server.exit_code(details) == 0:
            return details
        if remaining == 0 or not job_server.was_lost(details):
            raise job_server.failure(details, job.submission_id)
        remaining -= 1
        lost, job = job.submission_id, again()
        say(f"{lost} lost its driver; sent again as {job.submission_id}, {remaining} times more")
