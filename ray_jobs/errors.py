"""Errors of the command line, recipes and launching; exit codes come from `ca2st.errors`."""

from collections.abc import Sequence

from ca2st.errors import CA2STError, EnvironmentFault, UserInputError


class RecipeError(UserInputError):
    """A recipe that cannot be read; the message lists every mistake with file:line."""


class ConflictsError(UserInputError):
    """Sections of a recipe that are at odds with each other; each message begins with the key to change."""

    def __init__(self, messages: Sequence[str]) -> None:
        super().__init__("\n".join(messages))
        self.messages = tuple(messages)


class WorkerFailedError(CA2STError):
    """A worker process ended without a result; carries the exit code that the command ends with."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code  # type: ignore[misc]  # the worker's own code instead of the class's


class TrackingUnavailableError(EnvironmentFault):
    """The MLflow store cannot be reached; nothing is lost, the journal holds it."""
