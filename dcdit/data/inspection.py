"""A check of a directory of latent shards, and tables that summarise it."""

from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice

import torch
from rich.filesize import decimal
from rich.progress import track
from rich.table import Table
from torch import Tensor

from dcdit.data.companions import verify_companions
from dcdit.data.decoder import network_latents
from dcdit.data.latents import LatentStatistics, by_channel, format_numbers
from dcdit.data.manifest import MOMENTS, Companion, Manifest
from dcdit.data.shards import Layout, read_samples
from dcdit.data.statistics import Sums, Tally
from dcdit.data.storage import Location
from dcdit.errors import UserError
from dcdit.runtime.display import Console
from dcdit.runtime.files import file_digest

_ORIGIN = {
    "autoencoder": "of the autoencoder",
    "channel": "of each channel of these latents",
    "element": "of each element of these latents",
    "train": "of the train split",
}
"""The origin of scale and shift, by ``Manifest.normalise``."""

_MOST_ROWS = 64  # channels in the table


@dataclass
class Findings:
    """What is wrong with shards, by shard and key, and the number of samples of each label."""

    faults: list[str] = field(default_factory=list)
    labels: Counter[int] = field(default_factory=Counter)


def verify(location: Location, manifest: Manifest, console: Console) -> Findings:
    """Read all shards: their checksums, those of the samples, the labels, and the statistics."""
    findings, layout = Findings(), Layout.of(manifest)
    sums: list[Sums] = []
    for shard in track(manifest.shards, "checking", console=console, disable=not console.is_terminal):
        try:
            path = location.fetch(shard)
            if file_digest(path) != shard.sha256:
                findings.faults.append(f"{shard.name}: the checksum of the file differs")
            tally = Tally(manifest.latent_shape, manifest.representation)
            for label, hflip, array in read_samples(path, shard, layout, findings.faults):
                tally.add(array)
                if not 0 <= label < len(manifest.classes):
                    findings.faults.append(f"{shard.name}: label {label} is none of {len(manifest.classes)} classes")
                findings.labels[label] += not hflip
            sums.append(tally.sums)
        except (OSError, UserError) as error:
            findings.faults.append(f"{shard.name}: {error}")
    if manifest.companion:
        findings.faults += verify_companions(location, manifest, manifest.companion)
    if not findings.faults and Sums.total(sums).statistics(manifest.latent_shape[0]) != manifest.statistics:
        findings.faults.append("manifest.json: its statistics are not those of the latents")
    return findings


def _describe_companion(companion: Companion | None) -> str:
    """What lies beside the latents, in a few words."""
    if companion is None:
        return "nothing"
    size = decimal(sum(shard.bytes for shard in companion.shards))
    channels, height, width = companion.shape
    if companion.encoder is None:
        return f"pixels, {height} x {width}, {size}"
    encoder = companion.encoder
    return f"features, {channels} x {height} x {width}, of {encoder.name}, weights {encoder.weights}, {size}"


def first_samples(location: Location, manifest: Manifest, count: int) -> Tensor:
    """Up to ``count`` stored arrays, (n, ...), from as few shards as hold them."""

    def readable() -> Iterator[Tensor]:
        for shard in manifest.shards:
            with suppress(OSError, UserError):  # verify says what is wrong with it
                for _, _, array in read_samples(location.fetch(shard), shard, Layout.of(manifest), []):
                    yield torch.from_numpy(array)

    samples = list(islice(readable(), count))
    if not samples:
        raise UserError(f"{location.root}: not one sample can be read")
    return torch.stack(samples)


def latents_table(
    location: Location, manifest: Manifest, network: LatentStatistics, findings: Findings | None
) -> Table:
    """A table that summarises a split; ``network`` are the statistics of what the network sees of it."""
    table = Table(show_header=False, title=location.root, title_justify="left")
    channels, height, width = manifest.latent_shape
    sizes = [shard.samples for shard in manifest.shards]
    total = sum(shard.bytes for shard in manifest.shards)
    scale, shift = map(format_numbers, (manifest.scale, manifest.shift))
    kind = "mean and log-variance" if manifest.representation == MOMENTS else "one sample each"
    rows = {
        "samples": f"{manifest.samples}" + (", each also flipped" if manifest.hflip else ""),
        "shards": f"{len(sizes)} of {min(sizes)} to {max(sizes)} samples, {decimal(total)}",
        "latents": f"{channels} x {height} x {width}, {kind}, {manifest.dtype}",
        "autoencoder": f"{manifest.autoencoder}, weights {manifest.fingerprint or 'none'}",
        "scale, shift": f"{scale}, {shift}; {_ORIGIN[manifest.normalise]}",
        "classes": _classes(manifest, findings),
        "beside them": _describe_companion(manifest.companion),
        "skipped images": f"{len(manifest.skipped)}",
    }
    if warning := network.describe_unusual():
        rows["attention"] = warning
    if findings is not None:
        rows["checksums"] = "all right" if not findings.faults else f"{len(findings.faults)} faults"
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def network_statistics(manifest: Manifest, stored: Tensor) -> LatentStatistics:
    """Statistics of what the network sees: of the split, or of ``stored`` where elements differ in scale."""
    if statistics := manifest.spec.normalised_statistics(manifest.statistics):
        return statistics
    latents = network_latents(stored, manifest, torch.Generator().manual_seed(0)).transpose(0, 1).flatten(1)
    return LatentStatistics(tuple(latents.mean(1).tolist()), tuple(latents.std(1).tolist()))


def channels_table(manifest: Manifest, network: LatentStatistics) -> Table:
    """A table of each channel's mean and deviation, as stored and as the network sees it."""
    table = Table(title="Channels: mean and deviation", title_justify="left")
    for heading in ("channel", "mean", "deviation", "scale", "shift", "mean for the network", "deviation"):
        table.add_column(heading, justify="right")
    count = manifest.latent_shape[0]
    scales, shifts = (by_channel(values, count) for values in (manifest.scale, manifest.shift))
    own = manifest.statistics
    rows = zip(own.mean, own.deviation, scales, shifts, network.mean, network.deviation, strict=True)
    for number, (mean, deviation, scale, shift, *both) in enumerate(rows):
        if number == _MOST_ROWS:
            table.caption = f"and {count - number} more channels"
            break
        stored, seen = ((f"{numbers[0]:.3f}", f"{numbers[1]:.3f}") for numbers in ((mean, deviation), both))
        table.add_row(str(number), *stored, format_numbers(scale), format_numbers(shift), *seen)
    return table


def _classes(manifest: Manifest, findings: Findings | None) -> str:
    names = list(manifest.classes)
    text = f"{len(names)}: " + ", ".join(names if len(names) <= 4 else [*names[:2], "...", names[-1]])
    if findings is not None:
        counts = [findings.labels[label] for label in range(len(names))]
        text += f"; {min(counts)} to {max(counts)} samples each"
    return text
