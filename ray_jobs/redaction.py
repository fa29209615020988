"""Secrets stay out of recipes, run folders, logs and MLflow: credentials belong in the environment.

A recipe is copied into run folders, checkpoints and MLflow. One with a password in an address is refused when it is
read; what comes from elsewhere (an address in the environment, an error message) is cleaned before it is kept.
"""

import io
import re
import threading
from collections.abc import Mapping
from typing import Any, TextIO

from ca2st.errors import UserInputError
from ca2st.training.documents import flatten

HIDDEN = "[hidden]"
_USER_INFO = re.compile(r"(?<=://)[^/\s@]*:(?:[^/\s\"'<>]*@|[^/\s@]*@)|(?<=http://)[^/\s@]+@|(?<=https://)[^/\s@]+@")
"""``user:password@`` of an address, up to the last @ before a slash; of a web address also a name alone, which is how
tokens are given."""
_SENSITIVE = (
    r"(?:password|passwd|passphrase|secret|token|credentials?|authorization|api[_-]?key|access[_-]?key(?:[_-]?id)?"
    r"|private[_-]?key|secret[_-]?key|signature|sig)"
)
_QUERY = re.compile(rf"(?i)([?&](?:[\w.\-]*[_\-.])?(?:aws)?{_SENSITIVE}=)[^&\s'\"#]+")
_HEADER = re.compile(r"(?i)\b(authorization['\"]?\s*[:=]\s*['\"]?(?:basic|bearer)?|bearer)\s+[^\s'\",]+")
_NAME = re.compile(rf"(?i)(?:^|[_\-./ ]){_SENSITIVE}$")


def redacted(text: str) -> str:
    """`text` with passwords and tokens of the addresses and headers in it replaced by ``[hidden]``."""
    return _HEADER.sub(rf"\1 {HIDDEN}", _clean_addresses(text))


class RedactedStream(io.TextIOBase):
    """A text stream that passes on what is written line by line, redacted: half a line may be half a secret.

    It stands in for a process's standard streams, so that warnings, logs and tracebacks of any library are covered.
    The last line, if it has no end, is passed on by `close`.
    """

    encoding = "utf-8"

    def __init__(self, stream: TextIO) -> None:
        """`stream` gets the lines, and stays open."""
        self._stream = stream
        self._rest = ""
        self._lock = threading.RLock()  # a signal may come in the middle of a line

    def write(self, text: str, /) -> int:
        """Take any piece of text."""
        with self._lock:
            *lines, self._rest = (self._rest + text).split("\n")
            for line in lines:
                self._stream.write(f"{redacted(line)}\n")
        return len(text)

    def flush(self) -> None:
        """Flush the whole lines."""
        self._stream.flush()

    def close(self) -> None:
        """Pass on the rest."""
        if not self.closed:
            self._stream.write(redacted(self._rest))
            super().close()


def redacted_values(values: Mapping[str, str]) -> dict[str, str]:
    """`values` redacted; those with the name of a secret (``api_key``, ``db.password``) hidden altogether."""
    return {name: HIDDEN if names_a_secret(name) else redacted(value) for name, value in values.items()}


def names_a_secret(name: str) -> bool:
    """Whether what `name` stands for is secret: its last word is password, token, secret, api_key and so on."""
    return _NAME.search(name) is not None


def without_credentials(uri: str) -> str:
    """`uri` with neither user nor password nor a secret behind its ``?``, as it is kept in files."""
    place, mark, query = re.sub(r"(?<=://)[^/\s?#]*@", "", uri).partition("?")
    kept = "&".join(part for part in query.split("&") if _QUERY.match(f"?{part}") is None)
    return f"{place}{mark}{kept}" if kept or not query else place


def holds_credentials(text: str) -> bool:
    """Whether an address in `text` has a password or a token in it."""
    return _clean_addresses(text) != text


def refuse_credentials(document: Mapping[str, Any]) -> None:
    """Check that no text of a recipe holds a credential.

    Raises:
        UserInputError: one does; names the setting, never the secret, and where a credential belongs.
    """
    for path, value in flatten(document).items():
        if isinstance(value, str) and holds_credentials(value):
            raise UserInputError(
                f"{path}: expected an address without credentials, found one that holds a password or token; recipes "
                f"are copied into run folders, checkpoints and MLflow. Take it out and {_where_it_belongs(path)}"
            )


def _clean_addresses(text: str) -> str:
    return _QUERY.sub(rf"\1{HIDDEN}", _USER_INFO.sub(f"{HIDDEN}@", text))


def _where_it_belongs(path: str) -> str:
    if path.startswith("tracking."):
        return (
            "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, in the environment; "
            "for a database, the whole address as MLFLOW_TRACKING_URI"
        )
    return (
        "give it where the storage's own library looks: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or a profile for "
        "s3, GOOGLE_APPLICATION_CREDENTIALS for gs, ~/.netrc for the web"
    )
