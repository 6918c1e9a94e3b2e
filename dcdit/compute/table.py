"""The FLOPs of a network as a table for the terminal."""

from collections.abc import Mapping, Sequence

from rich.table import Table

from dcdit.compute.flops import count, least_and_most
from dcdit.network import Network

Lengths = Sequence[float]


def lengths_by_budget(
    network: Network, compression: float, drops: Mapping[str, tuple[float, float]]
) -> dict[str, tuple[Lengths, Lengths]]:
    """Tokens of the conditional and of the unconditional branch at every budget, by its name.

    Args:
        network: on the meta device if need be.
        compression: the router keeps 1 / N of the positions before any drop.
        drops: by name of a budget the tail drops of both branches; a network that does not route has one budget.
    """
    if not network.routes:
        return {"full": ((), ())}
    kept = network.positions / compression
    return {name: ([kept * (1 - drop)], [kept * (1 - other)]) for name, (drop, other) in drops.items()}


def _short(value: float) -> str:
    return f"{value:.3f}" if value >= 0.1 else f"{value:.3g}"


def format_flops(flops: float) -> str:
    """``flops`` with a unit, such as ``3.43 GFLOPs``."""
    return f"{flops / 1e12:.3g} TFLOPs" if flops >= 1e12 else f"{flops / 1e9:.3g} GFLOPs"


def flops_table(
    network: Network,
    name: str,
    compression: float,
    drops: Mapping[str, tuple[float, float]],
    steps: int,
    guided: bool,
) -> Table:
    """GFLOPs by component and budget, and TFLOPs per image.

    Args:
        network, compression, drops: as of :func:`lengths_by_budget`. With gates, its weights say what runs; all of it
            does on the meta device.
        name: of the network, for the title.
        steps: sampling steps of an image.
        guided: count the unconditional branch too.
    """
    lengths = lengths_by_budget(network, compression, drops)
    budgets = {name: tuple(count(network, branch) for branch in branches) for name, branches in lengths.items()}
    shown = Table("GFLOPs per forward pass and sample", *budgets, title=name, title_justify="left")
    full = next(iter(budgets.values()))[0]
    for component in full.components:
        shown.add_row(component, *(_short(main.components[component] / 1e9) for main, _ in budgets.values()))
    shown.add_section()
    bounds = [bound for main, _ in lengths.values() if (bound := least_and_most(network, main)) is not None]
    label = "total, mean over timesteps" if bounds else "total"
    shown.add_row(label, *(_short(main.total / 1e9) for main, _ in budgets.values()))
    if bounds:
        ranges = (f"{_short(least / 1e9)} to {_short(most / 1e9)}" for least, most in bounds)
        shown.add_row("at the cheapest and the dearest timestep", *ranges)
    elif network.gates is not None:
        shown.caption = "All gates are counted as on: what they leave out is known of a checkpoint only"
    if full.unpublished:
        label = f"without {', '.join(sorted(full.unpublished))}, as published"
        shown.add_row(label, *(_short(main.published / 1e9) for main, _ in budgets.values()))
    images = [main.total + (unconditional.total if guided else 0) for main, unconditional in budgets.values()]
    label = f"TFLOPs per image, {steps} steps" + (", guided" if guided else "")
    shown.add_row(label, *(_short(image * steps / 1e12) for image in images))
    return shown


def gpu_hours(flops: float, steps: int, batch_size: int, achieved_tflops: float) -> float:
    """Hours of one GPU that a training takes; divide by the number of GPUs for the hours on the clock.

    Args:
        flops: of a forward pass, for one sample. A step of training costs three: the gradients with respect to
            activations and to weights cost one each.
        steps, batch_size: of the training.
        achieved_tflops: TFLOP/s that a GPU reaches in training.
    """
    return 3 * flops * steps * batch_size / (achieved_tflops * 1e12) / 3600


def add_gpu_hours(
    table: Table,
    network: Network,
    compression: float,
    drops: Mapping[str, tuple[float, float]],
    steps: int,
    batch_size: int,
    achieved_tflops: float,
) -> None:
    """Add the :func:`gpu_hours` of a training at each budget to a table of :func:`flops_table`."""
    lengths = lengths_by_budget(network, compression, drops)
    hours = [gpu_hours(count(network, main).total, steps, batch_size, achieved_tflops) for main, _ in lengths.values()]
    label = f"GPU hours of {steps:,} steps of {batch_size:,} samples at {achieved_tflops:g} TFLOP/s achieved"
    table.add_row(label, *(f"{value:.3g}" for value in hours))
