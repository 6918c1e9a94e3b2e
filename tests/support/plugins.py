"""Plug-ins of tests: written to a folder, and forgotten afterwards."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dcdit.checks import tables
from dcdit.settings import plugins


@contextmanager
def forgotten() -> Iterator[None]:
    """Afterwards no table, folder of configuration files or module is there that was not there before."""
    held = {key: (table._entries.copy(), table._origins.copy()) for key, table in tables._TABLES.items()}
    folders, loaded, modules = plugins._folders.copy(), plugins._loaded.copy(), set(sys.modules)
    plugins._installed.cache_clear()
    try:
        yield
    finally:
        for key, table in tables._TABLES.items():
            if key in held:
                table._entries, table._origins = held[key]
            else:  # loaded by the test; it keeps what is ours
                for name in list(table._origins):
                    del table[name]
        plugins._folders, plugins._loaded = folders, loaded
        plugins._installed.cache_clear()
        for name in set(sys.modules) - modules:
            file = getattr(sys.modules[name], "__file__", None) or ""
            if name.startswith(("my_", "own_")) and "site-packages" not in file:
                del sys.modules[name]


ROUTER = """
from dcdit.network.routing import ROUTERS, CosineRouter


class {cls}(CosineRouter):
    pass


ROUTERS["{name}"] = {cls}
"""


def write_router(folder: Path, module: str, name: str, cls: str = "Own") -> None:
    """A plug-in of one file, whose router has the parameters of ``cosine``."""
    file = folder / f"{module.replace('.', '/')}.py"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(ROUTER.format(cls=cls, name=name))


def install(site: Path, package: str, version: str, module: str) -> None:
    """What pip would leave of a package that declares a plug-in, beside its code."""
    info = site / f"{package.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(f"[dcdit.plugins]\nown = {module}\n")
