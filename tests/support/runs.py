"""Runs in processes of their own, and what they leave behind."""

import csv
import time
from pathlib import Path

import torch
from support.configs import TINY
from support.processes import Command
from torch import Tensor

TIMING = {"train/images_per_s", "train/peak_memory_gb"}


def load(run: Path, name: str = "last.ckpt") -> dict:
    return torch.load(run / "checkpoints" / name, weights_only=True)


def differences(a, b, path=""):
    """Paths at which two nests of plain values and tensors differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        keys = set(a) | set(b)
        return [d for k in keys for d in differences(a.get(k), b.get(k), f"{path}/{k}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        return [d for i, (x, y) in enumerate(zip(a, b, strict=True)) for d in differences(x, y, f"{path}/{i}")]
    same = torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b
    return [] if same else [path]


def logged(run: Path) -> dict[tuple[int, str], str]:
    """Training metrics of all log files of a run by step and name; later files win."""
    rows = {}
    for file in sorted(run.glob("logs/version_*/metrics.csv")):
        with file.open() as stream:
            for row in csv.DictReader(stream):
                values = {k: v for k, v in row.items() if v and k.startswith("train/") and k not in TIMING}
                rows |= {(int(row["step"]), name): value for name, value in values.items()}
    return rows


STATE = (
    "state_dict",
    "current_model_state",
    "averaging_state",
    "optimizer_states",
    "skipped",
    "LatentDataModule",
)


def assert_same_end(one: Path, other: Path) -> None:
    """Two runs ended alike, whatever happened to them."""
    a, b = load(one), load(other)
    assert set(STATE) <= set(a)
    assert [d for key in STATE for d in differences(a[key], b[key], key)] == []
    assert logged(one) == logged(other)


def start(run: Path, data: Path, *overrides: str) -> Command:
    places = (f"data.directory={data}", f"run_dir={run}", "ckpt_path=auto")
    return Command(run.parent, "train", *TINY, *places, *overrides)


def wait_for(condition, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.02)
