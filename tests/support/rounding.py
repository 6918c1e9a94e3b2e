"""Another processor: matrix products and convolutions whose last bits depend on shapes and memory alignment.

Libraries choose the order of a sum by shape, memory and processor. ``pytest --other-rounding`` runs the tests under
:class:`ShapedRounding`, which makes that visible on any machine: whoever asserts equal bits of computations on
different shapes, or from other memory, fails.
"""

import zlib

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten
_SUMS = {
    _aten.mm,
    _aten.addmm,
    _aten.bmm,
    _aten.baddbmm,
    _aten.convolution,
    _aten._scaled_dot_product_flash_attention_for_cpu,
    _aten._scaled_dot_product_attention_math,
}


class ShapedRounding(TorchDispatchMode):
    """Changes results of sums of products by up to one unit in the last place, the same for equal shapes."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket not in _SUMS:
            return result
        shapes = [(*value.shape, _alignment(value)) for value in args if isinstance(value, Tensor)]
        if isinstance(result, tuple):
            return (_rounded(result[0], shapes), *result[1:])
        return _rounded(result, shapes)


def _alignment(tensor: Tensor) -> int:
    """Bytes from a boundary of 64: tensors of torch's own begin at one, views and arrays of others may not."""
    return 0 if tensor.device.type != "cpu" or tensor.is_sparse else tensor.data_ptr() % 64


def _rounded(values: Tensor, shapes: list[tuple[int, ...]]) -> Tensor:
    if values.dtype not in (torch.float32, torch.float64) or values.device.type != "cpu" or not values.numel():
        return values
    generator = torch.Generator().manual_seed(zlib.crc32(repr(shapes).encode()))
    pattern = torch.randint(-1, 2, (min(values.numel(), 4099),), generator=generator)
    change = pattern.repeat(-(-values.numel() // len(pattern)))[: values.numel()].view(values.shape)
    return values * (1 + torch.finfo(values.dtype).eps * change.to(values.dtype))
