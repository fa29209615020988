"""Sends what MLflow does not have yet: the journal's numbers, the nodes' system metrics, the run's extras.

The journal is the truth; what was sent is remembered beside it, so a follower that was killed, or a server that was
down, costs nothing but time. One MLflow run stands for a training run through all its attempts; a step is sent once,
whichever attempt made it.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ca2st.errors import CA2STError, UserInputError
from ca2st.training.journal import JOURNAL_NAME, parse_event, read_events, run_sequence
from ray_jobs.errors import TrackingUnavailableError
from ray_jobs.redaction import redacted
from ray_jobs.runs.node_metrics import SystemLine, node_files
from ray_jobs.tracking import run_record
from ray_jobs.tracking.artefacts import log_artefacts, log_inputs
from ray_jobs.tracking.client import Say, StoreError, check_health, open_client, reachable, whole_uri
from ray_jobs.tracking.models import register
from ray_jobs.tracking.state import (
    FOLDER_TAG,
    HOST_TAG,
    Progress,
    TrackingState,
    is_alive,
    one_sender,
    read_state,
    separate_copy,
    sync_command,
    unsent_bytes,
    write_progress,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

EXIT_TAG, ERROR_TAG, ATTEMPT_TAG = "ca2st.exit_status", "ca2st.error", "ca2st.attempt"
EXTRAS: dict[str, Callable[["MlflowClient", str, Path], None]] = {
    "inputs": log_inputs,
    "artefacts": log_artefacts,
    "registered_model": register,
}
"""What a run has in MLflow beside its numbers, each sent by itself: one that fails costs no other."""
_AT_BEGIN, _AT_END = ("inputs",), ("artefacts", "registered_model")
_STATUSES = {"done": "FINISHED", "stopped": "KILLED"}
_MAY_BE_GONE = frozenset({"RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE", "INVALID_STATE"})
_MOST_ORPHANS = 200
_BATCH_VALUES = 500  # MLflow takes at most 1000 metrics per call


class Sender:
    """Sends one run, again and again."""

    def __init__(self, run_dir: Path, say: Say, *, is_asked_to_end: Callable[[], bool] = lambda: False) -> None:
        """`is_asked_to_end`: asked between the pieces; once it is true the rest stays for another time."""
        self._run_dir = run_dir
        self._say = say
        self._is_asked_to_end = is_asked_to_end
        self._is_unwell = False
        self._tried: set[str] = set()
        self._metrics = run_record.MetricWriter(say)
        self._progress = Progress()

    def send(self, *, wait_seconds: float = 0.0, is_last: bool = True, look: bool = False) -> int:
        """Send what MLflow lacks; returns the number of metric values sent.

        `wait_seconds`: for another sender of this run to end. `is_last`: extras that failed before are tried again.
        `look`: even without news make sure that MLflow still has the run, which somebody may have deleted.

        Raises:
            TrackingUnavailableError: the store or another sender stands in the way; sending later loses nothing.
        """
        with one_sender(self._run_dir, wait_seconds=wait_seconds):
            if (origin := separate_copy(self._run_dir)) is not None:
                self._say(f"{self._run_dir} was copied from {origin}: in MLflow it is a run of its own")
            state = read_state(self._run_dir)
            looks = look and state.run_id is not None
            if not looks and not self._has_news(state.progress, is_last=is_last):
                return 0  # a run that ends before its first line would stay RUNNING for ever
            uri = whole_uri(state.uri, self._run_dir.parent)
            what_to_do = f"the journal keeps everything: rerun `{sync_command(self._run_dir)}`"
            was_unwell, self._is_unwell = self._is_unwell, True
            if was_unwell:
                check_health(uri, what_to_do)
            try:
                with reachable(uri, what_to_do):
                    sent = self._send_to(open_client(uri), state, is_last=is_last, looks=looks)
            except StoreError as error:
                if error.complaint.kind == "rejected":
                    check_health(uri, what_to_do)  # MLflow's client hides the status of an answer that is not its own
                raise
            self._is_unwell = False
            return sent

    def send_again(self, names: Sequence[str], *, wait_seconds: float = 0.0) -> None:
        """Send extras once more that have changed since, and whatever else is missing; raises as `send`."""
        with one_sender(self._run_dir, wait_seconds=wait_seconds):
            self._progress = read_state(self._run_dir).progress
            self._keep(pending=tuple(dict.fromkeys((*self._progress.pending, *names))))
        self.send(wait_seconds=wait_seconds)

    def _has_news(self, progress: Progress, *, is_last: bool) -> bool:
        """Return whether there is anything to send: a follower mostly waits, and must not ask MLflow for that."""
        if unsent_bytes(self._run_dir):
            return True
        if progress.run_id is None:
            return False
        files = node_files(self._run_dir).values()
        has_system = any(path.stat().st_size > progress.system_bytes.get(path.name, 0) for path in files)
        return has_system or any(is_last or name not in self._tried for name in progress.pending)

    def _send_to(self, client: "MlflowClient", state: TrackingState, *, is_last: bool, looks: bool) -> int:
        from mlflow.exceptions import MlflowException

        self._progress = state.progress
        old = state.run_id
        if not (looks and old is not None and run_record.is_gone(client, old)):
            try:
                return self._send_all(client, state, is_last=is_last)
            except MlflowException as error:
                old = self._progress.run_id
                if old is None or error.error_code not in _MAY_BE_GONE or not run_record.is_gone(client, old):
                    raise
        self._say(f"MLflow has no run {old} any more: a new run gets the journal from its start")
        self._progress = Progress()
        return self._send_all(client, replace(state, progress=Progress(run_id=old)), is_last=is_last)

    def _send_all(self, client: "MlflowClient", state: TrackingState, *, is_last: bool) -> int:
        run_id = self._progress.run_id
        if run_id is None:
            begun = begin_milliseconds(self._run_dir / JOURNAL_NAME)
            run_id, experiment_id = run_record.create_run(client, state, self._say, begun=begun)
            self._tried.clear()
            self._progress = Progress()
            self._keep(run_id=run_id, experiment_id=experiment_id, params=state.params, pending=_AT_BEGIN)
        sent = self._send_journal(client, run_id, state) + self._send_system(client, run_id)
        self._send_extras(client, run_id, is_last=is_last)
        return sent

    def _keep(self, **changes: Any) -> None:
        """Change what is known of MLflow's part, and keep it."""
        self._progress = replace(self._progress, **changes)
        write_progress(self._run_dir, self._progress)

    def _send_journal(self, client: "MlflowClient", run_id: str, state: TrackingState) -> int:
        sent = 0
        for events, end_offset in read_batches(self._run_dir / JOURNAL_NAME, self._progress.sent_bytes):
            self._progress, values = _new_values(events, self._progress)
            sent += self._metrics.write(client, run_id, values)
            for event in events:
                self._follow_event(client, run_id, event, state)
            self._keep(sent_bytes=end_offset)
            if self._is_asked_to_end():
                break
        return sent

    def _send_system(self, client: "MlflowClient", run_id: str) -> int:
        sent = 0
        for path in node_files(self._run_dir).values():
            done = self._progress.system_bytes.get(path.name, 0)
            for lines, end_offset in read_batches(path, done, kind=SystemLine):
                values = [value for line in lines for value in run_record.system_values(line, path.stem)]
                sent += self._metrics.write(client, run_id, values)
                self._keep(system_bytes={**self._progress.system_bytes, path.name: end_offset})
                if self._is_asked_to_end():
                    return sent
        return sent

    def _send_extras(self, client: "MlflowClient", run_id: str, *, is_last: bool) -> None:
        """Send each once per process, and again when asked for the last time."""
        for name in [name for name in self._progress.pending if is_last or name not in self._tried]:
            if self._is_asked_to_end():
                return
            self._tried.add(name)
            try:
                EXTRAS[name](client, run_id, self._run_dir)
            except Exception as error:  # noqa: BLE001  # whatever it is, it must not cost the run its metrics
                why = f"{type(error).__name__}: {redacted(str(error))}"
                self._say(f"{name}: not sent ({why}); `ca2st track sync` tries again")
            else:
                self._keep(pending=tuple(other for other in self._progress.pending if other != name))

    def _follow_event(
        self, client: "MlflowClient", run_id: str, event: Mapping[str, Any], state: TrackingState
    ) -> None:
        """Set the status, tags and extras that an attempt's start and end bring."""
        progress = self._progress
        if event["event"] == "start":
            attempt = event["attempt"]
            client.update_run(run_id, status="RUNNING")
            tags = {ATTEMPT_TAG: str(attempt), EXIT_TAG: "running"}
            run_record.log_tags(client, run_id, tags if attempt == 1 else {**state.tags, **tags}, self._say)
            if progress.params != state.params:
                run_record.update_params(client, run_id, progress.params, state.params, attempt=attempt, say=self._say)
            self._progress = replace(progress, params=state.params, attempt=max(progress.attempt, attempt))
        elif event["event"] == "end" and event["attempt"] >= progress.attempt:
            # A lost node may end after its successor: an older attempt's end counts for nothing.
            status = event["status"]
            tags = {EXIT_TAG: status} | ({ERROR_TAG: redacted(event["error"])} if event.get("error") else {})
            run_record.log_tags(client, run_id, tags, self._say)
            client.set_terminated(
                run_id, status=_STATUSES.get(status, "FAILED"), end_time=run_record.milliseconds(event)
            )
            if status == "done":
                self._metrics.write(
                    client, run_id, list(run_record.mean_values(run_sequence(self._run_dir / JOURNAL_NAME), event))
                )
                self._tried.difference_update(_AT_END)
                self._progress = replace(progress, pending=tuple(dict.fromkeys((*progress.pending, *_AT_END))))


