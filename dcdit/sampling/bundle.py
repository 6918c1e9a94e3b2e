"""One file with the code that a network and its sampling need, gathered from dcdit's own modules.

diffusers imports the code of an exported folder from single files and copies no packages. So an export gathers the
statements that a few names need from the modules of dcdit, and writes them one after the other. The code has one home,
and the file is plain Python, which a user can read before trusting it.
"""

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from graphlib import TopologicalSorter
from importlib.util import find_spec
from pathlib import Path
from textwrap import wrap

_PACKAGE = __name__.partition(".")[0]
_REFERENCE = re.compile(rf"({_PACKAGE}(?:\.\w+)+):(\w+)")  # such as NamedSettings.implementation
_SCOPES = ast.FunctionDef | ast.ClassDef | ast.Lambda | ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp
_RESOLVE = "pkgutil", "resolve_name"
_RESOLVE_HERE = '''def resolve_name(name: str) -> object:
    """Return what is called ``name`` in this file."""
    return globals()[name]'''


@dataclass(frozen=True)
class _Module:
    """The source of a module of dcdit.

    Attributes:
        lines: all lines.
        body: its statements.
        owners: numbers of the statements that bind a name; several for a function with overloads.
        imports: of an imported name, the module and the name in it; the latter is empty where it is a module itself.
    """

    lines: list[str]
    body: list[ast.stmt]
    owners: dict[str, list[int]] = field(default_factory=dict)
    imports: dict[str, tuple[str, str]] = field(default_factory=dict)


@cache
def _read(module: str) -> _Module:
    """Read the source of a module of dcdit; nothing in it is run."""
    spec = find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    source = Path(spec.origin).read_text(encoding="utf-8")
    read = _Module(source.splitlines(), ast.parse(source).body)
    for number, statement in enumerate(read.body):
        if isinstance(statement, ast.If) and ast.unparse(statement.test) == "TYPE_CHECKING":
            continue
        for node in _in_scope(statement):
            names = []
            if isinstance(node, ast.Import | ast.ImportFrom):
                imported = _imported(node)
                if node is statement:
                    read.imports.update(imported)
                else:  # within a block, which is gathered as a whole
                    names = list(imported)
            elif isinstance(node, ast.FunctionDef | ast.ClassDef):
                names = [node.name]
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names = [node.id]
            for name in names:
                read.owners.setdefault(name, []).append(number)
    return read


def _imported(node: ast.Import | ast.ImportFrom) -> dict[str, tuple[str, str]]:
    """The names that an import binds, see :class:`_Module`."""
    if isinstance(node, ast.ImportFrom):
        return {alias.asname or alias.name: (node.module or "", alias.name) for alias in node.names}
    return {alias.asname or alias.name.partition(".")[0]: (alias.name, "") for alias in node.names}


def _in_scope(node: ast.AST) -> Iterator[ast.AST]:
    """Yield ``node`` and what is below it, without what has a scope of its own."""
    yield node
    if not isinstance(node, _SCOPES):
        for child in ast.iter_child_nodes(node):
            yield from _in_scope(child)


def _of_package(node: ast.AST) -> bool:
    return isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == _PACKAGE


