"""What is in a directory of latent shards: ``python -m dcdit.inspect_latents directory=data/imagenet256``."""

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import torch
from numpy.typing import NDArray
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.filesize import decimal
from rich.progress import track
from rich.table import Table
from torch import Tensor

from dcdit.data.autoencoder import load_decoder, network_latents
from dcdit.data.manifest import MOMENTS, Manifest, Shard
from dcdit.data.shards import DamagedSampleError, Layout, file_digest
from dcdit.data.storage import Location
from dcdit.errors import UserError
from dcdit.runtime.devices import pick_device
from dcdit.sampling.figures import save_grid
from dcdit.settings.entry import CONFIG_DIR, entry_point
from dcdit.settings.schema import call_checked

_FOR_STATISTICS = 1000  # samples of which mean and deviation are shown


@dataclass(frozen=True)
class Request:
    """What to look at.

    Attributes:
        directory, cache, cache_gb, allow_pipe: see :class:`dcdit.data.storage.Location`.
        split: name of the split.
        verify: read every byte, not only the samples shown.
        images: samples to decode into a picture; 0 makes none.
        picture: PNG to write; None takes ``latents_<split>.png``.
        autoencoder: decode with this one; None takes the one that the manifest names.
        device: ``auto`` or a torch device.
    """

    directory: str
    split: str = "train"
    verify: bool = True
    images: int = 16
    picture: str | None = None
    autoencoder: str | None = None
    device: str = "auto"
    cache: str | None = None
    cache_gb: float = 20.0
    allow_pipe: bool = False

    def __post_init__(self) -> None:
        if self.images < 0:
            raise UserError(f"images={self.images} is negative")


@dataclass
class Findings:
    """What reading the shards brought to light.

    Attributes:
        damage: what is wrong, with shard and key.
        labels: samples of each label.
    """

    damage: list[str] = field(default_factory=list)
    labels: Counter[int] = field(default_factory=Counter)


