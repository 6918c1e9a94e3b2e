"""Sources of images to encode: folders with a subfolder per class, or webdataset shards of images."""

import hashlib
import json
import math
import os
import re
import stat
import tarfile
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from typing_extensions import override
from webdataset.shardlists import expand_urls

from dcdit.checks import shown, visible
from dcdit.data.manifest import Skipped
from dcdit.errors import UserError
from dcdit.runtime.files import open_regular

IMAGE_TYPES = re.compile("jpe?g|jpe|jfif|a?png|webp|bmp|tiff?|gif|p[gbpnf]m|avif|img")
"""Endings of names, in lower case, of files that are taken for images; in folders, so are names without an ending."""

_OTHER_IMAGES = {"heic", "heif", "jxl", "jp2", "psd", "dng", "cr2", "cr3", "nef", "arw", "raw", "svg", "eps", "pdf"}
"""Endings of images that Pillow does not decode, or not without another program."""

CORRUPT_TAR = "the tar file is corrupt"

_SERVICE = re.compile(
    r"__macosx|@eadir|#recycle|#snapshot|\$recycle\.bin|system volume information|lost\+found|__pycache__"
    r"|(eh)?thumbs\.db|desktop\.ini|icon\r"
)
"""Names, in lower case, of what systems, file servers and programs put beside people's files."""

_LARGEST_IMAGE = 1 << 30
_LARGEST_LABEL = 16 << 20
"""Limits in bytes of files that are read whole."""

_MOST_TARS = 100_000
_PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
"""The first bytes of compressed files, and the name of the format."""


class UnusableImageError(Exception):
    """An image that cannot be used, with the reason."""


