"""DC-DiT N4 beside DiT/2 with the same twelve blocks, from scratch at equal training compute, and upcycled from it.

    python scripts/compare_networks.py mnist trainer=gpu     # or digits

For each of three seeds: a DiT/2, a DC-DiT for as many steps as cost the same, and a DC-DiT that begins with the DiT's
blocks, for half of that. Prints a table in Markdown: training compute (with the forward passes of the teacher), samples
read as the class asked for, FID, and FLOPs per image at several drop fractions. Other words are overrides of all runs.
Broken off, it goes on. Made for a GPU; ``--steps 100`` shows on a laptop that it runs.
"""

import argparse
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from digit_trials import ROOT, Judge, Trained, real_digits, train, training_tflops, write_digits

from dcdit.checkpoints.load import load_model
from dcdit.data.builtin import Digits, HandwrittenDigits, Mnist
from dcdit.diffusion.samplers import Sampler
from dcdit.diffusion.settings import GuidanceSettings, Heun
from dcdit.evaluation.statistics import Statistics
from dcdit.network import DiT
from dcdit.runtime.devices import pick_device

SEEDS, DROPS, IMAGES = (0, 1, 2), (0.0, 0.3, 0.6), 500
DIT, SCRATCH, UPCYCLED = VARIANTS = ("DiT/2", "DC-DiT", "DC-DiT, upcycled")


@dataclass(frozen=True)
class Setup:
    """Images, and how many a training step sees."""

    source: HandwrittenDigits
    side: int
    batch: int


SETUPS = {"digits": Setup(Digits(grid=12), 12, 64), "mnist": Setup(Mnist(), 28, 32)}


def words_of(variant: str, steps: int, teacher: Path) -> list[str]:
    """One way to train for what ``steps`` of DiT/2 cost, as overrides."""
    if variant == DIT:
        plain = ["model=dit_digits_2_deep", "multi_budget=none", "multi_budget.full_budget_steps=0"]
        return [*plain, f"trainer.max_steps={steps}"]
    matched = ["model=dcdit_digits_deep", "match_compute.baseline=dit_digits_2_deep"]
    if variant == SCRATCH:
        return [*matched, f"match_compute.steps={steps}", f"multi_budget.full_budget_steps={steps // 8}"]
    first = distil_steps(steps)
    upcycle = ["init=upcycle", f"init.teacher={teacher}", f"init.distil_steps={first}"]
    return [*matched, f"match_compute.steps={steps // 2}", *upcycle, f"multi_budget.full_budget_steps={first}"]


def distil_steps(steps: int) -> int:
    """In how many steps an upcycled network is matched with its teacher: about half of its own."""
    return steps // 6


def measure(run: Path, real: Statistics, judge: Judge, device: torch.device) -> list[dict[str, float]]:
    """Figures of one run at each drop fraction; kept in the run."""
    kept = run / "measured.json"
    if kept.is_file():
        return json.loads(kept.read_text())
    trained, sampler = Trained(run, device), Sampler(Heun(steps=15, clip=True))
    found = []
    for drop in DROPS if trained.model.network.routes else (0.0,):
        figures = trained.figures(real, sampler, GuidanceSettings(drop_fraction=drop), IMAGES)
        latents = torch.cat([batch.latents for batch in figures.batches])
        flops = torch.cat([batch.flops for batch in figures.batches]).mean().item()
        read = judge.share(latents, torch.arange(IMAGES) % 10)
        found.append({"drop": drop, "fid": figures.fid, "read": read, "gflops": flops / 1e9})
    kept.write_text(json.dumps(found, indent=1) + "\n")
    return found


def cost(run: Path, teacher: Path, batch: int, matched: int) -> float:
    """TFLOPs of training it."""
    other = load_model(teacher).network
    assert isinstance(other, DiT)
    return training_tflops(load_model(run), batch, other, matched)


def _range(values: Sequence[float], form: str) -> str:
    return f"{sum(values) / len(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Means over the seeds, least and greatest in brackets, in Markdown."""
    lines = [
        "| network | training TFLOPs | ρ | read as asked for | FID | GFLOPs per image |",
        "|---|---|---|---|---|---|",
    ]
    for variant in VARIANTS:
        for drop in DROPS:
            some = [row for row in rows if (row["variant"], row["drop"]) == (variant, drop)]
            if some:
                columns = {key: [row[key] for row in some] for key in ("tflops", "read", "fid", "gflops")}
                lines.append(
                    f"| {variant} | {columns['tflops'][0]:.3g} | {drop:g} | {_range(columns['read'], '.1%')}"
                    f" | {_range(columns['fid'], '.2f')} | {sum(columns['gflops']) / len(some):.3f} |"
                )
    return "\n".join(lines)


def main() -> None:
    """Train, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", choices=SETUPS)
    parser.add_argument("overrides", nargs="*", help="of all runs, such as trainer=gpu")
    parser.add_argument("--steps", type=int, default=2000, help="of DiT/2")
    parser.add_argument("--out", type=Path, help="runs/networks_<data> if left out")
    parser.add_argument("--parallel", type=int, default=min(os.cpu_count() or 1, len(SEEDS)), help="runs side by side")
    options = parser.parse_args()
    setup, out = SETUPS[options.data], (options.out or ROOT / "runs" / f"networks_{options.data}").resolve()
    data = write_digits(out / "data", setup.source)
    shared = [f"experiment={options.data}", data, f"data.batch_size={setup.batch}", f"model.grid={setup.side}"]
    runs = {(variant, seed): out / f"{variant}_{seed}".translate(_NAME) for variant in VARIANTS for seed in SEEDS}
    with ThreadPoolExecutor(options.parallel) as workers:
        for variants in ((DIT,), (SCRATCH, UPCYCLED)):  # the first are the teachers of the last
            jobs = []
            for variant in variants:
                for seed in SEEDS:
                    words = words_of(variant, options.steps, runs[DIT, seed])
                    some = (*shared, *words, f"seed={seed}", "trainer.val_check_interval=100000", *options.overrides)
                    jobs.append(workers.submit(train, runs[variant, seed], *some))
            for job in jobs:
                job.result()
    real, judge, device = real_digits(out / "data", setup.side), Judge(setup.source), pick_device("auto")
    rows = []
    for (variant, seed), run in runs.items():
        matched = distil_steps(options.steps) if variant == UPCYCLED else 0
        about = {"variant": variant, "seed": seed, "tflops": cost(run, runs[DIT, seed], setup.batch, matched)}
        rows += [{**about, **each} for each in measure(run, real, judge, device)]
    (out / "measured.json").write_text(json.dumps(rows, indent=1) + "\n")
    print(f"{table(rows)}\n\nThe judge reads {judge.on_unseen:.1%} of unseen real digits.")


_NAME = str.maketrans({"/": "", ",": "", " ": "_", "-": ""})

if __name__ == "__main__":
    main()
