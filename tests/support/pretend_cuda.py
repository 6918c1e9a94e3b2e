"""A stand-in for a CUDA device: tensors that say they lie on ``cuda:0``, compute on the CPU, and are watched.

    with PretendCuda() as device:
        x = torch.randn(2, 3).to(device)
        ...
        device.reads, device.copies

Inside, ``.to("cuda")``, ``device="cuda"`` and the like mark a tensor's storage as the device's; whatever is computed
from marked tensors is marked. All tensors are plain CPU tensors underneath, so that autograd, autocast and optimisers
run as they do. What would fail on a GPU fails here: an operation on tensors of both sides (numbers without dimension
excepted), ``.numpy()`` of a marked tensor. What the host waits for is counted in ``reads``: reading a number, copies to
the CPU, and operations whose output's shape depends on values. Copies to the device are counted in ``copies``.
"""

import traceback
from collections import Counter
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.nn.attention.varlen
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._foreach_utils import _group_tensors_by_device_and_dtype
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CUDA = torch.device("cuda:0")
_READS = {
    "_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "equal",
    "is_nonzero", "bincount",
}  # fmt: skip
_MAY_MIX = {"copy_", "_to_copy", "index", "index_put", "index_put_", "_index_put_impl_"}


class MixedDevicesError(RuntimeError):
    """An operation on tensors of both sides."""


class PretendCuda:
    """See the module.

    Attributes:
        reads: how often the host read from the device, by the line of this package that asked.
        copies: how often tensors went to it.
    """

    def __init__(self) -> None:
        self.reads: Counter[str] = Counter()
        self.copies: Counter[str] = Counter()
        self._storages: dict[int, StorageWeakRef] = {}
        self._stack, self._quiet = ExitStack(), False

    def __enter__(self) -> "PretendCuda":
        known = torch.Tensor.device.__get__  # type: ignore[attr-defined]
        patches = {
            "device": property(lambda tensor: CUDA if self.has(tensor) else known(tensor)),
            "is_cuda": property(lambda tensor: self.has(tensor)),
            "is_cpu": property(lambda tensor: not self.has(tensor) and known(tensor).type == "cpu"),
        }
        for name, value in patches.items():
            self._stack.enter_context(mock.patch.object(torch.Tensor, name, value, create=True))
        self._stack.enter_context(mock.patch("torch.Generator", _Generator))
        self._stack.enter_context(mock.patch("torch.autocast", _Autocast))
        self._stack.enter_context(mock.patch("torch.cuda.is_available", return_value=True))
        stream = SimpleNamespace(is_capturing=lambda: False)
        self._stack.enter_context(mock.patch("torch.accelerator.current_stream", return_value=stream))
        # what optimisers ask before torch 2.12
        self._stack.enter_context(mock.patch("torch.cuda.is_current_stream_capturing", return_value=False))
        self._stack.enter_context(mock.patch("torch.cuda.get_rng_state", side_effect=lambda *_: torch.get_rng_state()))
        self._stack.enter_context(mock.patch("torch.cuda.set_rng_state"))
        self._stack.enter_context(mock.patch("torch.cuda.max_memory_allocated", return_value=0))
        self._stack.enter_context(mock.patch("torch.cuda.reset_peak_memory_stats"))
        self._stack.enter_context(mock.patch("torch.nn.attention.varlen.varlen_attn", self._varlen_attention))
        for place in ("torch.nn.utils.clip_grad", "torch.optim.optimizer"):
            self._stack.enter_context(mock.patch(f"{place}._group_tensors_by_device_and_dtype", _grouped))
        self._stack.enter_context(_Functions(self))
        self._stack.enter_context(_Operations(self))
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def has(self, tensor: Tensor) -> bool:
        """Whether a tensor lies there."""
        if tensor.layout is not torch.strided:
            return False
        found = self._storages.get(tensor.untyped_storage()._cdata)
        return found is not None and not found.expired()

    def mark(self, found: Any) -> Any:
        """Say of all tensors in ``found`` that they lie there."""
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                # While the reference is held, no other storage gets this address.
                self._storages.setdefault(storage._cdata, StorageWeakRef(storage))
        return found

    def unmark(self, tensor: Tensor) -> Tensor:
        """Say of a tensor with a storage of its own that it lies on the CPU."""
        self._storages.pop(tensor.untyped_storage()._cdata, None)
        return tensor

    def _varlen_attention(
        self, q: Tensor, k: Tensor, v: Tensor, borders: Tensor, key_borders: Tensor, longest: int, longest_key: int
    ) -> Tensor:
        """What the kernel computes, from what it takes."""
        assert {each.dtype for each in (q, k, v)} <= {torch.float16, torch.bfloat16}
        assert borders is key_borders
        assert (borders.dtype, longest) == (torch.int32, longest_key)
        self._quiet = True  # the kernel reads the borders on the device
        lengths = [length for length in borders.diff().tolist() if length]
        self._quiet = False
        assert max(lengths) <= longest
        samples = zip(*(each.float().split(lengths) for each in (q, k, v)), strict=True)
        heads_first = ([each.transpose(0, 1)[None] for each in sample] for sample in samples)
        found = [F.scaled_dot_product_attention(*sample)[0].transpose(0, 1) for sample in heads_first]
        return torch.cat(found).to(q.dtype)

    def note(self, counter: Counter[str], what: str) -> None:
        """Count something, with the line of this package that asked."""
        if self._quiet:
            return
        frames = traceback.extract_stack()[:-2]
        own = [each for each in frames if "/dcdit/" in each.filename]
        others = [each for each in frames if "site-packages" in each.filename and "/_" not in each.filename]
        frame = (own or others or frames)[-1]
        counter[f"{what} at {'/'.join(frame.filename.rsplit('/', 2)[1:])}:{frame.name}"] += 1


