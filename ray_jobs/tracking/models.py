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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ca2st import __version__
from ca2st.training.best import best_steps, is_lower_better, validations
from ca2st.training.checkpoint import (
    CHECKPOINTS_NAME,
    MARKER_NAME,
    folders_of_steps,
    list_checkpoints,
    read_marker,
    step_of_checkpoint,
)
from ca2st.training.journal import JOURNAL_NAME, flatten, read_events
from ca2st.training.metrics import main_metric
from ray_jobs.redaction import redacted_values
from ray_jobs.tracking.artefacts import DIGEST_CHARACTERS, dataset_name
from ray_jobs.tracking.run_card import class_names, labelling_of, read_inputs, read_recipe, registered_name
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
    sha256: str
    """Of its COMPLETE.json, which names every other byte."""
    targets: tuple[str, ...]
    metrics: Mapping[str, float] = field(default_factory=dict)
    """What its validation said."""
    validated: int | None = None
    """When, in milliseconds since 1970."""

    @property
    def step(self) -> int:
        """Updates that it has."""
        return step_of_checkpoint(self.folder)

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
    recipe = read_recipe(run_dir)
    found = references(run_dir)
    if not found:
        return
    metric = recipe.get("training", {}).get("best_metric") or main_metric(
        found[0].targets, labelling=labelling_of(found[0].folder)
    )
    ranked = best_steps(validations(run_dir / JOURNAL_NAME), metric)
    best = next(iter(_of_steps(found, ranked)), None)
    chosen = {one.folder: one for one in (found[0], *([best] if best else []))}
    whole = bool(recipe.get("tracking", {}).get("upload_model", False))
    name = registered_name(recipe)
    models = {}
    for one in reversed(found):
        plain = f"{re.sub(_NOT_IN_NAMES, '-', name or str(recipe['name']))}-step-{one.step}"
        copied = run_dir if whole and one.folder in chosen else None
        models[one.folder] = _logged_model(client, run_id, plain, one, run_dir=run_dir, copied_from=copied)
    _mark_removed(client, run_id, {one.sha256 for one in found})
    if name is None:
        return
    _create_registered_model(client, name)
    versions = {
        folder: _version(client, run_id, name, one, models[folder], metric=metric, is_best=one is best)
        for folder, one in sorted(chosen.items(), key=lambda item: item[1].step)
    }
    client.set_registered_model_alias(name, LAST_ALIAS, str(versions[found[0].folder].version))
    if best is not None:
        _set_best_alias(client, name, versions[best.folder], metric)


def references(run_dir: Path) -> list[CheckpointReference]:
    """Return the complete checkpoints of a run with their validations, newest first."""
    lines = {line["step"]: line for line in read_events(run_dir / JOURNAL_NAME, event="eval")}
    scores = validations(run_dir / JOURNAL_NAME)
    found = []
    for folder in list_checkpoints(run_dir / CHECKPOINTS_NAME):
        metrics = scores.get(step_of_checkpoint(folder), {})
        found.append(
            CheckpointReference(
                folder=folder.resolve(),
                sha256=hashlib.sha256((folder / MARKER_NAME).read_bytes()).hexdigest(),
                targets=tuple(class_names(folder)),
                metrics={name: value for name, value in metrics.items() if value is not None},
                validated=milliseconds(lines[step_of_checkpoint(folder)]) if metrics else None,
            )
        )
    return found


def _of_steps(found: Sequence[CheckpointReference], steps: Sequence[int]) -> list[CheckpointReference]:
    by_folder = {one.folder: one for one in found}
    return [by_folder[folder] for folder in folders_of_steps([one.folder for one in found], steps)]


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


def _known(client: "MlflowClient", run_id: str) -> list["LoggedModel"]:
    outputs = client.get_run(run_id).outputs
    return [client.get_logged_model(one.model_id) for one in (outputs.model_outputs if outputs is not None else [])]


