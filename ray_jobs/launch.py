"""Start a training here: in this process, in several processes of this machine, under Ray, or as a rank of torchrun.

Whatever the way, the workers run the same function (`ray_jobs.runs.worker.run`), the run folder is the only owner of
checkpoints, and calling `launch` again with the same recipe resumes.
"""

import json
import multiprocessing.connection
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Iterator, MutableSequence, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NoReturn

import torch

from ca2st.durable import FaultPoints, write_bytes
from ca2st.errors import CA2STError, NumericError, UserInputError
from ca2st.processes import SPAWN, STOPPING, die_with_parent, signals_held
from ca2st.training.errors import RunStoppedError, StopNotSavedError
from ca2st.training.journal import JOURNAL_NAME, LAUNCH_LOCK_NAME, locked, run_sequence, share_right
from ca2st.training.optim import REFERENCE_BATCH
from ca2st.training.ranks import Ranks
from ca2st.training.resume import RECIPE_FILE
from ca2st.training.step import make_accelerator
from pipelines.augment.config import AugmentConfig
from pipelines.order.selection import BalanceConfig
from ray_jobs import environment
from ray_jobs.config.recipe import Recipe, recipe_document
from ray_jobs.console import say, show_log
from ray_jobs.errors import WorkerFailedError
from ray_jobs.runs import failures
from ray_jobs.runs.worker import Job, Outcome, finished, prepare, read_outcome, run, use_cpu_threads
from ray_jobs.tracking.following import followed

OVERFIT_STEPS = 400
OVERFIT_SHARE = 0.95
_OVERFIT_PEAK, _OVERFIT_WIDTH = 1e-3, 768
"""Peak rate of a model of this width; narrower ones take more."""


def overfitting(recipe: Recipe, num_clips: int) -> Recipe:
    """Return the sanity run of a recipe: learn `num_clips` of its clips by heart, in at most 400 steps of all of them.

    Data, model, experts and what trains are the recipe's. Whatever makes learning harder is off: augmentation, mixing,
    label smoothing, DropPath, weight decay, layer decay. Shards of a validation split are left out.

    Raises:
        UserInputError: less than one clip.
    """
    if num_clips < 1:
        raise UserInputError(f"--overfit: expected at least 1 clip, found {num_clips}")
    training, optim, data = recipe.training, recipe.optim, recipe.data
    base_lr = _OVERFIT_PEAK * (_OVERFIT_WIDTH / recipe.model.dim) ** 0.5 * REFERENCE_BATCH / num_clips
    return replace(
        recipe,
        name=f"{recipe.name}-overfit-{num_clips}",
        model=replace(recipe.model, drop_path_rate=0.0),
        data=replace(
            data,
            select=replace(data.select, limit=num_clips),
            balance=BalanceConfig(),
            repeats=1,
            epoch_samples=None,
            remainder="drop",
            augment=AugmentConfig(crop_area=(1.0, 1.0), flip_probability=0.0),
            validation=None,
        ),
        optim=replace(
            optim,
            base_lr=base_lr,
            min_lr=base_lr / 100,
            warmup_epochs=10.0,
            weight_decay=0.0,
            layer_decay=1.0,
            label_smoothing=0.0,
            clip_grad_norm=1.0,
        ),
        training=replace(
            training,
            epochs=OVERFIT_STEPS,
            max_steps=None,
            global_batch_size=num_clips,
            per_device_batch_size=min(num_clips, training.per_device_batch_size),
            validate_every_epochs=0,
            validate_every_steps=None,
            early_stopping=None,
            stop_at=None,
            stop_at_fit=OVERFIT_SHARE,
            ema_decay=None,
            keep_checkpoints=1,
            checkpoint_every_steps=OVERFIT_STEPS,
        ),
        tracking=replace(recipe.tracking, register_model=False),
    )


def check_overfit(run_dir: Path) -> float:
    """Return the share of its clips that a run of `overfitting` answered right in its last step.

    Raises:
        NumericError: it did not learn them by heart.
    """
    last = run_sequence(run_dir / JOURNAL_NAME)[-1]
    share = share_right(last)
    if share < OVERFIT_SHARE:
        raise NumericError(
            f"{run_dir}: expected {OVERFIT_SHARE:.0%} of the clips learned by heart after {last['step']} steps, found "
            f"{share:.0%} with loss {last['loss']:.4f}; look at the labels, what trains (trainable) and the experts "
            "before training for longer"
        )
    return share


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
    if (ranks := environment.launched_ranks()) is not None:
        return _launch_on_rank(recipe, run_dir, faults=faults, rank=ranks[0], world_size=ranks[1])
    with _prepared(recipe, run_dir) as (recipe, job, tracked):
        if isinstance(job, Outcome):
            with tracked:  # what MLflow lacks is sent
                return job
        if ray_address is not None:
            from ray_jobs.cluster.driver import joined
            from ray_jobs.cluster.ray_access import found_access

            access = found_access(accept_open=accept_open_ray)
            with joined(recipe, run_dir, ray_address, access=access) as fleet, tracked:
                return fleet.train()
        with tracked:
            if recipe.launch.workers == 1:
                return run(job, faults=faults)
            refuse_more_workers_than_gpus(recipe.launch.workers, torch.cuda.device_count())
            return run_processes(job, recipe.launch.workers, faults)


