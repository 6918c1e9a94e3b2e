"""Errors that end a command with one message instead of a traceback."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager


class UserError(ValueError):
    """A mistake in the configuration, the data or the call.

    The message names the key, its value and the remedy; a constructor's message begins with ``argument=value``.
    Commands print the message alone, without a traceback, and exit with status 2.
    """


class TrainingError(RuntimeError):
    """Training cannot go on, and nobody made a mistake; the message says what is saved and what to try."""


class NotFiniteError(UserError):
    """A number computed from an image is not finite.

    Attributes:
        row: the image's index in its batch.
    """

    def __init__(self, message: str, row: int) -> None:
        super().__init__(message)
        self.row = row


@contextmanager
def naming(what: str, numbers: Sequence[int]) -> Iterator[None]:
    """Replace a :class:`NotFiniteError` by a :class:`UserError` that names the image, such as ``sample 17``.

    Args:
        what: what the message calls an image.
        numbers: the numbers of the images of the batch.
    """
    try:
        yield
    except NotFiniteError as error:
        raise UserError(f"{what} {numbers[error.row]}: {error}") from error
