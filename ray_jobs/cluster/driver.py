"""The driver of a training under Ray Train: joins a cluster, checks it, trains on it, and ends as what happened there.

Demands that the cluster can never meet are refused, not waited for. Below: what a Ray worker runs, from start to
end.
"""

import contextlib
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import ray
from ray.train.torch import TorchConfig
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.callbacks.preemption_callback import PreemptionCallback
from ray.train.v2._internal.execution.preemption import PreemptionWatcher
from ray.train.v2.api.config import FailureConfig, RunConfig, ScalingConfig
from ray.train.v2.torch.torch_trainer import TorchTrainer

from ca2st.errors import CA2STError, EnvironmentFault, RetriesUsedUpError
from ca2st.processes import num_cores
from ca2st.training.errors import RunStoppedError, TimeUpError
from ca2st.training.journal import JOURNAL_NAME
from ca2st.training.signals import StopRequest, stop_on_signals
from ca2st.training.step import GPU_BACKEND
from ca2st.weights.hub import is_hub_name
from ray_jobs import environment
from ray_jobs.cluster import ray_access
from ray_jobs.cluster.node_check import check_training_nodes
from ray_jobs.cluster.ray_access import Node
from ray_jobs.cluster.supervision import LaunchFolder, LostWorkers, Supervision, ended_by_signals, is_preempted
from ray_jobs.config.recipe import LaunchConfig, Recipe, recipe_document, with_places
from ray_jobs.console import say
from ray_jobs.runs.failures import error_of, keep_failure, read_failure, record_of
from ray_jobs.runs.worker import Job, Outcome, read_outcome, run

if TYPE_CHECKING:
    from ray.train.v2.api.preemption import PreemptionInfo

_SHARE_OF_TYPE = 0.001
"""Of the resource ``accelerator_type:...``, which is there once per node; what Ray itself asks of it."""
_ROUNDING = 1e-9
_LAST_RESORT_SECONDS = 30.0
"""After the workers' grace, for the driver to let go of the cluster by itself."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fleet:
    """A cluster that can train the run, and was found to."""

    recipe: Recipe
    job: Job
    resources: Mapping[str, float]
    """Of one worker."""
    folder: LaunchFolder

    def train(self) -> Outcome:
        """Train until the run is done; call it in the main thread, which hears the signals.

        Raises:
            RunStoppedError: a signal stopped it; the state is saved.
            RetriesUsedUpError: it failed more often than `recipe.launch` allows; the last failure is named.
            EnvironmentFault: the cluster is lost.
            CA2STError: a failure that no restart can fix, of its own kind.
        """
        grace = self.recipe.training.grace_seconds
        with stop_on_signals(grace_seconds=grace + _LAST_RESORT_SECONDS) as stop:
            supervision = Supervision(self.folder, stop, grace_seconds=grace)
            try:
                supervision.until_over(_in_thread(lambda: self.trainer().fit()))
            except CA2STError:
                raise
            except Exception as error:
                raise self._ended_by(error, supervision) from error
        return read_outcome(Path(self.job.run_dir))

    def trainer(self) -> TorchTrainer:
        """Return a trainer that starts the workers; what Ray itself keeps goes into the launch's folder."""
        launch, with_gpu = self.recipe.launch, "GPU" in self.resources
        os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"  # `QuietPreemption` takes its place
        return Trainer(
            train_on_worker,  # its return value arrives as the result's
            train_loop_config={
                "recipe": self.job.recipe,
                "run_dir": self.job.run_dir,
                "folder": str(self.folder.path),
            },
            scaling_config=ScalingConfig(
                num_workers=(launch.min_workers or launch.workers, launch.workers)
                if launch.elastic
                else launch.workers,
                use_gpu=with_gpu,
                resources_per_worker=dict(self.resources),
                placement_strategy=launch.placement,
            ),
            torch_config=TorchConfig(
                backend=GPU_BACKEND if with_gpu else "gloo",
                timeout_s=round(self.recipe.training.collective_timeout_seconds),
            ),
            run_config=RunConfig(
                name=self.folder.name,
                storage_path=str(self.folder.path / "ray"),
                failure_config=FailureConfig(
                    max_failures=launch.max_failures, max_preemption_failures=launch.max_preemptions
                ),
                callbacks=[LostWorkers(self.folder.path)],
                # Ray shows GPUs even to workers that asked for none, and all of them would train on the first.
                worker_runtime_env={} if with_gpu else {"env_vars": {"CUDA_VISIBLE_DEVICES": ""}},
            ),
        )

    def _ended_by(self, error: Exception, supervision: Supervision) -> CA2STError:
        """Return what to end with when Ray gave up, or was lost."""
        from ray.exceptions import RayError
        from ray.train import TrainingFailedError
        from ray.train.v2.api.exceptions import PreemptionError, WorkerGroupError

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
                f"{last}; {run_dir} keeps what was reached: fix the cause and rerun"
            )
        if isinstance(error, RayError):
            what = f"{type(error).__name__}: {ray_access.first_line(error)}"
            return EnvironmentFault(
                f"{self.recipe.name}: lost the Ray cluster ({what}); {run_dir} keeps what was reached: rerun to resume"
            )
        raise error


