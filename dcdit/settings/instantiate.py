"""What a configuration names by ``_target_``: callbacks, loggers, feature networks. How their errors are told."""

import re
from collections.abc import Mapping
from typing import Any

import hydra
from hydra.errors import InstantiationException
from omegaconf.errors import MissingMandatoryValue

from dcdit.errors import UserError
from dcdit.runtime.imports import missing_extra, remedy_for


def instantiated(section: Mapping[str, Any], key: str) -> Any:
    """The object that a section describes.

    Args:
        section: plain values with ``_target_``, of which Hydra makes it.
        key: of the section, for messages.

    Raises:
        UserError: if it cannot be made; what its constructor says to the user is left as it is.
    """
    try:
        return hydra.utils.instantiate(dict(section))
    except MissingMandatoryValue as error:
        raise UserError(f"{key}.{error.full_key} is not set: give {key}.{error.full_key}=...") from None
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, UserError):
            raise cause from None
        if cause is not None and not isinstance(cause, TypeError | ValueError | ImportError | AttributeError):
            raise cause from error
        root: BaseException = error
        while root.__cause__ is not None:
            root = root.__cause__
        if module := missing_extra(root):
            raise UserError(f"{key} needs {remedy_for(module)}") from error
        target = re.search(r"Error locating target '([^']+)'", str(error))
        if target:
            full_key = re.search(r"^full_key: (\S+)", str(error), flags=re.MULTILINE)
            where = f"{key}.{full_key[1]}" if full_key else key
            raise UserError(
                f"{where}._target_={target[1]} cannot be imported ({root}): name it as module.Class, and have"
                " Python find the module, in the current folder or in one that PYTHONPATH names"
            ) from error
        reason = str(root) if cause is not None else str(error).splitlines()[0]
        raise UserError(f"{key}: {' '.join(reason.split())}") from error
