"""Who may import whom: the networks and the diffusion maths stand on their own."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import dcdit

PACKAGE = Path(dcdit.__file__).parent


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


@pytest.mark.parametrize(
    ("part", "forbidden"),
    [
        ("network", ("lightning", "hydra", "omegaconf", "diffusers", "webdataset", "dcdit.diffusion", "dcdit.data")),
        ("diffusion", ("lightning", "hydra", "omegaconf", "webdataset", "dcdit.network", "dcdit.data", "dcdit.module")),
        ("data", ("hydra", "dcdit.network", "dcdit.diffusion", "dcdit.module")),
    ],
)
def test_borders(part, forbidden):
    for path in (PACKAGE / part).rglob("*.py"):
        crossed = {name for name in imports(path) if name.startswith(forbidden)}
        assert not crossed, f"{path.name} imports {crossed}"


def test_the_network_needs_torch_and_timm_alone():
    code = "import sys, dcdit.network; print([m for m in ('lightning', 'hydra', 'diffusers') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
