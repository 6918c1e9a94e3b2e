"""What quality costs: FID against FLOPs and time, by dropping tokens, reusing features, both, or taking fewer steps.

    python benchmarks/sampling.py runs/processes/flow_seed_0 runs/processes/flow_seed_1 runs/processes/flow_seed_2

For networks trained on handwritten digits. Each setting samples the same numbers with each network; time is that of
sampling alone, per image, of one run with each network. Writes ``sampling.json`` and ``sampling.png`` to ``--out`` and
prints the Pareto fronts over FLOPs and over time.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

sys.path.append(str(Path(__file__).parents[1] / "scripts"))
from digit_trials import Trained, real_digits, write_digits

from dcdit.data.builtin import Digits
from dcdit.diffusion.samplers import Sampler
from dcdit.diffusion.settings import DDIM, DPMSolver, Euler, GuidanceSettings, Heun
from dcdit.runtime.devices import pick_device

FAMILIES: dict[str, dict[str, tuple[Callable[..., Any], tuple[int, ...]]]] = {
    "flow": {"euler": (Euler, (50, 25, 15, 10, 5)), "heun": (Heun, (13, 8, 5, 3))},
    "ddpm": {"ddim": (DDIM, (50, 25, 15, 10)), "dpm++": (DPMSolver, (25, 15, 10, 5))},
}
"""For each process its samplers and their steps; tokens are dropped and features reused at the first."""

DROPS = (0.2, 0.4, 0.6, 0.8)
THRESHOLDS = (0.1, 0.2, 0.4, 0.8, 1.6)
BOTH = ((0.2, 0.2), (0.2, 0.8), (0.4, 0.4), (0.4, 0.8), (0.6, 0.8))
BASES = (50, 25, 10)
"""Steps of the first sampler for that."""


@dataclass(frozen=True)
class Setting:
    """A point to measure: how, with which sampler and steps, at which drop fraction and threshold."""

    way: str
    sampler: str
    steps: int
    drop: float = 0.0
    cache: float = 0.0

    @property
    def words(self) -> str:
        """For people."""
        parts = [f"{self.sampler} {self.steps}"]
        parts += [f"ρ {self.drop:g}"] if self.drop else []
        return ", ".join(parts + ([f"cache {self.cache:g}"] if self.cache else []))


def settings_of(process: str) -> list[Setting]:
    """All points."""
    family = FAMILIES[process]
    found = [Setting("fewer steps", name, steps) for name, (_, numbers) in family.items() for steps in numbers]
    first = next(iter(family))
    for steps in BASES:
        found += [Setting("ρ", first, steps, drop) for drop in DROPS]
        found += [Setting("caching", first, steps, 0.0, cache) for cache in THRESHOLDS]
        found += [Setting("both", first, steps, *values) for values in BOTH]
    return found


def front(rows: Sequence[dict[str, Any]], cost: str) -> list[dict[str, Any]]:
    """The rows than which none is better at no higher cost."""
    best: list[dict[str, Any]] = []
    for row in sorted(rows, key=lambda row: (row[cost], row["fid"])):
        if not best or row["fid"] < best[-1]["fid"]:
            best.append(row)
    return best


def measure(networks: Sequence[Trained], side: int, count: int, data: Path, few: bool) -> list[dict[str, Any]]:
    """One row for each setting, or for the first ``few``: means over the networks, and the range of FID."""
    process = networks[0].model.process.settings.name
    write_digits(data, Digits(grid=side))
    real = real_digits(data, side)
    settings = settings_of(process)[: 2 if few else None]
    found: dict[Setting, list[tuple[float, float, float]]] = {setting: [] for setting in settings}
    for network in networks:  # a process is slow at first
        first = Sampler(FAMILIES[process][settings[0].sampler][0](steps=5))
        network.figures(real, first, GuidanceSettings(), min(count, 100))
    work = [(network, setting) for network in networks for setting in settings]
    for network, setting in track(work, "measuring", console=Console(stderr=True), transient=True):
        kind = FAMILIES[process][setting.sampler][0]
        sampler = Sampler(kind(steps=setting.steps, clip=True, cache=setting.cache))
        figures = network.figures(real, sampler, GuidanceSettings(drop_fraction=setting.drop), count)
        flops = torch.cat([batch.flops for batch in figures.batches]).mean().item()
        found[setting].append((figures.fid, flops / 1e9, 1000 * figures.seconds / count))
    rows = []
    for setting, values in found.items():
        fids, gflops, ms = zip(*values, strict=True)
        middle = {"fid": sum(fids), "gflops": sum(gflops), "ms": sum(ms)}
        rows.append(
            {**asdict(setting), "words": setting.words, **{key: total / len(values) for key, total in middle.items()}}
            | {"least": min(fids), "greatest": max(fids)}
        )
    return rows


STYLES = {"fewer steps": ("s", "#666666"), "ρ": ("o", "#E69F00"), "caching": ("^", "#0072B2"), "both": ("D", "#009E73")}


def draw(rows: Sequence[dict[str, Any]], out: Path, title: str) -> None:
    """FID over FLOPs and over time, the fronts as lines."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), sharey=True, layout="constrained")
    for axis, cost, label in zip(axes, ("gflops", "ms"), ("GFLOPs per image", "ms per image"), strict=True):
        for way, (marker, colour) in STYLES.items():
            some = [row for row in rows if row["way"] == way]
            if some:
                axis.scatter([r[cost] for r in some], [r["fid"] for r in some], marker=marker, color=colour, label=way)
        best = front(rows, cost)
        axis.plot([row[cost] for row in best], [row["fid"] for row in best], color="black", lw=1, label="front")
        axis.set(xscale="log", yscale="log", xlabel=label)
        for side in (axis.xaxis, axis.yaxis):
            side.set_major_formatter("{x:g}")
            side.set_minor_formatter("{x:g}")
        axis.tick_params(which="minor", labelsize=7)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("FID (digits features)")
    axes[0].legend()
    figure.suptitle(title)
    figure.savefig(out, dpi=110)


