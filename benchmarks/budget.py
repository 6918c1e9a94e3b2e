"""Whether smaller budgets are cheaper in time, not only on paper: sampling at several drop fractions in one run.

    python benchmarks/budget.py                      DC-DiT-S at 32 x 32, as much as a CPU does in two minutes
    python benchmarks/budget.py --model dcdit_xl --batch 64 --precision bf16 --device cuda

An untrained network, its router set so that it keeps a quarter of the positions of noise. Time is the median over
rounds in which all budgets take turns, for one image and step; both ratios are against ρ 0. The first step is left out:
before it the host draws the noise of each image, which on a GPU takes longer than several steps.
"""

import argparse
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from dcdit.checkpoints.load import Model
from dcdit.data.latents import IDENTITY, LatentSpec
from dcdit.diffusion.guidance import Guidance
from dcdit.diffusion.samplers import Sampler, Step
from dcdit.diffusion.settings import DDIM, GuidanceSettings
from dcdit.network import DCDiT, build_network
from dcdit.network.execution import set_execution
from dcdit.network.routing import PredictabilityRouter
from dcdit.runtime.devices import describe_device, pick_device
from dcdit.runtime.memory import configure_memory
from dcdit.sampling.cost import SamplingCost
from dcdit.sampling.generate import SampleBatch, generate
from dcdit.settings.compose import model_config

KEPT = 0.25


@dataclass(frozen=True)
class Budget:
    """A line of the table."""

    name: str
    scale: float
    drop: float
    uncond_drop: float | None = None


BUDGETS = [Budget(f"ρ {drop:g}", 1.0, drop) for drop in (0.0, 0.2, 0.5, 0.8)]
GUIDED = [Budget(f"guided, ρ {drop:g}", 2.0, drop) for drop in (0.0, 0.5)]
GUIDED += [Budget("Lite-CFG, ρ 0 and 0.9", 2.0, 0.0, 0.9)]


def network_keeping(kept: float, name: str, device: torch.device) -> DCDiT:
    """An untrained network of the scale ``name`` whose router keeps a share ``kept`` of noise."""
    torch.manual_seed(0)
    network = build_network(model_config(name)).to(device).eval()
    assert isinstance(network, DCDiT)
    network.to(memory_format=torch.channels_last)
    with torch.no_grad():
        for parameter in network.parameters():  # zero-initialised parts would make all positions alike
            parameter.add_(0.02 * torch.randn_like(parameter))
        assert isinstance(network.router, PredictabilityRouter)
        x = torch.randn(2, network.channels, *network.grid, device=device)
        prob = network(x, torch.tensor([900, 300], device=device), torch.tensor([1, 2], device=device)).routing.prob
        inner = prob[prob < 1].logit()  # the positions that are always kept have probability 1
        bias = network.router.scorer[-1].bias
        assert isinstance(bias, torch.Tensor)
        bias.sub_(inner.quantile(1 - kept))
    return network


def sample(network: DCDiT, budget: Budget, options: argparse.Namespace) -> tuple[float, SampleBatch]:
    """Seconds of a step after the first, and the samples."""
    classes = tuple(str(label) for label in range(network.num_classes))
    model = Model(network, LatentSpec((network.channels, *network.grid), IDENTITY, 1.0, 0.0, classes), 0)
    settings = GuidanceSettings(budget.scale, 3, budget.drop, budget.uncond_drop)
    guidance = Guidance(network, network.null_class, settings)
    labels, numbers = torch.arange(options.batch) % network.num_classes, range(options.batch)
    sampler = Sampler(DDIM(options.steps))
    ends = []

    def note(numbers: list[int], step: Step) -> None:
        if step.index in (0, options.steps - 1):  # in between the device need not be waited for
            if model.device.type == "cuda":
                torch.cuda.synchronize(model.device)
            ends.append(time.perf_counter())

    precision = options.precision
    (batch,) = generate(
        model, guidance, sampler, labels, numbers, seed=0, batch_size=len(numbers), precision=precision, on_step=note
    )
    return (ends[1] - ends[0]) / (options.steps - 1), batch


def rows(network: DCDiT, options: argparse.Namespace) -> Iterator[tuple[str, ...]]:
    """Lines of the table."""
    seconds: dict[str, list[float]] = {}
    flops: dict[str, float] = {}
    kept: dict[str, float] = {}
    for turn in track(range(options.rounds + 1), "measuring", console=Console(stderr=True), transient=True):
        for budget in (*BUDGETS, *GUIDED):
            spent, batch = sample(network, budget, options)
            flops[budget.name] = batch.flops.mean().item()
            kept[budget.name] = SamplingCost.of(batch).mean_keep_ratio(network.positions) or 0.0
            if turn:  # the first round warms up
                seconds.setdefault(budget.name, []).append(spent)
    for group in (BUDGETS, GUIDED):
        times = [statistics.median(seconds[budget.name]) for budget in group]
        for budget, median in zip(group, times, strict=True):
            work = flops[budget.name]
            yield (
                budget.name,
                f"{kept[budget.name]:.1%}",
                f"{work / options.steps / 1e9:.2f}",
                f"{work / flops[group[0].name]:.2f}",
                f"{median / times[0]:.2f}",
                f"{1000 * median / options.batch:.2f}",
            )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="dcdit_s")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--compile", action="store_true", help="fuse the blocks' element-wise operations")
    options = parser.parse_args()
    if options.steps < 2:
        parser.error(f"--steps {options.steps}: the first is not timed, take at least 2")
    configure_memory()
    device = pick_device(options.device)
    with torch.no_grad():
        network = network_keeping(KEPT, options.model, device)
    set_execution(network, options.compile)
    title = f"{options.model}, {options.precision}, {describe_device(device)}, batches of {options.batch}"
    if options.compile:
        title += ", compiled blocks"
    table = Table(title=title, title_justify="left")
    for heading in ("budget", "keep ratio", "GFLOPs/step", "of the work", "of the time", "ms/image"):
        table.add_column(heading, justify="left" if heading == "budget" else "right")
    for row in rows(network, options):
        table.add_row(*row)
    Console().print(table)


if __name__ == "__main__":
    main()
