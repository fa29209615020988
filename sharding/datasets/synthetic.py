"""``synthetic``: makes its own videos under the media folder, then hands them over like any other dataset."""

from dataclasses import replace
from pathlib import Path

from ca2st.errors import UserInputError, check_choice
from sharding.datasets.request import DatasetRequest
from sharding.source import SourceList, SourceSample
from sharding.synthetic.clips import ANNOTATIONS_NAME, clip_name, generate_split
from sharding.synthetic.factors import TASKS, label_spaces, labels_of


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
    samples = tuple(
        SourceSample(
            sample_id=f"{request.split}/{index:06d}",
            path=folder / clip_name(request.split, index),
            start_seconds=None,
            end_seconds=None,
            labels=labels_of(config, request.split, index),
            where=f"{folder / ANNOTATIONS_NAME}:{index + 2}",
        )
        for index in range(config.num_samples)[: request.limit]
    )
    return SourceList(
        dataset=dataset, split=request.split, label_spaces=label_spaces(config), targets=(task,), samples=samples
    )