@contextmanager
def _prepared(recipe: Recipe, run_dir: Path) -> Iterator[tuple[Recipe, Job | Outcome, AbstractContextManager[None]]]:
    """Check everything, hold the folder and write the recipe there.

    Gives the recipe with public names as files, what is to be run (the outcome where nothing is left), and the
    follower, which is to be entered around the run.
    """
    ready = prepare(recipe, run_dir, environment.hub_access())
    document = recipe_document(ready.recipe)
    with locked(run_dir, name=LAUNCH_LOCK_NAME):
        write_bytes(run_dir / RECIPE_FILE, (json.dumps(document, indent=1) + "\n").encode())
        job = finished(ready, run_dir) or Job(recipe=document, run_dir=str(run_dir.resolve()))
        yield ready.recipe, job, followed(ready.recipe, run_dir, ready.data)


def refuse_more_workers_than_gpus(num_workers: int, num_gpus: int) -> None:
    """Refuse workers that would share a GPU, before any is started: NCCL refuses it minutes later, in its own words.

    Raises:
        UserInputError: this machine has GPUs, and fewer than `num_workers`.
    """
    if 0 < num_gpus < num_workers:
        raise UserInputError(
            f"launch.workers = {num_workers}: expected at most one worker per GPU, found {num_gpus} of them here; "
            f"use --workers {num_gpus}, or CUDA_VISIBLE_DEVICES= to train on the processor"
        )


_LAST_WORDS_SECONDS = 5.0
"""What the others get to end by themselves once a worker has failed: they may be stuck waiting for it for ever."""
_SAVING_SECONDS = 30.0
"""The same once one has ended because the run was asked to stop."""
_STOPPED = tuple(128 + number for number in STOPPING)


def _launch_on_rank(recipe: Recipe, run_dir: Path, *, faults: FaultPoints, rank: int, world_size: int) -> Outcome:
    """Train as one of the processes that torchrun, or a launcher that sets the same variables, has started.

    The first rank checks everything, holds the folder and follows the run; the others hear from it what to run.

    Raises:
        UserInputError: the recipe asks for another number of workers; and as `launch`, on the first rank.
        PeerFailedError: another rank failed.
    """
    if recipe.launch.workers not in (1, world_size):
        raise UserInputError(
            f"launch.workers: expected the {world_size} processes that torchrun started, found "
            f"{recipe.launch.workers}; leave --workers out"
        )
    recipe = replace(recipe, launch=replace(recipe.launch, workers=world_size))
    accelerator = make_accelerator(recipe.training, cpu=use_cpu_threads(recipe))
    with ExitStack() as stack:

        def begin() -> Job | Outcome:
            _, job, tracked = stack.enter_context(_prepared(recipe, run_dir))
            stack.enter_context(tracked)
            return job

        begun = Ranks(accelerator).on_main(begin)
        if isinstance(begun, Outcome):
            accelerator.end_training()
            return begun
        return run(begun, faults=faults.on_rank(rank))


def run_processes(job: Job, num_workers: int, faults: FaultPoints) -> Outcome:
    """Train in `num_workers` processes of this machine; SIGINT and SIGTERM are passed on to them.

    When one fails the others are ended within seconds, and the first failure is reported, with its rank.

    Raises:
        WorkerFailedError: a worker process failed, with its exit code.
    """
    # torch.distributed.launcher's elastic_launch was tried and does not pass the tests of failing and stopping: after a
    # failure it asks the other ranks to save (SIGTERM) and waits 30 s; a stop loses its exit code and message; workers
    # run the caller's main script, and live on when the launcher is killed.
    launch = f"local-{os.getpid()}-{time.time_ns()}"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    stop_told, tell_stop = SPAWN.Pipe(duplex=False)
    begun = SPAWN.RawArray("b", num_workers)
    workers: list[BaseProcess] = [
        SPAWN.Process(
            target=_worker_process,
            args=(rank, job, num_workers, port, faults, launch),
            kwargs={"begun": begun, "tell_stop": tell_stop if rank == 0 else None},
            name=f"rank {rank}",
        )
        for rank in range(num_workers)
    ]
    with ExitStack() as stack:
        ended_unbegun = stack.enter_context(signals_to(workers, begun))
        with signals_held():
            for worker in workers:
                worker.start()
        tell_stop.close()
        failed = ended_badly(workers)
    if ended_unbegun:
        number = ended_unbegun[0]
        raise WorkerFailedError(f"stopped by signal {number} before it had begun; rerun to resume", 128 + number)
    if failed is not None:
        code = shell_exit_code(workers[failed])
        raise how_it_stopped(stop_told, code) or _failure(Path(job.run_dir), launch, rank=failed, exit_code=code)
    return read_outcome(Path(job.run_dir))


