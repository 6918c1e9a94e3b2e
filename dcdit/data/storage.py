"""Shards in a local directory, or behind a URL, which are kept in a bounded cache on disk."""

import getpass
import hashlib
import os
import re
import stat
import tempfile
import time
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock

from dcdit.checks import Positive, check_credentials, checked
from dcdit.data.download import READERS, AbsentError, download, scheme_of
from dcdit.data.manifest import MANIFEST_NAME, Manifest, Shard
from dcdit.errors import UserError
from dcdit.runtime.files import describe_write_error, file_digest, open_regular, replacing
from dcdit.runtime.limits import TEXT_BYTES
from dcdit.runtime.processes import say

_ROOT, _CACHED = re.compile("[0-9a-f]{16}"), re.compile(r"[0-9a-f]{32}(\.inexact)?\.tar")
"""Names in the cache: the folder of a URL, and a shard in it. Nothing else is dropped to make room."""

_PAUSES = (0.5, 2.0)  # seconds before a download is tried again
_RETRY_AFTER = 600.0  # seconds until a shard that failed all the same is asked for anew


@checked
@dataclass(frozen=True)
class Location:
    """A directory with a manifest and its shards.

    Attributes:
        root: local path; or a URL, to which ``/<file>`` is appended, or in which ``{}`` stands for the file.
        cache: directory for files fetched from a URL; None takes one in the system's temporary directory. What is in
            it must belong to this user alone.
        cache_gb: size to which the cache is kept, apart from shards in use or under way.
        allow_pipe: open ``pipe:`` URLs, which run a shell command.
    """

    root: str
    cache: str | None = None
    cache_gb: Positive = 20.0
    allow_pipe: bool = False

    def __post_init__(self) -> None:
        check_credentials(self.root)
        known = [f"{scheme}:" if scheme == "pipe" else f"{scheme}://" for scheme in READERS]
        if self.remote and not self.root.startswith(tuple(known)):
            raise UserError(
                f"directory={self.root!r} begins with none of {', '.join(known)}: give one of these URLs, or"
                f" ./{self.root} for a folder of this name"
            )
        if self.root.startswith("pipe:") and not self.allow_pipe:
            raise UserError(
                f"directory={self.root!r} runs a shell command: set data.allow_pipe=true if you trust it with that"
            )

    @property
    def remote(self) -> bool:
        """Whether the root is a URL, so that files must be fetched."""
        return scheme_of(self.root) not in ("", "file")

    @property
    def directory(self) -> Path:
        """The local directory, or the cache of this URL."""
        if not self.remote:
            return Path(re.sub("^file:(//)?", "", self.root))
        home = Path(self.cache) if self.cache else _default_cache()
        return home / hashlib.sha256(self.root.encode()).hexdigest()[:16]

    def below(self, name: str) -> "Location":
        """The location of the subfolder ``name``, such as a split."""
        return replace(self, root=self._url(f"{name}/{{}}" if "{}" in self.root else name))

    def _url(self, name: str) -> str:
        """The URL of the file ``name``."""
        return self.root.replace("{}", name) if "{}" in self.root else f"{self.root.rstrip('/')}/{name}"

    def manifest_if_any(self) -> Manifest | None:
        """The manifest, as :meth:`manifest` reads it; None if there is nothing there, which a message says of a URL.

        Raises:
            UserError: if there is something else, such as an extraction that is not finished.
        """
        if not self.remote:
            return self.manifest() if os.path.lexists(self.directory) else None
        try:
            return self.manifest()
        except UserError as error:
            if not isinstance(error.__cause__, AbsentError):
                raise
            say(f"Going on without {self.root}: {error.__cause__}")
            return None

    def manifest(self) -> Manifest:
        """The manifest, checked; of a local directory also that every shard lies there in its full size.

        Raises:
            UserError: if there is no usable manifest, or a shard is missing or cut short.
        """
        path = self.directory / MANIFEST_NAME
        if self.remote:
            try:
                self._fetch(MANIFEST_NAME, path)
            except OSError as error:
                raise UserError(
                    f"directory: {error}. It must name the place that holds train/{MANIFEST_NAME}"
                ) from error
            return Manifest.read(path)
        manifest = Manifest.read(path)
        self.check_shards(manifest.shards)
        return manifest

    def check_shards(self, shards: Sequence[Shard]) -> None:
        """Raise :class:`UserError` unless each of ``shards`` lies in a local directory in its full size."""
        for shard in () if self.remote else shards:
            path = self.directory / shard.name
            size = path.stat().st_size if path.is_file() else None
            if size != shard.bytes:
                missing = "is no regular file" if os.path.exists(path) else "is missing"
                fault = missing if size is None else f"has {size} bytes, the manifest says {shard.bytes}"
                raise UserError(f"shard {path} {fault}: restore it or write the shards again")

    def fetch(self, shard: Shard, in_use: Collection[Shard] = ()) -> Path:
        """The local file of ``shard``, fetched and checked unless it is there; safe with many processes.

        A file of the right size whose checksum is wrong at every attempt is kept: its samples have checksums too. The
        shards ``in_use`` stay in the cache.

        Raises:
            OSError: if it cannot be fetched whole.
            UserError: if it is larger than the cache, or the disk does not take it.
        """
        if not self.remote:
            return self.directory / shard.name
        if shard.bytes > self.cache_gb * 1e9:
            raise UserError(
                f"shard {shard.name} in {self.root} has {shard.bytes} bytes, more than the whole cache: raise"
                f" data.cache_gb={self.cache_gb:g} if that is right"
            )
        self._make_cache()
        path = self.directory / _cached_name(shard)
        inexact = path.with_suffix(".inexact.tar")
        with FileLock(path.with_suffix(".lock")):
            for kept in (path, inexact):
                with suppress(FileNotFoundError):  # or dropped by another process this moment
                    os.utime(kept)  # the cache drops what was not used for longest
                    if kept is inexact or _is_whole(kept, shard):
                        return kept
            self._make_room(shard.bytes, {path.name, inexact.name, *map(_cached_name, in_use)})
            for pause in _PAUSES:
                with suppress(OSError):
                    self._fetch(shard.name, path, shard)
                    return path
                time.sleep(pause)
            self._fetch(shard.name, inexact, shard, exact=False)
            return inexact

    def _make_cache(self) -> None:
        """Make the cache of this URL, if need be; :class:`UserError` if another user may have written to it."""
        if not self.cache:
            _make_private(self.directory.parent)
        _make_private(self.directory)

    def _fetch(self, name: str, path: Path, shard: Shard | None = None, exact: bool = True) -> None:
        """Fetch ``name`` to ``path``, whole or not at all; with ``exact``, only with the checksum of ``shard``."""
        self._make_cache()
        url, digest = self._url(name), hashlib.sha256()
        with replacing(path) as file:

            def write(content: bytes) -> None:
                digest.update(content)
                file.write(content)

            size = download(url, write, shard.bytes if shard else TEXT_BYTES)
            if shard and size != shard.bytes:
                raise OSError(f"{url} came with {size} bytes, the manifest says {shard.bytes}")
            if shard and exact and digest.hexdigest() != shard.sha256:
                raise OSError(f"the checksum of {url} differs")

    def _make_room(self, size: int, in_use: Collection[str]) -> None:
        """Drop the shards of any URL not used for longest until ``size`` more bytes fit. Open files stay readable."""
        files = []
        for path in self.directory.parent.glob("*/*.tar"):
            with suppress(FileNotFoundError):  # dropped by another process
                if _ROOT.fullmatch(path.parent.name) and _CACHED.fullmatch(path.name):
                    files.append((path.stat().st_mtime, path.stat().st_size, path))
        total = size + sum(bytes_ for _, bytes_, _ in files)
        for _, bytes_, path in sorted(files):
            if total <= self.cache_gb * 1e9:
                break
            if path.name not in in_use:
                path.unlink(missing_ok=True)
                total -= bytes_


