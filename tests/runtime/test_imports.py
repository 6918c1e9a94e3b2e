"""Optional packages: who lacks one is told which extra installs it."""

import ast
import re
import sys
from importlib import import_module
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import dcdit
from dcdit.errors import UserError
from dcdit.runtime.imports import EXTRAS, check_installed, is_installed, missing_extra
from dcdit.settings.errors import explain
from dcdit.training.build import build_each

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PACKAGE = Path(dcdit.__file__).parent
ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LATE = ("explorer", "cluster")
"""Folders that only their command imports, after it looked whether their packages are there."""


def names(requirements):
    return {Requirement(text).name for text in requirements}


def test_the_table_and_the_extras_of_the_project_say_the_same():
    told = {(package, extra) for package, extra in EXTRAS.values()}
    assert told == {
        (package, extra)
        for extra, needed in PROJECT["optional-dependencies"].items()
        if extra not in ("dev", "docs", "notebooks")  # tools of this repository
        for package in names(needed)
    }
    assert not {package for package, _ in told} & names(PROJECT["dependencies"])


def test_the_page_lists_the_extras():
    page = (ROOT / "docs" / "install.md").read_text()
    rows = re.findall(r"^\| (`[a-z0-9`, -]+`) \|([^|]*)\|", page.split("## Completion")[0], flags=re.MULTILINE)
    listed = {extra for row, _ in rows for extra in re.findall(r"[a-z0-9-]+", row)}
    assert listed == set(PROJECT["optional-dependencies"])
    assert {package for package, _ in EXTRAS.values()} == {
        package.strip() for _, packages in rows for package in packages.split(",") if package.strip()
    }


def test_no_other_file_says_how_to_install_an_extra():
    files = [*PACKAGE.rglob("*.py"), *(ROOT / "hydra_plugins").rglob("*.py")]
    assert [path.name for path in files if "pip install 'dcdit[" in path.read_text()] == ["imports.py"]


def test_optional_packages_are_imported_late():
    """Else whoever lacks one could not even load what stands beside it."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(module.split(".")[0] in EXTRAS for module in modules):
                found.add(path.relative_to(PACKAGE).parts[0])
    assert found == set(LATE)


@pytest.mark.parametrize("module", EXTRAS)
def test_each_is_told_by_package_and_extra(monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    package, extra = EXTRAS[module]
    assert not is_installed(module)
    with pytest.raises(UserError, match=rf"^key=x needs {package}: pip install 'dcdit\[{extra}\]', or take y$"):
        check_installed(module, "key=x", "take y")


def test_an_import_that_nobody_foresaw_is_one_message_too(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError) as caught:
        import_module("wandb")
    assert explain(caught.value) == "this needs wandb: pip install 'dcdit[wandb]'"
    with pytest.raises(ValueError, match="library") as wrapped:
        raise ValueError("library says") from caught.value
    assert missing_extra(wrapped.value) == "wandb"


def test_an_import_that_fails_otherwise_is_none_of_them():
    assert missing_extra(ImportError("cannot import name 'x' from 'json'", name="json")) is None
    assert missing_extra(ValueError("wandb")) is None
    assert missing_extra(ImportError("json, which is there: torch", name="torch")) is None


class Absent:
    """What Lightning asks whether a package is installed."""

    def __init__(self, package):
        self.package = package

    def __bool__(self):
        return False

    def __str__(self):
        return f"Requirement '{self.package}' not met"


@pytest.mark.parametrize(
    ("package", "home", "name"),
    [("wandb", "pytorch.loggers.wandb", "WandbLogger"), ("tensorboard", "pytorch.loggers", "TensorBoardLogger")],
)
def test_a_logger_without_its_package(monkeypatch, tmp_path, package, home, name):
    asked = import_module(f"lightning.{'pytorch' if package == 'wandb' else 'fabric'}.loggers.{package}")
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(asked, f"_{package.upper()}_AVAILABLE", Absent(package))
    node = {"_target_": f"lightning.{home}.{name}", "save_dir": str(tmp_path)}
    with pytest.raises(UserError, match=rf"^logger\.{package} needs {package}: pip install 'dcdit\[{package}\]'$"):
        build_each({package: node}, "logger", "id")
