"""Start a training here: in this process, in several processes of this machine, or under Ray.

Whatever the way, the workers run the same function (`ray_jobs.runs.worker.run`), the run folder is the only owner of
checkpoints, and calling `launch` again with the same recipe resumes.
"""

import json
from pathlib import Path

from ca2st.durable import FaultPoints, write_bytes
from ca2st.training.journal import LAUNCH_LOCK_NAME, locked
from ray_jobs import environment
from ray_jobs.config.recipe import Recipe, recipe_document
from ray_jobs.runs.local_processes import run_processes
from ray_jobs.runs.model import IMPORTED_FOLDER, with_local_experts
from ray_jobs.runs.plan import refuse_other_recipe
from ray_jobs.runs.start import check_model, preflight
from ray_jobs.runs.worker import Job, Outcome, run
from ray_jobs.tracking.following import followed

RECIPE_NAME = "recipe.json"


def launch(
    recipe: Recipe,
    run_dir: Path,
    *,
    faults: FaultPoints,
    ray_address: str | None = None,
    accept_open_ray: bool = False,
) -> Outcome:
    """Train `recipe` in `run_dir`, resuming what is there.

    `ray_address`: None trains without Ray; ``local`` starts a Ray of its own; anything else is a cluster's address
    (``auto``: the one this machine is a node of). `accept_open_ray`: join even one that asks for no token.

    Raises:
        UserInputError: the folder holds a run of another recipe (the message lists what differs), or what is to be
            trained or to start from does not fit the model; nothing is written then.
        RunFolderBusyError: another launch trains in the folder, on this machine or another one.
        WorkerFailedError: a worker process failed, with its exit code.
        EnvironmentFault: the cluster cannot train this run; see `ray_jobs.cluster.driver.joined`.
        RetriesUsedUpError: under Ray, it failed in every attempt.
    """
    data = preflight(recipe)
    recipe = with_local_experts(recipe, run_dir.parent / IMPORTED_FOLDER, environment.hub_access())
    check_model(recipe, data.classes, run_dir)
    refuse_other_recipe(recipe, run_dir)
    with locked(run_dir, name=LAUNCH_LOCK_NAME):
        write_bytes(run_dir / RECIPE_NAME, (json.dumps(recipe_document(recipe), indent=1) + "\n").encode())
        if ray_address is not None:
            from ray_jobs.cluster.driver import joined
            from ray_jobs.cluster.ray_access import found_access

            access = found_access(accept_open=accept_open_ray)
            with joined(recipe, run_dir, ray_address, access=access) as fleet, followed(recipe, run_dir, data):
                return fleet.train()
        job = Job(recipe=recipe_document(recipe), run_dir=str(run_dir.resolve()))
        with followed(recipe, run_dir, data):
            if recipe.launch.workers == 1:
                return run(job, faults=faults)
            return run_processes(job, recipe.launch.workers, faults)
