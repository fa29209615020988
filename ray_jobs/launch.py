"""Start a training here: in this process, in several processes of this machine, or under Ray.

Whatever the way, the workers run the same function (`ray_jobs.runs.worker.run`), the run folder is the only owner of
checkpoints, and calling `launch` again with the same recipe resumes.
"""

import json
from pathlib import Path

from ca2st.durable import FaultPoints, write_bytes
from ca2st.training.journal import LAUNCH_LOCK_NAME, locked
from ca2st.training.resume import RECIPE_FILE
from ray_jobs import environment
from ray_jobs.config.recipe import Recipe, recipe_document
from ray_jobs.runs.start import finished, prepare
from ray_jobs.runs.worker import Job, Outcome, run
from ray_jobs.tracking.following import followed


def launch(
    recipe: Recipe,
    run_dir: Path,
    *,
    faults: FaultPoints,
    ray_address: str | None = None,
    accept_open_ray: bool = False,
) -> Outcome:
    """Train `recipe` in `run_dir`, resuming what is there; no worker is started where nothing is left to do.

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
    ready = prepare(recipe, run_dir, environment.hub_access())
    recipe, document = ready.recipe, recipe_document(ready.recipe)
    with locked(run_dir, name=LAUNCH_LOCK_NAME):
        write_bytes(run_dir / RECIPE_FILE, (json.dumps(document, indent=1) + "\n").encode())
        tracked = followed(recipe, run_dir, ready.data)
        if (outcome := finished(ready, run_dir)) is not None:
            with tracked:  # what MLflow lacks is sent
                return outcome
        if ray_address is not None:
            from ray_jobs.cluster.driver import joined
            from ray_jobs.cluster.ray_access import found_access

            access = found_access(accept_open=accept_open_ray)
            with joined(recipe, run_dir, ray_address, access=access) as fleet, tracked:
                return fleet.train()
        job = Job(recipe=document, run_dir=str(run_dir.resolve()))
        with tracked:
            if recipe.launch.workers == 1:
                return run(job, faults=faults)
            from ray_jobs.runs.local_processes import run_processes

            return run_processes(job, recipe.launch.workers, faults)
