"""How a process computes: device, precision, threads; the digest of a network's weights; networks without memory."""

import hashlib
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.util import find_spec
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from dcdit.checks import reason_of, shown
from dcdit.errors import UserError
from dcdit.runtime.processes import launched


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """A context that computes in ``bf16`` or ``fp16``; for ``fp32`` it changes nothing."""
    types = {"bf16": torch.bfloat16, "fp16": torch.float16}
    return torch.autocast(device.type, dtype=types[precision]) if precision in types else nullcontext()


@contextmanager
def threads(number: int | None) -> Iterator[None]:
    """Compute with ``number`` threads on the CPU; None leaves them as they are."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def pick_device(name: str) -> torch.device:
    """The device called ``name``; ``auto`` takes a GPU where there is one, this process's own of several.

    Raises:
        UserError: if it is not there, or computes nothing (``meta``).
    """
    if name == "auto":
        name = f"cuda:{launched().local_rank % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"
    try:
        numbers = torch.ones(2, device=name)
        numbers.sum().item()  # a device without memory has no value to return
        return numbers.device
    except Exception as error:  # each backend has errors of its own for being absent
        raise UserError(f"device={shown(name)} computes nothing here ({reason_of(error)}): take cpu or auto") from error


def has_amx() -> bool:
    """Whether torch uses matrix units of this CPU for bfloat16 (AMX)."""
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capabilities.get("amx_bf16"))


def check_compiler(key: str, device: str) -> None:
    """Raise :class:`UserError` unless torch.compile finds what it needs for a kind of device.

    On ``cpu`` that is a C++ compiler, on ``cuda`` Triton and a C compiler; other devices are let pass. ``key`` is the
    configuration key that asks for compiled code.
    """
    languages = {
        "cpu": ("C++", "CXX", ["clang++" if sys.platform == "darwin" else "g++"]),
        "cuda": ("C", "CC", ["gcc", "clang"]),
    }
    if device not in languages or sys.platform == "win32":
        return
    if device == "cuda" and find_spec("triton") is None:
        raise UserError(f"{key}=true needs Triton on a GPU: pip install triton, or take {key}=false")
    language, variable, names = languages[device]
    names = [os.environ[variable]] if os.environ.get(variable) else names
    if not any(map(shutil.which, names)):
        raise UserError(
            f"{key}=true needs a {language} compiler, and there is no {' or '.join(names)} on this machine: install one"
            f" (Debian: apt-get install g++), name yours in the environment variable {variable}, or take {key}=false"
        )


def has_compiler(device: str) -> bool:
    """Whether torch.compile finds what it needs for a kind of device, see :func:`check_compiler`."""
    try:
        check_compiler("compile", device)
    except UserError:
        return False
    return True


def describe_device(device: torch.device) -> str:
    """The name of a GPU, or the kind of device and its threads, to go with timings."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"


def fingerprint(module: torch.nn.Module) -> str:
    """The digest of a module's weights: 16 hexadecimal digits, the same wherever the weights were loaded from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().float().contiguous().numpy().data)
    return digest.hexdigest()[:16]


class _WithoutNormalDraws(TorchFunctionMode):
    """Skips the drawing of normal numbers: on the meta device that would import torch's compiler."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run ``func``, unless it draws normal numbers."""
        if func in (torch.nn.init.normal_, torch.Tensor.normal_):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


@contextmanager
def without_memory() -> Iterator[None]:
    """A context in which networks of any size are built at no cost: their parameters have shapes, but no values."""
    with torch.device("meta"), _WithoutNormalDraws():
        yield
