"""Files: written completely or not at all, and read with a limit and a schema."""

import csv
import ctypes
import errno
import hashlib
import io
import json
import math
import os
import re
import shutil
import socket
import stat
import sys
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import is_dataclass
from itertools import count
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, BinaryIO, NoReturn, TypeVar, overload

from dcdit.checks import call_checked, conform, shown, visible
from dcdit.errors import UserError
from dcdit.runtime import limits
from dcdit.runtime.limits import BudgetError, check_budget

if TYPE_CHECKING:
    import numpy as np
    from _typeshed import ReadableBuffer
    from numpy.typing import NDArray

T = TypeVar("T")

_DRAFT = re.compile(r"\..+\.(?P<host>.+)-(?P<process>\d{1,9})-\d+\.part")
_numbers = count()
_swept: set[Path] = set()


class UnwritableError(UserError):
    """A file cannot be written; its earlier content is still there."""


class _Raw(io.FileIO):
    """A file that keeps the error of a failed write: a library that writes to it may raise another, or none."""

    failure: OSError | None = None

    def write(self, content: "ReadableBuffer") -> int:
        try:
            return super().write(content)
        except OSError as error:
            self.failure = error
            raise


class _Draft(io.BufferedWriter):
    """A buffer without a descriptor, so that no library writes past it."""

    def fileno(self) -> int:
        raise io.UnsupportedOperation("fileno")


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a file that replaces ``path`` when the block ends: in one step, after its content is on the disk.

    If the block raises, or the process dies, ``path`` stays as it was. Several processes may write the same path; the
    last one wins. Drafts of dead processes are removed.

    Raises:
        UnwritableError: if it cannot be written, naming the file and the remedy.
    """
    _sweep(path.parent)
    draft = _draft_of(path)
    with _explaining(path):
        raw = _Raw(draft, "x")
    try:
        with _Draft(raw, 1 << 20) as file:
            yield file
            try:
                file.flush()
                os.fsync(raw.fileno())
                draft.replace(path)
                _sync(path.parent)
            except OSError as error:
                raw.failure = error
                raise
    except Exception as error:
        if raw.failure is not None:
            raise UnwritableError(describe_write_error(path, raw.failure)) from error
        raise
    finally:
        with suppress(OSError):
            raw.close()
        draft.unlink(missing_ok=True)


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """Make an empty folder that replaces ``folder`` when the block ends: in one step, with all that is in it.

    If the block raises, or the process dies, ``folder`` stays as it was. Its earlier content is deleted afterwards.

    Raises:
        UnwritableError: if it cannot be written, naming the folder and the remedy.
    """
    folder = folder.resolve()
    _sweep(folder.parent)
    draft = _draft_of(folder)
    try:
        with _explaining(folder):
            draft.mkdir()
        yield draft
        with _explaining(folder, remedy=": choose a folder within it"):
            if folder.exists():
                _exchange(draft, folder)
            else:
                draft.rename(folder)
            _sync(folder.parent)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _draft_of(path: Path) -> Path:
    """A new name beside ``path`` that tells which process of which machine writes there, see :func:`_sweep`."""
    return path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}-{next(_numbers)}.part")


@contextmanager
def _explaining(path: Path, key: str = "", remedy: str = "") -> Iterator[None]:
    """Raise an OSError of the block as an UnwritableError of ``path``."""
    try:
        yield
    except OSError as error:
        raise UnwritableError(f"{key}{describe_write_error(path, error)}{remedy}") from error


def _exchange(one: Path, other: Path) -> None:
    """Exchange two folders, in one step on Linux, in three elsewhere."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if rename is None or rename(here, os.fsencode(one), here, os.fsencode(other), exchange):
        aside = one.with_name(f"{one.name}.part")
        other.rename(aside)
        try:
            one.rename(other)
        except OSError:
            aside.rename(other)
            raise
        aside.rename(one)


