"""Readers of annotation files, one a file, in an explicit table.

A reader takes a `DatasetRequest` and returns a `SourceList`: which segment of which file carries which labels. It
checks every row before any video is decoded. Adding a dataset = one module with ``read`` and one line here.
"""

from collections.abc import Callable

from ca2st.errors import check_choice
from sharding.datasets import csv, epic_sounds, folder, synthetic
from sharding.datasets.label_spaces import with_label_notes
from sharding.datasets.request import DatasetRequest
from sharding.source import SourceList
from sharding.synthetic.config import SyntheticConfig

__all__ = ["DATASETS", "DatasetRequest", "Reader", "SyntheticConfig", "read_dataset"]

Reader = Callable[[DatasetRequest], SourceList]

DATASETS: dict[str, Reader] = {
    "csv": csv.read,
    "epic_sounds": epic_sounds.read,
    "folder": folder.read,
    "synthetic": synthetic.read,
}
"""Every dataset by the name that ``--dataset`` takes."""


def read_dataset(name: str, request: DatasetRequest) -> SourceList:
    """The samples of one split of a dataset, with notes about its class names.

    Raises:
        UserInputError: an unknown dataset, or whatever its reader refuses.
    """
    check_choice("--dataset", name, DATASETS)
    source = DATASETS[name](request)
    return with_label_notes(source)
