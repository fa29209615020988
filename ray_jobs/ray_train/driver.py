"""The driver: joins a cluster, checks it, trains on it, and ends as what happened there."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ca2st.cores import num_cores
from ca2st.errors import CA2STError, EnvironmentFault, RetriesUsedUpError
from ca2st.training.signals import stop_on_signals
from ray_jobs.config.recipe import Recipe, recipe_document
from ray_jobs.console import say
from ray_jobs.every_node import living_nodes, this_node
from ray_jobs.ray_access import LOCAL, RayAccess, first_line, has_dashboard, ray_session
from ray_jobs.ray_train.absolute import with_absolute_paths
from ray_jobs.ray_train.demand import Demand, check_demand, demand_of, hosts, most_workers
from ray_jobs.ray_train.launch_folder import LaunchFolder
from ray_jobs.ray_train.node_check import check_nodes, look_at_data
from ray_jobs.ray_train.stopping import ended_by_signals
from ray_jobs.ray_train.supervision import Supervision
from ray_jobs.running.failure_record import error_of
from ray_jobs.running.worker import Job, Outcome, read_outcome

_LAST_RESORT_SECONDS = 30.0
"""After the workers' grace, for the driver to let go of the cluster by itself."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fleet:
    """A cluster that can train the run, and was found to."""

    recipe: Recipe
    job: Job
    demand: Demand
    folder: LaunchFolder
    has_dashboard: bool
    """Whether the cluster serves Ray's dashboard, which some parts of Ray ask."""

    def train(self) -> Outcome:
        """Train until the run is done; call it in the main thread, which hears the signals.

        Raises:
            RunStoppedError: a signal stopped it; the state is saved.
            RetriesUsedUpError: it failed more often than `recipe.launch` allows; the last failure is told.
            EnvironmentFault: the cluster is lost.
            CA2STError: a failure that no restart can mend, of its own kind.
        """
        grace = self.recipe.training.grace_seconds
        with stop_on_signals(grace_seconds=grace + _LAST_RESORT_SECONDS) as stop:
            supervision = Supervision(self.folder, stop, grace_seconds=grace)
            try:
                supervision.until_over(_in_thread(self._fit))
            except CA2STError:
                raise
            except Exception as error:
                raise self._ended_by(error, supervision) from error
        return read_outcome(Path(self.job.run_dir))

    def _fit(self) -> dict[str, str]:
        """Ray Train's part, from the first worker to the last restart; what rank 0 returned."""
        from ray_jobs.ray_train.trainer import make_trainer

        trainer = make_trainer(
            self.job,
            self.recipe.launch,
            self.demand,
            self.folder,
            has_dashboard=self.has_dashboard,
            timeout_seconds=self.recipe.training.collective_timeout_seconds,
        )
        result: Any = trainer.fit()
        ended: dict[str, str] = result.return_value  # what rank 0 returned
        return ended

    def _ended_by(self, error: Exception, supervision: Supervision) -> CA2STError:
        """What to end with when Ray gave up, or was lost."""
        from ray.exceptions import RayError
        from ray.train import TrainingFailedError
        from ray.train.v2.api.exceptions import PreemptionError, WorkerGroupError

        from ray_jobs.ray_train.lost_workers import is_preempted

        run_dir, launch = self.job.run_dir, self.recipe.launch
        if isinstance(error, TrainingFailedError):
            failure = supervision.failure()
            if failure is not None and failure.final:  # a rank that only heard of it was the last to fail
                return error_of(failure)
            lost = error.worker_failures.values() if isinstance(error, WorkerGroupError) else ()
            if isinstance(error, PreemptionError) or any(map(is_preempted, lost)):  # as Ray itself counts
                return RetriesUsedUpError(
                    f"{self.recipe.name}: its nodes were taken away more often than launch.max_preemptions "
                    f"({launch.max_preemptions}) allows; {run_dir} keeps what was reached: rerun to resume"
                )
            last = failure if failure is not None and isinstance(error, WorkerGroupError) else error
            return RetriesUsedUpError(
                f"{self.recipe.name}: failed in every attempt ({launch.max_failures} restarts allowed); the last one: "
                f"{last}; {run_dir} keeps what was reached: mend the cause and rerun"
            )
        if isinstance(error, RayError):
            return EnvironmentFault(
                f"{self.recipe.name}: lost the Ray cluster ({type(error).__name__}: {first_line(error)}); {run_dir} "
                "keeps what was reached: rerun to resume"
            )
        raise error


@contextmanager
def joined(recipe: Recipe, run_dir: Path, address: str, *, access: RayAccess) -> Iterator[Fleet]:
    """A cluster that was found able to train `recipe` in `run_dir`, for the block; call it in the main thread.

    `address`: ``local`` starts a Ray on this machine for the block; else a cluster to join.

    Raises:
        EnvironmentFault: the cluster has no room for the workers, or its nodes differ in code, data or run folder.
        UserInputError: as `ray_session`.
        RunStoppedError: a signal came meanwhile.
    """
    run_dir = run_dir.resolve()
    job = Job(recipe=recipe_document(with_absolute_paths(recipe, Path.cwd())), run_dir=str(run_dir))
    folder = LaunchFolder.make(run_dir, recipe.name)
    with ExitStack() as session:
        session.callback(folder.remove)
        with ended_by_signals("stopped before any worker had begun; rerun to resume"):
            width = max(num_cores(), recipe.launch.workers) if address == LOCAL else None
            session.enter_context(ray_session(address, access=access, num_cpus=width))
            demand = _checked_demand(recipe)
            _check_other_nodes(job, demand, folder)
        yield Fleet(recipe=recipe, job=job, demand=demand, folder=folder, has_dashboard=has_dashboard())


def _checked_demand(recipe: Recipe) -> Demand:
    nodes = living_nodes()
    demand = demand_of(recipe.launch, nodes)
    if not recipe.launch.wait_for_resources:
        check_demand(demand, nodes)
    elif most_workers(demand, nodes) < demand.min_workers:
        say(f"waiting for nodes with room for {demand.min_workers} workers; a signal ends the wait")
    return demand


def _check_other_nodes(job: Job, demand: Demand, folder: LaunchFolder) -> None:
    """The driver's own node has been checked by the driver itself."""
    mine = this_node()
    others = [node for node in hosts(demand, living_nodes()) if node.node_id != mine.node_id]
    if others:
        say(f"checking code, data and run folder on {len(others)} other nodes")
        check_nodes(job.recipe, folder.path, others, mine=look_at_data(job.recipe, node=mine.name))


def _in_thread(action: Callable[[], dict[str, str]]) -> "Future[dict[str, str]]":
    """Run `action` in a daemon thread: the main thread hears signals, and does not wait for a cluster that hangs.

    Outside the main thread Ray installs no signal handler of its own, which would abort the workers unsaved.
    """
    future: Future[dict[str, str]] = Future()

    def act() -> None:
        try:
            future.set_result(action())
        except BaseException as error:  # noqa: BLE001  # raised again in the main thread by Future.result
            future.set_exception(error)

    threading.Thread(target=act, name="ray-train", daemon=True).start()
    return future
