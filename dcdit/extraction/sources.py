"""What all sources of images to encode have in common; :mod:`.folders` and :mod:`.tars` are the two kinds."""

import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from dcdit.checks import visible
from dcdit.data.manifest import Skipped
from dcdit.errors import UserError
from dcdit.runtime.files import open_regular

_IMAGE_TYPES = re.compile("jpe?g|jpe|jfif|a?png|webp|bmp|tiff?|gif|p[gbpnf]m|avif|img")
"""Endings of names, in lower case, of files that are taken for images; in folders, so are names without an ending."""

_SERVICE = re.compile(
    r"__macosx|@eadir|#recycle|#snapshot|\$recycle\.bin|system volume information|lost\+found|__pycache__"
    r"|(eh)?thumbs\.db|desktop\.ini|icon\r"
)
"""Names, in lower case, of what systems, file servers and programs put beside people's files."""

_LARGEST_IMAGE = 1 << 30  # bytes


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

    def read(self, max_bytes: int = _LARGEST_IMAGE) -> bytes:
        """The item's bytes, of which there may be ``max_bytes``.

        Raises:
            UnusableImageError: if it has more, or the tar file ends within it.
            UnreadableError: if the disk does not give it.
        """
        try:
            with open_regular(Path(os.fsdecode(self.path))) as file:
                offset, length = self.span or (0, os.fstat(file.fileno()).st_size)
                if length > max_bytes:
                    raise UnusableImageError(f"it has {length} bytes, at most {max_bytes} are read")
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
    """The images of a task, or of a folder, those that cannot be used, and what else lies there.

    Attributes:
        notes: what else is to be listed, such as files that were left out; does not count as images.
        hidden: number of hidden files and service folders.
        others: number of files of other kinds, by the endings of their names.
    """

    items: list[Item] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    notes: list[Skipped] = field(default_factory=list)
    hidden: int = 0
    others: Counter[str] = field(default_factory=Counter)

    def skip(self, name: str, reason: str) -> None:
        """Add an image that cannot be used; ``name`` is as it is in the source."""
        self.skipped.append(Skipped(visible(name), reason))

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
        inventory: what there is, by folder or file: a change between two runs shows here.
        skipped: files that belong to no class, or can be no images.
        notes: sentences on what was left out, for the user.
    """

    classes: tuple[str, ...]
    tasks: int
    inventory: dict[str, str]
    skipped: tuple[Skipped, ...] = ()
    notes: tuple[str, ...] = ()

    def size(self, task: int) -> int | None:
        """Number of files in a task; None if only reading would tell."""
        return None

    def items(self, task: int) -> Listing:
        """The images of a task, and files that are none; UserError for a label that is no class, or a failing disk."""


def describe_empty_classes(names: Sequence[str], classes: int) -> str:
    """A sentence on the classes ``names``, of ``classes`` in all, that have no images."""
    listed = ", ".join(repr(visible(name)) for name in names[:5]) + (", ..." if len(names) > 5 else "")
    return f"{len(names)} of {classes} classes have no images (they keep their labels): {listed}"


def is_service(name: str) -> bool:
    """Whether a file or folder is hidden, or was put there by a system or a file server."""
    return (name.startswith(".") and name not in (".", "..")) or _SERVICE.fullmatch(name.lower()) is not None


def ending_of(path: str) -> str:
    """What follows the last dot of a file's name, in lower case; empty if there is none."""
    name = os.path.basename(path)
    return name.rpartition(".")[2].lower() if "." in name else ""


def is_image(path: str) -> bool:
    """Whether a file's name has the ending of an image."""
    return _IMAGE_TYPES.fullmatch(ending_of(path)) is not None
