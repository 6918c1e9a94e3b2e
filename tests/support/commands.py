"""Commands as a user types them, without a process of their own: all but the process is real."""

import logging
import sys
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import pytest
from hydra.core.global_hydra import GlobalHydra


class Result(NamedTuple):
    status: int
    out: str
    err: str

    @property
    def words(self) -> str:
        """All that was said, in one line."""
        return " ".join((self.out + self.err).replace("│", " ").split())


def typed(capsys: pytest.CaptureFixture, folder: Path, command: str, *words: str) -> Result:
    """``python -m dcdit.<command> <words>`` in ``folder``."""
    module = import_module(f"dcdit.{command}")
    log = logging.getLogger("dcdit")
    before, status = (list(log.handlers), log.propagate), 0
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", [f"{command}.py", *words])
        try:
            getattr(module, command).main()
        except SystemExit as leaving:
            status = leaving.code or 0
        finally:
            GlobalHydra.instance().clear()
            log.handlers, log.propagate = before
    return Result(status, *capsys.readouterr())