def _logged_model(
    client: "MlflowClient",
    run_id: str,
    name: str,
    reference: CheckpointReference,
    *,
    run_dir: Path,
    copied_from: Path | None,
) -> "LoggedModel":
    """Make the run's model of this checkpoint, or what an earlier call left to do of it."""
    from mlflow.entities import LoggedModelOutput

    model = next((one for one in _known(client, run_id) if one.tags.get(SHA256_TAG) == reference.sha256), None)
    if model is None:
        settings = redacted_values({key: str(value) for key, value in flatten(read_recipe(run_dir)).items()})
        model = client.create_logged_model(
            client.get_run(run_id).info.experiment_id,
            name=name,
            source_run_id=run_id,
            tags=reference.tags,
            params={"step": str(reference.step), **clean_params(settings).values},
            model_type="video classifier",
        )
        client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=reference.step)])
    if str(model.status) != "READY":
        _log_metrics(client, run_id, model, reference, run_dir)
        with tempfile.TemporaryDirectory(prefix="ca2st-model-") as folder:
            _save(Path(folder) / "model", model, run_id, reference, copied_from=copied_from)
            client.log_model_artifacts(model.model_id, str(Path(folder) / "model"))
        model = client.finalize_logged_model(model.model_id, "READY")
    return model


def _log_metrics(
    client: "MlflowClient", run_id: str, model: "LoggedModel", reference: CheckpointReference, run_dir: Path
) -> None:
    """Log the checkpoint's validation as the model's, with the shard set it was made on."""
    from mlflow.entities import Metric

    if reference.validated is None:
        return
    inputs = [one for one in read_inputs(run_dir) if one["role"] == "validation"]
    metrics = [
        Metric(
            f"validation_{name}",
            value,
            reference.validated,
            reference.step,
            model_id=model.model_id,
            dataset_name=dataset_name(inputs[0]) if inputs else None,
            dataset_digest=inputs[0]["fingerprint"][:DIGEST_CHARACTERS] if inputs else None,
            run_id=run_id,
        )
        for name, value in sorted(reference.metrics.items())
    ]
    client.log_batch(run_id, metrics=metrics)


def _mark_removed(client: "MlflowClient", run_id: str, kept: set[str]) -> None:
    for model in _known(client, run_id):
        sha256 = model.tags.get(SHA256_TAG)
        if sha256 is not None and sha256 not in kept and model.tags.get(KEPT_TAG) != "no":
            client.set_logged_model_tags(model.model_id, {KEPT_TAG: "no"})


def _save(
    folder: Path, model: "LoggedModel", run_id: str, reference: CheckpointReference, *, copied_from: Path | None
) -> None:
    """Write MLflow's files of the model; with those of the run folder `copied_from` where it is to stand by itself."""
    with warnings.catch_warnings(), tempfile.TemporaryDirectory(prefix="ca2st-copy-") as place:
        # MLflow warns of its own type hints, and that no example is given: an example would need a video.
        warnings.simplefilter("ignore", UserWarning)
        from mlflow import pyfunc
        from mlflow.models import Model

        config: Mapping[str, Any] = {"checkpoint": str(reference.folder), "sha256": reference.sha256}
        if copied_from is not None:
            _copy_run(copied_from, reference.folder, Path(place) / UPLOADED)
        pyfunc.save_model(
            path=str(folder),
            python_model=str(_CODE),
            signature=signature_of(reference.targets),
            model_config=dict(config),
            artifacts=None if copied_from is None else {UPLOADED: str(Path(place) / UPLOADED)},
            pip_requirements=[f"ca2st=={__version__}"],
            mlflow_model=Model(
                artifact_path=model.artifact_location,
                model_uuid=model.model_id,
                run_id=run_id,
                model_id=model.model_id,
            ),
        )


def _copy_run(run_dir: Path, checkpoint: Path, place: Path) -> None:
    """Copy one checkpoint and the frozen weights that it names: what a prediction reads of a run folder."""
    shutil.copytree(checkpoint, place / CHECKPOINTS_NAME / checkpoint.name)
    (place / _EXPERTS).mkdir()
    for sha256 in read_marker(checkpoint).experts.values():
        name = f"{sha256}.safetensors"
        shutil.copy(run_dir / _EXPERTS / name, place / _EXPERTS / name)


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


def _create_registered_model(client: "MlflowClient", name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
