"""Compare flow matching with DDPM on handwritten digits: ``python scripts/compare_processes.py`` (docs/digits.md).

The script trains the network of ``experiment=digits`` by either process for the same number of steps, three seeds each.
It measures FID and how many digits are read as the requested class, FID over the number of network evaluations for
every sampler, and the share of positions that the router keeps over the share of noise. If it is interrupted, the same
command goes on. About an hour on two cores.
"""

import argparse
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from digit_trials import ROOT, Trained, real_digits, train, write_digits

from dcdit.data.builtin import Digits
from dcdit.diffusion.samplers import Sampler
from dcdit.diffusion.schedule import Posterior
from dcdit.diffusion.settings import DDIM, DDPM, DPMSolver, Euler, EulerMaruyama, GuidanceSettings, Heun
from dcdit.evaluation.statistics import Statistics
from dcdit.sampling.cost import SamplingCost

SEEDS, SIDE, IMAGES, GUIDED = (0, 1, 2), 12, 1000, 2.0
MANY, FEW = (5, 10, 15, 25, 50), (25, 50, 100)
"""Numbers of network evaluations: of samplers for few steps, and of those that add noise."""


@dataclass(frozen=True)
class Candidate:
    """A sampler: its process, its settings for a number of network evaluations, and the numbers that are measured."""

    process: str
    settings: Callable[[int], Any]
    evaluations: tuple[int, ...]


