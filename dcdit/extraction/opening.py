"""Opens the source that a command names."""

import os
from pathlib import Path

from dcdit.checks import check_credentials
from dcdit.data.download import scheme_of
from dcdit.data.stores import STORES
from dcdit.errors import UserError
from dcdit.extraction.classes import WantedClasses
from dcdit.extraction.folders import FolderSource, has_subfolders
from dcdit.extraction.readers import Auto
from dcdit.extraction.settings import ExtractConfig
from dcdit.extraction.sources import ImageSource, Request
from dcdit.extraction.store_folders import StoreFolderSource
from dcdit.extraction.tars import TarSource


def open_source(config: ExtractConfig, directory: Path, train: tuple[str, ...] | None) -> ImageSource:
    """The images that ``source`` and ``reader`` name.

    Args:
        config: of the command.
        directory: where the shards go.
        train: classes of the train split, which hold for all splits; None if there is none.

    Raises:
        UserError: if they are not there, or their classes are others.
    """
    assert config.source is not None  # which renormalises what is there
    check_credentials(config.source)
    path = Path(config.source)
    if path.is_dir() and Path(os.path.realpath(directory)).is_relative_to(os.path.realpath(path)):
        raise UserError(
            f"out={config.out} with split={config.split} lies in source={config.source}, where the shards would be"
            " taken for images: choose a place outside"
        )
    wanted = None if config.classes is None else WantedClasses.of_key(config.classes)
    if train and wanted and (len(wanted.names) != len(train) or (wanted.recorded and wanted.names != train)):
        raise UserError(
            f"classes={config.classes} are not the {len(train)} classes of {directory.parent / 'train'}, which"
            " hold for all splits: leave classes out"
        )
    if isinstance(config.classes, int) and config.reader.names_classes:
        raise UserError(
            f"classes={config.classes}: reader={config.reader.name} names its classes, leave their number out"
        )
    wanted = WantedClasses.of_train(train) if train else wanted
    return config.reader.open(Request(config.source, config.samples_per_shard, config.seed, config.classes, wanted))


def open_folders_or_tars(settings: Auto, request: Request) -> ImageSource:
    """Class folders or webdataset shards, whichever is there; UserError if it is neither."""
    path, scheme = Path(request.source), scheme_of(request.source)
    in_store = scheme in STORES and not request.source.endswith(".tar")
    if in_store or (path.is_dir() and (has_subfolders(path) or not any(path.glob("*.tar")))):
        if isinstance(request.given, int):
            raise UserError(
                f"classes={request.given} is for webdataset shards; of folders the names are the classes. A text file"
                " of these names says their order"
            )
        folders = (request.per_task, request.seed, request.classes)
        return StoreFolderSource(request.source, *folders) if in_store else FolderSource(path, *folders)
    if scheme and not path.exists():
        listed = ", ".join(f"{store}://" for store in STORES)
        raise UserError(
            f"source={request.source}: images are read from a folder, or from class folders behind {listed}; tar files"
            " must lie on a local disk, so copy them first (aws s3 sync, gcloud storage rsync, hf download)"
        )
    if not path.is_dir() and not request.source.endswith(".tar"):
        remedy = ": unpack it, and give the folder that has one for each class" if path.is_file() else ""
        raise UserError(f"source={request.source} is no folder{remedy}")
    if request.classes is None:
        raise UserError(
            "classes is not set: webdataset shards hold labels only, give the number of classes, or a text file with"
            " one name per line; a tar file of class folders: unpack it"
        )
    return TarSource(request.source, request.classes.names, f"of {request.classes.origin}")
