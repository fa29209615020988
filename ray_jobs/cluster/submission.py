"""Submit a training as a Ray job.

What a job is asked to run, decided before anything is sent.

From what the user asks to a job ready to be sent; whatever can be wrong is refused here.

Send a training to a cluster, follow it, and send it again where that helps.
"""

import re
import secrets
import shlex
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from ca2st import __version__
from ca2st.errors import CA2STError, UserInputError
from ca2st.weights.hub import is_hub_name
from ray_jobs import environment
from ray_jobs.cluster.job_server import (
    JobClient,
    JobDetails,
    Patience,
    Show,
    exit_code,
    failure,
    follow,
    runtime_env,
    told_refusals,
    was_lost,
)
from ray_jobs.cluster.package import payload, project_wheel, read_wheel, recipe_place
from ray_jobs.cluster.ray_access import ACCEPT_OPEN, first_line
from ray_jobs.config.recipe import ExpertsConfig, Recipe
from ray_jobs.config.recipe_file import load_recipe, read_recipe
from ray_jobs.console import say
from ray_jobs.redaction import holds_credentials, without_credentials
from ray_jobs.runs.start import check_settings

_SECONDS_BEYOND_GRACE = 30


@dataclass(frozen=True, kw_only=True, slots=True)
class JobRequest:
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


def submission_id(recipe_name: str, *, moment: str, salt: str) -> str:
    """``ca2st-<recipe>-<moment>-<salt>`` with nothing in it that a URL or a file name would not take."""
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", recipe_name).strip("-.") or "run"
    return f"ca2st-{name[:60]}-{moment}-{salt}"


def entrypoint(
    recipe_place: str, *, python: str, overrides: Sequence[str], run_dir: str, accept_open: bool = False
) -> str:
    """The command that trains: in the shell's own place, so that signals and exit codes are the trainer's."""
    options = [part for override in overrides for part in ("--set", override)]
    accepted = [ACCEPT_OPEN] if accept_open else []
    words = ("train", recipe_place, *options, "--ray", "--ray-address", "auto", "--out", run_dir, *accepted)
    return shlex.join(["exec", python, "-m", "ray_jobs.cli", *words])


def environment_of_job(
    passed: Mapping[str, str],
    *,
    waiting: str,
    tracking_uri: str | None,
    grace_seconds: float,
    git: Mapping[str, str],
) -> dict[str, str]:
    """Variables of the job: what the user passes, over what a training on a cluster needs.

    `waiting`: how torch's threads wait (``OMP_WAIT_POLICY``); `tracking_uri`: the tracking server's, where it is one
    that a cluster can reach, sent without its password, which only the user passes on; `grace_seconds`: what a stopped
    training may take for its last checkpoint; `git`: the variable that tells what is sent.
    """
    own = {
        "OMP_WAIT_POLICY": waiting,
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # Ray's own uv integration would build a new environment
        "RAY_JOB_STOP_WAIT_TIME_S": str(int(grace_seconds) + _SECONDS_BEYOND_GRACE),  # by itself Ray kills after 3 s
    }
    if tracking_uri is not None and is_elsewhere(tracking_uri):
        own["MLFLOW_TRACKING_URI"] = without_credentials(tracking_uri)
    return own | dict(git) | dict(passed)


def is_elsewhere(tracking_uri: str) -> bool:
    """Whether a tracking URI names a server, not a file of this machine."""
    return urlsplit(tracking_uri).scheme not in ("", "file", "sqlite")


def run_folder(recipe: "Recipe", out: Path | None) -> str:
    """The run's folder on the cluster.

    Raises:
        UserInputError: it is relative, and would lie in a temporary folder of the head node.
    """
    folder = PurePosixPath(out) if out is not None else PurePosixPath(recipe.launch.runs_folder) / recipe.name
    if not folder.is_absolute():
        raise UserInputError(
            f"run folder {folder}: expected an absolute path on storage that all nodes share, by --out DIR or "
            "launch.runs_folder; a relative one would be lost with the job's working directory"
        )
    return str(folder)