SAMPLERS = {
    "ddpm": Candidate("ddpm", lambda count: DDPM(count, clip=True), FEW),
    "ddim": Candidate("ddpm", lambda count: DDIM(count, clip=True), MANY),
    "dpm++": Candidate("ddpm", lambda count: DPMSolver(count, clip=True), MANY),
    "euler": Candidate("flow", lambda count: Euler(count, clip=True), MANY),
    "heun": Candidate("flow", lambda count: Heun((count + 1) // 2, clip=True), MANY),
    "sde": Candidate("flow", lambda count: EulerMaruyama(count, clip=True), FEW),
}
USUAL = {"ddpm": "dpm++", "flow": "heun"}
"""The sampler by which the processes are compared, at ``COMPARED`` evaluations, and ``SMOOTH`` for the kept share."""
COMPARED, SMOOTH = 25, {"ddpm": "ddim", "flow": "euler"}
STYLES = {"ddpm": ("--", "DDPM"), "flow": ("-", "flow matching")}
COLOURS = {
    "ddpm": "#E69F00", "ddim": "#D55E00", "dpm++": "#CC79A7", "euler": "#56B4E9", "heun": "#0072B2", "sde": "#009E73",
}  # fmt: skip


def noise_share(process: str, timesteps: list[float]) -> list[float]:
    """The share of noise in the variance of x_t, at each timestep."""
    if process == "flow":
        times = [timestep / 1000 for timestep in timesteps]
        return [t**2 / (t**2 + (1 - t) ** 2) for t in times]
    deviation = Posterior.linear().sqrt_one_minus_alpha_bar
    return [float(deviation[round(timestep)] ** 2) for timestep in timesteps]


def measure(run: Path, process: str, real: Statistics) -> dict[str, Any]:
    """All figures of one run; each is written to the run's directory as soon as it is known."""
    path = run / "compared.json"
    measured: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    trained = None
    for name, candidate in SAMPLERS.items():
        for evaluations in candidate.evaluations if candidate.process == process else ():
            guided = (1.0, GUIDED) if (name, evaluations) == (USUAL[process], COMPARED) else (1.0,)
            for scale in guided:
                key = f"{name} {evaluations} {scale:g}"
                if key in measured:
                    continue
                trained = trained or Trained(run)
                sampler = Sampler(candidate.settings(evaluations))
                figures = trained.figures(real, sampler, GuidanceSettings(scale=scale), IMAGES)
                measured[key] = {"fid": figures.fid, "read": figures.read, "evaluations": len(sampler.timesteps)}
                if name == SMOOTH[process] and evaluations == MANY[-1]:
                    cost = SamplingCost.total(map(SamplingCost.of, figures.batches))
                    shares, _ = cost.keep_ratios(trained.model.latents.positions)
                    measured["kept"] = [noise_share(process, sampler.timesteps), shares]
                path.write_text(json.dumps(measured, indent=1) + "\n")
                print(f"{run.name}: {key}: FID {figures.fid:.2f}, {figures.read:.1%} read", flush=True)
    return measured


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def draw(runs: dict[str, list[dict[str, Any]]], out: Path) -> None:
    """Draw FID over evaluations, and the kept share over the share of noise; ``runs`` has the figures by process."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for name, candidate in SAMPLERS.items():
        groups = [[run[f"{name} {count} 1"] for run in runs[candidate.process]] for count in candidate.evaluations]
        costs = [group[0]["evaluations"] for group in groups]
        values = [[figures["fid"] for figures in group] for group in groups]
        style, title = STYLES[candidate.process]
        left.plot(costs, list(map(_mean, values)), style, color=COLOURS[name], marker="o", label=f"{title}: {name}")
        left.fill_between(costs, list(map(min, values)), list(map(max, values)), color=COLOURS[name], alpha=0.15)
    left.set(xscale="log", yscale="log", xlabel="network evaluations", ylabel="FID (digits features, 1,000 images)")
    left.xaxis.set_major_formatter("{x:g}")
    left.yaxis.set_major_formatter("{x:g}")
    left.yaxis.set_minor_formatter("{x:g}")
    for process, name in SMOOTH.items():
        style, title = STYLES[process]
        for number, run in enumerate(runs[process]):
            right.plot(*run["kept"], style, color=COLOURS[name], alpha=0.8, label=None if number else title)
    right.axhline(0.25, color="black", ls=":", lw=1, label="1/N")
    right.set(xlabel="share of noise in the variance of x_t", ylabel="share of positions kept", xlim=(0, 1))
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(out, dpi=110)


def table(runs: dict[str, list[dict[str, Any]]]) -> str:
    """The two tables of the documentation, in Markdown."""
    lines = ["| process | guidance | read as asked for | FID |", "|---|---|---|---|"]
    for process, name in USUAL.items():
        for scale in (1.0, GUIDED):
            seeds = [run[f"{name} {COMPARED} {scale:g}"] for run in runs[process]]
            read = ", ".join(f"{seed['read']:.1%}" for seed in seeds)
            fids = ", ".join(f"{seed['fid']:.2f}" for seed in seeds)
            lines.append(f"| {process} | {scale:g} | {read} | {fids} |")
    lines += ["", "| sampler | best FID | evaluations for it | for a FID within 10% of it |", "|---|---|---|---|"]
    for name, candidate in SAMPLERS.items():
        mean: dict[int, float] = {}
        for count in candidate.evaluations:
            seeds = [run[f"{name} {count} 1"] for run in runs[candidate.process]]
            mean[seeds[0]["evaluations"]] = _mean([seed["fid"] for seed in seeds])
        best = min(mean, key=lambda cost: mean[cost])
        enough = min(cost for cost, fid in mean.items() if fid <= 1.1 * mean[best])
        lines.append(f"| {name} | {mean[best]:.2f} | {best} | {enough} |")
    return "\n".join(lines)


def main() -> None:
    """Train all runs, measure them, draw the figure and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "processes")
    parser.add_argument("--parallel", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    out, workers = arguments.out.resolve(), ThreadPoolExecutor(arguments.parallel)
    data = write_digits(out / "digits", Digits(grid=SIDE))
    runs = {(process, seed): out / f"{process}_seed_{seed}" for seed in SEEDS for process in USUAL}
    torch.set_num_threads(1)
    real = real_digits(out / "digits", SIDE)

    def train_and_measure(process: str, seed: int) -> dict[str, Any]:
        run = runs[process, seed]
        train(run, "experiment=digits", f"diffusion={process}", f"seed={seed}", data)
        return measure(run, process, real)

    jobs = {key: workers.submit(train_and_measure, *key) for key in runs}
    measured = {process: [jobs[process, seed].result() for seed in SEEDS] for process in USUAL}
    draw(measured, out / "processes.png")
    print(f"\n{table(measured)}\n\n{out / 'processes.png'}")


if __name__ == "__main__":
    main()
