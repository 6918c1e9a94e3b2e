"""Compare DC-DiT N4 with DiT/2 of the same twelve blocks: from scratch at equal training compute, and upcycled from it.

    python scripts/compare_networks.py mnist trainer=gpu     # or digits

For each of three seeds: a DiT/2; a DC-DiT for as many steps as cost the same, without and with path drop; and a DC-DiT
that begins with the DiT's blocks, for half of that. Prints, as soon as a run is measured and as means at the end, in
Markdown: training compute (with the forward passes of the teacher), samples read as the requested class, FID, and FLOPs
per image at several drop fractions. Draws the last three at the end. Further arguments are overrides of all runs; a
trainer among them brings its precision along. If it is interrupted, the same command goes on. Made for a GPU;
``--steps 100`` tries it on a laptop.
"""

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import torch
from digit_trials import (
    ROOT,
    Judge,
    Trained,
    error_bars,
    load_or_measure,
    real_digits,
    spread,
    trained,
    training_tflops,
    write_digits,
)
from hydra import compose, initialize_config_dir

from dcdit.checkpoints.load import load_model
from dcdit.data.builtin import Digits, HandwrittenDigits, Mnist
from dcdit.diffusion.samplers import Sampler
from dcdit.diffusion.settings import GuidanceSettings, Heun
from dcdit.evaluation.statistics import Statistics
from dcdit.network import DiT
from dcdit.runtime.devices import pick_device
from dcdit.settings.compose import register_resolvers
from dcdit.settings.published import CONFIG_DIR

DROPS = (0.0, 0.3, 0.6)
DIT, SCRATCH, PATH_DROP, UPCYCLED = VARIANTS = ("DiT/2", "DC-DiT", "DC-DiT, path drop", "DC-DiT, upcycled")


@dataclass(frozen=True)
class Setup:
    """The images, their side in pixels, and the batch size."""

    source: HandwrittenDigits
    side: int
    batch: int


SETUPS = {"digits": Setup(Digits(grid=12), 12, 64), "mnist": Setup(Mnist(), 28, 32)}
STEPS = 2000
"""Of DiT/2, unless others are asked for."""


class Planned(NamedTuple):
    """A run to train: its directory and its overrides."""

    run: Path
    overrides: list[str]


Plan = dict[tuple[str, int], Planned]
"""The run of each variant and seed."""


def run_of(out: Path, variant: str, seed: int) -> Path:
    """The directory of a run in ``out``."""
    return out / f"{variant}_{seed}".translate(_NAME)


def plan(data: str, out: Path, steps: int, seeds: int, own: Sequence[str]) -> Plan:
    """Write the images of a setup to ``out``/data, and plan the runs that this script trains on them.

    Args:
        data: a key of ``SETUPS``.
        out: holds images and runs.
        steps: of DiT/2.
        seeds: how many.
        own: overrides of all runs.
    """
    setup = SETUPS[data]
    shared = [f"experiment={data}", write_digits(out / "data", setup.source), f"data.batch_size={setup.batch}"]
    shared += [f"model.grid={setup.side}", "trainer.val_check_interval=100000", *precision_of(own)]

    def planned(variant: str, seed: int) -> Planned:
        special = overrides_of(variant, steps, run_of(out, DIT, seed))
        return Planned(run_of(out, variant, seed), [*shared, *special, f"seed={seed}", *own])

    return {(variant, seed): planned(variant, seed) for variant in VARIANTS for seed in range(seeds)}


def overrides_of(variant: str, steps: int, teacher: Path) -> list[str]:
    """The overrides that train a variant for the compute of ``steps`` of DiT/2."""
    if variant == DIT:
        plain = ["model=dit_digits_2_deep", "multi_budget=none", "multi_budget.full_budget_steps=0"]
        return [*plain, f"trainer.max_steps={steps}"]
    matched = ["model=dcdit_digits_deep", "match_compute.baseline=dit_digits_2_deep"]
    if variant in (SCRATCH, PATH_DROP):
        path_drop = [] if variant == SCRATCH else ["multi_budget.path_drop=0.1"]
        return [*matched, f"match_compute.steps={steps}", f"multi_budget.full_budget_steps={steps // 8}", *path_drop]
    distilled = distil_steps(steps)
    upcycle = ["init=upcycle", f"init.teacher={teacher}", f"init.distil_steps={distilled}"]
    return [*matched, f"match_compute.steps={steps // 2}", *upcycle, f"multi_budget.full_budget_steps={distilled}"]


def distil_steps(steps: int) -> int:
    """The steps in which an upcycled network is matched with its teacher: about half of its own."""
    return steps // 6


def precision_of(overrides: Sequence[str]) -> list[str]:
    """The override that brings back the precision of a trainer among ``overrides``, which an experiment replaces."""
    chosen = [override for override in overrides if override.startswith("trainer=")]
    if not chosen or any(override.startswith("trainer.precision=") for override in overrides):
        return []
    register_resolvers()
    with initialize_config_dir(CONFIG_DIR, version_base="1.3"):
        return [f"trainer.precision={compose('train', overrides=chosen).trainer.precision}"]