@contextmanager
def joined(recipe: Recipe, run_dir: Path, address: str, *, access: ray_access.RayAccess) -> Iterator[Fleet]:
    """Open a cluster that was found able to train `recipe` in `run_dir`, for the block; call it in the main thread.

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
            width = max(num_cores(), recipe.launch.workers) if address == ray_access.LOCAL else None
            session.enter_context(ray_access.ray_session(address, access=access, num_cpus=width))
            nodes, launch = ray_access.living_nodes(), recipe.launch
            resources = resources_of(launch, nodes)
            if not launch.wait_for_resources:
                check_room(launch, nodes)
            elif most_workers(launch, nodes) < (least := launch.min_workers or launch.workers):
                say(f"waiting for nodes with room for {least} workers; a signal ends the wait")
            mine = ray_access.this_node().node_id  # checked by the driver itself, before
            if others := [node for node in nodes if room(node, resources) and node.node_id != mine]:
                say(f"checking code, data and run folder on {len(others)} other nodes")
                check_training_nodes(job.recipe, folder.path, others)
        yield Fleet(recipe=recipe, job=job, resources=resources, folder=folder)


def with_absolute_paths(recipe: Recipe, base: Path) -> Recipe:
    """Return `recipe` with every relative path made absolute from `base`: workers run in a folder of Ray's."""

    def absolute(_key: str, place: str) -> str:
        return place if "://" in place or is_hub_name(place) else str(base / place)

    return with_places(recipe, absolute)


def resources_of(launch: LaunchConfig, nodes: Sequence[Node]) -> dict[str, float]:
    """Return what one worker asks for, by Ray's names; never empty.

    Where `launch` leaves the device open, the `nodes` decide, not this machine.
    """
    wanted = launch.accelerator_type is not None or any(node.resources.get("GPU", 0) >= 1 for node in nodes)
    gpus = int(wanted) if launch.gpus_per_worker is None else int(launch.gpus_per_worker)
    cpus = launch.cpus_per_worker if launch.cpus_per_worker is not None else float(gpus == 0)
    resources = {"CPU": cpus, "GPU": float(gpus)}
    if launch.accelerator_type is not None:
        resources[f"accelerator_type:{launch.accelerator_type}"] = _SHARE_OF_TYPE
    return {name: amount for name, amount in resources.items() if amount > 0}


def check_room(launch: LaunchConfig, nodes: Sequence[Node]) -> None:
    """Refuse what the cluster can never give: an EnvironmentFault that lists what each node has."""
    found, resources = most_workers(launch, nodes), resources_of(launch, nodes)
    least = launch.min_workers or launch.workers
    if found >= least:
        return
    each, names = _words(resources), dict.fromkeys(["CPU", "GPU", *resources])
    known = {node: _words({name: node.resources.get(name, 0) for name in names}) for node in nodes}
    table = "".join(f"\n  {node}: {words}; room for {room(node, resources)}" for node, words in known.items())
    raise EnvironmentFault(
        f"launch: expected a cluster with room for {least} workers of {each} each (placement "
        f"{launch.placement}), found room for {found}; ask for less (launch.workers, launch.cpus_per_worker, "
        "launch.gpus_per_worker, launch.placement), add nodes, or set launch.wait_for_resources = true to wait for "
        f"them:{table or ' no node'}"
    )


