"""Images to latent shards: ``python -m dcdit.extract source=/data/imagenet/train out=data/imagenet256``."""

import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import hydra
import torch
from omegaconf import DictConfig, OmegaConf
from rich.filesize import decimal

from dcdit.data.autoencoder import load_autoencoder
from dcdit.data.manifest import Manifest
from dcdit.errors import UserError
from dcdit.extraction.extraction import Extraction
from dcdit.extraction.settings import Settings
from dcdit.extraction.sources import FolderSource, ImageSource, TarSource
from dcdit.runtime.devices import cores, pick_device
from dcdit.runtime.processes import local_processes, processes
from dcdit.runtime.progress import Display
from dcdit.settings.entry import CONFIG_DIR, entry_point
from dcdit.settings.schema import call_checked

_LISTED = 10  # skipped images named in the summary


@dataclass(frozen=True)
class Request:
    """What to extract, and where; what shapes the bytes is in :class:`dcdit.extraction.settings.Settings`.

    Attributes:
        source: folder with a subfolder per class; or webdataset shards, as a folder or a path with braces.
        out: the shards go to ``<out>/<split>``.
        split: name of the split.
        classes: of webdataset shards: their number, or a text file with one name per line.
        autoencoder: see :func:`dcdit.data.autoencoder.load_autoencoder`.
        strict: stop at the first image that cannot be used.
        device: ``auto`` or a torch device.
        num_workers: processes that decode images; None takes this process's share of the cores.
    """

    source: str
    out: str
    split: str
    classes: Any = None
    autoencoder: str = "stabilityai/sd-vae-ft-ema"
    strict: bool = False
    device: str = "auto"
    num_workers: int | None = None

    def __post_init__(self) -> None:
        if self.num_workers is not None and self.num_workers < 0:
            raise UserError(f"num_workers={self.num_workers} is negative")
        if Path(self.split).name != self.split:
            raise UserError(f"split={self.split!r} is not the plain name of a folder")


def open_source(request: Request, settings: Settings) -> ImageSource:
    """Folders or webdataset shards, whichever ``source`` names; UserError if it is neither."""
    path = Path(request.source)
    directory = Path(request.out) / request.split
    if path.is_dir() and directory.resolve().is_relative_to(path.resolve()):
        raise UserError(
            f"out={request.out} with split={request.split} lies in source={request.source}, where the shards would be"
            " taken for a class: choose a place outside"
        )
    subfolders = path.is_dir() and any(child.is_dir() for child in path.iterdir())
    if path.is_dir() and (subfolders or not any(path.glob("*.tar"))):
        if request.classes is not None:
            raise UserError(f"classes={request.classes} is for webdataset shards; of folders the names are the classes")
        return FolderSource(path, settings.samples_per_shard, settings.seed)
    if not path.is_dir() and not request.source.endswith(".tar"):
        raise UserError(f"source={request.source} is no folder")
    return TarSource(request.source, class_names(request.classes))


def class_names(classes: Any) -> tuple[str, ...]:
    """Names from a number of classes or a text file; UserError for anything else."""
    if isinstance(classes, int) and classes > 0:
        return tuple(str(label) for label in range(classes))
    if isinstance(classes, str) and Path(classes).is_file():
        names = tuple(line.strip() for line in Path(classes).read_text().splitlines() if line.strip())
        if names:
            return names
    raise UserError(
        f"classes={classes}: webdataset shards hold labels only, give the number of classes, or a text file with one"
        " name per line"
    )


def run(config: DictConfig) -> Manifest | None:
    """Extract what ``config`` asks for; returns the manifest if this process finished the whole."""
    values: Any = OmegaConf.to_container(config, resolve=True)
    on_gpu = pick_device(str(values["device"])).type == "cuda"
    if values["precision"] == "auto":
        values["precision"] = "fp16" if on_gpu else "fp32"
    if on_gpu:
        values["threads"] = None
    elif values["threads"] is None:
        values["threads"] = cores()
    names = {column.name for column in fields(Settings)}
    settings = call_checked(Settings, {key: value for key, value in values.items() if key in names}, "")
    request = call_checked(Request, {key: value for key, value in values.items() if key not in names}, "")
    rank, world_size = processes()
    source = open_source(request, settings)
    device = pick_device(request.device)
    torch.backends.cudnn.benchmark = False  # it may choose other kernels, and other bits, in every run
    autoencoder = load_autoencoder(request.autoencoder, device)
    workers = request.num_workers
    if workers is None:
        workers = max(1, cores() // local_processes())
    directory = Path(request.out) / request.split
    extraction = Extraction(directory, source, autoencoder, settings, rank, world_size, workers, request.strict)
    if rank == 0:
        for remark in source.remarks:
            print(remark, file=sys.stderr)
    with Display(rank, "encoding", "shard") as display:
        try:
            manifest = extraction.run(display)
        except OSError as error:
            raise UserError(
                f"{error.filename or directory}: {error.strerror or error}. Finished shards are kept; the same command"
                " goes on from there"
            ) from error
        except KeyboardInterrupt:
            print("Finished shards are kept; the same command goes on from there.", file=sys.stderr)
            raise
    if manifest is not None and (extraction.ledger.concluded or (not display.began and rank == 0)):
        print("Done." if display.began else "Everything is there already.")
        report(manifest, directory)
    elif display.began:
        print(f"Process {rank} is done; what is left is written by other processes, or by the same command again.")
    return manifest


def report(manifest: Manifest, directory: Path) -> None:
    """Say what there is now."""
    size = sum(shard.bytes for shard in manifest.shards)
    print(
        f"{manifest.samples} images of {len(manifest.classes)} classes in {len(manifest.shards)} shards,"
        f" {decimal(size)}: {directory}"
    )
    for image in manifest.skipped:
        if image.file.endswith(".tar"):
            print(f"IMAGES ARE MISSING, how many is not known: {image.file}: {image.reason}")
    if manifest.skipped:
        print(f"{len(manifest.skipped)} files skipped, listed in {directory / 'manifest.json'}:")
        for image in manifest.skipped[:_LISTED]:
            print(f"  {image.file}: {image.reason}")
        if len(manifest.skipped) > _LISTED:
            print(f"  and {len(manifest.skipped) - _LISTED} more")
    print(f"Look at them: python -m dcdit.inspect_latents directory={directory.parent} split={directory.name}")


@hydra.main(version_base="1.3", config_path=CONFIG_DIR, config_name="extract")
def main(config: DictConfig) -> None:
    """Hydra entry point."""
    run(config)


if __name__ == "__main__":
    entry_point(main)
