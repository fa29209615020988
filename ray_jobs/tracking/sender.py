"""Sends what MLflow does not have yet: the journal's numbers, the nodes' system metrics, the run's extras.

The journal is the truth; what was sent is remembered beside it, so a follower that was killed, or a server that was
down, costs nothing but time. One MLflow run stands for a training run through all its attempts; a step is sent once,
whichever attempt made it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ca2st.training.journal import JOURNAL_NAME
from ray_jobs.redaction import redacted
from ray_jobs.runs.node_metrics import SystemLine, node_files
from ray_jobs.tracking.artefacts import AT_BEGIN, AT_END, send_extra
from ray_jobs.tracking.client import StoreError, knock, open_client, reachable, whole_uri
from ray_jobs.tracking.events import (
    Progress,
    TrackingState,
    Value,
    begin_milliseconds,
    milliseconds,
    one_sender,
    read_batches,
    read_state,
    separate_copy,
    step_values,
    system_values,
    unsent_bytes,
    write_progress,
)
from ray_jobs.tracking.run_record import MetricWriter, Say, create_run, is_gone, log_tags, update_params

if TYPE_CHECKING:
    from mlflow import MlflowClient

EXIT_TAG, ERROR_TAG, ATTEMPT_TAG = "ca2st.exit_status", "ca2st.error", "ca2st.attempt"
_STATUSES = {"done": "FINISHED", "stopped": "KILLED"}
_MAY_BE_GONE = frozenset({"RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE", "INVALID_STATE"})


class Sender:
    """Sends one run, again and again."""

    def __init__(self, run_dir: Path, say: Say, *, is_asked_to_end: Callable[[], bool] = lambda: False) -> None:
        """`is_asked_to_end`: asked between the pieces; once it is true the rest stays for another time."""
        self._run_dir = run_dir
        self._say = say
        self._is_asked_to_end = is_asked_to_end
        self._is_unwell = False
        self._tried: set[str] = set()
        self._metrics = MetricWriter(say)

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
            what_to_do = f"the journal keeps everything: rerun `ca2st track sync {self._run_dir}`"
            was_unwell, self._is_unwell = self._is_unwell, True
            if was_unwell:
                knock(uri, what_to_do)
            try:
                with reachable(uri, what_to_do):
                    sent = self._send_to(open_client(uri), state, is_last=is_last, looks=looks)
            except StoreError as error:
                if error.complaint.kind == "rejected":
                    knock(uri, what_to_do)  # MLflow's client hides the status of an answer that is not MLflow's own
                raise
            self._is_unwell = False
            return sent

    def send_again(self, names: Sequence[str], *, wait_seconds: float = 0.0) -> None:
        """Send extras once more that have changed since, and whatever else is missing; raises as `send`."""
        with one_sender(self._run_dir, wait_seconds=wait_seconds):
            progress = read_state(self._run_dir).progress
            pending = tuple(dict.fromkeys((*progress.pending, *names)))
            write_progress(self._run_dir, replace(progress, pending=pending))
        self.send(wait_seconds=wait_seconds)

    def _has_news(self, progress: Progress, *, is_last: bool) -> bool:
        """Whether there is anything to send: a follower mostly waits, and must not ask MLflow for that."""
        if unsent_bytes(self._run_dir):
            return True
        if progress.run_id is None:
            return False
        sizes = {path.name: path.stat().st_size for path in self._system_files()}
        has_system = any(size > progress.system_bytes.get(name, 0) for name, size in sizes.items())
        return has_system or any(is_last or name not in self._tried for name in progress.pending)

    def _system_files(self) -> list[Path]:
        return list(node_files(self._run_dir).values())

    def _send_to(self, client: "MlflowClient", state: TrackingState, *, is_last: bool, looks: bool) -> int:
        from mlflow.exceptions import MlflowException

        old = state.run_id
        if not (looks and old is not None and is_gone(client, old)):
            try:
                return self._send_all(client, state, is_last=is_last)
            except MlflowException as error:
                old = read_state(self._run_dir).run_id
                if old is None or error.error_code not in _MAY_BE_GONE or not is_gone(client, old):
                    raise
        self._say(f"MLflow has no run {old} any more: a new run gets the journal from its start")
        return self._send_all(client, replace(state, progress=Progress(run_id=old)), is_last=is_last, anew=True)

    def _send_all(self, client: "MlflowClient", state: TrackingState, *, is_last: bool, anew: bool = False) -> int:
        progress, run_id = state.progress, state.run_id
        if run_id is None or anew:
            run_id = create_run(client, state, self._say, begun=begin_milliseconds(self._run_dir / JOURNAL_NAME))
            progress = Progress(run_id=run_id, params=state.params, pending=AT_BEGIN)
            self._tried.clear()
            write_progress(self._run_dir, progress)
        sent, progress = self._send_journal(client, run_id, progress, state)
        num_system, progress = self._send_system(client, run_id, progress)
        self._send_extras(client, run_id, progress, is_last=is_last)
        return sent + num_system

    def _send_journal(
        self, client: "MlflowClient", run_id: str, progress: Progress, state: TrackingState
    ) -> tuple[int, Progress]:
        sent = 0
        for events, end_offset in read_batches(self._run_dir / JOURNAL_NAME, progress.sent_bytes):
            progress, values = _new_values(events, progress)
            sent += self._metrics.write(client, run_id, values)
            for event in events:
                progress = self._follow_event(client, run_id, event, progress, state)
            progress = replace(progress, sent_bytes=end_offset)
            write_progress(self._run_dir, progress)
            if self._is_asked_to_end():
                break
        return sent, progress

    def _send_system(self, client: "MlflowClient", run_id: str, progress: Progress) -> tuple[int, Progress]:
        sent = 0
        for path in self._system_files():
            for lines, end_offset in read_batches(path, progress.system_bytes.get(path.name, 0), kind=SystemLine):
                values = [value for line in lines for value in system_values(line, path.stem)]
                sent += self._metrics.write(client, run_id, values)
                progress = replace(progress, system_bytes={**progress.system_bytes, path.name: end_offset})
                write_progress(self._run_dir, progress)
                if self._is_asked_to_end():
                    return sent, progress
        return sent, progress

    def _send_extras(self, client: "MlflowClient", run_id: str, progress: Progress, *, is_last: bool) -> None:
        """Each once a process, and again when asked for the last time."""
        names = [name for name in progress.pending if is_last or name not in self._tried]
        for name in names:
            if self._is_asked_to_end():
                return
            self._tried.add(name)
            if send_extra(name, client=client, run_id=run_id, run_dir=self._run_dir, say=self._say):
                pending = tuple(other for other in progress.pending if other != name)
                progress = replace(progress, pending=pending)
                write_progress(self._run_dir, progress)

    def _follow_event(
        self, client: "MlflowClient", run_id: str, event: Mapping[str, Any], progress: Progress, state: TrackingState
    ) -> Progress:
        """Status, tags and extras that an attempt's start and end bring."""
        if event["event"] == "start":
            attempt = event["attempt"]
            client.update_run(run_id, status="RUNNING")
            tags = {ATTEMPT_TAG: str(attempt), EXIT_TAG: "running"}
            log_tags(client, run_id, tags if attempt == 1 else {**state.tags, **tags}, self._say)
            if progress.params != state.params:
                update_params(client, run_id, progress.params, state.params, attempt=attempt, say=self._say)
            return replace(progress, params=state.params, attempt=max(progress.attempt, attempt))
        if event["event"] == "end" and event["attempt"] >= progress.attempt:  # a lost node may end after its successor
            status = event["status"]
            tags = {EXIT_TAG: status} | ({ERROR_TAG: redacted(event["error"])} if event.get("error") else {})
            log_tags(client, run_id, tags, self._say)
            client.set_terminated(run_id, status=_STATUSES.get(status, "FAILED"), end_time=milliseconds(event))
            if status == "done":
                self._tried.difference_update(AT_END)
                return replace(progress, pending=tuple(dict.fromkeys((*progress.pending, *AT_END))))
        return progress


def _new_values(events: Sequence[Mapping[str, Any]], progress: Progress) -> tuple[Progress, list[Value]]:
    """What of `events` MLflow does not have from an earlier attempt, and how far it is then."""
    values: list[Value] = []
    last_step, last_evals = progress.last_step, dict(progress.last_evals)
    for event in events:
        if event["event"] == "step" and event["step"] > last_step:
            values += step_values(event)
            last_step = event["step"]
        elif event["event"] == "start":
            values += step_values(event)
        elif event["event"] == "eval" and event["step"] > last_evals.get(event["split"], -1):
            values += step_values(event)
            last_evals[event["split"]] = event["step"]
    return replace(progress, last_step=last_step, last_evals=last_evals), values
