"""Sections of a configuration that choose among the entries of a table, or have keys of another program."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pkgutil import resolve_name
from typing import Any, ClassVar, TypeVar

from typing_extensions import override

from dcdit.checks.checking import Section, annotations, call_checked
from dcdit.checks.messages import shown
from dcdit.checks.tables import describe_unknown
from dcdit.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class NamedSettings:
    """Settings that stand in a table.

    Attributes:
        name: their name in the table.
        implementation: module and name of the class or function that they are for, which is imported when it is called:
            torch takes seconds to import, and a mistake is to be reported at once.
    """

    name: ClassVar[str]
    implementation: ClassVar[str]

    @property
    def spec(self) -> dict[str, Any]:
        """The name and all settings as plain values, as a configuration states them."""
        return {"name": self.name, **asdict(self)}

    def call_implementation(self, *arguments: Any) -> Any:
        """What the implementation makes of these settings and the ``arguments``."""
        return resolve_name(self.implementation)(self, *arguments)


def build_named(table: Mapping[str, Callable[..., T]], values: object, prefix: str) -> T:
    """Call the entry of ``table`` that ``values`` names with the other values, checked as :func:`call_checked` does.

    Args:
        table: classes or functions by name; nothing else is ever built from a configuration or a checkpoint.
        values: ``name`` and the arguments, as plain values.
        prefix: the section's key in the configuration, for messages.

    Raises:
        UserError: if the name is not in the table, or an argument is unknown, of the wrong type or out of range.
    """
    if not isinstance(values, Mapping):
        raise UserError(f"{prefix}={shown(values)}: {prefix} is a section, set its keys, such as {prefix}.name=...")
    arguments = dict(values)
    name = arguments.pop("name", None)
    if not isinstance(name, str) or name not in table:
        raise UserError(f"{prefix}.name={shown(name)} {describe_unknown(str(name), table)}")
    return call_checked(table[name], arguments, prefix)


@dataclass(frozen=True)
class Named(Section):
    """A section that chooses by its key ``name``; see :func:`build_named`.

    Attributes:
        table: the classes that may be chosen, by name.
    """

    table: Mapping[str, Callable[..., Any]]

    @override
    def make(self, name: str, value: Any) -> Any:
        return build_named(self.table, value, name)


@dataclass(frozen=True)
class WithOthers(Section):
    """A section with keys that its class does not name; they become its field ``others``, unchecked.

    Attributes:
        kind: the class.
    """

    kind: Callable[..., Any]

    @override
    def make(self, name: str, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return call_checked(self.kind, value, name)
        known = annotations(self.kind).keys() - {"others"}
        others = {str(key): element for key, element in value.items() if key not in known}
        own = {key: element for key, element in value.items() if key in known}
        return call_checked(self.kind, {**own, "others": others}, name)
