"""How soon commands answer, against the bare imports that nobody can avoid.

    python benchmarks/start.py            medians of five, all commands in turns
    python benchmarks/start.py --check    fails where a command has become slow to start

Training runs one step of the digits, from before its data are read to after its last checkpoint is written; the data
are there already. Compare ratios within a run, never across.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

HYDRA, LIGHTNING = "import hydra, rich", "import torch, lightning.pytorch"
CASES: dict[str, tuple[str, list[str], float]] = {
    "status runs/x": (HYDRA, ["dcdit.status", "runs/x"], 8.0),
    "report --help": (HYDRA, ["dcdit.report", "--help"], 8.0),
    "train --help": (HYDRA, ["dcdit.train", "--help"], 8.0),
    "sample sampler.steps=many": (HYDRA, ["dcdit.sample", "checkpoint=x", "sampler.steps=many"], 8.0),
    "train model.widht=3": (HYDRA, ["dcdit.train", "model.widht=3"], 8.0),
    "train, one step": (LIGHTNING, ["dcdit.train", "experiment=digits", "trainer.max_steps=1", "ckpt_path=null"], 3.9),
}
"""What each is held against, its words, and the ratio above which --check fails: four and three times
the aim, for machines are noisy; what is lost where torch is imported at the start is a factor of thirty."""


def seconds(words: list[str], place: Path) -> float:
    """Wall-clock time of a process."""
    begin = time.perf_counter()
    subprocess.run([sys.executable, *words], cwd=place, capture_output=True, check=False)  # noqa: S603 - our own words
    return time.perf_counter() - begin


def peak_memory(words: list[str], place: Path) -> float:
    """MB that a process holds at most."""
    code = "import resource, runpy, sys; sys.argv = sys.argv[1:]\n"
    code += "try: runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)\n"
    code += "finally: print('PEAK', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    line = [sys.executable, "-c", code, *words]
    shown = subprocess.run(line, cwd=place, capture_output=True, text=True, check=False).stdout  # noqa: S603
    return int(shown.rpartition("PEAK")[2]) / 1000


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--check", action="store_true", help="fail where a ratio exceeds its bound")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error(f"--rounds {options.rounds} is not a positive number")
    times: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        os.environ["DCDIT_DATA"] = str(place / "data")
        (place / "runs").mkdir()
        seconds(["-m", *CASES["train, one step"][1], "run_name=x"], place)  # writes the data, warms the disk's cache
        for turn in track(range(options.rounds), "measuring", console=Console(stderr=True), transient=True):
            for code in (HYDRA, LIGHTNING):
                times.setdefault(code, []).append(seconds(["-c", code], place))
            for name, (_, words, _) in CASES.items():
                extra = [f"run_name=run{turn}"] if "one step" in name else []
                times.setdefault(name, []).append(seconds(["-m", *words, *extra], place))
        memory = peak_memory(CASES["status runs/x"][1], place)
    median = {name: statistics.median(found) for name, found in times.items()}
    table = Table("command", "s", "against", "s", "ratio", title=f"medians of {options.rounds}", title_justify="left")
    slow = []
    for name, (base, _, most) in CASES.items():
        ratio = median[name] / median[base]
        table.add_row(name, f"{median[name]:.2f}", base, f"{median[base]:.2f}", f"{ratio:.2f}")
        if ratio > most:
            slow.append(f"{name} takes {ratio:.1f} times as long as `{base}`, more than {most:g}")
    Console(width=120).print(table)
    print(f"status holds {memory:.0f} MB at most")
    if options.check and slow:
        sys.exit("\n".join(slow))


if __name__ == "__main__":
    main()
