"""Where images to encode come from: folders with a subfolder per class, or webdataset shards of images."""

import hashlib
import json
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from webdataset.shardlists import expand_urls

from dcdit.data.manifest import Skipped
from dcdit.errors import UserError

_IMAGE_TYPES = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "gif", "ppm", "pgm", "img")


@dataclass(frozen=True)
class Item:
    """An image that has not been read yet.

    Attributes:
        label: class label.
        source: its name, for messages.
        path: file that holds it.
        span: offset and length within the file; None for the whole file.
    """

    label: int
    source: str
    path: str | bytes
    span: tuple[int, int] | None = None

    def read(self) -> bytes:
        """The image's bytes; raises OSError."""
        with open(self.path, "rb") as file:
            if self.span is None:
                return file.read()
            file.seek(self.span[0])
            content = file.read(self.span[1])
            if len(content) < self.span[1]:
                raise OSError("the tar file ends within it")
            return content


class ImageSource(Protocol):
    """Images in tasks, each of which becomes a shard.

    Attributes:
        classes: class names.
        tasks: number of tasks.
        inventory: what there is, by folder or file: a change between two runs shows here.
        skipped: files that belong to no class.
        remarks: what a person should know.
    """

    classes: tuple[str, ...]
    tasks: int
    inventory: dict[str, str]
    skipped: tuple[Skipped, ...]
    remarks: tuple[str, ...]

    def size(self, task: int) -> int | None:
        """Number of files in a task; None if only reading would tell."""

    def items(self, task: int) -> tuple[list[Item], list[Skipped]]:
        """The images of a task, and what in it is none; UserError for a label that is no class."""


