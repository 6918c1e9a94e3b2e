"""Tables: what a key of a configuration may name, and which plug-in each entry came from."""

import difflib
import sys
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any, TypeVar

from dcdit.errors import UserError

T = TypeVar("T")

_OURS = __name__.partition(".")[0]
_TABLES: "dict[str, Table[Any]]" = {}


class Table(MutableMapping[str, T]):
    """What a key may name. Each entry keeps the module that made it, for a checkpoint to record where it came from.

    Args:
        key: of a configuration, such as ``model.router``.
        entries: our own, by name.
    """

    def __init__(self, key: str, entries: Mapping[str, T] | None = None) -> None:
        self.key = key
        self._entries = dict(entries or {})
        self._origins: dict[str, str] = {}
        _TABLES[key] = self

    def __setitem__(self, name: str, entry: T) -> None:
        """Enter ``entry``; UserError if another module has entered something under this name."""
        origin = _caller()
        if name in self._entries and self._origins.get(name, _OURS) != origin:
            owner = self._origins.get(name, "dcdit itself")
            raise UserError(f"{self.key}={name} is of {owner}, and {origin} would replace it: choose another name")
        if origin != _OURS:
            self._origins[name] = origin
        self._entries[name] = entry

    def __getitem__(self, name: str) -> T:
        return self._entries[name]

    def __delitem__(self, name: str) -> None:
        del self._entries[name]
        self._origins.pop(name, None)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def origin(self, name: str) -> str | None:
        """The module of a plug-in that made the entry; None for ours."""
        return self._origins.get(name)


def describe_unknown(value: str, table: Mapping[str, object]) -> str:
    """The end of a message about a name that is not in ``table``: what is, and where another could come from."""
    known = f"is not one of {', '.join(table)}"
    if close := difflib.get_close_matches(value, table, n=1):
        return f"{known}: did you mean {close[0]}?"
    return f"{known}; if a plug-in has it, name that with plugins=[...]" if isinstance(table, Table) else known


def named_entries(values: Mapping[str, Any]) -> "Iterator[tuple[Table[Any], str]]":
    """The names that sections of a configuration, as plain values, choose from tables that are loaded."""
    for table in list(_TABLES.values()):
        value: Any = values
        for key in table.key.split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        for name in value if isinstance(value, list) else [value]:
            if isinstance(name, str):
                yield table, name


def _caller() -> str:
    """The module that changes a table: ``dcdit`` for all of ours, else its full name."""
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_globals.get("__name__") in (__name__, MutableMapping.__module__):
        frame = frame.f_back
    module = str(frame.f_globals.get("__name__"))
    return _OURS if module.partition(".")[0] == _OURS else module
