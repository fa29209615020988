"""What a dataset reader hands to the converter: a list of annotated segments of media files, and notes about them.

Notes say what was unusual about a source list or its clips and was accepted, counted by kind, never passed over. Most
kinds question the data: somebody should look, and ``--strict`` refuses them. `HARMLESS` names those that only say how a
clip was converted to what players show.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ca2st.checked_json import canonical_json
from ca2st.errors import UserInputError, listed
from sharding.errors import AnnotationError
from sharding.format.index import id_hash
from sharding.format.shard_set import Labelling, LabelSpace

_HASHED_AT_ONCE = 10_000


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
    """Class indices, as the list's `labelling` says: one per label space in its order, or those of the one space that
    apply, ascending, or none."""
    where: str
    """Where the annotation stands, ``file:line``, for messages."""
    sound_path: Path | None = None
    """A file of its own for the sound, which begins when the media file does; None: the media file's own sound."""

    @property
    def seconds(self) -> float | None:
        """Length of the segment as annotated; None: to the end of the file."""
        return None if self.end_seconds is None else max(0.0, self.end_seconds - (self.start_seconds or 0.0))


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceList:
    """Every sample of one split, in annotation order."""

    dataset: str
    split: str
    label_spaces: tuple[LabelSpace, ...]
    targets: tuple[str, ...]
    """Label spaces that a training reads by default."""
    samples: Sequence[SourceSample]
    """Read from front to back, and by ranges; so it need not be in memory."""
    notes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """What a user should know about the list and was accepted: kind to the places or names concerned."""
    labelling: Labelling = "one"
    """How many labels each sample has."""

    @property
    def sha256(self) -> str:
        """Hash of everything that decides the shards: ids, file names, times, labels and classes, not folders."""
        spaces = [[space.name, *space.classes] for space in self.label_spaces]
        labelling = [] if self.labelling == "one" else [self.labelling]
        head = canonical_json([self.dataset, self.split, *labelling, spaces], is_compact=True)
        digest = hashlib.sha256(head.removesuffix(b"]") + b",[")  # as of one JSON, which a long list has no memory for
        for first in range(0, len(self.samples), _HASHED_AT_ONCE):
            rows = [
                [
                    *(sample.sample_id, sample.path.name, sample.start_seconds, sample.end_seconds, *sample.labels),
                    *([] if sample.sound_path is None else [{"sound": sample.sound_path.name}]),
                ]
                for sample in self.samples[first : first + _HASHED_AT_ONCE]
            ]
            digest.update(b"," * (first > 0) + canonical_json(rows, is_compact=True)[1:-1])
        digest.update(b"]]")
        return digest.hexdigest()

    @property
    def num_classes(self) -> dict[str, int]:
        """Number of classes by target."""
        return {space.name: len(space.classes) for space in self.label_spaces if space.name in self.targets}


def named_labels(labels: tuple[int, ...], spaces: tuple[LabelSpace, ...], labelling: Labelling) -> dict[str, Any]:
    """Return what a sample's JSON says of its labels: by label space an ``index`` and ``name``, or a list of them.

    Empty without labels.
    """
    if labelling == "several":
        (space,) = spaces
        return {space.name: [{"index": at, "name": space.classes[at]} for at in labels]}
    labelled = zip(spaces, labels, strict=labelling == "one")
    return {space.name: {"index": at, "name": space.classes[at]} for space, at in labelled}


LOOK_ALIKE = "labels that look alike"
SEVERAL_LABELS = "labels that may be several"
NO_LABEL = "samples of no class"
"""Kept, in a set of several labels per sample."""
INVISIBLE = "labels with invisible characters"
MISSING_LABELS = "labels that may be missing values"
ONE_CLASS = "class alone"
LEFT_ASIDE = "files left aside"
EMPTY_FOLDERS = "class folders without videos"
UNUSED_CLASSES = "classes without samples"
SILENT_SOUND = "silent sound"
"""A clip whose sound is digital silence: it counts as one without sound."""
MISSING_MEDIA = "samples without a media file"
"""Left out, within ``--max-missing``."""
OTHER_COUNT = "row count that is not the published one"
NO_LENGTH = "segments of no length, left out"
REPEATED = "rows that repeat another, left out"
OTHER_CLASS = "rows of a class that the dataset does not count, left out"
ERRATUM = "rows that the owners' erratum names, left out"
HARMLESS = frozenset(
    {
        *(UNUSED_CLASSES, MISSING_MEDIA, OTHER_COUNT, NO_LENGTH, REPEATED, OTHER_CLASS, ERRATUM),
        "deinterlaced",
        "interlaced, kept",
        "large picture without a colour matrix, taken for BT.601",
        "mirrored",
        "one of several pictures",
        "one of several sound tracks",
        "picture starts late",
        "tone-mapped",
        "wide gamut converted",
    }
)
"""Kinds that question nothing; a kind that is not named here does."""


