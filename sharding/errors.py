"""Errors of conversion and of the shard format; exit codes come from `ca2st.errors`."""

from typing import TYPE_CHECKING

from ca2st.errors import CA2STError, DataDamageError, EnvironmentFault, UserInputError

if TYPE_CHECKING:
    from sharding.folder import Reject


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
    """A video that cannot be converted; `reason` is the code it is counted under in the manifest."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
