"""Upcycle a plain DiT into a DC-DiT on handwritten digits: ``python scripts/upcycle_digits.py`` (docs/upcycling.md).

The script trains a teacher for each seed, then DC-DiTs of several lengths: from scratch, with the teacher's blocks
copied, and upcycled (matched all along, dropping from the middle on). It measures FID and how many digits are read as
the requested class, at several drop fractions, and draws both over training compute with the teacher's forward passes.
If it is interrupted, the same command goes on. An hour and a half on two cores.
"""

import argparse
import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from digit_trials import ROOT, Trained, load_or_measure, real_digits, train_all, training_tflops, write_digits

from dcdit.checkpoints.load import load_model
from dcdit.data.builtin import Digits
from dcdit.diffusion.samplers import Sampler
from dcdit.diffusion.settings import DDIM, GuidanceSettings
from dcdit.evaluation.statistics import Statistics
from dcdit.network import DiT

SEEDS, LENGTHS, DROPS = (0, 1, 2), (300, 600, 1200, 2400), (0.0, 0.3, 0.6)
COPIED = (600, 1200)
"""Lengths at which the blocks are also copied without being matched."""
IMAGES = 500
ALIKE = ("experiment=compare_dcdit", "match_compute.baseline=null")


def variants(steps: int, teacher: Path) -> dict[str, list[str]]:
    """The variants of a run of so many steps, and their overrides."""
    upcycle = ["init=upcycle", f"init.teacher={teacher}", f"multi_budget.full_budget_steps={steps // 2}"]
    overrides = {"scratch": [], "upcycled": [*upcycle, f"init.distil_steps={steps}"]}
    return overrides | ({"copied": [*upcycle, "init.distil_steps=0"]} if steps in COPIED else {})


def measure(run: Path, real: Statistics) -> list[dict[str, float]]:
    """FID and the share of digits read right at each drop fraction."""
    trained, sampler = Trained(run), Sampler(DDIM(steps=25, clip=True))
    rows = []
    for drop in DROPS if trained.model.network.routes else (0.0,):
        figures = trained.figures(real, sampler, GuidanceSettings(drop_fraction=drop), IMAGES)
        rows.append({"drop": drop, "fid": figures.fid, "read": figures.read, "kept": figures.kept})
    print(f"{run.name}: " + ", ".join(f"{row['read']:.0%} / {row['fid']:.1f}" for row in rows), flush=True)
    return rows


def draw(rows: list[dict[str, Any]], out: Path) -> None:
    """FID and digits read right over training compute, at each drop fraction."""
    figure, axes = plt.subplots(2, len(DROPS), figsize=(11, 6), sharex=True, sharey="row", layout="constrained")
    colours = {"scratch": "#666666", "copied": "#E69F00", "upcycled": "#0072B2"}
    for column, drop in enumerate(DROPS):
        for row, (key, label) in enumerate((("fid", "FID"), ("read", "digits read as asked for"))):
            for name, colour in colours.items():
                chosen = [run for run in rows if run["variant"] == name and run["drop"] == drop]
                lengths = sorted({run["steps"] for run in chosen})
                groups = [[run for run in chosen if run["steps"] == steps] for steps in lengths]
                costs = [group[0]["tflops"] for group in groups]
                values = [[run[key] for run in group] for group in groups]
                means = [sum(seeds) / len(seeds) for seeds in values]
                axes[row, column].plot(costs, means, "o-", color=colour, label=name)
                low, high = list(map(min, values)), list(map(max, values))
                axes[row, column].fill_between(costs, low, high, color=colour, alpha=0.15)
            axes[row, column].set_xscale("log")
            axes[row, column].grid(alpha=0.3)
            if column == 0:
                axes[row, column].set_ylabel(label)
        axes[0, column].set_title(f"drop fraction {drop:g}")
        axes[0, column].set_yscale("log")
        axes[1, column].set_xlabel("training TFLOPs")
    teachers = [run for run in rows if run["variant"] == "teacher"]
    for row, key in enumerate(("fid", "read")):
        mean = sum(run[key] for run in teachers) / len(teachers)
        for panel in axes[row]:
            panel.axhline(mean, color="black", ls=":", label="its teacher")
    for panel in axes.flat:
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter("{x:g}")
    axes[0, 0].legend()
    figure.savefig(out, dpi=130)


def main() -> None:
    """Train all runs, measure them, and draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "upcycling")
    parser.add_argument("--parallel", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    data = write_digits(out / "digits8", Digits(grid=8))
    teachers = {seed: out / f"teacher_seed_{seed}" for seed in SEEDS}
    train_all(
        {run: ("experiment=compare_dit_2", f"seed={seed}", data) for seed, run in teachers.items()}, arguments.parallel
    )
    runs: dict[Path, dict[str, str | int]] = {}
    overrides: dict[Path, tuple[str, ...]] = {}
    for steps in LENGTHS:
        for seed, teacher in teachers.items():
            for name, own in variants(steps, teacher).items():
                run = out / f"{name}_{steps}_seed_{seed}"
                runs[run] = {"variant": name, "steps": steps, "seed": seed}
                overrides[run] = (*ALIKE, *own, f"trainer.max_steps={steps}", f"seed={seed}", data)
    train_all(overrides, arguments.parallel)
    torch.set_num_threads(arguments.parallel)
    real = real_digits(out / "digits8", 8)

    def measured(run: Path) -> list[dict[str, float]]:
        return load_or_measure(run / "measured.json", partial(measure, run, real))

    rows = [
        {"variant": "teacher", "steps": 2000, "seed": seed, **figures}
        for seed, run in teachers.items()
        for figures in measured(run)
    ]
    teacher = load_model(teachers[0]).network
    assert isinstance(teacher, DiT)
    for run, about in runs.items():
        matched = int(about["steps"]) if about["variant"] == "upcycled" else 0
        cost = training_tflops(load_model(run), 64, teacher, matched)
        rows += [{**about, **figures, "tflops": cost} for figures in measured(run)]
    (out / "measured.json").write_text(json.dumps(rows, indent=1) + "\n")
    draw(rows, out / "upcycling.png")
    print(f"{len(rows)} measurements: {out}")


if __name__ == "__main__":
    main()
