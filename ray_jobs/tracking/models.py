"""The checkpoints of a run as models in MLflow: one that can be ranked for each, and registered versions of two.

A model is a few kB that name the checkpoint folder and its hash, and predicts from code
(`ray_jobs.tracking.checkpoint_model`): nothing is pickled. Weights are copied where ``tracking.upload_model`` says so.
Registered are the newest checkpoint and the best by validation; the alias ``best`` stands for the best of all runs that
share the name.
"""

import hashlib
import json
import re
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ca2st import __version__
from ca2st.training import checkpoint
from ca2st.training.best import best_steps, is_lower_better, validations
from ca2st.training.journal import JOURNAL_NAME, flatten, read_events
from ca2st.training.metrics import main_metric
from ray_jobs.redaction import redacted_values
from ray_jobs.tracking.artefacts import class_names, labelling_of, read_recipe, registered_name
from ray_jobs.tracking.client import may_exist
from ray_jobs.tracking.inputs import DIGEST_CHARACTERS, dataset_name, read_inputs
from ray_jobs.tracking.run_record import clean_params, milliseconds

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.models import ModelSignature

SHA256_TAG, CHECKPOINT_TAG, STEP_TAG = "ca2st.checkpoint_sha256", "ca2st.checkpoint", "ca2st.step"
KEPT_TAG = "ca2st.checkpoint_kept"
"""``no`` once the run has cleared the checkpoint away."""
METRIC_TAG, SCORE_TAG = "ca2st.metric", "ca2st.score"
"""Of a registered version: by what it is ranked, and its value."""
BEST_ALIAS, LAST_ALIAS = "best", "last"
_VERSIONS_TAG = "mlflow.modelVersions"
"""By which MLflow's pages lead from a run's model to its registered version."""
_CODE = Path(__file__).with_name("checkpoint_model.py")
_NOT_IN_NAMES = r"[/:.%\"']"
UPLOADED = "run"
"""Artefact of a self-contained model: a run folder with one checkpoint and the frozen weights it names."""
_EXPERTS = "experts"


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointReference:
    """A checkpoint as MLflow knows it."""

    folder: Path
    step: int
    """Updates that it has."""
    sha256: str
    """Of its COMPLETE.json, which names every other byte."""
    targets: tuple[str, ...]
    metrics: Mapping[str, float]
    """What its validation said."""
    validated: int
    """When, in milliseconds since 1970; 0: never."""

    @property
    def tags(self) -> dict[str, str]:
        """Tags by which it is known in MLflow."""
        return {SHA256_TAG: self.sha256, CHECKPOINT_TAG: str(self.folder), STEP_TAG: str(self.step)}


def register(client: "MlflowClient", run_id: str, run_dir: Path) -> None:
    """Give MLflow a model for each kept checkpoint of a run, and registered versions of the newest and the best.

    Each is made once, however often this is called. Nothing is registered where the recipe says so
    (``tracking.register_model``), and nothing is done before the first checkpoint.

    Raises:
        FileNotFoundError: no training was started there.
        MlflowException: the store cannot be reached; repeating goes on where it stopped.
    """
    recipe, found = read_recipe(run_dir), references(run_dir)
    if not found:
        return
    metric = recipe.get("training", {}).get("best_metric") or main_metric(
        found[0].targets, labelling=labelling_of(found[0].folder)
    )
    of_step = {one.step: one for one in reversed(found)}
    ranked = best_steps(validations(run_dir / JOURNAL_NAME), metric)
    best = next((of_step[step] for step in ranked if step in of_step), None)
    chosen = [one for one in reversed(found) if one in (found[0], best)]
    name, upload = registered_name(recipe), bool(recipe.get("tracking", {}).get("upload_model", False))
    plain = re.sub(_NOT_IN_NAMES, "-", name or str(recipe["name"]))
    models = _known_models(client, run_id)
    for one in reversed(found):
        if one.sha256 not in models:
            models[one.sha256] = _new_model(client, run_id, f"{plain}-step-{one.step}", one, recipe)
        if str((model := models[one.sha256]).status) != "READY":
            _finish_model(client, run_id, model, one, run_dir, is_copied=upload and one in chosen)
    for sha256 in models.keys() - {one.sha256 for one in found}:
        if models[sha256].tags.get(KEPT_TAG) != "no":
            client.set_logged_model_tags(models[sha256].model_id, {KEPT_TAG: "no"})
    if name is None:
        return
    with may_exist():
        client.create_registered_model(name)
    for one in chosen:
        version = _version(client, run_id, name, one, models[one.sha256], metric=metric, is_best=one is best)
        if one is found[0]:
            client.set_registered_model_alias(name, LAST_ALIAS, str(version.version))
        if one is best:
            _set_best_alias(client, name, version, metric)


def references(run_dir: Path) -> list[CheckpointReference]:
    """Return the complete checkpoints of a run with their validations, newest first."""
    lines = {line["step"]: line for line in read_events(run_dir / JOURNAL_NAME, event="eval")}
    scores = validations(run_dir / JOURNAL_NAME)
    found = []
    for folder in checkpoint.list_checkpoints(run_dir / checkpoint.CHECKPOINTS_NAME):
        step = checkpoint.step_of_checkpoint(folder)
        found.append(
            CheckpointReference(
                folder=folder.resolve(),
                step=step,
                sha256=hashlib.sha256((folder / checkpoint.MARKER_NAME).read_bytes()).hexdigest(),
                targets=tuple(class_names(folder)),
                metrics={name: value for name, value in scores.get(step, {}).items() if value is not None},
                validated=milliseconds(lines[step]) if step in scores else 0,
            )
        )
    return found


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


