"""The one error class for mistakes a user can mend."""


class UserError(ValueError):
    """A mistake in the configuration, the data or the call.

    The message names the offending key, its value and the remedy (that of a constructor begins ``argument=value``); the
    command-line entry points print it alone, without a traceback, and exit with status 2.
    """
