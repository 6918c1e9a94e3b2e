"""Another normalisation for shards that are written already: scale and shift stand in manifests alone."""

from dataclasses import replace
from pathlib import Path

import torch
from filelock import FileLock

from dcdit.data.autoencoder import load_autoencoder
from dcdit.data.latents import LatentScale, LatentShift, format_numbers
from dcdit.data.manifest import MANIFEST_NAME, Manifest
from dcdit.data.shards import Layout, read_samples
from dcdit.data.statistics import Sums, Tally, normalisation_of
from dcdit.errors import UserError
from dcdit.extraction.extraction import train_digest
from dcdit.extraction.settings import ExtractConfig
from dcdit.runtime.files import make_writable_folder


def renormalise(config: ExtractConfig, directory: Path) -> Manifest:
    """Give a finished extraction the scale and shift of ``config.normalise``, and those splits that follow it.

    Each manifest is replaced at once or not at all, as if the shards had been extracted so. After an interruption the
    same command does the rest.

    Args:
        config: of the command; its other keys are not used.
        directory: of the split.

    Raises:
        UserError: if the extraction is not finished, its split follows ``train``, or its shards are damaged.
    """
    manifest = Manifest.read(directory / MANIFEST_NAME)
    if manifest.normalise == "train":
        raise UserError(
            f"split={directory.name} has scale and shift of {directory.parent / 'train'}: renormalise that, which takes"
            " the other splits along (split=train)"
        )
    make_writable_folder(directory, "out")
    with FileLock(directory / ".extraction.lock"):
        if (directory / ".extraction").is_dir():
            raise UserError(f"out: the extraction to {directory} is not finished: finish it first")
        scale, shift = _scale_and_shift(config, manifest, directory)
        extraction = {**manifest.extraction}
        if extraction:
            extraction["normalise"] = config.normalise
        changed = replace(manifest, scale=scale, shift=shift, normalise=config.normalise, extraction=extraction)
        changed.write(directory)
    print(f"{directory}: scale {format_numbers(scale)}, shift {format_numbers(shift)}; the shards are as they were")
    if directory.name == "train":
        for path in sorted(directory.parent.glob(f"*/{MANIFEST_NAME}")):
            _follow(path.parent, changed)
    print("Runs that were trained on the latents before do not go on with these; their checkpoints stay as they are")
    return changed


def _scale_and_shift(config: ExtractConfig, manifest: Manifest, directory: Path) -> tuple[LatentScale, LatentShift]:
    """Scale and shift by ``config.normalise``, as an extraction would compute them."""
    if config.normalise == "autoencoder":
        autoencoder = load_autoencoder(manifest.autoencoder, torch.device("cpu"))
        if None not in (manifest.fingerprint, autoencoder.fingerprint) and (
            manifest.fingerprint != autoencoder.fingerprint
        ):
            raise UserError(
                f"autoencoder={autoencoder.name!r} has weights {autoencoder.fingerprint}, the latents were made with"
                f" {manifest.fingerprint}"
            )
        return autoencoder.scale, autoencoder.shift
    if config.normalise == "channel":
        return normalisation_of(manifest.statistics)
    sums, faults = list[Sums](), list[str]()
    for shard in manifest.shards:
        tally = Tally(manifest.latent_shape, manifest.representation, by_element=True)
        if not (directory / shard.name).is_file():
            raise UserError(f"{directory / shard.name} is missing: the command that wrote it writes it again")
        for _, _, array in read_samples(directory / shard.name, shard, Layout.of(manifest), faults):
            tally.add(array)
        if faults:
            raise UserError(f"{directory}: {faults[0]}: delete {shard.name}; the command that wrote it writes it again")
        sums.append(tally.sums)
    return Sums.total(sums).normalisation(manifest.latent_shape)


def _follow(directory: Path, train: Manifest) -> None:
    """Give a split that has scale and shift of ``train`` the new ones."""
    own = Manifest.read(directory / MANIFEST_NAME)
    if own.normalise == "train":
        extraction = {**own.extraction, "train": train_digest(train)} if own.extraction else own.extraction
        replace(own, scale=train.scale, shift=train.shift, extraction=extraction).write(directory)
        print(f"{directory}: the same scale and shift")
