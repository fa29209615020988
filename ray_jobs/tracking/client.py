"""Reaching an MLflow store: a client that gives up within seconds, and what is wrong with a store.

Complaints are put in words that change only when the trouble does.
"""

import contextlib
import math
import re
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ca2st.durable import take_lock
from ray_jobs import environment
from ray_jobs.errors import TrackingUnavailableError
from ray_jobs.redaction import redacted, without_credentials
from sharding.format.remote import doubled_pause

if TYPE_CHECKING:
    from mlflow import MlflowClient


Say = Callable[[str], None]
"""Writes a sentence into the log."""
Kind = Literal["unreachable", "silent", "failing", "busy", "locked", "refused", "rejected"]

_RETRIED_STATUS = re.compile(r"too many (\d{3}) error responses")
_STATUS = re.compile(r"failed with error code (\d{3})")
_CAUSE = re.compile(r"\(Caused by (\w+)\((?:.*?: )?(.*?)\)*$")
_CODES = {
    "UNAUTHENTICATED": 401,
    "CUSTOMER_UNAUTHORIZED": 401,
    "PERMISSION_DENIED": 403,
    "REQUEST_LIMIT_EXCEEDED": 429,
    "RESOURCE_EXHAUSTED": 429,
    "TEMPORARILY_UNAVAILABLE": 503,
}
_WORDS: dict[Kind, str] = {
    "unreachable": "cannot be reached",
    "silent": "does not answer",
    "failing": "fails",
    "busy": "asks to wait",
    "locked": "is locked by another program",
    "refused": "refuses the credentials",
    "rejected": "rejects what is sent",
}
_CREDENTIALS = (
    "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, in the environment, then"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Complaint:
    """One kind of trouble with a store."""

    kind: Kind
    detail: str
    """The status or the beginning of the error, without secrets."""
    retry_after_seconds: float | None = None
    """How long the store asks to be left alone."""

    def error(self, uri: str, what_to_do: str) -> "StoreError":
        """Return what is raised: it says the store, the trouble, and what to do about it."""
        wait = f", for {self.retry_after_seconds:g} s" if self.retry_after_seconds is not None else ""
        fix = f"{_CREDENTIALS} " if self.kind == "refused" else ""
        when = "" if self.kind in ("refused", "rejected") else " when it is back"
        trouble = f"MLflow at {redacted(uri)} {_WORDS[self.kind]} ({self.detail}{wait})"
        return StoreError(f"{trouble}; {fix}{what_to_do}{when}", self)


class StoreError(TrackingUnavailableError):
    """The store did not do what was asked; `complaint` says why."""

    def __init__(self, message: str, complaint: Complaint) -> None:
        super().__init__(message)
        self.complaint = complaint


def complaint_of_status(status: int, *, retry_after: str | None = None) -> Complaint:
    """Return the trouble behind an HTTP status; `retry_after` is that header (seconds; dates are not read)."""
    seconds = float(retry_after) if retry_after is not None and retry_after.strip().isdecimal() else None
    known: dict[int, Kind] = {401: "refused", 403: "refused", 429: "busy"}
    kind = known.get(status, "failing" if status >= 500 else "rejected")
    return Complaint(kind=kind, detail=str(status), retry_after_seconds=seconds)


def complaint_of_error(error: Exception) -> Complaint:
    """Return the trouble behind an exception of MLflow or of the machine."""
    text = redacted(str(error))
    first_line = (text.splitlines() or [type(error).__name__])[0]
    if "database is locked" in text or "database table is locked" in text:
        return Complaint(kind="locked", detail="database is locked")
    status = _CODES.get(getattr(error, "error_code", ""))
    if found := _RETRIED_STATUS.search(text) or _STATUS.search(text):
        status = int(found.group(1))
    if status is not None:
        return complaint_of_status(status)
    if "timed out" in text or "timeout exception" in text:
        return Complaint(kind="silent", detail="no answer in time")
    if isinstance(error, OSError) or "failed with exception" in text or "OperationalError" in text:
        cause = _CAUSE.search(first_line)
        return Complaint(kind="unreachable", detail=_short(cause.group(2) if cause else first_line))
    if "DatabaseError" in text:
        return Complaint(kind="failing", detail=_short(first_line))
    return Complaint(kind="rejected", detail=_short(first_line))


def _short(text: str) -> str:
    """Return at most 300 characters, without quotation marks at the end; addresses in memory would differ each time."""
    return re.sub(r"<[^<>]* object at 0x[0-9a-f]+>:? ?", "", text).strip("'\" ")[:300]


_LONGEST_SECONDS = 60.0
_LONGEST_ASKED_SECONDS = 600.0


def pause_seconds(failures: int, complaint: Complaint, *, interval_seconds: float) -> float:
    """Return the seconds until the next try: doubling with the failures up to a minute, or as long as the store asks.

    Refused credentials stay refused: they wait the minute at once. More than ten minutes are not granted.
    """
    longest = max(interval_seconds, _LONGEST_SECONDS)
    if complaint.kind == "refused":
        return longest
    pause = doubled_pause(failures, first_seconds=2 * interval_seconds, longest=longest)
    return max(pause, min(complaint.retry_after_seconds or 0.0, _LONGEST_ASKED_SECONDS))


@dataclass(kw_only=True, slots=True)
class TroubleLog:
    """Reports a trouble once, how often it came back when it changes, and its end."""

    say: Say
    failures: int = 0
    """In a row, of whatever kind."""
    _told: tuple[str, str] | None = None
    _repeats: int = 0

    def failed(self, error: StoreError) -> None:
        """Report that a try failed."""
        self.failures += 1
        kind, detail = error.complaint.kind, error.complaint.detail
        # Details of a store that is not reached (ports, addresses) differ from try to try.
        same = (kind, detail if kind in ("refused", "rejected", "failing", "busy") else "")
        if same == self._told:
            self._repeats += 1
            return
        self.say_repeats()
        self.say(str(error))
        self._told = same

    def succeeded(self) -> None:
        """Report that a try went well."""
        if self.failures:
            self.say_repeats()
            self.say(f"MLflow answers again, after {self.failures} tries in vain")
        self._told, self.failures = None, 0

    def say_repeats(self) -> None:
        """Report what is left, before something else is said or no try follows."""
        if self._repeats:
            self.say(f"(the same {self._repeats} times more)")
        self._repeats = 0


SQLITE = "sqlite:///"
ARTIFACT_FOLDER = "mlflow-artifacts"
_REQUEST_SECONDS = 8
_PROBE = "/api/2.0/mlflow/experiments/get-by-name?experiment_name=ca2st"


@contextlib.contextmanager
def connected(uri: str, what_to_do: str, *, ask_first: bool = False) -> Iterator["MlflowClient"]:
    """Yield a client of a store; errors of the store in the block are raised as one that says what the trouble is.

    `what_to_do`: what the person is told to do then. `ask_first`: ask a server one small question before more is sent
    to one that was in trouble.

    Raises:
        StoreError: a TrackingUnavailableError that says what kind of trouble it is, and `what_to_do`.
    """
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    if ask_first and (complaint := _complaint_of_server(uri)) is not None:
        raise complaint.error(uri, what_to_do)
    try:
        yield open_client(uri)
    except (MlflowException, SQLAlchemyError, OSError) as error:  # a store that cannot be opened fails in SQLAlchemy
        complaint = complaint_of_error(error)
        if complaint.kind == "rejected":  # MLflow's client hides the status of an answer that is not its own
            complaint = _complaint_of_server(uri) or complaint
        raise complaint.error(uri, what_to_do) from error


def _complaint_of_server(uri: str) -> Complaint | None:
    """Ask a server one small question: unlike MLflow's own calls it learns how long it asks to be left alone.

    None: it would take what is sent, or is no server.
    """
    if not uri.startswith(("http://", "https://")):
        return None
    from mlflow.exceptions import MlflowException
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request

    try:
        credentials = get_default_host_creds(uri)  # type: ignore[no-untyped-call]  # MLflow's; refuses bad settings
        response = http_request(  # type: ignore[no-untyped-call]  # MLflow's
            credentials, _PROBE, "GET", max_retries=0, raise_on_status=False
        )
    except (MlflowException, OSError) as error:
        return complaint_of_error(error)
    if response.status_code in (401, 403, 429) or response.status_code >= 500:
        return complaint_of_status(response.status_code, retry_after=response.headers.get("Retry-After"))
    return None


@contextlib.contextmanager
def may_exist() -> Iterator[None]:
    """Accept that what the block makes in MLflow is there already: another run may make it at the same moment."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def open_client(uri: str) -> "MlflowClient":
    """Return a client that gives up on a dead server within seconds; make the tables of an SQLite store."""
    from mlflow import MlflowClient
    from mlflow.environment_variables import MLFLOW_HTTP_REQUEST_MAX_RETRIES, MLFLOW_HTTP_REQUEST_TIMEOUT

    # By default a dead server is retried for four minutes per call. A retried call could make a run twice.
    for setting, value in ((MLFLOW_HTTP_REQUEST_MAX_RETRIES, 0), (MLFLOW_HTTP_REQUEST_TIMEOUT, _REQUEST_SECONDS)):
        if not setting.is_set():  # type: ignore[no-untyped-call]  # MLflow's
            setting.set(value)  # type: ignore[no-untyped-call]  # MLflow's
    if (path := sqlite_path(uri)) is not None:
        _make_tables(path)
        _check_opens(path)
    return MlflowClient(tracking_uri=uri)


def sqlite_path(uri: str) -> Path | None:
    """Return the file of an SQLite store; None for other stores."""
    return Path(uri.removeprefix(SQLITE).partition("?")[0]) if uri.startswith(SQLITE) else None


def anchored(uri: str) -> str:
    """Return `uri`; of an SQLite store with its whole path, by which it is found from any folder."""
    path = sqlite_path(uri)
    if path is None:
        return uri
    _, mark, options = uri.partition("?")
    return f"{SQLITE}{path.absolute()}{mark}{options}"


def artifact_location(uri: str) -> str | None:
    """Return where artefacts of a new experiment go: beside an SQLite store; None: a server decides for itself."""
    path = sqlite_path(uri)
    return None if path is None else (path.resolve().parent / ARTIFACT_FOLDER).as_uri()


def whole_uri(stored: str, runs_root: Path) -> str:
    """Return the address with its credentials, which are kept in the environment and in no file."""
    candidate = environment.default_tracking_uri(runs_root)
    return candidate if without_credentials(candidate) == stored else stored


def is_making_tables(uri: str) -> bool:
    """Return whether some process is making the tables of this SQLite store at the moment, which takes many seconds."""
    path = sqlite_path(uri)
    if path is None or path.exists() or not (lock := _lock_path(path)).exists():
        return False
    with lock.open("rb") as file:
        return not take_lock(file, shared=True)


def _make_tables(path: Path) -> None:
    """Make a new store under another name, so that one killed in the middle leaves no half store behind."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with _lock_path(path).open("ab") as file:
        take_lock(file, wait_seconds=math.inf)
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

    MLflow itself soon reports one that is locked or is no database.
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
