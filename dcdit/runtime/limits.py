"""Limits on files that another person made: what a file asks for is counted before it is used.

Within these limits a file of any format is read or refused within seconds, and with some hundred megabytes of memory
beside the tensors and arrays that it holds.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain

TEXT_BYTES = 64 << 20
"""Bytes of a text file, and of all values of a file beside its tensors. Files of dcdit have some hundred thousand."""

HEADER_BYTES = 4 << 20
"""Bytes of a file's table of contents: the header of safetensors, the directory of a zip archive."""

VALUES = 2_000_000
"""Names, numbers, lists and mappings in a file. dcdit writes at most scale and shift of every latent element."""

DEPTH = 64
"""Depth of nested lists and mappings. Files of dcdit have five."""

SLOWEST, GRACE = 10_000, 60.0
"""A download of n bytes may take GRACE + n / SLOWEST seconds, connecting and redirects included."""


class SlowError(Exception):
    """A download takes longer than on a slow line; the message says how many bytes came in how many seconds."""


@dataclass
class Pace:
    """The speed of a download.

    Attributes:
        size: bytes received so far.
        begin: when it began, in seconds of the monotonic clock.
    """

    size: int = 0
    begin: float = field(default_factory=time.monotonic)

    def remaining(self) -> float:
        """Seconds until more bytes must have come; :class:`SlowError` if there are none left."""
        spent = time.monotonic() - self.begin
        left = GRACE + self.size / SLOWEST - spent
        if left <= 0:
            raise SlowError(f"too slow, {self.size} bytes in {spent:.0f} s")
        return left


class BudgetError(ValueError):
    """A file asks for more than the limits allow."""


def check_budget(values: object) -> None:
    """Raise :class:`BudgetError` if nested plain values are too many, too deep, or too long.

    A value that several lists share counts once for each, for printing and copying meet it as often.
    """
    count, size = 0, 0
    stack: list[Iterator[object]] = [iter([values])]
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
                stack.append(iter(chain.from_iterable(value.items()) if isinstance(value, dict) else value))
                break
        else:
            stack.pop()
