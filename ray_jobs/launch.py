"""Start a training here: in this process, in several processes of this machine, or under Ray.

Whatever the way, the workers run the same function (`ray_jobs.worker.run`), the run folder is the only owner of
checkpoints, and calling `launch` again with the same recipe resumes.
"""

import json
from pathlib import Path

from ca2st.durable import FaultPoints, write_bytes
from ca2st.errors import UserInputError
from ca2st.training.documents import differences
from ray_jobs import environment
from ray_jobs.config import Recipe, identity_settings, recipe_document, stored_recipe
from ray_jobs.local_processes import run_processes
from ray_jobs.public_experts import IMPORTED_FOLDER, with_local_experts
from ray_jobs.start import check_model
from ray_jobs.tracking.following import followed
from ray_jobs.wiring import preflight
from ray_jobs.worker import Job, Outcome, run

RECIPE_NAME = "recipe.json"


def launch(recipe: Recipe, run_dir: Path, *, faults: FaultPoints, ray_address: str | None = None) -> Outcome:
    """Train `recipe` in `run_dir`, resuming what is there.

    `ray_address`: None trains without Ray; ``local`` starts a Ray of its own; anything else is a cluster's address.

    Raises:
        UserInputError: the folder holds a run of another recipe (the message lists what differs), or what is to be
            trained or to start from does not fit the model; nothing is written then.
        WorkerFailedError: a worker process failed, with its exit code.
    """
    data = preflight(recipe)
    recipe = with_local_experts(recipe, run_dir.parent / IMPORTED_FOLDER, environment.hub_access())
    check_model(recipe, data.classes, run_dir)
    _claim(recipe, run_dir)
    job = Job(recipe=recipe_document(recipe), run_dir=str(run_dir.resolve()))
    with followed(recipe, run_dir, data):
        if ray_address is not None:
            from ray_jobs.ray_train import run_under_ray

            return run_under_ray(job, recipe, ray_address)
        if recipe.launch.workers == 1:
            return run(job, faults=faults)
        return run_processes(job, recipe.launch.workers, faults)


def _claim(recipe: Recipe, run_dir: Path) -> None:
    """Write the recipe into a new run folder, or refuse a folder of another recipe."""
    path = run_dir / RECIPE_NAME
    if path.exists():
        kept = identity_settings(stored_recipe(json.loads(path.read_text()), where=str(run_dir)))
        if changed := differences(kept, identity_settings(recipe)):
            listed = "\n  ".join(changed)
            raise UserInputError(
                f"{run_dir}: holds a run of another recipe; choose another --out or undo the change:\n  {listed}"
            )
    run_dir.mkdir(parents=True, exist_ok=True)
    write_bytes(path, (json.dumps(recipe_document(recipe), indent=1) + "\n").encode())