class UnreadableError(UserError):
    """An image that cannot be read or decoded now, for a reason outside the image, such as the disk or the memory."""


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

    def read(self, most: int = _LARGEST_IMAGE) -> bytes:
        """The item's bytes.

        Args:
            most: bytes that it may have.

        Raises:
            UnusableImageError: if it has more, or the tar file ends within it.
            UnreadableError: if the disk does not give it.
        """
        try:
            with open_regular(Path(os.fsdecode(self.path))) as file:
                offset, length = self.span or (0, os.fstat(file.fileno()).st_size)
                if length > most:
                    raise UnusableImageError(f"it has {length} bytes, at most {most} are read")
                file.seek(offset)
                content = file.read(length)
        except (OSError, UserError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UnreadableError(f"it cannot be read ({reason}): see that its disk is connected") from error
        if self.span and len(content) < length:
            raise UnusableImageError("the tar file ends within it")
        return content


@dataclass
class Listing:
    """The content of a task, or of a folder.

    Attributes:
        items: the images.
        skipped: images that cannot be used.
        notes: what else is to be listed, such as files that were left out; does not count as images.
        hidden: number of hidden files and service folders.
        others: number of files of other kinds, by the endings of their names.
    """

    items: list[Item] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    notes: list[Skipped] = field(default_factory=list)
    hidden: int = 0
    others: Counter[str] = field(default_factory=Counter)

    def describe_left_out(self) -> list[str]:
        """A sentence for each kind of files that was left out."""
        lines = []
        if self.hidden:
            lines.append(f"{self.hidden} hidden files and service folders (such as .DS_Store, __MACOSX) are left out")
        if self.others:
            kinds = ", ".join(f".{ending} ({count})" for ending, count in self.others.most_common(5))
            more = ", ..." if len(self.others) > 5 else ""
            lines.append(f"{self.others.total()} files without an image's name are left out: {kinds}{more}")
        return lines


class ImageSource(Protocol):
    """Images in tasks, each of which becomes a shard.

    Attributes:
        classes: class names.
        tasks: number of tasks.
        inventory: what there is, by folder or file: a change between two runs shows here.
        skipped: files that belong to no class, or can be no images.
        notes: sentences on what was left out, for the user.
    """

    classes: tuple[str, ...]
    tasks: int
    inventory: dict[str, str]
    skipped: tuple[Skipped, ...]
    notes: tuple[str, ...]

    def size(self, task: int) -> int | None:
        """Number of files in a task; None if only reading would tell."""

    def items(self, task: int) -> Listing:
        """The images of a task, and files that are none; UserError for a label that is no class, or a failing disk."""


class FolderSource(ImageSource):
    """A folder with one subfolder per class; images may lie at any depth below it. Shuffled once, by seed.

    Hidden files, service folders and files whose names are not those of images are left out.

    Args:
        root: the folder.
        per_task: images of a task.
        seed: of the shuffle.
        classes: class names, of which ``root`` may lack some; None takes the names of its subfolders.

    Raises:
        UserError: if a folder cannot be read, holds no class, or one that is not among ``classes``.
    """

    def __init__(self, root: Path, per_task: int, seed: int, classes: tuple[str, ...] | None = None) -> None:
        self._root = root
        self._per_task = per_task
        listing = Listing()
        folders = []
        for entry in scan(root):
            if is_service(entry.name):
                listing.hidden += 1
            elif is_folder(entry):
                folders.append(entry.name)
            else:
                listing.skipped.append(Skipped(visible(entry.name), "lies in no class folder"))
        by_name = _named_folders(root, folders)
        self.classes = _check_classes(root, list(by_name), classes)
        paths: list[bytes] = []
        labels: list[int] = []
        self.inventory: dict[str, str] = {}
        for label, name in enumerate(self.classes):
            if folder := by_name.get(unicodedata.normalize("NFC", name)):
                images = sorted(_walk(root / folder, root, listing))
                files = [os.fsencode(os.path.relpath(path, root)) for path, _ in images]
                content = b"".join(b"%b %d\n" % (file, size) for file, (_, size) in zip(files, images, strict=True))
                digest = hashlib.sha256(content).hexdigest()[:8]
                self.inventory[name] = f"{len(files)} files, names and sizes {digest}"
                paths += files
                labels += [label] * len(files)
        notes = listing.describe_left_out()
        if not paths:
            raise UserError(". ".join([f"source={root}: its {len(folders)} class folders hold no images", *notes]))
        used = set(labels)
        if empty := [name for label, name in enumerate(self.classes) if label not in used]:
            notes.append(describe_empty_classes(empty, len(self.classes)))
        if alike := [name for name, times in Counter(map(str.casefold, by_name)).items() if times > 1]:
            notes.append(f"{len(alike)} class names differ only in upper and lower case, such as {alike[0]!r}")
        order = np.random.default_rng(seed).permutation(len(paths))
        # Arrays, not lists: reference counts would copy them into every worker process.
        self._paths = np.array(paths)[order]
        self._labels = np.array(labels)[order]
        self.tasks = -(-len(paths) // per_task)
        self.skipped = tuple(listing.skipped)
        self.notes = tuple(notes)

    @override
    def size(self, task: int) -> int | None:
        return min(self._per_task, len(self._labels) - task * self._per_task)

    @override
    def items(self, task: int) -> Listing:
        rows = slice(task * self._per_task, (task + 1) * self._per_task)
        root = os.fsencode(self._root)
        pairs = zip(self._paths[rows].tolist(), self._labels[rows].tolist(), strict=True)
        items = [Item(label, visible(os.fsdecode(path)), os.path.join(root, path)) for path, label in pairs]
        return Listing(items)


class TarSource(ImageSource):
    """Webdataset shards of images, one task each: samples of an image and a ``.cls``, or a ``.json`` with a label.

    A sample may have several images; each is used. The label of ``a.b.png`` is that of ``a.b.cls``, else of ``a.cls``.

    Args:
        pattern: a folder of tar files, or their paths with braces, such as ``train-{000..146}.tar``.
        classes: class names.

    Raises:
        UserError: if there are no such files, or they are compressed.
    """

    def __init__(self, pattern: str, classes: tuple[str, ...]) -> None:
        folder = Path(pattern)
        if folder.is_dir():
            self._paths = sorted(str(path) for path in folder.glob("*.tar") if not is_service(path.name))
        else:
            if math.prod(map(_alternatives, re.findall(r"\{([^{}]*)\}", pattern))) > _MOST_TARS:
                raise UserError(f"source={pattern} stands for more than {_MOST_TARS} files: give fewer at once")
            try:
                self._paths = expand_urls(pattern)
            except ValueError as error:
                raise UserError(
                    f"source={pattern}: {error}: braces are written as in train-{{000..146}}.tar"
                ) from error
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
        self.classes = classes
        self.tasks = len(self._paths)
        self.inventory = {os.path.basename(path): f"{os.path.getsize(path)} bytes" for path in self._paths}
        self.skipped: tuple[Skipped, ...] = ()
        self.notes: tuple[str, ...] = ()
        if len(self.inventory) < len(self._paths):
            raise UserError(f"source={pattern}: two tar files have the same name")

    @override
    def size(self, task: int) -> int | None:
        return None

    @override
    def items(self, task: int) -> Listing:
        path = self._paths[task]
        shard = os.path.basename(path)
        listing = Listing()
        for _, group in groupby(_members(path, listing), key=lambda member: _parts(member.name)[0]):
            sample: dict[str, tarfile.TarInfo] = {}
            for member in group:
                if member.name in sample:
                    listing.skipped.append(Skipped(visible(f"{shard}/{member.name}"), "a second file of this name"))
                else:
                    sample[member.name] = member
            images = [name for name in sample if _is_image(name)]
            if not images:
                listing.others.update(visible(_ending(name)) for name in sample)
            for image in images:
                name = visible(f"{shard}/{image}")
                try:
                    label = _label(path, image, sample)
                except UnusableImageError as error:
                    listing.skipped.append(Skipped(name, str(error)))
                    continue
                except UnreadableError as error:
                    raise UnreadableError(f"{name}: {error}") from error
                if not 0 <= label < len(self.classes):
                    raise UserError(
                        f"{name}: label {shown(label)} is none of {len(self.classes)} classes, set classes=..."
                    )
                listing.items.append(Item(label, name, path, _span(sample[image])))
        listing.notes += [Skipped(shard, note) for note in listing.describe_left_out()]
        return listing


def describe_empty_classes(names: Sequence[str], classes: int) -> str:
    """A sentence on the classes ``names``, of ``classes`` in all, that have no images."""
    listed = ", ".join(repr(visible(name)) for name in names[:5]) + (", ..." if len(names) > 5 else "")
    return f"{len(names)} of {classes} classes have no images (they keep their labels): {listed}"


def is_service(name: str) -> bool:
    """Whether a file or folder is hidden, or was put there by a system or a file server."""
    return (name.startswith(".") and name not in (".", "..")) or _SERVICE.fullmatch(name.lower()) is not None


def _ending(name: str) -> str:
    return os.path.basename(name).rpartition(".")[2].lower() if "." in os.path.basename(name) else ""


def _is_image(name: str) -> bool:
    """Whether a file's name has an ending of :data:`IMAGE_TYPES`."""
    return IMAGE_TYPES.fullmatch(_ending(name)) is not None


_SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing"}


def _named_folders(root: Path, folders: Sequence[str]) -> dict[str, str]:
    """The class folders by class name, which is the folder's name with accents composed (Unicode NFC).

    Systems store one name in two forms: macOS decomposes accents.

    Raises:
        UserError: if two folders have one name, or the folders are splits, which hold the classes.
    """
    by_name: dict[str, str] = {}
    for folder in folders:
        name = unicodedata.normalize("NFC", folder)
        if by_name.setdefault(name, folder) != folder:
            raise UserError(
                f"source={root}: two class folders are called {visible(name)!r}, one with composed and one with"
                " decomposed accents: move the images of one into the other"
            )
    if folders and {folder.lower() for folder in folders} <= _SPLITS:
        content = [entry for folder in folders for entry in scan(root / folder)]
        if any(map(is_folder, content)) and not any(_is_image(entry.name) for entry in content):
            raise UserError(
                f"source={root} holds splits ({', '.join(folders)}), not classes: extract each by itself, such as"
                f" source={root / folders[0]}"
            )
    return by_name


def _check_classes(root: Path, folders: Sequence[str], given: tuple[str, ...] | None) -> tuple[str, ...]:
    """The classes of a source: those given, or its folders; UserError unless every folder is one of them."""
    if not folders:
        raise UserError(f"source={root} has no subfolders: put the images of each class into one of its own")
    for name in folders:  # names of classes stand in every manifest, checkpoint and table
        if visible(name) != name:
            raise UserError(
                f"source={root}: the name of the class folder {visible(name)!r} is no UTF-8, or holds control"
                " characters: rename it (convmv converts the names of a whole tree)"
            )
    classes = given or tuple(folders)
    known = {unicodedata.normalize("NFC", name) for name in classes}
    if unknown := sorted(set(folders).difference(known)):
        raise UserError(
            f"source={root}: the train split has no class {unknown[0]!r}"
            f"{f', nor {len(unknown) - 1} others' if unknown[1:] else ''}: its {len(classes)} classes hold for all"
            " splits; extract train anew, or leave this folder out"
        )
    for name, count in Counter(classes).items():
        if count > 1 and name in folders:
            raise UserError(f"source={root}: {count} classes of the train split are called {name!r}: give tar files")
    return classes


def scan(folder: str | Path) -> list[os.DirEntry[str]]:
    """The entries of a folder by name; UserError if it cannot be read."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise _unreadable(folder, error) from error


def _unreadable(path: str | Path, error: OSError) -> UserError:
    return UserError(f"{visible(str(path))} cannot be read: {error.strerror}; nothing has been encoded")


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder, or a link to one; a link that leads nowhere, or to itself, is none."""
    try:
        return entry.is_dir()
    except OSError as error:
        if entry.is_symlink():
            return False
        raise _unreadable(entry.path, error) from error


def image_files(root: Path) -> list[tuple[str, int, int]]:
    """Path below ``root``, size and time of change of every image file; UserError if a folder is unreadable."""
    return sorted(
        (os.path.relpath(path, root), size, os.stat(path).st_mtime_ns)
        for path, size in _walk(root, root, Listing())
        if _is_image(path)
    )


def _walk(folder: Path, root: Path, listing: Listing) -> Iterator[tuple[str, int]]:
    """Image files below ``folder`` with their sizes. Links are followed; each folder is visited once.

    Args:
        folder: where to begin.
        root: the folder, or one above it, which is not entered again; names of skipped files are relative to it.
        listing: receives what is called like an image and is no regular file, and counts all else.
    """
    visited = set() if folder == root else {os.path.realpath(root)}
    waiting = [str(folder)]
    while waiting:
        current = waiting.pop()
        real = os.path.realpath(current)
        if real in visited:
            continue
        visited.add(real)
        for entry in scan(current):
            if is_service(entry.name):
                listing.hidden += 1
            elif is_folder(entry):
                waiting.append(entry.path)
            elif _ending(entry.name) in _OTHER_IMAGES:
                name = visible(os.path.relpath(entry.path, root))
                listing.skipped.append(Skipped(name, "its format is not decoded: convert it to JPEG or PNG"))
            elif _ending(entry.name) and not _is_image(entry.name):
                listing.others[visible(_ending(entry.name))] += 1
            else:
                try:
                    status = entry.stat()
                    fault = "" if stat.S_ISREG(status.st_mode) else "no regular file"
                except OSError as error:
                    if not entry.is_symlink():
                        raise _unreadable(entry.path, error) from error
                    fault = f"a link that leads nowhere ({error.strerror})"
                if fault:
                    listing.skipped.append(Skipped(visible(os.path.relpath(entry.path, root)), fault))
                else:
                    yield entry.path, status.st_size


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
                elif not member.isdir() and _is_image(member.name):
                    listing.skipped.append(Skipped(visible(f"{shard}/{member.name}"), "a link, or no regular file"))
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


def _alternatives(braces: str) -> int:
    """The number of texts that a pair of braces expands to."""
    numbers = re.fullmatch(r"(-?\d{1,18})\.\.(-?\d{1,18})(\.\..*)?", braces)
    return abs(int(numbers[2]) - int(numbers[1])) + 1 if numbers else 52 if ".." in braces else braces.count(",") + 1


def _parts(name: str) -> tuple[str, list[str]]:
    """Key of a member by webdataset's rule, up to the first dot of the file's name; and what lies between the dots."""
    folder, slash, file = name.rpartition("/")
    stem, *others = file.split(".")
    return f"{folder}{slash}{stem}", others


def _span(member: tarfile.TarInfo) -> tuple[int, int]:
    return member.offset_data, member.size


def _label(path: str, image: str, sample: dict[str, tarfile.TarInfo]) -> int:
    """The label of an image by the member that shares most of its name; UnusableImageError if there is none."""
    by_name = {name.lower(): member for name, member in sample.items()}
    stem = image.lower()
    key, parts = _parts(stem)
    for length in range(len(parts) - 1, -1, -1):
        base = ".".join([key, *parts[:length]])
        for ending in ("cls", "json"):
            member = by_name.get(f"{base}.{ending}")
            if member is not None:
                return _read_label(Item(0, "", path, _span(member)).read(_LARGEST_LABEL), ending)
    raise UnusableImageError("no label beside it: .cls, or .json with a label")


def _read_label(content: bytes, ending: str) -> int:
    try:
        label: Any = json.loads(content)["label"] if ending == "json" else content.decode("utf-8-sig")
        number = int(label)
        if isinstance(label, bool) or (isinstance(label, float) and number != label):
            raise ValueError
        return number
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        raise UnusableImageError(f"its .{ending} holds no label, which is a whole number") from None
