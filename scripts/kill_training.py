"""Kill a real training at random moments, resume it each time, and compare its end with that of an uninterrupted run.

``python scripts/kill_training.py 50``: the number of kills. A checkpoint is written at every step. Ends with status
1 if a bit differs.
"""

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

SETTINGS = (
    "experiment=digits",
    "model.width=32",
    "model.depth=1",
    "model.encoder_width=16",
    "model.grid=8",
    "data.batch_size=8",
    "multi_budget.full_budget_steps=20",
    "optimizer.schedule=constant",
    "trainer.precision=32-true",
    "trainer.log_every_n_steps=1",
    "trainer.val_check_interval=100",
    "callbacks.progress=null",
    "callbacks.checkpoint.keep=2",
    "ckpt_path=auto",
)
LONGEST = 3.0
"""The most seconds from a run's first new checkpoint to its kill."""


def command(run: Path, data: Path, steps: int, every: int) -> list[str]:
    """The command line of a run."""
    paths = (f"run_dir={run}", f"data.directory={data}")
    lengths = (f"trainer.max_steps={steps}", f"callbacks.checkpoint.every_n_steps={every}")
    return [sys.executable, "-m", "dcdit.train", *SETTINGS, *paths, *lengths]


def step_of(run: Path) -> int:
    """The step of a run's newest checkpoint; 0 if there is none."""
    return max((int(path.stem[5:]) for path in (run / "checkpoints").glob("step_*.ckpt")), default=0)


def kill_once(run: Path, data: Path, steps: int, chance: random.Random) -> int | None:
    """Start the run and kill it some time after its first new checkpoint; its step then, None if it ended before."""
    before = step_of(run)
    process = subprocess.Popen(command(run, data, steps, 1), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while step_of(run) == before and process.poll() is None:
        time.sleep(0.01)
    deadline = time.monotonic() + chance.uniform(0, LONGEST)
    while time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.001)
    if process.poll() is not None:
        return None
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    return step_of(run)


def differences(one: Any, other: Any, path: str = "") -> Iterator[str]:
    """The paths at which two nested values differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in {**one, **other}:
            yield from differences(one.get(key), other.get(key), f"{path}.{key}")
    elif isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        for number, pair in enumerate(zip(one, other, strict=True)):
            yield from differences(*pair, f"{path}.{number}")
    elif not (torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other):
        yield path


def rows(run: Path) -> dict[tuple[str, str], str]:
    """The logged training metrics by step and name, without the speed."""
    metrics = {}
    for file in sorted(run.glob("logs/version_*/metrics.csv"), key=lambda path: int(path.parent.name.split("_")[1])):
        names, *lines = (line.split(",") for line in file.read_text().splitlines())
        for line in lines:
            values = dict(zip(names, line, strict=False))
            for name, value in values.items():
                if value and name.startswith("train/") and name != "train/images_per_s":
                    metrics[values["step"], name] = value
    return metrics


def main() -> None:
    """Kill and resume a run, and compare it with an uninterrupted one."""
    kills, chance = int(sys.argv[1]) if len(sys.argv) > 1 else 50, random.Random(0)  # noqa: S311
    folder = Path(tempfile.mkdtemp(prefix="dcdit-kills-"))
    data, run, whole = folder / "data", folder / "run", folder / "whole"
    steps, step = 10**6, None  # far more steps than there is time for: the last kill decides on the length
    for number in range(kills):
        step = kill_once(run, data, steps, chance)
        if step is None:
            raise SystemExit(f"the run ended before its kill {number + 1}: look into {run}")
        print(f"kill {number + 1} of {kills}: step {step}", flush=True)
    end = (step or 0) + 5
    for directory, every in ((run, 1), (whole, 10**6)):
        subprocess.run(command(directory, data, end, every), check=True, stderr=subprocess.DEVNULL)
    one, other = (torch.load(path / "checkpoints" / "last.ckpt", weights_only=True) for path in (run, whole))
    keys = ("state_dict", "current_model_state", "averaging_state", "optimizer_states", "LatentDataModule", "skipped")
    differing = [path for key in keys for path in differences(one[key], other[key], key)]
    logged = rows(run)
    lost = [key for key, value in rows(whole).items() if logged.get(key) != value]
    print(f"{kills} kills over {end} steps: {len(differing)} differences in the state, {len(lost)} in logged metrics")
    for difference in (*differing[:5], *lost[:5]):
        print(difference)
    raise SystemExit(bool(differing or lost))


if __name__ == "__main__":
    main()
