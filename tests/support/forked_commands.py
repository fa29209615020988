"""The command ``ca2st`` in forked children of one process that has imported what commands import: seconds less each.

A request is a line of JSON: ``arguments``, ``environment``, ``folder``, and the files for ``stdout`` and ``stderr``.
The answer is a line with the exit status. Nothing but imports happens before a fork, so it is safe. Children end as the
command ends, with the interpreter's own ending.
"""

import atexit
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

from support.processes import python_path


def run_forked(
    arguments: Sequence[str], *, environment: Mapping[str, str], folder: Path
) -> "subprocess.CompletedProcess[str]":
    """Run the command and wait for its end."""
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    with tempfile.TemporaryDirectory() as place:
        files = {name: f"{place}/{name}" for name in ("stdout", "stderr")}
        request = {"arguments": list(arguments), "environment": dict(environment), "folder": str(folder), **files}
        try:
            server.stdin.write(json.dumps(request) + "\n")
            server.stdin.flush()
            status = int(server.stdout.readline())
        except BaseException:  # a test that took too long: the next one must not get its answer
            _server.cache_clear()
            raise
        told = {name: Path(file).read_text() for name, file in files.items()}
    return subprocess.CompletedProcess(["ca2st", *arguments], status, told["stdout"], told["stderr"])


@cache
def _server() -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", "from support.forked_commands import serve; serve()"]
    environment = os.environ | {"PYTHONPATH": python_path()}
    server = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(server.communicate)  # nothing more to read ends it
    return server


def serve() -> None:
    """Answer requests until there are no more."""
    from ray_jobs.environment import wait_passively

    wait_passively()  # before torch is imported, as the command does it
    import nvidia.dali.fn  # noqa: F401
    import torch._dynamo  # noqa: F401  which torch imports with the first optimiser

    import ray_jobs.evaluation.workers
    import ray_jobs.launch
    import ray_jobs.runs.prediction
    import ray_jobs.runs.worker  # noqa: F401
    from ray_jobs.cli import main

    for line in iter(sys.stdin.readline, ""):
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            for descriptor, path in enumerate((os.devnull, request["stdout"], request["stderr"])):
                opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
                os.dup2(opened, descriptor)
                os.close(opened)
            os.environ.clear()
            os.environ.update(request["environment"])
            os.chdir(request["folder"])
            sys.argv = ["ca2st", *request["arguments"]]
            main()
            sys.exit()
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
