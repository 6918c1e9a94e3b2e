"""From what a user calls classes to labels."""

import difflib
from collections.abc import Sequence
from itertools import islice

import torch
from torch import Tensor

from dcdit.checks import LONGEST_SHOWN, shown
from dcdit.errors import UserError

_SUGGESTED = 3
"""Names of classes in a message about one that there is not."""


def resolve_labels(classes: Sequence[int | str] | None, names: Sequence[str], per_class: int) -> Tensor:
    """Return the labels (N,) of all samples, class by class.

    Args:
        classes: labels or class names; None takes the first ten.
        names: of the classes that the checkpoint knows.
        per_class: samples of each class.

    Raises:
        UserError: for a class that the checkpoint does not know.
    """
    labels = []
    for wanted in classes if classes is not None else range(min(10, len(names))):
        if str(wanted) in names:
            labels.append(names.index(str(wanted)))
        elif isinstance(wanted, int) and 0 <= wanted < len(names):
            labels.append(wanted)
        else:
            raise UserError(
                f"classes: {shown(wanted)} is neither a class name nor a label in 0..{len(names) - 1}"
                + _nearest(str(wanted), names)
            )
    return torch.tensor(labels).repeat_interleave(per_class)


def _nearest(wanted: str, names: Sequence[str]) -> str:
    """The end of a message about a class that there is not: the names like it, or some names; none for mere numbers."""
    by_folded = {name.casefold(): name for name in names if not name.isdecimal()}
    folded = wanted.casefold()
    close = difflib.get_close_matches(folded, by_folded, n=_SUGGESTED) if len(wanted) < LONGEST_SHOWN else []
    close += [name for name in by_folded if folded in name and name not in close]
    if close:
        return f": did you mean {' or '.join(shown(by_folded[name]) for name in close[:_SUGGESTED])}?"
    some = ", ".join(map(shown, islice(by_folded.values(), _SUGGESTED)))
    return f"; its names are {some}" + (" and others" if len(by_folded) > _SUGGESTED else "") if some else ""
