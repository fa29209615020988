"""What can be refused before anything is decoded or written."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from ca2st.errors import EnvironmentFault, UserInputError
from sharding.errors import AnnotationError
from sharding.source import SourceList, SourceSample


def check_source(source: SourceList) -> None:
    """Refuse an empty list, ids that are no text or not unique, labels outside their space, no media file at all."""
    if not source.samples:
        raise UserInputError(f"{source.dataset} {source.split}: expected at least one sample, found none")
    seen: dict[str, str] = {}
    for sample in source.samples:
        if sample.sample_id in seen:
            raise AnnotationError(
                f"{sample.where}: sample id {sample.sample_id!r} is there already, at {seen[sample.sample_id]}; "
                "give each segment its own id"
            )
        seen[sample.sample_id] = sample.where
        _check_is_text(sample)
        sizes = [len(space.classes) for space in source.label_spaces]
        if len(sample.labels) != len(sizes) or any(
            not 0 <= at < size for at, size in zip(sample.labels, sizes, strict=True)
        ):
            raise AnnotationError(f"{sample.where}: expected a label in each of {sizes} classes, found {sample.labels}")
    if not any(sample.path.is_file() for sample in source.samples):
        first = source.samples[0]
        raise UserInputError(
            f"none of the {len(source.samples)} media files exists; "
            f"the first is {first.path} ({first.where}); check --media"
        )


def _check_is_text(sample: SourceSample) -> None:
    """Ids and file names go into the samples' JSON: names in bytes that are no UTF-8 cannot."""
    for name in (sample.sample_id, sample.path.name):
        try:
            name.encode()
        except UnicodeEncodeError:
            raise AnnotationError(
                f"{sample.where}: expected a name that UTF-8 can write, found {name!a}; rename the file"
            ) from None


@contextlib.contextmanager
def output_folder(out: Path) -> Iterator[None]:
    """`out` as an existing folder; removed again if it was made here and stays empty."""
    existed = out.exists()
    if existed and not out.is_dir():
        raise UserInputError(f"{out}: expected a folder, found a file; choose another --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EnvironmentFault(f"cannot make {out}: {error.strerror}; choose another --out") from error
    try:
        yield
    finally:
        if not existed:
            with contextlib.suppress(OSError):
                out.rmdir()
