"""Compare today's recipe with the published one on handwritten digits, each choice alone and all together.

    python scripts/compare_recipes.py

For each of three seeds, the script trains ``experiment=digits`` (flow matching, 12 x 12 pixels) as it stands, with one
choice changed, and with all of them (``experiment=digits_modern``), for equal steps. Recipes whose steps cost more,
because an encoder runs in training, are trained for equal compute as well. The encoder is small, and the script trains
it on the same digits first. It samples each run without guidance, measures FID and how many digits are read as the
requested class, prints a table in Markdown, and draws both. If it is interrupted, the same command goes on. The
first two of 48 runs took eight minutes on two cores; ``--steps 100 --seeds 1 --images 100`` tries it in minutes.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
from digit_trials import ROOT, Trained, load_or_measure, real_digits, spread, trained, write_digits

from dcdit.checkpoints.load import load_model
from dcdit.data.builtin import Digits
from dcdit.diffusion.samplers import Sampler
from dcdit.diffusion.settings import GuidanceSettings, Heun
from dcdit.evaluation.statistics import Statistics

PUBLISHED, ALL = "as published", "all together"
ENCODED = ("REPA", "iREPA", ALL)
"""Recipes that run an encoder in training."""


class Trial(NamedTuple):
    """A recipe, trained for equal compute or for equal steps, with one seed."""

    recipe: str
    equal_compute: bool
    seed: int

    @property
    def title(self) -> str:
        """The recipe, and what is equal, for people."""
        return self.recipe + (", equal compute" if self.equal_compute else "")


class Measured(NamedTuple):
    """What a run reached: FID, the share of digits read as the requested class, positions kept, steps."""

    fid: float
    read: float
    kept: float
    steps: int


def recipes(encoder: Path) -> dict[str, list[str]]:
    """The overrides of each recipe; ``encoder`` holds the weights of the encoder that alignment takes."""
    taught = ["alignment.encoder=test_vit", f"alignment.weights={encoder}", "alignment.grid=6"]
    return {
        PUBLISHED: ["experiment=digits"],
        "RMSNorm": ["experiment=digits", "model.norm=rms"],
        "SwiGLU": ["experiment=digits", "model.mlp=swiglu"],
        "rotary positions": ["experiment=digits", "model.position=rope"],
        "QK-norm": ["experiment=digits", "model.qk_norm=true"],
        "AdamW, β₂ = 0.95": ["experiment=digits", "optimizer.betas=[0.9,0.95]"],
        "Muon": ["experiment=digits", "optimizer=muon"],
        "logit-normal times": ["experiment=digits", "diffusion.time=logit_normal"],
        "velocity cosine loss": ["experiment=digits", "diffusion.velocity_cosine=1"],
        "x-prediction": ["experiment=digits", "diffusion.prediction=x"],
        # A projector as wide as that of B would cost four times the network.
        "REPA": ["experiment=digits", "alignment=repa", "alignment.width=256", *taught],
        "iREPA": ["experiment=digits", "alignment=irepa", *taught],
        "dispersive loss": ["experiment=digits", "alignment=dispersive"],
        ALL: ["experiment=digits_modern", *taught],
    }


def train_encoder(path: Path) -> None:
    """Train the encoder of digits, unless it is there."""
    if not path.is_file():
        subprocess.run([sys.executable, ROOT / "scripts" / "train_digits_encoder.py", path], check=True)


def measure(run: Path, real: Statistics, images: int) -> list[dict[str, float]]:
    """The figures of one run, without guidance."""
    network = Trained(run)
    figures = network.figures(real, Sampler(Heun(steps=15, clip=True)), GuidanceSettings(), images)
    return [{"fid": figures.fid, "read": figures.read, "kept": figures.kept}]


def table(measured: dict[Trial, Measured]) -> str:
    """A table in Markdown: means over the seeds, with the least and the greatest value in brackets."""
    lines = ["| recipe | steps | FID | read as asked for | positions kept |", "|---|---|---|---|---|"]
    for title, rows in by_title(measured).items():
        kept = sum(row.kept for row in rows) / len(rows)
        fid, read = spread([row.fid for row in rows], ".2f"), spread([row.read for row in rows], ".1%")
        lines.append(f"| {title} | {rows[0].steps} | {fid} | {read} | {kept:.1%} |")
    return "\n".join(lines)


def by_title(measured: dict[Trial, Measured]) -> dict[str, list[Measured]]:
    """The figures of all seeds, recipe by recipe."""
    titles = dict.fromkeys(trial.title for trial in measured)
    return {title: [row for trial, row in measured.items() if trial.title == title] for title in titles}


def draw(measured: dict[Trial, Measured], out: Path) -> None:
    """Draw FID and digits read right: a point for each seed, a bar at their mean, lines at the published recipe."""
    rows = by_title(measured)
    figure, axes = plt.subplots(1, 2, figsize=(11, 0.36 * len(rows) + 1.2), sharey=True, layout="constrained")
    for axis, key, label in zip(axes, ("fid", "read"), ("FID", "digits read as asked for"), strict=True):
        for height, (title, figures) in enumerate(rows.items()):
            values = [getattr(row, key) for row in figures]
            colour = "black" if title == PUBLISHED else "#0072B2"
            axis.plot(values, [height] * len(values), "o", color=colour, alpha=0.6)
            axis.plot([sum(values) / len(values)], [height], "|", color=colour, markersize=16, markeredgewidth=2)
        published = [getattr(row, key) for row in rows[PUBLISHED]]
        axis.axvspan(min(published), max(published), color="black", alpha=0.08)
        axis.set_xlabel(label)
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(rows)), list(rows))
    axes[0].invert_yaxis()
    axes[1].xaxis.set_major_formatter("{x:.0%}")
    figure.savefig(out, dpi=130)


def main() -> None:
    """Train all runs, measure them as they finish, print the table, and draw it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "recipes")
    parser.add_argument("--steps", type=int, default=1000, help="of the published recipe")
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--images", type=int, default=500, help="that are sampled of each run")
    parser.add_argument("--parallel", type=int, default=os.cpu_count() or 1, help="runs side by side, one core each")
    options = parser.parse_args()
    out = options.out.resolve()
    data = write_digits(out / "digits12", Digits(grid=12))
    train_encoder(out / "encoder.safetensors")
    trials: dict[Path, Trial] = {}
    overrides: dict[Path, Sequence[str]] = {}
    for seed in range(options.seeds):  # one seed of all recipes first
        for recipe, own in recipes(out / "encoder.safetensors").items():
            for equal_compute in (False, True) if recipe in ENCODED else (False,):
                trial = Trial(recipe, equal_compute, seed)
                run = out / "{}_{}".format("".join(filter(str.isalnum, trial.title)), seed)
                length = [f"trainer.max_steps={options.steps}"]
                if equal_compute:
                    length = ["match_compute.baseline=dcdit_digits", f"match_compute.steps={options.steps}"]
                trials[run] = trial
                length.append(f"multi_budget.full_budget_steps={options.steps // 5}")
                overrides[run] = [*own, data, *length, f"seed={seed}", "trainer.val_check_interval=100000"]
    real = real_digits(out / "digits12", 12)
    measured: dict[Trial, Measured] = {}
    for run in trained(overrides, options.parallel):
        figures = load_or_measure(run / "measured.json", partial(measure, run, real, options.images))[0]
        measured[trials[run]] = Measured(**figures, steps=load_model(run).step or 0)
        print(f"{run.name}: FID {figures['fid']:.2f}, {figures['read']:.1%} read as asked for", flush=True)
    measured = {trial: measured[trial] for trial in sorted(measured, key=list(trials.values()).index)}
    plain = [{**trial._asdict(), **row._asdict()} for trial, row in measured.items()]
    (out / "measured.json").write_text(json.dumps(plain, indent=1) + "\n")
    draw(measured, out / "recipes.png")
    print(f"\n{table(measured)}\n\n{out / 'recipes.png'}")


if __name__ == "__main__":
    main()
