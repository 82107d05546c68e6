"""The command line as a function."""

from __future__ import annotations

import sys

import pytest

from search.cli import main
from tests.support.commands import Ended, Run


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command in this process, and put back all that it would leave changed."""

    def ended(*arguments: object) -> Ended:
        monkeypatch.setattr(sys, "argv", ["paredown", *map(str, arguments)])
        monkeypatch.setattr(sys, "excepthook", sys.excepthook)
        with pytest.raises(SystemExit) as caught:
            main.main()
        told = capsys.readouterr()
        return Ended(caught.value.code, told.out, told.err)

    return ended
