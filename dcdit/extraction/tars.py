"""Images in webdataset shards: tar files of samples, each of an image and its label."""

import json
import math
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

from typing_extensions import override
from webdataset.shardlists import expand_urls

from dcdit.checks import shown, visible
from dcdit.data.manifest import Skipped
from dcdit.errors import UserError
from dcdit.extraction.sources import (
    ImageSource,
    Item,
    Listing,
    UnreadableError,
    UnusableImageError,
    ending_of,
    is_image,
    is_service,
)
from dcdit.runtime.files import open_regular

CORRUPT_TAR = "the tar file is corrupt"

_LARGEST_LABEL = 16 << 20  # bytes
_MOST_TARS = 100_000
_PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
"""The first bytes of compressed files, and the name of the format."""


class TarSource(ImageSource):
    """Webdataset shards of images, one task each: samples of an image and a ``.cls``, or a ``.json`` with a label.

    A sample may have several images; each is used. The label of ``a.b.png`` is that of ``a.b.cls``, else of ``a.cls``.

    Args:
        pattern: a folder of tar files, or their paths with braces, such as ``train-{000..146}.tar``.
        classes: class names.
        class_order: where these come from.

    Raises:
        UserError: if there are no such files, or they are compressed.
    """

    def __init__(self, pattern: str, classes: tuple[str, ...], class_order: str = "given") -> None:
        self._paths = _paths(pattern)
        for path in self._paths:
            try:
                with open_regular(Path(path)) as file:
                    start = file.read(6)
            except FileNotFoundError:
                raise UserError(
                    f"source={pattern}: there is no file {path}; image shards must lie on a local disk"
                ) from None
            for magic, name in _PACKED.items():
                if start.startswith(magic):
                    raise UserError(f"source={pattern}: {path} is compressed with {name}: unpack it to a plain tar")
        self.classes, self.class_order, self.tasks = classes, class_order, len(self._paths)
        self.inventory = {os.path.basename(path): f"{os.path.getsize(path)} bytes" for path in self._paths}
        if len(self.inventory) < len(self._paths):
            raise UserError(f"source={pattern}: two tar files have the same name")

    @override
    def items(self, task: int) -> Listing:
        path = self._paths[task]
        listing = Listing()
        for sample in _samples(path, listing):
            images = [name for name in sample if is_image(name)]
            if not images:
                listing.others.update(visible(ending_of(name)) for name in sample)
            for image in images:
                item = sample[image]
                try:
                    label = _label(image, sample)
                except UnusableImageError as error:
                    listing.skip(item.source, str(error))
                    continue
                except UnreadableError as error:
                    raise UnreadableError(f"{item.source}: {error}") from error
                if not 0 <= label < len(self.classes):
                    raise UserError(
                        f"{item.source}: label {shown(label)} is none of {len(self.classes)} classes, set classes=..."
                    )
                listing.items.append(replace(item, label=label))
        listing.notes += [Skipped(os.path.basename(path), note) for note in listing.describe_left_out()]
        return listing


def _paths(pattern: str) -> list[str]:
    """The tar files in the folder ``pattern``, else those that it stands for."""
    folder = Path(pattern)
    if folder.is_dir():
        return sorted(str(path) for path in folder.glob("*.tar") if not is_service(path.name))
    if math.prod(map(_alternatives, re.findall(r"\{([^{}]*)\}", pattern))) > _MOST_TARS:
        raise UserError(f"source={pattern} stands for more than {_MOST_TARS} files: give fewer at once")
    try:
        paths: list[str] = expand_urls(pattern)
    except ValueError as error:
        raise UserError(f"source={pattern}: {error}: braces are written as in train-{{000..146}}.tar") from error
    return paths


def _alternatives(braces: str) -> int:
    """The number of texts that a pair of braces expands to."""
    numbers = re.fullmatch(r"(-?\d{1,18})\.\.(-?\d{1,18})(\.\..*)?", braces)
    return abs(int(numbers[2]) - int(numbers[1])) + 1 if numbers else 52 if ".." in braces else braces.count(",") + 1


def _samples(path: str, listing: Listing) -> Iterator[dict[str, Item]]:
    """The files of one sample after the other, by name; what cannot be used is added to ``listing``."""
    shard = os.path.basename(path)
    for _, members in groupby(_members(path, listing), key=lambda member: _parts(member.name)[0]):
        sample: dict[str, Item] = {}
        for member in members:
            name = f"{shard}/{member.name}"
            if member.name in sample:
                listing.skip(name, "a second file of this name")
            else:  # the label is not known yet
                sample[member.name] = Item(0, visible(name), path, (member.offset_data, member.size))
        yield sample


def _members(path: str, listing: Listing) -> Iterator[tarfile.TarInfo]:
    """The regular files of a tar file, hidden ones left out; where it is corrupt, those before the fault."""
    shard, last = os.path.basename(path), "its beginning"
    try:
        with open_regular(Path(path)) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if member.size < 0:
                    raise tarfile.ReadError("a member of negative size")
                last = member.name
                if any(map(is_service, member.name.split("/"))):
                    listing.hidden += 1
                elif member.isreg() and not member.issparse():
                    yield member
                elif not member.isdir() and is_image(member.name):
                    listing.skip(f"{shard}/{member.name}", "a link, or no regular file")
            file.seek(tar.offset)
            if file.read(1 << 20).strip(b"\0"):  # where tarfile sees an end, whatever is there instead
                raise tarfile.ReadError("what follows is no part of the archive")
    except UserError as error:
        raise UnreadableError(str(error)) from error
    except (tarfile.TarError, OSError, EOFError, ValueError, OverflowError, MemoryError, RecursionError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise UnreadableError(
                f"{path} cannot be read ({error.strerror}): see that its disk is connected"
            ) from error
        listing.skipped.append(Skipped(shard, visible(f"{CORRUPT_TAR} after {last}: {error}")))


def _parts(name: str) -> tuple[str, list[str]]:
    """Key of a member by webdataset's rule, up to the first dot of the file's name; and what lies between the dots."""
    folder, slash, file = name.rpartition("/")
    stem, *others = file.split(".")
    return f"{folder}{slash}{stem}", others


def _label(image: str, sample: dict[str, Item]) -> int:
    """The label of an image by the file that shares most of its name; UnusableImageError if there is none."""
    by_name = {name.lower(): item for name, item in sample.items()}
    key, parts = _parts(image.lower())
    for length in range(len(parts) - 1, -1, -1):
        base = ".".join([key, *parts[:length]])
        for ending in ("cls", "json"):
            if item := by_name.get(f"{base}.{ending}"):
                return _read_label(item.read(_LARGEST_LABEL), ending)
    raise UnusableImageError("no label beside it: .cls, or .json with a label; unpack a tar file of class folders")


def _read_label(content: bytes, ending: str) -> int:
    try:
        label: Any = json.loads(content)["label"] if ending == "json" else content.decode("utf-8-sig")
        number = int(label)
        if isinstance(label, bool) or (isinstance(label, float) and number != label):
            raise ValueError
        return number
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        raise UnusableImageError(f"its .{ending} holds no label, which is a whole number") from None
