"""How values appear in messages: on one line, in bounded length, without passwords."""

import re
import reprlib
from collections.abc import Mapping
from itertools import islice
from typing import (
    TYPE_CHECKING,
)

from dcdit.errors import UserError

if TYPE_CHECKING:
    pass


LONGEST_SHOWN = 240
"""Maximum number of characters of a value in a message."""


class _Brief(reprlib.Repr):
    """``repr`` in bounded time and length, however deep a file's values are nested or shared."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother, self.maxlong = 4, LONGEST_SHOWN, LONGEST_SHOWN, 60
        self.maxlist = self.maxtuple = self.maxdict = self.maxset = 16

    def repr_dict(self, x: Mapping[object, object], level: int) -> str:
        if level <= 0:
            return "{...}"
        items = [f"{self.repr1(key, level - 1)}: {self.repr1(x[key], level - 1)}" for key in islice(x, self.maxdict)]
        return "{" + ", ".join(items + ["..."] * (len(x) > self.maxdict)) + "}"

    repr_OrderedDict = repr_dict  # noqa: N815 (reprlib's spelling)

    def repr_int(self, x: int, level: int) -> str:
        return repr(x) if abs(x) < 10**self.maxlong else f"a number of {x.bit_length()} bits"


_brief = _Brief()


def shown(value: object) -> str:
    """Format a value as a user would write it, on one line of at most 240 characters; text is in quotes."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e16:
        return str(int(value))
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = visible(_brief.repr(value))
    return text if len(text) <= LONGEST_SHOWN else f"{text[: LONGEST_SHOWN - 3]}..."


def visible(text: str) -> str:
    """Escape in ``text`` what could steer a terminal, so that it can be printed on one line.

    Escaped are control characters, line ends and tabs among them, marks that turn the direction of writing, and lone
    surrogates.
    """
    return _STEERING.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def reason_of(error: BaseException) -> str:
    """The first line of an error's message, or the name of its class if it has none, for use in our messages."""
    return visible((str(error).splitlines() or [type(error).__name__])[0][:LONGEST_SHOWN])


_STEERING = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


_CREDENTIALS = re.compile(r"(://)[^/@\s]*:[^/@\s]*@")


def without_credentials(text: str) -> str:
    """Replace the user and password of each URL in ``text`` by ``...``."""
    return _CREDENTIALS.sub(r"\1...@", text)


def check_credentials(url: str) -> None:
    """Raise :class:`UserError` if a URL holds a password: it would stand in every file that a run writes."""
    if _CREDENTIALS.search(url):
        raise UserError(
            f"{without_credentials(url)} holds a password, which would be written into the run's files: put"
            " it into ~/.netrc (machine, login, password; a key of a store into its environment variables), and leave"
            " it out here"
        )
