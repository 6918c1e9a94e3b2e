"""Loggers that fail, and training that goes on: curves are worth less than weights."""

import os
from collections.abc import Callable
from functools import wraps
from typing import Any

from lightning.pytorch.loggers import Logger

from dcdit.runtime.processes import say

_METHODS = ("log_metrics", "log_image", "save", "finalize", "after_save_checkpoint")


def keep_going(logger: Logger) -> None:
    """Have ``logger`` say, once, that it cannot log, instead of ending what it logs.

    A folder that was deleted meanwhile is made again, once for each call.
    """
    said = False

    def guarded(method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def call(*arguments: Any, **named: Any) -> Any:
            nonlocal said
            try:
                try:
                    return method(*arguments, **named)
                except FileNotFoundError:
                    if logger.log_dir is None:
                        raise
                    os.makedirs(logger.log_dir, exist_ok=True)
                    say(f"{logger.log_dir} was deleted, and is made again: what was logged there is lost")
                    return method(*arguments, **named)
            except Exception as error:  # whatever a service or a file system raises
                if not said:
                    name, reason = type(logger).__name__, (str(error).splitlines() or [type(error).__name__])[0]
                    say(f"{name} cannot log ({reason}): training goes on, and saves its checkpoints, without it")
                said = True

        return call

    for name in _METHODS:
        if hasattr(logger, name):
            setattr(logger, name, guarded(getattr(logger, name)))