class _Gathering:
    """The statements that have been gathered.

    Args:
        instead: see :func:`gather`.
    """

    def __init__(self, instead: Mapping[str, str]) -> None:
        self.instead = instead
        self.needed: dict[str, set[int]] = {}
        """Numbers of the statements that are needed of a module."""
        self.before: dict[str, set[str]] = {}
        """The modules that a module imports, whose code has to stand before its own."""
        self.libraries: dict[str, tuple[str, str]] = {}
        """Names that are imported from libraries."""
        self.homes: dict[str, str] = {}
        """Names that modules of dcdit define."""
        self.renamed: dict[str, dict[str, str]] = {}
        """New names of what is private to a module."""

    def need(self, module: str, name: str) -> str | None:
        """Gather what binds ``name`` in ``module``, and all that it needs itself; return the module that defines it."""
        read = _read(module)
        if name in read.imports:
            origin, original = read.imports[name]
            if origin.partition(".")[0] != _PACKAGE:
                known = self.libraries.setdefault(name, read.imports[name])
                assert (known, name in self.homes) == (read.imports[name], False), f"{module} imports another {name}"
                return None
            assert original == name, f"{module} imports {original or origin} as {name}"
            assert not name.startswith("_"), f"{module} imports {name}, which is private to {origin}"
            home = self.need(origin, name)
            if home is not None:
                self.before.setdefault(module, set()).add(home)
            return home
        if name not in read.owners:
            return None  # a builtin, or a local name
        self._check_unique(name, module)
        self.before.setdefault(module, set())
        for number in read.owners[name]:
            if number not in self.needed.setdefault(module, set()):
                self.needed[module].add(number)
                if f"{module}:{name}" not in self.instead:
                    self._need_all_of(module, read.body[number])
        return module

    def _check_unique(self, name: str, module: str) -> None:
        """Have one name mean one thing: a private name that another module has too is renamed.

        Two modules may bind a name by the same statement, such as ``T = TypeVar("T")``, which does no harm.
        """
        home = self.homes.setdefault(name, module)
        one, other = (
            [ast.unparse(_read(source).body[n]) for n in _read(source).owners[name]] for source in (home, module)
        )
        if one != other and name.startswith("_"):
            self.renamed.setdefault(module, {})[name] = f"{name}_{module.rpartition('.')[2]}"
        else:
            assert (one, name in self.libraries) == (other, False), f"{name} is in {home} and {module}: rename one"

    def _need_all_of(self, module: str, statement: ast.stmt) -> None:
        for node in ast.walk(statement):
            if isinstance(node, ast.Name):
                self.need(module, node.id)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                for origin, name in _REFERENCE.findall(node.value):
                    self.need(origin, name)
            elif _of_package(node):
                assert isinstance(node, ast.ImportFrom)
                for name, (origin, original) in _imported(node).items():
                    assert original == name, f"{module} imports {original} as {name}"
                    self.need(origin, name)

    def source(self, module: str) -> str:
        """What was gathered of ``module``, with its comments and the texts below its constants."""
        read, parts = _read(module), [f"# From {module.replace('.', '/')}.py"]
        names = {key.partition(":")[2]: text for key, text in self.instead.items() if key.startswith(f"{module}:")}
        instead = {read.owners[name][0]: text for name, text in names.items()}
        parts += [instead.get(number) or _source_of(read, number) for number in sorted(self.needed[module])]
        source = _REFERENCE.sub(r"\2", "\n\n\n".join(parts))
        for name, other in self.renamed.get(module, {}).items():
            source = re.sub(rf"(?<![\w.]){name}\b", other, source)
        return source


def _source_of(read: _Module, number: int) -> str:
    """The source of a statement, in which imports from dcdit within functions are ``pass``."""
    statement, last = read.body[number], read.body[number]
    following = read.body[number + 1] if number + 1 < len(read.body) else None
    if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
        last = following  # the text below a constant
    start = min([statement.lineno, *(decorator.lineno for decorator in getattr(statement, "decorator_list", []))])
    while start > 1 and read.lines[start - 2].startswith("#"):
        start -= 1
    lines = list(read.lines[: last.end_lineno])
    for node in ast.walk(statement):
        if _of_package(node):
            assert isinstance(node, ast.ImportFrom)
            end = node.end_lineno or node.lineno
            lines[node.lineno - 1 : end] = [" " * node.col_offset + "pass"] + [""] * (end - node.lineno)
    return "\n".join(lines[start - 1 :])


def _import_lines(libraries: Mapping[str, tuple[str, str]]) -> list[str]:
    """The imports of names from libraries, whole modules first."""
    whole: list[str] = []
    parts: dict[str, list[str]] = {}
    for name, (module, original) in sorted(libraries.items()):
        if not original:
            whole.append(f"import {module}" + ("" if name == module.partition(".")[0] else f" as {name}"))
        elif (module, original) != _RESOLVE:
            parts.setdefault(module, []).append(original if name == original else f"{original} as {name}")
    lines = [f"from {module} import {', '.join(names)}" for module, names in sorted(parts.items())]
    wrapped = [line if len(line) <= 120 else f"{line.replace(' import ', ' import (', 1)})" for line in lines]
    return [*sorted(whole), *["\n".join(wrap(line, 120, subsequent_indent="    ")) for line in wrapped]]


def gather(roots: Mapping[str, str], title: str, instead: Mapping[str, str]) -> str:
    """The source of one file in which the names ``roots`` of dcdit are defined as in dcdit.

    Args:
        roots: names, and the modules of dcdit that define them.
        title: the text at the beginning of the file.
        instead: source that stands for a class or function, by ``module:name``.

    Raises:
        AssertionError: if two modules of dcdit give one name to different things that are needed.
    """
    gathering = _Gathering(instead)
    for name, module in roots.items():
        gathering.need(module, name)
    head = "\n".join([f'"""{title}"""', "", *_import_lines(gathering.libraries)])
    order = [module for module in TopologicalSorter(gathering.before).static_order() if gathering.needed.get(module)]
    return "\n\n\n".join([head, _RESOLVE_HERE, *map(gathering.source, order)]) + "\n"
