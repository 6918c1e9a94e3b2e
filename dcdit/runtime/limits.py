"""The budget of every file that another person made, whatever its format: counted before anything is made of it.

With these limits a file of any content is read, or refused, within seconds and some hundred megabytes beside the
tensors and arrays that it holds.
"""

from collections.abc import Iterable, Iterator
from typing import Any

TEXT_BYTES = 64 << 20
"""Bytes of a text file, and of all values of a file beside its tensors; ours have some hundred thousand."""

HEADER_BYTES = 4 << 20
"""Bytes of a list of what a file holds: the header of safetensors, the directory of a zip archive."""

VALUES = 2_000_000
"""Values in a file: names, numbers, lists and mappings. Scale and shift of each element are the most that we write."""

DEPTH = 64
"""Lists and mappings within one another; ours have five."""


class BudgetError(ValueError):
    """A file asks for more than files may."""


def check_budget(values: Any) -> None:
    """Raise :class:`BudgetError` if nested plain values are too many, too deep, or too long.

    What is shared counts as often as it is reached, for whoever prints or copies values meets it as often.
    """
    count, size = 0, 0
    stack: list[Iterator[Any]] = [iter([values])]
    while stack:
        for value in stack[-1]:
            count += 1
            size += len(value) if isinstance(value, str | bytes) else 0
            size += value.bit_length() // 8 if isinstance(value, int) else 0
            if count > VALUES:
                raise BudgetError(f"it holds more than {VALUES} values")
            if size > TEXT_BYTES:
                raise BudgetError(f"its values have more than {TEXT_BYTES} bytes")
            if isinstance(value, dict | list | tuple):
                if len(stack) > DEPTH:
                    raise BudgetError(f"its values are nested more than {DEPTH} deep")
                stack.append(_parts(value))
                break
        else:
            stack.pop()


def _parts(value: Any) -> Iterator[Any]:
    parts: Iterable[Any] = (part for item in value.items() for part in item) if isinstance(value, dict) else value
    return iter(parts)
