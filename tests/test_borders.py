"""Who may import whom: rooms stand in storeys, and imports run one way."""

import ast
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import dcdit

PACKAGE = Path(dcdit.__file__).parent
MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}

STOREYS = (
    {"errors"},
    {"checks"},
    {"runtime"},
    {"settings"},
    {"network", "diffusion", "runs"},
    {"compute", "data"},
    {"checkpoints"},
    {"extraction", "sampling"},
    {"evaluation", "explorer"},
    {"training", "reporting"},
    {"cluster"},
)
"""From the ground up: a room imports from its own storey's files and from those below, never from above or beside."""

COMMANDS = {
    "train",
    "sample",
    "generate",
    "evaluate",
    "score",
    "report",
    "status",
    "flops",
    "ema",
    "export",
    "extract",
    "inspect_latents",
    "explore",
}

FORBIDDEN = {
    "network": ("lightning", "hydra", "omegaconf", "diffusers", "timm", "torchvision", "webdataset"),
    "diffusion": ("lightning", "hydra", "omegaconf", "timm", "torchvision", "webdataset"),
    "compute": ("lightning", "hydra", "omegaconf", "diffusers", "timm", "torchvision", "webdataset"),
    "data": ("hydra", "omegaconf"),
    "extraction": ("lightning", "hydra", "omegaconf"),
    "checkpoints": ("lightning", "hydra"),
    "sampling": ("lightning", "hydra", "omegaconf"),
    "explorer": ("lightning", "hydra", "omegaconf"),
    "evaluation": ("lightning", "hydra", "omegaconf"),
    "reporting": ("lightning", "hydra", "omegaconf"),
    "training": ("hydra", "omegaconf"),
    "runs": ("torch", "lightning"),
    "settings": ("torch", "lightning"),
    "runtime": ("lightning", "hydra", "omegaconf"),
    "errors": ("torch", "lightning", "hydra", "omegaconf"),
    "checks": ("torch", "lightning", "hydra", "omegaconf"),
}
"""Packages that a room does not know, not even within a function."""

LATE = {
    "settings/compose.py": {"torch"},  # cpu_precision looks at the CPU when it is asked for
    "runtime/devices.py": {"torch"},
}


def room(module: str) -> str:
    return module.split(".")[1] if module.startswith("dcdit.") else ""


def imports(path: Path, with_types: bool = True) -> list[tuple[str, bool]]:
    """Modules that a file imports, and whether at its top level; those for annotations alone only ``with_types``."""
    tree = ast.parse(path.read_text())
    top = {id(node) for node in tree.body}
    if not with_types:
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
                node.body = []
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) in top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [(name if name in MODULES else node.module, id(node) in top) for name in names]
    return found


def files(name: str) -> list[Path]:
    folder = PACKAGE / name
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [PACKAGE / f"{name}.py"]


def crossings(path: Path, name: str) -> list[str]:
    """Imports of a file in the room ``name`` that run upwards or sideways, or reach for a command."""
    level = next(number for number, rooms in enumerate(STOREYS) if name in rooms)
    below = set().union(*STOREYS[:level]) | {name}
    found = []
    for module, _ in imports(path):
        other = room(module)
        if other and other not in below:
            found.append(f"{path.relative_to(PACKAGE)} imports {module}")
    return found


def test_every_file_has_a_storey():
    names = {
        path.stem for path in PACKAGE.iterdir() if path.name[0] not in "_." and (path.suffix == ".py" or path.is_dir())
    }
    assert names - {"configs"} == set().union(*STOREYS) | COMMANDS


@pytest.mark.parametrize("name", sorted(set().union(*STOREYS)))
def test_imports_run_one_way(name):
    assert [crossing for path in files(name) for crossing in crossings(path, name)] == []


@pytest.mark.parametrize("name", sorted(FORBIDDEN))
def test_what_a_room_does_not_know(name):
    found = []
    for path in files(name):
        late = LATE.get(str(path.relative_to(PACKAGE)), set())
        found += [
            f"{path.name} imports {module}"
            for module, top in imports(path)
            if module.split(".")[0] in FORBIDDEN[name] and (top or module.split(".")[0] not in late)
        ]
    assert found == []


def test_the_test_itself_finds_a_crossing(tmp_path):
    path = PACKAGE / "network" / "imagined.py"
    source = "def f():\n    from dcdit.training import module\nimport dcdit.sample\n"
    real = Path.read_text
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "read_text", lambda self: source if self == path else real(self))
        assert len(crossings(path, "network")) == 2


def test_no_cycles_between_files():
    """Imports, also those within functions and of a package itself, followed to the end, never come back."""
    graph = {name: {m for m, _ in imports(path, False) if m in MODULES} - {name} for name, path in MODULES.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


HEAVY = ("torch", "lightning", "diffusers", "timm", "torchmetrics", "torchvision", "wandb", "matplotlib", "webdataset")
LOADED = f"print(sorted({{name.split('.')[0] for name in sys.modules}} & set({HEAVY})))"


@pytest.mark.parametrize(
    ("what", "allowed"),
    [
        ("import dcdit.network", {"torch"}),
        (f"import {', '.join(f'dcdit.{name}' for name in sorted(COMMANDS))}", set()),
        ("import dcdit.runs.progress, dcdit.runs.resume, dcdit.cluster.job", set()),
        (
            "import dcdit.training.run",
            {"torch", "lightning", "torchmetrics", "matplotlib", "torchvision", "webdataset"},
        ),
    ],
)
def test_what_an_import_loads(what, allowed):
    """In a process of its own: here everything is loaded already."""
    result = subprocess.run([sys.executable, "-c", f"import sys; {what}; {LOADED}"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert set(ast.literal_eval(result.stdout)) <= allowed


def test_only_one_console_writes_to_terminals():
    """Rich's own would let text of strangers steer them."""
    found = [
        path.name for path in PACKAGE.rglob("*.py") if re.search("rich.console import .*Console\\b", path.read_text())
    ]
    assert found == []
