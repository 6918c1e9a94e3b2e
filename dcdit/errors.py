"""The two error classes that end a command in one message instead of a traceback."""


class UserError(ValueError):
    """A mistake in the configuration, the data or the call.

    The message names the offending key, its value and the remedy (that of a constructor begins ``argument=value``); the
    command-line entry points print it alone, without a traceback, and exit with status 2.
    """


class TrainingError(RuntimeError):
    """Training cannot go on, through no mistake of anyone; the message says what is saved and what to try."""
