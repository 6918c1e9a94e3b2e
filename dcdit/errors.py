"""The error classes that end a command in one message instead of a traceback."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager


class UserError(ValueError):
    """A mistake in the configuration, the data or the call.

    The message names the offending key, its value and the remedy (that of a constructor begins ``argument=value``); the
    command-line entry points print it alone, without a traceback, and exit with status 2.
    """


class TrainingError(RuntimeError):
    """Training cannot go on, through no mistake of anyone; the message says what is saved and what to try."""


class NotFiniteError(UserError):
    """What was computed of an image is not finite.

    Attributes:
        row: which image of the batch.
    """

    def __init__(self, message: str, row: int) -> None:
        super().__init__(message)
        self.row = row


@contextmanager
def naming(what: str, numbers: Sequence[int]) -> Iterator[None]:
    """Make of a :class:`NotFiniteError` a :class:`UserError` that names the image: ``sample 17``.

    Args:
        what: the images are called.
        numbers: of those of the batch.
    """
    try:
        yield
    except NotFiniteError as error:
        raise UserError(f"{what} {numbers[error.row]}: {error}") from error
