"""What a network costs: ``python -m dcdit.flops model=dcdit_b``.

Prints the FLOPs of a forward pass by component and budget, and those of a whole image.
"""

from typing import Annotated, Any

from dcdit.checkpoints.settings import AssumeSettings, Paths
from dcdit.checks import Compression, Count, DropFraction, NotEmpty, Positive, config
from dcdit.diffusion.settings import Steps
from dcdit.errors import UserError
from dcdit.settings.command import command
from dcdit.settings.compose import choice_of, given_overrides


@config
class TrainingSettings:
    """The training whose GPU hours are wanted; ``configs/flops.yaml`` describes each key."""

    achieved_tflops: Positive | None
    steps: Count
    batch_size: Count


@config
class FlopsConfig:
    """The configuration of ``dcdit.flops``; ``configs/flops.yaml`` describes each key."""

    model: dict[str, Any]
    checkpoint: str | None
    assume: AssumeSettings
    compression: Compression
    drop_fractions: Annotated[list[DropFraction], NotEmpty("name at least one, such as 0")]
    steps: Steps
    guided: bool
    uncond_drop_fraction: DropFraction | None
    training: TrainingSettings
    paths: Paths
    resolution: dict[str, Any]


@command("flops")
def flops(config: FlopsConfig) -> None:
    """Print the table; UserError if the network is given twice, or its values are wrong."""
    if config.checkpoint and any(word.split("=")[0].split(".")[0] == "model" for word in given_overrides()):
        raise UserError(f"checkpoint={config.checkpoint}: it says itself what its network is, leave model out")
    from dcdit.checkpoints.resolve import resolve_checkpoint

    source = resolve_checkpoint(config.checkpoint, config.paths.runs) if config.checkpoint else None
    from dcdit.compute.table import add_gpu_hours, flops_table
    from dcdit.network import build_network
    from dcdit.runtime.devices import without_memory
    from dcdit.runtime.display import Console
    from dcdit.runtime.tensors import load_state_strict

    spec, name = config.model, config.checkpoint
    if source is not None:
        from dcdit.checkpoints.load import describe_weights, read_weights

        weights = read_weights(source, config.assume)
        spec = dict(weights.model)
    with without_memory():
        network = build_network(spec)
    if source is not None and network.gates is not None:  # whose weights say what runs
        network = build_network(spec)
        load_state_strict(network, weights.ema or weights.of_kind("raw"))
    if source is not None:
        print(f"{source.name}: {describe_weights(weights, network, 'ema')}")
    drops = {
        f"drop {drop:g}": (drop, drop if config.uncond_drop_fraction is None else config.uncond_drop_fraction)
        for drop in config.drop_fractions
    }
    name = name or choice_of("model") or network.title
    table = flops_table(network, name, config.compression, drops, config.steps, config.guided)
    training = config.training
    if training.achieved_tflops is not None:
        lengths = (training.steps, training.batch_size, training.achieved_tflops)
        add_gpu_hours(table, network, config.compression, drops, *lengths)
    Console().print(table)


if __name__ == "__main__":
    flops.main()
