"""Readers of annotation files, one per file, in an explicit table.

A reader takes a `DatasetRequest` and the dataset's name, and returns a `SourceList`: which segment of which file
carries which labels. It checks every row before any video is decoded. Adding a dataset = one module with ``read``, one
line here, and its name beside the options that it uses.
"""

from collections.abc import Callable
from importlib import import_module

from ca2st.errors import UserInputError, check_choice
from sharding.datasets.label_spaces import with_label_notes
from sharding.datasets.request import DatasetRequest
from sharding.source import SourceList
from sharding.synthetic.config import SyntheticConfig

__all__ = ["DATASETS", "DatasetRequest", "Reader", "SyntheticConfig", "read_dataset"]

Reader = Callable[[DatasetRequest, str], SourceList]
"""Takes the request and the dataset's name.

It raises UserInputError for a missing option, no media folder, or more files missing than ``--max-missing`` allows, and
AnnotationError for a wrong file or rows, all of which are named at once.
"""

DATASETS: dict[str, str] = {
    "activitynet": "activitynet.read",
    "csv": "own_list.read",
    "epic_kitchens_100": "epic.read_kitchens",
    "epic_sounds": "epic.read_sounds",
    "folder": "folder.read",
    "hd_epic": "hd_epic.read",
    "hd_epic_sounds": "epic.read_sounds",
    "kinetics_400": "kinetics.read",
    "kinetics_sound": "kinetics.read",
    "list": "own_list.read",
    "something_something_v2": "something_something.read",
    "synthetic": "synthetic.read",
    "ucf_101": "ucf_101.read",
    "vgg_sound": "vgg_sound.read",
}
"""Every dataset by the name that ``--dataset`` takes: its module here and the reader in it, loaded when asked for."""
_USED_BY = {
    "audio_root": {"csv"},
    "label_separator": {"csv"},
    "task": {"synthetic"},
    "annotations": DATASETS.keys() - {"folder", "synthetic"},
    "classes": {"activitynet", "csv", "folder", "kinetics_sound", "list"},
    "follow_links": DATASETS.keys() - {"synthetic"},
}
"""Fields of a request that not every dataset uses, and those that do."""


def read_dataset(name: str, request: DatasetRequest) -> SourceList:
    """Return the samples of one split of a dataset, with notes about its class names.

    Raises:
        UserInputError: an unknown dataset, an option that this one does not use, or as `Reader` says.
        AnnotationError: as `Reader` says.
    """
    check_choice("--dataset", name, DATASETS)
    for field, names in _USED_BY.items():
        if getattr(request, field) not in (None, False) and name not in names:
            only = f", only {', '.join(names)} does" if len(names) == 1 else ""
            raise UserInputError(f"--{field.replace('_', '-')}: --dataset {name} does not use it{only}; leave it out")
    module, _, function = DATASETS[name].partition(".")
    read: Reader = getattr(import_module(f"{__name__}.{module}"), function)
    return with_label_notes(read(request, name))