def measure(run: Path, real: Statistics, judge: Judge, device: torch.device, images: int) -> list[dict[str, float]]:
    """The figures of one run at each drop fraction."""
    network, sampler = Trained(run, device), Sampler(Heun(steps=15, clip=True))
    rows = []
    for drop in DROPS if network.model.network.routes else (0.0,):
        figures = network.figures(real, sampler, GuidanceSettings(drop_fraction=drop), images)
        latents = torch.cat([batch.latents for batch in figures.batches])
        flops = torch.cat([batch.flops for batch in figures.batches]).mean().item()
        read = judge.share(latents, torch.arange(images) % 10)
        rows.append({"drop": drop, "fid": figures.fid, "read": read, "gflops": flops / 1e9})
    return rows


def cost(run: Path, teacher: Path, batch: int, matched: int) -> float:
    """The TFLOPs of training a run that was matched with its teacher for so many steps."""
    network = load_model(teacher).network
    assert isinstance(network, DiT)
    return training_tflops(load_model(run), batch, network, matched)


HEAD = """| network | training TFLOPs | ρ | read as asked for | FID | GFLOPs per image |
|---|---|---|---|---|---|"""


def row_of(figures: dict[str, Any]) -> str:
    """One run at one drop fraction, as a row of a table."""
    return (
        f"| {figures['variant']}, seed {figures['seed']} | {figures['tflops']:.3g} | {figures['drop']:g}"
        f" | {figures['read']:.1%} | {figures['fid']:.2f} | {figures['gflops']:.3f} |"
    )


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A table in Markdown: means over the seeds, with the least and the greatest value in brackets."""
    lines = [HEAD]
    for variant in VARIANTS:
        for drop in DROPS:
            chosen = [row for row in rows if (row["variant"], row["drop"]) == (variant, drop)]
            if chosen:
                columns = {key: [row[key] for row in chosen] for key in ("tflops", "read", "fid", "gflops")}
                lines.append(
                    f"| {variant} | {columns['tflops'][0]:.3g} | {drop:g} | {spread(columns['read'], '.1%')}"
                    f" | {spread(columns['fid'], '.2f')} | {sum(columns['gflops']) / len(chosen):.3f} |"
                )
    return "\n".join(lines)


def draw(rows: Sequence[dict[str, Any]], out: Path) -> None:
    """Draw FID and the share read as asked for over GFLOPs per image: a line for each network over its drop fractions,
    with the range of the seeds."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for variant in VARIANTS:
        chosen = [row for row in rows if row["variant"] == variant]
        points = [[row for row in chosen if row["drop"] == drop] for drop in sorted({row["drop"] for row in chosen})]
        for axis, key in zip(axes, ("fid", "read"), strict=True) if points else ():
            seeds = [[row[key] for row in point] for point in points]
            gflops = [mean(row["gflops"] for row in point) for point in points]
            label = f"{variant}, {chosen[0]['tflops']:.3g} TFLOPs of training"
            axis.errorbar(
                gflops,
                list(map(mean, seeds)),
                error_bars(seeds),
                fmt="o-",
                capsize=2,
                label=label,
                zorder=2 + (variant == DIT),
            )
    for axis, label in zip(axes, ("FID (digits features)", "read as asked for"), strict=True):
        axis.set(xlabel="GFLOPs per image", ylabel=label, xlim=(0, None))
        axis.grid(alpha=0.3)
    axes[0].set_ylim(0, None)
    axes[1].yaxis.set_major_formatter("{x:.1%}")
    axes[0].legend(fontsize="small")
    figure.savefig(out, dpi=110)


def main() -> None:
    """Train all runs, measure them, print the table, and draw it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", choices=SETUPS)
    parser.add_argument("overrides", nargs="*", help="of all runs, such as trainer=gpu")
    parser.add_argument("--steps", type=int, default=STEPS, help="of DiT/2")
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--images", type=int, default=500, help="that are sampled of each run")
    parser.add_argument("--out", type=Path, help="runs/networks_<data> if left out")
    parser.add_argument("--parallel", type=int, help="runs side by side; a run for each core, up to one a seed")
    options = parser.parse_intermixed_args()  # overrides may stand before and after options
    parallel = options.parallel or min(os.cpu_count() or 1, options.seeds)
    setup, out = SETUPS[options.data], (options.out or ROOT / "runs" / f"networks_{options.data}").resolve()
    runs = plan(options.data, out, options.steps, options.seeds, options.overrides)
    key_of = {planned.run: key for key, planned in runs.items()}
    real, judge, device = real_digits(out / "data", setup.side), Judge(setup.source), pick_device("auto")
    rows: list[dict[str, Any]] = []
    print(HEAD, flush=True)
    for variants in ((DIT,), (SCRATCH, PATH_DROP, UPCYCLED)):  # the plain DiTs are the teachers
        chosen = dict(planned for (variant, _), planned in runs.items() if variant in variants)
        for run in trained(chosen, parallel):
            variant, seed = key_of[run]
            matched = distil_steps(options.steps) if variant == UPCYCLED else 0
            about = {"variant": variant, "seed": seed, "tflops": cost(run, runs[DIT, seed].run, setup.batch, matched)}
            measured = load_or_measure(
                run / "measured.json", partial(measure, run, real, judge, device, options.images)
            )
            rows += [{**about, **figures} for figures in measured]
            print("\n".join(map(row_of, rows[-len(measured) :])), flush=True)
            (out / "measured.json").write_text(json.dumps(rows, indent=1) + "\n")
    draw(rows, out / "networks.png")
    print(f"\n{table(rows)}\n\nThe judge reads {judge.on_unseen:.1%} of unseen real digits.\n\n{out / 'networks.png'}")


_NAME = str.maketrans({"/": "", ",": "", " ": "_", "-": ""})

if __name__ == "__main__":
    main()
