"""What stands between a command and its terminal: text cannot steer it, and showing text never ends the command."""

import errno
import os
import re
import sys
from contextlib import suppress
from typing import Any

from dcdit.checks import visible

_DRAWING = ("click", "tqdm")
"""Libraries whose colours and bars are escape sequences of their own making; Rich writes past :class:`Terminal`."""


def visible_lines(text: str) -> str:
    """``text`` with its control characters as escapes, see :func:`dcdit.checks.visible`; line ends and tabs stay."""
    return _LINE.sub(lambda match: visible(match[0]), text)


_LINE = re.compile(r"[^\n\t]+")


class Lasting:
    """A text stream that takes text whatever becomes of the file behind it.

    Characters that its encoding lacks are written as escapes. Once nobody reads it any more, its disk is full or its
    terminal is gone, text is dropped.

    Args:
        stream: a text stream; None for one that was closed before the process began.

    Attributes:
        lost: why text is dropped; None as long as all was written.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = open(os.devnull, "w") if stream is None else stream  # noqa: SIM115 - as long as the process
        self.lost: Exception | None = None

    def write(self, text: str) -> int:
        """Write what can be written of ``text``."""
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        try:
            self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        except (OSError, ValueError) as error:
            self._lose(error)
        return len(text)

    def flush(self) -> None:
        """Hand on what was written."""
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
    """A :class:`Lasting` stream whose text cannot steer a terminal: names in it may be anybody's.

    Args:
        stream: as of :class:`Lasting`.

    Attributes:
        rich_proxied_file: the stream without escaping; Rich takes it by this name for what it has laid out.
    """

    def __init__(self, stream: Any) -> None:
        self.rich_proxied_file = Lasting(stream)

    def write(self, text: str) -> int:
        """Write ``text``, its control characters as escapes unless a library draws with them."""
        self.rich_proxied_file.write(text if _draws() else visible_lines(text))
        return len(text)

    def writelines(self, lines: Any) -> None:
        """Write all ``lines``."""
        self.write("".join(lines))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["rich_proxied_file"], name)


def _draws() -> bool:
    """Whether a library that draws has called :meth:`Terminal.write`."""
    frame = sys._getframe(1).f_back  # None if Python itself has, to show a traceback
    while frame is not None:
        library = str(frame.f_globals.get("__name__")).partition(".")[0]
        if library != "wandb":  # which hands on what others write
            return library in _DRAWING
        frame = frame.f_back
    return False


def install() -> None:
    """Put a :class:`Terminal` in the place of stdout and stderr, unless one is there."""
    os.environ.setdefault("PYTHON_COLORS", "0")  # of tracebacks, which hold values
    for name in ("stdout", "stderr"):
        if not hasattr(getattr(sys, name), "rich_proxied_file"):
            setattr(sys, name, Terminal(getattr(sys, name)))


def lost(stream: Any) -> Exception | None:
    """Why a stream has dropped text; None if it has not."""
    with suppress(AttributeError, OSError, ValueError):
        stream.flush()
    found: Exception | None = getattr(stream, "lost", None)
    return found


def nobody_reads(error: Exception) -> bool:
    """Whether a stream was lost because its reader, such as ``head``, has seen enough, or because it was closed."""
    return not isinstance(error, OSError) or error.errno in (errno.EPIPE, errno.EIO)
