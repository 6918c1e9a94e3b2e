"""Measure what each saving of sampling is worth: dropped tokens, reused features, fewer steps, cheaper guidance, gates.

    python scripts/compare_savings.py digits    # or mnist

``digits`` trains ``experiment=digits`` (12 x 12 pixels) as published, with path drop, and with path drop that takes the
class too, for each of three seeds. ``mnist`` takes the DC-DiTs of ``compare_networks.py mnist``, and trains those that
are not there. Both train width gates from the networks with path drop, for half as many steps. The script samples each
run at several guidance scales, the network with path drop with each kind of guiding branch. At the scale that is best
for ordinary guidance, it samples that network with each saving and with several at once, and times them in turns. It
prints two tables in Markdown and draws FID over the cost of an image. Further arguments are overrides of all runs, such
as trainer=gpu. If it is interrupted, the same command goes on.
``--brief`` compares ordinary guidance with ``weak=path`` alone: no gates, no savings, no picture.
``--steps 60 --seeds 1 --images 40`` tries it in minutes.
"""

import argparse
import json
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import torch
from compare_networks import PATH_DROP as DEEP_PATH_DROP
from compare_networks import SCRATCH, SETUPS, STEPS, Plan, Planned, plan, precision_of, run_of
from digit_trials import ROOT, Figures, Judge, Trained, error_bars, real_digits, spread, train_all, write_digits

from dcdit.diffusion.samplers import Sampler
from dcdit.diffusion.settings import GuidanceSettings, Heun
from dcdit.evaluation.statistics import Statistics
from dcdit.runtime.devices import pick_device
from dcdit.sampling.cost import SamplingCost

Way = dict[str, Any]
"""How to sample: what differs from ordinary guidance, as arguments of ``Heun`` and ``GuidanceSettings``. With ``gates``
it is the network with gates that samples."""
Columns = dict[str, list[float]]
"""FID, the share read as asked for, and costs; of each seed."""

SCALES, TIMED, ROUNDS = (1.0, 1.25, 1.5, 2.0), 50, 3
"""Guidance scales; images of a round of timing, and its rounds."""
ORDINARY: Way = {}
WEAKER: list[Way] = [{"weak": "path"}, {"weak": "path_class"}, {"uncond_drop_fraction": 0.9}]
COMBINED: list[Way] = [
    {"weak": "path", "cache": 0.2},
    {"every": 4, "cache": 0.2},
    {"every": 4, "cache": 0.2, "steps": 10},
    {"weak": "path", "every": 2},
    {"every": 4, "cache": 0.2, "drop_fraction": 0.2, "steps": 10},
    {"gates": True, "weak": "path"},
    {"gates": True, "every": 4, "cache": 0.2, "steps": 10},
]
GATED: Way = {"gates": True}


def name_of(way: Way) -> str:
    """The settings of a way, as they are written on a command line."""
    return ", ".join(f"{key}={value}" for key, value in way.items()) or "ordinary guidance"


RANGES: dict[str, Sequence[float]] = {
    "every": [2, 4, 8],
    "drop_fraction": [0.2, 0.4, 0.6],
    "cache": [0.1, 0.2, 0.4],
    "steps": [10, 7, 5],
}
LINES: dict[str, list[Way]] = {
    **{key: [{key: value} for value in values] for key, values in RANGES.items()},
    **{name_of(way): [way] for way in [*WEAKER, GATED, *COMBINED]},
}
"""The savings, line by line of the picture."""

PUBLISHED, PATH_DROP, CLASS_DROPPED = "as published", "path drop", "path drop, class dropped"
DIGITS = {
    PUBLISHED: [],
    PATH_DROP: ["multi_budget.path_drop=0.1"],
    CLASS_DROPPED: ["multi_budget.path_drop=0.1", "multi_budget.path_drop_class=drop"],
}
"""The variants of digits and their overrides."""
GATES, SHARE = "path drop, gates", 0.6
"""The variant with gates, and the share of heads and MLPs that its loss aims at."""


