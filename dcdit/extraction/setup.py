"""Builds an extraction from its configuration, and summarises its result."""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.filesize import decimal

from dcdit.checkpoints.encoder import EncoderKeys, load_encoder
from dcdit.checks import shown
from dcdit.data.autoencoder import load_autoencoder
from dcdit.data.latents import format_numbers
from dcdit.data.manifest import MANIFEST_NAME, MOMENTS, SAMPLE, Manifest
from dcdit.errors import UserError
from dcdit.extraction.classes import describe_empty_classes
from dcdit.extraction.extraction import Extraction
from dcdit.extraction.opening import open_source
from dcdit.extraction.settings import ExtractConfig
from dcdit.extraction.sources import ImageSource
from dcdit.extraction.tars import CORRUPT_TAR
from dcdit.runtime.devices import pick_device
from dcdit.runtime.processes import cores

_KEYS = EncoderKeys("encoder", "encoder_weights", "encoder_grid")
_LISTED = 10  # skipped images named in the summary


def set_up_extraction(config: ExtractConfig, directory: Path, rank: int, world_size: int, workers: int) -> Extraction:
    """Process ``rank`` of the extraction to ``directory``, with ``workers`` processes that decode images.

    Raises:
        UserError: if there is no such source or autoencoder, or they do not fit the settings.
    """
    device, settings = pick_device(config.device), config.shaping  # in which what depends on the device is filled in
    on_gpu = device.type == "cuda"
    if settings.precision == "auto":
        settings = replace(settings, precision="fp16" if on_gpu else "fp32")
    settings = replace(settings, threads=None if on_gpu else settings.threads or cores())
    train = _train_split(directory)
    source = open_source(config, directory, train.classes if train else None)
    torch.backends.cudnn.benchmark = False  # it may choose other kernels, and other bits, in every run
    autoencoder = load_autoencoder(config.autoencoder, device)
    if settings.representation == "auto":
        settings = replace(settings, representation=MOMENTS if autoencoder.random else SAMPLE)
    encoder = None
    if settings.companion == "features":
        grid = settings.encoder_grid or round(settings.image_size / 16)
        encoder = load_encoder(settings.encoder, config.encoder_weights, grid, _KEYS).to(device)
        settings = replace(settings, encoder_grid=grid)
    if rank == 0:
        for note in [*source.notes, *_describe_train(directory, train, source)]:
            print(note, file=sys.stderr)
    return Extraction(
        *(directory, source, autoencoder, settings, rank, world_size, workers, config.strict, config.corrupt_limit),
        encoder=encoder,
        train=train,
    )


def _train_split(directory: Path) -> Manifest | None:
    """The manifest of the train split beside another; None if there is none. UserError if it is not finished."""
    train = directory.parent / "train"
    if directory.name == train.name:
        return None
    if (train / MANIFEST_NAME).is_file():
        return Manifest.read(train / MANIFEST_NAME)
    if (train / ".extraction").is_dir():
        raise UserError(
            f"split={directory.name}: {train} is not finished, whose classes, scale and shift hold for all splits:"
            " finish it first"
        )
    return None


def _describe_train(directory: Path, train: Manifest | None, source: ImageSource) -> list[str]:
    """Sentences that say where classes, scale and shift come from."""
    if train:
        return [f"Classes, scale and shift are those of {directory.parent / 'train'}"]
    names = [shown(name) for name in source.classes]
    listed = ", ".join(names if len(names) <= 4 else [*names[:2], "...", names[-1]])
    order = [f"{len(names)} classes in the order {source.class_order}: {listed}"]
    if directory.name == "train":
        return order
    return [
        *order,
        f"There is no {directory.parent / 'train'}: {directory.name} gets classes, scale and shift of its own. To"
        " train on both, extract train first",
    ]


def extraction_summary(manifest: Manifest, directory: Path, empty: Sequence[str]) -> str:
    """The lines that a finished extraction prints; ``empty`` are the classes that are known to have no images."""
    size = sum(shard.bytes for shard in manifest.shards)
    lines = [
        f"{manifest.samples} images of {len(manifest.classes)} classes in {len(manifest.shards)} shards,"
        f" {decimal(size)}: {directory}"
    ]
    scale, shift = format_numbers(manifest.scale), format_numbers(manifest.shift)
    lines.append(f"The network sees (latent - shift) * scale: scale {scale}, shift {shift}")
    if warning := manifest.describe_unusual():
        lines.append(warning)
    if empty:
        lines.append(describe_empty_classes(empty, len(manifest.classes)))
    lost = [image for image in manifest.skipped if image.reason.startswith(CORRUPT_TAR)]
    lines += [f"IMAGES ARE MISSING, how many is not known: {image.file}: {image.reason}" for image in lost]
    if manifest.skipped:
        lines.append(f"{len(manifest.skipped)} files skipped, listed in {directory / 'manifest.json'}:")
        lines += [f"  {image.file}: {image.reason}" for image in manifest.skipped[:_LISTED]]
        if len(manifest.skipped) > _LISTED:
            lines.append(f"  and {len(manifest.skipped) - _LISTED} more")
    where = str(directory.parent)
    if "," in where:  # where Hydra would see a sweep
        where = "'" + where.replace("'", "\\'") + "'"
    arguments = shlex.join([f"directory={where}", f"split={directory.name}"])
    return "\n".join([*lines, f"Look at them: python -m dcdit.inspect_latents {arguments}"])
