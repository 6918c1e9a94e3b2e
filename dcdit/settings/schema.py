"""Configuration checks: a constructor's signature is the schema of its section."""

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import field, make_dataclass
from functools import cache
from types import MappingProxyType
from typing import Any, Literal, TypeVar, get_origin, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dcdit.errors import UserError

T = TypeVar("T")


@cache
def _schema(target: Callable[..., Any], without: frozenset[str]) -> type:
    """A dataclass with the parameters of ``target``, for OmegaConf to check types against."""
    # A class is described by its constructor; dataclasses and plain classes alike.
    hints = get_type_hints(target.__init__ if inspect.isclass(target) else target)
    columns = []
    for name, parameter in inspect.signature(target).parameters.items():
        if name in without:
            continue
        hint = hints.get(name, Any)
        if get_origin(hint) is Literal:
            hint = str  # the constructor itself checks the choices
        default = "???" if parameter.default is parameter.empty else parameter.default  # OmegaConf's missing marker
        columns.append((name, hint, field(default=default)))
    return make_dataclass("Schema", columns)


def suggestion(key: str, known: Iterable[str]) -> str:
    """A remedy for the unknown ``key``: the most similar known key, else all of them."""
    known = sorted(known)
    close = difflib.get_close_matches(key, known, n=1)
    return f"did you mean {close[0]}?" if close else f"known keys: {', '.join(known)}"


def call_checked(
    target: Callable[..., T], values: Mapping[str, Any], prefix: str, built: Mapping[str, Any] = MappingProxyType({})
) -> T:
    """Call ``target`` with ``values`` after checking names and types against its signature.

    Args:
        target: a class or function whose parameters are annotated with types that OmegaConf knows.
        values: its keyword arguments.
        prefix: the section's place in the configuration, for the messages; empty for the top level.
        built: further arguments that are objects already, passed on unchecked.

    Raises:
        UserError: naming the key, the value and the remedy.
    """
    schema = OmegaConf.structured(_schema(target, frozenset(built)))
    place = f"{prefix}." if prefix else ""
    for key, value in values.items():
        if key not in schema.keys():  # noqa: SIM118  (a key without a value yet is "in" its keys only)
            names = [str(name) for name in schema]
            raise UserError(f"{place}{key}={value!r}: there is no such key, {suggestion(key, names)}")
        try:
            schema[key] = value
        except OmegaConfBaseException as error:
            expected = str(error).splitlines()[0]
            if "is not a ListConfig" in expected:
                expected = f"a list is needed, such as {place}{key}=[{value}]"
            raise UserError(f"{place}{key}={value!r}: {expected}") from None
    missing = sorted(OmegaConf.missing_keys(schema))
    if missing:
        raise UserError(f"{place}{missing[0]} is not set: give {place}{missing[0]}=...")
    plain = OmegaConf.to_container(schema, resolve=True)
    assert isinstance(plain, dict)
    try:
        return target(**{str(key): value for key, value in plain.items()}, **built)
    except UserError as error:
        raise UserError(f"{place}{error}") from None  # constructors begin their messages with the argument's name