def plan_digits(out: Path, steps: int, seeds: int, own: Sequence[str]) -> Plan:
    """Write digits to ``out``/data, and plan the runs of ``DIGITS``; the arguments are those of ``plan``."""
    shared = ["experiment=digits", write_digits(out / "data", SETUPS["digits"].source), f"trainer.max_steps={steps}"]
    shared += [f"multi_budget.full_budget_steps={steps // 5}", "trainer.val_check_interval=100000", *precision_of(own)]
    return {
        (variant, seed): Planned(run_of(out, variant, seed), [*shared, *special, f"seed={seed}", *own])
        for variant, special in DIGITS.items()
        for seed in range(seeds)
    }


def add_gates(planned: Plan, variant: str, steps: int) -> Plan:
    """Plan beside each run of a variant one that goes on from it for ``steps``, with gates on its heads and MLPs."""
    begun = {seed: run for (name, seed), run in planned.items() if name == variant}
    gates = ["model.gates=true", f"gates.share={SHARE}", f"trainer.max_steps={steps}", "match_compute.baseline=null"]
    gates += ["multi_budget.full_budget_steps=0", "optimizer.lr=1e-3", "init=weights"]
    return {
        (GATES, seed): Planned(
            run.run.with_name(f"gates_{run.run.name}"), [*run.overrides, *gates, f"init.checkpoint={run.run}"]
        )
        for seed, run in begun.items()
    }


class Comparison(NamedTuple):
    """What is compared on one data set, and the defaults of steps and images.

    ``plan`` makes the plan from the directory, steps, seeds and overrides. ``variants`` has the guiding branches that
    are measured of each variant. ``saved`` is the variant with savings; gates are trained from it.
    """

    plan: Callable[[Path, int, int, Sequence[str]], Plan]
    variants: dict[str, list[Way]]
    saved: str
    folder: str
    steps: int
    images: int


GUIDING = [ORDINARY, *WEAKER, *LINES["every"]]
DIGITS_GUIDING = {PUBLISHED: [ORDINARY], PATH_DROP: GUIDING, CLASS_DROPPED: [ORDINARY, {"weak": "path"}]}
MNIST_GUIDING = {SCRATCH: [ORDINARY], DEEP_PATH_DROP: GUIDING}
COMPARISONS = {
    "digits": Comparison(plan_digits, DIGITS_GUIDING, PATH_DROP, "savings_digits", 1000, 500),
    "mnist": Comparison(partial(plan, "mnist"), MNIST_GUIDING, DEEP_PATH_DROP, "networks_mnist", STEPS, 200),
}


