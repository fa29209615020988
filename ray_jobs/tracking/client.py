"""Reaching an MLflow store: a client that gives up within seconds, and errors that say what to do."""

import contextlib
import fcntl
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ray_jobs import environment
from ray_jobs.redaction import without_credentials
from ray_jobs.tracking.complaints import StoreError, complaint_of_error, complaint_of_status

if TYPE_CHECKING:
    from mlflow import MlflowClient

SQLITE = "sqlite:///"
ARTIFACT_FOLDER = "mlflow-artifacts"
_REQUEST_SECONDS = 8
_PROBE = "/api/2.0/mlflow/experiments/get-by-name?experiment_name=ca2st"


def open_client(uri: str) -> "MlflowClient":
    """A client that gives up on a dead server within seconds; the folder and tables of an SQLite store are made."""
    from mlflow import MlflowClient
    from mlflow.environment_variables import MLFLOW_HTTP_REQUEST_MAX_RETRIES, MLFLOW_HTTP_REQUEST_TIMEOUT

    # By default a dead server is retried for four minutes a call. A retried call could make a run twice.
    for setting, value in ((MLFLOW_HTTP_REQUEST_MAX_RETRIES, 0), (MLFLOW_HTTP_REQUEST_TIMEOUT, _REQUEST_SECONDS)):
        if not setting.is_set():  # type: ignore[no-untyped-call]  # MLflow's
            setting.set(value)  # type: ignore[no-untyped-call]  # MLflow's
    if (path := sqlite_path(uri)) is not None:
        _make_tables(path)
        _check_opens(path)
    return MlflowClient(tracking_uri=uri)


def sqlite_path(uri: str) -> Path | None:
    """The file of an SQLite store; None for other stores."""
    return Path(uri.removeprefix(SQLITE).partition("?")[0]) if uri.startswith(SQLITE) else None


def anchored(uri: str) -> str:
    """`uri`; of an SQLite store with its whole path, by which it is found from any folder."""
    path = sqlite_path(uri)
    if path is None:
        return uri
    _, mark, options = uri.partition("?")
    return f"{SQLITE}{path.absolute()}{mark}{options}"


def artifact_location(uri: str) -> str | None:
    """Where artefacts of a new experiment go: beside an SQLite store; None: a server decides for itself."""
    path = sqlite_path(uri)
    return None if path is None else (path.resolve().parent / ARTIFACT_FOLDER).as_uri()


def whole_uri(stored: str, runs_root: Path) -> str:
    """The address with its credentials, which are kept in the environment and in no file."""
    candidate = environment.default_tracking_uri(runs_root)
    return candidate if without_credentials(candidate) == stored else stored


def is_making_tables(uri: str) -> bool:
    """Whether some process is making the tables of this SQLite store at the moment, which takes many seconds."""
    path = sqlite_path(uri)
    if path is None or path.exists() or not (lock := _lock_path(path)).exists():
        return False
    with lock.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def knock(uri: str, what_to_do: str) -> None:
    """Ask a server one small question, before more is sent to one that was in trouble.

    Unlike MLflow's own calls it learns how long the server asks to be left alone. Other stores are not asked.

    Raises:
        StoreError: it does not answer, or with a status that says that it would not take anything.
    """
    if not uri.startswith(("http://", "https://")):
        return
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request

    with reachable(uri, what_to_do):
        credentials = get_default_host_creds(uri)  # type: ignore[no-untyped-call]  # MLflow's
        response = http_request(  # type: ignore[no-untyped-call]  # MLflow's
            credentials, _PROBE, "GET", max_retries=0, raise_on_status=False
        )
    if response.status_code in (401, 403, 429) or response.status_code >= 500:
        complaint = complaint_of_status(response.status_code, retry_after=response.headers.get("Retry-After"))
        raise StoreError(complaint.told(uri, what_to_do), complaint)


@contextlib.contextmanager
def reachable(uri: str, what_to_do: str) -> Iterator[None]:
    """Turn the errors of a store that does not do what is asked into one that says `what_to_do`.

    Raises:
        StoreError: a TrackingUnavailableError that says what kind of trouble it is.
    """
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, SQLAlchemyError, OSError) as error:  # a store that cannot be opened fails in SQLAlchemy
        complaint = complaint_of_error(error)
        raise StoreError(complaint.told(uri, what_to_do), complaint) from error


def _make_tables(path: Path) -> None:
    """Make a new store under another name, so that one killed in the middle leaves no half store behind."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with _lock_path(path).open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if path.exists():
            return
        from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

        temporary = path.with_name(f".{path.name}.new")
        temporary.unlink(missing_ok=True)
        store = SqlAlchemyStore(f"{SQLITE}{temporary}", str(path.parent / ARTIFACT_FOLDER))  # type: ignore[no-untyped-call]  # MLflow's
        store.engine.dispose()
        temporary.replace(path)


def _check_opens(path: Path) -> None:
    """Fail at once where SQLite cannot open the file: MLflow would try for a hundred seconds.

    One that is locked, or is no database, MLflow itself tells soon.
    """
    try:
        with contextlib.closing(
            sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", uri=True, timeout=0)
        ) as database:
            database.execute("PRAGMA schema_version")
    except sqlite3.DatabaseError as error:
        if isinstance(error, sqlite3.OperationalError) and "locked" not in str(error):
            reason = "it is a folder" if path.is_dir() else "see its permissions and its disk"
            raise OSError(f"{error}: {reason}") from error


def _lock_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.lock")