def _open_shard(path: Path) -> BinaryIO:
    """A shard, open for reading; OSError if it cannot be had, or is no regular file."""
    try:
        return open_regular(path)
    except UserError as error:
        raise OSError(str(error)) from error


def _default_cache() -> Path:
    user = os.getuid() if hasattr(os, "getuid") else getpass.getuser()
    return Path(tempfile.gettempdir()) / f"dcdit-{user}"


def _make_private(folder: Path) -> None:
    """Make ``folder`` for this user alone; :class:`UserError` if it belongs to another one, or others may write to it.

    Whoever can write to it could forge shards, whose samples have checksums against damage alone.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            folder.mkdir(0o700)
        link, target = folder.lstat(), folder.stat()
    except OSError as error:
        raise UserError(f"data.cache: {describe_write_error(folder, error)}") from error
    own = not hasattr(os, "getuid") or link.st_uid == target.st_uid == os.getuid()
    if not own or not stat.S_ISDIR(target.st_mode) or target.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise UserError(
            f"{folder} is no folder that this user alone can write to: what lies there may be forged. Remove it, or"
            " name another folder with data.cache=..."
        )


_verified: set[tuple[str, int]] = set()
"""Digest and inode of the cached shards that this process has checked."""


def _is_whole(path: Path, shard: Shard) -> bool:
    """Whether a cached file has the manifest's checksum; each process computes it once."""
    key = (shard.sha256, path.stat().st_ino)
    if key not in _verified and file_digest(path) == shard.sha256:
        _verified.add(key)
    return key in _verified


def _cached_name(shard: Shard) -> str:
    """The name of a shard in the cache: its digest, so that shards written anew under an old name are fetched anew."""
    return f"{shard.sha256[:32]}.tar"


class ShardReader:
    """The ``shards`` of a manifest, which one process opens, and fetches ahead where they are remote."""

    def __init__(self, location: Location, shards: Sequence[Shard]) -> None:
        self.location, self.shards = location, shards
        self._open: dict[int, BinaryIO] = {}
        self._failed: dict[int, tuple[float, OSError]] = {}
        self._background = ThreadPoolExecutor(1, "fetch") if location.remote else None

    def prefetch(self, current: Sequence[int], following: Sequence[int]) -> None:
        """Fetch the shards that are read next, and those after them, in the background; close all but ``current``."""
        for number in self._open.keys() - set(current):
            self._open.pop(number).close()
        if self._background:
            needed = [self.shards[number] for number in (*current, *following)]
            for shard in needed:
                self._background.submit(self._fetch_quietly, shard, needed)

    def _fetch_quietly(self, shard: Shard, needed: Collection[Shard]) -> None:
        with suppress(OSError):  # whoever needs the shard tries again and reports
            self.location.fetch(shard, needed)

    def descriptor(self, number: int) -> int:
        """File descriptor of a shard, for ``os.pread``; raises OSError if it cannot be had."""
        if number in self._failed:
            since, error = self._failed[number]
            if time.monotonic() - since < _RETRY_AFTER:  # do not ask a dead server for every sample
                raise error
        if number not in self._open:
            try:
                self._open[number] = file = _open_shard(self.location.fetch(self.shards[number]))
            except OSError as error:
                self._failed[number] = (time.monotonic(), error)
                raise
            if hasattr(os, "posix_fadvise"):  # its samples are wanted in random order: have it read in one go
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
        return self._open[number].fileno()
