"""``synthetic``: makes its own videos under the media folder, then hands them over like any other dataset."""

from dataclasses import replace
from pathlib import Path

from ca2st.errors import UserInputError, check_choice
from sharding.datasets.request import DatasetRequest
from sharding.source import SourceList, SourceSample
from sharding.synthetic.clips import ANNOTATIONS_NAME, clip_file, generate_split
from sharding.synthetic.config import SyntheticConfig
from sharding.synthetic.factors import label_spaces

TASKS = ("space", "time", "audio", "holistic", "binding")
"""What can be learned: one factor, the combination of all three (those shards carry all four labels), or which of
several objects keeps time with the sound, in scenes of their own."""


def read(request: DatasetRequest, dataset: str) -> SourceList:
    """Return the clips of one split, made where they are missing; a dry run only lists them.

    Raises:
        UserInputError: an unknown task, no media folder, or one that holds another synthetic set.
        EnvironmentFault: a clip cannot be written.
    """
    task = request.task or "holistic"
    check_choice("--task", task, TASKS)
    config = replace(request.synthetic, binding=task == "binding")
    folder = (request.media or Path()) / request.split
    if request.check_media:
        if request.media is None:
            raise UserInputError(
                "--dataset synthetic: expected --media, found none; pass a folder to make the videos in"
            )
        folder = generate_split(request.media, request.split, config, limit=request.limit, progress=request.progress)
    return SourceList(
        dataset=dataset,
        split=request.split,
        label_spaces=label_spaces(config),
        targets=(task,),
        samples=tuple(
            _sample(folder, request.split, config, index) for index in range(config.num_samples)[: request.limit]
        ),
    )


def _sample(folder: Path, split: str, config: SyntheticConfig, index: int) -> SourceSample:
    clip = clip_file(config, split, index)
    return SourceSample(
        sample_id=f"{split}/{index:06d}",
        path=folder / clip.name,
        start_seconds=None,
        end_seconds=None,
        labels=clip.labels,
        where=f"{folder / ANNOTATIONS_NAME}:{index + 2}",
    )
