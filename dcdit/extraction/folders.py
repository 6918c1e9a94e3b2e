"""Images in a folder with one subfolder per class."""

import hashlib
import os
import stat
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from dcdit.checks import visible
from dcdit.errors import UserError
from dcdit.extraction.classes import BY_NAME, WantedClasses, composed, notes_on_classes
from dcdit.extraction.sources import FileSource, Listing, ending_of, is_image, is_service

_OTHER_IMAGES = {"heic", "heif", "jxl", "jp2", "psd", "dng", "cr2", "cr3", "nef", "arw", "raw", "svg", "eps", "pdf"}
"""Endings of images that Pillow does not decode, or not without another program."""

Content = tuple[list[str], list[str]]
"""Names of the subfolders and of the files of a folder, sorted."""

_SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing"}


class FolderSource(FileSource):
    """A folder with one subfolder per class; images may lie at any depth below it. Shuffled once, by seed.

    Hidden files, service folders and files whose names are not those of images are left out.

    Args:
        root: the folder, or its URL.
        per_task: images of a task.
        seed: of the shuffle.
        wanted: the classes, of which ``root`` may lack some; None takes the names of its subfolders, sorted.

    Raises:
        UserError: if a folder cannot be read, holds no class, or one that is not among the wanted ones.
    """

    def __init__(self, root: Path | str, per_task: int, seed: int, wanted: WantedClasses | None = None) -> None:
        self._root = root
        listing, paths, labels = Listing(), list[bytes](), list[int]()
        folders = _class_folders(root, self.content, listing)
        self.classes, self.class_order = tuple(folders), BY_NAME
        self.inventory = {}
        if wanted:
            wanted.labels(f"source={root}", folders)
            self.classes, self.class_order = wanted.names, f"of {wanted.origin}"
            self.inventory |= wanted.recorded
        for label, name in enumerate(self.classes):
            if folder := folders.get(composed(name)):
                files = self.images(folder, listing)
                self.inventory[name] = f"{len(files)} files, names and sizes {digest_of(files)}"
                paths += [os.fsencode(path) for path, *_ in files]
                labels += [label] * len(files)
        notes = listing.describe_left_out()
        if not paths:
            raise UserError(". ".join([f"source={root}: its {len(folders)} class folders hold no images", *notes]))
        notes += notes_on_classes(self.classes, labels)
        if similar := [name for name, times in Counter(map(str.casefold, folders)).items() if times > 1]:
            notes.append(f"{len(similar)} class names differ only in upper and lower case, such as {similar[0]!r}")
        super().__init__(root, paths, labels, per_task, seed)
        self.skipped, self.notes = tuple(listing.skipped), tuple(notes)

    def content(self, folder: str, listing: Listing) -> Content:
        """Names of the subfolders and of the files of a ``folder`` below the root; service files are only counted."""
        return _content(Path(self._root, folder), listing)

    def images(self, folder: str, listing: Listing) -> list[tuple[str, int, int]]:
        """Image files below a ``folder`` of the root, as :func:`walk` lists them."""
        return walk(Path(self._root, folder), Path(self._root), listing)


def digest_of(files: Sequence[tuple[str, int, int]]) -> str:
    """A digest of names and sizes of files, as :func:`walk` lists them."""
    return hashlib.sha256(b"".join(b"%b %d\n" % (os.fsencode(path), size) for path, size, _ in files)).hexdigest()[:8]


def has_subfolders(root: Path) -> bool:
    """Whether a folder has subfolders, those of systems and file servers aside; UserError if it cannot be read."""
    return bool(_content(root, Listing())[0])


def image_files(root: Path) -> list[tuple[str, int, int]]:
    """Path below ``root``, size and time of change of every image file; UserError if a folder is unreadable."""
    return [file for file in walk(root, root, Listing()) if is_image(file[0])]


def _class_folders(root: Path | str, content: Callable[[str, Listing], Content], listing: Listing) -> dict[str, str]:
    """The class folders below ``root`` by class name, which is the folder's name with accents composed.

    Files beside them are added to ``listing``; ``content`` says what a folder holds.

    Raises:
        UserError: if there are none, two have one name, one's name cannot be shown, or they are splits.
    """
    folders: dict[str, str] = {}
    subfolders, files = content("", listing)
    for name in files:
        listing.skip(name, "lies in no class folder")
    for name in subfolders:
        if folders.setdefault(composed(name), name) != name:
            raise UserError(
                f"source={root}: two class folders are called {visible(composed(name))!r}, one with composed and one"
                " with decomposed accents: move the images of one into the other"
            )
    if not folders:
        raise UserError(
            f"source={root} has no subfolders: put the images of each class into one of its own, or take reader=labels"
            " for a file that says their classes"
        )
    for name in folders:  # names of classes stand in every manifest, checkpoint and table
        if visible(name) != name:
            raise UserError(
                f"source={root}: the name of the class folder {visible(name)!r} is no UTF-8, or holds control"
                " characters: rename it (convmv converts the names of a whole tree)"
            )
    if {name.lower() for name in folders} <= _SPLITS:
        contents = [content(folder, Listing()) for folder in subfolders]
        if any(below for below, _ in contents) and not any(is_image(name) for _, files in contents for name in files):
            raise UserError(
                f"source={root} holds splits ({', '.join(folders)}), not classes: extract each by itself, such as"
                f" source={root}/{next(iter(folders))}"
            )
    return folders


def walk(folder: Path, root: Path, listing: Listing) -> list[tuple[str, int, int]]:
    """Image files below ``folder``, in order: path below ``root``, size and time of change.

    Links are followed; each folder is visited once.

    Args:
        folder: where to begin.
        root: the folder, or one above it, which is not entered again.
        listing: receives what is called like an image and is no regular file, and counts all else.
    """
    images = []
    visited = set() if folder == root else {os.path.realpath(root)}
    waiting = [str(folder)]
    while waiting:
        current = waiting.pop()
        real = os.path.realpath(current)
        if real in visited:
            continue
        visited.add(real)
        subfolders, files = _content(current, listing)
        waiting += [os.path.join(current, name) for name in subfolders]
        for name in files:
            path = os.path.join(current, name)
            below = os.path.relpath(path, root)
            if is_wanted(below, listing):
                try:
                    status = os.stat(path)
                except OSError as error:
                    if not os.path.islink(path):
                        _refuse(error)
                    listing.skip(below, f"a link that leads nowhere ({error.strerror})")
                    continue
                if stat.S_ISREG(status.st_mode):
                    images.append((below, status.st_size, status.st_mtime_ns))
                else:
                    listing.skip(below, "no regular file")
    return sorted(images)


def is_wanted(path: str, listing: Listing) -> bool:
    """Whether a file is taken for an image by its name; if not, it is added to ``listing``."""
    ending = ending_of(path)
    if ending in _OTHER_IMAGES:
        listing.skip(path, "its format is not decoded: convert it to JPEG or PNG")
    elif ending and not is_image(path):
        listing.others[visible(ending)] += 1
    else:
        return True
    return False


def _content(folder: str | Path, listing: Listing) -> Content:
    """Names of the subfolders and of the files of a folder, links to them included; service files are only counted."""
    _, subfolders, files = next(os.walk(folder, onerror=_refuse))
    listing.hidden += sum(map(is_service, subfolders + files))
    subfolders, files = (sorted(name for name in names if not is_service(name)) for names in (subfolders, files))
    return subfolders, files


def _refuse(error: OSError) -> NoReturn:
    raise UserError(f"{visible(error.filename)} cannot be read: {error.strerror}; nothing has been encoded") from error