class Measured:
    """The figures of a run. What its savings.json lacks is measured when it is asked for, and written there."""

    def __init__(self, run: Path, gated: Path | None, real: Statistics, judge: Judge, images: int) -> None:
        self._network = Trained(run, pick_device("auto"))
        self._gated = Trained(gated, pick_device("auto")) if gated else None
        self._real, self._judge, self._images = real, judge, images
        self._path = run / "savings.json"
        self._all = json.loads(self._path.read_text()) if self._path.is_file() else {}
        self._known: dict[str, dict[str, float]] = self._all.setdefault(
            f"step {self._network.model.step}, {images} images", {}
        )

    def _sample(self, way: Way, scale: float, images: int) -> Figures:
        how = {"steps": 15, "cache": 0.0, **way}
        network = self._gated if how.pop("gates", False) else self._network
        assert network is not None
        sampler = Sampler(Heun(steps=how.pop("steps"), cache=how.pop("cache"), clip=True))
        return network.figures(self._real, sampler, GuidanceSettings(scale=scale, **how), images)

    def _keep(self, key: str, figures: dict[str, float]) -> None:
        self._known[key] = figures
        self._path.write_text(json.dumps(self._all, indent=1) + "\n")
        shown = ", ".join(f"{name} {value:.3g}" for name, value in figures.items())
        print(f"{self._path.parent.name}: {key}: {shown}", flush=True)

    def figures(self, way: Way, scale: float) -> dict[str, float]:
        """FID, the share of samples read as asked for, and GFLOPs per image."""
        key = f"{name_of(way)}, scale {scale:g}"
        if key not in self._known:
            figures = self._sample(way, scale, self._images)
            latents = torch.cat([batch.latents for batch in figures.batches])
            gflops = SamplingCost.total(map(SamplingCost.of, figures.batches)).tflops_per_image * 1e3
            read = self._judge.share(latents, torch.arange(self._images) % 10)
            self._keep(key, {"fid": figures.fid, "read": read, "gflops": gflops})
        return self._known[key]

    def milliseconds(self, points: Mapping[str, tuple[Way, float]], scale: float) -> dict[str, float]:
        """Milliseconds per image of each way and scale: the median of rounds in which all take turns."""
        key = f"milliseconds, scale {scale:g}"
        if not points.keys() <= self._known.get(key, {}).keys():
            rounds = [[self._sample(*point, TIMED).seconds for point in points.values()] for _ in range(ROUNDS)]
            medians = [median(seconds) / TIMED * 1e3 for seconds in zip(*rounds, strict=True)]
            self._keep(key, dict(zip(points, medians, strict=True)))
        return self._known[key]


def columns(runs: Sequence[Measured], way: Way, scale: float) -> Columns:
    """The figures of a way to sample at a guidance scale."""
    rows = [run.figures(way, scale) for run in runs]
    return {key: [row[key] for row in rows] for key in ("fid", "read", "gflops")}


def quality(figures: Columns) -> str:
    """FID and the share read, as columns of a table."""
    return f"{spread(figures['fid'], '.2f')} | {spread(figures['read'], '.1%')}"


def guidance_table(variants: dict[str, list[Way]], runs: dict[str, list[Measured]]) -> str:
    """Measure guiding branches and scales; returns the table in Markdown."""
    head = "| network | guiding branch | scale | FID | read as asked for | GFLOPs per image |"
    lines = [head, "|---|---|---|---|---|---|"]
    for variant, ways in variants.items():
        points = [("none", ORDINARY, 1.0)] + [(name_of(way), way, scale) for way in ways for scale in SCALES[1:]]
        for name, way, scale in points:
            figures = columns(runs[variant], way, scale)
            lines.append(f"| {variant} | {name} | {scale:g} | {quality(figures)} | {mean(figures['gflops']):.3f} |")
    return "\n".join(lines)


def measure_savings(runs: Sequence[Measured], scale: float) -> dict[str, Columns]:
    """Measure ordinary guidance and all savings at a scale, and sampling without guidance, by name."""
    ways = [ORDINARY, *(way for line in LINES.values() for way in line)]
    points = {"no guidance": (ORDINARY, 1.0), **{name_of(way): (way, scale) for way in ways}}
    savings = {name: columns(runs, *point) for name, point in points.items()}
    times = [run.milliseconds(points, scale) for run in runs]
    return {
        name: {**of, "milliseconds": [milliseconds[name] for milliseconds in times]} for name, of in savings.items()
    }


def savings_table(savings: dict[str, Columns]) -> str:
    """The table of savings in Markdown: costs as shares of those of ordinary guidance, seed by seed."""
    lines = ["| saving | FID | read as asked for | GFLOPs | milliseconds |", "|---|---|---|---|---|"]
    ordinary = savings[name_of(ORDINARY)]
    for name, of in savings.items():
        gflops, time = (
            mean(own / usual for own, usual in zip(of[key], ordinary[key], strict=True))
            for key in ("gflops", "milliseconds")
        )
        lines.append(f"| {name} | {quality(of)} | {gflops:.0%} | {time:.0%} |")
    return "\n".join(lines)