def main() -> None:
    """Measure, draw and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="runs of one kind, such as three seeds")
    parser.add_argument("--count", type=int, default=1000, help="images for each point")
    parser.add_argument("--device", default="cpu", help="where they sample")
    parser.add_argument("--precision", choices=["fp32", "bf16"], help="bf16 on a GPU and fp32 on a CPU if left out")
    parser.add_argument("--few", action="store_true", help="two settings alone: whether the command runs")
    parser.add_argument("--out", type=Path, default=Path("runs/sampling"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    device = pick_device(options.device)
    networks = [Trained(run, device, options.precision) for run in options.runs]
    side = networks[0].model.network.grid[0]
    rows = measure(networks, side, options.count, options.out / f"digits{side}", options.few)
    (options.out / "sampling.json").write_text(json.dumps(rows, indent=1) + "\n")
    title = f"{len(networks)} networks, {options.count} images each, {networks[0].precision}"
    draw(rows, options.out / "sampling.png", title)
    base = rows[0]
    fronts = {cost: {row["words"] for row in front(rows, cost)} for cost in ("gflops", "ms")}
    table = Table(title=title, title_justify="left")
    for heading in ("by", "setting", "FID", "least to greatest", "GFLOPs", "of the work", "ms", "of the time", "front"):
        table.add_column(heading, justify="left" if heading in ("by", "setting", "front") else "right")
    for row in rows:
        table.add_row(
            row["way"],
            row["words"],
            f"{row['fid']:.2f}",
            f"{row['least']:.2f} to {row['greatest']:.2f}",
            f"{row['gflops']:.3f}",
            f"{row['gflops'] / base['gflops']:.2f}",
            f"{row['ms']:.1f}",
            f"{row['ms'] / base['ms']:.2f}",
            ", ".join(name for name, words in fronts.items() if row["words"] in words),
        )
    Console(width=None if sys.stdout.isatty() else 140).print(table)


if __name__ == "__main__":
    main()
