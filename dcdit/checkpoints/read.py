"""The one reader of checkpoint files: tensors and plain values, whole and finite, never anyone's pickle."""

import io
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dcdit.errors import UserError

_MOST_VALUES = 64 << 20
"""Bytes of the values beside the tensors; ours have some hundred thousand."""


class DamagedError(UserError):
    """A checkpoint that is no longer what was written, or never was one: another may be whole."""


class _Inert:
    """Stands in for every class that a checkpoint names and torch does not trust: holds nothing, does nothing."""

    def __init__(self, *ignored: Any) -> None:
        pass

    def __setstate__(self, ignored: Any) -> None:
        pass


def read_checkpoint(path: str | PathLike[str], legacy: bool = False) -> dict[str, Any]:
    """Read a torch checkpoint's tensors and plain values; foreign classes in it become inert objects.

    Nothing that the file names is imported or called. Checksums are verified, and nothing is allocated that the file
    does not hold, before torch reads it.

    Args:
        path: the file.
        legacy: take files of torch before 1.6 too, which have no checksums: published weights of old networks.

    Raises:
        UserError: if there is no such file.
        DamagedError: if it is no torch checkpoint, damaged, asks for more than it holds, or has a number that is not
            finite.
    """
    place = Path(path)
    if place.is_dir():
        raise UserError(f"checkpoint {path} is a directory: give the file, such as its checkpoints/last.ckpt")
    if not place.exists():
        raise UserError(f"checkpoint {path} does not exist")
    if not place.is_file():
        raise UserError(f"checkpoint {path} is no file")
    try:
        if not legacy or zipfile.is_zipfile(place):
            _verify(place)
        foreign = torch.serialization.get_unsafe_globals_in_checkpoint(place)
        with torch.serialization.safe_globals([(_Inert, name) for name in foreign]):
            values = torch.load(place, map_location="cpu", weights_only=True)
        if not isinstance(values, dict):
            raise ValueError("it holds no values by name")
        _check_tensors(values)
    except PermissionError as error:
        raise UserError(f"checkpoint {path} cannot be read: {error.strerror}") from None
    except Exception as error:  # whatever a damaged or hostile file provokes
        blocked = re.search(r"GLOBAL (\S+)", str(error))
        first = (str(error).splitlines() or [type(error).__name__])[0]
        reason = f"it asks to run {blocked[1]}, do not trust it" if blocked else first
        raise DamagedError(f"checkpoint {path} cannot be read safely: {reason}") from error
    return values


def _verify(path: Path) -> None:
    """Raise unless the file is a whole archive of torch that asks for no more than it holds."""
    if not zipfile.is_zipfile(path):
        raise ValueError("it is no whole file of torch.save (a zip archive, since torch 1.6)")
    with zipfile.ZipFile(path) as archive:
        sizes = {member.filename: member.file_size for member in archive.infolist()}
        if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
            raise ValueError("it is compressed, which torch.save never does")
        if len(sizes) < len(archive.infolist()) or sum(sizes.values()) > path.stat().st_size:
            raise ValueError("it says to hold more than its size")
        damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"the checksum of {damaged} differs, the file is damaged")
        values = [name for name in sizes if name.endswith("/data.pkl")]
        if len(values) != 1 or sizes[values[0]] > _MOST_VALUES:
            raise ValueError("it is no file of torch.save")
        scan = _Scan(io.BytesIO(archive.read(values[0])))
        scan.records = {name.removeprefix(values[0].removesuffix("data.pkl") + "data/"): sizes[name] for name in sizes}
        scan.load()


class _Scan(pickle._Unpickler):  # in Python: it keeps what it has read in a dictionary, whatever numbers a file gives
    """Walks through a pickle without importing or calling anything, and sees that every tensor's bytes are there."""

    records: Mapping[str, int]

    def find_class(self, module: str, name: str) -> type:
        """Nothing is imported: whatever a pickle names is a class of that name whose objects do nothing."""
        return type(name, (_Anything,), {})

    def persistent_load(self, pid: Any) -> Any:
        """A tensor's storage: (``storage``, type, record, device, number of elements)."""
        kind, record, elements = pid[1], pid[2], pid[4]
        size = _SIZES.get(kind.__name__) if isinstance(kind, type) else None
        if size is None or not isinstance(elements, int) or not 0 <= elements * size <= self.records.get(record, -1):
            raise ValueError(f"a tensor asks for {elements} elements that the file does not hold")
        return _Inert()

    def get_extension(self, code: int) -> None:
        """Of the copyreg module, for which torch has no use."""
        raise ValueError("it is no file of torch.save")


class _Anything(_Inert, dict[Any, Any]):
    """An object in a pickle that is only walked through: takes items and states."""

    def append(self, ignored: Any) -> None:
        pass

    def extend(self, ignored: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass


_SIZES = {
    f"{name}Storage": torch.empty(0, dtype=dtype).element_size()
    for name, dtype in (
        ("Double", torch.float64),
        ("Float", torch.float32),
        ("Half", torch.float16),
        ("BFloat16", torch.bfloat16),
        ("Long", torch.int64),
        ("Int", torch.int32),
        ("Short", torch.int16),
        ("Char", torch.int8),
        ("Byte", torch.uint8),
        ("Bool", torch.bool),
        ("Untyped", torch.uint8),
    )
}


def _check_tensors(values: Any) -> None:
    """Raise if a tensor within nested values is not finite, or larger than its bytes."""
    for path, tensor in _tensors(values):
        if tensor.layout is not torch.strided or tensor.device.type != "cpu":
            raise ValueError(f"{path} is no dense tensor")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise ValueError(f"{path} says to have {tensor.numel()} elements, which are not there")
        if tensor.is_floating_point() and not _finite(tensor):
            raise ValueError(f"{path} is not finite")


def _finite(tensor: Tensor) -> bool:
    # A sum is finite unless a part of it is not, or it overflows: only then is looked at each element.
    return bool(tensor.sum(dtype=torch.float64).isfinite()) or bool(tensor.isfinite().all())


def _tensors(values: Any) -> Iterator[tuple[str, Tensor]]:
    """All tensors in nested values, each once, by where they are."""
    seen: set[int] = set()
    stack: list[tuple[str, Any]] = [("", values)]
    while stack:
        path, each = stack.pop()
        if isinstance(each, Tensor):
            yield path, each
        elif isinstance(each, dict | list | tuple) and id(each) not in seen:
            seen.add(id(each))
            items = each.items() if isinstance(each, dict) else enumerate(each)
            stack += [(f"{path}.{key}" if path else str(key), value) for key, value in items]