DONE: dict[str, str] = {
    **dict.fromkeys((NO_LENGTH, REPEATED, OTHER_CLASS, ERRATUM, MISSING_MEDIA, LEFT_ASIDE), "left out"),
    "began inside a group of pictures": "its first pictures, which need earlier ones, left out",
    "deinterlaced": "deinterlaced (yadif)",
    "frames at the same time": "the later one kept",
    "gaps or overlaps in the sound": "sound placed by its timestamps",
    "large picture without a colour matrix, taken for BT.601": "read as BT.601",
    "mirrored": "stored as players show it",
    "one of several pictures": "the default one taken",
    "one of several sound tracks": "the default one, or the first that is not silent, taken",
    "picture starts late": "sound and seconds kept on the file's clock",
    "shape changes inside the clip": "stretched to the first frame's shape",
    "shorter than annotated": "clipped to the end of the video",
    "silent sound": "kept as a clip without sound",
    "sound ends early": "no sound behind its end",
    "sound goes on behind the picture": "cut at the end of the picture",
    "sound starts late": "silence before it",
    "tone-mapped": "converted to BT.709",
    "wide gamut converted": "converted to BT.709",
    "pixel_aspect": "scaled to square pixels",
    "orientation": "turned upright",
}
"""What was done about a kind of note, or of change in a sample's JSON; the others are kept as they are."""
_MOST_EXAMPLES = 3


def examples_of(notes: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, ...]]:
    """Return the first places of each kind of note; of files with a line their names, wherever they lay."""
    return {
        kind: tuple(re.sub(r"^.*/(?=[^/]+:\d+$)", "", place) for place in places[:_MOST_EXAMPLES])
        for kind, places in notes.items()
        if places
    }


def doubtful(notes: Mapping[str, int]) -> dict[str, int]:
    """Return the notes that question the data."""
    return {kind: count for kind, count in notes.items() if kind not in HARMLESS and count}


def refuse_doubtful(notes: Mapping[str, int], examples: Mapping[str, Sequence[str]], *, rest: str) -> None:
    """Refuse notes that question the data, as ``--strict`` asks for; `examples` by kind, `rest` says what to do else.

    Raises:
        UserInputError: naming kinds, counts and the first of the examples.
    """
    if found := doubtful(notes):
        told = "; ".join(f"{count} {kind}{_examples(examples.get(kind, ()), count)}" for kind, count in found.items())
        raise UserInputError(f"--strict: expected nothing that questions the data, found {told}; {rest}")


_ADVICE = {
    SEVERAL_LABELS: "each is one class; for several labels per sample name the column `labels`, and give what stands "
    "between them with --label-separator",
}
"""What to do about a kind of note, behind its line."""


def note_lines(notes: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """Yield a line for each kind of note of a source list, with its first examples."""
    for kind, places in notes.items():
        advice = f"; {_ADVICE[kind]}" if kind in _ADVICE else ""
        told = f"{len(places)} {kind}{_examples(places, len(places))}{advice}"
        yield f"{'note' if kind in HARMLESS else 'warning'}: {told}"


def _examples(places: Sequence[str], count: int) -> str:
    return f" ({listed(places, count=count)})" if places else ""


def check_source(source: SourceList) -> None:
    """Refuse an empty list, ids that are no text or not unique, labels outside their space, no media file at all."""
    if not source.samples:
        raise UserInputError(f"{source.dataset} {source.split}: expected at least one sample, found none")
    sizes = [len(space.classes) for space in source.label_spaces]

    def hashes() -> Iterator[int]:
        for sample in source.samples:
            for name in (sample.sample_id, sample.path.name, *([sample.sound_path.name] if sample.sound_path else [])):
                try:
                    name.encode()  # it goes into the sample's JSON
                except UnicodeEncodeError:
                    raise AnnotationError(
                        f"{sample.where}: expected a name that UTF-8 can write, found {name!a}; rename the file"
                    ) from None
            if expected := _unmet(sample.labels, sizes, source.labelling):
                raise AnnotationError(f"{sample.where}: expected {expected}, found {sample.labels}")
            yield id_hash(sample.sample_id)

    _refuse_repeated_ids(source, np.fromiter(hashes(), np.uint64, len(source.samples)))
    if not any(sample.path.is_file() for sample in source.samples):
        first = source.samples[0]
        raise UserInputError(
            f"none of the {len(source.samples)} media files exists; "
            f"the first is {first.path} ({first.where}); check --media"
        )


def _unmet(labels: tuple[int, ...], sizes: list[int], labelling: Labelling) -> str:
    """Return what was expected of a sample's labels and is not so, in words; empty where they are right."""
    if labelling == "none":
        return "no label" if labels else ""
    if labelling == "several":
        (size,) = sizes
        ascends = all(0 <= at < size for at in labels) and sorted(set(labels)) == list(labels)
        return "" if ascends else f"ascending labels of {size} classes"
    is_right = len(labels) == len(sizes) and all(0 <= at < size for at, size in zip(labels, sizes, strict=True))
    return "" if is_right else f"a label in each of {sizes} classes"


def _refuse_repeated_ids(source: SourceList, hashes: npt.NDArray[np.uint64]) -> None:
    """Refuse an id that is there twice; the hashes find it, which take 8 bytes of memory per sample."""
    hashes.sort()
    suspects = set(hashes[1:][hashes[1:] == hashes[:-1]].tolist())
    seen: dict[str, str] = {}
    for sample in source.samples if suspects else ():
        if id_hash(sample.sample_id) not in suspects:
            continue
        if sample.sample_id in seen:
            raise AnnotationError(
                f"{sample.where}: sample id {sample.sample_id!r} is there already, at {seen[sample.sample_id]}; "
                "give each segment its own id"
            )
        seen[sample.sample_id] = sample.where
    if suspects:
        raise AnnotationError(f"{source.dataset} {source.split}: two sample ids have one hash; change one of {seen}")