def samples(path: Path, shard: Shard, layout: Layout, damage: list[str]) -> Iterator[tuple[int, bool, NDArray[Any]]]:
    """Label, whether mirrored, and stored array of all in a shard; damage is noted and passed over."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        for index in range(shard.samples):
            for mirrored in (False, True)[: 1 + layout.mirrored]:
                row = np.empty(layout.array_bytes, np.uint8)
                try:
                    label = layout.read(descriptor, index, mirrored, row)
                except DamagedSampleError as error:
                    damage.append(f"{shard.name}, sample {index}: {error}")
                    continue
                yield label, mirrored, row.view(layout.dtype).reshape(layout.stored_shape)
    finally:
        os.close(descriptor)


def verify(location: Location, manifest: Manifest, console: Console) -> Findings:
    """Read all shards: their checksums, those of the samples, and the labels."""
    findings, layout = Findings(), Layout.of(manifest)
    for shard in track(manifest.shards, "checking", console=console, disable=not console.is_terminal):
        try:
            path = location.fetch(shard)
            if file_digest(path) != shard.sha256:
                findings.damage.append(f"{shard.name}: the checksum of the file differs")
            for label, mirrored, _ in samples(path, shard, layout, findings.damage):
                if not 0 <= label < len(manifest.classes):
                    findings.damage.append(f"{shard.name}: label {label} is none of {len(manifest.classes)} classes")
                findings.labels[label] += not mirrored
        except OSError as error:
            findings.damage.append(f"{shard.name}: {error}")
    return findings


def first_samples(location: Location, manifest: Manifest, wanted: int) -> Tensor:
    """Up to ``wanted`` stored arrays, (n, ...), from as few shards as hold them."""
    found: list[Tensor] = []
    layout = Layout.of(manifest)
    for shard in manifest.shards:
        with suppress(OSError):  # found by whoever verifies
            for _, _, array in samples(location.fetch(shard), shard, layout, []):
                if len(found) < wanted:
                    found.append(torch.from_numpy(array))
        if len(found) >= wanted:
            break
    if not found:
        raise UserError(f"{location.place}: not one sample can be read")
    return torch.stack(found)


def summary(location: Location, manifest: Manifest, stored: Tensor, findings: Findings | None) -> Table:
    """A table for people."""
    table = Table(show_header=False, title=location.place, title_justify="left")
    channels, height, width = manifest.latent_shape
    sizes = [shard.samples for shard in manifest.shards]
    total = sum(shard.bytes for shard in manifest.shards)
    kind = "mean and log-variance" if manifest.representation == MOMENTS else "one sample each"
    latents = network_latents(stored, manifest, torch.Generator().manual_seed(0))
    deviations = ", ".join(f"{value:.2f}" for value in latents.std(dim=(0, 2, 3)).tolist())
    means = ", ".join(f"{value:.2f}" for value in latents.mean(dim=(0, 2, 3)).tolist())
    rows = {
        "samples": f"{manifest.samples}" + (", each also mirrored" if manifest.mirrored else ""),
        "shards": f"{len(sizes)} of {min(sizes)} to {max(sizes)} samples, {decimal(total)}",
        "latents": f"{channels} x {height} x {width}, {kind}, {manifest.dtype}",
        "autoencoder": f"{manifest.autoencoder}, weights {manifest.fingerprint or 'none'}",
        "scale, shift": f"{manifest.scale}, {manifest.shift}",
        "for the network": f"deviation {deviations}; mean {means} (by channel, {len(stored)} latents)",
        "classes": _classes(manifest, findings),
        "skipped images": f"{len(manifest.skipped)}",
    }
    if height == width:
        rows["to train on them"] = (
            f"model.grid={height} model.channels={channels} model.num_classes={len(manifest.classes)}"
        )
    if findings is not None:
        rows["checksums"] = "all right" if not findings.damage else f"{len(findings.damage)} faults"
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _classes(manifest: Manifest, findings: Findings | None) -> str:
    names = list(manifest.classes)
    text = f"{len(names)}: " + ", ".join(names if len(names) <= 4 else [*names[:2], "...", names[-1]])
    if findings is not None:
        counts = [findings.labels[label] for label in range(len(names))]
        text += f"; {min(counts)} to {max(counts)} samples each"
    return text


def run(config: DictConfig) -> None:
    """Print a summary, check, and draw; :class:`UserError` if anything is damaged."""
    values: Any = OmegaConf.to_container(config, resolve=True)
    request = call_checked(Request, values, "")
    place = Location(request.directory, request.cache, request.cache_gb, request.allow_pipe)
    location = place.below(request.split)
    manifest = location.manifest()
    console = Console(stderr=True)
    findings = verify(location, manifest, console) if request.verify else None
    stored = first_samples(location, manifest, max(_FOR_STATISTICS, request.images))
    Console().print(summary(location, manifest, stored, findings))
    if request.images:
        picture = Path(request.picture or f"latents_{request.split}.png")
        picture.parent.mkdir(parents=True, exist_ok=True)
        decode = load_decoder(manifest.summary(), pick_device(request.device), request.autoencoder)
        shown = network_latents(stored[: request.images], manifest, None)
        save_grid(decode(shown), max(1, round(len(shown) ** 0.5)), picture)
        print(f"The first {len(shown)} latents, decoded: {picture}")
    if findings and findings.damage:
        listed = "\n".join(findings.damage[:20])
        raise UserError(
            f"{len(findings.damage)} faults. Restore these shards; or delete them and run dcdit.extract again as"
            f" before, which writes what is missing:\n{listed}"
        )


@hydra.main(version_base="1.3", config_path=CONFIG_DIR, config_name="inspect_latents")
def main(config: DictConfig) -> None:
    """Hydra entry point."""
    run(config)


if __name__ == "__main__":
    entry_point(main)
