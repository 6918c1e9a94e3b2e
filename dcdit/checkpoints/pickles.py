"""Read pickles of torch as plain values: nothing that they name is imported, built or called."""

import math
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import torch

from dcdit.runtime import limits

_MAX_AXES = 16  # dimensions of a tensor
_MAX_NAME = 500  # letters in the name of a class
_MAX_ODD_KEYS = 1000  # large numbers as keys; more of them could have equal hashes and make a mapping slow

DTYPES = {
    f"{module}.{name}Storage": dtype
    for module in ("torch", "torch.cuda")
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
    )
}
"""Types of tensors that are read, by the name of their storage's class."""


@dataclass(frozen=True, eq=False)
class Foreign:
    """Stands for a class that a pickle names, and for its objects; it holds nothing but the name, and does nothing."""

    name: str


@dataclass(frozen=True, eq=False)
class Storage:
    """The numbers of one tensor or several: so many ``elements``, in the file's ``record`` of that name."""

    record: str
    dtype: torch.dtype
    elements: int

    @property
    def bytes(self) -> int:
        """Number of bytes in the file."""
        return self.elements * self.dtype.itemsize


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A tensor in a file: its storage, and the offset, size and stride within it, in elements."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Number of bytes of its elements."""
        return math.prod(self.size) * self.storage.dtype.itemsize

    def __post_init__(self) -> None:
        axes, numbers = len(self.size), (self.offset, *self.size, *self.stride)
        if not isinstance(self.storage, Storage):
            raise ValueError("a tensor does not say where its numbers are")
        small = all(isinstance(number, int) and 0 <= number < 1 << 48 for number in numbers)
        if axes != len(self.stride) or axes > _MAX_AXES or not small:
            raise ValueError("a tensor has a shape that is none")
        elements = math.prod(self.size)
        end = self.offset + sum((size - 1) * stride for size, stride in zip(self.size, self.stride, strict=True)) + 1
        if elements > self.storage.elements or (elements and end > self.storage.elements):
            raise ValueError(f"a tensor says to have {elements} elements, which are not there")


def unpickle(file: BytesIO) -> tuple[Any, dict[str, Storage]]:
    """Read the next pickle in ``file``; returns its values, and the storages that it names by their records.

    Tensors are :class:`StoredTensor`, objects of other classes :class:`Foreign`, and all else plain values.

    Raises:
        Exception: of any type, if it is no pickle of torch, or exceeds :mod:`dcdit.runtime.limits`.
    """
    unpickler = _Unpickler(file)
    values = unpickler.load()
    limits.check_budget(values)
    return values, unpickler.storages


class _Counted(dict[int, Any]):
    """The handlers of a pickle's opcodes, which counts the opcodes that are run."""

    count = 0

    def __getitem__(self, code: int) -> Any:
        self.count += 1
        if self.count > limits.VALUES:
            raise ValueError(f"it holds more than {limits.VALUES} values")
        return super().__getitem__(code)

    def __missing__(self, code: int) -> Any:
        raise ValueError(f"torch.save writes no code {code} into a pickle")


_CODES = (
    *(pickle.PROTO, pickle.FRAME, pickle.STOP, pickle.MARK, pickle.POP, pickle.POP_MARK),
    *(pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE, pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG1),
    *(pickle.BINFLOAT, pickle.BINUNICODE, pickle.SHORT_BINUNICODE, pickle.BINSTRING),
    *(pickle.SHORT_BINSTRING, pickle.BINBYTES, pickle.SHORT_BINBYTES),
    *(pickle.EMPTY_LIST, pickle.APPEND, pickle.APPENDS, pickle.EMPTY_DICT, pickle.SETITEM, pickle.SETITEMS),
    *(pickle.EMPTY_TUPLE, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3),
    *(pickle.BINPUT, pickle.LONG_BINPUT, pickle.MEMOIZE, pickle.BINGET, pickle.LONG_BINGET),
    *(pickle.GLOBAL, pickle.STACK_GLOBAL, pickle.BINPERSID, pickle.REDUCE, pickle.NEWOBJ, pickle.BUILD),
)