def most_workers(launch: LaunchConfig, nodes: Sequence[Node]) -> int:
    """Return how many workers the cluster can hold, as `launch.placement` wants them placed."""
    resources = resources_of(launch, nodes)
    rooms = [room(node, resources) for node in nodes]
    if launch.placement == "STRICT_PACK":
        return max(rooms, default=0)
    if launch.placement == "STRICT_SPREAD":
        return sum(1 for places in rooms if places > 0)
    return sum(rooms)


def room(node: Node, resources: Mapping[str, float]) -> int:
    """Return how many workers fit on `node` when nothing else runs there."""
    return min(int(node.resources.get(name, 0) / amount + _ROUNDING) for name, amount in resources.items())


class QuietPreemption(PreemptionCallback):
    """Ray's watcher of announced ends of nodes, as an actor that is not restarted.

    Ray's own may be restarted, takes handles of the workers, and each start logs an error that warns of just this.
    """

    def after_worker_group_start(self, worker_group: Any) -> None:
        """Start the watcher of a new worker group."""
        self._stop_watcher()
        ranks: dict[str, list[int]] = {}
        actors = {}
        for worker in worker_group.get_workers():
            rank = worker.distributed_context.world_rank
            ranks.setdefault(worker.metadata.node_id, []).append(rank)
            actors[rank] = worker.actor
        watcher: Any = ray.remote(num_cpus=0, max_restarts=0)(PreemptionWatcher)
        self._watcher = watcher.remote(ranks, self._poll_interval_s, actors)


class Trainer(TorchTrainer):
    """Ray Train's, with our watcher of announced ends in place of Ray's, and without its process for Ray's datasets."""

    def _create_default_callbacks(self) -> list[Any]:
        unwanted: tuple[type, ...] = (DatasetsCallback,)
        if not ray_access.has_dashboard():  # Ray's cleaner of placement groups would ask it, and complain every second
            unwanted += (PlacementGroupCleanerCallback,)
        made = super()._create_default_callbacks()
        return [*(callback for callback in made if not isinstance(callback, unwanted)), QuietPreemption()]


def _words(resources: Mapping[str, float]) -> str:
    return ", ".join(
        name.removeprefix("accelerator_type:")
        if name.startswith("accelerator_type:") and amount
        else f"{amount:g} {name}"
        for name, amount in resources.items()
    )


def _in_thread(fit: Callable[[], Any]) -> "Future[dict[str, str]]":
    """Fit in a daemon thread: the main thread hears signals, and does not wait for a cluster that hangs.

    Outside the main thread Ray installs no signal handler of its own, which would abort the workers unsaved. The result
    is what rank 0 returned.
    """
    future: Future[dict[str, str]] = Future()

    def act() -> None:
        try:
            future.set_result(fit().return_value)
        except BaseException as error:  # noqa: BLE001  # raised again in the main thread by Future.result
            future.set_exception(error)

    threading.Thread(target=act, name="ray-train", daemon=True).start()
    return future


Status = Literal["done", "stopped", "failed"]
_LOGGER = logging.getLogger(__name__)
_PREEMPTED = int(signal.SIGHUP)
"""How a notice reaches the training loop. Ranks take the highest number any of them saw: a person's SIGINT or
SIGTERM at the same time counts for more."""
_POLL_SECONDS = 0.5


class AttemptFailedError(CA2STError):
    """What a worker reports to Ray of its failure: text alone, since not every error survives the way to the driver."""


