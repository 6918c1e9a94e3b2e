"""Plug-ins: modules of other packages, which enter networks, metrics and more in our tables when they are imported."""

import os
import shlex
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points, packages_distributions, version
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

from dcdit.checks import Matches, conform, named_entries, shown, visible
from dcdit.errors import UserError
from dcdit.settings.published import CONFIG_DIR

GROUP = "dcdit.plugins"
"""The entry points by which an installed package declares its plug-ins."""

VARIABLE = "DCDIT_PLUGINS"
"""The environment variable that names modules, with commas between them."""

Module = Annotated[str, Matches(r"(?!.{201})[^\W\d]\w*(\.[^\W\d]\w*)*", "the name of a module, such as my_router")]

_MAIN = "__main__"
"""What Python calls the module of a script or notebook that it runs: no other process can import it."""

_folders: dict[str, Path] = {}
_loaded: dict[str, str] = {}
"""The modules that were imported, with what named each."""


class ChangedPluginError(UserError):
    """A file does not fit the code of a plug-in, which probably was another when the file was written."""


@cache
def _installed() -> tuple[EntryPoint, ...]:
    return tuple(entry_points(group=GROUP))


def find_plugins(named: object = ()) -> dict[str, str]:
    """The modules of installed packages, of ``DCDIT_PLUGINS`` and of the key ``plugins``, with what names each.

    Their folders of configuration files are known from now on; nothing is imported.

    Args:
        named: value of the key.

    Raises:
        UserError: if a name is no module's, or a configuration file has the name of another.
    """
    found = {entry.module: f"package {entry.dist.name}" for entry in _installed() if entry.dist}
    variable = [name.strip() for name in os.environ.get(VARIABLE, "").split(",") if name.strip()]
    if isinstance(named, str | tuple):
        named = [named] if isinstance(named, str) else list(named)
    for key, names in ((VARIABLE, variable), ("plugins", named)):
        for name in conform(key, names, list[str]):
            _refuse_path(key, name)
            module = conform(key, name, Module)
            found.setdefault(module, f"{key}={module}")
    for package in dict.fromkeys(module.partition(".")[0] for module in found):
        spec = find_spec(package) if package != _MAIN else None
        places = [] if spec is None else spec.submodule_search_locations or [os.path.dirname(spec.origin or "")]
        for place in places:
            add_config_folder(place, os.path.join(place, "configs"))
    return found


def _refuse_path(key: str, name: str) -> None:
    """Raise :class:`UserError` if what should be the name of a module is the path of a file or folder."""
    if "/" not in name and not name.endswith(".py"):
        return
    path = Path(name)
    parts, folder = [path.stem], path.parent
    while (folder / "__init__.py").is_file() and folder.name:
        parts, folder = [folder.name, *parts], folder.parent
    module = ".".join(parts)
    given = f"{VARIABLE}={module}" if key == VARIABLE else f"plugins=[{module}]"
    where = "" if folder == Path() else f", and have Python find it: PYTHONPATH={visible(str(folder))}"
    raise UserError(
        f"{key}={shown(name)} is a path, and a plug-in is named as Python imports it: {visible(given)}{where}"
    )


def words_of_plugins() -> str:
    """The words that a command needs for the plug-ins that the key ``plugins`` named here; they begin with a space."""
    named = [module for module, where in _loaded.items() if where == f"plugins={module}"]
    return f" {shlex.quote('plugins=[' + ','.join(named) + ']')}" if named else ""


def load_plugins(named: object = ()) -> None:
    """Import the plug-ins that :func:`find_plugins` finds, each once.

    Raises:
        UserError: if one cannot be imported, or would replace what is not its own.
    """
    for module, where in find_plugins(named).items():
        if module not in sys.modules:
            _import(module, where)
        _loaded.setdefault(module, where)


def _import(module: str, where: str) -> None:
    try:
        import_module(module)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    except (Exception, SystemExit) as error:  # whatever the code of others raises
        if isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}."):
            raise UserError(
                f"{where}: there is no module {module}. Python looks for it in the current folder, in those that"
                " PYTHONPATH names, and among installed packages"
            ) from None
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<")]
        place = "" if isinstance(error, SyntaxError) else f" ({frames[-1].filename}, line {frames[-1].lineno})"
        without = "pip uninstall the package" if where.startswith("package") else "leave the name out"
        raise UserError(
            f"{where}: the plug-in {module} cannot be imported, {type(error).__name__}: {visible(str(error))}{place}."
            f" python -c 'import {module}' shows the traceback; to go on without it, {without}"
        ) from error


def add_config_folder(owner: str, place: str | None) -> None:
    """Have configuration files found in the folder ``place`` too, if it exists.

    Args:
        owner: who brings it, in place of any other folder.
        place: its path; None if there is no such folder any more.

    Raises:
        UserError: if a file in it has the name of one that is found already.
    """
    _folders.pop(owner, None)
    folder, others = Path(place or "").resolve(), config_folders()
    if place is None or not folder.is_dir() or folder in [other.resolve() for other in others]:
        return
    for file in sorted(folder.rglob("*.yaml")):
        name = file.relative_to(folder)
        if taken := [other for other in others if (other / name).is_file()]:
            raise UserError(f"{file} has the name of {taken[0] / name}, which would hide it: choose another name")
    _folders[owner] = folder


