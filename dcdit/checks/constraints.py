"""Annotations that say which values are allowed, such as ``Annotated[int, Bounds(low=1)]``, and common ones."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import (
    TYPE_CHECKING,
    Annotated,
)

from dcdit.errors import UserError

if TYPE_CHECKING:
    pass
from dcdit.checks.messages import shown
from dcdit.checks.tables import describe_unknown


@dataclass(frozen=True)
class Bounds:
    """An annotation: the number lies in a range.

    Attributes:
        low, high: the ends of the range; None where it has no end.
        open_low, open_high: whether the end itself is excluded.
        hint: what the number means, or what to take instead; messages end with it.
    """

    low: float | None = None
    high: float | None = None
    open_low: bool = False
    open_high: bool = False
    hint: str = ""

    def check(self, name: str, value: float) -> None:
        """Raise :class:`UserError` unless ``value`` lies in the range."""
        above = self.low is None or value > self.low or (value == self.low and not self.open_low)
        below = self.high is None or value < self.high or (value == self.high and not self.open_high)
        if not (above and below):
            reason = self._reason(below and self.high is not None and self.high >= 10**7)
            raise UserError(f"{name}={shown(value)} {reason}" + (f": {self.hint}" if self.hint else ""))

    def _reason(self, omit_high: bool) -> str:
        """Say why a value is refused; ``omit_high`` leaves out an upper end that is no practical limit."""
        if self.low is not None and self.high is not None and not omit_high:
            brackets = "(["[not self.open_low], ")]"[not self.open_high]
            return f"is outside {brackets[0]}{shown(self.low)}, {shown(self.high)}{brackets[1]}"
        if self.low is None:
            return f"exceeds {shown(self.high)}"
        if self.low == 0:
            return "is not positive" if self.open_low else "is negative"
        if self.low == 1 and not self.open_low:
            return "is not a positive number"
        return f"must be greater than {shown(self.low)}" if self.open_low else f"is below {shown(self.low)}"


@dataclass(frozen=True)
class NotEmpty:
    """An annotation: the list has elements.

    Attributes:
        hint: what to give instead of an empty list.
    """

    hint: str

    def check(self, name: str, value: Sequence[object]) -> None:
        """Raise :class:`UserError` if ``value`` has no elements."""
        if not len(value):
            raise UserError(f"{name}=[] asks for nothing: {self.hint}")


@dataclass(frozen=True, eq=False)
class OneOf:
    """An annotation: the text is a name in a table; names may be added to the table later.

    Attributes:
        table: the allowed names.
    """

    table: Mapping[str, object]

    def check(self, name: str, value: str) -> None:
        """Raise :class:`UserError` unless ``value`` is in the table."""
        if value not in self.table:
            raise UserError(f"{name}={shown(value)} {describe_unknown(value, self.table)}")


@dataclass(frozen=True)
class Matches:
    """An annotation: the text matches a pattern.

    Attributes:
        pattern: regular expression for the whole text.
        hint: a description of the pattern.
    """

    pattern: str
    hint: str

    def check(self, name: str, value: str) -> None:
        """Raise :class:`UserError` unless all of ``value`` matches the pattern."""
        if not re.fullmatch(self.pattern, value):
            raise UserError(f"{name}={shown(value)} is not {self.hint}")


@dataclass(frozen=True, eq=False)
class Meant:
    """An annotation: what others call the choices, for messages.

    Attributes:
        table: the choice that is probably meant, by the text of a value that is refused.
    """

    table: Mapping[str, str]


FLOAT_NAMES = Meant(
    {
        **dict.fromkeys(("32-true", "32", "float32"), "fp32"),
        **dict.fromkeys(("bf16-mixed", "bf16-true", "bfloat16"), "bf16"),
    }
)
"""What Lightning and torch call the precisions of all commands but ``train``."""


HUB_ID = r"[\w-][\w.-]*/[\w.-]+"
"""``<owner>/<repository>`` of the Hugging Face hub, as a regular expression."""


Count = Annotated[int, Bounds(1, 10**12)]


Images = Annotated[int, Bounds(1, 10**7, hint="it is a number of images")]


Columns = Annotated[int, Bounds(0, 100, hint="it is a number of columns of a picture")]


Shown = Annotated[int, Bounds(1, 100, hint="it is a number of images of one picture")]


Size = Annotated[int, Bounds(1, 65_536)]


Grid = Annotated[int, Bounds(1, 512, hint="it is the side of the latent grid: 32 at 256px, 64 at 512px")]


Depth = Annotated[int, Bounds(1, 1_000)]


Natural = Annotated[int, Bounds(0, 10**12)]


Seed = Annotated[int, Bounds(0, 2**32 - 1)]  # NumPy's and Lightning's bound


Workers = Annotated[int, Bounds(0, 128, hint="it is a number of reading processes; as many as there are cores do")]


Positive = Annotated[float, Bounds(0, 1e38, open_low=True)]


NonNegative = Annotated[float, Bounds(0, 1e38)]


Number = Annotated[float, Bounds(-1e38, 1e38)]
"""A number that float32 can hold."""


DropFraction = Annotated[
    float,
    Bounds(0, 1, hint="it is the share of kept tokens to drop: 0 keeps all of them, 0.9 a tenth, 1 none at all"),
]


TailDrop = Annotated[
    float,
    Bounds(0, 1, open_high=True, hint="it is the share of kept tokens to drop, 0 keeps all of them, 0.9 a tenth"),
]
"""A drop fraction at which every sample keeps a token."""


Capacity = Annotated[
    float,
    Bounds(0, 1, open_low=True, hint="it is the share of all positions that there is room for, such as 0.4"),
]


Compression = Annotated[
    float, Bounds(1, 10**7, open_low=True, hint="N = 4 asks the router to keep a quarter of the tokens")
]


Name = Annotated[str, Matches("[^\0\ud800-\udfff]*", "a text without null bytes and lone surrogates")]


Digest = Annotated[str, Matches("[0-9a-f]{64}", "a digest of 64 hexadecimal digits")]


MlpRatio = Annotated[float, Bounds(0, 256, open_low=True, hint="4 as published")]


LabelDropout = Annotated[float, Bounds(0, 1, open_high=True, hint="it is a probability, 0.1 as published")]


TimeFraction = Annotated[float, Bounds(0, 1, open_low=True, hint="0.1 is a tenth of the time")]
