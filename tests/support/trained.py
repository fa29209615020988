"""A trained model as `load_trained` gives it, without any training: tiny, awake, in memory."""

from pathlib import Path
from typing import Any

from ca2st.training.checkpoint import Checkpoint, CheckpointMarker
from ca2st.training.config import OptimConfig, TrainingConfig
from pipelines.config import LoaderConfig
from pipelines.views import SamplingConfig
from ray_jobs.config.recipe import DataConfig, Recipe
from ray_jobs.runs.inference import TrainedModel
from ray_jobs.runs.model import target_specs
from sharding.format.shard_set import AudioParameters, VideoParameters
from support.models import TINY_CLIP, tiny_config, tiny_model, wake

CLASSES = {"label": ["red", "green", "blue"]}


def trained_model(folder: Path, kind: str = "ca2st", *, audio_policy: str = "optional", **changes: Any) -> TrainedModel:
    """The model of a run folder at `folder`, which need not be there; its frames are decoded by the oracle."""
    model = tiny_model(kind, targets=target_specs(CLASSES), **changes)
    wake(model.layers)
    wake(model.head)
    marker = CheckpointMarker(
        step=8,
        attempt=1,
        seed=0,
        global_batch_size=4,
        manifests={"train": "f" * 64},
        recipe_sha256="0" * 64,
        topology={},
        versions={},
        files={"model.safetensors": {"size": 1, "sha256": "a" * 64}},
    )
    return TrainedModel(
        model=model,
        recipe=Recipe(
            name="tiny",
            model=tiny_config(kind, **changes),
            clip=TINY_CLIP,
            data=DataConfig(
                sampling=SamplingConfig(scheme="uniform"), loader=LoaderConfig(backend="reference", prefetch_steps=0)
            ),
            optim=OptimConfig(warmup_epochs=0.0),
            training=TrainingConfig(epochs=1, global_batch_size=4, per_device_batch_size=4),
        ),
        classes=CLASSES,
        audio=AudioParameters(policy=audio_policy),
        video=VideoParameters(short_side=48),
        checkpoint=Checkpoint(folder=folder / "checkpoints" / "step-8.attempt-1", marker=marker, files={}),
    )
