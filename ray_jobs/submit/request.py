"""What a job is asked to run, decided before anything is sent."""

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from ca2st.errors import UserInputError
from ca2st.weights.hub_names import is_hub_name
from ray_jobs.ray_access import ACCEPT_OPEN
from ray_jobs.redaction import holds_credentials, without_credentials

if TYPE_CHECKING:
    from ray_jobs.config.recipe import Recipe

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
