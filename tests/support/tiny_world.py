"""A synthetic world in fake shards: real labels of drawn clips, made-up pictures and sounds, no video encoded."""

from pathlib import Path
from typing import Any

from ca2st.training.config import OptimConfig, TrainingConfig
from pipelines.config import LoaderConfig
from pipelines.views import SamplingConfig
from ray_jobs.config.recipe import DataConfig, Recipe, SyntheticData, TrackingConfig
from sharding.format.index import sample_key
from sharding.format.shard_set import ShardSet
from sharding.synthetic.factors import label_spaces, labels_of
from support.fake_shards import FakeSample, make_shard_set
from support.models import TINY_CLIP, tiny_config

WORLD = SyntheticData(num_train=8, num_validation=8)


def world_key(split: str, index: int) -> str:
    """What a sample of the world is called in shards."""
    return sample_key(f"{split}/{index:06d}")


def make_world_set(root: Path, split: str, **values: Any) -> ShardSet:
    """Eight samples of a split with the labels that the synthetic world gives them."""
    config = WORLD.world(split)
    samples = [
        FakeSample(key=world_key(split, index), seed=index, labels=labels_of(config, split, index), num_frames=12)
        for index in range(config.num_samples)
    ]
    return make_shard_set(
        root, samples, split=split, label_spaces=label_spaces(config), targets=("holistic",), **values
    )


def tiny_recipe(train: Path, *, uri: str | None = None) -> Recipe:
    """Two steps on the shards in `train`, read by the oracle; tracked only where `uri` names a store."""
    return Recipe(
        name="tiny",
        model=tiny_config("ca2st", dim=16),
        clip=TINY_CLIP,
        data=DataConfig(
            train=str(train),
            synthetic=WORLD,
            targets=("holistic",),
            sampling=SamplingConfig(scheme="uniform"),
            loader=LoaderConfig(backend="reference", prefetch_steps=0),
        ),
        optim=OptimConfig(warmup_epochs=0.0),
        training=TrainingConfig(
            epochs=1, global_batch_size=4, per_device_batch_size=4, validate_every_epochs=0, keep_checkpoints=1
        ),
        tracking=TrackingConfig(uri=uri, enabled=uri is not None),
    )
