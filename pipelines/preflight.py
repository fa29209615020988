"""What a loader asks of a shard set before its first step, beyond the files' sizes."""

from collections.abc import Sequence
from dataclasses import dataclass

from ca2st.errors import UserInputError
from ca2st.spec import ClipSpec
from sharding.codecs import STORED_CODECS
from sharding.manifest import AudioParameters, VideoParameters
from sharding.shard_set import ShardSet

_SPECTROGRAM_FACTS = {
    "sample_rate_hz": ("sample rate", "Hz", "with `--sample-rate {expected}`"),
    "num_mel_bins": ("number of mel bins", "", "with as many"),
    "frame_length_ms": ("window", "ms", "with a release of the same window"),
    "frame_shift_ms": ("hop", "ms", "with a release of the same hop"),
}


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


def check_sound(shard_set: ShardSet, made: AudioParameters, *, whose: str) -> None:
    """Refuse a set whose spectrograms were made otherwise than `made`: to a model they are other sounds.

    For sets that a model hears, and for sets that are read together; `whose` says whose parameters `made` are.

    Raises:
        UserInputError: another sample rate, number of mel bins, window or hop; with both values and the way.
    """
    found = shard_set.manifest.audio
    for name, (fact, unit, way) in _SPECTROGRAM_FACTS.items():
        expected, here = getattr(made, name), getattr(found, name)
        if expected != here:
            raise UserInputError(
                f"{shard_set.where}: expected spectrograms of {fact} {_with_unit(expected, unit)} as {whose} has, "
                f"found {_with_unit(here, unit)}; convert these videos {way.format(expected=expected)}"
            )


def require_sound(shard_set: ShardSet, *, whose: str) -> None:
    """Refuse a set that was made without any sound, for a model that hears.

    Raises:
        UserInputError: as said; a set with sound where there is some (``--audio optional``) is none.
    """
    if shard_set.manifest.audio.policy == "none":
        raise UserInputError(
            f"{shard_set.where}: expected shards with sound for {whose}, which hears, found a set that was made with "
            "`--audio none`; convert these videos with `--audio optional`, or use a model without an audio expert"
        )


def picture_notes(shard_set: ShardSet, made: VideoParameters, *, whose: str) -> list[str]:
    """What of a set's pictures is another than `made`, a line each: another size or frame rate is read all the same."""
    found = shard_set.manifest.video
    pairs = [
        (f"{found.short_side} pixels on the shorter side", f"{made.short_side}"),
        (_frame_rate(found), _frame_rate(made)),
    ]
    differ = [found.short_side != made.short_side, found.frames_per_second != made.frames_per_second]
    return [
        f"{shard_set.where}: its videos have {here}, those that {whose} was trained on {there}; results may differ"
        for is_other, (here, there) in zip(differ, pairs, strict=True)
        if is_other
    ]


def _frame_rate(video: VideoParameters) -> str:
    return "every frame" if video.frames_per_second is None else f"at most {video.frames_per_second:g} frames a second"


def _with_unit(value: float | int, unit: str) -> str:
    return f"{value:g} {unit}".rstrip()


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
