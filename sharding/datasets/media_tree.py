"""Where the media of a published dataset lie: annotations without files become samples with their files.

Owners, downloaders and users keep one dataset in many layouts: flat, by split, by class or participant, as long videos
or ready-cut clips, with any ending. A reader says which names a segment's file may have; the media folder is listed
once, and the file is the one that has such a name, wherever it lies.
"""

import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ca2st.errors import UserInputError, listed
from sharding.datasets.request import VIDEO_SUFFIXES, DatasetRequest, needed_media
from sharding.datasets.table import Problems
from sharding.errors import AnnotationError
from sharding.format.shard_set import LabelSpace
from sharding.source import MISSING_MEDIA, OTHER_COUNT, SourceList, SourceSample

PUBLISHED_ROWS: dict[str, dict[str, tuple[int, ...]]] = {
    "activitynet": {"train": (14_822,), "validation": (7_273,)},
    "epic_kitchens_100": {"train": (67_217,), "validation": (9_668,), "test": (13_092,)},
    "epic_sounds": {"train": (60_055,), "validation": (8_035,), "test": (5_131,)},
    "hd_epic_sounds": {"test": (50_968,)},
    "kinetics_400": {"train": (246_534,), "validation": (19_906, 19_796), "test": (38_685,)},
    "kinetics_sound": {"train": (14_799,), "validation": (1_544, 1_594), "test": (2_597,)},
    "something_something_v2": {"train": (168_913,), "validation": (24_777,), "test": (27_157,)},
    "ucf_101": {"train": (9_537, 9_586, 9_624), "test": (3_783, 3_734, 3_696)},
    "vgg_sound": {"train": (183_730,), "test": (15_446,), "validation": (15_446,)},
}
"""Samples per split of the published lists, after what is left out; several where there are several lists."""
PUBLISHED_WITH_SOUND: dict[str, dict[str, tuple[int, ...]]] = {
    "ucf_101": {"train": (4_893, 4_926, 4_941), "test": (1_944, 1_911, 1_896)},
}
"""The same where only samples with sound are kept, as the audio-visual papers do."""
_REPLACEMENTS = "replacement"
"""Folders of this name or beginning hold files that stand for damaged ones of the same name."""
_ALSO_CALLED = {"train": ("training",), "validation": ("val", "valid", "validate"), "test": ("testing",)}
"""Names that folders of a split have beside the split's own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Annotation:
    """One annotated segment before its file is known."""

    sample_id: str
    labels: tuple[int, ...]
    where: str
    """Where it stands, ``file:line``."""
    clips: tuple[str, ...] = ()
    """Names without ending that a file has which is the whole segment, the usual one first."""
    videos: tuple[str, ...] = ()
    """Names without ending that a file has which the segment is cut from, the usual one first."""
    start_seconds: float | None = None
    end_seconds: float | None = None
    folder: str = ""
    """Name of the class: a folder of this name tells files of one name apart."""


def located(
    annotations: Iterable[Annotation],
    request: DatasetRequest,
    *,
    dataset: str,
    spaces: Sequence[LabelSpace],
    what: str,
    suffix: str = ".mp4",
    notes: Mapping[str, Sequence[str]] | None = None,
) -> SourceList:
    """Return the source list of `annotations`: unique ids, their files, what is missing within ``--max-missing``.

    Args:
        annotations: In the order of the owners' file. Where none has a label, the set is one without labels.
        request: What the user asked for.
        dataset: Its name.
        spaces: Label spaces in the order of `Annotation.labels`; all of them are targets.
        what: What the media folder holds, for messages.
        suffix: Ending of a file that is not looked for (``--dry-run``).
        notes: What was unusual and accepted: kind to places.

    Raises:
        UserInputError: no media folder, not one file found, or more missing than ``--max-missing`` allows.
        AnnotationError: no annotations, or a segment has several files, or one that a link leads outside.
    """
    of_own_id = list(_unique(annotations))
    if not of_own_id:
        raise AnnotationError(f"{request.annotations}: expected rows of {dataset}, found none")
    kept = of_own_id[: request.limit]
    found = dict(notes or {})
    published = PUBLISHED_ROWS.get(dataset, {}).get(request.split, ())
    if published and len(of_own_id) not in published:
        found[OTHER_COUNT] = [f"{len(of_own_id)} instead of {' or '.join(map(str, published))}"]
    if request.check_media:
        tree = MediaTree(needed_media(request, dataset, what=what), follow_links=request.follow_links)
        samples, missing = tree.locate(kept, split=request.split)
        if missing and not request.max_missing.allows(len(missing), len(kept)):
            share = math.ceil(1000 * len(missing) / len(kept)) / 10
            raise UserInputError(
                f"--media {request.media}: expected a file for each of {len(kept)} samples, found none for "
                f"{len(missing)} ({listed(missing)}){tree.hint}; fetch them, or leave them out with "
                f"--max-missing {share:g}%"
            )
        found[MISSING_MEDIA] = missing
    else:
        folder = request.media or Path()
        samples = [_sample(one, folder / f"{[*one.videos, *one.clips][0]}{suffix}", not one.videos) for one in kept]
    return SourceList(
        dataset=dataset,
        split=request.split,
        label_spaces=tuple(spaces),
        targets=tuple(space.name for space in spaces),
        samples=tuple(samples),
        notes={kind: tuple(places) for kind, places in found.items() if places},
        labelling="one" if any(one.labels for one in of_own_id) else "none",
    )


def _unique(annotations: Iterable[Annotation]) -> Iterator[Annotation]:
    """Put ``#2``, ``#3``, ... behind ids that come again."""
    times: Counter[str] = Counter()
    for one in annotations:
        times[one.sample_id] += 1
        again = times[one.sample_id]
        yield one if again == 1 else replace(one, sample_id=f"{one.sample_id}#{again}")