class FolderSource:
    """A folder with one subfolder per class; images may lie at any depth below it. Shuffled once, by seed.

    Args:
        root: the folder.
        per_task: images of a task.
        seed: of the shuffle.

    Raises:
        UserError: if a folder cannot be read, or holds no class.
    """

    def __init__(self, root: Path, per_task: int, seed: int) -> None:
        self._root = root
        self._per_task = per_task
        stray, folders = [], []
        for entry in _scan(root):
            if entry.is_dir() and not entry.name.startswith("."):
                folders.append(entry.name)
            else:
                stray.append(Skipped(entry.name, "lies in no class folder"))
        self.classes = tuple(sorted(folders))
        if not folders:
            raise UserError(f"source={root} has no subfolders: put the images of each class into one of its own")
        paths: list[bytes] = []
        labels: list[int] = []
        self.inventory: dict[str, str] = {}
        remarks = []
        for label, name in enumerate(self.classes):
            found = sorted(_walk(root / name, (os.path.realpath(root),)))
            files = [os.fsencode(os.path.relpath(path, root)) for path, _ in found]
            content = b"".join(b"%b %d\n" % (file, size) for file, (_, size) in zip(files, found, strict=True))
            digest = hashlib.sha256(content).hexdigest()[:8]
            self.inventory[name] = f"{len(files)} files, names and sizes {digest}"
            paths += files
            labels += [label] * len(files)
            if not files:
                remarks.append(f"class {name!r} is empty")
        if not paths:
            raise UserError(f"source={root}: its {len(folders)} class folders hold no files")
        order = np.random.default_rng(seed).permutation(len(paths))
        # Arrays, not lists: reference counts would copy them into every worker process.
        self._paths = np.array(paths)[order]
        self._labels = np.array(labels)[order]
        self.tasks = -(-len(paths) // per_task)
        self.skipped = tuple(stray)
        self.remarks = tuple(remarks)

    def size(self, task: int) -> int | None:
        """See :class:`ImageSource`."""
        return min(self._per_task, len(self._labels) - task * self._per_task)

    def items(self, task: int) -> tuple[list[Item], list[Skipped]]:
        """See :class:`ImageSource`."""
        rows = slice(task * self._per_task, (task + 1) * self._per_task)
        root = os.fsencode(self._root)
        return [
            Item(int(label), os.fsdecode(path), os.path.join(root, path))
            for path, label in zip(self._paths[rows].tolist(), self._labels[rows], strict=True)
        ], []


class TarSource:
    """Webdataset shards of images, one task each: samples of an image and a ``.cls``, or a ``.json`` with a label.

    Args:
        pattern: a folder of tar files, or their paths with braces, such as ``train-{000..146}.tar``.
        classes: class names.

    Raises:
        UserError: if there are no such files.
    """

    def __init__(self, pattern: str, classes: tuple[str, ...]) -> None:
        folder = Path(pattern)
        self._paths = sorted(map(str, folder.glob("*.tar"))) if folder.is_dir() else expand_urls(pattern)
        for path in self._paths:
            if not os.path.isfile(path):
                raise UserError(f"source={pattern}: there is no file {path}; image shards must lie on a local disk")
        self.classes = classes
        self.tasks = len(self._paths)
        self.inventory = {os.path.basename(path): f"{os.path.getsize(path)} bytes" for path in self._paths}
        self.skipped: tuple[Skipped, ...] = ()
        self.remarks: tuple[str, ...] = ()
        if len(self.inventory) < len(self._paths):
            raise UserError(f"source={pattern}: two tar files have the same name")

    def size(self, task: int) -> int | None:
        """See :class:`ImageSource`."""
        return None

    def items(self, task: int) -> tuple[list[Item], list[Skipped]]:
        """See :class:`ImageSource`."""
        path = self._paths[task]
        shard = os.path.basename(path)
        items: list[Item] = []
        skipped: list[Skipped] = []
        for key, members in _samples(path, skipped):
            images = [ext for ext in members if ext.lower().rsplit(".", 1)[-1] in _IMAGE_TYPES]
            name = f"{shard}/{key}"
            label = _label(path, members)
            if label is None or not images:
                skipped.append(Skipped(name, "no image" if not images else "no label: .cls, or .json with a label"))
                continue
            if not 0 <= label < len(self.classes):
                raise UserError(f"{name}: label {label} is none of {len(self.classes)} classes, set classes=...")
            items.append(Item(label, name, path, members[images[0]]))
        return items, skipped


def _scan(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {error.strerror}; nothing has been encoded") from error


def image_files(root: Path) -> list[tuple[str, int, int]]:
    """Path below ``root``, size and time of change of every image file; UserError if a folder is unreadable."""
    found = []
    for path, size in _walk(root, ()):
        if path.lower().rsplit(".", 1)[-1] in _IMAGE_TYPES and size >= 0:
            found.append((os.path.relpath(path, root), size, os.stat(path).st_mtime_ns))
    return sorted(found)


def _walk(folder: Path, above: tuple[str, ...]) -> Iterator[tuple[str, int]]:
    """All files below ``folder`` with their sizes; links are followed, but not into a folder above."""
    real = os.path.realpath(folder)
    if real in above:
        return
    for entry in _scan(folder):
        if entry.is_dir():
            yield from _walk(Path(entry.path), (*above, real))
        else:
            try:
                yield entry.path, entry.stat().st_size
            except OSError:  # a link to nowhere; whoever reads it says so
                yield entry.path, -1


def _samples(path: str, skipped: list[Skipped]) -> Iterator[tuple[str, dict[str, tuple[int, int]]]]:
    """Keys of a tar file's samples with offset and length of each member by extension; complaints go to ``skipped``."""
    current, members = "", dict[str, tuple[int, int]]()
    shard = os.path.basename(path)
    try:
        with tarfile.open(path) as tar:
            for member in tar:
                if not member.isfile():
                    continue
                folder, _, file = member.name.rpartition("/")
                stem, _, extension = file.partition(".")
                key = f"{folder}/{stem}" if folder else stem
                if key != current and members:
                    yield current, members
                    members = {}
                current = key
                if extension in members:
                    skipped.append(Skipped(f"{shard}/{member.name}", "a second file of this name"))
                else:
                    members[extension] = (member.offset_data, member.size)
    except (tarfile.TarError, OSError, EOFError) as error:
        skipped.append(Skipped(shard, f"the tar file is corrupt after {current or 'its beginning'}: {error}"))
    if members:
        yield current, members


def _label(path: str, members: dict[str, tuple[int, int]]) -> int | None:
    """The label of a sample, or None."""
    try:
        if "cls" in members:
            return int(Item(0, "", path, members["cls"]).read())
        if "json" in members:
            return int(json.loads(Item(0, "", path, members["json"]).read())["label"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None
