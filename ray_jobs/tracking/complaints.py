"""What is wrong with an MLflow store, in words that change only when the trouble does."""

import re
from dataclasses import dataclass
from typing import Literal

from ray_jobs.errors import TrackingUnavailableError
from ray_jobs.redaction import redacted

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
