"""The FLOPs of a network as a table for people."""

from collections.abc import Mapping

from rich.table import Table

from dcdit.compute.flops import Flops, count
from dcdit.network import Network


def halves(
    network: Network, compression: float, drops: Mapping[str, tuple[float, float]]
) -> dict[str, tuple[Flops, Flops]]:
    """FLOPs of the conditional and the unconditional half at every budget, by its name.

    Args:
        network: on the meta device if need be.
        compression: the router keeps 1 / N of the positions before any drop.
        drops: by name of a budget the tail drops of both halves; a network that does not route has one budget.
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


def flops_words(flops: float) -> str:
    """For people, such as ``3.43 GFLOPs``."""
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
        network, compression, drops: see :func:`halves`.
        name: of the network, for people.
        steps: sampling steps of an image.
        guided: count the unconditional half too.
    """
    found = halves(network, compression, drops)
    shown = Table("GFLOPs per forward pass and sample", *found, title=name, title_justify="left")
    first = next(iter(found.values()))[0]
    for component in first.components:
        shown.add_row(component, *(_short(half.components[component] / 1e9) for half, _ in found.values()))
    shown.add_section()
    shown.add_row("total", *(_short(half.total / 1e9) for half, _ in found.values()))
    if first.unpublished:
        words = f"without {', '.join(sorted(first.unpublished))}, as published"
        shown.add_row(words, *(_short(half.published / 1e9) for half, _ in found.values()))
    images = [half.total + (other.total if guided else 0) for half, other in found.values()]
    words = f"TFLOPs per image, {steps} steps" + (", guided" if guided else "")
    shown.add_row(words, *(_short(image * steps / 1e12) for image in images))
    return shown
