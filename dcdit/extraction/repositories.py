"""Files of a local folder, or of a repository of data sets on the Hugging Face hub, that are read in parts."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from typing_extensions import override

from dcdit.checks import HUB_ID, shown
from dcdit.errors import UserError
from dcdit.runtime.files import open_regular
from dcdit.runtime.hub import cause_of, check_hub_answers

_ADDRESS = re.compile(rf"hf://datasets/(?P<repository>{HUB_ID})(?P<folder>(/[^/]+)*)/?")
_SPLIT = re.compile(r"(?:^|[/_.-])(train|val|valid|validation|test)(?=[/_.-])")
_NUMBERED = re.compile(r"(?P<stem>.*)-(?P<number>\d{1,9})-of-(?P<count>\d{1,9})(?P<rest>[^/]*)")


class Files(Protocol):
    """Files that can be read in parts.

    Attributes:
        names: their paths, sorted.
        record: what tells their revision; empty where their sizes must do.
    """

    names: list[str]
    record: dict[str, str]

    def open(self, name: str) -> BinaryIO:
        """Open a file; raises an OSError, a UserError or an error of huggingface_hub if it cannot be read."""


@dataclass(frozen=True)
class LocalFiles(Files):
    """Reads the files below a folder."""

    root: Path
    names: list[str]
    record: dict[str, str]

    @override
    def open(self, name: str) -> BinaryIO:
        return open_regular(self.root / name)


@dataclass(frozen=True)
class StreamedFiles(Files):
    """Files of a repository at a commit, of which only what is read is fetched."""

    repository: str
    commit: str
    names: list[str]
    record: dict[str, str]

    @override
    def open(self, name: str) -> BinaryIO:
        from huggingface_hub import HfFileSystem, constants

        check_hub_answers()
        path = f"datasets/{self.repository}@{self.commit}/{name}"
        file: BinaryIO = HfFileSystem(endpoint=constants.ENDPOINT).open(path, "rb", cache_type="none")
        return file


def find_files(source: str, pattern: str | None, ending: str, revision: str, stream: bool) -> Files:
    """The files that ``source`` names.

    Args:
        source: a file, a folder, or ``hf://datasets/<owner>/<name>[/<folder>]``.
        pattern: of the paths, in which ``*`` stands for any letters; None takes all with the ``ending``.
        ending: of the files' names.
        revision: of a repository.
        stream: read a repository over the network instead of downloading the files first.

    Raises:
        UserError: if there are none, some are missing, or they are of several splits and no pattern says which.
    """
    if source.startswith("hf:"):
        return _of_repository(source, pattern, ending, revision, stream)
    path = Path(source)
    if stream:
        raise UserError(f"reader.stream=true is for repositories, but source={source} is none: hf://datasets/...")
    if path.is_file():
        return LocalFiles(path.parent, [path.name], {})
    if not path.is_dir():
        raise UserError(f"source={source} is no folder, no file, and no hf://datasets/<owner>/<name>")
    names = [file.relative_to(path).as_posix() for file in path.rglob(f"*{ending}")]
    return LocalFiles(path, choose(names, source, pattern, ending), {})


def choose(names: Sequence[str], source: str, pattern: str | None, ending: str, folder: str = "") -> list[str]:
    """Those of the ``names`` that are asked for, see :func:`find_files`, sorted."""
    folder = f"{folder.strip('/')}/" if folder.strip("/") else ""
    below = [name for name in names if name.startswith(folder) and not any(map(_is_hidden, name.split("/")))]
    found = sorted(name for name in below if fnmatchcase(name[len(folder) :], pattern or f"*{ending}"))
    if not found:
        asked = f"reader.files={pattern}" if pattern else f"*{ending}"
        listed = ", ".join(map(shown, below[:5])) or "no such files at all"
        raise UserError(f"source={source} has no files {asked}; there are {listed}")
    splits = {match[0]: name for name in reversed(found) if (match := _SPLIT.findall(name[len(folder) :]))}
    if pattern is None and len(splits) > 1:
        first = f"*{next(iter(splits))}*{ending}"
        raise UserError(
            f"source={source} has files of several splits ({', '.join(sorted(splits))}): choose one, such as"
            f" \"reader.files='{first}'\""
        )
    _check_complete(found, source)
    return found


def _is_hidden(name: str) -> bool:
    return name.startswith(".")


def _check_complete(names: Sequence[str], source: str) -> None:
    """Raise :class:`UserError` if one of several numbered files is missing, such as after a broken download."""
    there: dict[tuple[str, str], set[int]] = {}
    for name in names:
        if match := _NUMBERED.fullmatch(name):
            there.setdefault((match["stem"], match["count"]), set()).add(int(match["number"]))
    for (stem, count), numbers in there.items():
        if len(numbers) < int(count):
            raise UserError(
                f"source={source}: only {len(numbers)} of the {int(count)} files {stem}-*-of-{count} are there:"
                " download the rest"
            )


def _of_repository(source: str, pattern: str | None, ending: str, revision: str, stream: bool) -> Files:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import OfflineModeIsEnabled

    match = _ADDRESS.fullmatch(source)
    if match is None or {".", ".."} & set(source.split("/")):
        raise UserError(f"source={source} is no address: write hf://datasets/<owner>/<name>, or a folder behind it")
    repository, folder = match["repository"], match["folder"]
    options: dict[str, Any] = {"repo_type": "dataset", "revision": revision}
    wanted = f"{folder}/{pattern or f'*{ending}'}".lstrip("/")
    check_hub_answers()
    try:
        try:
            info = HfApi().dataset_info(repository, revision=revision)
        except OfflineModeIsEnabled:
            if stream:
                raise
            root = Path(snapshot_download(repository, **options, allow_patterns=[wanted], local_files_only=True))
            cached = [file.relative_to(root).as_posix() for file in root.rglob(f"*{ending}")]
            return LocalFiles(root, choose(cached, source, pattern, ending, folder), {"commit": root.name})
        names = choose([sibling.rfilename for sibling in info.siblings or ()], source, pattern, ending, folder)
        if stream:
            return StreamedFiles(repository, str(info.sha), names, {"commit": str(info.sha)})
        # By the name of the revision, which the cache keeps, so that it is found where there is no network.
        root = Path(snapshot_download(repository, **options, allow_patterns=names))
        return LocalFiles(root, names, {"commit": root.name})
    except UserError:
        raise
    except Exception as error:  # of many classes, of huggingface_hub and of its HTTP client
        raise UserError(
            f"source={source}: the hub does not give it at reader.revision={revision}: {cause_of(error)}"
        ) from error