def end_orphans(
    run_dir: Path, *, host: str, say: Say, is_asked_to_end: Callable[[], bool] = lambda: False
) -> list[str]:
    """Send the rest of each orphan in the experiment of `run_dir`'s run and end it as KILLED; returns their ids.

    Orphans are runs that MLflow believes to be running although everything that trained them was killed. Only a run of
    this machine is touched, whose folder is here and belongs to that very run, and in whose folder neither a training
    nor a follower holds its lock. When such a run is resumed it is RUNNING again, in the same MLflow run.

    Once `is_asked_to_end` is true the others, and the one in work, are left for the next start.

    Raises:
        TrackingUnavailableError: the store cannot be reached.
    """
    state = read_state(run_dir)
    if state.run_id is None:
        return []
    uri = whole_uri(state.uri, run_dir.parent)
    with reachable(uri, "start a run"):
        client = open_client(uri)
        experiment_id = client.get_run(state.run_id).info.experiment_id
        running = f"attributes.status = 'RUNNING' and tags.`{HOST_TAG}` = '{host}'"
        found = client.search_runs([experiment_id], running, max_results=_MOST_ORPHANS)
        others = [run for run in found if run.info.run_id != state.run_id]
        return [run.info.run_id for run in others if not is_asked_to_end() and _end(client, run, say, is_asked_to_end)]


