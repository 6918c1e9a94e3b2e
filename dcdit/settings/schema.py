"""Configuration checks: a constructor's signature is the schema of its section."""

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, TypeVar

from dcdit.checks import annotations, conform, shown
from dcdit.errors import UserError

T = TypeVar("T")

MISSING = "???"
"""Hydra's mark of a value that must be given."""


def suggestion(key: str, known: Iterable[str]) -> str:
    """A remedy for the unknown ``key``: the most similar known key, else all of them."""
    known = sorted(known)
    close = difflib.get_close_matches(key, known, n=1)
    return f"did you mean {close[0]}?" if close else f"known keys: {', '.join(known)}"


def call_checked(
    target: Callable[..., T], values: Any, prefix: str, built: Mapping[str, Any] = MappingProxyType({})
) -> T:
    """Call ``target`` with ``values`` after checking names, types and ranges against its signature.

    Args:
        target: a class or function whose parameters are annotated, see :func:`dcdit.checks.conform`.
        values: its keyword arguments, as plain values.
        prefix: the section's place in the configuration, for the messages; empty for the top level.
        built: further arguments that are objects already.

    Raises:
        UserError: naming the key, the value and the remedy.
    """
    place = f"{prefix}." if prefix else ""
    hints = {name: hint for name, hint in annotations(target).items() if name not in built}
    parameters = inspect.signature(target).parameters
    if not isinstance(values, Mapping):
        some = ", ".join(f"{place}{name}=..." for name in list(hints)[:3])
        raise UserError(f"{prefix}={shown(values)}: {prefix} is a section, set its keys: {some}")
    given = {}
    for key, value in values.items():
        if key not in hints:
            raise UserError(f"{place}{key}={shown(value)}: there is no such key, {suggestion(str(key), hints)}")
        if not (isinstance(value, str) and value == MISSING):
            given[str(key)] = conform(f"{place}{key}", value, hints[key])
    for name in hints:
        if name not in given and parameters[name].default is inspect.Parameter.empty:
            raise UserError(f"{place}{name} is not set: give {place}{name}=...")
    try:
        return target(**given, **built)
    except UserError as error:
        raise UserError(f"{place}{error}") from None  # constructors begin their messages with the argument's name


def build_named(table: Mapping[str, Callable[..., T]], values: Any, prefix: str) -> T:
    """Construct what ``values`` describes: ``name``, one of ``table``, and the arguments of what stands there.

    Args:
        table: the allowed names; nothing else is ever constructed from a configuration or a checkpoint.
        values: plain values.
        prefix: the section's place in the configuration, for the messages.

    Raises:
        UserError: if the name is not in the table, or an argument is unknown, of the wrong type or out of range.
    """
    if not isinstance(values, Mapping):
        raise UserError(f"{prefix}={shown(values)}: {prefix} is a section, set its keys, such as {prefix}.name=...")
    arguments = dict(values)
    name = arguments.pop("name", None)
    if not isinstance(name, str) or name not in table:
        raise UserError(f"{prefix}.name={shown(name)} is not one of {', '.join(table)}")
    return call_checked(table[name], arguments, prefix)
