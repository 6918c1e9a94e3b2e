"""What all sources of images to encode have in common; :data:`dcdit.extraction.readers.READERS` lists the kinds."""

import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from dcdit.checks import visible
from dcdit.data.manifest import Skipped
from dcdit.errors import UserError
from dcdit.extraction.classes import WantedClasses
from dcdit.runtime.files import open_regular

_IMAGE_TYPES = re.compile("jpe?g|jpe|jfif|a?png|webp|bmp|tiff?|gif|p[gbpnf]m|avif|img")
"""Endings of names, in lower case, of files that are taken for images; in folders, so are names without an ending."""

_SERVICE = re.compile(
    r"__macosx|@eadir|#recycle|#snapshot|\$recycle\.bin|system volume information|lost\+found|__pycache__"
    r"|(eh)?thumbs\.db|desktop\.ini|icon\r"
)
"""Names, in lower case, of what systems, file servers and programs put beside people's files."""

LARGEST_IMAGE = 1 << 30
"""Bytes that the file of an image has at most."""


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

    def read(self, max_bytes: int = LARGEST_IMAGE) -> bytes:
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


@dataclass(frozen=True)
class NumberedItem(Item):
    """An image that its source reads, by its number there."""

    number: int = 0


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
        classes: their names; a label is an index into them.
        class_order: where their order comes from, in a few words.
        inventory: what there is, by folder or file: a change between two runs shows here.
        skipped: files that belong to no class, or can be no images.
        notes: sentences on what was left out, for the user.
    """

    classes: tuple[str, ...]
    class_order: str
    tasks: int
    inventory: dict[str, str]
    skipped: tuple[Skipped, ...] = ()
    notes: tuple[str, ...] = ()

    def size(self, task: int) -> int | None:
        """Number of files in a task; None if only reading would tell."""
        return None

    def items(self, task: int) -> Listing:
        """The images of a task, and files that are none; UserError for a label that is no class, or a failing disk."""

    def read(self, item: Item) -> bytes:
        """The bytes of an image of :meth:`items`; raises as :meth:`Item.read` does."""
        return item.read()


class ShuffledSource(ImageSource):
    """Images whose labels are known before any is read, and that can be read in any order.

    Args:
        labels: (N,) the label of each image.
        order: (N,) the images' numbers in the order in which tasks take them.
        per_task: images of a task; the last has fewer.
    """

    def __init__(self, labels: NDArray[np.int64], order: NDArray[np.int64], per_task: int) -> None:
        # Arrays, not lists: reference counts would copy them into every worker process.
        self._labels, self._order, self._per_task = labels, order, per_task
        self.tasks = -(-len(order) // per_task)

    @override
    def size(self, task: int) -> int | None:
        return min(self._per_task, len(self._order) - task * self._per_task)

    @override
    def items(self, task: int) -> Listing:
        numbers = self._order[task * self._per_task : (task + 1) * self._per_task].tolist()
        return Listing([self.item(number, int(self._labels[number])) for number in numbers])

    def item(self, number: int, label: int) -> Item:
        """The image of a number, which has not been read yet."""
        raise NotImplementedError


class FileSource(ShuffledSource):
    """Files below a folder, shuffled by a seed.

    Args:
        root: the folder, or its URL.
        paths: of the files, below ``root``.
        labels: one for each.
        per_task: images of a task.
        seed: of the shuffle.
    """

    def __init__(
        self, root: Path | str, paths: Sequence[bytes], labels: Sequence[int], per_task: int, seed: int
    ) -> None:
        super().__init__(np.array(labels), np.random.default_rng(seed).permutation(len(paths)), per_task)
        self._root, self._paths = root, np.array(paths)

    @override
    def item(self, number: int, label: int) -> Item:
        path: Any = self._paths[number]
        return Item(label, visible(os.fsdecode(path)), os.path.join(os.fsencode(self._root), path))


@dataclass(frozen=True)
class Request:
    """What a command asks of a source.

    Attributes:
        source: the place of the images.
        per_task: images of a task.
        seed: of the shuffle.
        given: the key ``classes``.
        classes: the classes that hold, of that key or of the train split; None where the source says them itself.
    """

    source: str
    per_task: int
    seed: int
    given: int | str | None
    classes: WantedClasses | None


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