def describe_write_error(path: Path, error: OSError) -> str:
    """Say why ``path`` cannot be written, and what to do about it."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{path} cannot be written, the disk is full: make room there, or choose another place"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{path} cannot be written ({os.strerror(error.errno)}): choose another place, or have it made writable"
    if error.errno == errno.ENOENT:
        return f"{path} cannot be written, its folder is gone: was it moved or deleted meanwhile?"
    return f"{path} cannot be written ({describe_dangling_link(error) or error.strerror or error})"


def describe_dangling_link(error: OSError) -> str:
    """Say where the link leads that a folder was to be made in place of; empty for any other error."""
    link = error.filename
    if error.errno != errno.EEXIST or not isinstance(link, str) or not os.path.islink(link) or os.path.exists(link):
        return ""
    return f"{link} is a symbolic link to {os.readlink(link)}, which does not exist: make that, or name another place"


def make_writable_folder(folder: Path, key: str) -> None:
    """Make ``folder`` and check that files can be written there, before any work is done for it.

    Raises:
        UnwritableError: if it cannot be made or written; the message begins with ``key``.
    """
    with _explaining(folder, f"{key}: "):
        folder.mkdir(parents=True, exist_ok=True)
        probe = _draft_of(folder / "probe")
        probe.touch()
        probe.unlink()


def write_text(path: Path, text: str) -> None:
    """Write a text, completely or not at all, with lone surrogates as escapes; UnwritableError if that fails."""
    with replacing(path) as file:
        file.write(text.encode(errors="backslashreplace"))


def write_json(path: Path, values: object) -> None:
    """Write plain values as JSON, completely or not at all; UnwritableError if that fails."""
    write_text(path, json.dumps(values, indent=1, allow_nan=False) + "\n")


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, object]]) -> None:
    """Write a table, completely or not at all; UnwritableError if that fails.

    Missing values stay empty. Text that a spreadsheet would take for a formula gets an apostrophe in front.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, [_no_formula(column) for column in columns])
    writer.writeheader()
    writer.writerows({_no_formula(key): _no_formula(value) for key, value in row.items()} for row in rows)
    write_text(path, text.getvalue())


def _no_formula(value: T) -> T | str:
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r") else value


