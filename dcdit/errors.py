"""The two error classes that end a command in one message instead of a traceback."""


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
