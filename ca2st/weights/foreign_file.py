"""Files that others wrote: safetensors are read here, everything that needs unpickling in a limited child process."""

import hashlib
import json
import multiprocessing
import signal
import tempfile
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ca2st.errors import EnvironmentFault
from ca2st.weights.errors import ForeignFileRefusedError, WeightsDamageError
from ca2st.weights.foreign_child import ReadFacts, ReadJob, serve
from ca2st.weights.tensor_file import read_tensor_file

MAX_FILE_BYTES = 16 * 2**30
TIMEOUT_SECONDS = 600.0
"""Wall time of reading one file, the start of the child included."""
_MAX_ANSWER_BYTES = 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class ForeignFile:
    """The weights in a file, as they are."""

    path: Path
    """Where it was read."""
    sha256: str
    """Of the file's bytes, to compare with what its author published."""
    container: str
    """`safetensors`, `TorchScript archive`, `torch.save zip` or `torch.save pickle`."""
    wrapper: str
    """The key of the outer dict that the weights were under, or empty."""
    tensors: dict[str, Tensor]
    """Tensors by the file's own names, on the CPU."""
    metadata: dict[str, str]
    """Free text fields of a safetensors file."""


def read_foreign_file(path: Path, *, timeout_seconds: float = TIMEOUT_SECONDS) -> ForeignFile:
    """Read the tensors of a checkpoint in whatever container, without running anything in it.

    Raises:
        ForeignFileRefusedError: no such file, no checkpoint, or one that asks for code, time or memory.
        WeightsDamageError: the file is not whole.
        EnvironmentFault: the file may not be read.
    """
    if not path.is_file():
        raise ForeignFileRefusedError(f"expected a checkpoint, found no file at {path}; check the path")
    if (size := path.stat().st_size) > MAX_FILE_BYTES:
        raise ForeignFileRefusedError(f"{path}: expected at most {MAX_FILE_BYTES} bytes, found {size}")
    try:
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise EnvironmentFault(f"cannot read {path}: {error.strerror}; check its permissions") from error
    if _is_safetensors(path):
        plain = read_tensor_file(path)
        facts = ReadFacts(container="safetensors", wrapper="")
        tensors, metadata = plain.tensors, plain.metadata
    else:
        facts, tensors = _read_in_child(path, timeout_seconds)
        metadata = {}
    return ForeignFile(
        path=path,
        sha256=sha256,
        container=facts.container,
        wrapper=facts.wrapper,
        tensors=tensors,
        metadata=metadata,
    )


def _is_safetensors(path: Path) -> bool:
    """By its name, or because an 8-byte length is followed by JSON."""
    with path.open("rb") as file:
        return path.suffix == ".safetensors" or file.read(9)[8:] == b"{"


def _read_in_child(path: Path, timeout_seconds: float) -> tuple[ReadFacts, dict[str, Tensor]]:
    with tempfile.TemporaryDirectory(prefix="ca2st-import-") as folder:
        job = ReadJob(
            path=path.resolve(), out=Path(folder) / "tensors.safetensors", cpu_seconds=int(timeout_seconds) + 1
        )
        answer = _ask_child(job, timeout_seconds)
        if answer["kind"] == "ok":
            facts = ReadFacts(container=answer["container"], wrapper=answer["wrapper"])
            return facts, read_tensor_file(job.out).tensors
    error = WeightsDamageError if answer["kind"] == "damage" else ForeignFileRefusedError
    raise error(f"{path}: {answer['message']}")


def _ask_child(job: ReadJob, timeout_seconds: float) -> dict[str, str]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=serve, args=(theirs, job), daemon=True)
    child.start()
    theirs.close()
    try:
        if not ours.poll(timeout_seconds):
            return _refusal(f"expected it to be read within {timeout_seconds:g} s, found it unfinished")
        answer: dict[str, str] = json.loads(ours.recv_bytes(_MAX_ANSWER_BYTES))
        return answer
    except EOFError:
        child.join()
        return _refusal(f"the process that read it died ({_described(child.exitcode)}); do not trust this file")
    except OSError as error:
        raise EnvironmentFault(f"cannot talk to the process that reads {job.path}: {error}") from error
    finally:
        child.kill()
        child.join()
        ours.close()


def _refusal(message: str) -> dict[str, str]:
    return {"kind": "refused", "message": message}


def _described(code: int | None) -> str:
    return signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"
