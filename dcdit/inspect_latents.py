"""Shows what is in a directory of latent shards: ``python -m dcdit.inspect_latents directory=data/imagenet256``.

Prints a summary, checks every byte, and decodes some latents into a picture.
"""

import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from dcdit.checks import Natural, Positive, config
from dcdit.errors import UserError
from dcdit.settings.command import command

if TYPE_CHECKING:
    from dcdit.data.manifest import Manifest

_FOR_STATISTICS = 1000  # samples of which mean and deviation are taken, where elements differ in scale


@config
class InspectConfig:
    """The configuration of ``dcdit.inspect_latents``; ``configs/inspect_latents.yaml`` describes each key."""

    directory: str
    split: str
    verify: bool
    images: Natural
    picture: str | None
    autoencoder: str | None
    device: str
    cache: str | None
    cache_gb: Positive
    allow_pipe: bool


@command("inspect_latents")
def inspect_latents(config: InspectConfig) -> None:
    """Print a summary, check, and decode; :class:`UserError` if anything is corrupt."""
    from dcdit.data.decoder import load_decoder, network_latents
    from dcdit.data.inspection import channels_table, first_samples, latents_table, network_statistics, verify
    from dcdit.data.storage import Location
    from dcdit.runtime.devices import pick_device
    from dcdit.runtime.display import Console
    from dcdit.sampling.figures import save_grid

    location = Location(config.directory, config.cache, config.cache_gb, config.allow_pipe).below(config.split)
    manifest = location.manifest()
    findings = verify(location, manifest, Console(stderr=True)) if config.verify else None
    stored = first_samples(location, manifest, max(_FOR_STATISTICS, config.images))
    network = network_statistics(manifest, stored)
    Console().print(latents_table(location, manifest, network, findings), channels_table(manifest, network))
    if manifest.latent_shape[1] == manifest.latent_shape[2]:
        print(f"To train on them: {training_command(config, manifest)}")
    if config.images:
        picture = Path(config.picture or f"latents_{Path(config.directory).name}_{config.split}.png")
        picture.parent.mkdir(parents=True, exist_ok=True)
        decode = load_decoder(manifest.spec, pick_device(config.device), config.autoencoder)
        shown = network_latents(stored[: config.images], manifest, None)
        save_grid(decode(shown), max(1, round(len(shown) ** 0.5)), picture)
        print(f"The first {len(shown)} latents, decoded: {picture}")
    if findings and findings.faults:
        listed = "\n".join(findings.faults[:20])
        raise UserError(
            f"{len(findings.faults)} faults. Restore these shards; or delete them and run dcdit.extract again as"
            f" before, which writes what is missing:\n{listed}"
        )


def training_command(config: InspectConfig, manifest: "Manifest") -> str:
    """A command that trains on the latents as they are; training reads the shape of those in a local folder itself."""
    channels, grid, _ = manifest.latent_shape
    overrides: dict[str, object] = {"data.directory": config.directory}
    if "://" in config.directory:
        overrides |= {"model.grid": grid, "model.channels": channels, "model.num_classes": len(manifest.classes)}
    if config.cache:
        overrides["data.cache"] = config.cache
    if config.allow_pipe:
        overrides["data.allow_pipe"] = "true"
    words = ["python -m dcdit.train experiment=images", *(_format_override(*item) for item in overrides.items())]
    return " ".join(words) + "   (a larger network on a GPU: model=dcdit_b trainer=gpu)"


def _format_override(key: str, value: object) -> str:
    """An override as a shell takes it; a value that Hydra would take for a list or a sweep is a text in quotes."""
    plain = re.fullmatch(r"[\w./:+-]+", str(value)) or "'" in str(value)
    return shlex.quote(f"{key}={value}" if plain else f"{key}='{value}'")


if __name__ == "__main__":
    inspect_latents.main()