def _known_models(client: "MlflowClient", run_id: str) -> "dict[str, LoggedModel]":
    """Return the models of the run that stand for a checkpoint, by its hash."""
    outputs = client.get_run(run_id).outputs
    models = [client.get_logged_model(one.model_id) for one in (outputs.model_outputs if outputs is not None else [])]
    return {model.tags[SHA256_TAG]: model for model in models if SHA256_TAG in model.tags}


def _new_model(
    client: "MlflowClient", run_id: str, name: str, reference: CheckpointReference, recipe: Mapping[str, object]
) -> "LoggedModel":
    from mlflow.entities import LoggedModelOutput

    settings = redacted_values({key: str(value) for key, value in flatten(recipe).items()})
    model = client.create_logged_model(
        client.get_run(run_id).info.experiment_id,
        name=name,
        source_run_id=run_id,
        tags=reference.tags,
        params={"step": str(reference.step), **clean_params(settings)[0]},
        model_type="video classifier",
    )
    client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=reference.step)])
    return model


def _finish_model(
    client: "MlflowClient",
    run_id: str,
    model: "LoggedModel",
    reference: CheckpointReference,
    run_dir: Path,
    *,
    is_copied: bool,
) -> None:
    """Log the checkpoint's validation as the model's, with the shard set it was made on, and the model's files."""
    from mlflow.entities import Metric

    inputs = next((one for one in read_inputs(run_dir) if one["role"] == "validation"), None)
    metrics = [
        Metric(
            f"validation_{name}",
            value,
            reference.validated,
            reference.step,
            model_id=model.model_id,
            dataset_name=dataset_name(inputs) if inputs else None,
            dataset_digest=inputs["fingerprint"][:DIGEST_CHARACTERS] if inputs else None,
            run_id=run_id,
        )
        for name, value in sorted(reference.metrics.items())
    ]
    if metrics:
        client.log_batch(run_id, metrics=metrics)
    with tempfile.TemporaryDirectory(prefix="ca2st-model-") as folder:
        _save(Path(folder) / "model", model, run_id, reference, copied_from=run_dir if is_copied else None)
        client.log_model_artifacts(model.model_id, str(Path(folder) / "model"))
    client.finalize_logged_model(model.model_id, "READY")


def _save(
    folder: Path, model: "LoggedModel", run_id: str, reference: CheckpointReference, *, copied_from: Path | None
) -> None:
    """Write MLflow's files of the model; with those of the run folder `copied_from` where it is to stand by itself."""
    with warnings.catch_warnings(), tempfile.TemporaryDirectory(prefix="ca2st-copy-") as place:
        # MLflow warns of its own type hints, and that no example is given: an example would need a video.
        warnings.simplefilter("ignore", UserWarning)
        from mlflow import pyfunc
        from mlflow.models import Model

        copied = Path(place) / UPLOADED
        if copied_from is not None:  # one checkpoint and the frozen weights it names: what a prediction reads
            shutil.copytree(reference.folder, copied / checkpoint.CHECKPOINTS_NAME / reference.folder.name)
            (copied / _EXPERTS).mkdir()
            for sha256 in checkpoint.read_marker(reference.folder).experts.values():
                shutil.copy(copied_from / _EXPERTS / f"{sha256}.safetensors", copied / _EXPERTS)
        pyfunc.save_model(
            path=str(folder),
            python_model=str(_CODE),
            signature=signature_of(reference.targets),
            model_config={"checkpoint": str(reference.folder), "sha256": reference.sha256},
            artifacts=None if copied_from is None else {UPLOADED: str(copied)},
            pip_requirements=[f"ca2st=={__version__}"],
            mlflow_model=Model(
                artifact_path=model.artifact_location,
                model_uuid=model.model_id,
                run_id=run_id,
                model_id=model.model_id,
            ),
        )


def _version(
    client: "MlflowClient",
    run_id: str,
    name: str,
    reference: CheckpointReference,
    model: "LoggedModel",
    *,
    metric: str,
    is_best: bool,
) -> "ModelVersion":
    """Return the registered version of a checkpoint, made where there is none; its description has the accuracy."""
    score = reference.metrics.get(metric)
    told = "not validated" if score is None else f"validation {metric} {score:.4f}"
    words = (
        f"{told} at step {reference.step}{', the best of its run' if is_best else ''}; checkpoint {reference.folder}"
    )
    for one in client.search_model_versions(f"run_id = '{run_id}'"):
        if one.name == name and one.tags.get(SHA256_TAG) == reference.sha256:
            return one if one.description == words else client.update_model_version(name, one.version, words)
    ranking = {} if score is None else {METRIC_TAG: metric, SCORE_TAG: repr(score)}
    version = client.create_model_version(
        name,
        source=model.artifact_location,  # MLflow looks models:/ID up in the process's store, not in the client's
        run_id=run_id,
        tags=reference.tags | ranking,
        description=words,
        await_creation_for=0,
        model_id=model.model_id,
    )
    client.set_logged_model_tags(
        model.model_id, {_VERSIONS_TAG: json.dumps([{"name": name, "version": version.version}])}
    )
    return version


def _set_best_alias(client: "MlflowClient", name: str, version: "ModelVersion", metric: str) -> None:
    """Let the alias stand for this version, unless it stands for one that the same metric finds better."""
    held = client.get_registered_model(name).aliases.get(BEST_ALIAS)
    if held is not None:
        other = client.get_model_version(name, str(held))
        if other.tags.get(METRIC_TAG) == metric and SCORE_TAG in other.tags and SCORE_TAG in version.tags:
            sign = -1 if is_lower_better(metric) else 1
            if sign * float(other.tags[SCORE_TAG]) >= sign * float(version.tags[SCORE_TAG]):
                return
    client.set_registered_model_alias(name, BEST_ALIAS, str(version.version))