class MediaTree:
    """Every video below the folder of ``--media`` by its name without ending; hidden files are passed over."""

    def __init__(self, folder: Path, *, follow_links: bool = False) -> None:
        self._folder, self._real_folder, self._follow_links = folder, folder.resolve(), follow_links
        self._named: dict[str, list[str]] = {}
        self.hint = ""
        """What to try where files are missing, for messages."""
        # Names as texts: public sets have hundreds of thousands of files, of which a Path each takes seconds.
        for parent, folders, files in os.walk(folder, followlinks=follow_links):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            if not follow_links and any(os.path.islink(os.path.join(parent, name)) for name in folders):  # noqa: PTH114, PTH118
                self.hint = " (folders that are links were not searched: with --follow-links they are)"
            for name in sorted(files):
                stem, dot, suffix = name.rpartition(".")
                if dot and stem and not name.startswith(".") and f".{suffix.lower()}" in VIDEO_SUFFIXES:
                    self._named.setdefault(stem, []).append(os.path.join(parent, name))  # noqa: PTH118  # as said
        self._lower: dict[str, list[str]] = {}
        for stem in self._named:
            self._lower.setdefault(stem.lower(), []).append(stem)

    def locate(self, annotations: Sequence[Annotation], *, split: str) -> tuple[list[SourceSample], list[str]]:
        """Return the annotations with their files, and the ids of those without any.

        Raises:
            UserInputError: not one file was found.
            AnnotationError: a segment has several files, or one that a link leads outside.
        """
        problems = Problems(self._folder, advice="keep one of them, inside --media, and run again")
        samples, missing = [], []
        for one in annotations:
            files = [(path, False) for path in self._files(one.videos, one.folder, split)]
            files += [(path, True) for path in self._files(one.clips, one.folder, split)]
            if not files:
                missing.append(one.sample_id)
                continue
            path, is_clip = files[0]
            if len(files) > 1:
                names = " and ".join(path for path, _ in files)
                problems.add("media found twice", f"{one.where}: expected one file for {one.sample_id}, found {names}")
            elif not (self._follow_links or Path(path).resolve().is_relative_to(self._real_folder)):
                problems.add(
                    "outside the media folder",
                    f"{one.where}: {path}: expected a file inside --media {self._folder}, links followed "
                    "(a link leads outside: with --follow-links it may)",
                )
            samples.append(_sample(one, Path(path), is_clip))
        problems.refuse_any()
        if annotations and not samples:
            first = annotations[0]
            names = " or ".join(f"{name}.mp4" for name in (*first.videos, *first.clips))
            raise UserInputError(
                f"--media {self._folder}: expected {names} and so on, in any folder and with any ending of a video, "
                f"found none of {len(annotations)} segments{self.hint}; check --media"
            )
        return samples, missing

    def _files(self, names: Sequence[str], folder: str, split: str) -> list[str]:
        """Return the files of the first name that has any, less those that a replacement, split or folder rules out."""
        of_split = {_plain(name) for name in (split, *_ALSO_CALLED.get(split, ()))}
        wanted: tuple[Callable[[str], bool], ...] = (
            lambda name: name.startswith(_REPLACEMENTS),
            lambda name: name in of_split,
            lambda name: name == _plain(folder),
        )
        for name in names:
            if files := self._named.get(name) or self._alike(name):
                for is_wanted in wanted:
                    if len(files) > 1:
                        inside = [path for path in files if any(map(is_wanted, self._folders_of(path)))]
                        files = inside or files
                return files
        return []

    def _alike(self, name: str) -> list[str]:
        """Return files whose name differs by case alone, where there is one such name."""
        names = self._lower.get(name.lower(), [])
        return self._named[names[0]] if len(names) == 1 else []

    def _folders_of(self, path: str) -> list[str]:
        return [_plain(name) for name in Path(path).relative_to(self._folder).parent.parts]


def _plain(folder: str) -> str:
    return folder.lower().replace("_", " ")


def _sample(one: Annotation, path: Path, is_clip: bool) -> SourceSample:
    return SourceSample(
        sample_id=one.sample_id,
        path=path,
        start_seconds=None if is_clip else one.start_seconds,
        end_seconds=None if is_clip else one.end_seconds,
        labels=one.labels,
        where=one.where,
    )
