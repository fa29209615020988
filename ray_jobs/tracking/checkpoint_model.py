"""The code of a registered model: MLflow keeps a copy of this file with it and runs that to load it.

The model is a checkpoint folder, named by path and by the hash of its COMPLETE.json; its bytes are not copied. What is
installed as ca2st reads it.
"""

import hashlib
from pathlib import Path
from typing import Any

import pandas as pd  # type: ignore[import-untyped]  # comes with MLflow, without types
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel, PythonModelContext

_MARKER = "COMPLETE.json"
_UPLOADED = "run"
_VIEWS = {"clips": 2, "crops": 3}


class CheckpointModel(PythonModel):
    """Labels videos by the model of a checkpoint."""

    def load_context(self, context: PythonModelContext) -> None:
        """Find the checkpoint.

        Raises:
            UserInputError: its folder is not there.
            CheckpointDamagedError: the folder holds another checkpoint than the registered one.
        """
        self._checkpoint = Path(context.model_config["checkpoint"])
        if (copied := context.artifacts.get(_UPLOADED)) is not None:  # it stands by itself
            self._checkpoint = Path(copied) / "checkpoints" / self._checkpoint.name
        self._sha256 = context.model_config["sha256"]
        require_checkpoint(self._checkpoint, self._sha256)

    def predict(
        self,
        context: PythonModelContext,  # noqa: ARG002  # MLflow passes it
        model_input: pd.DataFrame,
        params: dict[str, Any] | None = None,
    ) -> pd.DataFrame:
        """Return the likeliest class of each video in column ``video`` (paths, each once), a row per video.

        Columns of the answer: ``label`` and ``probability``; for each target of a model that has several,
        ``<target>_label`` and ``<target>_probability``. The model is read and verified anew by each call: give one call
        many videos. `params`: ``clips`` and ``crops``, the views of a video.

        Raises:
            UserInputError: a video is not there or named twice, or the checkpoint is gone.
            RejectBudgetError: a video cannot be decoded.
            DataDamageError: the checkpoint is not what was written.
        """
        from pipelines.views import EvaluationViews
        from ray_jobs.runs.prediction import predict_videos

        require_checkpoint(self._checkpoint, self._sha256)
        asked = _VIEWS | (params or {})
        views = EvaluationViews(protocol="test", clips=int(asked["clips"]), crops=int(asked["crops"]))
        found = predict_videos(self._checkpoint, [Path(video) for video in model_input["video"]], top=1, views=views)
        is_alone = all(len(one.predictions) == 1 for one in found)
        rows = []
        for one in found:
            row: dict[str, str | float] = {}
            for answer in one.predictions:
                prefix = "" if is_alone else f"{answer.target}_"
                row |= {f"{prefix}label": answer.label, f"{prefix}probability": answer.probability}
            rows.append(row)
        return pd.DataFrame(rows, index=model_input.index)


def require_checkpoint(folder: Path, sha256: str) -> None:
    """Refuse a checkpoint folder that is not the registered one; its own bytes are verified when it is read."""
    from ca2st.errors import UserInputError
    from ca2st.training.errors import CheckpointDamagedError

    marker = folder / _MARKER
    if not marker.is_file():
        raise UserInputError(
            f"{folder}: expected the checkpoint of this registered model, found none; where it was moved to "
            'PLACE, with the folder experts of its run, load the model with model_config={"checkpoint": "PLACE"}'
        )
    found = hashlib.sha256(marker.read_bytes()).hexdigest()
    if found != sha256:
        raise CheckpointDamagedError(
            f"{marker}: expected sha256 {sha256[:12]}..., as this model was registered, found {found[:12]}...; it is "
            "another checkpoint: restore the registered one, or register this one by finishing its run"
        )


set_model(CheckpointModel())
