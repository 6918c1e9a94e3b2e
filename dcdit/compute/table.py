"""The FLOPs of a network as a table for the terminal."""

from collections.abc import Mapping

from rich.table import Table

from dcdit.compute.flops import Flops, count
from dcdit.network import Network


def flops_by_budget(
    network: Network, compression: float, drops: Mapping[str, tuple[float, float]]
) -> dict[str, tuple[Flops, Flops]]:
    """FLOPs of the conditional and the unconditional branch at every budget, by its name.

    Args:
        network: on the meta device if need be.
        compression: the router keeps 1 / N of the positions before any drop.
        drops: by name of a budget the tail drops of both branches; a network that does not route has one budget.
    """
    if not network.routes:
        flops = count(network)
        return {"full": (flops, flops)}
    kept = network.positions / compression
    return {
        name: (count(network, [kept * (1 - drop)]), count(network, [kept * (1 - other)]))
        for name, (drop, other) in drops.items()
    }


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
        network, compression, drops: as of :func:`flops_by_budget`.
        name: of the network, for the title.
        steps: sampling steps of an image.
        guided: count the unconditional branch too.
    """
    budgets = flops_by_budget(network, compression, drops)
    shown = Table("GFLOPs per forward pass and sample", *budgets, title=name, title_justify="left")
    full = next(iter(budgets.values()))[0]
    for component in full.components:
        shown.add_row(component, *(_short(main.components[component] / 1e9) for main, _ in budgets.values()))
    shown.add_section()
    shown.add_row("total", *(_short(main.total / 1e9) for main, _ in budgets.values()))
    if full.unpublished:
        label = f"without {', '.join(sorted(full.unpublished))}, as published"
        shown.add_row(label, *(_short(main.published / 1e9) for main, _ in budgets.values()))
    images = [main.total + (unconditional.total if guided else 0) for main, unconditional in budgets.values()]
    label = f"TFLOPs per image, {steps} steps" + (", guided" if guided else "")
    shown.add_row(label, *(_short(image * steps / 1e12) for image in images))
    return shown
