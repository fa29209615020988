"""A finished training as a model in MLflow's registry: a few kB that name its checkpoint folder and its hash.

The model predicts from code (`ray_jobs.tracking.checkpoint_model`); nothing is pickled, no weight is copied.
"""

import hashlib
import json
import re
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ca2st import __version__
from ca2st.training.checkpoint import MARKER_NAME
from ray_jobs.tracking.run_card import class_names, newest_checkpoint, read_recipe, registered_name

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel
    from mlflow.models import ModelSignature

SHA256_TAG, CHECKPOINT_TAG = "ca2st.checkpoint_sha256", "ca2st.checkpoint"
_VERSIONS_TAG = "mlflow.modelVersions"
"""By which MLflow's pages lead from a run's model to its registered version."""
_CODE = Path(__file__).with_name("checkpoint_model.py")
_NOT_IN_NAMES = r"[/:.%\"']"


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointReference:
    """The checkpoint that a registered model is."""

    folder: Path
    sha256: str
    """Of its COMPLETE.json, which names every other byte."""
    targets: tuple[str, ...]

    @property
    def tags(self) -> dict[str, str]:
        """Tags by which it is known in MLflow."""
        return {SHA256_TAG: self.sha256, CHECKPOINT_TAG: str(self.folder)}


def register(client: "MlflowClient", run_id: str, run_dir: Path) -> None:
    """Register the newest checkpoint of a run, under the name its recipe gives; once per checkpoint.

    Nothing is done where the recipe says so (``tracking.register_model``) or there is no checkpoint.

    Raises:
        FileNotFoundError: no training was started there.
        MlflowException: the store cannot be reached; repeating goes on where it stopped.
    """
    name, reference = registered_name(read_recipe(run_dir)), _reference(run_dir)
    if name is None or reference is None:
        return
    versions = client.search_model_versions(f"run_id = '{run_id}'")
    if any(one.name == name and one.tags.get(SHA256_TAG) == reference.sha256 for one in versions):
        return
    model = _logged_model(client, run_id, name, reference)
    _create_registered_model(client, name)
    version = client.create_model_version(
        name,
        source=model.artifact_location,  # MLflow looks models:/ID up in the process's store, not in the client's
        run_id=run_id,
        tags=reference.tags,
        description=f"Checkpoint {reference.folder}",
        await_creation_for=0,
        model_id=model.model_id,
    )
    client.set_logged_model_tags(
        model.model_id, {_VERSIONS_TAG: json.dumps([{"name": name, "version": version.version}])}
    )


def signature_of(targets: tuple[str, ...]) -> "ModelSignature":
    """Return the signature: ``video`` (path) in; ``label`` and ``probability`` out, of each target of several."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema, TensorSpec

    prefixes = [""] if len(targets) == 1 else [f"{target}_" for target in targets]
    answers: list[ColSpec | TensorSpec] = [
        ColSpec(kind, prefix + name)
        for prefix in prefixes
        for kind, name in (("string", "label"), ("double", "probability"))
    ]
    return ModelSignature(
        inputs=Schema([ColSpec("string", "video")]),
        outputs=Schema(answers),
        params=ParamSchema([ParamSpec("clips", "long", 2), ParamSpec("crops", "long", 3)]),
    )


def _reference(run_dir: Path) -> CheckpointReference | None:
    folder = newest_checkpoint(run_dir)
    if folder is None:
        return None
    return CheckpointReference(
        folder=folder.resolve(),
        sha256=hashlib.sha256((folder / MARKER_NAME).read_bytes()).hexdigest(),
        targets=tuple(class_names(folder)),
    )


def _logged_model(client: "MlflowClient", run_id: str, name: str, reference: CheckpointReference) -> "LoggedModel":
    """Make the run's model of this checkpoint, or what an earlier call left to do of it."""
    from mlflow.entities import LoggedModelOutput

    run = client.get_run(run_id)
    outputs = run.outputs.model_outputs if run.outputs is not None else []
    known = [client.get_logged_model(output.model_id) for output in outputs]
    model = next((one for one in known if one.tags.get(SHA256_TAG) == reference.sha256), None)
    if model is None:
        plain = re.sub(_NOT_IN_NAMES, "-", name)
        model = client.create_logged_model(
            run.info.experiment_id, name=plain, source_run_id=run_id, tags=reference.tags, model_type="video classifier"
        )
        client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=0)])
    if str(model.status) != "READY":
        with tempfile.TemporaryDirectory(prefix="ca2st-model-") as folder:
            _save(Path(folder) / "model", model, run_id, reference)
            client.log_model_artifacts(model.model_id, str(Path(folder) / "model"))
        model = client.finalize_logged_model(model.model_id, "READY")
    return model


def _save(folder: Path, model: "LoggedModel", run_id: str, reference: CheckpointReference) -> None:
    """Write MLflow's files of the model."""
    with warnings.catch_warnings():
        # MLflow warns of its own type hints, and that no example is given: an example would need a video.
        warnings.simplefilter("ignore", UserWarning)
        from mlflow import pyfunc
        from mlflow.models import Model

        config: Mapping[str, Any] = {"checkpoint": str(reference.folder), "sha256": reference.sha256}
        pyfunc.save_model(
            path=str(folder),
            python_model=str(_CODE),
            signature=signature_of(reference.targets),
            model_config=dict(config),
            pip_requirements=[f"ca2st=={__version__}"],
            mlflow_model=Model(
                artifact_path=model.artifact_location,
                model_uuid=model.model_id,
                run_id=run_id,
                model_id=model.model_id,
            ),
        )


def _create_registered_model(client: "MlflowClient", name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