def ended_badly(workers: Sequence[BaseProcess]) -> int | None:
    """Wait until all workers have ended; returns the rank that is to blame where not all ended well.

    Once one fails the others have seconds to end by themselves (longer after a request to stop: they save). A SIGTERM
    would not reach one that is stuck in an exchange, nor one that is stopped: what is left then is killed. To blame is
    who was ended by a signal, since that cuts the connections of the others, else who failed first.
    """
    running: dict[object, int] = {worker.sentinel: rank for rank, worker in enumerate(workers)}
    failed: list[int] = []
    deadline: float | None = None
    while running and (deadline is None or time.monotonic() < deadline):
        wait = None if deadline is None else max(0.0, deadline - time.monotonic())
        sentinels = [workers[rank].sentinel for rank in running.values()]
        for sentinel in multiprocessing.connection.wait(sentinels, wait):
            rank = running.pop(sentinel)
            workers[rank].join()
            if (code := shell_exit_code(workers[rank])) != 0:
                failed.append(rank)
                deadline = deadline or time.monotonic() + (_SAVING_SECONDS if code in _STOPPED else _LAST_WORDS_SECONDS)
    for rank in running.values():
        workers[rank].kill()
        workers[rank].join()
    signalled = [rank for rank in failed if (workers[rank].exitcode or 0) < 0]
    return next(iter(signalled or failed), None)


def shell_exit_code(worker: BaseProcess) -> int:
    """As a shell has it: 128 + n for signal n."""
    assert worker.exitcode is not None  # it has been joined
    return worker.exitcode if worker.exitcode >= 0 else 128 - worker.exitcode


def how_it_stopped(told: Connection, exit_code: int) -> WorkerFailedError | None:
    """Return what rank 0 said when a request to stop ended it with `exit_code`; None where it said nothing."""
    try:
        message, code = told.recv() if told.poll() else ("", None)
    except (EOFError, OSError):  # it ended without a word
        return None
    return WorkerFailedError(message, exit_code) if code == exit_code else None


def _failure(run_dir: Path, launch: str, *, rank: int, exit_code: int) -> WorkerFailedError:
    """Return why a launch failed: it was stopped, the failure that came first, or what a signal means."""
    if exit_code in _STOPPED:
        return WorkerFailedError(
            f"stopped by signal {exit_code - 128} before it had saved; the newest checkpoint counts; rerun to resume",
            exit_code,
        )
    record = failures.read_failure(run_dir)
    record = record if record is not None and record.launch == launch else None
    if record is not None and (not record.echo or exit_code < 128):  # nobody died, and nobody knows more than the first
        return WorkerFailedError(
            f"first failure, on rank {record.rank}: {record.kind}: {record.message}", record.exit_code
        )
    death = failures.death_of(rank, exit_code)
    _record(rank, death, run_dir, launch)
    return death


def _worker_process(
    rank: int,
    job: Job,
    world_size: int,
    port: int,
    faults: FaultPoints,
    launch: str,
    *,
    begun: MutableSequence[int],
    tell_stop: Connection | None,
) -> None:
    die_with_parent()
    take_signals()
    begun[rank] = 1
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    if rank == 0:
        show_log()
    try:
        run(job, faults=faults.on_rank(rank))
    except (RunStoppedError, StopNotSavedError) as error:  # the same on every rank: the parent says it once
        if tell_stop is not None:
            tell_stop.send((failures.message_of(error), error.exit_code))
        end_at_once(error.exit_code)
    except Exception as error:  # noqa: BLE001  # on record for the parent; a fault of ours with its stack
        _record(rank, error, Path(job.run_dir), launch)
        code = error.exit_code if isinstance(error, CA2STError) else None
        if not failures.is_echo(error):
            if code is None:
                traceback.print_exc()
            say(f"error (rank {rank}): {type(error).__name__}: {error}")
        end_at_once(CA2STError.exit_code if code is None else code)  # libraries' ends may wait for other ranks


def _record(rank: int, error: Exception, run_dir: Path, launch: str) -> None:
    failures.keep_failure(
        run_dir, failures.record_of(error, rank=rank, node=socket.gethostname(), attempt=1, launch=launch)
    )


def end_at_once(exit_code: int) -> NoReturn:
    """End this process as it is: no thread or connection is waited for."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


def take_signals() -> None:
    """In a worker: until there is something to save, a signal ends it at once, and its parent says so."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)


@contextmanager
def signals_to(workers: Sequence[BaseProcess], begun: Sequence[int]) -> Iterator[list[int]]:
    """Pass SIGINT and SIGTERM on to the workers, which checkpoint and end; this process waits for them.

    A worker that has not `begun` hears no signal yet and is killed. Gives the signals for which that was done.
    """
    ended_unbegun: list[int] = []

    def forward(number: int, _frame: object) -> None:
        for worker, has_begun in zip(workers, begun, strict=True):
            if worker.pid is None:
                continue
            if not has_begun:
                ended_unbegun.append(number)
            with suppress(ProcessLookupError):  # ended already
                os.kill(worker.pid, number if has_begun else signal.SIGKILL)

    previous = {number: signal.signal(number, forward) for number in STOPPING}
    try:
        yield ended_unbegun
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
