"""What a network costs: ``python -m dcdit.flops model=dcdit_b``.

Prints the FLOPs of a forward pass by component and budget, and those of a whole image.
"""

from typing import Annotated, Any

from dcdit.checkpoints.settings import AssumeSettings, Paths
from dcdit.checks import Compression, DropFraction, NotEmpty, config
from dcdit.diffusion.settings import Steps
from dcdit.errors import UserError
from dcdit.settings.command import command
from dcdit.settings.compose import choice_of, given_overrides


@config
class FlopsConfig:
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
        paths: where runs are.
        resolution: of the images; ``model`` says what it makes of it.
    """

    model: dict[str, Any]
    checkpoint: str | None
    assume: AssumeSettings
    compression: Compression
    drop_fractions: Annotated[list[DropFraction], NotEmpty("name at least one, such as 0")]
    steps: Steps
    guided: bool
    uncond_drop_fraction: DropFraction | None
    paths: Paths
    resolution: dict[str, Any]


@command("flops")
def flops(config: FlopsConfig) -> None:
    """Print the table; UserError if the network is given twice, or its values are wrong."""
    if config.checkpoint and any(word.split("=")[0].split(".")[0] == "model" for word in given_overrides()):
        raise UserError(f"checkpoint={config.checkpoint}: it says itself what its network is, leave model out")
    from dcdit.checkpoints.resolve import resolve_checkpoint

    place = resolve_checkpoint(config.checkpoint, config.paths.runs) if config.checkpoint else None
    from dcdit.compute.table import flops_table
    from dcdit.network import build_network
    from dcdit.runtime.devices import without_memory
    from dcdit.runtime.display import Console

    spec, name = config.model, config.checkpoint
    if place is not None:
        from dcdit.checkpoints.load import describe_weights, read_weights

        found = read_weights(place, config.assume)
        spec = dict(found.model)
    with without_memory():
        network = build_network(spec)
    if place is not None:
        print(f"{place.name}: {describe_weights(found, network, 'ema')}")
    drops = {
        f"drop {drop:g}": (drop, drop if config.uncond_drop_fraction is None else config.uncond_drop_fraction)
        for drop in config.drop_fractions
    }
    name = name or choice_of("model") or network.title
    Console().print(flops_table(network, name, config.compression, drops, config.steps, config.guided))


if __name__ == "__main__":
    flops.main()
