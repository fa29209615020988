"""What a dataset reader hands to the converter: a list of annotated segments of media files."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from sharding.manifest import LabelSpace, sha256_of_json


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceSample:
    """One annotated segment of one media file."""

    sample_id: str
    """Unique within the dataset and readable: ``P01_11_0``, ``cooking/egg.mp4``."""
    path: Path
    """The media file, resolved under the media root."""
    start_seconds: float | None
    """Start of the segment on the media's clock; None with `end_seconds` None: the whole file."""
    end_seconds: float | None
    """End of the segment, exclusive."""
    labels: tuple[int, ...]
    """One class index a label space of the list, in its order."""
    where: str
    """Where the annotation stands, ``file:line``, for messages."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceList:
    """Every sample of one split, in annotation order."""

    dataset: str
    split: str
    label_spaces: tuple[LabelSpace, ...]
    targets: tuple[str, ...]
    """Label spaces that a training reads by default."""
    samples: tuple[SourceSample, ...]
    notes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """What a user should know about the list and was accepted: kind to the places or names concerned."""

    @property
    def sha256(self) -> str:
        """Hash of everything that decides the shards: ids, file names, times, labels and classes, not folders."""
        return sha256_of_json(
            [
                self.dataset,
                self.split,
                [[space.name, *space.classes] for space in self.label_spaces],
                [
                    [sample.sample_id, sample.path.name, sample.start_seconds, sample.end_seconds, *sample.labels]
                    for sample in self.samples
                ],
            ]
        )

    @property
    def num_classes(self) -> dict[str, int]:
        """Number of classes by target."""
        return {space.name: len(space.classes) for space in self.label_spaces if space.name in self.targets}
