"""The one reader of checkpoint files: tensors and plain values, never anyone's pickle."""

import re
from os import PathLike
from typing import Any

import torch

from dcdit.errors import UserError


class _Inert:
    """Stands in for every class that a checkpoint names and torch does not trust: holds nothing, does nothing."""

    def __init__(self, *ignored: Any) -> None:
        pass

    def __setstate__(self, ignored: Any) -> None:
        pass


def read_checkpoint(path: str | PathLike[str]) -> dict[str, Any]:
    """Read a torch checkpoint's tensors and plain values; foreign classes in it become inert objects.

    Nothing that the file names is imported or called.

    Raises:
        UserError: if the file is missing or is no torch checkpoint.
    """
    try:
        foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        with torch.serialization.safe_globals([(_Inert, name) for name in foreign]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"checkpoint {path} does not exist") from None
    except IsADirectoryError:
        raise UserError(f"checkpoint {path} is a directory: give the file, such as its checkpoints/last.ckpt") from None
    except Exception as error:  # whatever a corrupt or hostile file provokes
        blocked = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it asks to run {blocked[1]}, do not trust it" if blocked else str(error).splitlines()[0]
        raise UserError(f"checkpoint {path} cannot be read safely: {reason}") from error