def config_folders() -> list[Path]:
    """The folders of configuration files: ours, those of plug-ins, and that of ``--config-dir``."""
    return [Path(CONFIG_DIR), *_folders.values()]


def plugins_of(values: Mapping[str, object]) -> dict[str, str | None]:
    """The plug-ins that made what ``values`` choose from our tables, each with its package and version, or None.

    A plug-in is called what it was named to be loaded, such as the package whose part made the entry.

    Args:
        values: sections of a configuration as plain values, such as ``model``.
    """
    modules = {_plugin_of(origin) for _, _, origin in _entries_of_plugins(values)}
    return {module: _package_of(module) for module in sorted(modules)}


def keys_of_plugins(values: Mapping[str, object]) -> list[str]:
    """The keys by which ``values`` choose what plug-ins made, such as ``model.router``."""
    return [key for key, _, _ in _entries_of_plugins(values)]


def _entries_of_plugins(values: Mapping[str, object]) -> list[tuple[str, str, str]]:
    """Key, name and module of what ``values`` choose from our tables and plug-ins made."""
    entries = ((table, name, table.origin(name)) for table, name in named_entries(values))
    return [(table.key, name, origin) for table, name, origin in entries if origin is not None]


def _plugin_of(module: str) -> str:
    """The loaded plug-in that is this module or a package around it, else the module itself."""
    around = [name for name in _loaded if f"{module}.".startswith(f"{name}.")]
    return max(around, key=len, default=module)


def describe_makers(values: Mapping[str, object]) -> str:
    """Say which plug-ins made what ``values`` choose, such as ``model.router=own of the plug-in my_router``."""
    return ", ".join(f"{key}={name} of the plug-in {module}" for key, name, module in _entries_of_plugins(values))


@contextmanager
def plugins_may_have_changed(values: Mapping[str, object]) -> Iterator[None]:
    """While a file is compared with the code that ``values`` choose: a difference may be that of a plug-in's code.

    Raises:
        ChangedPluginError: in place of a UserError, if ``values`` choose what a plug-in made.
    """
    try:
        yield
    except UserError as error:
        if not (makers := describe_makers(values)):
            raise
        raise ChangedPluginError(
            f"{makers}: {error}. The code of the plug-in has probably changed since: take it as it was then, or train a"
            " new run with it"
        ) from error


def describe_unfindable(values: Mapping[str, object]) -> str:
    """Say what of ``values`` was made in a script or notebook, where no other program finds it; empty if nothing."""
    made = [f"{key}={name}" for key, name, module in _entries_of_plugins(values) if module == _MAIN]
    return f"{', '.join(made)} {_DESCRIBED_MAIN}" if made else ""


_DESCRIBED_MAIN = (
    "was made in a script or notebook, which no other program can import: put its code into a module, such as"
    " my_plugin.py, and import that, or name it with plugins=[my_plugin]"
)


def _package_of(module: str) -> str | None:
    top = module.partition(".")[0]
    names = [entry.dist.name for entry in _installed() if entry.dist and entry.module.partition(".")[0] == top]
    names += [] if names else packages_distributions().get(top, [])
    return f"{names[0]} {version(names[0])}" if names else None


def check_plugins(values: object) -> None:
    """Check that what a file chooses from our tables is there, if the file records that plug-ins made it.

    Nothing that the file names is imported: only installed packages and ``DCDIT_PLUGINS``, as in every command.

    Args:
        values: sections of a configuration as plain values, and ``plugins``, what :func:`plugins_of` returned then.

    Raises:
        UserError: naming the plug-ins, and how to allow them.
    """
    if not isinstance(values, Mapping) or not values.get("plugins"):
        return
    record = conform("plugins", values["plugins"], dict[str, str | None])
    load_plugins()
    for table, name in named_entries(values):
        if name not in table:
            packages = {conform("plugins", module, Module): package for module, package in list(record.items())[:8]}
            raise UserError(f"{table.key}={shown(name)} {_describe_missing(packages)}")


def _describe_missing(packages: Mapping[str, str | None]) -> str:
    """Say which of the recorded plug-ins are not loaded, and how to load them."""
    named = ", ".join(name + (f" (of {shown(package)})" if package else "") for name, package in packages.items())
    missing = ",".join(module for module in packages if module not in sys.modules)
    if not missing and _MAIN in packages:
        return _DESCRIBED_MAIN
    if not missing:
        return f"was made by the plug-in {named}, which has no such entry here: install the version that had it"
    return (
        f"was made by the plug-in {named}, which is not loaded, because a file never imports anything by itself. If you"
        f" trust it, install its package, or name it with plugins=[{missing}] or {VARIABLE}={missing}"
    )
