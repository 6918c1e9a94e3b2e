"""Builds an extraction from its configuration, and summarises its result."""

import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.filesize import decimal

from dcdit.checkpoints.encoder import EncoderKeys, load_encoder
from dcdit.checks import visible
from dcdit.data.autoencoder import load_autoencoder
from dcdit.data.latents import format_numbers
from dcdit.data.manifest import MANIFEST_NAME, MOMENTS, SAMPLE, Manifest
from dcdit.errors import UserError
from dcdit.extraction.extraction import Extraction
from dcdit.extraction.folders import FolderSource, has_subfolders
from dcdit.extraction.settings import ExtractConfig
from dcdit.extraction.sources import ImageSource, describe_empty_classes
from dcdit.extraction.tars import CORRUPT_TAR, TarSource
from dcdit.runtime.devices import pick_device
from dcdit.runtime.files import read_text
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
    source = _open_source(config, directory, train)
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
        for note in [*source.notes, *_describe_train(directory, train)]:
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


def _describe_train(directory: Path, train: Manifest | None) -> list[str]:
    """Sentences that say whether classes, scale and shift of a split are those of the train split."""
    if directory.name == "train":
        return []
    if train is None:
        return [
            f"There is no {directory.parent / 'train'}: {directory.name} gets classes, scale and shift of its own. To"
            " train on both, extract train first"
        ]
    return [f"Classes, scale and shift are those of {directory.parent / 'train'}"]


def _open_source(config: ExtractConfig, directory: Path, train: Manifest | None) -> ImageSource:
    """Folders or webdataset shards, whichever ``source`` names, with the classes of ``train`` if that is given.

    Raises:
        UserError: if it is neither, or its classes are others.
    """
    path = Path(config.source)
    if path.is_dir():
        if Path(os.path.realpath(directory)).is_relative_to(os.path.realpath(path)):
            raise UserError(
                f"out={config.out} with split={config.split} lies in source={config.source}, where the shards would be"
                " taken for a class: choose a place outside"
            )
        if has_subfolders(path) or not any(path.glob("*.tar")):
            if config.classes is not None:
                raise UserError(
                    f"classes={config.classes} is for webdataset shards; of folders the names are the classes"
                )
            return FolderSource(path, config.samples_per_shard, config.seed, train.classes if train else None)
    elif not config.source.endswith(".tar"):
        remedy = ": unpack it, and give the folder that has one for each class" if path.is_file() else ""
        raise UserError(f"source={config.source} is no folder{remedy}")
    if train is None:
        return TarSource(config.source, class_names(config.classes))
    names = train.classes if config.classes is None else class_names(config.classes)
    if len(names) != len(train.classes) or (isinstance(config.classes, str) and names != train.classes):
        raise UserError(
            f"classes={config.classes} are not the {len(train.classes)} classes of {directory.parent / 'train'}, which"
            " hold for all splits: leave classes out"
        )
    return TarSource(config.source, train.classes)


def class_names(classes: int | str | None) -> tuple[str, ...]:
    """Names from a number of classes or a text file; UserError for anything else."""
    if isinstance(classes, int):
        return tuple(str(label) for label in range(classes))
    if isinstance(classes, str) and Path(classes).is_file():
        names = tuple(map(str.strip, read_text(Path(classes)).removeprefix("\ufeff").rstrip().split("\n")))
        for number, name in enumerate(names, 1):
            if not name or visible(name) != name:
                fault = "holds control characters" if name else "is empty"
                raise UserError(f"classes={classes}: line {number} {fault}; each line is the name of a class")
        return names
    raise UserError(
        f"classes={classes}: webdataset shards hold labels only, give the number of classes, or a text file with one"
        " name per line; a tar file of class folders: unpack it"
    )


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
