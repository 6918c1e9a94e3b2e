"""What a key of a configuration may be, in words, from the annotation that checks it."""

from collections.abc import Mapping, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from dcdit.checks import Bounds, Matches, OneOf

_PLAIN = {
    bool: "`true` or `false`",
    int: "a whole number",
    float: "a number",
    str: "a text",
    NoneType: "`null`",
    dict: "a section",
}
_NO_LIMIT = 10**7
"""From here on an upper bound is no limit that a user meets."""


def allowed(hint: Any) -> str:
    """The values that an annotation of :mod:`dcdit.checks` takes, in Markdown; empty if it takes any."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _constrained(allowed(arguments[0]), arguments[1:])
    if origin is Literal:
        return ", ".join(f"`{word}`" for word in arguments)
    if origin in (Union, UnionType):
        texts = [allowed(argument) for argument in arguments]
        return " or ".join(dict.fromkeys(texts)) if all(texts) else ""
    if origin in (list, tuple, Sequence):
        inner = allowed(arguments[0]) if arguments else ""
        if inner.startswith(("a list", "a nested list")):
            return f"a nested list{inner.partition('list')[2]}"
        return f"a list ({inner})" if inner else "a list"
    return _PLAIN.get(dict if (origin or hint) in (dict, Mapping) else hint, "")


def _constrained(kind: str, constraints: Sequence[Any]) -> str:
    for constraint in constraints:
        if isinstance(constraint, Bounds):
            kind = f"{kind} {_range(constraint)}".strip()
        elif isinstance(constraint, OneOf):
            kind = ", ".join(f"`{name}`" for name in constraint.table)
        elif isinstance(constraint, Matches) and "null byte" not in constraint.hint:
            kind = constraint.hint
    return kind


def _range(bounds: Bounds) -> str:
    low = None if bounds.low is None or bounds.low <= -_NO_LIMIT else f"{bounds.low:g}"
    high = None if bounds.high is None or bounds.high >= _NO_LIMIT else f"{bounds.high:g}"
    if low is not None and high is not None:
        return f"in {'[('[bounds.open_low]}{low}, {high}{'])'[bounds.open_high]}"
    if low is not None:
        return f"{'≥>'[bounds.open_low]} {low}"
    return "" if high is None else f"{'≤<'[bounds.open_high]} {high}"
