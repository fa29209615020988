"""Runs in an MLflow store that tests share."""

from pathlib import Path

from mlflow import MlflowClient


def new_run(client: MlflowClient, tmp_path: Path) -> str:
    """The id of a new run in an experiment of its own, whose artefacts are in ``store`` of the test's folder."""
    experiment = client.create_experiment(str(tmp_path), artifact_location=(tmp_path / "store").as_uri())
    return str(client.create_run(experiment, run_name="mine").info.run_id)
