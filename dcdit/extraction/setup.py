"""From what a user says about an extraction to what extracts, and a extraction_summary of what there is then."""

import sys
from dataclasses import replace
from pathlib import Path

import torch
from rich.filesize import decimal

from dcdit.data.autoencoder import load_autoencoder
from dcdit.data.latents import number_words
from dcdit.data.manifest import MOMENTS, SAMPLE, Manifest
from dcdit.errors import UserError
from dcdit.extraction.extraction import Extraction
from dcdit.extraction.settings import ExtractionSettings, ExtractSettings
from dcdit.extraction.sources import FolderSource, ImageSource, TarSource
from dcdit.runtime.devices import pick_device
from dcdit.runtime.processes import cores

_LISTED = 10  # skipped images named in the extraction_summary


def set_up_extraction(
    wanted: ExtractSettings, settings: ExtractionSettings, directory: Path, rank: int, world_size: int, workers: int
) -> Extraction:
    """One process of the extraction that is asked for.

    Args:
        wanted: images, autoencoder and device.
        settings: what shapes the bytes; what depends on the device is filled in.
        directory: receives shards and manifest.
        rank, world_size: this process among all.
        workers: processes that decode images.

    Raises:
        UserError: if there is no such source or autoencoder, or they do not fit the settings.
    """
    device = pick_device(wanted.device)
    on_gpu = device.type == "cuda"
    if settings.precision == "auto":
        settings = replace(settings, precision="fp16" if on_gpu else "fp32")
    settings = replace(settings, threads=None if on_gpu else settings.threads or cores())
    source = open_source(wanted, settings, directory)
    torch.backends.cudnn.benchmark = False  # it may choose other kernels, and other bits, in every run
    autoencoder = load_autoencoder(wanted.autoencoder, device)
    if settings.representation == "auto":
        settings = replace(settings, representation=MOMENTS if autoencoder.random else SAMPLE)
    if rank == 0:
        for remark in source.remarks:
            print(remark, file=sys.stderr)
    return Extraction(
        directory, source, autoencoder, settings, rank, world_size, workers, wanted.strict, wanted.corrupt_limit
    )


def open_source(wanted: ExtractSettings, settings: ExtractionSettings, directory: Path) -> ImageSource:
    """Folders or webdataset shards, whichever ``source`` names; UserError if it is neither."""
    path = Path(wanted.source)
    if path.is_dir() and directory.resolve().is_relative_to(path.resolve()):
        raise UserError(
            f"out={wanted.out} with split={wanted.split} lies in source={wanted.source}, where the shards would be"
            " taken for a class: choose a place outside"
        )
    subfolders = path.is_dir() and any(child.is_dir() for child in path.iterdir())
    if path.is_dir() and (subfolders or not any(path.glob("*.tar"))):
        if wanted.classes is not None:
            raise UserError(f"classes={wanted.classes} is for webdataset shards; of folders the names are the classes")
        return FolderSource(path, settings.samples_per_shard, settings.seed)
    if not path.is_dir() and not wanted.source.endswith(".tar"):
        raise UserError(f"source={wanted.source} is no folder")
    return TarSource(wanted.source, class_names(wanted.classes))


def class_names(classes: int | str | None) -> tuple[str, ...]:
    """Names from a number of classes or a text file; UserError for anything else."""
    if isinstance(classes, int):
        return tuple(str(label) for label in range(classes))
    if isinstance(classes, str) and Path(classes).is_file():
        names = tuple(line.strip() for line in Path(classes).read_text().splitlines() if line.strip())
        if names:
            return names
    raise UserError(
        f"classes={classes}: webdataset shards hold labels only, give the number of classes, or a text file with one"
        " name per line"
    )


def extraction_summary(manifest: Manifest, directory: Path) -> str:
    """What there is now, in words."""
    size = sum(shard.bytes for shard in manifest.shards)
    lines = [
        f"{manifest.samples} images of {len(manifest.classes)} classes in {len(manifest.shards)} shards,"
        f" {decimal(size)}: {directory}"
    ]
    scale, shift = number_words(manifest.scale), number_words(manifest.shift)
    lines.append(f"The network sees (latent - shift) * scale: scale {scale}, shift {shift}")
    seen = manifest.spec.seen(manifest.statistics)
    if seen and (remark := seen.remark()):
        lines.append(remark)
    lost = [image for image in manifest.skipped if image.file.endswith(".tar")]
    lines += [f"IMAGES ARE MISSING, how many is not known: {image.file}: {image.reason}" for image in lost]
    if manifest.skipped:
        lines.append(f"{len(manifest.skipped)} files skipped, listed in {directory / 'manifest.json'}:")
        lines += [f"  {image.file}: {image.reason}" for image in manifest.skipped[:_LISTED]]
        if len(manifest.skipped) > _LISTED:
            lines.append(f"  and {len(manifest.skipped) - _LISTED} more")
    where = f"directory={directory.parent} split={directory.name}"
    return "\n".join([*lines, f"Look at them: python -m dcdit.inspect_latents {where}"])