def train_on_worker(settings: dict[str, Any]) -> dict[str, str]:
    """Train as one worker, from its start to its end: Ray has set up the process group that Accelerate joins.

    `settings`: ``recipe`` and ``run_dir`` as in `Job`, ``folder`` of the launch. Returns ``status`` (see `Status`) and
    a ``message``, and the ``exit_code`` of a failure: a full disk keeps no record of it.

    Raises:
        AttemptFailedError: this attempt failed, another may not.
    """
    from ray import train
    from ray.train.collective import broadcast_from_rank_zero

    job, folder = Job(recipe=settings["recipe"], run_dir=settings["run_dir"]), LaunchFolder(Path(settings["folder"]))
    rank = train.get_context().get_world_rank()
    attempt, over = broadcast_from_rank_zero(_begin(folder) if rank == 0 else None)
    if over is not None:
        return _ended(over, "")
    faults = environment.fault_points(restart=(folder.run_dir / JOURNAL_NAME).exists()).on_rank(rank)
    try:
        folder.begin(attempt, rank=rank, node=node_name())  # fails on a node that joined later and shares no storage
        with watching(lambda: folder.stop_signal() or (_PREEMPTED if preemption_notice() else 0)) as stop:
            outcome = run(job, faults=faults, stop=stop)
    except RunStoppedError as error:
        asked = patient(folder.stop_signal)  # a worker that fails here is a failure to Ray, and ends all too early
        if not asked() and not isinstance(error, TimeUpError):
            if rank == 0:
                notice = preemption_notice()  # None: another rank has heard of it first
                node = "a node" if notice is None else f"node {', '.join(one[:8] for one in notice.preempted_node_ids)}"
                say(
                    f"{node} will be taken away: the state is saved; Ray starts the workers again when the notice has "
                    "run out"
                )
            hold(asked)
        return _ended("stopped", str(error))
    except Exception as error:  # noqa: BLE001  # put on record, then raised again or reported to the driver
        return _failed(error, folder, attempt=attempt, rank=rank)
    train.report({"steps": outcome.steps})
    return _ended("done", "")


def node_name() -> str:
    """Return host name and address of this node."""
    return f"{socket.gethostname()} ({ray_access.this_node().address})"


@contextlib.contextmanager
def watching(ask: Callable[[], int], *, poll_seconds: float = _POLL_SECONDS) -> Iterator[StopRequest]:
    """Ask every `poll_seconds` while the block runs; the first number that is not 0 becomes a stop request.

    An `ask` that fails (storage that does not answer) is logged once and asked again.
    """
    stop, ended, ask = StopRequest(), threading.Event(), patient(ask)

    def watch() -> None:
        while not ended.wait(poll_seconds):
            if number := ask():
                stop.request(number)
                return

    watcher = threading.Thread(target=watch, name="stop-watch", daemon=True)
    watcher.start()
    try:
        yield stop
    finally:
        ended.set()
        watcher.join()


def patient(ask: Callable[[], int]) -> Callable[[], int]:
    """Return `ask`, with 0 for an answer while it fails; the first failure is logged."""
    troubled = False

    def answer() -> int:
        nonlocal troubled
        try:
            return ask()
        except (OSError, ValueError) as error:
            if not troubled:
                _LOGGER.warning("cannot see whether to stop, trying again: %s", error)
            troubled = True
            return 0

    return answer


def hold(until: Callable[[], int], *, poll_seconds: float = _POLL_SECONDS) -> None:
    """Wait, the state being saved, for Ray to take this worker down: it does when the notice has run out.

    Ending before would not do: Ray counts a run whose workers return as finished and one whose workers fail as failed.
    Returns only when `until` says that a person asked to stop after all.
    """
    while not until():
        time.sleep(poll_seconds)


def preemption_notice() -> "PreemptionInfo | None":
    """Return Ray's notice that nodes of this worker group will be taken away, as this worker has it; None: none.

    Ray's public ``get_preemption_info`` waits for all ranks; a thread of one rank must not.
    """
    from ray.train.v2._internal.execution.context import get_train_context

    return get_train_context().preemption_context.preemption_info


def _begin(folder: LaunchFolder) -> tuple[int, Status | None]:
    """Return, as rank 0 decides for all, the number of this attempt and whether the launch is over already."""
    failure = read_failure(folder.run_dir)
    over: Status | None = None
    if failure is not None and failure.final and failure.launch == folder.name:
        over = "failed"
    elif folder.stop_signal():
        over = "stopped"
    return folder.num_attempts() + 1, over


def _failed(error: Exception, folder: LaunchFolder, *, attempt: int, rank: int) -> dict[str, str]:
    own = record_of(
        error,
        rank=rank,
        node=node_name(),
        attempt=attempt,
        launch=folder.name,
        before=read_failure(folder.run_dir),
    )
    kept = keep_failure(folder.run_dir, own)
    if own.final or (kept.final and kept.launch == own.launch and kept.attempt == attempt):
        if not own.echo:
            _LOGGER.error("%s", own)
        return _ended("failed", str(kept)) | {"exit_code": str(kept.exit_code)}
    raise AttemptFailedError(str(kept)) from error


def _ended(status: Status, message: str) -> dict[str, str]:
    return {"status": status, "message": message}
