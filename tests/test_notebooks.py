"""The notebooks run from the first cell to the last, at sizes of seconds, and show what they computed."""

import os
import re
from pathlib import Path

import pytest

nbclient = pytest.importorskip("nbclient", reason="the extra `notebooks` is not installed")
nbformat = pytest.importorskip("nbformat", reason="the extra `notebooks` is not installed")

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SMALL = {"STEPS": "20", "COUNT": "40", "COMPRESSIONS": "[2, 4]"}
MOST_BYTES = 1_000_000


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path, tmp_path, monkeypatch):
    notebook = nbformat.read(path, 4)
    for cell in code(notebook):
        for name, value in SMALL.items():
            cell.source = re.sub(rf"^{name} = [^#\n]+", f"{name} = {value}", cell.source, flags=re.MULTILINE)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(tmp_path)
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    said = "".join(output.get("text", "") for cell in code(notebook) for output in cell.outputs)
    assert "Traceback" not in said


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_its_outputs_are_there_and_small(path):
    notebook = nbformat.read(path, 4)
    nbformat.validate(notebook)
    assert path.stat().st_size < MOST_BYTES
    shown = [output for cell in code(notebook) for output in cell.outputs]
    assert not [output for output in shown if output.output_type == "error"]
    assert sum("image/png" in output.get("data", {}) for output in shown) >= 3
    assert "\x1b" not in "".join(output.get("text", "") for output in shown), "progress bars belong in a terminal"
    assert code(notebook)[0].source.count("pip install") == 1  # the one cell that Colab needs
    assert str(ROOT) not in path.read_text()


def test_there_are_two():
    assert [path.stem for path in NOTEBOOKS] == ["adaptive_compute", "train_sweep_compare"]
