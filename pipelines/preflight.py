"""What a loader asks of a shard set before its first step, beyond the files' sizes."""

from collections.abc import Sequence
from dataclasses import dataclass

from ca2st.errors import UserInputError
from ca2st.spec import ClipSpec
from sharding.codecs import STORED_CODECS
from sharding.shard_set import ShardSet


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetColumn:
    """A label space that a batch carries."""

    name: str
    column: int
    """Its place among the manifest's label spaces, hence in the index's ``labels``."""
    num_classes: int


def check_manifest(shard_set: ShardSet, clip: ClipSpec) -> None:
    """Refuse a set whose codec or spectrograms this loader does not read.

    Raises:
        UserInputError: an unknown codec, colours that no decoder here expects, or another number of mel bins than the
            clip's.
    """
    manifest = shard_set.manifest
    video = manifest.video
    if video.codec not in STORED_CODECS:
        raise UserInputError(
            f"{shard_set.root}: expected codec {' or '.join(STORED_CODECS)}, found {video.codec}; "
            "use a matching release, or convert with `ca2st shard build --codec mjpeg`"
        )
    expected = STORED_CODECS[video.codec].colour
    if video.colour not in (None, expected):
        raise UserInputError(
            f"{shard_set.root}: expected colours {expected} for {video.codec}, which is what decoders take them for, "
            f"found {video.colour}; convert again"
        )
    if manifest.audio.num_mel_bins != clip.num_mel_bins:
        raise UserInputError(
            f"{shard_set.root}: expected {clip.num_mel_bins} mel bins, found {manifest.audio.num_mel_bins}; "
            "set clip.num_mel_bins or convert again"
        )


def target_columns(shard_set: ShardSet, targets: Sequence[str]) -> tuple[TargetColumn, ...]:
    """Where the label spaces named by `targets` stand in the index.

    Raises:
        UserInputError: none is named, or the set has none of that name.
    """
    if not targets:
        raise UserInputError("targets: expected at least one label space, found none")
    manifest = shard_set.manifest
    spaces = [manifest.label_space(name) for name in targets]
    return tuple(
        TargetColumn(name=space.name, column=manifest.label_spaces.index(space), num_classes=len(space.classes))
        for space in spaces
    )
