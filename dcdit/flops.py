"""What a network costs: ``python -m dcdit.flops model=dcdit_b``.

Prints the FLOPs of a forward pass by component and budget, and those of a whole image.
"""

from dataclasses import dataclass
from typing import Annotated, Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from dcdit.checkpoints.settings import AssumeSettings
from dcdit.checks import Compression, DropFraction, NotEmpty, call_checked, checked
from dcdit.diffusion.settings import Steps
from dcdit.errors import UserError
from dcdit.settings.entry import entry_point, hold, plain
from dcdit.settings.published import CONFIG_DIR


@checked
@dataclass(frozen=True)
class FlopsSettings:
    """What to count: the keys of ``configs/flops.yaml``.

    Attributes:
        model: the network, see :func:`dcdit.network.build_network`.
        checkpoint: count its network instead, see ``resolve_checkpoint``.
        assume: what it cannot say.
        compression: the router keeps 1 / N of the positions before any drop.
        drop_fractions: tail drops, one column each.
        steps: sampling steps of an image.
        guided: count the unconditional branch too.
        uncond_drop_fraction: tail drop of that branch; None takes the same.
    """

    model: dict[str, Any]
    checkpoint: str | None
    assume: AssumeSettings
    compression: Compression
    drop_fractions: Annotated[list[DropFraction], NotEmpty("name at least one, such as 0")]
    steps: Steps
    guided: bool
    uncond_drop_fraction: DropFraction | None


def check(config: DictConfig) -> FlopsSettings:
    """What ``config`` asks for; UserError if a value is wrong, the network's own apart."""
    values = plain(config)
    del values["resolution"], values["paths"]  # the model says what it makes of the one
    settings = call_checked(FlopsSettings, values, "")
    given = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
    if settings.checkpoint and any(word.split("=")[0].split(".")[0] == "model" for word in given):
        raise UserError(f"checkpoint={settings.checkpoint}: it says itself what its network is, leave model out")
    return settings


def run(config: DictConfig) -> None:
    """Print the table."""
    settings = check(config)
    from dcdit.checkpoints.resolve import resolve_checkpoint

    place = resolve_checkpoint(settings.checkpoint, config.paths.runs) if settings.checkpoint else None
    from dcdit.compute.table import flops_table
    from dcdit.network import build_network
    from dcdit.runtime.devices import without_memory
    from dcdit.runtime.display import Console

    spec, name = settings.model, settings.checkpoint
    if place is not None:
        from dcdit.checkpoints.load import describe_weights, read_weights

        found = read_weights(place, settings.assume)
        spec = dict(found.model)
    with without_memory():
        network = build_network(spec)
    if place is not None:
        print(f"{place.name}: {describe_weights(found, network, 'ema')}")
    drops = {
        f"drop {drop:g}": (drop, drop if settings.uncond_drop_fraction is None else settings.uncond_drop_fraction)
        for drop in settings.drop_fractions
    }
    name = name or (HydraConfig.get().runtime.choices["model"] if HydraConfig.initialized() else network.title)
    Console().print(flops_table(network, name, settings.compression, drops, settings.steps, settings.guided))


@hydra.main(version_base="1.3", config_path=CONFIG_DIR, config_name="flops")
def main(config: DictConfig) -> None:
    """Hydra entry point."""
    hold(run, config)


if __name__ == "__main__":
    entry_point(main)