def open_regular(path: Path, max_bytes: int | None = None) -> BinaryIO:
    """Open a regular file for reading bytes; reading a FIFO would wait for ever, and a device never ends.

    Raises:
        FileNotFoundError: if there is no such file.
        UserError: if it is no regular file, is larger than ``max_bytes``, or may not be read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:  # a ValueError for a null byte in the path
        raise UserError(f"{visible(str(path))} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        reason = "is no regular file"
    elif max_bytes is not None and status.st_size > max_bytes:
        reason = f"has {status.st_size} bytes: at most {max_bytes} are read there"
    else:
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    raise UserError(f"{path} {reason}")


def open_archive(file: BinaryIO) -> zipfile.ZipFile:
    """Open a zip archive; BadZipFile if it is none, or its table of contents exceeds the limit."""
    end_record = zipfile._EndRecData(file)  # type: ignore[attr-defined]  # None where there is none
    if end_record and end_record[zipfile._ECD_SIZE] > limits.HEADER_BYTES:  # type: ignore[attr-defined]
        raise zipfile.BadZipFile(f"the list of its members has more than {limits.HEADER_BYTES} bytes")
    return zipfile.ZipFile(file)


def file_digest(path: Path) -> str:
    """SHA-256 of a regular file in hexadecimal digits; raises as :func:`open_regular` does."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def content_digest(content: Mapping[str, object]) -> str:
    """SHA-256 of plain values, the same for equal values: files of dcdit hold it, so that a change is noticed."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_text(path: Path) -> str:
    """Read a text file that dcdit wrote.

    Raises:
        FileNotFoundError: if there is no such file.
        UserError: if it cannot be read, is no regular file or no text, or is larger than ``limits.TEXT_BYTES``.
    """
    try:
        with open_regular(path, limits.TEXT_BYTES) as file:
            return file.read().decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no text: {error.reason} at byte {error.start}") from error


@overload
def read_json(path: Path, kind: type[T], remedy: str) -> T: ...


@overload
def read_json(path: Path, kind: object, remedy: str) -> Any: ...


def read_json(path: Path, kind: Any, remedy: str) -> Any:
    """Read a JSON file that dcdit wrote, as an instance of the annotation ``kind``, see :func:`dcdit.checks.checking`.

    Raises:
        FileNotFoundError: if there is no such file.
        UserError: if it holds other values, naming file and key; the message ends with ``remedy``.
    """
    with open_regular(path, limits.TEXT_BYTES) as file:
        content = file.read()
    try:
        if sum(map(content.count, (b",", b"[", b"{"))) > limits.VALUES:
            raise BudgetError(f"it holds more than {limits.VALUES} values")
        values = json.loads(content.decode(), parse_constant=_not_finite, parse_float=_finite)
        check_budget(values)
        if isinstance(kind, type) and is_dataclass(kind):
            return call_checked(kind, values, "")
        return conform("content", values, kind)
    except (ValueError, RecursionError) as error:
        message = str(error) if isinstance(error, UserError | BudgetError) else f"it is no JSON, {error}"
        prefix = "" if message.startswith(str(path)) else f"{path}: "
        raise UserError(f"{prefix}{message}: {remedy}") from error


def read_array_header(file: IO[bytes]) -> "tuple[tuple[int, ...], np.dtype[Any]]":
    """Read shape and type of the array in an ``.npy`` file, stored row by row; ValueError if it holds none."""
    import numpy as np

    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, by_column, dtype = read(file)
    except (OSError, zipfile.BadZipFile):
        raise
    except Exception as error:  # whatever Python's parser makes of a header
        raise ValueError(f"its header is none of an array, {type(error).__name__}") from error
    if by_column or not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError(f"its array has the shape {shown(shape)}, by column: {by_column}")
    return shape, dtype


def read_arrays(path: Path, names: Sequence[str], remedy: str) -> "dict[str, NDArray[Any]]":
    """Read arrays of numbers by name from an uncompressed ``.npz`` file that dcdit wrote; checksums are verified.

    Raises:
        FileNotFoundError: if there is no such file.
        UserError: if it is damaged, lacks an array, or a number in it is not finite; the message ends with ``remedy``.
    """
    import numpy as np

    arrays: dict[str, NDArray[Any]] = {}
    try:
        with open_regular(path) as raw, open_archive(raw) as archive:
            for name in names:
                member = archive.getinfo(f"{name}.npy")
                if member.compress_type != zipfile.ZIP_STORED:
                    raise ValueError(f"{name} is compressed")
                with archive.open(member) as file:
                    shape, dtype = read_array_header(file)
                    if dtype.kind not in "fiu":
                        raise ValueError(f"{name} is no array of ours")
                    arrays[name] = np.frombuffer(bytearray(file.read()), dtype).reshape(shape)
                if not np.isfinite(arrays[name]).all():
                    raise ValueError(f"{name} is not finite everywhere")
    except (FileNotFoundError, UserError):
        raise
    except Exception as error:  # numpy and zipfile raise whatever a damaged file provokes
        raise UserError(f"{path} is damaged ({error}): {remedy}") from error
    return arrays


def _finite(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _not_finite(text)


def _not_finite(text: str) -> NoReturn:
    raise UserError(f"{text[:60]} is not a finite number")


def _sync(folder: Path) -> None:
    """Wait until a rename in ``folder`` is on the disk, on file systems that let a folder be opened."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _sweep(folder: Path) -> None:
    """Remove drafts of processes of this machine that have ended; each process looks once into each folder."""
    if folder in _swept:
        return
    _swept.add(folder)
    with suppress(OSError):
        for name in os.listdir(folder):
            match = _DRAFT.fullmatch(name)
            if match and match["host"] == socket.gethostname() and not _is_running(int(match["process"])):
                shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink(missing_ok=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except OSError as error:
        return not isinstance(error, ProcessLookupError)  # it may be another user's
    return True
