"""Check and convert a value, or the arguments of a call, by annotations."""

import difflib
import inspect
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import cache, wraps
from types import MappingProxyType, NoneType, UnionType
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Literal,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    overload,
)

from dcdit.checks.constraints import Meant, OneOf
from dcdit.checks.messages import shown
from dcdit.errors import UserError

if TYPE_CHECKING:
    from typing_extensions import dataclass_transform

T = TypeVar("T")
Class = TypeVar("Class", bound=type)


class Section:
    """An annotation of a section of a configuration that makes its object by rules of its own."""

    def make(self, name: str, value: Any) -> Any:
        """The object that the section at ``name`` describes; UserError naming key, value and remedy."""
        raise NotImplementedError


@overload
def conform(name: str, value: object, hint: type[T]) -> T: ...


@overload
def conform(name: str, value: object, hint: object) -> Any: ...


def conform(name: str, value: Any, hint: Any) -> Any:
    """Check ``value`` against the annotation ``hint``: its type, choices and range; returns it converted.

    Whole numbers become floats where floats are expected, and text that reads as a number (from environment variables)
    becomes one; nothing else is converted.

    Args:
        name: name of the value, for messages.
        value: a plain value, or an object where the annotation is a class; a mapping of its fields becomes a dataclass.
        hint: an annotation: plain types, unions, lists, tuples, mappings, ``Literal``, ``Annotated`` with
            :class:`Bounds`, :class:`NotEmpty`, :class:`OneOf`, :class:`Matches`, :class:`Meant`, a
            :class:`Section`, classes.

    Raises:
        UserError: naming the value and the remedy.
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin is Annotated:
        makers = [argument for argument in arguments[1:] if isinstance(argument, Section)]
        if makers and not is_dataclass(value):
            return makers[0].make(name, value)
        spellings = [
            argument.table for argument in arguments[1:] if isinstance(argument, Meant) and str(value) in argument.table
        ]
        try:
            value = conform(name, value, arguments[0])
        except UserError as error:
            if spellings:
                raise UserError(f"{error}: did you mean {spellings[0][str(value)]}?") from None
            raise
        for constraint in arguments[1:]:
            if constraint in makers or isinstance(constraint, Meant):
                continue
            if value is not None:
                constraint.check(name, value)
        return value
    if origin in (Union, UnionType):
        return _one_of(name, value, arguments)
    if origin is Literal:
        _refuse_list(name, value)
        if value not in arguments or isinstance(value, bool):
            raise UserError(f"{name}={shown(value)} is not one of {', '.join(map(str, arguments))}")
        return value
    if origin in (list, tuple, Sequence):
        return _sequence(name, value, origin, arguments)
    if (origin or hint) in (dict, Mapping):
        if not isinstance(value, Mapping):
            raise UserError(f"{name}={shown(value)} is no section: set its keys, such as {name}.key=value")
        element = arguments[1] if arguments else Any
        return {str(key): conform(f"{name}.{key}", part, element) for key, part in value.items()}
    if hint in _PLAIN:
        return _PLAIN[hint](name, value)
    kind = origin or hint
    if is_dataclass(kind) and isinstance(kind, type) and isinstance(value, Mapping):
        return call_checked(kind, value, name)
    if isinstance(kind, type) and not getattr(kind, "_is_protocol", False) and not isinstance(value, kind):
        raise UserError(f"{name}={shown(value)} is no {kind.__name__}")
    return value


def _one_of(name: str, value: object, hints: Sequence[Any]) -> Any:
    if value is None and NoneType in hints:
        return None
    others = [hint for hint in hints if hint is not NoneType]
    if isinstance(value, str) and {int, str} <= set(others) and not is_plain_whole(value):
        return value  # 1_000 and 007 are names
    # the last one tries, and its message counts
    others.sort(key=lambda hint: (not _is_literal(hint), _depth(hint) == _depth_of(value)))
    for number, hint in enumerate(others, 1):
        try:
            return conform(name, value, hint)
        except UserError as error:
            if number == len(others):
                raise UserError(f"{error}{_also_allowed(value, hints, hint)}") from None
    raise AssertionError("a union has members")


def _also_allowed(value: object, hints: Sequence[Any], tried: Any) -> str:
    """Name the words that a union takes beside ``tried``, of which the message is about ``value``."""
    if isinstance(value, list | tuple | Mapping):
        return ""  # the message is about a part of it
    literals = [hint for hint in hints if _is_literal(hint) and hint is not tried]
    words = [str(word) for hint in literals for word in get_args(hint)]
    words += ["null"] * (NoneType in hints)
    if not words:
        return ""
    return f" (allowed too: {', '.join(words)})"


def _is_literal(hint: Any) -> bool:
    origin: Any = get_origin(hint)
    return origin is Literal


def is_plain_whole(text: str) -> bool:
    """Return whether ``text`` is a whole number as Python writes it: not 007, 1_000 or 1e5."""
    return bool(re.fullmatch(r"0|-?[1-9][0-9]{0,17}", text))


def _depth(hint: Any) -> int:
    """Depth of nested lists that an annotation asks for."""
    if get_origin(hint) is Annotated:
        return _depth(get_args(hint)[0])
    return 1 + _depth(get_args(hint)[0]) if get_origin(hint) in (list, tuple, Sequence) and get_args(hint) else 0


def _depth_of(value: object) -> int:
    """Depth of nested lists in a value, by their first elements."""
    return (1 + _depth_of(value[0]) if value else 1) if isinstance(value, list | tuple) else 0


def _sequence(name: str, value: object, origin: Any, hints: tuple[Any, ...]) -> Any:
    if isinstance(value, str) and value[:1] == "[" and value[-1:] == "]":  # which Hydra could not read as a list
        quoted = ",".join(f"'{part.strip()}'" for part in value[1:-1].split(","))
        raise UserError(
            f'{name}={shown(value)} is no list: texts with spaces or signs need quotes, "{name}=[{quoted}]"'
        )
    if isinstance(value, str | Mapping) or not isinstance(value, Sequence):
        raise UserError(f"{name}={shown(value)}: a list is needed, such as {name}=[{shown(value)}]")
    element = hints[0] if hints else Any
    fixed = origin is tuple and len(hints) > 1 and hints[1] is not Ellipsis
    if fixed and len(value) != len(hints):
        raise UserError(f"{name}={shown(list(value))} has {len(value)} elements, {len(hints)} are needed")
    kinds = hints if fixed else [element] * len(value)
    elements = [conform(name, part, kind) for part, kind in zip(value, kinds, strict=True)]
    return tuple(elements) if origin is tuple else elements


def _flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise UserError(f"{name}={shown(value)} is neither true nor false")
    return value


def _refuse_list(name: str, value: object) -> None:
    if isinstance(value, list | tuple):
        raise UserError(f"{name}={shown(list(value))} is a list: one value is wanted here")


def _number(name: str, value: Any) -> float:
    _refuse_list(name, value)
    if isinstance(value, bool):
        raise UserError(f"{name}={shown(value)} is not a number")
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise UserError(f"{name}={shown(value)} is not a number") from None
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise UserError(f"{name}={shown(value)} is not a finite number")
    return number


def _whole(name: str, value: object) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    try:
        number = _number(name, value)
    except UserError:
        number = math.nan
    if not number.is_integer():
        raise UserError(f"{name}={shown(value)} is not a whole number")
    return int(number)


def _text(name: str, value: object) -> str:
    if isinstance(value, str):
        if "\0" in value:
            raise UserError(f"{name}={shown(value)} holds a null byte, which no path and no name may hold")
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    _refuse_list(name, value)
    raise UserError(f"{name}={shown(value)} is not a text")


_PLAIN: dict[Any, Callable[[str, Any], Any]] = {bool: _flag, int: _whole, float: _number, str: _text}


@cache
def annotations(target: Callable[..., Any]) -> dict[str, Any]:
    """Annotations of the parameters of a function, or of a class's constructor, by name."""
    constructor = inspect.unwrap(target.__init__ if inspect.isclass(target) else target)
    hints = get_type_hints(constructor, include_extras=True)
    names = [name for name in inspect.signature(constructor).parameters if name != "self"]
    return {name: hints.get(name, Any) for name in names}


