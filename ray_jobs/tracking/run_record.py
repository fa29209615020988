"""The run in MLflow: found or made once, replaced when somebody deleted it, its settings and tags kept true."""

from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING

from ray_jobs.redaction import redacted_values
from ray_jobs.tracking.client import artifact_location
from ray_jobs.tracking.complaints import Complaint, StoreError
from ray_jobs.tracking.names import (
    MAX_EXPERIMENT_CHARACTERS,
    MAX_RUN_NAME_CHARACTERS,
    batches,
    clean_params,
    clean_tags,
    clean_value,
)
from ray_jobs.tracking.state import TrackingState

if TYPE_CHECKING:
    from mlflow import MlflowClient

KEY_TAG = "ca2st.key"
REPLACES_TAG = "ca2st.replaces"
CHANGED_TAG = "ca2st.changed"
Say = Callable[[str], None]
"""Tells the follower's log a sentence."""


def create_run(client: "MlflowClient", state: TrackingState, say: Say, *, begun: int | None) -> str:
    """MLflow's id of a new run of `state` with its settings and tags; that of the run which a lost answer left behind.

    `begun`: when the training did, in milliseconds since 1970; MLflow may hear of it much later.

    Raises:
        StoreError: the experiment was deleted; says how to mend it.
    """
    experiment_id = _experiment(client, state)
    found = client.search_runs([experiment_id], f"tags.`{KEY_TAG}` = '{state.key}'", max_results=1)
    known: Mapping[str, str] = {}
    if found:
        run_id: str = found[0].info.run_id
        known = found[0].data.params
    else:
        name = clean_value(state.run_name, MAX_RUN_NAME_CHARACTERS)
        tags = {KEY_TAG: state.key} | ({REPLACES_TAG: state.run_id} if state.run_id else {})
        run_id = client.create_run(experiment_id, start_time=begun, run_name=name, tags=tags).info.run_id
    _log_params(client, run_id, state.params, say, known=known)
    log_tags(client, run_id, state.tags, say)
    return run_id


def update_params(
    client: "MlflowClient", run_id: str, sent: Mapping[str, str], now: Mapping[str, str], *, attempt: int, say: Say
) -> None:
    """Record what a resumed run's settings are now: MLflow takes a param once, so a change becomes a tag."""
    _log_params(client, run_id, {name: value for name, value in now.items() if name not in sent}, say)
    changed = {
        f"{CHANGED_TAG}.{name}": f"{value} -> {now.get(name, '(absent)')} from attempt {attempt}"
        for name, value in redacted_values(sent).items()
        if now.get(name) != sent[name]
    }
    log_tags(client, run_id, changed, say)


def log_tags(client: "MlflowClient", run_id: str, tags: Mapping[str, str], say: Say) -> None:
    """Set tags, in batches, secrets hidden."""
    from mlflow.entities import RunTag

    clean = clean_tags(redacted_values(tags))
    for part in batches(clean.values):
        client.log_batch(run_id, tags=[RunTag(name, value) for name, value in part.items()])
    for change in clean.changes:
        say(change)


def is_gone(client: "MlflowClient", run_id: str) -> bool:
    """Whether the run was deleted in MLflow, or is of another store."""
    from mlflow.exceptions import MlflowException

    try:
        return bool(client.get_run(run_id).info.lifecycle_stage == "deleted")
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return True
        raise


def _experiment(client: "MlflowClient", state: TrackingState) -> str:
    from mlflow.exceptions import MlflowException

    name = clean_value(state.experiment, MAX_EXPERIMENT_CHARACTERS)
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        try:
            return str(client.create_experiment(name, artifact_location=artifact_location(state.uri)))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        experiment = client.get_experiment_by_name(name)  # another run has just made it
        assert experiment is not None
    if experiment.lifecycle_stage == "deleted":
        number = experiment.experiment_id
        complaint = Complaint(kind="rejected", detail=f"experiment {name!r}, number {number}, was deleted there")
        mend = (
            f"restore it by `mlflow experiments restore --experiment-id {number}`, remove it for good by `mlflow gc "
            f"--experiment-ids {number}`, or train with another tracking.experiment; then run `ca2st track sync` again"
        )
        raise StoreError(complaint.told(state.uri, mend), complaint)
    return str(experiment.experiment_id)


def _log_params(
    client: "MlflowClient",
    run_id: str,
    params: Mapping[str, str],
    say: Say,
    *,
    known: Collection[str] = (),
) -> None:
    from mlflow.entities import Param

    clean = clean_params(redacted_values(params))
    for part in batches({name: value for name, value in clean.values.items() if name not in known}):
        client.log_batch(run_id, params=[Param(name, value) for name, value in part.items()])
    for change in clean.changes:
        say(change)
