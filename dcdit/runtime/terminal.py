"""Streams between a command and its terminal: text cannot steer the terminal; a lost stream does not end a command."""

import errno
import os
import re
import sys
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, TextIO

from dcdit.checks import visible

_DRAWING = ("click", "tqdm")
"""Libraries whose colours and bars are escape sequences of their own making; Rich writes past :class:`Terminal`."""


def visible_lines(text: str) -> str:
    """Escape control characters like :func:`dcdit.checks.visible`, but for line ends and tabs."""
    return _LINE.sub(lambda match: visible(match[0]), text)


_LINE = re.compile(r"[^\n\t]+")


class Lasting:
    """A text stream that never fails: once its reader, its disk space or its terminal is gone, text is dropped.

    Characters that its encoding lacks are written as escapes.

    Args:
        stream: a text stream; None for one that was closed before the process began.

    Attributes:
        lost: why text is dropped; None as long as all was written.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = open(os.devnull, "w") if stream is None else stream  # noqa: SIM115 - as long as the process
        self.lost: Exception | None = None

    def write(self, text: str) -> int:
        """Write ``text`` unless the stream is lost; returns its length."""
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        try:
            self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        except (OSError, ValueError) as error:
            self._lose(error)
        return len(text)

    def flush(self) -> None:
        """Flush the stream behind this one."""
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self._lose(error)

    def _lose(self, error: Exception) -> None:
        before, self.lost = self._stream, error
        self._stream = open(os.devnull, "w")  # noqa: SIM115
        with suppress(OSError, ValueError, AttributeError):  # what is still held is flushed when Python ends
            os.dup2(self._stream.fileno(), before.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_stream"], name)


class Terminal:
    """A :class:`Lasting` stream whose text cannot steer a terminal: names in it may come from anywhere.

    Args:
        stream: a text stream; None for one that was closed before the process began.

    Attributes:
        rich_proxied_file: the stream without escaping; Rich takes it by this name for what it has laid out.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self.rich_proxied_file = Lasting(stream)

    def write(self, text: str) -> int:
        """Write ``text``, its control characters as escapes unless a library draws with them."""
        self.rich_proxied_file.write(text if _draws() else visible_lines(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write all ``lines``, without line ends between them."""
        self.write("".join(lines))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["rich_proxied_file"], name)


def _draws() -> bool:
    """Whether a library that draws has called :meth:`Terminal.write`."""
    frame = sys._getframe(1).f_back  # None if Python itself writes a traceback
    while frame is not None:
        library = str(frame.f_globals.get("__name__")).partition(".")[0]
        if library != "wandb":  # it passes on what others write
            return library in _DRAWING
        frame = frame.f_back
    return False


def install() -> None:
    """Replace stdout and stderr by a :class:`Terminal`, unless that has been done."""
    os.environ.setdefault("PYTHON_COLORS", "0")  # tracebacks hold values, which must not carry escape sequences
    for name in ("stdout", "stderr"):
        if not hasattr(getattr(sys, name), "rich_proxied_file"):
            setattr(sys, name, Terminal(getattr(sys, name)))


def lost(stream: TextIO) -> Exception | None:
    """Why a stream has dropped text; None if it has not dropped any."""
    with suppress(AttributeError, OSError, ValueError):
        stream.flush()
    error: Exception | None = getattr(stream, "lost", None)
    return error


def nobody_reads(error: Exception) -> bool:
    """Whether a stream was lost because its reader, such as ``head``, has stopped reading, or because it was closed."""
    return not isinstance(error, OSError) or error.errno in (errno.EPIPE, errno.EIO)
