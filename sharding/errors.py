"""Errors of conversion and of the shard format; exit codes come from `ca2st.errors`."""

from typing import TYPE_CHECKING, Literal

from ca2st.errors import CA2STError, DataDamageError, EnvironmentFault, UserInputError

if TYPE_CHECKING:
    from sharding.folder import Reject


RejectReason = Literal[
    "missing_file",  # the file does not exist or cannot be read
    "empty_file",  # the file has no bytes
    "not_a_video",  # no known video container
    "not_a_sound",  # a file of its own for the sound that is no known container
    "no_index",  # an MP4 without its moov box
    "no_video_stream",  # a container without a video stream
    "truncated",  # the container claims more than the file holds
    "decode_error",  # a packet or frame that does not decode cleanly
    "bad_timestamps",  # frame times that are missing or do not increase
    "hdr",  # a high dynamic range (PQ, HLG) while --hdr refuse
    "encrypted",  # a stream under DRM, which nobody without its key can decode
    "no_audio",  # no sound in the segment, or digital silence, while --audio is required
    "bad_spectrogram",  # a spectrogram with NaN, infinity or one value everywhere
    "too_large",  # a limit on bytes, duration, frames or pixels
    "too_small",  # frames smaller than the stored codec takes
    "segment_outside",  # the annotated segment lies behind the end of the media
    "source_changed",  # the file changed while it was read
    "timeout",  # decoding took longer than the clip timeout
    "decoder_crash",  # the decoding process died
    "out_of_memory",  # decoding needed more memory than the limit
    "internal_error",  # a fault of this program on this file; please report it
]
"""Why a source gives no sample; rejects are counted by it."""


class AnnotationError(UserInputError):
    """An annotation file, row or label that cannot be used; the message holds file:line:column."""


class ConversionRefusedError(UserInputError):
    """The output folder belongs to another conversion: other sources, parameters or tool versions, or a live one."""


class ManifestError(UserInputError):
    """A folder without a manifest, or with one this version cannot read."""


class ShardDamageError(DataDamageError):
    """Bytes on disk are not those the manifest names."""


class RejectBudgetError(DataDamageError):
    """More samples were rejected than ``--max-rejects`` allows."""


class AllRejectedError(UserInputError):
    """Not one source gave a sample; `rejects` (of `sharding.folder`) say why each did not."""

    def __init__(self, message: str, *, rejects: "tuple[Reject, ...]") -> None:
        super().__init__(message)
        self.rejects = rejects


class UnlikeNodeError(EnvironmentFault):
    """A node of the cluster does not see the media as this machine does, or would write other bytes."""


class MediaError(CA2STError):
    """A video that cannot be converted."""

    def __init__(self, reason: RejectReason, message: str) -> None:
        super().__init__(message)
        self.reason = reason
