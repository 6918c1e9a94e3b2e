"""How far a long job is, for people: a bar in a terminal, lines in a log."""

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Display:
    """A progress bar where there is a terminal, else a line for every unit of work.

    Args:
        rank: of this process; only the first has a bar.
        verb: what is being done to images.
        unit: what the job is divided into.
    """

    def __init__(self, rank: int, verb: str, unit: str) -> None:
        console = Console(stderr=True)
        self._rank, self.verb, self._unit = rank, verb, unit
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=rank > 0 or not console.is_terminal,
        )
        self._images = self._left = self._written = 0
        self._since = 0.0
        self.began = False

    def __enter__(self) -> "Display":
        self._bar.start()
        return self

    def __exit__(self, *ignored: object) -> None:
        self._bar.stop()

    def begin(self, units: int, done: int, images: int | None) -> None:
        """Of ``units`` of this process ``done`` were there; ``images`` are left, if that is known."""
        if done:
            print(f"Continuing: {done} of {units} {self._unit}s of process {self._rank} are done", file=sys.stderr)
        self.began, self._left, self._since = True, units - done, time.monotonic()
        self._task = self._bar.add_task(self.verb, total=images, rate="")

    def advance(self, files: int) -> None:
        """So many more images have been dealt with."""
        self._images += files
        self._bar.update(self._task, advance=files, rate=f"images, {self._rate:.1f}/s")

    def shard(self, name: str, samples: int) -> None:
        """A unit is finished."""
        self._left, self._written = self._left - 1, self._written + 1
        if self._bar.disable:
            minutes = self._left * (time.monotonic() - self._since) / self._written / 60
            place = f"process {self._rank}: " if self._rank else ""
            print(
                f"{place}{name}: {samples} samples, {self._rate:.1f} images/s"
                + (f", {self._left} more to go, about {minutes:.0f} min" if self._left else ""),
                file=sys.stderr,
            )

    @property
    def _rate(self) -> float:
        return self._images / max(1e-9, time.monotonic() - self._since)
