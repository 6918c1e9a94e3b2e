"""What a network costs: ``python -m dcdit.flops model=dcdit_b``."""

from dataclasses import dataclass
from typing import Any

import hydra
import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from dcdit.checks import check_compression, check_drop_fraction
from dcdit.compute.flops import RESIDUAL, Flops, count
from dcdit.diffusion.schedule import TRAIN_STEPS
from dcdit.errors import UserError
from dcdit.network import DCDiT
from dcdit.settings.entry import CONFIG_DIR, entry_point
from dcdit.settings.schema import call_checked
from dcdit.settings.tables import build_network


@dataclass(frozen=True)
class Request:
    """What to count.

    Attributes:
        compression: the router keeps 1 / N of the positions before any drop.
        drop_fractions: tail drops, one column each.
        steps: sampling steps of an image.
        guided: count the unconditional half too.
        uncond_drop_fraction: tail drop of that half; None takes the same.
    """

    compression: float
    drop_fractions: list[float]
    steps: int = 250
    guided: bool = False
    uncond_drop_fraction: float | None = None

    def __post_init__(self) -> None:
        check_compression(self.compression)
        if not self.drop_fractions:
            raise UserError("drop_fractions=[] asks for nothing: name at least one, such as 0")
        for fraction in self.drop_fractions:
            check_drop_fraction(fraction, "drop_fractions")
        if self.uncond_drop_fraction is not None:
            check_drop_fraction(self.uncond_drop_fraction, "uncond_drop_fraction")
        if not 1 <= self.steps <= TRAIN_STEPS:
            raise UserError(f"steps={self.steps} is outside 1..{TRAIN_STEPS}")


def budgets(network: torch.nn.Module, request: Request) -> dict[str, tuple[Flops, Flops]]:
    """Operations of the conditional and the unconditional half at every budget, by its name."""
    if not isinstance(network, DCDiT):
        flops = count(network)
        return {"full": (flops, flops)}
    kept = network.grid[0] * network.grid[1] / request.compression
    found = {}
    for fraction in request.drop_fractions:
        other = fraction if request.uncond_drop_fraction is None else request.uncond_drop_fraction
        halves = [count(network, [kept * (1 - drop)]) for drop in (fraction, other)]
        found[f"drop {fraction:g}"] = (halves[0], halves[1])
    return found


def _short(value: float) -> str:
    return f"{value:.3f}" if value >= 0.1 else f"{value:.3g}"


def table(network: torch.nn.Module, name: str, request: Request) -> Table:
    """GFLOPs by component and budget, and TFLOPs per image."""
    found = budgets(network, request)
    shown = Table("GFLOPs per forward and sample", *found, title=name, title_justify="left")
    for component in next(iter(found.values()))[0].components:
        shown.add_row(component, *(_short(half.components[component] / 1e9) for half, _ in found.values()))
    shown.add_section()
    shown.add_row("total", *(_short(half.total / 1e9) for half, _ in found.values()))
    if RESIDUAL in next(iter(found.values()))[0].components:
        shown.add_row("without r, as published", *(_short(half.published / 1e9) for half, _ in found.values()))
    images = [half.total + (other.total if request.guided else 0) for half, other in found.values()]
    words = f"TFLOPs per image, {request.steps} steps" + (", guided" if request.guided else "")
    shown.add_row(words, *(_short(image * request.steps / 1e12) for image in images))
    return shown


def run(config: DictConfig) -> None:
    """Print the table."""
    values: Any = OmegaConf.to_container(config, resolve=True)
    spec = values.pop("model")
    request = call_checked(Request, values, "")
    with torch.device("meta"):
        network = build_network(spec)
    Console().print(table(network, spec["name"], request))


@hydra.main(version_base="1.3", config_path=CONFIG_DIR, config_name="flops")
def main(config: DictConfig) -> None:
    """Hydra entry point."""
    run(config)


if __name__ == "__main__":
    entry_point(main)
