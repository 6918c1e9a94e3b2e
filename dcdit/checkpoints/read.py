"""The only reader of torch checkpoints: complete files of finite tensors and plain values; no pickle is executed."""

import io
import zipfile
from collections.abc import Callable, Iterator
from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from dcdit.checkpoints.pickles import StoredTensor, unpickle
from dcdit.checks import reason_of, visible
from dcdit.errors import UserError
from dcdit.runtime import limits
from dcdit.runtime.files import open_archive, open_regular

_LEGACY = 0x1950A86A20F9469CFC6C
"""First value in a file of torch before 1.6."""

_MAX_SHARING = 4
"""Tensors may hold this many times the numbers of their file, by sharing them; those of our files share none."""


class DamagedError(UserError):
    """A file is damaged, or not a checkpoint at all: another checkpoint of the run may be readable."""


def read_checkpoint(path: str | PathLike[str], legacy: bool = False) -> dict[str, Any]:
    """Read the tensors and plain values of a torch checkpoint; objects of other classes become empty objects.

    Nothing that the file names is imported or called. Checksums are verified, and memory is allocated only for what
    the file holds, within :mod:`dcdit.runtime.limits`.

    Args:
        path: the file.
        legacy: accept files of torch before 1.6 too, which have no checksums: old published weights are such files.

    Returns:
        The values by name.

    Raises:
        UserError: if the file does not exist, is not a regular file, may not be read, or does not fit into memory.
        DamagedError: if it is damaged or no torch checkpoint, claims more than it holds, or has a non-finite number.
    """
    name = visible(str(path))
    if Path(path).is_dir():
        raise UserError(f"checkpoint {name} is a directory: give the file, such as its checkpoints/last.ckpt")
    try:
        with open_regular(Path(path)) as file:
            values = _read_zip(file) if not legacy or zipfile.is_zipfile(file) else _read_legacy(file)
        if not isinstance(values, dict):
            raise ValueError("it holds no values by name")
        _check_finite(values)
    except FileNotFoundError:
        raise UserError(f"checkpoint {name} does not exist") from None
    except UserError as error:
        raise UserError(f"checkpoint {error}") from None
    except MemoryError as error:
        raise UserError(f"checkpoint {name} does not fit into the memory of this machine") from error
    except Exception as error:  # whatever a damaged or hostile file provokes
        raise DamagedError(f"checkpoint {name} cannot be read safely: {reason_of(error)}") from error
    return values


def _read_zip(file: BinaryIO) -> object:
    """Read the values in an archive of torch since 1.6."""
    if not zipfile.is_zipfile(file):
        raise ValueError("it is no whole file of torch.save (a zip archive, since torch 1.6)")
    with open_archive(file) as archive:
        sizes = {member.filename: member.file_size for member in archive.infolist()}
        if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
            raise ValueError("it is compressed, which torch.save never does")
        if len(sizes) < len(archive.infolist()) or sum(sizes.values()) > file.seek(0, io.SEEK_END):
            raise ValueError("it says to hold more than its size")
        pickles = [name for name in sizes if name.endswith("/data.pkl")]
        if len(pickles) != 1 or sizes[pickles[0]] > limits.TEXT_BYTES:
            raise ValueError("it is no file of torch.save")
        folder = pickles[0].removesuffix("data.pkl")
        if f"{folder}byteorder" in sizes and archive.read(f"{folder}byteorder") != b"little":
            raise ValueError("its numbers are in another order of bytes than those of this machine")
        values, _ = unpickle(io.BytesIO(archive.read(pickles[0])))
        return _with_tensors(values, lambda record: archive.read(f"{folder}data/{record}"), sum(sizes.values()))


def _read_legacy(file: BinaryIO) -> object:
    """Read a file of torch before 1.6: five pickles, then the numbers of one storage after the other."""
    file.seek(0)
    head = io.BytesIO(file.read(limits.TEXT_BYTES))
    magic, version, system = (unpickle(head)[0] for _ in range(3))
    if magic != _LEGACY or version != 1001 or not isinstance(system, dict) or system.get("little_endian") is not True:
        raise ValueError("it is no file of torch.save")
    (values, storages), (records, _) = unpickle(head), unpickle(head)
    position, end = head.tell(), file.seek(0, io.SEEK_END)
    offsets: dict[str, int] = {}
    for record in records:
        file.seek(position)
        if int.from_bytes(file.read(8), "little") != storages[record].elements:
            raise ValueError("a tensor asks for other numbers than the file holds")
        offsets[record] = position + 8
        position = offsets[record] + storages[record].bytes
        if position > end:
            raise ValueError("it ends before its numbers do")

    def content(record: str) -> bytes:
        file.seek(offsets[record])
        return file.read(storages[record].bytes)

    return _with_tensors(values, content, end)


def _with_tensors(values: object, read: Callable[[str], bytes], held: int) -> object:
    """Replace each :class:`StoredTensor` within ``values`` by its tensor; ``read`` returns the bytes of a record.

    Raises:
        ValueError: if the tensors claim more than the file holds, which has ``held`` bytes.
    """
    stored = [leaf for _, leaf in _leaves(values) if isinstance(leaf, StoredTensor)]
    if sum(tensor.bytes for tensor in stored) > _MAX_SHARING * held:
        raise ValueError("its tensors say to hold more than its size")
    storages: dict[str, Tensor] = {}

    def load(stored: StoredTensor) -> Tensor:
        record, dtype, elements = stored.storage.record, stored.storage.dtype, stored.storage.elements
        if record not in storages:
            content = read(record)
            storages[record] = torch.empty(len(content), dtype=torch.uint8)
            storages[record].numpy().data[:] = content
        if stored.storage.bytes > len(storages[record]):
            raise ValueError(f"a tensor asks for {elements} elements that the file does not hold")
        numbers = storages[record][: stored.storage.bytes].view(dtype)
        return numbers.as_strided(stored.size, stored.stride, stored.offset)

    def replace(value: object) -> object:
        if isinstance(value, StoredTensor):
            return load(value)
        if isinstance(value, dict):
            return {key: replace(part) for key, part in value.items()}
        return type(value)(map(replace, value)) if isinstance(value, list | tuple) else value

    return replace(values)


def _check_finite(values: object) -> None:
    """Raise ValueError if a tensor within nested values is not finite."""
    for path, tensor in _leaves(values):
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and not _finite(tensor):
            raise ValueError(f"{'.'.join(str(key)[:80] for key in path)} is not finite")


def _finite(tensor: Tensor) -> bool:
    # The sum is not finite if an element is not, or if it overflows: only then is every element looked at.
    return bool(tensor.sum(dtype=torch.float64).isfinite()) or bool(tensor.isfinite().all())


def _leaves(values: object, path: tuple[object, ...] = ()) -> Iterator[tuple[tuple[object, ...], object]]:
    """Yield each single value within nested ones, after the keys that lead to it."""
    if isinstance(values, dict | list | tuple):
        for key, value in values.items() if isinstance(values, dict) else enumerate(values):
            yield from _leaves(value, (*path, key))
    else:
        yield path, values
