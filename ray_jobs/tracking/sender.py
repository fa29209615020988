"""Sends what MLflow does not have yet: the journal's numbers, the nodes' system metrics, the run's extras.

The journal is the truth; what was sent is remembered beside it, so a follower that was killed, or a server that was
down, costs nothing but time. One MLflow run stands for a training run through all its attempts; a step is sent once,
whichever attempt made it.

Beside the `Sender`, which a follower uses again and again, is what a person or the program asks of a run: send the rest
of it (`sync`), add numbers that no journal holds (`log_metrics`), read them back (`read_metrics`).
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ca2st.errors import UserInputError
from ca2st.training.journal import JOURNAL_NAME, parse_event, read_events, run_sequence
from ray_jobs import console
from ray_jobs.redaction import redacted
from ray_jobs.runs.node_metrics import SystemLine, node_files
from ray_jobs.tracking import run_record, state
from ray_jobs.tracking.artefacts import log_artefacts
from ray_jobs.tracking.client import Say, connected, whole_uri
from ray_jobs.tracking.inputs import log_inputs
from ray_jobs.tracking.models import register
from ray_jobs.tracking.run_record import RunRecord, Value

if TYPE_CHECKING:
    from mlflow import MlflowClient

EXIT_TAG, ERROR_TAG, ATTEMPT_TAG = "ca2st.exit_status", "ca2st.error", "ca2st.attempt"
EXTRAS: dict[str, Callable[["MlflowClient", str, Path], None]] = {
    "inputs": log_inputs,
    "artefacts": log_artefacts,
    "registered_model": register,
}
"""What a run has in MLflow beside its numbers, each sent by itself: one that fails costs no other."""
_AT_BEGIN, _AT_END, _AT_TEST = ("inputs",), ("artefacts", "registered_model"), ("artefacts",)
_STATUSES = {"done": "FINISHED", "stopped": "KILLED"}
_MAY_BE_GONE = frozenset({"RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE", "INVALID_STATE"})
_BATCH_VALUES = 500  # MLflow takes at most 1000 metrics per call
_SYNC_WAIT_SECONDS = 60.0
"""For a follower to end that is still sending the run."""


def sync(run_dir: Path) -> int:
    """Send what MLflow does not have yet of a run's journal, system metrics and extras; all, if its run was deleted.

    Returns:
        The number of metric values sent.

    Raises:
        TrackingUnavailableError: the store cannot be reached; calling again later loses nothing.
        UserInputError: the folder is none of a training run.
    """
    return Sender(run_dir, console.say).send(wait_seconds=_SYNC_WAIT_SECONDS, look=True)


def log_metrics(run_dir: Path, metrics: Mapping[str, float], *, step: int) -> None:
    """Add numbers that no journal holds, such as those of a test after the training, to the run's record.

    Their names are cleaned and those that are not finite become tags, as of the journal's numbers. Whatever else is
    missing is sent too, and the artefacts once more: the test has left its predictions.

    Raises:
        TrackingUnavailableError: the store cannot be reached.
    """
    now = int(time.time() * 1000)
    added = [Value(name, value, now, step) for name, value in metrics.items()]
    Sender(run_dir, console.say).send(wait_seconds=_SYNC_WAIT_SECONDS, look=True, added=added)


def read_metrics(run_dir: Path, names: Sequence[str]) -> dict[str, float]:
    """Return the run's newest values in MLflow, by the names that `log_metrics` was given.

    Raises:
        TrackingUnavailableError: the store cannot be reached.
        UserInputError: the run has no such metric, or was never sent.
    """
    kept, command = state.read_state(run_dir), state.sync_command(run_dir)
    if kept.run_id is None:
        raise UserInputError(f"{run_dir}: MLflow has no run of it yet; send it by `{command}`")
    with connected(whole_uri(kept.uri, run_dir.parent), f"send the run by `{command}`") as client:
        known = client.get_run(kept.run_id).data.metrics
    if missing := sorted(name for name in names if run_record.clean_name(name) not in known):
        raise UserInputError(f"{run_dir}: MLflow has no {', '.join(missing)} for this run; test it again")
    return {name: known[run_record.clean_name(name)] for name in names}


class Sender:
    """Sends one run, again and again."""

    def __init__(self, run_dir: Path, say: Say, *, is_asked_to_end: Callable[[], bool] = lambda: False) -> None:
        """`is_asked_to_end`: asked between the pieces; once it is true the rest stays for another time."""
        self._run_dir = run_dir
        self._say = say
        self._is_asked_to_end = is_asked_to_end
        self._is_unwell = False
        self._tried: set[str] = set()
        self._told: set[str] = set()
        self._progress = state.Progress()

    def send(
        self, *, wait_seconds: float = 0.0, is_last: bool = True, look: bool = False, added: Sequence[Value] = ()
    ) -> int:
        """Send what MLflow lacks; returns the number of metric values sent.

        `wait_seconds`: for another sender of this run to end. `is_last`: extras that failed before are tried again.
        `look`: even without news make sure that MLflow still has the run, which somebody may have deleted. `added`:
        numbers that no journal holds.

        Raises:
            TrackingUnavailableError: the store or another sender stands in the way; sending later loses nothing.
        """
        with state.one_sender(self._run_dir, wait_seconds=wait_seconds):
            if (origin := state.separate_copy(self._run_dir)) is not None:
                self._say(f"{self._run_dir} was copied from {origin}: in MLflow it is a run of its own")
            kept = state.read_state(self._run_dir)
            self._progress = kept.progress
            looks = look and kept.run_id is not None
            if not (looks or added or self._has_news(is_last=is_last)):
                return 0  # a run that ends before its first line would stay RUNNING for ever
            was_unwell, self._is_unwell = self._is_unwell, True
            what_to_do = f"the journal keeps everything: rerun `{state.sync_command(self._run_dir)}`"
            if added:
                what_to_do = f"repeat the test of {self._run_dir}"
            with connected(whole_uri(kept.uri, self._run_dir.parent), what_to_do, ask_first=was_unwell) as client:
                sent = self._send_to(client, kept, is_last=is_last, looks=looks, added=added)
            self._is_unwell = False
            return sent

    def _has_news(self, *, is_last: bool) -> bool:
        """Return whether there is anything to send: a follower mostly waits, and must not ask MLflow for that."""
        if state.unsent_bytes(self._run_dir):
            return True
        if self._progress.run_id is None:
            return False
        done = self._progress.system_bytes
        has_system = any(path.stat().st_size > done.get(path.name, 0) for path in node_files(self._run_dir).values())
        return has_system or bool(self._due(is_last=is_last))

    def _due(self, *, is_last: bool) -> list[str]:
        """Return the extras that are tried now: each once per process, and again when asked for the last time."""
        return [name for name in self._progress.pending if is_last or name not in self._tried]

    def _send_to(
        self, client: "MlflowClient", kept: state.TrackingState, *, is_last: bool, looks: bool, added: Sequence[Value]
    ) -> int:
        """Send all to the run that MLflow has, or to a new one if somebody deleted that."""
        from mlflow.exceptions import MlflowException

        if not (looks and run_record.is_gone(client, str(kept.run_id))):
            try:
                return self._send_all(client, kept, is_last=is_last, added=added)
            except MlflowException as error:
                run_id = self._progress.run_id
                if run_id is None or error.error_code not in _MAY_BE_GONE or not run_record.is_gone(client, run_id):
                    raise
        old = self._progress.run_id
        self._say(f"MLflow has no run {old} any more: a new run gets the journal from its start")
        self._progress = state.Progress()
        return self._send_all(client, replace(kept, progress=state.Progress(run_id=old)), is_last=is_last, added=added)

    def _send_all(
        self, client: "MlflowClient", kept: state.TrackingState, *, is_last: bool, added: Sequence[Value]
    ) -> int:
        if self._progress.run_id is None:
            first = next(read_events(self._run_dir / JOURNAL_NAME), None)
            begun = None if first is None else run_record.milliseconds(first)
            record, experiment_id = run_record.open_run(client, kept, self._say_once, begun=begun)
            self._tried.clear()
            self._keep(run_id=record.run_id, experiment_id=experiment_id, params=kept.params, pending=_AT_BEGIN)
        else:
            record = RunRecord(client, self._progress.run_id, self._say_once)
        sent = self._send_journal(record, kept) + self._send_system(record)
        if added:
            sent += record.log_values(added)
            self._keep(pending=_joined(self._progress.pending, _AT_TEST))
        self._send_extras(record, is_last=is_last)
        return sent

    def _say_once(self, text: str) -> None:
        """Say a sentence once: the same name is changed with each of its numbers."""
        if text not in self._told:
            self._told.add(text)
            self._say(text)

    def _keep(self, **changes: Any) -> None:
        """Change what is known of MLflow's part, and keep it."""
        self._progress = replace(self._progress, **changes)
        state.write_progress(self._run_dir, self._progress)

    def _send_journal(self, record: RunRecord, kept: state.TrackingState) -> int:
        sent = 0
        for events, end_offset in read_batches(self._run_dir / JOURNAL_NAME, self._progress.sent_bytes):
            self._progress, values = _new_values(events, self._progress)
            sent += record.log_values(values)
            for event in events:
                self._follow_event(record, event, kept)
            self._keep(sent_bytes=end_offset)
            if self._is_asked_to_end():
                break
        return sent

    def _send_system(self, record: RunRecord) -> int:
        sent = 0
        for path in node_files(self._run_dir).values():
            done = self._progress.system_bytes.get(path.name, 0)
            for lines, end_offset in read_batches(path, done, kind=SystemLine):
                sent += record.log_values(
                    [value for line in lines for value in run_record.system_values(line, path.stem)]
                )
                self._keep(system_bytes={**self._progress.system_bytes, path.name: end_offset})
                if self._is_asked_to_end():
                    return sent
        return sent

    def _send_extras(self, record: RunRecord, *, is_last: bool) -> None:
        for name in self._due(is_last=is_last):
            if self._is_asked_to_end():
                return
            self._tried.add(name)
            try:
                EXTRAS[name](record.client, record.run_id, self._run_dir)
            except Exception as error:  # noqa: BLE001  # whatever it is, it must not cost the run its metrics
                why = f"{type(error).__name__}: {redacted(str(error))}"
                self._say(f"{name}: not sent ({why}); `ca2st track sync` tries again")
            else:
                self._keep(pending=tuple(other for other in self._progress.pending if other != name))

    def _follow_event(self, record: RunRecord, event: Mapping[str, Any], kept: state.TrackingState) -> None:
        """Set the status, tags and extras that an attempt's start and end bring."""
        progress = self._progress
        if event["event"] == "start":
            attempt = event["attempt"]
            record.client.update_run(record.run_id, status="RUNNING")
            tags = {ATTEMPT_TAG: str(attempt), EXIT_TAG: "running"}
            record.log_tags(tags if attempt == 1 else {**kept.tags, **tags})
            if progress.params != kept.params:
                record.update_params(progress.params, kept.params, attempt=attempt)
            self._progress = replace(progress, params=kept.params, attempt=max(progress.attempt, attempt))
        elif event["event"] == "end" and event["attempt"] >= progress.attempt:
            # A lost node may end after its successor: an older attempt's end counts for nothing.
            status, ended = event["status"], run_record.milliseconds(event)
            record.log_tags({EXIT_TAG: status} | ({ERROR_TAG: event["error"]} if event.get("error") else {}))
            record.client.set_terminated(record.run_id, status=_STATUSES.get(status, "FAILED"), end_time=ended)
            if status == "done":
                steps = run_sequence(self._run_dir / JOURNAL_NAME)
                record.log_values(list(run_record.mean_values(steps, event)))
                self._tried.difference_update(_AT_END)
                self._progress = replace(progress, pending=_joined(progress.pending, _AT_END))


def _joined(pending: Sequence[str], more: Sequence[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys((*pending, *more)))


def _new_values(events: Sequence[Mapping[str, Any]], progress: state.Progress) -> tuple[state.Progress, list[Value]]:
    """Return how far MLflow is with `events`, and what of them it does not have from an earlier attempt."""
    values: list[Value] = []
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
            if event is not None:
                size = len(event) + sum(len(value) for value in event.values() if isinstance(value, dict))
                if batch and num_values + size > _BATCH_VALUES:
                    yield batch, offset
                    batch, num_values, begin = [], 0, offset
                batch.append(event)
                num_values += size
            offset += len(line)
    if offset > begin:
        yield batch, offset