def draw(savings: dict[str, Columns], out: Path) -> None:
    """Draw FID over GFLOPs and over milliseconds: a line for each saving that has several strengths, else a point."""
    figure, axes = plt.subplots(1, 2, figsize=(14, 5), sharey=True, layout="constrained")
    lines = {name: [name] for name in (name_of(ORDINARY), "no guidance")}
    for title, ways in LINES.items():
        lines[title] = [name_of(way) for way in ([ORDINARY, *ways] if len(ways) > 1 else ways)]
    for axis, key, label in zip(axes, ("gflops", "milliseconds"), ("GFLOPs", "milliseconds"), strict=True):
        for number, (title, names) in enumerate(lines.items()):
            fids = [savings[name]["fid"] for name in names]
            axis.errorbar(
                [mean(savings[name][key]) for name in names],
                list(map(mean, fids)),
                error_bars(fids),
                fmt="o-" if len(names) > 1 else "sDv^<>P*XpHd"[number % 12],
                color="black" if number < 2 else plt.get_cmap("tab20")(2 * number % 20 + number // 10),
                zorder=3 if number < 2 else 2,  # lines begin at ordinary guidance
                capsize=2,
                label=title,
            )
        axis.set(xlabel=f"{label} per image", xlim=(0, None))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("FID (digits features)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    figure.savefig(out, dpi=110)


def main() -> None:
    """Train all runs, measure them one after another, print the tables, and draw the savings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", choices=COMPARISONS)
    parser.add_argument("overrides", nargs="*", help="of all runs, such as trainer=gpu")
    parser.add_argument("--steps", type=int, help="of training: 1000 of digits, 2000 of DiT/2 of mnist if left out")
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--images", type=int, help="that are sampled each time: 500, or 200 of mnist if left out")
    parser.add_argument("--out", type=Path, help="runs/savings_digits or runs/networks_mnist if left out")
    parser.add_argument("--parallel", type=int, help="runs side by side; a run for each core, up to one a seed")
    parser.add_argument("--brief", action="store_true", help="compare ordinary guidance with weak=path alone")
    options = parser.parse_intermixed_args()  # overrides may stand before and after options
    comparison, setup = COMPARISONS[options.data], SETUPS[options.data]
    out = (options.out or ROOT / "runs" / comparison.folder).resolve()
    steps, images = options.steps or comparison.steps, options.images or comparison.images
    planned = comparison.plan(out, steps, options.seeds, options.overrides)
    variants = comparison.variants
    if options.brief:
        variants = {name: [way for way in ways if way in (ORDINARY, *WEAKER[:1])] for name, ways in variants.items()}
    else:
        planned |= add_gates(planned, comparison.saved, steps // 2)
    for name in (*variants, GATES):  # the network with gates goes on from that without
        chosen = dict(run for (variant, _), run in planned.items() if variant == name)
        train_all(chosen, options.parallel or min(os.cpu_count() or 1, options.seeds))
    torch.set_num_threads(1)
    real, judge = real_digits(out / "data", setup.side), Judge(setup.source)

    def measured(variant: str, seed: int) -> Measured:
        gated = planned[GATES, seed].run if variant == comparison.saved and not options.brief else None
        return Measured(planned[variant, seed].run, gated, real, judge, images)

    runs = {name: [measured(name, seed) for seed in range(options.seeds)] for name in variants}
    guidance, saved = guidance_table(variants, runs), runs[comparison.saved]
    if options.brief:
        print(f"\n{guidance}")
        return
    best = min(SCALES[1:], key=lambda scale: mean(columns(saved, ORDINARY, scale)["fid"]))
    savings = measure_savings(saved, best)
    draw(savings, out / "savings.png")
    print(f"\n{guidance}\n\nSavings of {comparison.saved!r} at guidance scale {best:g}:\n\n{savings_table(savings)}")
    print(f"\nThe judge reads {judge.on_unseen:.1%} of unseen real digits.\n\n{out / 'savings.png'}")


if __name__ == "__main__":
    main()
