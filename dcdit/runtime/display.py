"""Progress of long jobs: a bar in a terminal, lines in a log."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich import console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.segment import Segment

from dcdit.errors import UserError
from dcdit.runtime.files import UnwritableError
from dcdit.runtime.terminal import visible_lines


class Console(console.Console):
    """Rich's console for text from anywhere: no escape sequence, markup or emoji in a text takes effect."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"markup": False, "emoji": False, "highlight": False, **options})

    def render(
        self, renderable: console.RenderableType, options: console.ConsoleOptions | None = None
    ) -> Iterator[Segment]:
        """Render ``renderable``, with control characters in its text escaped."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(visible_lines(segment.text), segment.style)


class Display:
    """A progress bar in a terminal; elsewhere a line for every finished task.

    Args:
        rank: rank of this process; only the first has a bar.
        verb: what is being done to images, such as ``encoding``.
        noun: what a task of the job makes, such as ``shard``.

    Attributes:
        started: whether this process has looked for tasks to do.
    """

    def __init__(self, rank: int, verb: str, noun: str) -> None:
        console = Console(stderr=True)
        self._rank, self.verb, self._noun = rank, verb, noun
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
        self.started = False

    def __enter__(self) -> "Display":
        self._bar.start()
        return self

    def __exit__(self, *ignored: object) -> None:
        self._bar.stop()

    def start(self, tasks: int, done: int, images: int | None) -> None:
        """Start the bar and the clock.

        Of this process's ``tasks`` so many are ``done`` already; ``images`` are left, None if that is not known.
        """
        if done:
            print(f"Continuing: {done} of {tasks} {self._noun}s of process {self._rank} are done", file=sys.stderr)
        self.started, self._left, self._since = True, tasks - done, time.monotonic()
        self._task = self._bar.add_task(self.verb, total=images, rate="")

    def advance(self, images: int) -> None:
        """Count so many more images as done."""
        self._images += images
        self._bar.update(self._task, advance=images, rate=f"images, {self._rate:.1f}/s")

    def finish(self, name: str, samples: int) -> None:
        """Count a task as finished; its result is called ``name`` and holds so many samples."""
        self._left, self._written = self._left - 1, self._written + 1
        if self._bar.disable:
            minutes = self._left * (time.monotonic() - self._since) / self._written / 60
            process = f"process {self._rank}: " if self._rank else ""
            print(
                f"{process}{name}: {samples} samples, {self._rate:.1f} images/s"
                + (f", {self._left} more to go, about {minutes:.0f} min" if self._left else ""),
                file=sys.stderr,
            )

    @property
    def _rate(self) -> float:
        return self._images / max(1e-9, time.monotonic() - self._since)


@contextmanager
def resumable(rank: int, verb: str, noun: str, out: Path) -> Iterator[Display]:
    """Show the progress of a resumable job in ``out``; if it ends early, say that the same command goes on from there.

    Raises:
        UserError: if files cannot be read or written.
    """
    kept = f"Finished {noun}s are kept; the same command goes on from there"
    with Display(rank, verb, noun) as display:
        try:
            yield display
        except UnwritableError as error:
            raise UserError(f"{error}. {kept}") from error
        except OSError as error:
            raise UserError(f"{error.filename or out}: {error.strerror or error}. {kept}") from error
        except KeyboardInterrupt:
            print(f"{kept}.", file=sys.stderr)
            raise
