"""The command line in the test's own process."""

import sys

import pytest

from ray_jobs.cli import main


class Command:
    """Runs ``ca2st``, or `words` of it, in this process; a call returns exit code, stdout and stderr."""

    def __init__(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
        self._capsys, self._monkeypatch, self._words = capsys, monkeypatch, words

    def __call__(self, *arguments: object) -> tuple[int, str, str]:
        self._monkeypatch.setattr(sys, "argv", ["ca2st", *self._words, *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = self._capsys.readouterr()
        return int(ended.value.code or 0), out, err