def checked(cls: Class) -> Class:
    """Class decorator: check the constructor's arguments against their annotations, as :func:`conform` does."""
    constructor: Callable[..., None] = cls.__init__  # type: ignore[misc]
    signature = inspect.signature(constructor)

    @wraps(constructor)
    def check_then_construct(self: Any, *arguments: Any, **named: Any) -> None:
        hints = annotations(constructor)
        for name, value in named.items():
            if name not in hints:
                raise UserError(_no_such_key(name, value, hints))
        bound = signature.bind(self, *arguments, **named)
        for name, value in bound.arguments.items():
            if name in hints:
                bound.arguments[name] = conform(name, value, hints[name])
        constructor(*bound.args, **bound.kwargs)

    shown_parameters = [
        parameter.replace(annotation=_readable(parameter.annotation)) for parameter in signature.parameters.values()
    ]
    check_then_construct.__signature__ = signature.replace(parameters=shown_parameters)  # type: ignore[attr-defined]
    cls.__init__ = check_then_construct  # type: ignore[misc]
    cls.__init__._checks = True  # type: ignore[misc]
    return cls


def _readable(hint: Any) -> Any:
    """Return an annotation as ``help`` should show it: types and choices, without ranges and hints."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        tables = [argument.table for argument in arguments[1:] if isinstance(argument, OneOf)]
        return Literal[tuple(tables[0])] if tables else _readable(arguments[0])
    if origin in (Union, UnionType):
        return Union[tuple(map(_readable, arguments))]  # noqa: UP007 - of a number of members that varies
    return origin[tuple(map(_readable, arguments))] if origin in (list, tuple) and arguments else hint


def _construct(target: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    """Call ``target`` with arguments that conform to its signature; a dataclass checks them no second time."""
    kind: Any = target
    if not is_dataclass(target) or not getattr(kind.__init__, "_checks", False):
        return target(**arguments)
    instance = kind.__new__(kind)
    kind.__init__.__wrapped__(instance, **arguments)
    return instance


if not TYPE_CHECKING:

    def dataclass_transform(**ignored: Any) -> Callable[[Class], Class]:
        """For type checkers alone."""
        return lambda function: function


@dataclass_transform(frozen_default=True, kw_only_default=True)
def config(cls: Class) -> Class:
    """Class decorator of a configuration: a frozen dataclass of keyword arguments, which are :func:`checked`."""
    made: Any = dataclass(frozen=True, kw_only=True)(cls)
    return checked(made)


MISSING = "???"
"""Hydra's mark of a value that the user must give."""