class _Generator(torch.Generator):
    """One of the CPU, whatever device it is for."""

    def __new__(cls, device: Any = "cpu") -> "_Generator":
        return super().__new__(cls)


class _Autocast(torch.autocast):
    """That of the CPU, whatever device it is for."""

    def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
        super().__init__("cpu", *args, **kwargs)


def _grouped(lists: list[list[Any]], with_indices: bool = False) -> dict[Any, Any]:
    """What torch's own function returns, with the devices that tensors say they are on."""
    found = _group_tensors_by_device_and_dtype(lists, with_indices)
    return {(values[0][0][0].device, dtype): values for (_, dtype), values in found.items()}


def _is_cuda(device: Any) -> bool:
    return device is not None and not isinstance(device, int) and torch.device(device).type == "cuda"


class _Functions(TorchFunctionMode):
    """What Python asks of torch: where tensors are made and moved."""

    def __init__(self, device: PretendCuda) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        tensor = args[0] if args and isinstance(args[0], Tensor) else None
        if tensor is not None and name in ("to", "cpu", "cuda", "numpy", "tolist", "pin_memory", "type", "storage"):
            return self._move(func, name, tensor, args[1:], kwargs)
        if _is_cuda(kwargs.get("device")):
            made = func(*args, **{**kwargs, "device": torch.device("cpu")})
            if name in ("tensor", "as_tensor", "new_tensor"):
                self.device.note(self.device.copies, name)
            return self.device.mark(made)
        if name == "__setitem__" and tensor is not None and self.device.has(tensor) and isinstance(args[1], int):
            self.device.note(self.device.copies, "a number for one index")  # as an H100 showed; slices take it along
        if name == "new_tensor" and tensor is not None and self.device.has(tensor):
            self.device.note(self.device.copies, name)
            return self.device.mark(func(*args, **kwargs))
        return func(*args, **kwargs)

    def _move(self, func: Any, name: str, tensor: Tensor, args: Any, kwargs: Any) -> Any:
        here = self.device.has(tensor)
        if name in ("numpy", "storage") and here:
            raise TypeError("can't convert cuda:0 device type tensor to numpy: copy it to the CPU first")
        if name == "tolist" and here:
            self.device.note(self.device.reads, name)
        if name in ("cpu", "cuda"):
            target, dtype, shape = torch.device(name), None, None
        elif name == "to":
            kwargs.pop("copy", None)
            other = next((each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)), None)
            target, dtype, _, shape = torch._C._nn._parse_to(*args, **kwargs)
            target = other.device if other is not None else target
        else:
            target = None
        if target is None or (target.type == "cuda") == here:
            if name == "to":
                return func(tensor, dtype=dtype, memory_format=shape or torch.preserve_format)
            return tensor if name in ("cpu", "cuda", "pin_memory") else func(tensor, *args, **kwargs)
        moved = torch.Tensor.clone(tensor, memory_format=shape or torch.preserve_format)
        moved = moved if dtype is None else torch.Tensor.to(moved, dtype)
        if here:
            self.device.note(self.device.reads, "copy to the CPU")
            return self.device.unmark(moved)
        self.device.note(self.device.copies, "copy to the device")
        return self.device.mark(moved)


class _Operations(TorchDispatchMode):
    """What torch computes: on which side, and what it must tell the host for that."""

    def __init__(self, device: PretendCuda) -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name, device = func.overloadpacket.__name__, self.device
        tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        there = [each for each in tensors if device.has(each)]
        here = [each for each in tensors if not device.has(each) and each.dim()]
        if not there:
            return func(*args, **kwargs)
        if here and (name not in _MAY_MIX or (name.startswith("index") and not device.has(args[0]))):
            shapes = [tuple(each.shape) for each in here]
            device.note(device.reads, "mixed devices")
            raise MixedDevicesError(f"{func}: tensors on cuda:0 and, of shapes {shapes}, on the CPU")
        if name == "copy_":
            if device.has(args[0]) != device.has(args[1]):
                device.note(
                    *((device.copies, "copy to the device") if device.has(args[0]) else (device.reads, "copy_"))
                )
            return func(*args, **kwargs)
        booleans = [each for each in tree_leaves(args[1:2]) if isinstance(each, Tensor) and each.dtype == torch.bool]
        shaped = name == "repeat_interleave" and kwargs.get("output_size") is None
        if name in _READS or shaped or (name.startswith("index") and booleans):
            device.note(device.reads, name.strip("_"))
        return device.mark(func(*args, **kwargs))
