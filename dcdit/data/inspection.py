"""What is in a directory of latent shards: read, checked and summed up for people."""

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.filesize import decimal
from rich.progress import track
from rich.table import Table
from torch import Tensor

from dcdit.data.autoencoder import network_latents
from dcdit.data.latents import deviation_remark
from dcdit.data.manifest import MOMENTS, Manifest, Shard
from dcdit.data.shards import CorruptSampleError, Layout
from dcdit.data.storage import Location
from dcdit.errors import UserError
from dcdit.runtime.files import file_digest


@dataclass
class Findings:
    """What reading the shards brought to light.

    Attributes:
        faults: what is wrong, with shard and key.
        labels: samples of each label.
    """

    faults: list[str] = field(default_factory=list)
    labels: Counter[int] = field(default_factory=Counter)


def samples(path: Path, shard: Shard, layout: Layout, faults: list[str]) -> Iterator[tuple[int, bool, NDArray[Any]]]:
    """Label, whether flipped, and stored array of all in a shard; faults are noted and passed over."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        for index in range(shard.samples):
            for hflip in (False, True)[: 1 + layout.hflip]:
                row = np.empty(layout.array_bytes, np.uint8)
                try:
                    label = layout.read(descriptor, index, hflip, row)
                except CorruptSampleError as error:
                    faults.append(f"{shard.name}, sample {index}: {error}")
                    continue
                yield label, hflip, row.view(layout.dtype).reshape(layout.stored_shape)
    finally:
        os.close(descriptor)


def verify(location: Location, manifest: Manifest, console: Console) -> Findings:
    """Read all shards: their checksums, those of the samples, and the labels."""
    findings, layout = Findings(), Layout.of(manifest)
    for shard in track(manifest.shards, "checking", console=console, disable=not console.is_terminal):
        try:
            path = location.fetch(shard)
            if file_digest(path) != shard.sha256:
                findings.faults.append(f"{shard.name}: the checksum of the file differs")
            for label, hflip, _ in samples(path, shard, layout, findings.faults):
                if not 0 <= label < len(manifest.classes):
                    findings.faults.append(f"{shard.name}: label {label} is none of {len(manifest.classes)} classes")
                findings.labels[label] += not hflip
        except OSError as error:
            findings.faults.append(f"{shard.name}: {error}")
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


def latents_table(location: Location, manifest: Manifest, stored: Tensor, findings: Findings | None) -> Table:
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
        "samples": f"{manifest.samples}" + (", each also flipped" if manifest.hflip else ""),
        "shards": f"{len(sizes)} of {min(sizes)} to {max(sizes)} samples, {decimal(total)}",
        "latents": f"{channels} x {height} x {width}, {kind}, {manifest.dtype}",
        "autoencoder": f"{manifest.autoencoder}, weights {manifest.fingerprint or 'none'}",
        "scale, shift": f"{manifest.scale}, {manifest.shift}",
        "for the network": f"deviation {deviations}; mean {means} (by channel, {len(stored)} latents)",
        "classes": _classes(manifest, findings),
        "skipped images": f"{len(manifest.skipped)}",
    }
    if remark := deviation_remark(float(latents.std())):
        rows["attention"] = remark
    if height == width:
        rows["to train on them"] = (
            f"model.grid={height} model.channels={channels} model.num_classes={len(manifest.classes)}"
        )
    if findings is not None:
        rows["checksums"] = "all right" if not findings.faults else f"{len(findings.faults)} faults"
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