def _end(client: "MlflowClient", run: "Run", say: Say, is_asked_to_end: Callable[[], bool]) -> bool:
    run_id, folder = run.info.run_id, Path(run.data.tags.get(FOLDER_TAG, ""))
    try:
        if not folder.is_absolute() or read_state(folder).run_id != run_id or is_alive(folder):
            return False
        with contextlib.suppress(TrackingUnavailableError):  # what cannot be sent stays in its journal
            Sender(folder, say, is_asked_to_end=is_asked_to_end).send()
        if is_asked_to_end():  # a part may be missing still
            return False
        with one_sender(folder, wait_seconds=0.0):
            if is_alive(folder) or client.get_run(run_id).info.status != "RUNNING":
                return False
            client.set_tag(run_id, EXIT_TAG, "killed")
            journal = folder / JOURNAL_NAME
            last_line = int(journal.stat().st_mtime * 1000) if journal.exists() else None
            client.set_terminated(run_id, status="KILLED", end_time=last_line)
    except (UserInputError, TrackingUnavailableError):  # no folder of ours here, or somebody is sending it
        return False
    except (CA2STError, OSError, ValueError, TypeError, KeyError) as error:  # of another version or user, damaged
        say(f"run {run_id} of {folder} seems to be killed, but is left as it is: {type(error).__name__}: {error}")
        return False
    say(f"run {run_id} of {folder} was killed without an end: it is KILLED in MLflow now, until it is resumed")
    return True


def _new_values(events: Sequence[Mapping[str, Any]], progress: Progress) -> tuple[Progress, list[run_record.Value]]:
    """Return how far MLflow is with `events`, and what of them it does not have from an earlier attempt."""
    values: list[run_record.Value] = []
    last_step, last_evals = progress.last_step, dict(progress.last_evals)
    for event in events:
        if event["event"] == "step" and event["step"] > last_step:
            values += run_record.step_values(event)
            last_step = event["step"]
        elif event["event"] == "start":
            values += run_record.step_values(event)
        elif event["event"] == "eval" and event["step"] > last_evals.get(event["split"], -1):
            values += run_record.step_values(event)
            last_evals[event["split"]] = event["step"]
    return replace(progress, last_step=last_step, last_evals=last_evals), values


def read_batches(path: Path, offset: int, *, kind: type | None = None) -> Iterator[tuple[list[dict[str, Any]], int]]:
    """Yield whole lines behind `offset`, in batches small enough for one call, with the offset behind each.

    Damaged lines are left out with a warning; `kind` as for `parse_event`.
    """
    if not path.exists():
        return
    batch: list[dict[str, Any]] = []
    num_values, begin = 0, offset
    with path.open("rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                break
            event = parse_event(line, where=f"{path}: line at byte {offset}", kind=kind)
            if event is None:
                offset += len(line)
                continue
            size = len(event) + sum(len(value) for value in event.values() if isinstance(value, dict))
            if batch and num_values + size > _BATCH_VALUES:
                yield batch, offset
                batch, num_values, begin = [], 0, offset
            batch.append(event)
            num_values += size
            offset += len(line)
    if batch or offset > begin:
        yield batch, offset


def begin_milliseconds(journal: Path) -> int | None:
    """Return when the first line was written, since 1970; None while there is no whole one."""
    first = next(read_events(journal), None)
    return None if first is None else run_record.milliseconds(first)