def check_places(recipe: "Recipe") -> None:
    """Refuse relative paths: the job runs elsewhere, in a folder of its own.

    Raises:
        UserInputError: a line for each of them.
    """
    lines = [
        f"{key}: expected a URL or an absolute path that the cluster's nodes see, found {place}"
        for key, place in _places(recipe)
        if "://" not in place and not is_hub_name(place) and not PurePosixPath(place).is_absolute()
    ]
    if lines:
        raise UserInputError("\n".join(lines))


def _places(recipe: "Recipe") -> Iterator[tuple[str, str]]:
    data = recipe.data
    named = {
        "data.train": data.train,
        "data.validation": data.validation,
        "data.loader.cache_dir": data.loader.cache_dir,
    }
    named |= {f"data.mixture[{index}].train": entry.train for index, entry in enumerate(data.mixture)}
    named |= {f"experts.{name}": source for name, source in recipe.experts.sources().items()}
    if recipe.start is not None:
        named["start.checkpoint"] = recipe.start.checkpoint
    yield from ((key, str(place)) for key, place in named.items() if place is not None)


def check_overrides(overrides: Sequence[str]) -> None:
    """Refuse a user, password or token in what the job's log and Ray's dashboard show.

    Raises:
        UserInputError: an override with a URL that holds one; the message does not.
    """
    for override in overrides:
        key, _, value = override.partition("=")
        if holds_credentials(value) or without_credentials(value) != value:
            raise UserInputError(
                f"--set {key}: expected no user or password in what the job's log shows, found a URL with one; pass it "
                "by --env, for example --env MLFLOW_TRACKING_URI"
            )


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
    """A wheel to send; None: of the ca2st that runs here."""
    package: bool = True
    """False: use the cluster's own ca2st."""
    python: str = "python"
    """The head node's interpreter."""
    accept_open: bool = False
    """The cluster may be open."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedJob:
    """A job that can be sent."""

    request: JobRequest
    archive: bytes
    """Its working directory."""
    recipe_name: str

    def new_id(self) -> str:
        """An id that no job has had."""
        return _new_id(self.recipe_name)


def prepared(choices: Choices) -> PreparedJob:
    """Read the recipe as the job will, and pack it.

    Raises:
        UserInputError: a recipe or a setting that the job would refuse too, places that the cluster cannot see, or a
            password where everybody would see it.
        EnvironmentFault: the project's wheel cannot be made.
    """
    check_overrides(choices.overrides)
    recipe = load_recipe(choices.recipe, choices.overrides)
    check_places(recipe)
    run_dir = run_folder(recipe, choices.out)
    check_settings(_without_expert_files(recipe))
    text, _ = read_recipe(choices.recipe)
    git = environment.git_state(Path.cwd())
    place = recipe_place(choices.recipe)
    request = JobRequest(
        submission_id=_new_id(recipe.name),
        entrypoint=entrypoint(
            place,
            python=choices.python,
            overrides=choices.overrides,
            run_dir=run_dir,
            accept_open=choices.accept_open,
        ),
        env_vars=environment_of_job(
            choices.variables,
            waiting=environment.waiting_policy(),
            tracking_uri=environment.tracking_uri(),
            grace_seconds=recipe.training.grace_seconds,
            git=environment.git_variable(git) if _sends_own_sources(choices) else {},
        ),
        metadata={"recipe": recipe.name, "ca2st": __version__, "run_dir": run_dir} | git,
        run_dir=run_dir,
    )
    archive = payload(recipe_place=place, recipe_text=text, wheel=_wheel(choices))
    return PreparedJob(request=request, archive=archive, recipe_name=recipe.name)


def _without_expert_files(recipe: Recipe) -> Recipe:
    """The recipe without files that only the cluster sees."""
    public = {name: source for name, source in recipe.experts.sources().items() if is_hub_name(source)}
    experts = ExpertsConfig(
        spatial=public.get("spatial"),
        temporal=public.get("temporal"),
        audio=public.get("audio"),
        precision=recipe.experts.precision,
    )
    return replace(recipe, experts=experts)


def _sends_own_sources(choices: Choices) -> bool:
    """Whether the job runs the ca2st that runs here, not one of whose commit nothing is known."""
    return choices.package and choices.wheel is None


def _wheel(choices: Choices) -> bytes | None:
    if not choices.package:
        return None
    return project_wheel(environment.cache_folder()) if choices.wheel is None else read_wheel(choices.wheel)


def _new_id(recipe_name: str) -> str:
    return submission_id(recipe_name, moment=time.strftime("%Y%m%d-%H%M%S"), salt=secrets.token_hex(2))


_ASK_AFTER_SECONDS = (0.0, 1.0)
_NOT_FOUND = "status code 404"


class SendingInterruptedError(CA2STError):
    """Ctrl-C while a job was being sent; the message says what became of it."""

    exit_code = 128 + signal.SIGINT


@dataclass(frozen=True, kw_only=True, slots=True)
class EndedJob:
    """A job that was followed to its end."""

    submission_id: str
    details: JobDetails

    @property
    def exit_code(self) -> int:
        """What the command ends with."""
        return exit_code(self.details)


def send(client: JobClient, request: JobRequest, archive: bytes) -> None:
    """Send a job with `archive` as its working directory; Ray uploads it unless the cluster has it.

    Raises:
        UserInputError: the token is refused.
        EnvironmentFault: the server does not answer, or refuses.
        SendingInterruptedError: Ctrl-C before the server took it, or nobody knows whether it did.
        KeyboardInterrupt: Ctrl-C after it did.
    """
    try:
        with tempfile.TemporaryDirectory() as folder, told_refusals(client.get_address()):
            path = Path(folder) / "job.zip"
            path.write_bytes(archive)
            client.submit_job(
                entrypoint=request.entrypoint,
                submission_id=request.submission_id,
                runtime_env=runtime_env(request.env_vars, working_dir=path),
                metadata=dict(request.metadata),
            )
    except KeyboardInterrupt:
        _tell_if_not_taken(client, request.submission_id)
        raise


def _tell_if_not_taken(client: JobClient, job_id: str) -> None:
    """Return where the server knows the job; a request that was on its way then gets some time to arrive."""
    for pause_seconds in _ASK_AFTER_SECONDS:
        try:
            time.sleep(pause_seconds)
            client.get_job_info(job_id)
        except RuntimeError as error:
            if _NOT_FOUND not in str(error):
                raise _not_known(client, job_id, error) from None
        except (OSError, KeyboardInterrupt) as error:  # impatient: Ctrl-C once more
            raise _not_known(client, job_id, error) from None
        else:
            return
    raise SendingInterruptedError("interrupted; nothing was submitted")


def _not_known(client: JobClient, job_id: str, error: BaseException) -> SendingInterruptedError:
    return SendingInterruptedError(
        f"interrupted; whether job {job_id} was taken is not known ({first_line(error)}): "
        f"ray job status --address {client.get_address()} {job_id} tells"
    )


def send_and_follow(
    client: JobClient,
    request: JobRequest,
    archive: bytes,
    *,
    show: Show,
    new_id: Callable[[], str],
    num_resubmits: int = 0,
    patience: Patience | None = None,
) -> EndedJob:
    """Send a job and follow it; one whose driver was killed is sent again under a `new_id`, which resumes the run.

    Raises:
        JobFailedError: it did not succeed; carries the driver's exit code.
        EnvironmentFault: the server does not take it, or stays away later (JobUnreachableError).
        SendingInterruptedError: see `send`; of a job that is sent again, that one.
    """
    remaining = num_resubmits
    while True:
        send(client, request, archive)
        with told_refusals(client.get_address()):
            details = follow(client, request.submission_id, show=show, patience=patience or Patience())
        ended = EndedJob(submission_id=request.submission_id, details=details)
        if ended.exit_code == 0:
            return ended
        if remaining == 0 or not was_lost(details):
            raise failure(details, request.submission_id)
        remaining -= 1
        request = replace(request, submission_id=new_id())
        say(f"{ended.submission_id} lost its driver; sent again as {request.submission_id}, {remaining} times more")
