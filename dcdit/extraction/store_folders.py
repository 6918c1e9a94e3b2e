"""Images in a store or a repository of the hub, in one folder per class."""

import os

from typing_extensions import override

from dcdit.data.stores import RefusedError, list_store, read_small
from dcdit.errors import UserError
from dcdit.extraction.classes import WantedClasses
from dcdit.extraction.folders import Content, FolderSource, is_wanted
from dcdit.extraction.sources import LARGEST_IMAGE, Item, Listing, UnreadableError, is_service


class StoreFolderSource(FolderSource):
    """Class folders behind a URL of a store, which is listed once: the same samples as from a copy on the disk.

    Args:
        url: of the folder, such as ``s3://bucket/train``.
        per_task, seed, wanted: as for :class:`FolderSource`.

    Raises:
        UserError: if the store does not list it; or as :class:`FolderSource` does.
    """

    def __init__(self, url: str, per_task: int, seed: int, wanted: WantedClasses | None = None) -> None:
        self._below: dict[str, dict[str, int]] = {}  # sizes by path, by the first folder of the path
        try:
            for path, size in list_store(url).items():
                folder, slash, _ = path.partition("/")
                self._below.setdefault(folder if slash else "", {})[path] = size
        except RefusedError as error:
            raise UserError(f"source={url} cannot be listed: {error}") from error
        if not self._below:
            raise UserError(f"source={url} holds no files: see whether bucket and path are right")
        super().__init__(url.rstrip("/"), per_task, seed, wanted)
        del self._below  # millions of names, which each worker process would copy

    @override
    def content(self, folder: str, listing: Listing) -> Content:
        paths = [path.removeprefix(f"{folder}/") for path in self._below.get(folder, ())]
        nested = {path.partition("/")[0] for path in paths if "/" in path} if folder else self._below.keys() - {""}
        files = [path for path in paths if path and "/" not in path]
        listing.hidden += sum(map(is_service, [*nested, *files]))
        subfolders, files = (sorted(name for name in names if not is_service(name)) for names in (nested, files))
        return subfolders, files

    @override
    def images(self, folder: str, listing: Listing) -> list[tuple[str, int, int]]:
        found = []
        for path, size in self._below[folder].items():
            if any(map(is_service, path.split("/"))):
                listing.hidden += 1
            elif size > LARGEST_IMAGE:
                listing.skip(path, f"it has {size} bytes, at most {LARGEST_IMAGE} are read")
            elif is_wanted(path, listing):
                found.append((path, size, 0))
        return sorted(found)

    @override
    def read(self, item: Item) -> bytes:
        try:
            return read_small(os.fsdecode(item.path))
        except RefusedError as error:
            raise UnreadableError(f"it cannot be read ({error})") from error
