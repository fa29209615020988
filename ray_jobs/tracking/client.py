"""MLflow's client, its complaints, and names it takes.

What MLflow takes as names and values, and how everything else is changed so that nothing is refused or lost.

MLflow refuses a whole batch for one bad name. Names here are letters and digits of any script, ``_ - . : /`` and
spaces, at most 250 characters, and would mean the same as a path. A changed name ends in the hash of the original:
two names never become one.

What is wrong with an MLflow store, in words that change only when the trouble does.

Reaching an MLflow store: a client that gives up within seconds, and errors that say what to do.
"""

import contextlib
import hashlib
import math
import posixpath
import re
import sqlite3
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ca2st.durable import take_lock
from ray_jobs import environment
from ray_jobs.errors import TrackingUnavailableError
from ray_jobs.redaction import redacted, without_credentials

if TYPE_CHECKING:
    from mlflow import MlflowClient


MAX_NAME_CHARACTERS = 250
MAX_PARAM_CHARACTERS = 6000
MAX_TAG_CHARACTERS = 8000
MAX_RUN_NAME_CHARACTERS = 250
MAX_EXPERIMENT_CHARACTERS = 250
MAX_PARAMS = 10_000
LEFT_OUT = "ca2st.params_left_out"
"""The param that says how many were left out."""
_BAD_CHARACTER = re.compile(r"[^/\w.\- :]")
_BATCH_BYTES = 500_000  # a server takes a request of at most a million
_BATCH_ITEMS = 100
_CUT = "...(cut)"


@dataclass(frozen=True, kw_only=True, slots=True)
class Cleaned:
    """Names and values that MLflow takes, and what was done to the originals."""

    values: Mapping[str, str]
    changes: tuple[str, ...]
    """A sentence for each name or value that is not as it was."""


def clean_name(name: str) -> str:
    """`name`, or the nearest name that MLflow takes, ending in eight hexadecimal digits of the original's hash."""
    if _is_taken(name):
        return name
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    path = posixpath.normpath(_BAD_CHARACTER.sub("_", name)).lstrip("/.").strip() or "unnamed"
    return f"{path[: MAX_NAME_CHARACTERS - 9].rstrip('/')}-{digest}"


def clean_value(value: str, limit: int) -> str:
    """`value` as text that every store can hold, of at most `limit` characters; a cut is marked at its end."""
    text = value.replace("\0", "\\0").encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= limit else text[: limit - len(_CUT)] + _CUT


def clean_params(params: Mapping[str, str], *, limit: int = MAX_PARAMS) -> Cleaned:
    """At most `limit` params; the last of more says how many were left out."""
    if len(params) <= limit:
        return _cleaned("param", params, MAX_PARAM_CHARACTERS)
    kept = dict(list(params.items())[: limit - 1])
    note = f"{len(params) - len(kept)} of {len(params)}; the run folder's recipe.json has all"
    clean = _cleaned("param", {**kept, LEFT_OUT: note}, MAX_PARAM_CHARACTERS)
    return Cleaned(values=clean.values, changes=(*clean.changes, f"params left out: {note}"))


def clean_tags(tags: Mapping[str, str]) -> Cleaned:
    """Tags that MLflow takes."""
    return _cleaned("tag", tags, MAX_TAG_CHARACTERS)


def batches(values: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """`values` in their order, in parts small enough for one call."""
    part: dict[str, str] = {}
    num_bytes = 0
    for name, value in values.items():
        size = len(name.encode()) + len(value.encode())
        if part and (len(part) == _BATCH_ITEMS or num_bytes + size > _BATCH_BYTES):
            yield part
            part, num_bytes = {}, 0
        part[name] = value
        num_bytes += size
    if part:
        yield part


def _cleaned(kind: str, values: Mapping[str, str], limit: int) -> Cleaned:
    clean: dict[str, str] = {}
    changes = []
    for name, value in values.items():
        new_name, new_value = clean_name(name), clean_value(value, limit)
        if new_name != name:
            changes.append(f"{kind} {name!a} is called {new_name}")
        if new_value != value:
            changes.append(f"the value of {kind} {new_name}, {len(value)} characters, was cut or cleaned")
        clean[new_name] = new_value
    return Cleaned(values=clean, changes=tuple(changes))


def _is_taken(name: str) -> bool:
    is_plain = bool(name) and len(name) <= MAX_NAME_CHARACTERS and not _BAD_CHARACTER.search(name)
    return is_plain and posixpath.normpath(name) == name and name != "." and not name.startswith(("..", "/"))


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

    @property
    def signature(self) -> tuple[str, str]:
        """Equal for the same trouble met again."""
        return self.kind, self.detail if self.kind in ("refused", "rejected", "failing", "busy") else ""

    def told(self, uri: str, what_to_do: str) -> str:
        """A sentence: the store, the trouble, and what to do about it."""
        wait = f", for {self.retry_after_seconds:g} s" if self.retry_after_seconds is not None else ""
        mend = f"{_CREDENTIALS} " if self.kind == "refused" else ""
        when = "" if self.kind in ("refused", "rejected") else " when it is back"
        return f"MLflow at {redacted(uri)} {_WORDS[self.kind]} ({self.detail}{wait}); {mend}{what_to_do}{when}"


class StoreError(TrackingUnavailableError):
    """The store did not do what was asked; `complaint` says why."""

    def __init__(self, message: str, complaint: Complaint) -> None:
        super().__init__(message)
        self.complaint = complaint


def complaint_of_status(status: int, *, retry_after: str | None = None) -> Complaint:
    """The trouble behind an HTTP status; `retry_after` is the header of that name (seconds; dates are not read)."""
    seconds = float(retry_after) if retry_after is not None and retry_after.strip().isdigit() else None
    kind: Kind = "failing" if status >= 500 else "rejected"
    kind = {401: "refused", 403: "refused", 429: "busy"}.get(status, kind)  # type: ignore[assignment]  # all of Kind
    return Complaint(kind=kind, detail=str(status), retry_after_seconds=seconds)


def complaint_of_error(error: Exception) -> Complaint:
    """The trouble behind an exception of MLflow or of the machine."""
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
    """At most 300 characters, without quotation marks at the end; addresses in memory would differ each time."""
    return re.sub(r"<[^<>]* object at 0x[0-9a-f]+>:? ?", "", text).strip("'\" ")[:300]


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
    with lock.open("rb") as file:
        return not take_lock(file, shared=True)


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
