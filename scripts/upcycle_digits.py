"""Upcycling a plain DiT into a DC-DiT on handwritten digits: ``python scripts/upcycle_digits.py`` (docs/upcycling.md).

Trains a teacher for each seed, then DC-DiTs of several lengths from scratch, with the teacher's blocks copied, and
upcycled (matched all along, dropping from the middle on); measures FID and how many digits are read as the class asked
for, at several drop fractions; draws both over training compute, the teacher's forward passes counted. Broken off, it
goes on. An hour and a half on two cores.
"""

import argparse
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from digit_trials import ROOT, Trained, real_digits, train, training_tflops, write_digits

from dcdit.checkpoints.load import load_model
from dcdit.data.builtin import Digits
from dcdit.diffusion.samplers import Sampler
from dcdit.diffusion.settings import DDIM, GuidanceSettings
from dcdit.evaluation.statistics import Statistics
from dcdit.network import DiT

SEEDS, LENGTHS, DROPS = (0, 1, 2), (300, 600, 1200, 2400), (0.0, 0.3, 0.6)
COPIED = (600, 1200)
"""Lengths at which the blocks are copied, and not matched, as well."""
IMAGES = 500
ALIKE = ("experiment=compare_dcdit", "match_compute.baseline=null")


def variants(steps: int, teacher: Path) -> dict[str, list[str]]:
    """The ways to begin, as overrides."""
    upcycle = ["init=upcycle", f"init.teacher={teacher}", f"multi_budget.full_budget_steps={steps // 2}"]
    found = {"scratch": [], "upcycled": [*upcycle, f"init.distil_steps={steps}"]}
    return found | ({"copied": [*upcycle, "init.distil_steps=0"]} if steps in COPIED else {})


def measure(run: Path, real: Statistics) -> list[dict[str, float]]:
    """FID and share of digits read right at each drop fraction; kept in the run."""
    kept = run / "measured.json"
    if kept.is_file():
        return json.loads(kept.read_text())
    trained, sampler = Trained(run), Sampler(DDIM(steps=25, clip=True))
    found = []
    for drop in DROPS if trained.model.network.routes else (0.0,):
        figures = trained.figures(real, sampler, GuidanceSettings(drop_fraction=drop), IMAGES)
        found.append({"drop": drop, "fid": figures.fid, "read": figures.read, "kept": figures.kept})
    kept.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{run.name}: " + ", ".join(f"{each['read']:.0%} / {each['fid']:.1f}" for each in found), flush=True)
    return found


def draw(rows: list[dict[str, Any]], out: Path) -> None:
    """FID and digits read right over training compute, at each drop fraction."""
    figure, axes = plt.subplots(2, len(DROPS), figsize=(11, 6), sharex=True, sharey="row", layout="constrained")
    colours = {"scratch": "#666666", "copied": "#E69F00", "upcycled": "#0072B2"}
    for column, drop in enumerate(DROPS):
        for row, (key, label) in enumerate((("fid", "FID"), ("read", "digits read as asked for"))):
            for name, colour in colours.items():
                chosen = [each for each in rows if each["variant"] == name and each["drop"] == drop]
                lengths = sorted({each["steps"] for each in chosen})
                groups = [[each for each in chosen if each["steps"] == steps] for steps in lengths]
                costs = [group[0]["tflops"] for group in groups]
                values = [[each[key] for each in group] for group in groups]
                middle = [sum(each) / len(each) for each in values]
                axes[row, column].plot(costs, middle, "o-", color=colour, label=name)
                low, high = list(map(min, values)), list(map(max, values))
                axes[row, column].fill_between(costs, low, high, color=colour, alpha=0.15)
            axes[row, column].set_xscale("log")
            axes[row, column].grid(alpha=0.3)
            if column == 0:
                axes[row, column].set_ylabel(label)
        axes[0, column].set_title(f"drop fraction {drop:g}")
        axes[0, column].set_yscale("log")
        axes[1, column].set_xlabel("training TFLOPs")
    teachers = [each for each in rows if each["variant"] == "teacher"]
    for row, key in enumerate(("fid", "read")):
        for axis in axes[row]:
            middle = sum(each[key] for each in teachers) / len(teachers)
            axis.axhline(middle, color="black", ls=":", label="its teacher")
    for each in axes.flat:
        for axis in (each.xaxis, each.yaxis):
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter("{x:g}")
    axes[0, 0].legend()
    figure.savefig(out, dpi=130)


def main() -> None:
    """Train, measure, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "upcycling")
    parser.add_argument("--parallel", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    out, workers = arguments.out.resolve(), ThreadPoolExecutor(arguments.parallel)
    data = write_digits(out / "digits8", Digits(grid=8))
    teachers = {seed: out / f"teacher_seed_{seed}" for seed in SEEDS}
    jobs = [
        workers.submit(train, run, "experiment=compare_dit_2", f"seed={seed}", data) for seed, run in teachers.items()
    ]
    for job in jobs:
        job.result()
    runs: dict[Path, dict[str, str | int]] = {}
    jobs = []
    for steps in LENGTHS:
        for seed, teacher in teachers.items():
            for name, words in variants(steps, teacher).items():
                run = out / f"{name}_{steps}_seed_{seed}"
                runs[run] = {"variant": name, "steps": steps, "seed": seed}
                jobs.append(
                    workers.submit(train, run, *ALIKE, *words, f"trainer.max_steps={steps}", f"seed={seed}", data)
                )
    for job in jobs:
        job.result()
    torch.set_num_threads(arguments.parallel)
    real = real_digits(out / "digits8", 8)
    rows = [
        {"variant": "teacher", "steps": 2000, "seed": seed, **each}
        for seed, run in teachers.items()
        for each in measure(run, real)
    ]
    teacher = load_model(teachers[0]).network
    assert isinstance(teacher, DiT)
    for run, about in runs.items():
        steps = int(about["steps"])
        matched = steps if about["variant"] == "upcycled" else 0
        cost = training_tflops(load_model(run), 64, teacher, matched)
        rows += [{**about, **each, "tflops": cost} for each in measure(run, real)]
    (out / "measured.json").write_text(json.dumps(rows, indent=1) + "\n")
    draw(rows, out / "upcycling.png")
    print(f"{len(rows)} measurements: {out}")


if __name__ == "__main__":
    main()
