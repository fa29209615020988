"""Errors of the command line, recipes and launching; exit codes come from `ca2st.errors`."""

from ca2st.errors import CA2STError, EnvironmentFault, UserInputError


class RecipeError(UserInputError):
    """A recipe that cannot be read; the message lists every mistake with file:line."""


class WorkerFailedError(CA2STError):
    """A worker process ended without a result; carries the exit code that the command ends with."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code  # type: ignore[misc]  # the worker's own code instead of the class's


class TrackingUnavailableError(EnvironmentFault):
    """The MLflow store cannot be reached; nothing is lost, the journal holds it."""
