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
from ca2st.training.journal import flatten

HIDDEN = "[hidden]"
_USER_INFO = re.compile(r"(?<=://)[^/\s@]*:(?:[^/\s\"'<>]*@|[^/\s@]*@)|(?<=http://)[^/\s@]+@|(?<=https://)[^/\s@]+@")
"""``user:password@`` of an address, up to the last @ before a slash; of a web address also a name alone, which is how
tokens are given."""
_WORDS = (
    r"(?:password|passwd|pwd|passphrase|passcode|secret|token|credentials?|authorization|signature"
    r"|api[_-]?key|access[_-]?key(?:[_-]?id)?|account[_-]?key|private[_-]?key|secret[_-]?key)"
)
"""Ends of names whose values are secret, whatever stands before: ``sslpassword``, ``HF_TOKEN``, ``clientSecret``."""
_SENSITIVE = rf"(?:[\w.\-]*{_WORDS}|(?:[\w.\-]*[_\-.])?(?:sig|pass|auth|jwt))"
_START = r"(?<![\w.\-])"
_NO_VALUE = r"(?!(?:none|null|true|false|expected)\b)"
"""What programs write where there is no secret, and our own messages after a setting's name."""
_BARE = r"[^\s'\"]+(?:['\"][^\s'\",;)\]}]+)*"
"""A value without quotation marks around it; one inside is of it where it goes on behind."""
_QUOTED = r"(?P<mark>\\*['\"]).*?(?:(?<!\\)(?P=mark)|$)"
"""A value between quotation marks, which have backslashes before them inside of another text."""
_QUERY = re.compile(rf"(?i)([?&#;]{_SENSITIVE}=)[^&#\s'\"<>]+")
_FIELD = re.compile(
    rf"(?im)(?P<name>(?P<around>\\*['\"])(?:[\w.\- ]*{_WORDS}|pass|auth)(?P=around)\s*:\s*)b?"
    rf"(?:{_QUOTED}|-?\d[\w.+\-]*)"
)
"""A member of a JSON object or of a Python dict."""
_ASSIGNED = re.compile(rf"(?im)(?P<name>(?<![\w.\-?&#;])[\w.\-]*{_WORDS})(?:\s*=\s*{_QUOTED}|={_NO_VALUE}{_BARE})")
_OPTION = re.compile(rf"(?i)(?<![\w\-])(--?(?:[\w\-]*-)?{_WORDS}\s+)(?![\-\[])[^\s'\"]+")
_PART = r"(?:\w+=\\*\"[^\"]*\"|[^\s'\",]+)"
_HEADER = re.compile(
    rf"(?i){_START}((?:proxy-)?authorization\s*[:=]\s*){_NO_VALUE}(?!\[hidden\])"
    rf"{_PART}(?:[ \t]+{_PART})?(?:,\s*{_PART})*"
)
_NAMED = re.compile(
    rf"(?i){_START}((?:[\w\-]+-{_WORDS}|password|passwd|pwd|passphrase|api[_-]?key|secret[_-]?key)\s*:[ \t]+)"
    rf"{_NO_VALUE}{_BARE}"
)
"""Other headers, and settings as YAML has them."""
_COOKIE = re.compile(r"(?i)(?<![\w\-])((?:set-)?cookie\s*:\s*)[^\r\n'\"]+")
_BEARER = re.compile(r"\b([Bb]earer|BEARER)\s+(?![a-z]+\b)[^\s'\",]+")
_KNOWN = re.compile(
    r"(?<![A-Za-z0-9])(?:hf_(?=[A-Za-z]*[A-Z0-9])[A-Za-z0-9]{10,}|gh[pousr]_[A-Za-z0-9]{16,}|github_pat_\w{16,}"
    r"|glpat-[\w\-]{16,}|sk-(?=[\w\-]*\d)[\w\-]{16,}|xox[abeoprs]-[\w\-]{10,}|(?:AKIA|ASIA)[A-Z0-9]{16}"
    r"|AIza[\w\-]{30,}|ya29\.[\w\-]{16,}|dapi[0-9a-f]{32}|npm_[A-Za-z0-9]{30,}|pypi-[\w\-]{30,}"
    r"|eyJ[\w\-]{8,}\.[\w\-]{8,}\.[\w\-]+)"
    r"|(?s:-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z))"
)
"""Tokens that are known by how they begin, and private keys."""
_IN_TRACKING = (
    "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, in the environment; "
    "for a database, the whole address as MLFLOW_TRACKING_URI"
)
_IN_STORAGE = (
    "give it where the storage's own library looks: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or a profile for "
    "s3, GOOGLE_APPLICATION_CREDENTIALS for gs, ~/.netrc for the web"
)
_NAME = re.compile(rf"(?i)(?:{_WORDS}|(?:^|[_\-./ ])(?:sig|pass|auth|jwt))$")


def redacted(text: str) -> str:
    """Return `text` with the passwords and tokens in it replaced by ``[hidden]``.

    Found are those of addresses (before the host, in the query, in the fragment), of headers, of assignments and
    options (``HF_TOKEN=...``, ``--password ...``), of members of JSON objects, and tokens that are known by how they
    begin.
    """
    text = _FIELD.sub(rf"\g<name>\g<around>{HIDDEN}\g<around>", _clean_addresses(text))
    text = _ASSIGNED.sub(rf"\g<name>=\g<mark>{HIDDEN}\g<mark>", text)
    for named in (_OPTION, _HEADER, _NAMED, _COOKIE):
        text = named.sub(rf"\g<1>{HIDDEN}", text)
    return _BEARER.sub(rf"\g<1> {HIDDEN}", text)


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
    """Return `values` redacted; those with the name of a secret (``api_key``, ``db.password``) hidden altogether."""
    return {name: HIDDEN if names_a_secret(name) else redacted(value) for name, value in values.items()}


def names_a_secret(name: str) -> bool:
    """Return whether what `name` stands for is secret: its last word is password, token, secret, api_key and so on."""
    return _NAME.search(name) is not None


def without_credentials(uri: str) -> str:
    """Return `uri` with neither user nor password nor a secret behind its ``?`` or ``#``, as it is kept in files."""
    place, *parts = re.split(r"([?#])", re.sub(r"(?<=://)[^/\s?#]*@", "", uri))
    for mark, part in zip(parts[::2], parts[1::2], strict=True):
        kept = "&".join(one for one in part.split("&") if _QUERY.match(f"?{one}") is None)
        place += f"{mark}{kept}" if kept or not part else ""
    return place


def holds_credentials(text: str) -> bool:
    """Return whether an address in `text` has a password or a token in it."""
    return _clean_addresses(text) != text


def refuse_credentials(document: Mapping[str, Any]) -> None:
    """Check that no text of a recipe holds a credential.

    Raises:
        UserInputError: one does; names the setting, never the secret, and where a credential belongs.
    """
    for path, value in flatten(document).items():
        if isinstance(value, str) and holds_credentials(value):
            where = _IN_TRACKING if path.startswith("tracking.") else _IN_STORAGE
            raise UserInputError(
                f"{path}: expected an address without credentials, found one that holds a password or token; recipes "
                f"are copied into run folders, checkpoints and MLflow. Take it out and {where}"
            )


def _clean_addresses(text: str) -> str:
    return _KNOWN.sub(HIDDEN, _QUERY.sub(rf"\1{HIDDEN}", _USER_INFO.sub(f"{HIDDEN}@", text)))
