"""Errors of training; exit codes come from `ca2st.errors`.

::

    UserInputError        ResumeRefusedError, CheckpointMismatchError, ParameterRuleError, LabelRangeError
    DataDamageError       CheckpointDamagedError
    EnvironmentFault      RunFolderBusyError, RanksDisagreeError, OutOfMemoryFault, RanksSilentError,
                          StopNotSavedError
    NumericError          NonFiniteError
    CA2STError            SourceContractError, IncompleteEvaluationError, PeerFailedError,
                          RunStoppedError -> TerminatedError (143; TimeUpError), InterruptedRunError (130)
"""

import signal
from typing import ClassVar

from ca2st.errors import CA2STError, DataDamageError, EnvironmentFault, NumericError, UserInputError


class ResumeRefusedError(UserInputError):
    """The run folder belongs to another run: the message lists each difference as ``field: was -> is``."""


class CheckpointMismatchError(UserInputError):
    """Tensors of a checkpoint do not fit the model; the message lists every one."""


class ParameterRuleError(UserInputError):
    """A rule about parameters (no decay, layer-wise decay) that matches nothing, or a wrong one."""


class LabelRangeError(UserInputError):
    """A label that the model's head has no class for."""


class CheckpointDamagedError(DataDamageError):
    """A checkpoint whose bytes are not those its COMPLETE.json names."""


class RunFolderBusyError(EnvironmentFault):
    """Another process trains in the same run folder."""


class RanksDisagreeError(EnvironmentFault):
    """Ranks were started with different data, recipes or versions."""


class OutOfMemoryFault(EnvironmentFault):
    """Memory of a device, the machine or /dev/shm did not suffice; the message has the peak and what lowers it."""


class RanksSilentError(EnvironmentFault):
    """A collective was given up after its timeout; names the ranks that are silent, or where each of them stands."""


class StopNotSavedError(EnvironmentFault):
    """The run was asked to stop, and ends, but its newest state could not be saved: a rerun goes on from an older one.

    Not a `RunStoppedError`: who starts runs again by themselves takes those exit codes for a clean stop.
    """

    def __init__(self, message: str, *, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number
        """What asked it to stop."""


class NonFiniteError(NumericError):
    """NaN or infinity in a loss or gradient, found before the update."""

    def __init__(self, message: str, *, keys: tuple[str, ...] = (), parameters: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.keys = keys
        """Samples whose loss, or whose micro-batch's gradient, is not finite."""
        self.parameters = parameters
        """Parameters whose gradient is not finite; empty when the loss already was not."""


class SourceContractError(CA2STError):
    """A loader that broke its promise: too few steps, a wrong share, padding in training."""


class IncompleteEvaluationError(CA2STError):
    """Samples were scored twice, in part, or not at all: no metric is reported."""


class PeerFailedError(CA2STError):
    """Another rank failed; the message is that rank's and so is the exit code."""

    exit_code: int  # type: ignore[misc]  # another rank's code, known only when it arrives

    def __init__(self, message: str, *, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class RunStoppedError(CA2STError):
    """The run stopped because it was asked to; its state is in a checkpoint."""

    exit_code: ClassVar[int] = 128


class TerminatedError(RunStoppedError):
    """Stopped by SIGTERM."""

    exit_code: ClassVar[int] = 128 + signal.SIGTERM


class TimeUpError(TerminatedError):
    """Stopped because its `max_hours` have passed."""


class InterruptedRunError(RunStoppedError):
    """Stopped by SIGINT."""

    exit_code: ClassVar[int] = 128 + signal.SIGINT
