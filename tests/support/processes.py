"""Commands in processes of their own: what a signal, a kill or another rank means can be seen there alone.

They are forked from a process that has loaded what commands load, which would take each of them seconds.
"""

import multiprocessing
import os
import socket
import sys
import tempfile
from importlib import import_module
from pathlib import Path

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["dcdit.training.run", "dcdit.evaluate", "diffusers.optimization", "torchmetrics"])


class Command:
    """``python -m dcdit.<command> <words>`` in ``folder``, begun.

    Attributes:
        pid: of the process.
    """

    def __init__(self, folder: Path, command: str, *words: str, **environment: str) -> None:
        self._said = Path(tempfile.mkdtemp(prefix="said-"))
        self._process = _context.Process(
            target=_run, args=(folder, self._said, command, words, environment), daemon=True
        )
        self._process.start()
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """Its exit status, negative for a signal; None while it runs."""
        return self._process.exitcode

    def wait(self, seconds: float = 240) -> int:
        """Its exit status, once it has ended."""
        self._process.join(seconds)
        status = self.poll()
        assert status is not None, f"still running after {seconds} s: {self.said}"
        return status

    @property
    def out(self) -> str:
        return (self._said / "1").read_text()

    @property
    def err(self) -> str:
        return (self._said / "2").read_text()

    @property
    def said(self) -> str:
        """All of it."""
        return self.out + self.err

    @property
    def words(self) -> str:
        """All of it, in one line."""
        return " ".join(self.said.replace("│", " ").split())


def run(folder: Path, command: str, *words: str, **environment: str) -> Command:
    """The command, ended."""
    process = Command(folder, command, *words, **environment)
    process.wait()
    return process


def ranks(number: int, folder: Path, command: str, *words: str) -> list[Command]:
    """The command in so many processes, begun as torchrun begins them, on one thread each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {
        "TORCHELASTIC_RUN_ID": "tests",
        "WORLD_SIZE": str(number),
        "LOCAL_WORLD_SIZE": str(number),
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    return [Command(folder, command, *words, RANK=str(r), LOCAL_RANK=str(r), **shared) for r in range(number)]


def end(processes: list[Command]) -> None:
    """Wait for all of them, and see that they ended well."""
    for process in processes:
        assert process.wait() == 0, process.said


def _run(folder: Path, said: Path, command: str, words: tuple[str, ...], environment: dict[str, str]) -> None:
    import torch

    # It may have children of its own, forked as those of a program are: they watch it, and end when it does.
    multiprocessing.current_process()._config["daemon"] = False
    multiprocessing.set_start_method("fork", force=True)
    for stream in (1, 2):
        os.dup2(os.open(said / str(stream), os.O_CREAT | os.O_WRONLY | os.O_APPEND), stream)
    os.chdir(folder)
    os.environ |= environment
    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", torch.get_num_threads())))
    sys.argv = [f"{command}.py", *words]
    status = None
    try:
        getattr(import_module(f"dcdit.{command}"), command).main()
    except SystemExit as leaving:
        status = leaving.code
    sys.exit(status)  # here, where what the command held is gone, as at the end of a program