def suggestion(key: str, known: Iterable[str]) -> str:
    """Name the known key that is most similar to the unknown ``key``, else all known keys."""
    known = sorted(known)
    close = difflib.get_close_matches(key, known, n=1)
    return f"did you mean {close[0]}?" if close else f"known keys: {', '.join(known)}"


def _no_such_key(key: str, value: object, known: Iterable[str]) -> str:
    return f"{key}={shown(value)}: there is no such key, {suggestion(key, known)}"


def call_checked(
    target: Callable[..., T], values: object, prefix: str, built: Mapping[str, object] = MappingProxyType({})
) -> T:
    """Call ``target`` with ``values`` after checking names, types and ranges against its signature.

    Args:
        target: a class or function whose parameters are annotated, see :func:`conform`.
        values: keyword arguments, as plain values.
        prefix: the section's key in the configuration, for messages; empty for the top level.
        built: further arguments that are objects already, and not checked.

    Raises:
        UserError: naming the key, the value and the remedy.
    """
    dotted = f"{prefix}." if prefix else ""
    hints = {name: hint for name, hint in annotations(target).items() if name not in built}
    parameters = inspect.signature(target).parameters
    if not isinstance(values, Mapping):
        examples = ", ".join(f"{dotted}{name}=..." for name in list(hints)[:3])
        raise UserError(f"{prefix}={shown(values)}: {prefix} is a section, set its keys: {examples}")
    given = {}
    for key, value in values.items():
        if key not in hints:
            raise UserError(f"{dotted}{_no_such_key(str(key), value, hints)}")
        if not (isinstance(value, str) and value == MISSING):
            given[str(key)] = conform(f"{dotted}{key}", value, hints[key])
    for name in hints:
        if name not in given and parameters[name].default is inspect.Parameter.empty:
            raise UserError(f"{dotted}{name} is not set: give {dotted}{name}=...")
    try:
        made: T = _construct(target, {**given, **built})
        return made
    except UserError as error:
        raise UserError(f"{dotted}{error}") from None  # constructors begin their messages with the argument's name


def to_plain(value: Any) -> Any:
    """What :func:`conform` makes an object of, from the object: mappings, lists, texts, numbers.

    Args:
        value: a dataclass, or anything with dataclasses in it.
    """
    if is_dataclass(value) and not isinstance(value, type):
        plain = {field.name: to_plain(getattr(value, field.name)) for field in fields(value)}
        others = plain.pop("others", {})
        name = {"name": value.name} if "name" not in plain and hasattr(value, "name") else {}
        return {**name, **plain, **others}
    if isinstance(value, Mapping):
        return {key: to_plain(element) for key, element in value.items()}
    return [to_plain(element) for element in value] if isinstance(value, list | tuple) else value
