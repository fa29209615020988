"""From what the user asks to a job ready to be sent; whatever can be wrong is refused here."""

import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ca2st import __version__
from ca2st.weights.hub_names import is_hub_name
from ray_jobs import environment
from ray_jobs.config.recipe import ExpertsConfig, Recipe
from ray_jobs.config.recipe_file import load_recipe, read_recipe
from ray_jobs.running.preflight import check_settings
from ray_jobs.submit.payload import payload, read_wheel, recipe_place
from ray_jobs.submit.request import (
    JobRequest,
    check_overrides,
    check_places,
    entrypoint,
    environment_of_job,
    run_folder,
    submission_id,
)
from ray_jobs.submit.wheel import project_wheel


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