class _Unpickler(pickle._Unpickler):
    """The standard library's unpickler in Python, without the opcodes that would import, build or call something."""

    stack: list[Any]
    _odd_keys = 0

    def __init__(self, file: BytesIO) -> None:
        super().__init__(file, encoding="utf-8")
        self.storages: dict[str, Storage] = {}
        known = pickle._Unpickler.dispatch
        self.codes = _Counted({code[0]: _OWN.get(code, known[code[0]]) for code in _CODES})
        self.dispatch = self.codes  # type: ignore[misc]  # of this object, which counts for itself

    def find_class(self, module: str, name: str) -> Foreign:
        """Return the class that the pickle names as a :class:`Foreign`, which imports nothing."""
        if len(module) + len(name) > _MAX_NAME:
            raise ValueError("it names a class with too many letters")
        if module in _HARMFUL or f"{module}.{name}" in _HARMFUL:
            raise ValueError(f"it asks to run {module}.{name}, do not trust it")
        return Foreign(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Storage:
        """Return a storage; ``pid`` is (``storage``, type, record, device, elements), and a view in old files."""
        kind, record, elements = pid[1], pid[2], pid[4]
        name = kind.name if isinstance(kind, Foreign) else type(kind).__name__
        if name not in DTYPES:
            raise ValueError(f"it holds numbers of the type {name}, which is not read")
        if not (isinstance(record, str) and isinstance(elements, int) and elements >= 0) or (pid[5:] or (None,))[0]:
            raise ValueError("a tensor does not say where its numbers are")
        self.storages[record] = Storage(record, DTYPES[name], elements)
        return self.storages[record]

    def _build(self) -> None:
        """Replace a class and its arguments on the stack by a tensor, a mapping, or a :class:`Foreign`."""
        arguments, kind = self.stack.pop(), self.stack.pop()
        if not isinstance(kind, Foreign) or not isinstance(arguments, tuple):
            raise ValueError("it calls what is no class")
        make = _MAKERS.get(kind.name)
        if kind.name in ("collections.OrderedDict", "collections.Counter", "collections.defaultdict"):
            items = arguments[-1] if arguments and isinstance(arguments[-1], dict | list) else []
            self.codes.count += len(items)
            self.stack.append({})
            self._set(items.items() if isinstance(items, dict) else items)
        else:
            self.stack.append(make(*arguments) if make else Foreign(kind.name))

    def _set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set([(key, value)])

    def _set_items(self) -> None:
        items = self.pop_mark()  # type: ignore[attr-defined]
        self._set(zip(items[::2], items[1::2], strict=True))

    def _extend(self, values: list[object]) -> None:
        target = self.stack[-1]
        if isinstance(target, list):
            target.extend(values)
        elif not isinstance(target, Foreign):
            raise ValueError("it appends to what is no list")

    def _set(self, items: Any) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict | Foreign):
            raise ValueError("it names values in what is no mapping")
        for key, value in items:
            if isinstance(key, float) or (isinstance(key, int) and not -(1 << 31) < key < 1 << 31):
                self._odd_keys += 1
            if not isinstance(key, str | int | float | Foreign | None) or self._odd_keys > _MAX_ODD_KEYS:
                raise ValueError("a mapping in it has keys that are neither names nor small numbers")
            if isinstance(target, dict):
                target[key] = value


_OWN: dict[bytes, Callable[[Any], object]] = {
    pickle.REDUCE: _Unpickler._build,
    pickle.NEWOBJ: _Unpickler._build,
    pickle.BUILD: lambda unpickler: unpickler.stack.pop(),  # the state of an object is dropped
    pickle.APPEND: lambda unpickler: unpickler._extend([unpickler.stack.pop()]),
    pickle.APPENDS: lambda unpickler: unpickler._extend(unpickler.pop_mark()),
    pickle.SETITEM: _Unpickler._set_item,
    pickle.SETITEMS: _Unpickler._set_items,
}

_HARMFUL = {"os", "posix", "nt", "sys", "subprocess", "shutil", "socket", "builtins.eval", "builtins.exec"}
"""Modules and functions that no checkpoint needs: they are not called either, but their author is not to be trusted."""


_MAKERS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": StoredTensor,
    "torch._utils._rebuild_tensor_v2": lambda *arguments: StoredTensor(*arguments[:4]),
    "torch._utils._rebuild_parameter": lambda tensor, *ignored: tensor,
    "torch.Size": lambda sizes: sizes,
}
